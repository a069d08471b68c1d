"""The configuration: defaults, overrides, and what is said of a wrong one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bonbon.config.engine import LocalEngineConfig, RayEngineConfig
from bonbon.config.run import RunConfig, load_config, parse_config, round_config
from bonbon.config.sampling import TransformersSamplerConfig, VllmSamplerConfig
from bonbon.config.settings import flatten
from bonbon.evaluation.drift import metrics_for
from bonbon.stages.checks import check_config
from bonbon.system.errors import BonbonError

MINIMAL: dict[str, Any] = {
    "model": {"name": "m"},
    "prompts": {"path": "p.jsonl"},
    "reward": {"model": "r"},
}


def parsed(*overrides: str, **changes: Any) -> RunConfig:
    return parse_config(MINIMAL | changes, overrides)


def complaint(*overrides: str, **changes: Any) -> str:
    with pytest.raises(BonbonError) as caught:
        check_config(parsed(*overrides, **changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- values ---------------------------------------------------------------------------------------


def test_the_defaults_are_the_model_s_own_distribution_and_the_paper_s_training() -> None:
    config = parsed()
    sampling, train = config.sampling, config.train
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.top_k) == (8, 1.0, 1.0, 0)
    assert not sampling.truncates
    assert (train.objective, train.learning_rate, train.alpha) == ("rank_regression", 5e-7, 0.005)
    assert config.model.dtype == "auto"
    assert config.evaluation.holdout == 0.2
    assert (train.n, train.tilt, train.arguments.max_batch_tokens, train.kl_budget) == (None,) * 4
    assert (train.beta, train.arguments.delta, config.rounds) == (0.1, 4.0, 1)
    assert config.trainings == {"rank_regression": train}


def test_a_dump_is_read_as_the_same_configuration(tmp_path: Path) -> None:
    parts = [{"function": "a:f", "weight": -0.5}, {"model": "r"}]
    config = parsed(
        "train.learning_rate=1e-4",
        reward={"sum": parts},
        baselines={"d": {"objective": "dpo", "lora": {"r": 4}}},
        evaluation={"rewards": {"gold": {"function": "a:g"}}},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("sampler", ["transformers", {"name": "openai", "base_url": "http://x/v1"}])
def test_a_spread_model_is_drawn_from_by_vllm(sampler: Any) -> None:
    model = {"name": "m", "device": "balanced"}
    assert parsed(model=model, sampler="vllm").model.device == "balanced"
    with pytest.raises(BonbonError, match=r"device: balanced .* is sampler: vllm with tensor_par"):
        parsed(model=model, sampler=sampler)


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.9)])
def test_top_k_and_top_p_truncate(top_k: int, top_p: float) -> None:
    cut = {"top_k": top_k, "top_p": top_p}
    for likelihood in ("sft_bon", "weighted_sft"):
        config = parsed(sampling=cut, train={"objective": likelihood})
        assert config.sampling.truncates
        check_config(config)
    # The reference would be of another distribution than the policy.
    assert "top_p cut the distribution that objective rank_regress" in complaint(sampling=cut)
    likelihood_only = {"objective": "sft_bon"}
    assert "objective dpo" in complaint(
        sampling=cut, train=likelihood_only, baselines={"other": {"objective": "dpo"}}
    )


def test_every_objective_and_tilt_can_be_named() -> None:
    from bonbon.objectives.catalogue import OBJECTIVES
    from bonbon.tilt.catalogue import TILTS

    for objective in OBJECTIVES:
        config = parsed(f"train.objective={objective}")
        assert config.train.objective == objective
        check_config(config)
    assert complaint("train.objective=ppo").endswith(", ".join(OBJECTIVES))
    assert complaint("train.tilt=cubic").endswith(", ".join(TILTS))
    for tilt in TILTS:
        assert parsed(f"train.tilt={tilt}").train.tilt == tilt


def test_a_cut_distribution_is_for_what_does_not_compare_with_it() -> None:
    from bonbon.objectives.catalogue import OBJECTIVES

    assert {objective.compares for objective in OBJECTIVES.values()} == {True, False}
    for name, objective in OBJECTIVES.items():
        if objective.compares:
            said = complaint("sampling.top_k=5", f"train.objective={name}")
            assert f"objective {name} compares" in said
        else:
            check_config(parsed("sampling.top_k=5", f"train.objective={name}"))


@pytest.mark.parametrize(
    ("overrides", "n"),
    [
        ((), 8),
        (("sampling.n=4",), 4),
        (("train.n=64",), 64),
        (("train.n=2.6",), 3),
        (("train.n=1.5", "sampling.n=4"), 2),
    ],
)
def test_models_are_measured_beside_the_best_of_n_aimed_at(
    overrides: tuple[str, ...], n: int
) -> None:
    config = parsed(*overrides)
    assert config.target_n == n
    with pytest.raises(BonbonError, match=f"'best-of-{n}' is taken"):
        parsed(*overrides, baselines={f"best-of-{n}": {}})


@pytest.mark.parametrize(
    ("overrides", "n"),
    [
        (("rounds=3",), 2),
        (("rounds=2", "train.n=16"), 4),
        (("rounds=2",), 8**0.5),
        (("rounds=1",), 8),
    ],
)
def test_a_round_aims_at_its_share_of_n(overrides: tuple[str, ...], n: float) -> None:
    """Best-of-a of a best-of-b is best-of-ab. Draws differ by round; baselines are of the first."""
    config = parsed(*overrides, "sampling.seed=5", baselines={"d": {"objective": "dpo"}})
    first, second = (round_config(config, number, f"model-{number}") for number in (1, 2))
    assert (first.train.n, second.train.n) == (n, n)
    assert (first.sampling.seed, second.sampling.seed) == (5, 6)
    assert (first.model.name, second.model.name) == ("model-1", "model-2")
    assert (first.rounds, second.rounds) == (1, 1)
    assert (list(first.baselines), list(second.baselines)) == (["d"], [])


def test_rounds_need_whole_weights() -> None:
    said = complaint("rounds=2", "train.lora.r=4")
    assert "rounds start from the last round's whole weights; set train.lora.merge to true" in said
    assert parsed("rounds=2", "train.lora.merge=true").rounds == 2
    assert parsed("train.lora.r=4").rounds == 1


# --- overrides ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("sampling.n=4", "sampling.n", 4),
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.learning_rate=.5E-4", "train.learning_rate", 5e-5),
        ("train.learning_rate=1.e+2", "train.learning_rate", 100.0),
        ("train.bf16=true", "train.bf16", True),
        ("train.objective=rank_regression_huber", "train.objective", "rank_regression_huber"),
        ("train.tilt=worst_of_n", "train.tilt", "worst_of_n"),
        ("train.tilt=null", "train.tilt", None),
        ("train.n=64", "train.n", 64.0),
        ("train.n=2.5", "train.n", 2.5),
        ("train.arguments.delta=0.5", "train.arguments.delta", 0.5),
        ("train.arguments.max_batch_tokens=4096", "train.arguments.max_batch_tokens", 4096),
        ("train.kl_budget=1.5", "train.kl_budget", 1.5),
        ("train.lora.r=2", "train.lora.r", 2),
        ("train.lora.target_modules=[q, v]", "train.lora.target_modules", ["q", "v"]),
        ("prompts.split=train", "prompts.split", "train"),
        ("prompts.split=null", "prompts.split", None),
        ('prompts.split="1e3"', "prompts.split", "1e3"),
        ("prompts.split=a=b", "prompts.split", "a=b"),
        ("evaluation.rewards.gold.function=a:g", "evaluation.rewards.gold.function", "a:g"),
        ("baselines.d.objective=dpo", "baselines.d.objective", "dpo"),
    ],
)
def test_an_override_sets_a_value(override: str, path: str, value: Any) -> None:
    assert flatten(parsed(override).model_dump())[path] == value


def test_the_last_override_wins_and_the_values_given_stay_as_they_are() -> None:
    values = {**MINIMAL, "sampling": {"n": 3, "seed": 5}}
    config = parse_config(values, ["sampling.n=4", "sampling.n=6"])
    assert (config.sampling.n, config.sampling.seed) == (6, 5)
    assert values["sampling"] == {"n": 3, "seed": 5}


@pytest.mark.slow
@given(st.floats(1e-300, 1e300))
def test_every_number_is_read_as_yaml_writes_it_and_as_python_does(number: float) -> None:
    assert parsed(f"train.learning_rate={number!r}").train.learning_rate == number
    assert parsed(f"train.learning_rate={number:e}").train.learning_rate == float(f"{number:e}")


@pytest.mark.parametrize("override", ["sampling.n", "", "=4", ".=4", "sampling.=4", "a..b=4"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    assert f"--set {override!r}: write it as key=value" in complaint(override)


def test_an_override_below_a_value_is_refused() -> None:
    assert "--set 'model.name.x=1': name has no keys of its own" in complaint("model.name.x=1")


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "--set sampling.n=[1 is not YAML" in complaint("sampling.n=[1")


# --- what is wrong is named -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "known"),
    [
        ("sampling.top_n=4", "sampling.top_n", ["temperature", "top_k", "max_new_tokens"]),
        ("modle.name=x", "modle", ["model", "prompts", "baselines"]),
        ("train.lora.rank=4", "train.lora.rank", ["alpha", "target_modules"]),
        (
            "baselines.d.lr=1",
            "baselines.d.lr",
            ["learning_rate", "objective", "tilt", "n", "arguments"],
        ),
        ("evaluation.prompts.file=x", "evaluation.prompts.file", ["path", "column"]),
        ("evaluation.rewards.gold.fn=x", "evaluation.rewards.gold.fn", ["function", "weight"]),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(
    override: str, key: str, known: list[str]
) -> None:
    said = complaint(override)
    listed = re.search(rf"unknown key {re.escape(key)} \(known here: (.*?)\)", said)
    assert listed is not None, said
    assert set(known) <= set(listed[1].split(", "))


def test_an_unknown_key_in_a_sum_is_named() -> None:
    said = complaint(reward={"sum": [{"function": "a:f", "wieght": 2}]})
    assert "unknown key reward.sum.0.wieght (known here: model, function" in said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sampling.n=0", "sampling.n = 0"),
        ("sampling.n=many", "sampling.n = 'many'"),
        ("sampling.n=2.5", "sampling.n = 2.5"),
        ("sampling.temperature=0", "sampling.temperature = 0"),
        ("sampling.temperature=.inf", "sampling.temperature = inf"),
        ("sampling.temperature=.nan", "sampling.temperature = nan"),
        ("sampling.top_p=1.1", "sampling.top_p = 1.1"),
        ("sampling.on_long_prompt=cut", "sampling.on_long_prompt = 'cut'"),
        ("train.objective=ppo", "train.objective = 'ppo'"),
        ("train.alpha=-1", "train.alpha = -1"),
        ("train.tilt=cubic", "train.tilt = 'cubic'"),
        ("train.n=1", "train.n = 1"),
        ("train.n=.inf", "train.n = inf"),
        ("train.n=.nan", "train.n = nan"),
        ("train.arguments.delta=0", "train.arguments.delta = 0"),
        ("train.arguments.max_batch_tokens=0", "train.arguments.max_batch_tokens = 0"),
        ("train.kl_budget=0", "train.kl_budget = 0"),
        ("rounds=0", "rounds = 0"),
        ("train.learning_rate=.inf", "train.learning_rate = inf"),
        ("model.dtype=int8", "model.dtype = 'int8'"),
        ("model=x", "model = 'x'"),
        ("evaluation.holdout=1", "evaluation.holdout = 1"),
        ("reward.weight=.nan", "reward.weight = nan"),
    ],
)
def test_a_wrong_value_is_named(override: str, named: str) -> None:
    assert named in complaint(override)


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = complaint("sampling.n=0", "sampling.foo=1", "train.alpha=2")
    assert all(part in said for part in ("sampling.n = 0", "sampling.foo", "train.alpha = 2"))


@pytest.mark.parametrize("section", ["model", "prompts", "reward"])
def test_a_missing_section_is_named(section: str) -> None:
    values = {key: value for key, value in MINIMAL.items() if key != section}
    with pytest.raises(BonbonError, match=f"the key {section} is missing"):
        parse_config(values)


def test_one_completion_a_prompt_is_refused() -> None:
    assert "sampling.n: best-of-n against worst needs n >= 2" in complaint("sampling.n=1")


@pytest.mark.parametrize(
    "name", ["base", "best-of-8", "rank_regression", "a/b", "..", "", "a b", "-", "x-samples"]
)
def test_a_baseline_s_name_is_checked(name: str) -> None:
    assert f"baselines: {name!r} is taken" in complaint(baselines={name: {}})


def test_a_baseline_may_be_named_like_an_objective_that_is_not_the_main_one() -> None:
    config = parsed(baselines={"dpo": {"objective": "dpo"}, "dpo_2": {"objective": "dpo"}})
    assert list(config.trainings) == ["dpo", "dpo_2", "rank_regression"]


@pytest.mark.parametrize(
    "reward",
    [
        {},
        {"model": "r", "function": "a:f"},
        {"function": "a:f", "sum": [{"model": "r"}]},
        {"sum": []},
        {"sum": [{"weight": 2}]},
    ],
)
def test_a_reward_is_of_exactly_one_kind(reward: dict[str, Any]) -> None:
    assert "a reward is exactly one of `model`, `function`, `server` and `sum`" in complaint(
        reward=reward
    )


def test_a_sum_holds_weighted_rewards() -> None:
    parts = parsed(reward={"sum": [{"function": "a:f", "weight": -2}, {"model": "r"}]}).reward.sum
    assert parts is not None
    assert [(part.weight, part.function or part.model) for part in parts] == [(-2, "a:f"), (1, "r")]


def test_own_metrics_are_those_that_are_measured() -> None:
    for name in metrics_for(2):
        said = complaint(evaluation={"metrics": {name: "a:f"}})
        assert f"{name!r} is measured anyway" in said
    both = {"metrics": {"x": "a:f"}, "rewards": {"x": {"function": "a:f"}}}
    with pytest.raises(BonbonError, match="'x' is both in rewards and in metrics"):
        parse_config(MINIMAL | {"evaluation": both})


@pytest.mark.parametrize("name", ["kl", "kl_x", "reward", "tokens", "", "a/b"])
def test_a_further_reward_s_name_is_checked(name: str) -> None:
    said = complaint(evaluation={"rewards": {name: {"model": "r"}}})
    assert said.startswith("the configuration: evaluation")
    assert f"rewards: {name!r} is taken" in said


def test_evaluation_may_have_its_own_prompts() -> None:
    config = parsed("evaluation.prompts.path=held.csv", "evaluation.prompts.column=Prompt")
    assert config.evaluation.prompts is not None
    assert (config.evaluation.prompts.path, config.evaluation.prompts.column) == (
        Path("held.csv"),
        "Prompt",
    )


def test_early_stopping_needs_held_out_groups() -> None:
    assert "needs an eval_fraction above 0" in complaint("train.early_stopping_patience=2")
    parsed("train.early_stopping_patience=2", "train.eval_fraction=0.1")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "it is empty"),
        (b"# only a comment\n", "it is empty"),
        (b"- model\n- prompts\n", "it has none"),
        (b"model: [\n", "is not YAML"),
        (b"model: {name: caf\xe9}\n", "is not UTF-8"),
        (b"model: !!python/object:os.system {}\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(BonbonError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(BonbonError, match="Is a directory"):
        load_config(tmp_path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8-sig")
    assert load_config(path) == parsed()


# --- flatten --------------------------------------------------------------------------------------


def test_flatten_names_every_leaf() -> None:
    values = {"a": {"b": {"c": 1}, "d": []}, "e": {}, "f": [{"g": 2}, {"h": 3}], "i": [4, 5]}
    assert flatten(values) == {
        "a.b.c": 1,
        "a.d": [],
        "e": {},
        "f.0.g": 2,
        "f.1.h": 3,
        "i": [4, 5],
    }


# --- samplers, engines, servers -------------------------------------------------------------------


def test_a_bare_name_is_a_kind_with_its_defaults() -> None:
    config = parsed(sampler="vllm", engine="ray")
    assert isinstance(config.sampler, VllmSamplerConfig)
    assert config.sampler == VllmSamplerConfig()
    assert config.engine == RayEngineConfig()
    assert parsed().sampler == TransformersSamplerConfig()
    assert parsed().engine == LocalEngineConfig()
    pools = parsed("engine.samplers.max=4", engine={"name": "ray", "samplers": {"num_gpus": 0.5}})
    assert isinstance(pools.engine, RayEngineConfig)
    assert (pools.engine.samplers.max, pools.engine.samplers.num_gpus) == (4, 0.5)
    bare = parsed("engine=ray", "engine.scorers.max=3", sampler="vllm")
    assert isinstance(bare.engine, RayEngineConfig)
    assert bare.engine.scorers.max == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sampler": "vlm"}, "sampler.name is one of 'transformers', 'vllm', 'openai'"),
        ({"sampler": {"tensor_parallel_size": 2}}, "the key sampler.name is missing"),
        (
            {"sampler": {"name": "vllm", "tensor": 2}},
            "unknown key sampler.tensor (known here: tensor_parallel_size, ",
        ),
        (
            {"sampler": {"name": "openai", "client": {"retries": -1}}},
            "sampler.client.retries = -1: Input should be greater than or equal to 0",
        ),
        (
            {"engine": {"name": "ray", "samplers": {"mx": 2}}},
            "unknown key engine.samplers.mx (known here: min, max, num_cpus, num_gpus)",
        ),
        (
            {"engine": {"name": "ray", "scorers": {"min": 3, "max": 2}}},
            "engine.scorers = {'min': 3, 'max': 2}: min = 3 is more than max = 2",
        ),
        ({"reward": {"function": "a:f", "vllm": {}}}, "vllm says how `model` is run; name one"),
        (
            {"rounds": 2, "sampler": "openai"},
            "a round draws from the last one's model, which no server has",
        ),
    ],
)
def test_wrong_samplers_and_engines_are_named(changes: dict[str, Any], said: str) -> None:
    assert said in complaint(**changes)


def test_rounds_keep_their_shards_apart_in_a_store() -> None:
    config = parsed(rounds=3, storage="s3://bucket/run/")
    assert round_config(config, 2, "m").storage == "s3://bucket/run/round-2"
    assert round_config(parsed(rounds=3), 2, "m").storage is None
