"""Policies side by side: what is compared, what is kept, and what is measured of each."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bonbon.cli.main import app
from bonbon.config.run import RunConfig, parse_config
from bonbon.evaluation import best_of_k_weights
from bonbon.evaluation.judge import Comparison
from bonbon.groups.shards import read_groups
from bonbon.report import write_report
from bonbon.runs.run_folder import RunFolder
from bonbon.sampling.transformers import TransformersSampler
from bonbon.stages import evaluate as evaluate_stage
from bonbon.stages import run as run_stage
from bonbon.stages import sample as sample_stage
from bonbon.stages.compare import PolicySpec, _model, compare, comparison_config, parse_policy
from bonbon.system.errors import BonbonError
from bonbon.tilt.best_of_n import BestOfN
from support.models import build_tiny_model
from support.reports import check_main_table

N, K, PROMPTS = 3, 4, 10

REWARDS = """
calls = []

def vowels(prompts, completions):
    calls.append(len(completions))
    return [sum(c in "aeiou" for c in text) + 1e-3 * len(text) for text in completions]

def upper(prompts, completions):
    calls.append(len(completions))
    return [float(sum(c.isupper() for c in text)) for text in completions]

def broken(prompts, completions):
    return [float("nan")] * len(completions)
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to work in, with a module of rewards and prompts."""
    place = tmp_path_factory.mktemp("compare")
    (place / "rewards_to_compare.py").write_text(REWARDS)
    lines = "".join(f"A story about number {i} and\n" for i in range(5 * PROMPTS))
    (place / "prompts.txt").write_text(lines)
    (place / "held_out.txt").write_text(lines.replace("story", "song")[: 26 * PROMPTS])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


def settings(tiny_model: Path, **evaluation: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name": str(tiny_model), "device": "cpu"},
            "prompts": {"path": "prompts.txt"},
            "sampling": {"n": N, "max_new_tokens": 10, "shard_size": 4},
            "reward": {"function": "rewards_to_compare:vowels"},
            "train": {"learning_rate": 3e-3, "epochs": 2, "batch_size": 8},
            "baselines": {
                "adapter": {"objective": "ipo_bon", "learning_rate": 1e-2, "lora": {"r": 2}}
            },
            "evaluation": {
                "prompts": {"path": "held_out.txt"},
                "k": K,
                "bootstrap": 100,
                **evaluation,
            },
        }
    )


@pytest.fixture(scope="module")
def run(workplace: Path, tiny_model: Path) -> RunFolder:
    folder = RunFolder(Path("run"), settings(tiny_model))
    with folder.locked():
        run_stage.run(folder)
    return folder


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


def drawn(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.glob("evaluation/*-samples/*.parquet")}


# --- the run's own evaluation ---------------------------------------------------------------------


def test_the_figures_are_there_for_every_model(run: RunFolder) -> None:
    found = figures(run.path)
    assert list(found["models"]) == ["base", f"best-of-{N}", "adapter", "rank_regression"]
    assert found["main"] == "rank_regression"
    for name in ("adapter", "rank_regression"):
        model = found["models"][name]
        assert set(model["kl_estimates"]) == {"rao_blackwellised", "plain", "k3"}
        assert set(model["forward_kl"]) == set(model["kl_estimates"])
        assert model["kl"] == model["kl_estimates"]["rao_blackwellised"]
        assert 0 < model["length_controlled_win_rate"]["value"] < 1
        assert set(model["drift"]) == set(found["metrics"])
        assert model["drift"]["length"] == pytest.approx(model["length_change"])
    best = found["models"][f"best-of-{N}"]
    assert best["forward_kl"]["closed_form"]["value"] == pytest.approx(N - 1 - np.log(N))
    assert [point["k"] for point in found["best_of_k"]] == [1, 2, 3]  # too few to go on from
    assert found["best_of_k"][-1]["win_rate"] == best["win_rate"]
    assert found["pairs"][0]["ours"] == "adapter"


def test_costs_are_counted(run: RunFolder) -> None:
    cost = figures(run.path)["cost"]
    tokens = sum(sum(group.lengths()) for group in read_groups(run.samples))
    assert cost["sampling"]["tokens"] == tokens
    assert set(cost["training"]) == {"adapter", "rank_regression"}
    assert all(cost[stage]["seconds"] > 0 for stage in ("sampling", "scoring", "evaluation"))


def test_a_new_metric_needs_no_new_sampling(
    run: RunFolder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rewards_to_compare  # type: ignore[import-not-found]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(TransformersSampler, "sample", refuse)
    before, plain = drawn(run.path), figures(run.path)
    rewards_to_compare.calls.clear()
    function = "rewards_to_compare:upper"
    with_metric = RunFolder(run.path, settings(tiny_model, metrics={"upper": function}))
    evaluate_stage.evaluate(with_metric)
    # The new metric alone was computed: of k + n draws of the base, and k of each model.
    assert sum(rewards_to_compare.calls) == PROMPTS * (K + N + 2 * K)
    found = figures(run.path)
    assert found["metrics"]["upper"] == {"label": "upper", "unit": ""}
    base = read_groups(run.evaluation / "base")
    upper = np.mean([[sum(map(str.isupper, text)) for text in g.completions] for g in base])
    assert found["models"]["base"]["metrics"]["upper"]["value"] == pytest.approx(upper)
    for name, model in plain["models"].items():
        assert found["models"][name]["win_rate"] == model["win_rate"]
    assert "upper" in (run.path / "config.yaml").read_text()
    # As a further reward it is computed again, since it may mean something else by now.
    as_reward = {"upper": {"function": function}}
    evaluate_stage.evaluate(RunFolder(run.path, settings(tiny_model, rewards=as_reward)))
    found = figures(run.path)
    assert set(found["models"]["rank_regression"]["win_rate_by"]) == {"upper"}
    assert "upper" not in found["metrics"]
    assert drawn(run.path) == before
    evaluate_stage.evaluate(run)
    assert {**figures(run.path), "cost": None} == {**plain, "cost": None}


def test_a_metric_that_fails_loses_nothing(run: RunFolder, tiny_model: Path) -> None:
    broken = settings(tiny_model, metrics={"broken": "rewards_to_compare:broken"})
    before = figures(run.path)
    with pytest.raises(BonbonError, match="is nan; a reward must be finite"):
        evaluate_stage.evaluate(RunFolder(run.path, broken))
    assert figures(run.path) == before
    evaluate_stage.evaluate(run)
    assert {**figures(run.path), "cost": None} == {**before, "cost": None}


def test_other_draws_are_refused(run: RunFolder, tiny_model: Path) -> None:
    with pytest.raises(BonbonError, match=r"evaluation\.k was 4 and is now 5"):
        evaluate_stage.evaluate(RunFolder(run.path, settings(tiny_model, k=5)))


def test_human_text_shows_what_was_forgotten(run: RunFolder, tiny_model: Path) -> None:
    Path("people.txt").write_text("We walked to the shop.\nIt rained all day.\n" * 3)
    config = settings(tiny_model, human_text={"path": "people.txt"})
    evaluate_stage.evaluate(RunFolder(run.path, config))
    models = figures(run.path)["models"]
    assert models["base"]["human_text"]["forgetting"]["value"] == 0
    text = models["rank_regression"]["human_text"]
    before = models["base"]["human_text"]["perplexity"]["value"]
    change = np.log(text["perplexity"]["value"]) - np.log(before)
    assert text["forgetting"]["value"] == pytest.approx(change)
    assert change != 0
    assert models[f"best-of-{N}"]["human_text"] is None
    evaluate_stage.evaluate(run)


def test_a_judge_s_win_rate(
    run: RunFolder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model's draws and best-of-n's choice against the base's draws; unreadable is counted."""
    asked: dict[str, list[Comparison]] = {}

    def judge(config: Any, comparisons: list[Comparison], path: Path, progress: Any) -> list[float]:
        assert config.model == "org/judge-1"
        asked[str(len(asked))] = comparisons
        first = [float("nan")] if len(asked) == 2 else []
        return (first + [0.75] * len(comparisons))[: len(comparisons)]

    monkeypatch.setattr(evaluate_stage, "judge_comparisons", judge)
    config = settings(tiny_model, judge={"model": "org/judge-1", "pairs": 2})
    evaluate_stage.evaluate(RunFolder(run.path, config))
    models = figures(run.path)["models"]
    best, adapter = models[f"best-of-{N}"]["judge"], models["adapter"]["judge"]
    assert best == {
        "win_rate": {"value": 0.75, "low": 0.75, "high": 0.75},
        "comparisons": 2 * PROMPTS,
        "unreadable": 0,
    }
    assert (adapter["comparisons"], adapter["unreadable"]) == (2 * PROMPTS, 1)
    assert adapter["win_rate"]["value"] == 0.75
    base = read_groups(run.evaluation / "base")
    for group, pair in zip(base, zip(*[iter(asked["0"])] * 2, strict=True), strict=True):
        assert group.rewards is not None
        chosen = group.completions[K + int(np.argmax(group.rewards[K : K + N]))]
        assert [it.ours for it in pair] == [chosen] * 2
        assert [it.theirs for it in pair] == list(group.completions[:2])
    ours = read_groups(run.evaluation / "adapter")
    assert [it.ours for it in asked["1"]] == [text for g in ours for text in g.completions[:2]]
    evaluate_stage.evaluate(run)
    assert figures(run.path)["models"]["adapter"]["judge"] is None


