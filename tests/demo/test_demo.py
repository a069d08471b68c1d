"""The demo's models and prompts are what their cards and the README say."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from bonbon.config.sampling import SamplingConfig
from bonbon.demo import PROMPTS, REWARD_MODEL, STORY_MODEL, demo_config, side_by_side
from bonbon.demo.sentiment import compound
from bonbon.groups.prompts import read_prompts
from bonbon.groups.shards import write_shard
from bonbon.models.loading import load_policy
from bonbon.rewards.model import RewardModel
from bonbon.runs.run_folder import RunFolder
from bonbon.sampling.transformers import TransformersSampler
from support.groups import group_of


def test_the_openings() -> None:
    rows = read_prompts(PROMPTS)
    held_out = read_prompts(PROMPTS, split="eval")
    assert len(rows) >= 600
    assert len(held_out) >= 150
    assert len({row.prompt for row in rows}) == len(rows)
    assert len(read_prompts(PROMPTS, split="train")) + len(held_out) == len(rows)


def test_the_models_are_small_and_safe() -> None:
    files = [path for folder in (STORY_MODEL, REWARD_MODEL) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "numpy") as weights:
                dtypes = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
            assert dtypes == {"BF16"}


def test_the_story_model_writes_clean_words_at_temperature_one() -> None:
    model, tokenizer = load_policy(str(STORY_MODEL), device="cpu")
    sampler = TransformersSampler(model, tokenizer, SamplingConfig(n=2, max_new_tokens=48))
    rows = read_prompts(PROMPTS, split="eval", limit=40)
    known = {word for row in read_prompts(PROMPTS) for word in str(row.prompt).lower().split()}
    written = [
        word.strip('.,!?"')
        for group in sampler.sample(sampler.encode(rows))
        for text in group.completions
        for word in text.lower().split()[1:-1]
    ]
    known = {word.strip('.,!?"') for word in known}
    assert sum(word in known for word in written) / len(written) > 0.85


def test_the_reward_model_ranks_as_the_gold_reward_does() -> None:
    pytest.importorskip("vaderSentiment")
    model, tokenizer = load_policy(str(STORY_MODEL), device="cpu")
    sampler = TransformersSampler(model, tokenizer, SamplingConfig(n=4, max_new_tokens=48, seed=7))
    rows = read_prompts(PROMPTS, split="eval", limit=60)
    reward = RewardModel.from_pretrained(str(REWARD_MODEL), device="cpu")
    agreed = []
    for group in sampler.sample(sampler.encode(rows)):
        prompts = [group.prompt] * group.n
        learned, gold = reward(prompts, group.completions), compound(prompts, group.completions)
        agreed += [
            (learned[i] > learned[j]) == (gold[i] > gold[j])
            for i, j in combinations(range(group.n), 2)
            if gold[i] != gold[j]
        ]
    assert np.mean(agreed) > 0.8


@pytest.mark.parametrize("short", [False, True])
def test_the_configuration_is_an_ordinary_one(short: bool) -> None:
    config = demo_config(short=short, seed=3)
    assert config.sampling.n == 8
    assert config.train.objective == "rank_regression"
    assert list(config.baselines) == ["bonbon", "sft_bon"]
    assert config.sampling.seed == config.train.seed == 3


def test_continuations_stand_side_by_side(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, demo_config())
    for name, text in (("base", " it\nrained."), ("rank_regression", " the sun [came].")):
        group = group_of("p", "Tom looked and", [text], metrics={"gold": (0.25,)})
        write_shard(folder.evaluation / name / "shard-00000.parquet", [group], {})
    shown = side_by_side(folder)
    assert "Tom looked and" in shown
    assert "+0.25  …it rained." in shown
    assert shown.index("it rained.") < shown.index("the sun [came].")
