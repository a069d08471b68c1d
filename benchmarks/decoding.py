"""Reward and win rate of each decoding strategy for its tokens, compared with best-of-n.

    python benchmarks/decoding.py run --setting stories260K --out build/decoding
    python benchmarks/decoding.py report --out build/decoding --plots docs

`run` answers the same prompts with every strategy at several n and keeps one JSON file each, so
that it can be stopped and resumed. Best-of-n is computed for every n from one set of draws a
prompt, by the unbiased estimator over all subsets. `report` prints a table for each setting:
reward, win rate against the base model, tokens an answer, and the tokens that best-of-n needs for
the same reward / the tokens spent. `--plots` plots reward and win rate against tokens.

The reward model's tokens are not counted: a strategy that scores partial completions calls it more
often, which the columns `scored` and `seconds` show.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bonbon.config.sampling import SamplingConfig
from bonbon.decoding import Candidates, Cost, Generation, LocalSource, parse_strategy
from bonbon.demo import PROMPTS, REWARD_MODEL, STORY_MODEL
from bonbon.demo.sentiment import compound
from bonbon.evaluation.best_of_k import best_of_k_means
from bonbon.groups.prompts import EncodedPrompt, PromptRow, read_prompts
from bonbon.models.loading import load_policy
from bonbon.rewards.model import RewardModel
from bonbon.rewards.reward import FunctionReward, Reward, score_groups
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.atomic_files import write_json
from bonbon.system.progress import progress_bar

Floats = NDArray[np.float64]

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE_DRAWS = 256  # a prompt, for best-of-n's curve and as opponents
SEEDS = (0, 1)


@dataclass(frozen=True)
class Setting:
    """A model, a reward, and prompts to answer."""

    name: str
    model: Path
    prompts: Path
    tokens: int
    count: int
    ns: tuple[int, ...]

    def reward(self) -> Reward:
        if self.name == "stories260K":
            return FunctionReward("compound", compound)
        return RewardModel.from_pretrained(str(REWARD_MODEL), device="cpu")

    def rows(self) -> list[PromptRow]:
        return read_prompts(self.prompts, split="eval", limit=self.count)


SETTINGS = {
    "stories260K": Setting(
        "stories260K",
        SHARED / "models" / "stories260K",
        SHARED / "data" / "stories" / "prompts.jsonl",
        tokens=64,
        count=100,
        ns=(4, 16, 64),
    ),
    "demo": Setting("demo", STORY_MODEL, PROMPTS, tokens=48, count=40, ns=(4, 16, 32)),
}


@dataclass(frozen=True)
class Arm:
    """A strategy with its settings at one n."""

    label: str
    strategy: dict[str, Any]
    n: int

    @property
    def key(self) -> str:
        return f"{self.label}-n{self.n}".replace(" ", "_").replace("/", "_")


def mood(completion: str) -> str:
    """Classify a story as sad, neither, or happy; the voting strategies vote on this."""
    score = float(compound([""], [completion])[0])
    return "sad" if score < -0.3 else "happy" if score > 0.3 else "neither"


# Rewards of stories260K are in [−1, 1], those of the demo's reward model in about [−10, 12].
SCALE = {"stories260K": 1.0, "demo": 8.0}


def arms(setting: Setting) -> list[Arm]:
    """List every strategy at every n, and adaptive_n at several prices."""
    scale, tokens = SCALE[setting.name], setting.tokens
    vote = {"extractor": "decoding:mood"}
    strategies: dict[str, dict[str, Any]] = {
        "best_of_n": {"name": "best_of_n"},
        "soft_best_of_n": {"name": "soft_best_of_n", "tau": 0.1 * scale},
        "best_of_poisson": {"name": "best_of_poisson"},
        "rbon_kl": {"name": "rbon_kl", "beta": 0.01 * scale},
        "rbon_wd": {"name": "rbon_wd", "beta": 0.3 * scale},
        "rbon_length": {"name": "rbon_length", "beta": 0.01 * scale},
        "srbon_kl": {"name": "srbon_kl", "beta": 0.1 * scale},
        "srbon_wd": {"name": "srbon_wd", "beta": 0.3 * scale},
        "speculative_rejection α=½": {
            "name": "speculative_rejection", "alpha": 0.5, "checkpoint_tokens": tokens // 4,
        },
        "speculative_rejection α=¼": {
            "name": "speculative_rejection", "alpha": 0.25, "checkpoint_tokens": tokens // 8,
        },
        "tree_bon": {"name": "tree_bon", "layers": 4, "branch": 4},
        "smc": {"name": "smc", "tau": 0.1 * scale, "checkpoint_tokens": tokens // 4},
        "self_consistency": {"name": "self_consistency", **vote},
        "shortest_majority_vote": {"name": "shortest_majority_vote", **vote},
        "reward_weighted_vote": {"name": "reward_weighted_vote", **vote, "tau": 0.2 * scale},
    }  # fmt: skip
    listed = [Arm(label, strategy, n) for n in setting.ns for label, strategy in strategies.items()]
    for price in (1e-3, 2.5e-4, 6e-5):
        listed.append(
            Arm(
                f"adaptive_n price {price:g}",
                {"name": "adaptive_n", "price": price * scale, "batch": 2},
                max(setting.ns),
            )
        )
    return listed


# --- run ------------------------------------------------------------------------------------------


class KeptDraws(LocalSource):
    """A source that caches its last draws: strategies of whole draws ask for the same ones.

    A draw's cost, seconds included, is that of its first time.
    """

    kept: ClassVar[dict[str, list[Candidates]]] = {}

    def draw(self, prompts: Sequence[EncodedPrompt], ks: Sequence[range]) -> list[Candidates]:
        names = [prompt.prompt_id for prompt in prompts]
        key = repr((self.config, names, ks))
        if key not in self.kept:
            if len(self.kept) == 2 * len(SEEDS):
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = super().draw(prompts, ks)
        return self.kept[key]


def run(setting: Setting, out: Path) -> None:
    folder = out / setting.name
    model, tokenizer = load_policy(str(setting.model), device="cpu")
    reward, rows = setting.reward(), setting.rows()
    base = _base(folder / "base.json", model, tokenizer, setting, reward, rows)
    todo = [arm for arm in arms(setting) if not (folder / f"{arm.key}.json").exists()]
    with progress_bar(setting.name, len(todo), "strategies") as bar:
        for arm in todo:
            generations: list[Generation] = []
            for seed in SEEDS:
                config = SamplingConfig(n=arm.n, max_new_tokens=setting.tokens, seed=seed)
                source = KeptDraws(model, tokenizer, config, progress=bar.tokens)
                strategy = parse_strategy(arm.strategy)
                generations += strategy.generate(source.encode(rows), source, reward)
            write_json(folder / f"{arm.key}.json", _measured(arm, generations, base, reward))
            bar.advance(1)


def _base(
    path: Path, model: Any, tokenizer: Any, setting: Setting, reward: Reward, rows: list[PromptRow]
) -> Floats:
    """Return the rewards of the base model's draws, (prompts, BASE_DRAWS)."""
    if not path.exists():
        config = SamplingConfig(n=BASE_DRAWS, max_new_tokens=setting.tokens, seed=1000)
        sampler = TransformersSampler(model, tokenizer, config, stream="base")
        with progress_bar("base draws", len(rows), "prompts") as bar:
            groups = sampler.sample(sampler.encode(rows), progress=bar.tokens)
        lengths = [length for group in groups for length in group.lengths()]
        scores = score_groups(reward, groups)
        write_json(path, {"rewards": scores, "tokens": float(np.mean(lengths))})
    return np.array(json.loads(path.read_text())["rewards"])


