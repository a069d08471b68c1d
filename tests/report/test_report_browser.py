"""The report's page in headless Chromium: what its script does, and what it must never do."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bonbon.groups.group import Group, Groups
from bonbon.report import browser, data, write_report
from support.groups import group_of
from support.reports import HOSTILE, K, N, draws, evaluation, write_page, write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)
PROMPTS = 45


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.chrome.service.Service(DRIVER)
    chrome = webdriver.Chrome(options=options, service=service)
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with charts, two models and 45 prompts."""
    return write_report(write_run(tmp_path_factory.mktemp("run"), prompts=PROMPTS))


class Opened:
    """A page that was opened, with what the tests do on it."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver = driver
        driver.get_log("browser")
        driver.get(path.as_uri())
        self.until(lambda: self.count() not in ("", "loading…"))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, f"waited in vain; the count says {self.count()!r}"
            time.sleep(0.02)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def count(self) -> str:
        return self.js("return document.getElementById('count').textContent")

    def ids(self) -> list[str]:
        return self.js(
            "return [...document.querySelectorAll('article h3')].map(e => e.textContent)"
        )

    def choose(self, control: str, value: str) -> None:
        """Set a select or checkbox or text field as a user does, and wait for the new list."""
        before = self.js("return document.querySelector('article')")
        self.js(
            "const e = document.getElementById(arguments[0]);"
            "if (e.type === 'checkbox') e.checked = arguments[1] === 'on';"
            "else e.value = arguments[1];"
            "e.dispatchEvent(new Event(e.type === 'search' ? 'input' : 'change'))",
            control,
            value,
        )
        self.until(
            lambda: (
                self.js("return document.querySelector('article')") != before
                and self.count().startswith("showing")
            )
        )

    def column(self, card: int, column: int, part: str = ".text") -> str:
        return self.js(
            "return document.querySelectorAll('article')[arguments[0]]"
            ".querySelectorAll('.column')[arguments[1]].querySelector(arguments[2]).textContent",
            card,
            column,
            part,
        )

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def page(driver: Any, path: Path) -> Iterator[Opened]:
    opened = Opened(driver, path)
    yield opened
    assert opened.errors() == []


def expected_order(sign: int, name: str = "rank_regression") -> list[str]:
    """Ids by reward change, from the same seed as the page's run."""
    rng = np.random.default_rng(0)
    texts = [f"Prompt number {i}" for i in range(PROMPTS)]
    base = draws(rng, texts, K + N, 0.0)
    models = {
        model: draws(rng, texts, K, shift)
        for model, shift in (("sft_bon", -1.0), ("rank_regression", 1.0))
    }
    change = {
        ours.prompt_id: np.mean(ours.rewards) - np.mean(theirs.rewards[:K])
        for ours, theirs in zip(models[name], base, strict=True)
    }
    return sorted(change, key=lambda prompt: sign * change[prompt])


def test_regressions_come_first_and_other_orders_can_be_chosen(page: Opened) -> None:
    assert page.count() == "showing 20 of 45"
    assert page.ids() == expected_order(+1)[:20]
    page.choose("order", "improvements")
    assert page.ids() == expected_order(-1)[:20]
    page.choose("order", "data")
    assert page.ids() == [f"p{i}" for i in range(20)]


def test_another_model_has_its_own_order_and_texts(page: Opened) -> None:
    page.choose("model", "sft_bon")
    assert page.ids() == expected_order(+1, "sft_bon")[:20]
    assert [page.column(0, i, "h4") for i in range(3)] == ["base model", f"best-of-{N}", "sft_bon"]


def test_more_are_shown_a_page_at_a_time(page: Opened) -> None:
    for shown in (40, 45):
        page.js("document.getElementById('more').click()")
        page.until(lambda shown=shown: page.count() == f"showing {shown} of 45")
        # The focus goes to the first of the new ones.
        page.until(lambda: page.js("return document.activeElement.tagName") == "H3")
    assert page.ids() == expected_order(+1)
    assert page.js("return document.getElementById('more').hidden")