# --- comparisons ----------------------------------------------------------------------------------


def compared(out: str, config: RunConfig, policies: Sequence[str]) -> dict[str, Any]:
    folder = RunFolder(Path(out), config)
    with folder.locked():
        compare(folder, [parse_policy(text) for text in policies])
    return figures(Path(out))


def test_models_adapters_and_decodings(run: RunFolder, tiny_model: Path) -> None:
    policies = ["run", "lora=run/baselines/adapter", "base@best-of-2", "base@temperature=0.5"]
    specs = [parse_policy(text) for text in policies]
    config = comparison_config(specs, None)
    assert config.prompts == run.config.prompts
    found = compared("cmp", config, policies)
    models = found["models"]
    names = ["run", "lora", "base-best-of-2", "base-temperature-0-5"]
    assert list(models) == ["base", f"best-of-{N}", *names]
    assert found["main"] is None
    assert len(found["pairs"]) == 6

    # Best-of-2 of the base itself: the KL of the tilt, and the tilt's weights on its draws.
    best = models["base-best-of-2"]
    assert best["kl"]["value"] == pytest.approx(BestOfN(2).kl(), abs=1e-6)
    assert best["best_of"] == 2
    groups = read_groups(Path("cmp/evaluation/base-best-of-2"))
    assert {group.n for group in groups} == {K + 1}
    opponents = read_groups(Path("cmp/evaluation/base"))
    wins = []
    for ours, base in zip(groups, opponents, strict=True):
        weights = best_of_k_weights(ours.rewards)[1]
        gap = np.subtract.outer(ours.rewards, base.rewards[:K])
        wins.append(float(weights @ ((gap > 0) + 0.5 * (gap == 0)).mean(axis=1)))
    assert best["win_rate"]["value"] == pytest.approx(np.mean(wins))
    assert best["tokens_per_answer"]["value"] == pytest.approx(
        2 * np.mean([np.mean(group.lengths()) for group in groups])
    )
    assert models["base-temperature-0-5"]["kl"]["value"] > 0.1

    # A policy that is added later draws nothing of the others again.
    before = drawn(Path("cmp"))
    again = compared("cmp", config, [*policies, "base@top_k=3"])
    assert drawn(Path("cmp")).items() >= before.items()
    assert again["models"]["run"]["win_rate"] == models["run"]["win_rate"]
    # The base can draw what the cut policy cannot: infinite one way, and finite the other.
    assert again["models"]["base-top_k-3"]["kl"]["value"] > 0
    assert again["models"]["base-top_k-3"]["forward_kl"] is None


