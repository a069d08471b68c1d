"""Comparison of the objectives: how much of best-of-n's gain each reaches, and at what KL.

    python benchmarks/objectives.py run --out build/objectives [--threads 1]
    python benchmarks/objectives.py report --out build/objectives --document docs/benchmarks.md

`run` trains every method at every learning rate of one grid on the same groups (m completions a
prompt) with the shipped trainer, evaluates on held-out prompts, and keeps one JSON file a training;
it can be stopped, resumed, and started several times in parallel. `report` turns the results so far
into a document of tables and plots. Each figure of a table is a mean over seeds (each seed has its
own groups) with its standard error. Learning rates are chosen on one half of the held-out prompts,
and all figures are from the other half.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from bonbon.config.sampling import SamplingConfig
from bonbon.demo import PROMPTS, REWARD_MODEL, STORY_MODEL
from bonbon.evaluation import best_of_n_win_rate, completion_kls, kl_efficiency, win_rate
from bonbon.groups.group import Group
from bonbon.groups.prompts import PromptRow, read_prompts
from bonbon.groups.shards import read_groups, write_shard
from bonbon.models.loading import load_policy
from bonbon.objectives.catalogue import OBJECTIVES
from bonbon.rewards.model import RewardModel
from bonbon.rewards.reward import FunctionReward, Reward, score_groups
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.atomic_files import write_json, write_text
from bonbon.tilt.best_of_n import BestOfN
from bonbon.tilt.exponential import optimal_kl
from bonbon.training.trainer import BoNBoNConfig, BoNBoNTrainer

SHARED = Path(__file__).resolve().parents[2] / "shared"
DRAWN = 8  # m, completions a group
LEARNING_RATES = (1e-4, 4e-5, 2.5e-4)  # the grid, in the order of the trainings
SEEDS = (0, 1, 2)
BATCH, K, LARGEST_N = 16, 8, 32
DEVELOPMENT, TEST = 0, 1  # every second held-out prompt, from this one on


# --- settings and methods -------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model, a reward and prompts; models are evaluated at `evaluate_at`, shares of the steps."""

    name: str
    model: Path
    prompts: Path
    tokens: int
    training_prompts: int
    evaluation_prompts: int
    evaluate_at: tuple[float, ...]

    def reward(self) -> Reward:
        if self.name == "stories260K":
            return FunctionReward.from_name("bonbon.demo.sentiment:compound")
        return RewardModel.from_pretrained(str(REWARD_MODEL), device="cpu")

    def rows(self, split: str) -> list[PromptRow]:
        limit = self.training_prompts if split == "train" else self.evaluation_prompts
        return read_prompts(self.prompts, "prompt", "prompt_id", split, limit)


SETTINGS = {
    "stories260K": Setting(
        name="stories260K",
        model=SHARED / "models" / "stories260K",
        prompts=SHARED / "data" / "stories" / "prompts.jsonl",
        tokens=64,
        training_prompts=400,
        evaluation_prompts=150,
        evaluate_at=(0.5, 1.0),
    ),
    "demo": Setting(
        name="demo",
        model=STORY_MODEL,
        prompts=PROMPTS,
        tokens=48,
        training_prompts=300,
        evaluation_prompts=100,
        evaluate_at=(1.0,),
    ),
}


@dataclass(frozen=True)
class Method:
    """An objective and its target. Each prompt has `more` groups."""

    objective: str
    n: int = 8
    tilt: str = "best_of_n"
    more: int = 1

    @property
    def name(self) -> str:
        return self.objective + (", optimal tilt" if self.tilt == "optimal" else "")

    @property
    def key(self) -> str:
        return f"{self.objective}-{self.tilt}-n{self.n}-x{self.more}"

    @property
    def epochs(self) -> float:
        """The epochs of training: two, or one where there are more groups."""
        return 2.0 if self.more == 1 else 1.0


CORE = (
    Method("rank_regression", tilt="optimal"),
    Method("bonbon"),
    Method("sft_bon"),
    Method("rank_regression"),
)
MORE = {
    "stories260K": (
        Method("rank_regression", tilt="optimal", more=8),
        Method("bonbon", more=8),
    ),
    "demo": (
        Method("rank_regression", tilt="optimal", more=4),
        Method("bonbon", more=4),
    ),
}
FURTHER = (
    Method("bonbon_ranks", tilt="optimal"),
    Method("dpo"),
    Method("dpo_random_pair"),
    Method("dpo_best_random"),
    Method("ipo_bon"),
    Method("ipo"),
    Method("ipo_random_pair"),
    Method("ipo_best_random"),
    Method("rank_regression_pointwise", tilt="optimal"),
    Method("rank_regression_huber"),
)
OTHER_N = (
    Method("rank_regression", n=4, tilt="optimal"),
    Method("rank_regression", n=32, tilt="optimal"),
    Method("bonbon", n=4),
    Method("weighted_sft", n=4),
    Method("weighted_sft", n=32),
)


@dataclass(frozen=True)
class Training:
    """A training run: setting, method, learning rate and seed."""

    setting: str
    method: Method
    learning_rate: float
    seed: int

    def path(self, out: Path) -> Path:
        name = f"{self.method.key}-{self.learning_rate:g}-seed{self.seed}.json"
        return out / self.setting / "results" / name


def trainings() -> Iterator[Training]:
    """Yield every training, the most informative ones first."""
    middle, low, high = LEARNING_RATES
    pairs = tuple(method for method in CORE if method.objective == "bonbon")
    others = tuple(method for method in CORE if method not in pairs)
    for setting, methods, rates in (
        ("stories260K", CORE, (middle,)),
        ("stories260K", MORE["stories260K"], (middle,)),
        ("demo", CORE, (middle,)),
        ("stories260K", pairs, (low,)),
        ("stories260K", others, (high,)),
        ("stories260K", FURTHER, (middle,)),
        ("stories260K", OTHER_N, (middle,)),
        ("demo", pairs, (low,)),
        ("demo", others, (high,)),
        ("demo", MORE["demo"], (middle,)),
        ("stories260K", (*CORE, *FURTHER, *OTHER_N), (low, high)),
        ("demo", CORE, (low, high)),
        ("demo", (*FURTHER, *OTHER_N), LEARNING_RATES),
    ):
        for rate in rates:
            for method in methods:
                for seed in SEEDS:
                    yield Training(setting, method, rate, seed)


# --- groups ---------------------------------------------------------------------------------------


def draw(setting: Setting, split: str, n: int, seed: int, folder: Path) -> list[Group]:
    """Return the base model's scored groups, drawn once and kept in `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / "shard-00000.parquet").exists():
            model, tokenizer = load_policy(str(setting.model), dtype="float32", device="cpu")
            config = SamplingConfig(n=n, max_new_tokens=setting.tokens, seed=seed)
            sampler = TransformersSampler(model, tokenizer, config, split)
            groups = sampler.sample(sampler.encode(setting.rows(split)))
            scores = score_groups(setting.reward(), groups)
            scored = [g.with_rewards(s) for g, s in zip(groups, scores, strict=True)]
            folder.mkdir(exist_ok=True)
            write_shard(folder / "shard-00000.parquet", scored, {})
        return list(read_groups(folder))


def training_groups(setting: Setting, method: Method, seed: int, out: Path) -> list[Group]:
    """Return `more` groups a prompt: of m draws, or of n where the objective requires n."""
    size = DRAWN if OBJECTIVES[method.objective].any_tilt else min(method.n, DRAWN)
    folder = out / setting.name / f"groups-x{method.more}-seed{seed}"
    drawn = draw(setting, "train", DRAWN * method.more, seed, folder)
    starts = range(0, DRAWN * method.more, DRAWN)
    return [part(group, start, size) for start in starts for group in drawn]


def part(group: Group, start: int, size: int) -> Group:
    """Return `size` of a group's completions as a group."""
    assert group.rewards is not None
    columns = slice(start, start + size)
    return replace(
        group,
        prompt_id=f"{group.prompt_id}/{start}",
        completions=group.completions[columns],
        token_ids=group.token_ids[columns],
        logprobs=group.logprobs[columns],
        finish_reasons=group.finish_reasons[columns],
        rewards=group.rewards[columns],
    )


class locked:  # noqa: N801 (a context manager)
    """A file lock, so that parallel workers do nothing twice."""

    def __init__(self, path: Path, wait: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(self._handle)
            raise

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)