def test_the_filter_finds_prompts_and_completions(page: Opened) -> None:
    page.choose("filter", "NUMBER 17")
    assert page.ids() == ["p17"]
    assert page.count() == "showing 1 of 1 that match, of 45"
    page.choose("filter", "prompt number 4")
    assert set(page.ids()) == {"p4", "p40", "p41", "p42", "p43", "p44"}
    page.js("document.getElementById('filter').value = 'draw 1 of 7:'")
    page.choose("everywhere", "on")
    assert page.ids() == ["p7"]
    page.choose("filter", "")
    assert page.count() == "showing 20 of 45"
    page.js(
        "const e = document.getElementById('filter'); e.value = '(no [such .* text';"
        "e.dispatchEvent(new Event('input'))"
    )
    page.until(lambda: page.count() == "showing 0 of 0 that match, of 45")


def test_draws_are_flipped_through(page: Opened) -> None:
    first = page.ids()[0].removeprefix("p")
    best = page.column(0, 1)
    for draw in (0, 1, 2, 0):
        for column in (0, 2):
            assert page.column(0, column).startswith(f"draw {draw} of {first}:")
            assert f"draw {draw + 1} of 3 · reward " in page.column(0, column, ".meta")
            assert "gold" in page.column(0, column, ".meta")
        assert page.column(0, 1) == best
        page.js("document.querySelector('article button.next').click()")
    page.js("document.querySelector('article button.previous').click()")
    assert page.js("return document.querySelector('article output').textContent") == "draw 1 of 3"


def test_every_control_is_reached_and_worked_by_the_keyboard(page: Opened) -> None:
    keys = webdriver.common.keys.Keys
    active = page.driver.switch_to
    page.js("document.getElementById('filter').focus()")
    reached = []
    for _ in range(7):
        reached.append(
            page.js("const e = document.activeElement; return e.id || e.className || e.tagName")
        )
        active.active_element.send_keys(keys.TAB)
    assert reached == ["filter", "everywhere", "order", "model", "previous", "next", "previous"]
    page.js("document.querySelector('article button.next').focus()")
    active.active_element.send_keys(keys.ENTER)
    assert page.js("return document.querySelector('article output').textContent") == "draw 2 of 3"
    assert page.js("return document.activeElement.className") == "next"  # the focus stays
    unnamed = page.js(
        "return [...document.querySelectorAll('button, input, select')]"
        ".filter(e => !(e.ariaLabel || e.labels?.length || e.textContent)).length"
    )
    assert unnamed == 0


