r"""Extractors: functions from a completion's text to its final answer, or None without one.

Numbers are normalised to one spelling, so that votes for the same number count together:
`1,234.50`, `$1234.5` and `1234.5%` are all `1234.5`, and `5.0` is `5`.
"""

from __future__ import annotations

import re
from decimal import Decimal

# Thousands grouped by commas, Indian grouping included (1,00,000), or by no-break spaces.
_GROUPED = r"\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d{1,3}(?:[\u00a0\u202f]\d{3})+(?!\d)"
_DIGITS = rf"(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<!\d)\.\d+"
_CURRENCY = "[$€£¥₹]?"
# After a word, a digit or a bracket a hyphen is not a sign: `10-3`, `x-3`.
_SIGN = r"(?:(?<![\w)\]}%])[-−+])?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})\\?{_CURRENCY}(?P<digits>{_DIGITS})(?P<power>[eE][-+]?\d{{1,3}}(?!\d))?"
)
# A text that is only a number, with or without a currency or per cent sign.
_WHOLE = re.compile(rf"\$?{_NUMBER.pattern}\s*(?:\\?%)?\$?\.?")


def last_number(text: str) -> str | None:
    """Return the last number in the text, without per cent sign, currency or grouping commas.

    Digits grouped by plain spaces, fractions and dates are read as several numbers, and the last
    counts; for such answers use `boxed`, `final_line` or a function of your own.
    """
    numbers = list(_NUMBER.finditer(text))
    return _spelt(numbers[-1]) if numbers else None


def boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}`, inner braces included, or None."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        end = _closing_brace(text, start)
        if end is not None:
            return _tidy(text[start:end])
    return None


def final_line(text: str) -> str | None:
    """Return the last line that is not empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    return _tidy(lines[-1]) if lines else None


def gsm8k(text: str) -> str | None:
    """Return the number after the last `####` on its line (GSM8K's format); None without one."""
    _, mark, behind = text.rpartition("####")
    number = _NUMBER.search(behind.partition("\n")[0]) if mark else None
    return None if number is None else _spelt(number)


def _closing_brace(text: str, start: int) -> int | None:
    """Return where the brace opened before `start` closes; `\\{` and `\\}` do not count."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return start + match.start()
    return None


def _tidy(text: str) -> str | None:
    """Return the text without surrounding spaces, normalised if it is a number."""
    text = text.strip()
    number = _WHOLE.fullmatch(text)
    return (_spelt(number) if number else text) or None


def _spelt(number: re.Match[str]) -> str:
    """Return a number without leading or trailing zeros, grouping commas or exponent."""
    digits = re.sub("[,\u00a0\u202f]", "", number["digits"])
    value = Decimal(digits + (number["power"] or ""))
    text = format(value, "f")  # exact, however many digits
    text = text.rstrip("0").rstrip(".") if "." in text else text
    negative = number["sign"] in ("-", "−") and value != 0
    return f"-{text}" if negative else text
