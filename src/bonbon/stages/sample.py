"""The stage `sample`: draw completions of the training prompts into `samples/`."""

from __future__ import annotations

from bonbon.runs.fingerprints import (
    refuse_rounds,
    sample_settings,
)
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import write_prompts
from bonbon.sampling.encoding import prompts_for
from bonbon.sampling.from_config import named_tokenizer
from bonbon.stages.checks import check_config
from bonbon.stages.engine import do_stages


def sample(folder: RunFolder) -> None:
    """Draw n completions of every training prompt into `samples/`."""
    with folder.data_locked():
        if begin_sampling(folder):
            do_stages(folder, ["sample"])


def begin_sampling(folder: RunFolder) -> bool:
    """Check what can be checked, and write the prompts; whether there is something to draw."""
    config = folder.config
    check_config(config)
    refuse_rounds(config)
    folder.refuse("compare", what="a comparison")
    folder.refuse("generate", what="answers of `bonbon generate`")
    folder.begin_data("sample", sample_settings(config, folder.rows))
    if folder.is_finished("sample", folder.samples):
        return False
    if not folder.store.is_finished("prompts", folder.prompts):
        tokenizer, context = named_tokenizer(config.model, config.sampler)
        prompts = prompts_for(folder.rows.training(), tokenizer, context, config.sampling)
        shards = write_prompts(prompts, folder.prompts, config.sampling.shard_size)
        folder.store.finish("prompts", shards)
    return True