WIDTHS = (390, 320)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_phone_need_not_scroll_sideways(driver: Any, path: Path, width: int) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Opened(driver, path)
        assert page.js("return innerWidth") == width
        page.js("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert page.js("return document.documentElement.scrollWidth") <= width
        small = page.js(
            "return [...document.querySelectorAll('button, select, input, summary')]"
            ".filter(e => e.offsetParent && e.type !== 'checkbox' && e.offsetHeight < 40)"
            ".map(e => e.outerHTML)"
        )
        assert small == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_printing_leaves_the_controls_out(page: Opened) -> None:
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        visible = page.js(
            "return [...document.querySelectorAll('button, input, select, summary')]"
            ".filter(e => e.offsetParent).length"
        )
        assert visible == 0
        assert page.js("return document.querySelectorAll('article').length") == 20
        assert page.js("return getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_colours_follow_the_scheme(page: Opened) -> None:
    seen = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        seen.append(
            page.js(
                "const of = (e) => getComputedStyle(e);"
                "const text = document.querySelector('svg.chart text');"
                "return [of(document.body).backgroundColor, of(text).fill, of(text).fontFamily]"
            )
        )
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    light, dark = seen
    assert light[:2] == ["rgb(253, 253, 251)", "rgb(26, 26, 26)"]
    assert dark[:2] == ["rgb(21, 23, 26)", "rgb(236, 236, 236)"]
    assert "system-ui" in light[2]


# --- hostile texts --------------------------------------------------------------------------------

TEXTS = (*HOSTILE, "x" * 100_000, "", "\ud800 lone \udfff", "tail \ud83d\ude00", "   \n\n indented")


def hostile_groups() -> list[Group]:
    """A prompt for each text, in the prompt and in every completion."""
    return [
        group_of(f"h{i}{text[:30]}", text, (text,) * (K + N), rewards=tuple(range(K + N)))
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture
def hostile(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    # Parquet cannot hold lone surrogates, so the groups are put in where they are read.
    made = Groups(hostile_groups())
    write_run(tmp_path, evaluation(), prompts=1)
    monkeypatch.setattr(data, "read_groups", lambda folder: made)
    opened = Opened(driver, write_page(tmp_path))
    yield opened
    assert opened.errors() == []


def shown(page: Opened, texts: Sequence[str], cut: int = 1200) -> None:
    """The i-th prompt and all its completions read as texts[i]."""
    found = page.js(
        "return [...document.querySelectorAll('article')].map(a =>"
        " [...a.querySelectorAll('.text')].map(t => t.textContent.toWellFormed()))"
    )
    for text, blocks in zip(texts, found, strict=True):
        assert len(blocks) == 4
        for block in blocks:
            want = text[:cut] + "…" if len(text) > cut else text or "empty"
            assert block == written(want)


def written(text: str) -> str:
    """Direction marks, controls and line separators as their code points; lone halves as �."""
    hidden = set("\u202e\u202c\u200f\u200e\u2028\0\x1b")
    marked = "".join(f"U+{ord(c):04X}" if c in hidden else c for c in text)
    return marked.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def test_hostile_texts_are_shown_and_run_nothing(hostile: Opened) -> None:
    hostile.choose("order", "data")
    title = hostile.js("return document.title")
    shown(hostile, TEXTS)
    assert title == "story aligned by rank_regression"
    inside = hostile.js(
        "return [...new Set([...document.querySelectorAll('#prompts *')].map(e => e.tagName))]"
    )
    allowed = {"ARTICLE", "DIV", "H3", "BDI", "P", "BUTTON", "OUTPUT", "SECTION", "H4", "SPAN", "I"}
    assert set(inside) <= allowed
    assert hostile.js("return document.scripts.length") == 3
    isolated = hostile.js(
        "return [...document.querySelectorAll('.text')].every(e =>"
        " e.dir === 'auto' && getComputedStyle(e).unicodeBidi === 'isolate' &&"
        " getComputedStyle(e).whiteSpace.startsWith('pre-wrap'))"
    )
    assert isolated
    assert hostile.js("return document.documentElement.scrollWidth <= innerWidth")


def test_a_long_completion_is_shown_whole_when_asked(hostile: Opened) -> None:
    hostile.choose("filter", "xxxxx")
    assert hostile.js("return document.querySelectorAll('article').length") == 1
    button = "document.querySelector('.column .show-all')"
    assert hostile.js(f"return {button}.textContent") == "show all (100,000 characters)"
    hostile.js(f"{button}.click()")
    assert hostile.column(0, 0) == "x" * 100_000
    assert hostile.js("return document.activeElement.className") == "text"
    assert hostile.js("return document.documentElement.scrollWidth <= innerWidth")


def test_a_cut_does_not_halve_a_character(driver: Any, tmp_path: Path) -> None:
    text = "a" * 1199 + "\U0001f600" * 20
    groups = [group_of("p0", "q", (text,) * (K + N), rewards=(0.0,) * (K + N))]
    write_run(tmp_path, groups={"base": groups, "rank_regression": groups})
    page = Opened(driver, write_page(tmp_path))
    assert page.column(0, 0) == "a" * 1199 + "…"


def test_the_policy_holds_scripts_off(page: Opened) -> None:
    page.js(
        "const s = document.createElement('div');"
        "s.innerHTML = '<img src=x onerror=\"window.owned = 1\">';"
        "const t = document.createElement('script');"
        "t.textContent = 'window.owned = 1';"
        "document.body.append(s, t)"
    )
    time.sleep(0.2)
    assert page.js("return window.owned") is None
    assert page.errors() != []  # each refusal is reported


def test_a_browser_without_decompression_is_told(driver: Any, path: Path) -> None:
    script = {"source": "delete window.DecompressionStream"}
    added = driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        page = Opened(driver, path)
        assert page.count().startswith("The completions cannot be shown: this browser is too old")
    finally:
        driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_model_without_a_prompt_says_so(driver: Any, tmp_path: Path) -> None:
    base = draws(np.random.default_rng(0), ["a", "b"], N + K, 0.0)
    write_run(tmp_path, groups={"base": base, "rank_regression": base[1:]})
    page = Opened(driver, write_page(tmp_path))
    assert page.ids() == ["p1", "p0"]  # what is unknown comes last
    assert page.column(1, 2, ".meta") == "no completion of this prompt"
    assert page.js("return document.querySelectorAll('.change')[1].textContent") == (
        "reward change –"
    )
    assert browser.BLOCK > 2
