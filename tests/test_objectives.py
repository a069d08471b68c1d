"""The objectives against arithmetic written out by hand, finite differences, and TRL.

Each objective is a pure function of summed log-probabilities, so plain Python floats are a complete
reference for values, and gradcheck for gradients.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bonbon.batching import pad_rows
from bonbon.logprobs import completion_log_probs
from bonbon.objectives import (
    OBJECTIVES,
    PAPER_ALPHA,
    ObjectiveSettings,
    PairLogps,
    bon_beta,
    bonbon,
    bonbon_dpo,
    dpo,
    ipo,
    ipo_bon,
    pair_metrics,
    sft_bon,
)

quick = settings(deadline=None, max_examples=50, derandomize=True)

Logps = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# best, worst, ref_best, ref_worst: sums over tokens, so far below 0.
numbers = st.floats(-300, 0)
rows = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)
sizes = st.integers(2, 64)
alphas = st.floats(0, 1)
betas = st.floats(1e-3, 2)


def columns(values: list[tuple[float, ...]]) -> Logps:
    best, worst, ref_best, ref_worst = torch.tensor(values, dtype=torch.float64).T
    return best, worst, ref_best, ref_worst


def margins(values: list[tuple[float, ...]]) -> NDArray[np.float64]:
    return np.array([(b - rb) - (w - rw) for b, w, rb, rw in values])


def harmonic_target(n: int) -> float:
    return (n - 1) * sum(1 / k for k in range(1, n))


def matches(losses: torch.Tensor, expected: NDArray[np.float64]) -> None:
    assert losses.shape == (len(expected),)
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-9, atol=1e-9)


# --- values ---------------------------------------------------------------------------------------


@quick
@given(rows)
def test_sft_bon(values: list[tuple[float, ...]]) -> None:
    matches(sft_bon(columns(values)[0]), np.array([-row[0] for row in values]))


@quick
@given(rows, sizes)
def test_ipo_bon(values: list[tuple[float, ...]], n: int) -> None:
    matches(ipo_bon(*columns(values), n), (margins(values) - harmonic_target(n)) ** 2)


@quick
@given(rows, sizes, alphas)
def test_bonbon_mixes(values: list[tuple[float, ...]], n: int, alpha: float) -> None:
    sft = np.array([-row[0] for row in values])
    squares = (margins(values) - harmonic_target(n)) ** 2
    matches(bonbon(*columns(values), n, alpha), alpha * sft + (1 - alpha) * squares)


@quick
@given(rows, betas)
def test_dpo(values: list[tuple[float, ...]], beta: float) -> None:
    # ln(1 + e^(−x)), as numpy's logaddexp computes it without overflow.
    matches(dpo(*columns(values), beta), np.logaddexp(0, -beta * margins(values)))


@quick
@given(rows, betas)
def test_ipo(values: list[tuple[float, ...]], beta: float) -> None:
    matches(ipo(*columns(values), beta), (margins(values) - 1 / (2 * beta)) ** 2)


@quick
@given(rows, sizes, alphas)
def test_bonbon_dpo(values: list[tuple[float, ...]], n: int, alpha: float) -> None:
    sft = np.array([-row[0] for row in values])
    preference = np.logaddexp(0, -margins(values) / (2 * harmonic_target(n)))
    matches(bonbon_dpo(*columns(values), n, alpha), alpha * sft + (1 - alpha) * preference)


@quick
@given(rows, sizes)
def test_ipo_bon_is_ipo_at_beta(values: list[tuple[float, ...]], n: int) -> None:
    """Two derivations of one loss: the paper's β for IPO gives BoNBoN's target."""
    logps = columns(values)
    torch.testing.assert_close(ipo_bon(*logps, n), ipo(*logps, bon_beta(n)))


def test_paper_defaults() -> None:
    """α = 0.005 is the paper's, and what bonbon takes when nobody says otherwise."""
    logps = columns([(-10.0, -20.0, -11.0, -12.0)])
    expected = 0.005 * 10 + 0.995 * (9 - 18.15) ** 2
    assert float(bonbon(*logps, n=8)) == pytest.approx(expected)
    assert ObjectiveSettings(n=8).alpha == PAPER_ALPHA == 0.005
    assert float(bonbon_dpo(*logps, n=8)) == pytest.approx(
        0.005 * 10 + 0.995 * math.log1p(math.exp(-9 / 36.3))
    )


def test_extreme_margins_stay_finite() -> None:
    """Sequence log-ratios of hundreds of nats occur; σ underflows there, ln σ must not."""
    logps = columns([(-2000.0, 0.0, 0.0, -2000.0), (0.0, -2000.0, -2000.0, 0.0)])
    matches(dpo(*logps, beta=1.0), np.array([4000.0, 0.0]))


