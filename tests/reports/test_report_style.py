"""The style sheet: enough contrast for everything that is read, on a light and on a dark page."""

from __future__ import annotations

import re

import pytest

from sparsebert.reports.html.heatmap import SHADES
from sparsebert.reports.html.plots import COLOURS
from sparsebert.reports.html.style import STYLE


def themes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root\{([^}]+)\}", STYLE)[:2]
    return {
        name: dict(re.findall(r"--(\w[\w-]*):(#[0-9a-f]+)", text)) for name, text in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    """WCAG AA: 4.5 for text; lines of plots keep to it too."""
    colours = themes()[theme]
    pairs = [(name, ground) for name in ("ink", "soft", "link") for ground in ("page", "card")]
    pairs += [(f"c{at}", ground) for at in range(COLOURS) for ground in ("page", "card")]
    pairs += [(f"i{at}", f"h{at}") for at in range(SHADES)]
    pairs += [("bad", "bad-ground"), ("ink", "bad-ground")]
    for text, ground in pairs:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, contrast(colours[text], colours[ground]))


def test_contrast_itself() -> None:
    assert contrast("#000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )
