"""`bonbon.generate` and `bonbon generate`: answers, what they cost, going on after a stop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import bonbon
from bonbon.cli.console import printable
from bonbon.cli.main import app
from bonbon.config.sampling import SamplingConfig
from bonbon.decoding import BestOfN, Cost, Generation, Strategy, catalogue
from bonbon.decoding.catalogue import STRATEGIES, describe_strategy, parse_strategy, strategy_class
from bonbon.groups.prompts import PromptRow
from bonbon.groups.shards import read_groups, shard_paths, write_shard
from bonbon.models.loading import load_policy
from bonbon.planning.which_n import sampling_speed_beside
from bonbon.sampling.transformers import TransformersSampler
from bonbon.system.errors import BonbonError
from support.groups import group_of

PROMPTS = ["Once upon a time", "The cat", "A dog ran"]


def count_e(prompts: Sequence[Any], completions: Sequence[str]) -> list[float]:
    return [float(text.count("e")) - len(text) / 1000 for text in completions]


# --- the function ---------------------------------------------------------------------------------


def test_best_of_n_is_the_best_of_the_sampler_s_draws(tiny_model: Path) -> None:
    sampling = SamplingConfig(n=6, max_new_tokens=8, seed=4)
    found = bonbon.generate(PROMPTS, str(tiny_model), count_e, sampling=sampling)
    model, tokenizer = load_policy(str(tiny_model))
    sampler = TransformersSampler(model, tokenizer, sampling)
    rows = [PromptRow(f"row-{i}", text) for i, text in enumerate(PROMPTS, start=1)]
    assert len(found) == len(PROMPTS)
    for generation, group in zip(found, sampler.sample(sampler.encode(rows)), strict=True):
        rewards = count_e([], group.completions)
        assert generation.group == group.with_rewards(rewards)
        assert generation.chosen == int(np.argmax(rewards))
        assert generation.completion == group.completions[generation.chosen]
        assert generation.reward == max(rewards)
        assert generation.cost.generated == sum(group.lengths())
        assert generation.cost.prefilled == len(group.prompt_token_ids)
        assert generation.cost.reward_calls == 6
        assert generation.cost.seconds > 0


def test_a_loaded_model_and_an_answer_that_its_neighbours_do_not_change(tiny_model: Path) -> None:
    model, tokenizer = load_policy(str(tiny_model))
    sampling = SamplingConfig(n=3, max_new_tokens=6)
    rows = [PromptRow(f"id-{i}", text) for i, text in enumerate(PROMPTS)]
    together = bonbon.generate(
        rows, model, count_e, BestOfN(), sampling=sampling, processing_class=tokenizer
    )
    (alone,) = bonbon.generate(
        rows[1:2], model, count_e, sampling=sampling, processing_class=tokenizer
    )
    assert alone.completion == together[1].completion


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": "Once"}, "prompts must be a list"),
        ({"reward": None}, "chooses by a reward"),
        ({"strategy": "bestof"}, "unknown strategy 'bestof'; there are best_of_n"),
        ({"strategy": BestOfN}, r"an instance, BestOfN\(\), and not the class"),
        ({"strategy": "adaptive_n"}, "adaptive_n needs the setting price"),
        ({"stop": [""]}, "an empty stop string"),
        ({"prompts": [PromptRow("a", "b"), PromptRow("a", "c")]}, "'a' occurs twice"),
    ],
)
def test_misuse(tiny_model: Path, arguments: dict[str, Any], said: str) -> None:
    values = {"prompts": PROMPTS, "model": str(tiny_model), "reward": count_e}
    with pytest.raises(ValueError, match=said):
        bonbon.generate(**(values | arguments))


@pytest.mark.parametrize("prompt", ["", 5, None, [], [{"role": "user"}], "\ud800"])
def test_what_is_no_prompt(tiny_model: Path, prompt: Any) -> None:
    with pytest.raises(BonbonError, match="prompt row-1: "):
        bonbon.generate([prompt], str(tiny_model), count_e)


def test_one_stop_string_is_one(tiny_model: Path) -> None:
    sampling = SamplingConfig(n=4, max_new_tokens=12)
    for stop in ("e", ["e"]):
        found = bonbon.generate(PROMPTS, str(tiny_model), count_e, sampling=sampling, stop=stop)
        assert not any("e" in text for one in found for text in one.group.completions)


def test_a_loaded_model_needs_its_tokenizer(tiny_model: Path) -> None:
    model, _ = load_policy(str(tiny_model))
    with pytest.raises(ValueError, match="processing_class"):
        bonbon.generate(PROMPTS, model, count_e)


def test_a_reward_that_is_not_a_number_is_refused(tiny_model: Path) -> None:
    with pytest.raises(BonbonError, match="completion 1 of 8"):
        bonbon.generate(
            PROMPTS,
            str(tiny_model),
            lambda p, c: [float("nan")] * len(c),
            sampling=SamplingConfig(max_new_tokens=4),
        )


def test_the_ranking_leaves_out_what_was_given_up() -> None:
    group = group_of(
        completions=("a", "b", "c", "d"),
        rewards=(1.0, 3.0, 9.0, 2.0),
        finish_reasons=("stop", "length", "rejected", "stop"),
    )
    assert Generation(group, 3, Cost()).ranking() == [3, 1, 0]


# --- strategies by name ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_found_under_its_name(name: str) -> None:
    kind = strategy_class(name)
    assert issubclass(kind, Strategy)
    assert catalogue.strategy_name(kind.model_construct()) == name


def test_a_description_is_read_back() -> None:
    for value in ("best_of_n", {"name": "soft_best_of_n", "tau": 0.25}):
        strategy = parse_strategy(value)
        assert parse_strategy(describe_strategy(strategy)) == strategy
        assert parse_strategy(strategy) is strategy


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"name": "best_of_n", "m": 1}, "strategy best_of_n, m: unknown setting"),
        ({"name": "soft_best_of_n", "tau": -1}, "strategy soft_best_of_n, tau: -1: "),
        ({"name": 3}, "a strategy is a name"),
        (7, "a strategy is a name"),
    ],
)
def test_a_wrong_strategy_is_explained(value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_strategy(value)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt_id": f"p{i}", "prompt": text} for i, text in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bonbon_generate(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)])


def options(tiny_model: Path, tiny_reward_model: Path, prompts: Path, out: Path) -> list[object]:
    return [
        *("--model", tiny_model, "--reward", tiny_reward_model, "--prompts", prompts),
        *("--n", 4, "--set", "sampling.max_new_tokens=6", "--set", "sampling.shard_size=2"),
        *("--out", out),
    ]


def test_the_command_writes_answers_groups_and_cost(
    tiny_model: Path, tiny_reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = bonbon_generate(*options(tiny_model, tiny_reward_model, prompts_file, out))
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.rstrip().endswith(str(out / "completions.jsonl"))
    answers = [json.loads(line) for line in (out / "completions.jsonl").open()]
    groups = read_groups(out / "generations")
    assert [answer["prompt_id"] for answer in answers] == ["p0", "p1", "p2"]
    for answer, group in zip(answers, groups, strict=True):
        assert group.rewards is not None
        best = int(np.argmax(group.rewards))
        assert group.metrics["chosen"] == tuple(float(i == best) for i in range(4))
        assert answer["completion"] == group.completions[best]
        assert answer["cost"]["generated"] == sum(group.lengths())
    total = json.loads((out / "cost.json").read_text())
    assert total["cost"]["generated"] == sum(sum(group.lengths()) for group in groups)
    assert total["cost"]["reward_calls"] == 12
    assert groups.provenance["strategy"] == {"name": "best_of_n"}
    for name in ("generated", "prefilled", "reward_calls"):
        assert total["cost"][name] == sum(answer["cost"][name] for answer in answers)
        assert total["cost_per_answer"][name] == round(total["cost"][name] / 3)


def test_a_run_s_folder_is_not_written_into(
    tiny_model: Path, tiny_reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = {
        "model": {"name": str(tiny_model), "device": "cpu"},
        "prompts": {"path": str(prompts_file)},
        "sampling": {"n": 2, "max_new_tokens": 4},
        "reward": {"model": str(tiny_reward_model)},
        "evaluation": {"prompts": {"path": str(prompts_file)}},
    }
    settings = tmp_path / "run.yaml"
    settings.write_text(yaml.safe_dump(config))
    assert run_command("sample", settings, "--out", tmp_path / "run").exit_code == 0
    before = (tmp_path / "run" / "config.yaml").read_text()
    refused = bonbon_generate(settings, "--out", tmp_path / "run")
    assert refused.exit_code == 2
    assert "a run or a comparison" in refused.stderr
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert bonbon_generate(settings, "--out", tmp_path / "answers").exit_code == 0
    refused = run_command("sample", settings, "--out", tmp_path / "answers")
    assert refused.exit_code == 2
    assert "answers of `bonbon generate`" in refused.stderr


def test_a_first_try_that_failed_does_not_lock_the_folder(
    tiny_model: Path, tiny_reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    arguments = options(tiny_model, tiny_reward_model, prompts_file, tmp_path / "out")
    assert bonbon_generate(*arguments, "--model", tmp_path / "nowhere").exit_code == 2
    long = ["--set", "sampling.max_new_tokens=63"]  # no prompt fits beside it
    assert bonbon_generate(*arguments, *long).exit_code == 2
    assert bonbon_generate(*arguments).exit_code == 0


def test_changed_code_of_a_strategy_is_noticed(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = tmp_path / "first_letters.py"
    code.write_text("def letter(text):\n    return text[:1]\n")
    arguments = [
        *("--model", tiny_model, "--prompts", prompts_file, "--out", tmp_path / "out", "--n", 3),
        *("--strategy", "self_consistency", "--set", "strategy.extractor=first_letters:letter"),
        *("--max-new-tokens", 4),
    ]
    assert bonbon_generate(*arguments).exit_code == 0
    assert bonbon_generate(*arguments).exit_code == 0
    code.write_text("def letter(text):\n    return text[:2]\n")
    refused = bonbon_generate(*arguments)
    assert refused.exit_code == 2
    assert "strategy.loaded.extractor was" in refused.stderr


def test_a_stopped_command_goes_on(
    tiny_model: Path, tiny_reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = options(tiny_model, tiny_reward_model, prompts_file, out)
    assert bonbon_generate(*arguments).exit_code == 0
    whole = (out / "completions.jsonl").read_bytes()
    first, second = shard_paths(out / "generations")
    kept = first.stat().st_mtime_ns
    second.unlink()
    (out / ".bonbon" / "generate.done.json").unlink()
    assert bonbon_generate(*arguments).exit_code == 0
    assert first.stat().st_mtime_ns == kept
    again = [json.loads(line) for line in (out / "completions.jsonl").open()]
    before = [json.loads(line) for line in whole.splitlines()]
    assert [a["completion"] for a in again] == [b["completion"] for b in before]
    refused = bonbon_generate(*arguments, "--strategy", "soft_best_of_n")
    assert refused.exit_code == 2
    assert "strategy.name was 'best_of_n' and is now 'soft_best_of_n'" in refused.stderr


def test_a_configuration_of_a_run_serves_and_options_change_it(
    tiny_model: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vowels.py").write_text(
        "def e(prompts, completions):\n    return [float(t.count('e')) for t in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = {
        "model": {"name": str(tiny_model), "device": "cpu"},
        "prompts": {"path": str(prompts_file)},
        "sampling": {"n": 3, "max_new_tokens": 5},
        "reward": {"function": "vowels:e"},
        "train": {"learning_rate": 1e-3},
        "evaluation": {"k": 4},
        "strategy": {"name": "soft_best_of_n", "tau": 0.5},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    result = bonbon_generate(*("run.yaml", "--out", "out", "--n", 2, "--set", "strategy.tau=2.0"))
    assert result.exit_code == 0, (result.output, result.exception)
    groups = read_groups(tmp_path / "out" / "generations")
    assert groups.provenance["strategy"] == {"name": "soft_best_of_n", "tau": 2.0}
    assert {group.n for group in groups} == {2}


def test_a_prompt_on_the_command_line(tiny_model: Path, tiny_reward_model: Path) -> None:
    result = bonbon_generate(
        *("--model", tiny_model, "--reward", tiny_reward_model, "--n", 3, "--prompt", "Hi"),
        *("--set", "sampling.max_new_tokens=6"),
    )
    assert result.exit_code == 0, (result.output, result.exception)
    assert "cut off at its longest, reward" in result.stderr
    assert "3 candidates" in result.stderr
    both = bonbon_generate("--model", tiny_model, "--prompt", "Hi", "--out", "o")
    assert both.exit_code == 2
    assert "leave out --prompts and --out" in both.stderr
    for bad in ("", "Hi \udcff"):
        refused = bonbon_generate(
            *("--model", tiny_model, "--reward", tiny_reward_model, "--prompt", bad)
        )
        assert refused.exit_code == 2, refused.output
        assert "--prompt: the prompt" in refused.stderr
    assert "tokens generated" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "o"], "there is no model; name one with --model"),
        (["--model", "m", "--out", "o"], "strategy best_of_n chooses by a reward"),
        (["--model", "m", "--reward", "a:b"], "name the folder to write into with --out"),
        (["--model", "m", "--reward", "a:b", "--out", "o"], "there are no prompts"),
        (
            ["--model", "m", "--reward", "a:b", "--out", "o", "--strategy", "best"],
            "unknown strategy 'best'",
        ),
        (
            ["--model", "m", "--reward", "a:b", "--out", "o", "--set", "strategy.x=1"],
            "strategy best_of_n, x: unknown setting",
        ),
        (["--model", "m", "--set", "smapling.n=3", "--out", "o"], "unknown key smapling"),
        (["nowhere.yaml", "--out", "o"], "cannot read the configuration nowhere.yaml"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = bonbon_generate(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_training_refuses_groups_whose_draws_were_steered(
    tiny_model: Path, tiny_reward_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    from bonbon import BoNBoNConfig, BoNBoNTrainer

    for strategy in ("tree_bon", "best_of_n"):
        out = tmp_path / strategy
        arguments = options(tiny_model, tiny_reward_model, prompts_file, out)
        result = bonbon_generate(*arguments, "--strategy", strategy)
        assert result.exit_code == 0, (result.output, result.exception)
    for command in (
        ["plan", "--win-rate", 0.9],
        ["fit-beta", "--by", "x", "--strategy", "rbon_kl"],
    ):
        refused = run_command(command[0], tmp_path / "tree_bon" / "generations", *command[1:])
        assert refused.exit_code == 2
        assert "strategy tree_bon, which steers" in refused.stderr
    args = BoNBoNConfig(str(tmp_path / "model"), report_to=[], use_cpu=True)
    with pytest.raises(BonbonError, match="strategy tree_bon, which steers"):
        BoNBoNTrainer(
            str(tiny_model), args, train_dataset=read_groups(tmp_path / "tree_bon" / "generations")
        )
    groups = read_groups(tmp_path / "best_of_n" / "generations")
    assert BoNBoNTrainer(str(tiny_model), args, train_dataset=groups).n == 4


# --- fitting and planning -------------------------------------------------------------------------


def test_what_a_terminal_shows() -> None:
    text = "10\u00a0000 € 👩‍🚀 a\u3000b\n\tc"
    assert printable(text) == text
    assert printable("a\x1b[31mb\u202ec\x07\r") == "a[31mbc"


@pytest.fixture
def pilot(tiny_model: Path, tiny_reward_model: Path, prompts_file: Path, tmp_path: Path) -> Path:
    """Scored groups whose gold metric is the reward without its largest values."""
    out = tmp_path / "pilot"
    arguments = options(tiny_model, tiny_reward_model, prompts_file, out)
    assert bonbon_generate(*arguments, "--n", 8).exit_code == 0
    groups = read_groups(out / "generations")
    gold = [
        group.with_metric("gold", [-abs(r - np.median(group.rewards)) for r in group.rewards])
        for group in groups
        if group.rewards is not None
    ]
    write_shard(tmp_path / "gold" / "shard-00000.parquet", gold, groups.provenance)
    return tmp_path / "gold"


def run_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_fits_a_beta(pilot: Path) -> None:
    result = run_command("fit-beta", pilot, "--strategy", "srbon_kl", "--by", "gold", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    fitted = json.loads(result.stdout)
    assert fitted["beta"] in [point["beta"] for point in fitted["curve"]]
    soft = run_command("fit-beta", pilot, "--strategy", "soft_best_of_n", "--by", "gold", "--json")
    assert json.loads(soft.stdout)["field"] == "tau"
    shown = run_command("fit-beta", pilot, "--strategy", "rbon_kl", "--by", "gold")
    assert "best: beta = " in shown.stdout
    for arguments, said in [
        (["--strategy", "best_of_n", "--by", "gold"], "of best_of_n: it has none"),
        (["--strategy", "smc", "--by", "gold", "--field", "tau"], "no setting 'tau'"),
        (["--strategy", "rbon_kl", "--by", "silver"], "no metric 'silver'"),
        (["--strategy", "rbon_kl", "--by", "gold", "--set", "beta"], "write it as key=value"),
        (["--strategy", "rbon_wd", "--by", "gold"], "named by `embedding`"),
        (["--strategy", "rbon_kl", "--by", "gold", "--set", "beta=1"], "leave it out"),
    ]:
        refused = run_command("fit-beta", pilot, *arguments)
        assert refused.exit_code == 2, refused.output
        assert said in refused.stderr


def test_the_command_plans(pilot: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plan.png"
    result = run_command("plan", pilot, "--win-rate", 0.8, "--plot", plot)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "By the estimate, a win rate of 0.8 takes n = 4" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run_command("plan", pilot, "--win-rate", 0.6, "--json").stdout)
    assert found["by_estimate"]["n"] == 2
    for arguments, said in [
        (["--win-rate", 1.5], "lies between 0 and 1"),
        (["--win-rate", 0.9, "--tokens-per-second", -5], "a number above 0"),
        (["--win-rate", 0.9, "--plot", "plan.txt"], "must end in one of png"),
        (["--win-rate", 0.9, "--by", "silver"], "no metric 'silver'"),
    ]:
        refused = run_command("plan", pilot, *arguments)
        assert refused.exit_code == 2, refused.output
        assert said in refused.stderr


def test_the_speed_beside_a_run_s_groups(tmp_path: Path) -> None:
    groups = [group_of(prompt_id="a"), group_of(prompt_id="b")]
    assert sampling_speed_beside(tmp_path / "groups") is None
    for index, seconds in enumerate((1.0, 3.0)):
        path = tmp_path / "samples" / f"shard-{index:05d}.parquet"
        write_shard(path, groups, {"tokens": 100, "seconds": seconds})
    assert sampling_speed_beside(tmp_path / "groups") == 50.0