def _measured(
    arm: Arm, generations: Sequence[Generation], base: Floats, reward: Reward
) -> dict[str, Any]:
    """Compute an arm's figures; its answers are scored again, as some strategies score none."""
    texts = [generation.completion for generation in generations]
    prompts = [generation.group.prompt for generation in generations]
    rewards = np.asarray(reward(prompts, texts)).reshape(len(SEEDS), -1)
    wins = (rewards[..., None] > base).mean(-1) + 0.5 * (rewards[..., None] == base).mean(-1)
    total = sum((generation.cost for generation in generations), Cost())
    each = {name: value / len(generations) for name, value in asdict(total).items()}
    return {
        "label": arm.label,
        "strategy": arm.strategy,
        "n": arm.n,
        "reward": _mean(rewards.mean(axis=0)),
        "win_rate": _mean(wins.mean(axis=0)),
        "cost": each,
    }


def _mean(per_prompt: Floats) -> tuple[float, float]:
    """Return the mean over prompts and its standard error."""
    return float(per_prompt.mean()), float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))


# --- report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Best-of-k for every k up to half of the base draws: tokens, reward and win rate."""

    tokens: Floats
    reward: Floats
    win_rate: Floats

    @classmethod
    def of(cls, path: Path) -> Curve:
        record = json.loads(path.read_text())
        base = np.array(record["rewards"])
        half = base.shape[1] // 2
        rewards = np.mean([best_of_k_means(row[:half], row[:half]) for row in base], axis=0)
        wins = np.mean([_win_rates(row[:half], row[half:]) for row in base], axis=0)
        return cls(np.arange(1, half + 1) * record["tokens"], rewards, wins)

    def tokens_for(self, reward: float) -> float:
        """Return best-of-k's tokens for a mean reward; NaN below the curve, inf above."""
        if reward < self.reward[0]:
            return math.nan
        if reward > self.reward[-1]:
            return math.inf
        return float(np.exp(np.interp(reward, self.reward, np.log(self.tokens))))


