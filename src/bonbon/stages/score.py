"""The stage `score`: score the samples with the reward, into `groups/`."""

from __future__ import annotations

from bonbon.runs.fingerprints import refuse_rounds
from bonbon.runs.run_folder import RunFolder
from bonbon.stages.checks import check_config
from bonbon.stages.engine import do_stages
from bonbon.system.errors import BonbonError


def score(folder: RunFolder) -> None:
    """Score every sampled shard into `groups/`. Raises BonbonError where samples are missing."""
    with folder.data_locked():
        if not begin_scoring(folder):
            return
        if not folder.is_done("sample"):
            raise BonbonError(
                f"{folder.samples} is not complete; run `bonbon sample` to the end first"
            )
        do_stages(folder, ["score"])


def begin_scoring(folder: RunFolder) -> bool:
    """Check what can be checked; whether there is something to score."""
    check_config(folder.config)
    refuse_rounds(folder.config)
    folder.begin_data("score")
    return not folder.is_done("score")
