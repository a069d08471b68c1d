"""Colours of charts and page, and conversion of a chart's SVG: its colours become CSS variables.

Charts are drawn with the colours of `PAPER`; the page replaces them by those of `LIGHT` or `DARK`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

# Distinguishable under deuteranopia and protanopia, with a contrast of 3 or more.
DATA_COLOURS = ("c1", "c2", "c3", "c4", "c5")
PAPER: Mapping[str, str] = {
    "paper": "#ffffff",
    "ink": "#1a1a1a",
    "muted": "#5c5c5c",
    "grid": "#dedede",
    "c1": "#0b4f9e",
    "c2": "#a23b0a",
    "c3": "#17916b",
    "c4": "#d44aa8",
    "c5": "#b5860c",
}
LIGHT: Mapping[str, str] = {**PAPER, "paper": "#fdfdfb", "raised": "#f4f4f0"}
DARK: Mapping[str, str] = {
    "paper": "#15171a",
    "raised": "#1f2226",
    "ink": "#ececec",
    "muted": "#a8a8a8",
    "grid": "#3a3d42",
    "c1": "#5aa9f0",
    "c2": "#d9692a",
    "c3": "#25d695",
    "c4": "#cf4fa5",
    "c5": "#f4cf45",
}
_MARKERS = "oD^sPvX"


def mark(index: int) -> tuple[str, str]:
    """Return the colour and marker of the index-th model; the first 35 all differ."""
    colour = PAPER[DATA_COLOURS[index % len(DATA_COLOURS)]]
    return colour, _MARKERS[index % len(_MARKERS)]


def variables() -> str:
    """Return the CSS that defines every colour for light and dark."""

    def block(colours: Mapping[str, str]) -> str:
        return "{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"

    return (
        f":root{block(LIGHT)}\n@media (prefers-color-scheme: dark) {{:root{block(DARK)}}}\n"
        f"@media print {{:root{block({**LIGHT, 'paper': '#ffffff'})}}}\n"
    )


class SvgStyles:
    """Converts SVGs for a page, and collects their styles as classes of one style sheet.

    The page's content security policy forbids inline style attributes, and a <style> inside an SVG
    would apply to the whole page.
    """

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}

    def css(self) -> str:
        """Return the style sheet of all SVGs converted so far."""
        rules = [f".{name}{{{style}}}" for style, name in self._classes.items()]
        return ".chart *{stroke-linejoin:round;stroke-linecap:butt}\n" + "\n".join(rules) + "\n"

    def inline(self, svg: str, prefix: str, label: str) -> str:
        """Return matplotlib's SVG as an HTML element; `label` is for screen readers."""
        root = ElementTree.fromstring(svg)
        for parent in list(root.iter()):
            for child in list(parent):
                if _local(child.tag) in ("metadata", "style"):
                    parent.remove(child)
        for element in root.iter():
            element.tag = _local(element.tag)
            element.attrib = dict(self._attributes(element.attrib, prefix))
        box = root.attrib["viewBox"]
        root.attrib = {"viewBox": box, "class": "chart", "role": "img", "aria-label": label}
        return ElementTree.tostring(root, encoding="unicode")

    def _attributes(self, attributes: Mapping[str, str], prefix: str) -> Iterator[tuple[str, str]]:
        for name, value in attributes.items():
            key = _local(name)
            if key == "style":
                yield "class", self._class(value)
            elif key == "id":
                yield key, f"{prefix}-{value}"
            elif key == "href":
                yield key, value.replace("#", f"#{prefix}-")
            else:
                yield key, re.sub(r"url\(#", f"url(#{prefix}-", value)

    def _class(self, style: str) -> str:
        style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)
        style = re.sub(r"font-family:[^;]*;?", "", style)
        for name, colour in PAPER.items():
            style = style.replace(colour, f"var(--{name})")
        return self._classes.setdefault(style.strip(), f"g{len(self._classes)}")


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]
