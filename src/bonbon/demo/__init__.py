"""The built-in demo: happier bedtime stories, by two small models in the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bonbon.config.run import RunConfig, parse_config

if TYPE_CHECKING:
    from bonbon.groups.group import Group
    from bonbon.runs.run_folder import RunFolder

HERE = Path(__file__).parent
STORY_MODEL = HERE / "story-model"
REWARD_MODEL = HERE / "reward-model"
PROMPTS = HERE / "prompts.jsonl"


def demo_config(*, short: bool = False, seed: int = 0) -> RunConfig:
    """Return the demo's configuration; `short` uses fewer prompts and gives rougher figures."""
    prompts = {"path": str(PROMPTS), "split": "train", "limit": 160 if short else None}
    held_out = {"path": str(PROMPTS), "split": "eval", "limit": 32 if short else None}
    training: dict[str, Any] = {
        "epochs": 4 if short else 2,
        "batch_size": 16,
        "seed": seed,
    }
    return parse_config(
        {
            "model": {"name": str(STORY_MODEL), "device": "cpu"},
            "prompts": prompts,
            "sampling": {"n": 8, "max_new_tokens": 48, "seed": seed},
            "reward": {"model": str(REWARD_MODEL), "device": "cpu"},
            "train": {**training, "objective": "rank_regression", "learning_rate": 2e-4},
            "baselines": {
                "bonbon": {**training, "objective": "bonbon", "learning_rate": 8e-5},
                "sft_bon": {**training, "objective": "sft_bon", "learning_rate": 3e-4},
            },
            "evaluation": {
                "prompts": held_out,
                "k": 8,
                "seed": seed + 1,
                "rewards": {"gold": {"function": "bonbon.demo.sentiment:compound"}},
            },
        },
        source="the demo's configuration",
    )


def side_by_side(folder: RunFolder, openings: int = 5) -> str:
    """Return some held-out openings, each with a continuation of the base and the aligned model.

    The openings are evenly spaced, not selected by result; each continuation follows its gold
    reward.
    """
    from bonbon.groups.shards import read_groups

    base = read_groups(folder.evaluation / "base")
    aligned = read_groups(folder.evaluation / folder.config.model_name)
    lines = [
        "",
        "Some held-out openings, with each model's first draw and its gold reward (-1 to 1):",
    ]
    step = max(1, len(base) // openings)
    for before, after in list(zip(base, aligned, strict=True))[::step][:openings]:
        lines += [
            "",
            f"  {_one_line(str(before.prompt))}",
            f"    base     {_judged(before)}",
            f"    aligned  {_judged(after)}",
        ]
    return "\n".join(lines)


def _judged(group: Group) -> str:
    return f"{group.metrics['gold'][0]:+.2f}  …{_one_line(group.completions[0])}"


def _one_line(text: str) -> str:
    """Join a text to one line without control characters, which could steer a terminal."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
