"""`bonbon generate`: answers to a file of prompts, shard by shard, and what they cost.

`generations/` holds every candidate as groups, with the metric `chosen` (1 at the chosen one);
`completions.jsonl` the answers alone, `cost.json` the totals. A stop loses at most one shard; the
same command resumes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bonbon.decoding.catalogue import describe_strategy
from bonbon.decoding.config import FUNCTION_NAME, GenerateConfig
from bonbon.decoding.source import LocalSource
from bonbon.decoding.strategy import Generation, Strategy
from bonbon.evaluation.figures import Figure, bootstrap
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt
from bonbon.groups.shards import read_shard, shard_path, shard_paths, write_shard
from bonbon.rewards.from_config import check_functions, opened_reward
from bonbon.rewards.identity import reward_identity, reward_provenance
from bonbon.rewards.reward import Reward
from bonbon.runs.notes import Notes
from bonbon.runs.prompts import read_configured
from bonbon.sampling.cost import Cost
from bonbon.sampling.from_config import load_model
from bonbon.system.atomic_files import write_json, write_text
from bonbon.system.digests import file_digest, weights_digest
from bonbon.system.errors import BonbonError
from bonbon.system.progress import progress_bar
from bonbon.system.user_functions import function_digest, import_function


@dataclass(frozen=True)
class Spent:
    """The total cost of a file of prompts, and the mean reward of its answers."""

    prompts: int
    cost: Cost
    reward: Figure | None

    def per_answer(self) -> Cost:
        """Return the mean cost of one answer, with rounded token counts."""
        return Cost(
            round(self.cost.generated / self.prompts),
            round(self.cost.prefilled / self.prompts),
            round(self.cost.reward_calls / self.prompts),
            self.cost.seconds / self.prompts,
        )


def generate_into(out: Path, config: GenerateConfig) -> Spent:
    """Run the stage, or resume it, in a locked folder. Raises BonbonError as a run does."""
    if config.prompts is None:
        raise BonbonError("there are no prompts; name a file with --prompts, or one by --prompt")
    rows = read_configured(config.prompts)
    shards, notes = out / "generations", Notes(out, config)
    notes.refuse("sample", "rounds", "evaluate", "compare", what="a run or a comparison")
    if not shard_paths(shards):
        notes.forget("generate")  # nothing came of it
    notes.begin("generate", _settings(config, config.prompts.path))
    if not notes.is_finished("generate", shards):
        model, tokenizer = load_model(config.model)
        opened = nullcontext() if config.reward is None else opened_reward(config.reward)
        with opened as reward, progress_bar("generating", 0, "prompts") as bar:
            source = LocalSource(
                model, tokenizer, config.sampling, config.stop, progress=bar.tokens
            )
            prompts = source.encode(rows)
            _warn_of_skipped(len(rows) - len(prompts))
            bar.set(0, len(prompts))
            size = config.sampling.shard_size
            starts = range(0, len(prompts), size)
            for index, start in enumerate(starts):
                if not shard_path(shards, index).exists():
                    part = prompts[start : start + size]
                    _write(shard_path(shards, index), part, source, reward, config)
                bar.set(min(start + size, len(prompts)), len(prompts))
        notes.finish("generate", len(starts))
    return _summarise(out, shards, config)


def _warn_of_skipped(count: int) -> None:
    if count:
        print(f"bonbon: {count} prompts are too long and were skipped", file=sys.stderr)


def _settings(config: GenerateConfig, prompts: Path) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    values["prompts"]["content"] = file_digest(prompts)
    values["strategy"]["loaded"] = _loaded(config.strategy)
    if config.reward is not None:
        check_functions(config.reward)
        values["reward"] = reward_identity(config.reward)
    return values


def _loaded(strategy: Strategy) -> dict[str, str | None]:
    """Return digests of the code and the models that a strategy's settings name."""
    digests: dict[str, str | None] = {}
    for name in sorted(strategy.loads):
        value = getattr(strategy, name)
        value = getattr(value, "implicit", value)
        if isinstance(value, str) and re.fullmatch(FUNCTION_NAME, value):
            import_function(value, name)  # an error is found before anything is drawn
            digests[name] = function_digest(value)
        elif isinstance(value, str) and Path(value).expanduser().is_dir():
            digests[name] = weights_digest(Path(value).expanduser())
    return digests


def _write(
    path: Path,
    prompts: Sequence[EncodedPrompt],
    source: LocalSource,
    reward: Reward | None,
    config: GenerateConfig,
) -> None:
    generations = config.strategy.generate(prompts, source, reward)
    provenance = {
        "model": config.model.name,
        "revision": config.model.revision,
        "sampling": config.sampling.model_dump(mode="json"),
        "dtype": str(source.model.dtype).removeprefix("torch."),
        "strategy": describe_strategy(config.strategy),
        "independent": config.strategy.independent,
        "reward": None if config.reward is None else reward_provenance(config.reward),
        "costs": [asdict(generation.cost) for generation in generations],
    }
    write_shard(path, [marked(generation) for generation in generations], provenance)


def marked(generation: Generation) -> Group:
    """Return the candidates with the metric `chosen`: 1 at the chosen one, 0 elsewhere."""
    group = generation.group
    return group.with_metric("chosen", [float(i == generation.chosen) for i in range(group.n)])


def _summarise(out: Path, shards: Path, config: GenerateConfig) -> Spent:
    lines, rewards, total = [], [], Cost()
    for path in shard_paths(shards):
        shard = read_shard(path)
        for group, spent in zip(shard, shard.provenance["costs"], strict=True):
            chosen = int(np.argmax(group.metrics["chosen"]))
            reward = None if group.rewards is None else group.rewards[chosen]
            record = {
                "prompt_id": group.prompt_id,
                "prompt": group.prompt,
                "completion": group.completions[chosen],
                "reward": reward,
                "finish_reason": group.finish_reasons[chosen],
                "candidates": group.n,
                "cost": spent,
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
            total += Cost(**spent)
            if reward is not None:
                rewards.append(reward)
    mean = bootstrap([np.array(rewards)], lambda value: value) if rewards else None
    spent_in_all = Spent(len(lines), total, mean)
    write_text(out / "completions.jsonl", "".join(lines))
    summary = {
        "strategy": describe_strategy(config.strategy),
        "n": config.sampling.n,
        "prompts": len(lines),
        "reward": None if mean is None else asdict(mean),
        "cost": asdict(total),
        "cost_per_answer": asdict(spent_in_all.per_answer()),
    }
    write_json(out / "cost.json", summary)
    return spent_in_all