def _win_rates(own: Floats, opponents: Floats) -> Floats:
    wins = (own[:, None] > opponents).mean(1) + 0.5 * (own[:, None] == opponents).mean(1)
    return best_of_k_means(own, wins)


def report(out: Path, plots: Path | None) -> None:
    for name in SETTINGS:
        folder = out / name
        if not (folder / "base.json").exists():
            continue
        curve = Curve.of(folder / "base.json")
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("*-n*.json"))]
        order = [arm.key for arm in sorted(arms(SETTINGS[name]), key=_place)]
        keyed = {Arm(row["label"], row["strategy"], row["n"]).key: row for row in results}
        rows = [keyed[key] for key in order if key in keyed]
        _table(name, curve, rows)
        if plots is not None:
            _plot(name, curve, rows, plots / f"benchmark-decoding-{name}.png")


def _place(arm: Arm) -> tuple[int, int]:
    """Return the sort key of an arm: the strategy, in the order of `arms`, and then n."""
    labels = list(dict.fromkeys(other.label for other in arms(SETTINGS["demo"])))
    return (labels.index(arm.label) if arm.label in labels else len(labels)), arm.n


def _table(name: str, curve: Curve, rows: Sequence[dict[str, Any]]) -> None:
    print(f"\n### {name}\n")
    print("| strategy | n | reward | win rate | tokens | best-of-n's / own | scored | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cost, (reward, error), (win, _) = row["cost"], row["reward"], row["win_rate"]
        ratio = curve.tokens_for(reward) / cost["generated"]
        shown = "–" if math.isnan(ratio) else f"{ratio:.2f}"
        if math.isinf(ratio):
            shown = f"> {curve.tokens[-1] / cost['generated']:.1f}"
        print(
            f"| {row['label']} | {row['n']} | {reward:.3f} ± {error:.3f} | {win:.3f} | "
            f"{cost['generated']:,.0f} | {shown} | {cost['reward_calls']:,.0f} | "
            f"{cost['seconds']:.3f} |"
        )


def _plot(name: str, curve: Curve, rows: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(row["label"].split(" price")[0] for row in rows))
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, what in zip(axes, ("reward", "win_rate"), strict=True):
        axis.plot(curve.tokens, getattr(curve, what), color="black", label="best-of-n, any n")
        for index, label in enumerate(labels):
            mine = [row for row in rows if row["label"].split(" price")[0] == label]
            mine.sort(key=lambda row: row["cost"]["generated"])
            axis.errorbar(
                [row["cost"]["generated"] for row in mine],
                [row[what][0] for row in mine],
                yerr=[row[what][1] for row in mine],
                marker="os^Dv<>pP*Xhd"[index % 13],
                color=colormaps["tab20"](index % 20),
                linewidth=1,
                markersize=5,
                label=label,
            )
        axis.set_xscale("log")
        axis.set_xlabel("tokens generated an answer")
        axis.set_ylabel(what.replace("_", " ") + (" against the base model" * (what != "reward")))
        axis.grid(alpha=0.25)
    figure.suptitle(name)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"\nplot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--setting", choices=list(SETTINGS), required=True)
    running.add_argument("--out", type=Path, required=True)
    reporting = commands.add_parser("report")
    reporting.add_argument("--out", type=Path, required=True)
    reporting.add_argument("--plots", type=Path)
    args = parser.parse_args()
    steps: dict[str, Callable[[], None]] = {
        "run": lambda: run(SETTINGS[args.setting], args.out),
        "report": lambda: report(args.out, args.plots),
    }
    steps[args.command]()


if __name__ == "__main__":
    main()
