"""The stage `sample`: draw completions of the training prompts into `samples/`."""

from __future__ import annotations

from bonbon.runs.fingerprints import refuse_rounds
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
    folder.notes.refuse("compare", what="a comparison")
    folder.notes.refuse("generate", what="answers of `bonbon generate`")
    folder.begin_data("sample")
    if folder.is_done("sample"):
        return False
    if not folder.data_notes.is_finished("prompts", folder.prompts):
        tokenizer, context = named_tokenizer(config.model, config.sampler)
        prompts = prompts_for(folder.rows.training(), tokenizer, context, config.sampling)
        shards = write_prompts(prompts, folder.prompts, config.sampling.shard_size)
        folder.data_notes.finish("prompts", shards)
    return True
