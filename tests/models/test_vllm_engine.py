"""vLLM's offline engine for real, on its CPU build: `make test-vllm` runs this with a Python that
has vLLM. What needs none is in test_vllm_seeds.py.

All engines but one run in this process, where they start in seconds; each is closed before the
next.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("this Python has no vLLM; `make test-vllm` has one", allow_module_level=True)

# Before torch and vLLM are loaded. Compiling vLLM's small kernels takes longer than all tests.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # other engines would be on the same cores
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import copy
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chi2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from typer.testing import CliRunner

from bonbon.cli.main import app
from bonbon.config.reward import RewardConfig
from bonbon.config.run import parse_config
from bonbon.config.sampling import ModelConfig, SamplingConfig, VllmSamplerConfig, VllmSettings
from bonbon.demo import REWARD_MODEL, STORY_MODEL
from bonbon.groups.group import Group
from bonbon.groups.prompts import EncodedPrompt, PromptRow
from bonbon.groups.shards import read_groups
from bonbon.rewards.model import RewardModel
from bonbon.rewards.vllm import VllmRewardModel
from bonbon.runs.run_folder import RunFolder
from bonbon.sampling.distribution import warped_log_probs
from bonbon.sampling.vllm import VllmSampler
from bonbon.system.errors import BonbonError
from support.models import build_tiny_reward_model, byte_tokenizer, tiny_llama_config

EAGER: dict[str, Any] = {"enforce_eager": True}
TEXTS = [
    "Once upon a time, there was a cat who",
    "One day, a parrot flew in and said,",
    "The little elf lost the key to the toy room. He",
    "Grandma baked a cake, and",
]
ROWS = [PromptRow(f"p{i}", text) for i, text in enumerate(TEXTS)]
NEWLINE = 201  # the story model's token
# Nothing of this may reach a draw but the second end token.
GENERATION = {
    "eos_token_id": [1, NEWLINE],
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "repetition_penalty": 1.5,
    "max_new_tokens": 3,
}
T = TypeVar("T")


def sampler_of(folder: Path, settings: dict[str, Any] | None = None, **config: Any) -> VllmSampler:
    values = {"n": 8, "max_new_tokens": 60, "seed": 3} | config
    chosen = VllmSamplerConfig(**({"engine": EAGER} | (settings or {})))
    return VllmSampler(ModelConfig(name=str(folder)), SamplingConfig(**values), chosen)


def varied(sampler: VllmSampler, **changes: Any) -> VllmSampler:
    """The same engine with other settings."""
    other = copy.copy(sampler)
    other.config = sampler.config.model_copy(update=changes)
    return other


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def closed(made: T) -> Iterator[T]:
    yield made
    made.close()  # type: ignore[attr-defined]


@torch.inference_mode()
def greedy(model: Any, prompt: EncodedPrompt, tokens: int, ends: Sequence[int]) -> tuple[int, ...]:
    """What transformers' `generate` finds."""
    ids = torch.tensor([prompt.token_ids])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=list(ends),
        pad_token_id=2,
        temperature=None,
        top_k=None,
        repetition_penalty=1.0,
    )
    return tuple(found[0, ids.shape[1] :].tolist())


