"""The work of the stages `sample` and `score`, with their models loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.rewards.from_config import opened_reward
from bonbon.rewards.identity import reward_provenance
from bonbon.rewards.reward import Reward, score_groups
from bonbon.runs.run_folder import RunFolder
from bonbon.runs.shard_work import Progress, ShardWork, Transform, work_through
from bonbon.sampling.from_config import opened_sampler, sampler_provenance
from bonbon.sampling.sampler import Sampler


def drawing(sampler: Sampler) -> Transform:
    """A transform that draws the completions of groups that have none."""

    def drawn(groups: Sequence[Group], progress: Progress) -> list[Group]:
        return sampler.sample([EncodedPrompt.of(group) for group in groups], progress)

    return drawn


def scoring(reward: Reward) -> Transform:
    """A transform that scores groups."""

    def scored(groups: Sequence[Group], _: Progress) -> list[Group]:
        scores = score_groups(reward, groups)
        return [group.with_rewards(s) for group, s in zip(groups, scores, strict=True)]

    return scored


@contextmanager
def opened_work(folder: RunFolder, stage: str) -> Iterator[ShardWork]:
    """The work of the stage `sample` or `score`, with its model loaded.

    Raises BonbonError when the model or the reward cannot be loaded.
    """
    config, it = folder.config, folder.stages[stage]
    if stage == "sample":
        with opened_sampler(config.sampler, config.model, config.sampling) as sampler:
            noted = sampler_provenance(sampler, config.model)
            yield ShardWork(it.source, it.output, drawing(sampler), noted)
    else:
        noted = {"reward": reward_provenance(config.reward)}
        with opened_reward(config.reward) as reward:
            yield ShardWork(it.source, it.output, scoring(reward), noted)


def work_here(folder: RunFolder, stage: str) -> None:
    """Do a stage in this process."""
    with opened_work(folder, stage) as work:
        work_through(work, {"sample": "sampling", "score": "scoring"}[stage])