# --- gradients ------------------------------------------------------------------------------------

EVERY_LOSS: dict[str, Callable[..., torch.Tensor]] = {
    "ipo_bon": lambda *logps: ipo_bon(*logps, n=8),
    "bonbon": lambda *logps: bonbon(*logps, n=4, alpha=0.3),
    "dpo": lambda *logps: dpo(*logps, beta=0.2),
    "ipo": lambda *logps: ipo(*logps, beta=0.1),
    "bonbon_dpo": lambda *logps: bonbon_dpo(*logps, n=4, alpha=0.3),
    "sft_bon": lambda best, *_: sft_bon(best),
}


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logps = [-20 * torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(4)]
    inputs = tuple(logp.requires_grad_() for logp in logps)
    used = inputs[:1] if name == "sft_bon" else inputs
    assert torch.autograd.gradcheck(EVERY_LOSS[name], used)


@quick
@given(rows, sizes, alphas)
def test_bonbon_gradient(values: list[tuple[float, ...]], n: int, alpha: float) -> None:
    """∂/∂ln π(y_b) = −α + 2(1−α)(margin − target); the worst gets the second term's negative."""
    best, worst, ref_best, ref_worst = columns(values)
    best.requires_grad_()
    worst.requires_grad_()
    bonbon(best, worst, ref_best, ref_worst, n, alpha).sum().backward()
    pull = 2 * (1 - alpha) * (margins(values) - harmonic_target(n))
    np.testing.assert_allclose(best.grad, -alpha + pull, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(worst.grad, -pull, rtol=1e-9, atol=1e-9)


@quick
@given(rows, betas)
def test_dpo_gradient(values: list[tuple[float, ...]], beta: float) -> None:
    best, worst, ref_best, ref_worst = columns(values)
    best.requires_grad_()
    dpo(best, worst, ref_best, ref_worst, beta).sum().backward()
    expected = -beta / (1 + np.exp(np.clip(beta * margins(values), -700, 700)))
    np.testing.assert_allclose(best.grad, expected, rtol=1e-9, atol=1e-12)


# --- routing --------------------------------------------------------------------------------------

PAIR = columns([(-10.0, -14.0, -12.0, -11.0), (-3.0, -2.0, -4.0, -6.0)])
LOGPS = PairLogps(best=PAIR[0], worst=PAIR[1], ref_best=PAIR[2], ref_worst=PAIR[3])
SETTINGS = ObjectiveSettings(n=4, alpha=0.2, beta=0.3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bonbon", bonbon(*PAIR, n=4, alpha=0.2)),
        ("sft_bon", sft_bon(LOGPS.best)),
        ("ipo_bon", ipo_bon(*PAIR, n=4)),
        ("bonbon_dpo", bonbon_dpo(*PAIR, n=4, alpha=0.2)),
        ("dpo", dpo(*PAIR, beta=0.3)),
        ("ipo", ipo(*PAIR, beta=0.3)),
    ],
)
def test_routes(name: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(OBJECTIVES[name].loss(LOGPS, SETTINGS), expected)


def test_every_objective_is_routed() -> None:
    assert set(OBJECTIVES) == set(EVERY_LOSS)
    assert {name for name, it in OBJECTIVES.items() if not it.uses_worst} == {"sft_bon"}


@pytest.mark.parametrize(
    ("setting", "value", "changed"),
    [
        ("n", 5, {"bonbon", "ipo_bon", "bonbon_dpo"}),
        ("alpha", 0.7, {"bonbon", "bonbon_dpo"}),
        ("beta", 0.9, {"dpo", "ipo"}),
    ],
)
def test_setting_changes_only_its_objectives(setting: str, value: float, changed: set[str]) -> None:
    """A setting that leaks into, or is lost on the way to, an objective is a silent wrong run."""
    other = replace(SETTINGS, **{setting: value})  # type: ignore[arg-type]
    differing = {
        name
        for name, objective in OBJECTIVES.items()
        if not torch.equal(objective.loss(LOGPS, SETTINGS), objective.loss(LOGPS, other))
    }
    assert differing == changed


@pytest.mark.parametrize("name", OBJECTIVES)
def test_missing_worst(name: str) -> None:
    """An objective of pairs refuses a best alone; SFT-BoN never asks for the worst."""
    alone = PairLogps(best=LOGPS.best, ref_best=LOGPS.ref_best)
    if OBJECTIVES[name].uses_worst:
        with pytest.raises(ValueError, match="worst"):
            OBJECTIVES[name].loss(alone, SETTINGS)
    else:
        torch.testing.assert_close(OBJECTIVES[name].loss(alone, SETTINGS), -LOGPS.best)


def test_no_mode_flags() -> None:
    """One objective a function: none of them takes a boolean or a string that picks another."""
    for loss in (sft_bon, ipo_bon, bonbon, dpo, ipo, bonbon_dpo):
        kinds = {str(p.annotation) for p in inspect.signature(loss).parameters.values()}
        assert kinds <= {"torch.Tensor", "int", "float"}


# --- metrics --------------------------------------------------------------------------------------


@quick
@given(rows, sizes)
def test_pair_metrics(values: list[tuple[float, ...]], n: int) -> None:
    best, worst, ref_best, ref_worst = columns(values)
    got = pair_metrics(PairLogps(best, ref_best, worst, ref_worst), n)
    margin = margins(values)
    matches(got["sft_loss"], np.array([-row[0] for row in values]))
    matches(got["best_log_ratio"], np.array([row[0] - row[2] for row in values]))
    matches(got["margin"], margin)
    matches(got["ipo_loss"], (margin - harmonic_target(n)) ** 2)
    matches(got["accuracy"], (margin > 0).astype(np.float64))


def test_pair_metrics_of_best_alone() -> None:
    got = pair_metrics(PairLogps(best=LOGPS.best, ref_best=LOGPS.ref_best), n=4)
    assert set(got) == {"sft_loss", "best_log_ratio"}


# --- TRL ------------------------------------------------------------------------------------------

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
PAIRS = [
    {"prompt": "a b c", "chosen": " d e f g", "rejected": " h"},
    {"prompt": "h", "chosen": " a b", "rejected": " c d e a a"},
    {"prompt": "d d", "chosen": " g", "rejected": " b h h"},
]


def tiny_llama(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.6,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def word_tokenizer() -> Any:
    """Words split at spaces, so that a prompt's tokens never merge with its completion's."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(WORDS[:3])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


class TrlRun:
    """One batch through TRL's own DPOTrainer, and the same token ids through our code."""

    BETA = 0.25

    def __init__(self, loss_type: str, folder: Path):
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
        arguments = trl.DPOConfig(
            output_dir=str(folder), loss_type=loss_type, beta=self.BETA, use_cpu=True, bf16=False,
            per_device_train_batch_size=len(PAIRS), report_to=[], save_strategy="no",
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        policy, base = tiny_llama(1), tiny_llama(2)
        trainer = trl.DPOTrainer(
            model=policy, ref_model=base, args=arguments, processing_class=word_tokenizer(),
            train_dataset=datasets.Dataset.from_list(PAIRS),
        )  # fmt: skip
        self.rows = [trainer.train_dataset[index] for index in range(len(PAIRS))]
        batch = trainer.data_collator(self.rows)
        policy.eval()
        self.loss = float(trainer.compute_loss(trainer.model, batch).detach())
        self.logps = [
            self.sums(model, column)
            for model in (policy, base)
            for column in ("chosen_ids", "rejected_ids")
        ]

    def lengths(self, column: str) -> torch.Tensor:
        return torch.tensor([len(row[column]) for row in self.rows])

    def sums(self, model: Any, column: str) -> torch.Tensor:
        padded = pad_rows([r["prompt_ids"] for r in self.rows], [r[column] for r in self.rows], 0)
        with torch.no_grad():
            return completion_log_probs(model, padded)


def test_trl_dpo_agrees(tmp_path: Path) -> None:
    """TRL's sigmoid loss is a mean of ours over pairs: same ids, summed log-probabilities."""
    run = TrlRun("sigmoid", tmp_path)
    assert run.lengths("chosen_ids").tolist() == [5, 3, 2]  # TRL adds the end token
    assert run.loss == pytest.approx(float(dpo(*run.logps, beta=run.BETA).mean()), rel=1e-5)


def test_trl_ipo_divides_by_length(tmp_path: Path) -> None:
    """Why TRL's β does not carry over: its `ipo` is ours on means over tokens, not on sums."""
    run = TrlRun("ipo", tmp_path)
    lengths = [run.lengths("chosen_ids"), run.lengths("rejected_ids")] * 2
    averaged = [logp / length for logp, length in zip(run.logps, lengths, strict=True)]
    assert run.loss == pytest.approx(float(ipo(*averaged, beta=run.BETA).mean()), rel=1e-5)
    assert run.loss != pytest.approx(float(ipo(*run.logps, beta=run.BETA).mean()), rel=0.1)


def test_trl_sft_is_a_token_mean(tmp_path: Path) -> None:
    """Why TRL's α does not carry over: its `sft` weighs a pair by its share of the tokens."""
    run = TrlRun("sft", tmp_path)
    total, tokens = float(run.logps[0].sum()), int(run.lengths("chosen_ids").sum())
    assert run.loss == pytest.approx(-total / tokens, rel=1e-5)
    assert run.loss != pytest.approx(float(sft_bon(run.logps[0]).mean()), rel=0.1)