def test_a_model_of_another_vocabulary_has_no_kl(
    workplace: Path, tiny_model: Path, stories260k: Path
) -> None:
    found = compared("other", settings(tiny_model), [f"stories={stories260k}"])
    model = found["models"]["stories"]
    assert (model["kl"], model["kl_efficiency"], model["forward_kl"]) == (None, None, None)
    assert 0 <= model["win_rate"]["value"] <= 1


def test_an_edited_reward_is_computed_again(
    run: RunFolder, tiny_model: Path, workplace: Path
) -> None:
    module = workplace / "edited_reward.py"
    config = settings(tiny_model, metrics={"edited": "edited_reward:one"})
    for value in (1.0, 2.0):
        module.write_text(
            f"def one(prompts, completions):\n    return [{value}] * len(completions)\n"
        )
        sys.modules.pop("edited_reward", None)
        importlib.invalidate_caches()
        evaluate_stage.evaluate(RunFolder(run.path, config))
        assert figures(run.path)["models"]["base"]["metrics"]["edited"]["value"] == value
    evaluate_stage.evaluate(run)


def test_prompts_too_long_for_one_policy_are_left_out_for_all(
    workplace: Path, tiny_model: Path
) -> None:
    short = build_tiny_model(workplace / "short", seed=3)
    values = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 34}))
    lines = "".join(f"Prompt {i} {'and more ' * (i % 3)}\n" for i in range(9))
    (workplace / "mixed.txt").write_text(lines)
    base = settings(tiny_model, prompts={"path": "mixed.txt"}).model_dump(mode="json")
    base["sampling"]["on_long_prompt"] = "skip"
    found = compared("skipped", parse_config(base), ["short"])
    assert (found["prompts"], found["prompts_left_out"]) == (6, 3)
    assert "3 prompts were too long" in write_report(Path("skipped")).read_text()