@torch.inference_mode()
def reference(model: Any, prompt_ids: Sequence[int], ids: Sequence[int], config: Any) -> Any:
    """Each token's log-probability by a forward pass over the whole text, (tokens,)."""
    logits = model(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
    drawn = torch.tensor(ids)
    return warped_log_probs(logits, config, drawn).gather(-1, drawn[:, None])[:, 0].double()


# --- its processes: the one engine as it is by default --------------------------------------------


class TestProcesses:
    def test_they_draw_and_end_and_their_death_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        before = set(psutil.Process().children(recursive=True))
        sampler = sampler_of(STORY_MODEL, n=4, max_new_tokens=20)
        try:
            counts: list[int] = []
            groups = sampler.sample(sampler.encode(ROWS[:2]), counts.append)
            assert [len(group.completions) for group in groups] == [4, 4]
            assert sum(counts) == sum(sum(group.lengths()) for group in groups)
            mine = set(psutil.Process().children(recursive=True)) - before
            named = {p: " ".join(p.cmdline()) for p in mine}
            vllms = [p for p, name in named.items() if "VLLM" in name]
            (engine,) = [p for p in vllms if "EngineCore" in named[p]]
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(BonbonError, match=r"vLLM failed .* its process has ended"):
                sampler.sample(sampler.encode(ROWS[:2]))
        finally:
            sampler.close()
        deadline = time.monotonic() + 20
        while any(p.is_running() and p.status() != "zombie" for p in vllms):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        sampler.close()  # once more does nothing
        assert capfd.readouterr() == ("", "")


# --- stories260K ----------------------------------------------------------------------------------


def padded_heads(source: Path, out: Path) -> Path:
    """stories260K with heads of 32 instead of 8, which vLLM's CPU attention does not have.

    The same function: rotary pair i, dimensions i and i + 4 of 8, goes to 4i and 4i + 16 of 32,
    where θ^(−2·4i/32) is the same frequency; all else is zero. Scores are over √32 then and not
    over √8, so queries double.
    """
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = LlamaConfig.from_pretrained(source, head_dim=32, dtype="float32")
    wide = LlamaForCausalLM(config)
    places = [4 * i + 16 * half for half in range(2) for i in range(4)]
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if any(kind in name for kind in ("q_proj", "k_proj", "v_proj")):
            heads = weight.new_zeros(len(weight) // 8, 32, weight.shape[1])
            heads[:, places] = weight.view(-1, 8, weight.shape[1]) * (2 if "q_proj" in name else 1)
            weights[name] = heads.flatten(0, 1)
        elif "o_proj" in name:
            columns = weight.new_zeros(len(weight), weight.shape[1] // 8, 32)
            columns[:, :, places] = weight.view(len(weight), -1, 8)
            weights[name] = columns.flatten(1, 2)
    wide.load_state_dict(weights)
    ids = torch.arange(3, 103)[None] * 7 % 500
    with torch.inference_mode():
        difference = (wide.double()(ids).logits - model.double()(ids).logits).abs().max()
    assert difference < 1e-11
    wide.float().save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return out


class TestStories260K:
    @pytest.fixture(scope="class")
    def sampler(
        self, stories260k: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[VllmSampler]:
        folder = padded_heads(stories260k, tmp_path_factory.mktemp("wide"))
        yield from closed(sampler_of(folder))

    def test_greedy_draws_are_those_of_transformers(
        self, sampler: VllmSampler, stories260k: Path
    ) -> None:
        model = loaded(stories260k)
        one = varied(sampler, n=2, max_new_tokens=200, top_k=1)
        prompts = one.encode(ROWS)
        assert len(prompts) == len(ROWS)
        for prompt, group in zip(prompts, one.sample(prompts), strict=True):
            assert group.token_ids == (greedy(model, prompt, 200, [1]),) * 2
            assert group.logprobs == (0.0, 0.0)  # of the cut distribution

    def test_draws_are_those_of_the_model(self, sampler: VllmSampler, stories260k: Path) -> None:
        check_first_tokens(sampler, loaded(stories260k))
        check_log_probs(varied(sampler, max_new_tokens=250), loaded(stories260k), 2e-4)


# --- the demo's story model -----------------------------------------------------------------------


def check_first_tokens(sampler: VllmSampler, model: Any, n: int = 1000, **config: Any) -> None:
    """A chi-square test of the first drawn token, summed over the prompts."""
    one = varied(sampler, n=n, max_new_tokens=1, **config)
    statistic, freedom = 0.0, 0
    prompts = one.encode(ROWS)
    for prompt, group in zip(prompts, one.sample(prompts), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.token_ids])).logits[:, -1]
        expected = warped_log_probs(logits.double(), one.config)[0].exp().numpy() * n
        counts = Counter(ids[0] for ids in group.token_ids)
        observed = np.array([counts[token] for token in range(len(expected))])
        assert not observed[expected == 0].any()
        rare = expected < 5
        pooled = [(observed[i], expected[i]) for i in np.flatnonzero(~rare)]
        if expected[rare].sum() > 0:
            pooled.append((observed[rare].sum(), max(expected[rare].sum(), 1e-9)))
        statistic += sum((o - e) ** 2 / e for o, e in pooled)
        freedom += len(pooled) - 1
    assert freedom > 10
    assert chi2.sf(statistic, freedom) > 1e-3


def check_log_probs(sampler: VllmSampler, model: Any, tolerance: float, **config: Any) -> None:
    """Of whole completions, by a forward pass; prints the largest and the mean difference."""
    one = varied(sampler, **config)
    differences, tokens = [], 0
    for group in one.sample(one.encode(ROWS)):
        for ids, logprob in zip(group.token_ids, group.logprobs, strict=True):
            expected = reference(model, group.prompt_token_ids, ids, one.config).sum().item()
            differences.append(abs(expected - logprob))
            tokens += len(ids)
    print(
        f"{len(differences)} completions of {tokens} tokens, {config}: at most "
        f"{max(differences):.2g}, {sum(differences) / tokens:.2g} nats a token"
    )
    assert max(differences) < tolerance


class TestStoryModel:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The demo's story model with settings of its own for `generate`."""
        folder = tmp_path_factory.mktemp("story") / "model"
        shutil.copytree(STORY_MODEL, folder)
        (folder / "generation_config.json").write_text(json.dumps(GENERATION))
        return folder

    @pytest.fixture(scope="class")
    def sampler(self, folder: Path) -> Iterator[VllmSampler]:
        yield from closed(sampler_of(folder))

    @pytest.fixture(scope="class")
    def model(self) -> Any:
        return loaded(STORY_MODEL)

    @pytest.fixture(scope="class")
    def groups(self, sampler: VllmSampler) -> list[Group]:
        return sampler.sample(sampler.encode(ROWS))

    def test_greedy_draws_are_those_of_transformers(self, sampler: VllmSampler, model: Any) -> None:
        one = varied(sampler, n=2, top_k=1)
        prompts = one.encode(ROWS)
        assert len(prompts) == len(ROWS)
        for prompt, group in zip(prompts, one.sample(prompts), strict=True):
            assert group.token_ids == (greedy(model, prompt, 60, [1, NEWLINE]),) * 2

    @pytest.mark.parametrize(
        "config",
        [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 20, "top_p": 0.95}],
    )
    def test_first_tokens_come_as_often_as_they_should(
        self, sampler: VllmSampler, model: Any, config: dict[str, Any]
    ) -> None:
        check_first_tokens(sampler, model, **config)

    @pytest.mark.parametrize(
        "config",
        [{}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 20, "top_p": 0.95}],
    )
    def test_log_probabilities_are_those_of_what_is_drawn_from(
        self, sampler: VllmSampler, model: Any, config: dict[str, Any]
    ) -> None:
        check_log_probs(sampler, model, 2e-4, n=32, **config)

    def test_end_tokens_stay_and_end(self, groups: list[Group], sampler: VllmSampler) -> None:
        lasts = Counter[int]()
        for group in groups:
            for ids, reason in zip(group.token_ids, group.finish_reasons, strict=True):
                ended = ids[-1] in (1, NEWLINE)
                assert reason == ("stop" if ended else "length")
                assert ended or len(ids) == 60
                assert not {1, NEWLINE} & set(ids[:-1])
                lasts[ids[-1]] += 1
        assert lasts[NEWLINE] >= 8
        assert {g.finish_reasons for g in varied(sampler, max_new_tokens=1, n=1).sample(
            sampler.encode(ROWS))} == {("length",)}  # fmt: skip

    def test_groups_hold_what_they_should(self, groups: list[Group], sampler: VllmSampler) -> None:
        tokenizer = AutoTokenizer.from_pretrained(STORY_MODEL)
        for row, group in zip(ROWS, groups, strict=True):
            assert (group.prompt_id, group.prompt, group.n) == (row.prompt_id, row.prompt, 8)
            assert group.prompt_token_ids == tuple(tokenizer(row.prompt)["input_ids"])
            for ids, text in zip(group.token_ids, group.completions, strict=True):
                whole = tokenizer.decode([*group.prompt_token_ids, *ids], skip_special_tokens=True)
                assert whole == row.prompt + text
        described = sampler.described()
        assert described["sampler"] == "vllm"
        assert described["dtype"] == "float32"
        assert json.loads(json.dumps(described)) == described

    def test_the_same_seed_draws_the_same(self, groups: list[Group], sampler: VllmSampler) -> None:
        assert sampler.sample(sampler.encode(ROWS)) == groups
        alone = [group for row in ROWS for group in sampler.sample(sampler.encode([row]))]
        ids = [ids for group in groups for ids in group.token_ids]
        again = [ids for group in alone for ids in group.token_ids]
        # A draw at the very edge between two tokens may fall the other way in another batch.
        assert sum(a == b for a, b in zip(ids, again, strict=True)) >= len(ids) - 1
        for changes in ({"seed": 4}, {"seed": -3}):
            other = varied(sampler, **changes).sample(sampler.encode(ROWS))
            assert all(a.token_ids != b.token_ids for a, b in zip(groups, other, strict=True))
        named = copy.copy(sampler)
        named.stream = "other"
        other = named.sample(sampler.encode(ROWS))
        assert all(a.token_ids != b.token_ids for a, b in zip(groups, other, strict=True))

    def test_draws_of_one_prompt_differ(self, sampler: VllmSampler) -> None:
        one = varied(sampler, n=64, temperature=1.5)
        (group,) = one.sample(one.encode(ROWS[:1]))
        assert len({ids for ids in group.token_ids if len(ids) > 10}) > 32
        same = [PromptRow("a", TEXTS[0]), PromptRow("b", TEXTS[0])]
        first, second = one.sample(one.encode(same))  # other ids, other draws
        assert not set(first.token_ids) & set(second.token_ids)

    def test_prompts_that_are_too_long(self, sampler: VllmSampler) -> None:
        row = PromptRow("long", "a cat " * 200)
        with pytest.raises(BonbonError, match=r"long \(\d+ tokens\)"):
            sampler.encode([row])
        cut = varied(sampler, on_long_prompt="truncate").encode([row])
        assert len(cut[0].token_ids) == 256 - 60
        wider = varied(sampler, max_new_tokens=61)  # which vLLM would silently give 60
        with pytest.raises(BonbonError, match="prompt long has 196 tokens, but the context of 256"):
            wider.sample(cut)

    def test_an_error_leaves_the_engine_usable(
        self, groups: list[Group], sampler: VllmSampler
    ) -> None:
        def stop(count: int) -> None:
            raise KeyboardInterrupt

        prompts = sampler.encode(ROWS)
        with pytest.raises(KeyboardInterrupt):
            sampler.sample(prompts, stop)
        outside = EncodedPrompt("outside", "?", (0, 99_999))
        with pytest.raises(BonbonError, match="prompt outside has token 99999, and the model 2048"):
            sampler.sample([*prompts, outside])
        assert sampler.sample(prompts) == groups