# --- training and measuring -----------------------------------------------------------------------


class Bench:
    """A worker's data for a setting: the base model, the reward and the base's draws."""

    def __init__(self, setting: Setting, out: Path) -> None:
        self.setting = setting
        self.out = out
        self.base, self.tokenizer = load_policy(str(setting.model), dtype="float32", device="cpu")
        self.reward = setting.reward()
        folder = out / setting.name / "evaluation"
        self.evaluation = draw(setting, "eval", K + LARGEST_N, 1, folder)

    def train(self, training: Training) -> list[dict[str, Any]]:
        """Run a training; return its measurements, one for each point of `evaluate_at`."""
        groups = training_groups(self.setting, training.method, training.seed, self.out)
        method, points = training.method, list[dict[str, Any]]()
        steps = round(method.epochs * np.ceil(len(groups) / BATCH))
        at = {max(1, round(share * steps)) for share in self.setting.evaluate_at}
        bench, began, measuring = self, time.monotonic(), 0.0

        class Measure(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                nonlocal measuring
                if state.global_step in at:
                    start = time.monotonic()
                    point = bench.measure(kwargs["model"], training)
                    point |= {"step": state.global_step, "seconds": start - began - measuring}
                    points.append(point)
                    measuring += time.monotonic() - start

        args = BoNBoNConfig(
            str(self.out / "trainer"),
            objective=method.objective,
            tilt=method.tilt,
            n=method.n,
            learning_rate=training.learning_rate,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            max_batch_tokens=4096,
            adam_beta2=0.98,
            warmup_steps=0.05,
            seed=training.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = BoNBoNTrainer(
            copy.deepcopy(self.base),
            args,
            groups,
            processing_class=self.tokenizer,
            callbacks=[Measure()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return points

    def measure(self, policy: Any, training: Training) -> dict[str, Any]:
        """Measure wins against the base's draws, KLs and lengths by prompt, and distinct-2."""
        policy.eval()
        config = SamplingConfig(n=K, max_new_tokens=self.setting.tokens, seed=1)
        sampler = TransformersSampler(policy, self.tokenizer, config, f"{training.method.key}")
        groups = sampler.sample(sampler.encode(self.setting.rows("eval")))
        rewards = score_groups(self.reward, groups)
        kls = completion_kls(policy, self.base, groups)
        policy.train()
        pairs = list(zip(rewards, self.evaluation, strict=True))
        return {
            "wins": [win_rate(ours, base.rewards or ()) for ours, base in pairs],
            "kls": [float(np.mean(kl.rao_blackwellised)) for kl in kls],
            "lengths": [float(np.mean(group.lengths())) for group in groups],
            "distinct_2": distinct_2(groups),
        }


def distinct_2(groups: Iterable[Group]) -> float:
    """Compute distinct / all pairs of neighbouring tokens (Li et al. 2016)."""
    pairs = [
        pair
        for group in groups
        for ids in group.token_ids
        for pair in zip(ids, ids[1:])  # noqa: B905, RUF007
    ]
    return len(set(pairs)) / len(pairs)


def run(out: Path) -> None:
    """Run every training that no other worker runs."""
    benches: dict[str, Bench] = {}
    for training in trainings():
        path = training.path(out)
        if path.exists():
            continue
        try:
            lock = locked(path.with_suffix(".lock"), wait=False)
        except BlockingIOError:
            continue
        with lock:
            if path.exists():
                continue
            if training.setting not in benches:
                benches[training.setting] = Bench(SETTINGS[training.setting], out)
            points = benches[training.setting].train(training)
            write_json(path, {"job": asdict(training), "points": points})
            last = points[-1]
            print(
                f"{path.stem} ({training.setting}): win rate {np.mean(last['wins']):.3f} at "
                f"{np.mean(last['kls']):.2f} nats, {last['seconds']:.0f} s",
                flush=True,
            )


# --- the report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One trained model on one half of the held-out prompts."""

    recovered: float
    win_rate: float
    kl: float
    length_change: float
    distinct_2: float
    seconds: float

    @property
    def efficiency(self) -> float:
        """The least KL for this win rate / the measured KL."""
        return float(kl_efficiency(self.win_rate, self.kl))


@dataclass(frozen=True)
class Curve:
    """A method in a setting: the points along its training, by learning rate and seed."""

    setting: str
    method: Method
    development: dict[tuple[float, int], list[Point]]
    test: dict[tuple[float, int], list[Point]]

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.test})

    def best_rate(self) -> float:
        """Return the learning rate with the best mean final score, on the development prompts.

        The score is the KL efficiency if the models recover 0.8 of best-of-n's gain; if none does,
        it is the recovered share.
        """
        runs = Counter(rate for rate, _ in self.development)
        rates = sorted(rate for rate in runs if runs[rate] == max(runs.values()))

        def score(rate: float) -> tuple[bool, float]:
            ends = [points[-1] for (r, _), points in self.development.items() if r == rate]
            recovered = float(np.mean([end.recovered for end in ends]))
            enough = recovered >= 0.8
            return enough, float(np.mean([e.efficiency for e in ends])) if enough else recovered

        return max(rates, key=score)

    def ends(self, rate: float) -> list[Point]:
        return [points[-1] for (r, _), points in sorted(self.test.items()) if r == rate]

    def efficiency_at(self, recovered: float, best_win_rate: float) -> list[float]:
        """Return each seed's KL efficiency where its curve reaches `recovered`, NaN if it does not.

        The curve goes from the base model through a seed's points in order of the recovered share,
        and skips points that are worse than another in both. √KL is interpolated linearly, since
        the gain is proportional to it for small changes of a policy.
        """
        win = 0.5 + recovered * (best_win_rate - 0.5)
        least = float(optimal_kl(win))
        efficiencies = []
        for seed in self.seeds:
            points = [p for (_, s), ps in self.test.items() if s == seed for p in ps]
            gains, kls = _envelope(points)
            reached = gains[-1] >= recovered
            kl = float(np.interp(recovered, gains, np.sqrt(kls))) ** 2
            efficiencies.append(least / kl if reached else np.nan)
        return efficiencies


def _envelope(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    gains, kls = [0.0], [0.0]
    for point in sorted(points, key=lambda p: p.kl):
        if point.recovered > gains[-1]:
            gains.append(point.recovered)
            kls.append(point.kl)
    return gains, kls


def load_curves(out: Path) -> list[Curve]:
    """Read the results of `run` in `out`, by setting and method."""
    records_of: dict[tuple[str, Method], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(out.glob("*/results/*.json")):
        record = json.loads(path.read_text())
        records_of[record["job"]["setting"], Method(**record["job"]["method"])].append(record)
    more = [method for methods in MORE.values() for method in methods]
    order = {method: i for i, method in enumerate((*CORE, *more, *FURTHER, *OTHER_N))}
    curves = []
    for (name, method), records in records_of.items():
        folder = out / name / "evaluation"
        development, test = (
            {
                (r["job"]["learning_rate"], r["job"]["seed"]): [
                    _point(p, base_half(folder, start, method.n), start) for p in r["points"]
                ]
                for r in records
            }
            for start in (DEVELOPMENT, TEST)
        )
        curves.append(Curve(name, method, development, test))
    return sorted(curves, key=lambda c: (c.setting != "stories260K", order.get(c.method, 99)))


@dataclass(frozen=True)
class BaseHalf:
    """Figures of every second held-out prompt: best-of-n's win rate, the base's mean tokens."""

    best_win_rate: float
    length: float


@lru_cache
def base_half(folder: Path, start: int, n: int) -> BaseHalf:
    """Compute the figures of the prompts start, start + 2, … from the base's draws in `folder`."""
    groups = list(read_groups(folder))[start::2]
    rewards = [group.rewards or () for group in groups]
    return BaseHalf(
        best_win_rate=float(np.mean([best_of_n_win_rate(r, r, n) for r in rewards])),
        length=float(np.mean([np.mean(group.lengths()) for group in groups])),
    )


def _point(values: dict[str, Any], base: BaseHalf, start: int) -> Point:
    win = float(np.mean(values["wins"][start::2]))
    return Point(
        recovered=(win - 0.5) / (base.best_win_rate - 0.5),
        win_rate=win,
        kl=float(np.mean(values["kls"][start::2])),
        length_change=float(np.mean(values["lengths"][start::2]) - base.length),
        distinct_2=values["distinct_2"],
        seconds=values["seconds"],
    )


def mean_error(values: Sequence[float], digits: int = 3) -> str:
    """Format mean ± standard error; a dash where a seed has no value."""
    if not values or any(np.isnan(values)):
        reached = sum(not np.isnan(value) for value in values)
        return f"– ({reached} of {len(values)} seeds)" if reached else "–"
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{np.mean(values):.{digits}f} ± {error:.{digits}f}"


def table(curves: Sequence[Curve], best_win_rate: float) -> list[str]:
    """Tabulate the methods, each at its best learning rate and along its curve."""
    lines = [
        "| method | seeds | lr | win rate | KL (nats) | recovered | KL efficiency | "
        "… at recovered 0.8 | … at 1.0 | length change | distinct-2 | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        rate = curve.best_rate()
        ends = curve.ends(rate)
        columns = [
            mean_error([end.win_rate for end in ends]),
            mean_error([end.kl for end in ends], 2),
            mean_error([end.recovered for end in ends], 2),
            mean_error([end.efficiency for end in ends]),
            mean_error(curve.efficiency_at(0.8, best_win_rate)),
            mean_error(curve.efficiency_at(1.0, best_win_rate)),
            mean_error([end.length_change for end in ends], 1),
            f"{np.mean([end.distinct_2 for end in ends]):.3f}",
            f"{np.median([end.seconds for end in ends]):.0f}",
        ]
        more = f", {curve.method.more} times the draws" if curve.method.more > 1 else ""
        row = [f"{curve.method.name}{more}", str(len(ends)), f"{rate:g}", *columns]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def plot(curves: Sequence[Curve], n: int, path: Path) -> None:
    """Plot win rate against KL: for each method a line through its means over seeds."""
    from bonbon.report.paper_plots import plot_curves

    lines = {}
    for curve in curves:
        means = []
        for rate in sorted({rate for rate, _ in curve.test}):
            runs = [points for (r, _), points in curve.test.items() if r == rate]
            for at in zip(*runs, strict=True):
                means.append(
                    (float(np.mean([p.kl for p in at])), float(np.mean([p.win_rate for p in at])))
                )
        more = f", {curve.method.more}× draws" if curve.method.more > 1 else ""
        lines[curve.method.name + more] = sorted(means)
    plot_curves(lines, n, path)


TITLES = {
    "stories260K": "stories260K with VADER's sentiment",
    "demo": "The demo's story model with its reward model",
}


def report(out: Path, document: Path) -> None:
    """Write tables and plots of the results so far between the document's markers."""
    curves, lines = load_curves(out), list[str]()
    for name in dict.fromkeys(curve.setting for curve in curves):
        setting = SETTINGS[name]
        lines += [
            f"### {TITLES[name]}",
            "",
            f"{setting.training_prompts} prompts × {DRAWN} completions of at most {setting.tokens} "
            f"tokens, {setting.evaluation_prompts} held-out prompts × {K}.",
            "",
        ]
        for n in sorted({c.method.n for c in curves if c.setting == name}, key=lambda n: n != 8):
            chosen = [c for c in curves if c.setting == name and c.method.n == n]
            best = base_half(out / name / "evaluation", TEST, n).best_win_rate
            image = document.parent / f"benchmark-{name}-n{n}.png"
            plot(chosen, n, image)
            lines += [
                f"#### n = {n}",
                "",
                f"Best-of-{n} itself wins {best:.3f} at {BestOfN(n).kl():.2f} nats.",
                "",
                *table(chosen, best),
                "",
                f"![Win rate against KL of every method at n = {n}]({image.name})",
                "",
            ]
    text = document.read_text(encoding="utf-8") if document.exists() else f"{BEGIN}\n{END}\n"
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    write_text(document, head + BEGIN + "\n\n" + "\n".join(lines) + "\n" + END + tail)


BEGIN, END = "<!-- benchmarks/objectives.py writes from here -->", "<!-- to here -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["run", "report"])
    parser.add_argument("--out", type=Path, default=Path("build/objectives"))
    parser.add_argument("--document", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    args = parser.parse_args()
    if args.command == "run":
        torch.set_num_threads(args.threads)
        run(args.out)
    else:
        report(args.out, args.document)


if __name__ == "__main__":
    main()
