"""Run stages by the configured engine: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence

from bonbon.config.engine import RayEngineConfig
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.work import work_here


def do_stages(folder: RunFolder, stages: Sequence[str]) -> None:
    """Run stages by the configured engine, and note that they are finished."""
    if isinstance(folder.config.engine, RayEngineConfig):
        from bonbon.cluster.data_pipeline import work_on_cluster

        work_on_cluster(folder, stages, folder.config.engine)
    else:
        for stage in stages:
            work_here(folder, stage)
    for stage in stages:
        folder.finish_data(stage)