def test_a_base_model_that_cuts_has_one_estimate(workplace: Path, tiny_model: Path) -> None:
    """What the cut policy drew says nothing of the models' log-ratios."""
    build_tiny_model(workplace / "other-model", seed=4)
    values = settings(tiny_model).model_dump(mode="json")
    values["sampling"]["top_k"] = 5
    values |= {"train": {"objective": "weighted_sft"}, "baselines": {}}
    policies = ["other=other-model", "two=other-model@best-of-2"]
    found = compared("cut", parse_config(values), policies)
    other, two = (found["models"][name] for name in ("other", "two"))
    assert found["kl_of"] == "models at the temperature"
    assert list(other["kl_estimates"]) == list(other["forward_kl"]) == ["rao_blackwellised"]
    assert other["kl"]["value"] > 0
    assert (two["kl"], two["kl_estimates"]) == (None, {})


def test_a_changed_base_is_refused(workplace: Path, tiny_model: Path) -> None:
    base = build_tiny_model(workplace / "base-model", seed=5)
    config = settings(tiny_model).model_dump(mode="json")
    config["model"]["name"] = str(base)
    compared("based", parse_config(config), [str(tiny_model)])
    build_tiny_model(base, seed=6)
    with pytest.raises(BonbonError, match=r"weights was .* and is now"):
        compared("based", parse_config(config), [str(tiny_model)])


def test_a_name_is_free_until_something_is_drawn(run: RunFolder, tiny_model: Path) -> None:
    with pytest.raises(BonbonError, match="no such folder"):
        compared("typo", run.config, ["x=./mistyped"])
    assert "x" in compared("typo", run.config, [f"x={tiny_model}"])["models"]


def test_a_run_and_a_comparison_do_not_share_a_folder(run: RunFolder, tiny_model: Path) -> None:
    with pytest.raises(BonbonError, match="holds a run; choose another --out"):
        compared("run", run.config, ["base@best-of-2"])
    compared("kind", run.config, ["base@best-of-2"])
    with pytest.raises(BonbonError, match="holds a comparison; choose another --out"):
        sample_stage.sample(RunFolder(Path("kind"), settings(tiny_model)))


def test_prompts_that_a_run_was_trained_on_are_counted(run: RunFolder, tiny_model: Path) -> None:
    seen = settings(tiny_model, prompts={"path": "prompts.txt", "limit": 4})
    found = compared("seen", seen, ["run"])
    assert (found["prompts"], found["prompts_trained_on"]) == (4, 4)


def test_a_revision_is_the_base_s_alone(tiny_model: Path) -> None:
    config = settings(tiny_model)
    config = config.model_copy(update={"model": config.model.model_copy(update={"revision": "v1"})})
    of = {
        text: _model(parse_policy(text), config) for text in ("org/llama", "base", str(tiny_model))
    }
    assert of["org/llama"].revision is None
    assert of["base"] == config.model
    assert (of[str(tiny_model)].name, of[str(tiny_model)].revision) == (str(tiny_model), "v1")