# --- an adapter -----------------------------------------------------------------------------------


class TestAdapter:
    @pytest.fixture(scope="class")
    def adapter(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LoraConfig(
                r=12,  # between two ranks of vLLM's
                lora_alpha=6,
                target_modules="all-linear",
                init_lora_weights=False,
                rank_pattern={"o_proj": 4},
            )
            get_peft_model(loaded(STORY_MODEL), config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(STORY_MODEL).save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    def sampler(self, adapter: Path) -> Iterator[VllmSampler]:
        yield from closed(sampler_of(adapter, n=2, top_k=1))

    def test_its_greedy_draws_are_those_of_peft(self, sampler: VllmSampler, adapter: Path) -> None:
        base = loaded(STORY_MODEL)
        prompts = sampler.encode(ROWS)
        without = [greedy(base, prompt, 60, [1]) for prompt in prompts]
        model = PeftModel.from_pretrained(base, adapter)
        assert len(prompts) == len(ROWS)
        for prompt, group, other in zip(prompts, sampler.sample(prompts), without, strict=True):
            assert group.token_ids == (greedy(model, prompt, 60, [1]),) * 2
            assert group.token_ids[0] != other

    def test_its_log_probabilities(self, sampler: VllmSampler, adapter: Path) -> None:
        model = PeftModel.from_pretrained(loaded(STORY_MODEL), adapter)
        check_log_probs(sampler, model, 2e-4, n=8, top_k=0)

    def test_what_vllm_cannot_do(self, adapter: Path, tmp_path: Path) -> None:
        settings = json.loads((adapter / "adapter_config.json").read_text())
        shutil.copy(adapter / "tokenizer.json", tmp_path)
        shutil.copy(adapter / "tokenizer_config.json", tmp_path)
        write = (tmp_path / "adapter_config.json").write_text
        write(json.dumps(settings))
        with pytest.raises(BonbonError, match="no safetensors weights"):
            sampler_of(tmp_path)
        shutil.copy(adapter / "adapter_model.safetensors", tmp_path)
        write(json.dumps(settings | {"r": 1024}))
        with pytest.raises(BonbonError, match="up to rank 512, and this one has 1024"):
            sampler_of(tmp_path)
        write(json.dumps(settings | {"use_dora": True}))
        with pytest.raises(BonbonError, match=r"cannot use the adapter .* DoRA.*; merge it"):
            sampler_of(tmp_path)


# --- scoring --------------------------------------------------------------------------------------

COMPLETIONS = [
    "",
    " was happy.",
    " cried all day and lost the ball. He was very sad.",
    " yes " * 90,
]


def check_rewards(folder: Path, prompts: Sequence[Any], tolerance: float) -> None:
    """Those of transformers, in whichever order and for texts that are cut."""
    model = VllmRewardModel(RewardConfig(model=str(folder)), VllmSettings(engine=EAGER))
    try:
        asked = [(prompt, text) for prompt in prompts for text in COMPLETIONS]
        columns = [list(column) for column in zip(*asked, strict=True)]
        rewards = model(*columns)
        assert model([], []).shape == (0,)
    finally:
        model.close()
    by_transformers = RewardModel.from_pretrained(str(folder), device="cpu")
    for prompt, text in asked:
        assert model.encode(prompt, text) == by_transformers.encode(prompt, text)
    expected = by_transformers(*columns)
    assert rewards.dtype == np.float64
    print(f"rewards differ by at most {np.abs(rewards - expected).max():.2g}")
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=tolerance)
    assert np.ptp(expected) > 100 * tolerance
    assert expected.min() < 0 or expected.max() > 1  # no probabilities


class TestReward:
    def test_of_the_demo(self) -> None:
        check_rewards(REWARD_MODEL, TEXTS, 2e-5)
        with pytest.raises(BonbonError, match="not a sequence-classification model"):
            VllmRewardModel(RewardConfig(model=str(STORY_MODEL)), VllmSettings())

    def test_of_a_random_chat_model(self, tmp_path: Path) -> None:
        folder = tmp_path / "reward"
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = tiny_llama_config(num_labels=1, head_dim=32)
            LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        )
        tokenizer.save_pretrained(folder)
        chats = [[{"role": "user", "content": text}] for text in TEXTS]
        check_rewards(folder, [*chats, "a text"], 2e-5)
        two = build_tiny_reward_model(tmp_path / "two", num_labels=2)
        with pytest.raises(BonbonError, match="has 2 outputs"):
            VllmRewardModel(RewardConfig(model=str(two)), VllmSettings())


