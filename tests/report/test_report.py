"""The report says what evaluation.json says, in all cases, whatever texts it is given."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import math
import re
import warnings
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

from bonbon.evaluation.figures import Figure
from bonbon.report import browser, write_report
from bonbon.report.browser import _column
from bonbon.report.data import read_run
from bonbon.report.histograms import histograms
from bonbon.report.numbers import number, of_100, shown
from bonbon.report.page import escape_markdown
from bonbon.report.theme import DARK, DATA_COLOURS, LIGHT, PAPER, mark
from bonbon.report.words import headline
from bonbon.system.errors import BonbonError
from support.groups import group_of
from support.reports import (
    HOSTILE,
    MAIN_TABLE,
    K,
    N,
    Page,
    check_main_table,
    draws,
    evaluation,
    fig,
    model_figures,
    older,
    sentences,
    write_page,
    write_run,
)

# --- making runs ----------------------------------------------------------------------------------


# --- reading pages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything, and its report."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def main_changed(**changes: Any) -> dict[str, Any]:
    values = evaluation()
    values["models"]["rank_regression"] |= changes
    return values


# --- figures --------------------------------------------------------------------------------------


def test_all_figures_on_the_page_are_those_of_the_evaluation(html: str) -> None:
    assert check_main_table(html, evaluation()["models"]) == list(MAIN_TABLE)
    header = Page(html).tables["All models against the base model, with 95% intervals"][0]
    assert header[1:] == ["rank_regression", "base", f"best-of-{N}", "sft_bon"]


def test_the_other_tables(html: str) -> None:
    tables = Page(html).tables
    repetition = "repeated 4-grams (points)"
    assert tables["Drift: change against the base model"][1][:2] == [
        repetition,
        "−2.1 −2.4 to −1.8",
    ]
    assert "Drift at an equal win rate of 70.0%" not in tables  # nothing is known of it
    judged = tables["Win rate against the base model, by each reward and judge"]
    assert ["judge’s comparisons", "320", "–", "–", "320"] in judged
    assert ["of them unreadable", "3", "–", "–", "3"] in judged
    tasks = next(rows for caption, rows in tables.items() if caption.startswith("Tasks"))
    shown = "0.412 ± 0.010, −0.020 (−0.050 to +0.010)"
    assert [row[:2] for row in tasks[1:]] == [
        ["lambada, acc", shown],
        ["lambada, perplexity", "nan"],
    ]
    assert tables["Model against model"][1] == [
        "rank_regression against sft_bon",
        "61.0% 59.0 to 63.0",
        "+8.2 +6.2 to +10.2",
    ]
    estimates = tables["KL in nats by three estimators, which should agree"]
    assert [row[1] for row in estimates[1:4]] == [
        "1.46 1.42 to 1.50",
        "1.47 1.38 to 1.56",
        "1.44 1.37 to 1.51",
    ]
    assert tables["Cost"][1:] == [
        ["sampling", "1,234,567 tokens", "42 s"],
        ["scoring", "4,000 completions", "–"],
        ["evaluation", "98,765 tokens", "10.0 min"],
        ["training rank_regression", "–", "2.0 h"],
    ]
    curve = tables["Best-of-k of the base model"]
    assert curve[4][0] == "best-of-8 (extrapolated)"
    assert curve[3][:4] == ["best-of-4", "0.64", "80.0% 79.0 to 81.0", "79.0% 78.0 to 80.0"]


def test_the_drift_at_an_equal_win_rate_is_shown_where_it_is_known(tmp_path: Path) -> None:
    values = main_changed(drift_at_equal_win_rate={"repetition": fig(-0.01, 0.002)})
    write_page(write_run(tmp_path, values))
    tables = Page((tmp_path / "report.html").read_text()).tables
    row = tables["Drift at an equal win rate of 70.0%"][1]
    assert row == ["repeated 4-grams (points)", "−1.0 −1.2 to −0.8"]  # known of no other model


def test_numbers_in_writing() -> None:
    assert number(-1234.56, 1) == "−1,234.6"
    assert number(-0.001, 1) == "0.0"
    assert number(0.0, 1, signed=True) == "0.0"
    assert number(0.25, 2, signed=True) == "+0.25"
    assert [number(None), number(math.nan), number(math.inf)] == ["–"] * 3
    assert str(shown(Figure(0.82, 0.805, 0.837), "share")) == "82.0% (80.5 to 83.7)"
    assert str(shown(Figure.exact(0.5), "share")) == "50.0%"
    assert str(shown(Figure(0.01234, 0.01, 0.0146), "")) == "0.0123 (0.0100 to 0.0146)"
    assert str(shown(Figure.exact(0.0), "")) == "0"
    assert [of_100(s) for s in (0.82, 0.5, 0.504, 0.999, 1.0, 0.001, 0.0)] == [
        "82", "50", "50.4", "99.9", "100", "0.1", "0",
    ]  # fmt: skip


# --- words ----------------------------------------------------------------------------------------


def test_a_gain_is_said_with_its_cost(tmp_path: Path) -> None:
    text = " ".join(sentences(tmp_path, evaluation()))
    assert "In 78 of 100 comparisons the aligned model’s answer is preferred" in text
    assert "(95% interval 76.7 to 79.7)" in text
    assert "Drawing 4 and keeping the best would win 80 of 100: the model recovers 82% of" in text
    least = 0.4912 * 1.4567
    assert "It moved 1.46 nats from the base model (KL divergence); the least" in text
    assert f"is {least:.2f} (efficiency 0.49)" in text
    assert "no clear difference in length from the base model’s answers (+0.1 tokens" in text
    assert "By a reward never trained on (gold) the model wins 78 of 100" in text
    assert "no clear loss there (+0.3 of 100 (95% interval −0.1 to +0.7))" in text
    judged = "a judge model on 317 pairs (3 of 320 had no readable verdict) it wins 75 of 100"
    assert judged in text
    assert "some of what the base model knew is forgotten" in text
    assert "Caution" not in text


@pytest.mark.parametrize(
    ("changes", "said", "not_said"),
    [
        ({"win_rate": fig(0.508, 0.02)}, "no clear difference from the base model:", "recovers"),
        ({"win_rate": fig(0.41, 0.02)}, "worse than the base model", "recovers"),
        ({"win_rate": fig(0.5)}, "no clear difference from the base model:", "recovers"),
        ({"win_rate": fig(0.504, 0.002)}, "In 50.4 of 100", "no clear difference from"),
        ({"win_rate": None}, "was not measured", "preferred"),
        ({"recovered": fig(1.07, 0.02)}, "the model’s gain is 107% of that", "recovers"),
        ({"recovered": fig(0.998, 0.02)}, "recovers 99.8% of", "100%"),
        ({"recovered": None}, "Drawing 4", "recovers"),
        ({"kl_efficiency": fig(1.04, 0.1)}, "(efficiency 1.04; sampling error", "the least"),
        ({"kl_efficiency": None}, "nats from the base model (KL divergence).", "least"),
        ({"kl": None}, "Drawing 4", "It moved"),
        ({"length_change": fig(3.1, 1)}, "Answers are 3.1 tokens longer", "shorter"),
        ({"length_change": fig(-3.1, 1)}, "Answers are 3.1 tokens shorter", "longer"),
        ({"length_change": None}, "Drawing 4", "Answers are"),
        ({"length_controlled_win_rate": fig(0.7, 0.01)}, "part of the gain is in the length", "x:"),
        ({"win_rate_by": {}}, "No further reward was measured", "over-optimisation"),
        ({"win_rate_by": {"gold": fig(0.641, 0.01)}, "win_rate_loss_by": {}},
         "the gain shrinks by 50% there (best-of-4’s own shrinks by 1%)", "no sign"),
        ({"win_rate_by": {"gold": fig(0.76, 0.015)}, "win_rate_loss_by": {"gold": fig(0.02, 0.01)}},
         "the gain shrinks by", "no clear loss"),
        ({"win_rate": fig(0.85, 0.08), "win_rate_by": {"gold": fig(0.65, 0.13)},
          "win_rate_loss_by": {}}, "20.0 of 100 apart, which by the two intervals", "no sign"),
        ({"win_rate": fig(0.6, 0.11), "recovered": fig(0.26, 0.24)}, "not clear that", "none of"),
        ({"length_change": fig(30, 35)}, "no clear difference in length from", "as long as"),
        ({"tie_rate": fig(0.8, 0.02)}, "Ties count half: 80 of 100 pairs tie.", "x:"),
        ({"win_rate": fig(0.5), "tie_rate": fig(1.0)}, "every pair ties", "x:"),
        ({"judge": {"win_rate": fig(0.9, 0.1), "comparisons": 160, "unreadable": 150}},
         "on 10 pairs (150 of 160 had no readable verdict)", "160 times"),
        ({"judge": {"win_rate": None, "comparisons": 9, "unreadable": 9}},
         "asked about 9 pairs and gave no readable verdict", "it wins"),
        ({"kl": None, "kl_efficiency": None}, "KL divergence from the base model is not", "x:"),
        ({"win_rate_by": {"gold": fig(0.51, 0.02)}}, "no clear gain there", "no sign"),
        ({"win_rate_by": {"gold": fig(0.45, 0.02)}}, "is over-optimised", "no sign"),
        ({"win_rate": fig(0.45, 0.02), "win_rate_by": {"gold": fig(0.4, 0.02)}},
         "by that reward the model is worse than the base model.", "over-optimised"),
        ({"judge": None}, "Drawing 4", "judge"),
        ({"judge": {"win_rate": None, "comparisons": 0, "unreadable": 0}}, "Drawing 4", "judge"),
        ({"judge": {"win_rate": fig(0.52, 0.05), "comparisons": 90}},
         ": no clear difference", "x:"),
        ({"human_text": {"forgetting": fig(-0.001, 0.003)}}, "No forgetting shows", "knew"),
        ({"win_rate": {"value": float("nan"), "low": 0, "high": 1}}, "was not measured", "nan"),
    ],
)  # fmt: skip
def test_the_words_fit_the_figures(
    tmp_path: Path, changes: dict[str, Any], said: str, not_said: str
) -> None:
    text = " ".join(sentences(tmp_path, main_changed(**changes)))
    assert said in text
    assert not_said not in text
    assert "nan" not in text.lower().replace("finance", "")
    assert "None" not in text


def test_a_reward_with_nothing_to_choose_by(tmp_path: Path) -> None:
    values = evaluation()
    values["models"][f"best-of-{N}"]["win_rate"] = fig(0.501, 0.01)
    assert any("has little to choose by" in s for s in sentences(tmp_path, values))


def test_prompts_that_were_trained_on_are_a_caution(tmp_path: Path) -> None:
    assert sentences(tmp_path, evaluation(prompts_trained_on=12))[-1].startswith(
        "Caution: 12 of the 25 prompts were also trained on"
    )


def comparison(**changes: Any) -> dict[str, Any]:
    return evaluation(main=None, **changes)


@pytest.mark.parametrize(
    ("wins", "said"),
    [
        ([fig(0.6, 0.15), fig(0.58, 0.03)], "Clearly better than the base model: sft_bon."),
        ([fig(0.45, 0.03), fig(0.44, 0.09)], "no policy is clearly better"),
        ([fig(0.45, 0.03), fig(0.44, 0.02)], "every policy is worse"),
    ],
)
def test_a_ranking_claims_of_all_what_holds_of_all(
    tmp_path: Path, wins: list[dict[str, float]], said: str
) -> None:
    values = comparison()
    del values["models"][f"best-of-{N}"]
    for name, win in zip(("rank_regression", "sft_bon"), wins, strict=True):
        values["models"][name]["win_rate"] = win
    assert said in " ".join(sentences(tmp_path, values))


@pytest.mark.slow
def test_odd_names_and_many_of_them_draw_without_a_warning(tmp_path: Path) -> None:
    values = comparison()
    for index in range(30):
        values["models"][f"模型-{index}-with-a-rather-long-name"] = model_figures(0.6)
    folder = write_run(tmp_path, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_page(folder)


def test_odd_folders_open(tmp_path: Path) -> None:
    """A reward as a text, a log without steps, a metric that is called as our own figures."""
    folder = write_run(tmp_path, evaluation(reward="my reward"))
    log = folder / "model" / "training_log.json"
    record = json.loads(log.read_text())
    log.write_text(json.dumps(record | {"log": [{"loss": 1.0}, *record["log"]]}))
    write_page(folder)
    assert "my reward" in (folder / "report.html").read_text()
    group = group_of("p", "x", ["a"], rewards=(1.5,), metrics={"reward": (9.0,), "tokens": (7.0,)})
    assert _column(group, [0])[1] == [{"reward": 1.5, "tokens": 1.0}]


def test_a_comparison_ranks_the_policies(tmp_path: Path) -> None:
    said = sentences(tmp_path, comparison())
    assert said[0].startswith(f"Of 3 policies best-of-{N} wins most often: its answer is preferred")
    assert said[2].startswith(
        f"best-of-{N} draws {N} answers to give one; of those that draw once, rank_regression wins"
    )
    assert "overlap" in said[1]  # of best-of-n and the next no pair is given
    values = comparison()
    del values["models"][f"best-of-{N}"]
    assert "Its lead over the next, sft_bon, is 8.2 of 100 (95% interval +6.2 to" in " ".join(
        sentences(tmp_path, values)
    )
    pair = values["pairs"][0]
    swapped = {"ours": "sft_bon", "theirs": "rank_regression", "difference": fig(-0.01, 0.02)}
    values["pairs"] = [pair | swapped]
    assert "not clearly better than the next, sft_bon: its lead is 1.0 of 100" in " ".join(
        sentences(tmp_path, values)
    )


def test_a_comparison_of_policies_that_are_no_better(tmp_path: Path) -> None:
    values = comparison()
    values["models"] = {
        name: model | {"win_rate": fig(0.5 if name == "base" else 0.505, 0.01)}
        for name, model in values["models"].items()
    }
    assert "no policy is clearly better" in " ".join(sentences(tmp_path, values))
    values["models"] = {"base": values["models"]["base"]}
    assert sentences(tmp_path, values) == ["No policy was measured against the base model."]


def test_the_page_of_a_comparison(tmp_path: Path) -> None:
    values = comparison() | {"policies": ["runs/a", "base@best-of-2", "x=my model"]}
    values["models"]["best-of-2"] = model_figures(0.66, best_of=2)
    write_page(write_run(tmp_path, values))
    text = (tmp_path / "report.html").read_text()
    rows = Page(text).tables["The policies by win rate"]
    assert [row[0] for row in rows[1:]] == [
        f"best-of-{N}",
        "rank_regression",
        "sft_bon",
        "best-of-2",
    ]
    assert 'class="tile"' not in text
    command = "bonbon compare runs/a base@best-of-2 &#39;x=my model&#39; --config"
    assert command in text


# --- what may be missing --------------------------------------------------------------------------


@pytest.mark.slow
def test_an_older_evaluation_opens(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, older()))
    parsed = Page((tmp_path / "report.html").read_text())
    assert "In 78 of 100 comparisons" in parsed.text
    assert parsed.tables["All models against the base model, with 95% intervals"][0][1] == (
        "rank_regression"
    )
    assert "KL in nats by three estimators, which should agree" not in parsed.tables
    assert "None" not in parsed.text
    assert "nan" not in parsed.text


@pytest.mark.slow
def test_figures_alone_are_enough(tmp_path: Path) -> None:
    write_run(tmp_path, groups={})
    for path in ("config.yaml", "model/training_log.json", "baselines/sft_bon/training_log.json"):
        (tmp_path / path).unlink()
    write_report(tmp_path)
    parsed = Page((tmp_path / "report.html").read_text())
    assert "The completions are no longer in this folder." in parsed.text
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {f"win_rate_{x}.{kind}" for x in ("kl", "length") for kind in ("png", "svg")}


@pytest.mark.slow
def test_every_optional_key_may_be_null_or_missing(tmp_path: Path) -> None:
    values = evaluation()
    optional = [key for key in values if key not in ("n", "k", "models", "base_model")]
    for index, missing in enumerate((None, "gone")):
        changed = copy.deepcopy(values)
        for key in optional:
            changed[key] = None
            if missing == "gone":
                del changed[key]
        for model in changed["models"].values():
            for key in list(model):
                model[key] = None
                if missing == "gone":
                    del model[key]
        folder = write_run(tmp_path / str(index), changed)
        write_report(folder)
        assert "None" not in Page((folder / "report.html").read_text()).text


def test_a_model_that_answered_other_prompts_and_rewards_that_are_not_finite(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    base = draws(rng, ["a", "b"], N + K, 0.0)
    base[1] = base[1].with_rewards([math.nan] * (N + K))
    write_page(write_run(tmp_path, groups={"base": base, "rank_regression": base[1:]}))
    index, _ = embedded(tmp_path / "report.html")
    assert index["models"] == ["rank_regression"]
    changes = {entry["id"]: entry["changes"] for entry in index["prompts"]}
    assert changes == {"p0": {"rank_regression": None}, "p1": {"rank_regression": None}}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"models": 3}', '{"models": {"base": 1}}'])
def test_an_evaluation_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "evaluation.json").write_text(text)
    with pytest.raises(BonbonError, match=r"evaluation\.json"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_without_an_evaluation_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(BonbonError, match=r"holds no evaluation.*run `bonbon evaluate`"):
        write_report(tmp_path)


# --- the page as a file ---------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_for_nothing(html: str) -> None:
    parsed = Page(html)
    bare = re.sub(r'octet-stream" id="[^"]+">[^<]*', "", html)
    assert not re.search(r"https?://|[\"'(]//|@import|url\((?!#)", bare)
    for tag, attrs in parsed.tags:
        assert not attrs.keys() & {"src", "style", "onclick", "onload"}, tag
        if "href" in attrs:
            assert (attrs["href"] or "").startswith(("#", "data:,")), tag
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_ids_are_unique_and_references_lead_somewhere(html: str) -> None:
    parsed = Page(html)
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    refer = [a.get("href") or "" for tag, a in parsed.tags if tag in ("use", "a")]
    refer += [f"#{a['aria-labelledby']}" for _, a in parsed.tags if a.get("aria-labelledby")]
    refer += re.findall(r"url\((#[^)]+)\)", html)
    assert len(refer) > 50
    assert {name.removeprefix("#") for name in refer} <= set(ids)


def test_the_page_can_be_read_by_a_machine(html: str) -> None:
    parsed = Page(html)
    assert ("html", {"lang": "en"}) in parsed.tags
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    charts = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert len(charts) == 4
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert "rank_regression 78% at 1.46 nats" in (charts[0]["aria-label"] or "")
    assert html.count("The chart’s data") == 4


def test_charts_have_no_colour_of_their_own(html: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        assert not re.search(r"#[0-9a-fA-F]{6}|<style|<metadata|xmlns", svg)
    style = html[html.index("<style>") : html.index("</style>")]
    rules = style[style.index(".chart *") :]
    assert "var(--c1)" in rules
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b", rules)


def test_the_plots_are_saved_for_papers(folder: Path) -> None:
    for name in ("win_rate_kl", "win_rate_length", "reward_histogram", "training"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (folder / "plots" / f"{name}.svg").read_text()
        assert PAPER["c1"] in svg
        assert "var(" not in svg


@pytest.mark.slow
def test_a_report_is_the_same_when_written_again(folder: Path, html: str) -> None:
    write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == html


# --- colours --------------------------------------------------------------------------------------


def linear(colour: str) -> np.ndarray[Any, Any]:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    weights = np.array([0.2126, 0.7152, 0.0722])
    low, high = sorted(float(weights @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK, {**PAPER, "raised": "#ffffff"}])
def test_colours_have_contrast(theme: Mapping[str, str]) -> None:
    for ground in (theme["paper"], theme["raised"]):
        assert all(
            contrast(theme[name], ground) >= 3 or ground != theme["paper"] for name in DATA_COLOURS
        )
        assert contrast(theme["ink"], ground) >= 7
        assert contrast(theme["muted"], ground) >= 4.5
        assert contrast(theme["c1"], ground) >= 4.5  # links


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
_DEUTERANOPIA = [
    [0.367322, 0.860646, -0.227968],
    [0.280085, 0.672501, 0.047413],
    [-0.011820, 0.042940, 0.968881],
]
_PROTANOPIA = [
    [0.152286, 1.052583, -0.204868],
    [0.114503, 0.786281, 0.099216],
    [-0.003882, -0.048116, 1.051998],
]
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(rgb: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = _XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("seen", [np.eye(3), _DEUTERANOPIA, _PROTANOPIA])
def test_data_colours_are_told_apart(theme: Mapping[str, str], seen: Any) -> None:
    colours = [lab(np.asarray(seen) @ linear(theme[name])) for name in DATA_COLOURS]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 15  # ΔE; 2.3 is just noticed


def test_no_two_models_look_alike() -> None:
    assert len({mark(index) for index in range(35)}) == 35


# --- texts ----------------------------------------------------------------------------------------


def embedded(path: Path) -> tuple[dict[str, Any], list[dict[str, list[str]]]]:
    """The index and all texts of a page."""
    html = path.read_text(encoding="utf-8")
    found = re.findall(r'octet-stream" id="(index|block-\d+)">([^<]*)</script>', html)
    values = {name: json.loads(gzip.decompress(b64decode(data))) for name, data in found}
    blocks = [values[f"block-{i}"] for i in range(len(values) - 1)]
    return values["index"], [texts for block in blocks for texts in block]


def test_the_page_embeds_every_completion(folder: Path) -> None:
    from bonbon.groups.shards import read_groups

    index, texts = embedded(folder / "report.html")
    base = {g.prompt_id: g for g in read_groups(folder / "evaluation" / "base")}
    ours = {g.prompt_id: g for g in read_groups(folder / "evaluation" / "rank_regression")}
    assert index["models"] == ["rank_regression", "sft_bon"]
    assert sorted(entry["position"] for entry in index["prompts"]) == list(range(25))
    for entry, columns in zip(index["prompts"], texts, strict=True):
        group, aligned = base[entry["id"]], ours[entry["id"]]
        assert group.rewards is not None
        assert aligned.rewards is not None
        assert columns["base"] == list(group.completions[:K])
        assert columns["rank_regression"] == list(aligned.completions)
        best = K + int(np.argmax(group.rewards[K:]))
        assert columns[f"best-of-{N}"] == [group.completions[best]]
        figures = entry["figures"]["rank_regression"][1]
        assert figures["reward"] == pytest.approx(aligned.rewards[1], rel=1e-5)
        assert figures["gold"] == pytest.approx(aligned.metrics["gold"][1], rel=1e-5)
        change = np.mean(aligned.rewards[:K]) - np.mean(group.rewards[:K])
        assert entry["changes"]["rank_regression"] == pytest.approx(change, rel=1e-5)
    changes = [entry["changes"]["rank_regression"] for entry in index["prompts"]]
    assert changes == sorted(changes)  # regressions first


def test_a_policy_of_several_draws_shows_the_one_it_keeps(tmp_path: Path) -> None:
    values = comparison()
    values["models"]["best-of-2"] = model_figures(0.66, best_of=2)
    base = draws(np.random.default_rng(0), ["a"], N + K, 0.0)
    kept = group_of("p0", "a", ("one", "two", "three"), rewards=(1.0, 2.0, 9.0))
    write_page(write_run(tmp_path, values, groups={"base": base, "best-of-2": [kept]}))
    _, texts = embedded(tmp_path / "report.html")
    assert texts[0]["best-of-2"] == ["two"]


@pytest.mark.slow
def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    values = evaluation(base_model=HOSTILE[0], reward={"function": HOSTILE[4]})
    values["metrics"]["repetition"]["label"] = HOSTILE[1]
    hostile = HOSTILE[2].replace("/", "")
    values["models"][hostile] = model_figures(0.6)
    values["pairs"][0]["ours"] = HOSTILE[3]
    base = draws(np.random.default_rng(0), HOSTILE, N + K, 0.0)
    base = [
        group_of(g.prompt_id + HOSTILE[0], g.prompt, HOSTILE, rewards=range(len(HOSTILE)))
        for g in base
    ]
    write_report(write_run(tmp_path, values, groups={"base": base, "rank_regression": base}))
    parsed = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    kinds = [attrs.get("type") for tag, attrs in parsed.tags if tag == "script"]
    assert kinds == ["application/octet-stream", "application/octet-stream", None]
    assert parsed.scripts[-1] == (Path(browser.__file__).parent / "page.js").read_text()
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "b", "textarea")]
    assert "49" not in parsed.text.split("Model against model")[1][:200]
    for text in (HOSTILE[0], HOSTILE[1], hostile, HOSTILE[3], HOSTILE[4]):
        assert text in parsed.text
    _, texts = embedded(tmp_path / "report.html")
    assert all(tuple(columns["base"]) == HOSTILE[:K] for columns in texts)


@pytest.mark.slow
def test_names_that_utf8_cannot_hold_can_be_written(tmp_path: Path) -> None:
    values = main_changed()
    values["models"]["odd \ud800\x01 $name_"] = model_figures(0.6)
    write_report(write_run(tmp_path, values, groups={}))
    assert "odd ?" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "odd ?" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_lone_surrogates_survive_embedding() -> None:
    packed = browser.pack({"text": "\ud800 and \udfff </script>"})
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", packed)
    assert json.loads(gzip.decompress(b64decode(packed)))["text"] == "\ud800 and \udfff </script>"


def test_chat_prompts_keep_their_roles(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    base = draws(np.random.default_rng(0), [chat], N + K, 0.0)
    write_page(write_run(tmp_path, groups={"base": base, "rank_regression": base}))
    index, _ = embedded(tmp_path / "report.html")
    assert index["prompts"][0]["prompt"] == [["system", "Be kind."], ["user", "Hello"]]


# --- histograms -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_histograms_weigh_best_of_n_by_rank(tmp_path: Path) -> None:
    base = draws(np.random.default_rng(0), ["a"] * 1000, N + K, 0.0)
    run = read_run(write_run(tmp_path, groups={"base": base}))
    found = histograms(run)
    assert found is not None
    assert found.reference == ("base", f"best-of-{N}")
    assert all(shares.sum() == pytest.approx(1) for shares in found.shares.values())
    middles = (found.edges[1:] + found.edges[:-1]) / 2
    rewards = np.array([group.rewards for group in run.groups["base"]])
    width = found.edges[1] - found.edges[0]
    assert middles @ found.shares["base"] == pytest.approx(rewards.mean(), abs=width / 2)
    # The mean of the largest of 4 standard normal draws (order statistics tables).
    assert middles @ found.shares[f"best-of-{N}"] == pytest.approx(1.0294, abs=width / 2)


@pytest.mark.slow
def test_rewards_that_are_all_alike_can_be_drawn(tmp_path: Path) -> None:
    same = [group_of("p0", "a", ["x"] * (N + K), rewards=(1.0,) * (N + K))]
    write_report(write_run(tmp_path, groups={"base": same, "rank_regression": same}))
    assert (tmp_path / "plots" / "reward_histogram.png").exists()


# --- Markdown -------------------------------------------------------------------------------------


def markdown_tokens(text: str) -> list[Any]:
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)


@pytest.mark.slow
def test_the_markdown_says_the_same(folder: Path, html: str) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    plain = Page(rendered).text
    for sentence in headline(read_run(folder)):
        assert sentence in plain
        assert sentence in Page(html).text
    captions = [c for c in Page(html).tables if f"<strong>{c}</strong>" in rendered]
    assert rendered.count("<table>") == len(captions) == 11
    assert "78.2% (76.7 to 79.7)" in plain
    names = ("win_rate_kl", "win_rate_length", "reward_histogram", "training")
    images = re.findall(r'<img src="([^"]+)"', rendered)
    assert images == [f"plots/{name}.png" for name in names]
    assert all((folder / image).exists() for image in images)


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_any_text_as_itself(text: str) -> None:
    line = f"| a | b |\n|---|---|\n| {escape_markdown(text)} | end |\n"
    tokens = markdown_tokens(line)
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    children = cells[2].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    shown_text = "".join(child.content for child in children)
    assert shown_text == " ".join(text.replace("\0", "\ufffd").split())
    assert cells[3].content == "end"