def test_a_model_trained_anew_is_not_taken_for_the_old(run: RunFolder, tiny_model: Path) -> None:
    copy = Path("copy")
    copy.mkdir()
    for path in tiny_model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    compared("weights", run.config, ["copy"])
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"  # one module in the middle, as a merged LoRA may
    save_file(tensors | {name: tensors[name] + 0.01}, weights, {"format": "pt"})
    with pytest.raises(BonbonError, match=r"weights was .* and is now"):
        compared("weights", run.config, ["copy"])


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        (["run", "run"], r"two policies are called 'run'; name one of them: NAME=run"),
        (["base=run"], "two policies are called 'base'"),
        (["base@temperature=0"], "temperature"),
        (["empty"], "has no trained model yet"),
        (["./nowhere"], "no such folder"),
    ],
)
def test_policies_that_cannot_be(run: RunFolder, policies: list[str], said: str) -> None:
    Path("empty").mkdir(exist_ok=True)
    Path("empty/config.yaml").write_text("")
    with pytest.raises(BonbonError, match=said):
        compared("bad", run.config, policies)


# --- at the command line --------------------------------------------------------------------------


def test_the_commands_end_with_a_report_of_the_figures(
    run: RunFolder, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` on a finished run, `report` and `compare`; the pages say what evaluation.json says."""
    config = Path("run.yaml")
    config.write_text((run.path / "config.yaml").read_text())
    done = CliRunner().invoke(app, ["run", str(config), "--out", "run"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].split() == ["report", "run/report.html"]
    check_main_table(Path("run/report.html").read_text(), figures(Path("run"))["models"])

    policies = ["run", "half=base@temperature=0.5,best-of-2"]
    done = CliRunner().invoke(app, ["compare", *policies, "--out", "by-command"])
    assert done.exit_code == 0, done.output
    page = Path("by-command/report.html")
    check_main_table(page.read_text(), figures(Path("by-command"))["models"])
    assert "bonbon compare run half=base@temperature=0.5,best-of-2 --config" in page.read_text()
    assert "by-command/model" not in done.stdout  # a comparison trains none

    page.unlink()
    done = CliRunner().invoke(app, ["report", "by-command"])
    assert (done.exit_code, done.stdout.strip()) == (0, str(page))
    assert page.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "nowhere"], "holds no evaluation"),
        (["compare", "./nowhere", "--out", "x"], "give --config"),
        (["compare", "run@best-of-0", "--out", "x"], "N >= 1"),
        (["compare", "run", "--out", "run.yaml/x"], "cannot write the output folder"),
    ],
)
def test_commands_that_cannot_be(run: RunFolder, arguments: list[str], said: str) -> None:
    Path("run.yaml").write_text((run.path / "config.yaml").read_text())
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


# --- how policies are written ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("org/llama", PolicySpec("llama", "org/llama")),
        ("runs/first/model", PolicySpec("first", "runs/first/model")),
        ("new=org/model", PolicySpec("new", "org/model")),
        ("base@best-of-4", PolicySpec("base-best-of-4", "base", 4)),
        ("a=m@best-of-2,top_p=0.9", PolicySpec("a", "m", 2, {"top_p": 0.9})),
        ("m@top_k=5", PolicySpec("m-top_k-5", "m", 1, {"top_k": 5})),
        ("./a@b/c", PolicySpec("c", "./a@b/c")),
        ("./x=y/model", PolicySpec("x-y", "./x=y/model")),
    ],
)
def test_policies_are_read(text: str, spec: PolicySpec) -> None:
    assert parse_policy(text) == spec


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("m@best-of-x", "'best-of-x' is not a decoding setting"),
        ("m@best-of-0", "N >= 1"),
        ("m@temperature=hot", "'temperature=hot' is not a decoding setting"),
        ("m@top_p=0.9,beams=4", "'beams=4' is not a decoding setting"),
        ("name=", r"\[NAME=\]MODEL\[@DECODING\]"),
        ("", r"\[NAME=\]MODEL\[@DECODING\]"),
    ],
)
def test_policies_that_are_not_written_right(text: str, said: str) -> None:
    with pytest.raises(BonbonError, match=said):
        parse_policy(text)


def test_a_comparison_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match="give --config"):
        comparison_config([parse_policy(str(tmp_path))], None)