# --- a whole run ----------------------------------------------------------------------------------


def test_a_run_that_vllm_draws_and_scores(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"{text} {word}" for word in ("the", "a", "his", "her") for text in TEXTS[1:]]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    settings = {
        "model": {"name": str(STORY_MODEL)},
        "prompts": {"path": str(prompts)},
        "sampling": {"n": 4, "max_new_tokens": 16},
        "sampler": {"name": "vllm", "engine": EAGER},
        "reward": {"model": str(REWARD_MODEL), "vllm": {"engine": EAGER}},
        "train": {"learning_rate": 1e-2, "epochs": 2, "batch_size": 4, "lora": {"r": 4}},
        "evaluation": {"k": 2, "holdout": 0.25},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    command = ["run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    for _ in range(2):  # the second finds all of it done
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    folder = RunFolder(tmp_path / "run", parse_config(settings))
    groups = read_groups(folder.groups)
    assert 6 <= len(groups) < len(texts)
    assert groups.provenance["sampler"] == "vllm"
    model, reward = loaded(STORY_MODEL), RewardModel.from_pretrained(str(REWARD_MODEL))
    for group in groups:
        expected = [
            reference(model, group.prompt_token_ids, ids, folder.config.sampling).sum().item()
            for ids in group.token_ids
        ]
        assert group.logprobs == pytest.approx(expected, abs=2e-4)
        rewards = reward([group.prompt] * 4, group.completions)
        assert group.rewards == pytest.approx(rewards.tolist(), abs=2e-5)
    figures = json.loads((folder.evaluation / "evaluation.json").read_text())["models"]
    assert set(figures) == {"base", "best-of-4", "rank_regression"}
    assert figures["rank_regression"]["kl"]["value"] > 0
    assert (folder.path / "report.html").exists()


# --- errors ---------------------------------------------------------------------------------------


class TestErrors:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_model_len": 100_000}, "cannot run model .*100000"),
            ({"engine": {"no_such_setting": 1}}, "cannot run model .*no_such_setting"),
        ],
    )
    def test_settings_that_vllm_refuses(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(BonbonError, match=message):
            sampler_of(STORY_MODEL, settings)

    def test_heads_that_its_cpu_attention_has_not(self, stories260k: Path) -> None:
        sampler = sampler_of(stories260k)
        try:
            with pytest.raises(BonbonError, match=r"vLLM failed while it ran model .*head_dim=8"):
                sampler.sample(sampler.encode(ROWS))
        finally:
            sampler.close()

    def test_models_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(BonbonError, match="there is no such folder"):
            sampler_of(tmp_path / "nothing")
        with pytest.raises(BonbonError, match="the installed vLLM runs on 'cpu'"):
            VllmSampler(
                ModelConfig(name=str(STORY_MODEL), device="cuda"),
                SamplingConfig(),
                VllmSamplerConfig(),
            )
