"""Losses of human text against transformers' own, text by text, and figures against sums."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import bonbon.models.logprobs
from bonbon.evaluation.human_text import (
    TextLosses,
    bits_per_byte,
    forgetting,
    human_text_losses,
    perplexity,
    read_texts,
)
from bonbon.models.loading import load_policy
from bonbon.system.errors import BonbonError
from support.models import BOS, CONTEXT, byte_tokenizer

# The tiny model's context is 64 tokens: a begin token and 63 bytes.
TEXTS = [
    "Once upon a time there was a cat.",
    "",
    "x",
    "Größe 🐈 “quoted”",
    "a longer text, " * 10,
    "The end",
]

Loaded = tuple[Any, Any]


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Loaded:
    return load_policy(str(tiny_model), device="cpu")


@torch.no_grad()
def transformers_nats(model: Any, ids: list[int]) -> float:
    """One text alone, by the mean loss that transformers computes from labels."""
    row = torch.tensor([ids])
    return float(model(input_ids=row, labels=row).loss) * (len(ids) - 1)


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch_tokens", [None, 1, 70, 150, 10_000])
def test_losses_by_transformers(tiny: Loaded, max_batch_tokens: int | None) -> None:
    """In batches of every size: padding, and a text's place, change nothing."""
    model, tokenizer = tiny
    got = human_text_losses(model, tokenizer, TEXTS, max_batch_tokens)
    for index, text in enumerate(TEXTS):
        ids = tokenizer(text)["input_ids"][:CONTEXT]
        expected = transformers_nats(model, ids) if len(ids) > 1 else 0.0
        assert got.nats[index] == pytest.approx(expected, rel=1e-5)
        assert got.tokens[index] == len(ids) - 1
    # A byte a token, all of them scored, up to the context.
    assert got.bytes.tolist() == [min(len(text.encode()), CONTEXT - 1) for text in TEXTS]
    assert got.nats.dtype == np.float64


def test_texts_are_scored_one_by_one(tiny: Loaded) -> None:
    """Neither order nor company changes a text's loss."""
    model, tokenizer = tiny
    together = human_text_losses(model, tokenizer, TEXTS)
    backwards = human_text_losses(model, tokenizer, TEXTS[::-1])
    np.testing.assert_allclose(together.nats, backwards.nats[::-1], rtol=1e-5)
    alone = human_text_losses(model, tokenizer, [TEXTS[3]])
    np.testing.assert_allclose(alone.nats[0], together.nats[3], rtol=1e-5)


def test_without_begin_token(tiny: Loaded) -> None:
    """The first token of the text is then not scored, nor are its bytes."""
    from tokenizers import processors

    model, _ = tiny
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    got = human_text_losses(model, tokenizer, ["abcd", "z", "", "é!"])
    ids = tokenizer("abcd")["input_ids"]
    assert BOS not in ids
    assert got.nats[0] == pytest.approx(transformers_nats(model, ids), rel=1e-5)
    assert got.tokens.tolist() == [3, 0, 0, 2]
    assert got.bytes.tolist() == [3, 0, 0, 1]  # a character belongs to its first token
    assert got.nats[1:3].tolist() == [0, 0]


def test_cut_text_is_its_beginning(tiny: Loaded) -> None:
    model, tokenizer = tiny
    text = "".join(chr(97 + i % 26) for i in range(200))
    cut = human_text_losses(model, tokenizer, [text])
    whole = human_text_losses(model, tokenizer, [text[: CONTEXT - 1]])
    for name in ("nats", "tokens", "bytes"):
        assert getattr(cut, name).tolist() == getattr(whole, name).tolist()


def test_chunked_logits(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary the logits are never all held; the losses are the same."""
    model, tokenizer = tiny
    plain = human_text_losses(model, tokenizer, TEXTS)
    monkeypatch.setattr(bonbon.models.logprobs, "_LOGITS", 2_000)
    monkeypatch.setattr(bonbon.models.logprobs, "_CPU_LOGITS", 2_000)
    np.testing.assert_allclose(human_text_losses(model, tokenizer, TEXTS).nats, plain.nats, 1e-5)


def test_tokenizer_without_offsets(tiny: Loaded) -> None:
    class Slow:
        is_fast = False

        def __init__(self, fast: Any) -> None:
            self.decode = fast.decode
            self.fast = fast

        def __call__(self, text: str, return_offsets_mapping: bool, verbose: bool) -> Any:
            assert not return_offsets_mapping
            return self.fast(text)

    model, tokenizer = tiny
    got = human_text_losses(model, Slow(tokenizer), TEXTS)  # type: ignore[arg-type]
    expected = human_text_losses(model, tokenizer, TEXTS)
    for name in ("nats", "tokens", "bytes"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_nothing_to_score(tiny: Loaded, texts: list[str]) -> None:
    with pytest.raises(BonbonError, match=f"none of the {len(texts)} texts has two tokens"):
        human_text_losses(*tiny, texts)


def test_real_model_on_stories_and_on_other_text(stories260k: Path, shared: Path) -> None:
    """A model of children's stories predicts them far better than people's prose."""
    model, tokenizer = load_policy(str(stories260k), device="cpu", dtype="float32")
    rows = (shared / "data" / "stories" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    stories = [json.loads(row)["prompt"] for row in rows[:40]]
    lines = (shared / "data" / "dove" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    prose = [json.loads(line)["gold_response"] for line in lines[:40]]
    losses = {}
    for name, texts in (("stories", stories), ("prose", prose)):
        losses[name] = human_text_losses(model, tokenizer, texts, 2_000)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        expected = [transformers_nats(model, row[:512]) for row in ids]  # its context
        np.testing.assert_allclose(losses[name].nats, expected, rtol=1e-5)
        # All text is scored where it fits, as this tokenizer puts a begin token first.
        for text, row, size in zip(texts, ids, losses[name].bytes, strict=True):
            assert (size == len(text.encode())) == (len(row) <= 512)
    assert perplexity(losses["stories"]).high < 10
    assert perplexity(losses["prose"]).low > 20
    assert bits_per_byte(losses["stories"]).high < bits_per_byte(losses["prose"]).low


# --- figures --------------------------------------------------------------------------------------


def losses_of(nats: Any, tokens: Any, sizes: Any) -> TextLosses:
    return TextLosses(np.array(nats, np.float64), np.array(tokens), np.array(sizes))


def test_figures_are_ratios_of_sums() -> None:
    losses = losses_of([2.0, 10.0, 0.0], [1, 5, 0], [4, 16, 0])
    assert perplexity(losses).value == pytest.approx(math.exp(2))
    assert bits_per_byte(losses).value == pytest.approx(12 / math.log(2) / 20)


def test_perplexity_of_a_uniform_model(tiny: Loaded) -> None:
    """It is the vocabulary's size, and a byte costs the bits of a token."""
    model, tokenizer = tiny
    uniform = type(model)(model.config).eval()
    torch.nn.init.zeros_(uniform.lm_head.weight)
    losses = human_text_losses(uniform, tokenizer, TEXTS)
    figure = perplexity(losses)
    assert (figure.value, figure.low, figure.high) == pytest.approx((259, 259, 259), rel=1e-5)
    assert bits_per_byte(losses).value == pytest.approx(math.log2(259), rel=1e-5)


def test_blank_texts_change_no_figure() -> None:
    some = losses_of([2.0, 9.0, 4.0], [1, 5, 2], [4, 16, 9])
    more = losses_of([2.0, 0.0, 9.0, 4.0, 0.0], [1, 0, 5, 2, 0], [4, 0, 16, 9, 0])
    for figure in (perplexity, bits_per_byte):
        assert figure(some, 200) == figure(more, 200)
    assert forgetting(some, some, 200) == forgetting(more, more, 200)


def test_forgetting_is_paired() -> None:
    """Texts differ far more than the two models do, which the interval does not feel."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, 50)
    before = losses_of(tokens * rng.uniform(1, 9, 50), tokens, tokens * 4)
    after = losses_of(before.nats + 0.25 * tokens, tokens, tokens * 4)
    got = forgetting(after, before)
    assert (got.value, got.low, got.high) == pytest.approx((0.25, 0.25, 0.25))
    ratio = perplexity(after).value / perplexity(before).value
    assert math.exp(got.value) == pytest.approx(ratio)
    assert forgetting(before, after).value == pytest.approx(-0.25)


def test_forgetting_of_other_tokens() -> None:
    before, after = losses_of([1.0, 2.0], [1, 2], [4, 8]), losses_of([1.0, 2.0], [1, 3], [4, 8])
    with pytest.raises(ValueError, match="different texts or tokenizers"):
        forgetting(after, before)


def test_interval_covers() -> None:
    """The 95% interval of a ratio of sums, over 300 sets of texts of very different lengths."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        tokens = rng.geometric(1 / 40, 120)
        losses = losses_of(rng.gamma(2 * tokens, 1.5), tokens, tokens)  # 3 nats a byte
        figure = bits_per_byte(losses, 200)
        covered += figure.low <= 3 / math.log(2) <= figure.high
    assert 0.92 <= covered / 300 <= 0.975


# --- reading texts --------------------------------------------------------------------------------


def test_read_texts_of_every_type(tmp_path: Path) -> None:
    texts = ["one, “two”", " three "]
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "t.csv").write_text('id,text\n0,"one, “two”"\n1, three \n', encoding="utf-8")
    (tmp_path / "t.txt").write_text("one, “two”\n\n three \n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for kind in ("jsonl", "csv", "txt", "parquet"):
        assert read_texts(tmp_path / f"t.{kind}") == texts
        assert read_texts(tmp_path / f"t.{kind}", limit=1) == texts[:1]
    assert read_texts(tmp_path / "t.csv", "id") == ["0", "1"]
    assert read_texts(tmp_path / "t.txt", "any") == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"prompt": "a"}', "row 1: no column 'text' .columns: prompt.; name it with"),
        ("t.jsonl", '{"text": "a"}\n{"text": " "}', "row 2: the text is empty"),
        ("t.jsonl", '{"text": 7}', "row 1: expected a text, not 7"),
        ("t.jsonl", '{"text": null}', "row 1: expected a text, not None"),
        ("t.jsonl", '{"text": "\\ud800"}', "row 1: the text has a lone surrogate"),
        ("t.jsonl", '{"text": "a"', "row 1: not JSON"),
        ("t.jsonl", "", "no texts in the file"),
        ("t.txt", "\n\n", "no texts in the file"),
        ("t.docx", "a", "unknown file type"),
        ("t.csv", "text\na,b\n", "row 1: fields and header do not match"),
    ],
)
def test_read_texts_complaints(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BonbonError, match=message) as caught:
        read_texts(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match=r"none\.jsonl"):
        read_texts(tmp_path / "none.jsonl")
