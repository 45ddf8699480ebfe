"""Heat maps of masks: the share kept by layer and component, and of the attention's matrices by layer and head."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebert._html import Html, tag
from sparsebert.patterns import Matrix

__all__ = ["SHADES", "Kept", "head_maps", "kept_of", "layer_map", "mean_of"]

SHADES = 10
"""Classes `h0` (least) to `h9` of the style sheet."""

# A map whose shares differ by less is shown as even: noise is no pattern.
_LEAST_SPAN = 0.02
_CELL = 18


@dataclass(frozen=True)
class Kept:
    """Shares kept by masks."""

    components: dict[tuple[int | None, str], float]
    """By layer (None: outside the layers) and component."""
    heads: dict[str, dict[int, list[float]]]
    """By component of the attention and layer: one a head."""


def kept_of(masks: Mapping[str, Tensor], matrices: Mapping[str, Matrix]) -> Kept:
    """Shares kept.

    Args:
        masks: module name to bool mask `[N, K]`, True where kept.
        matrices: what the names mean.
    """
    components: dict[tuple[int | None, str], float] = {}
    heads: dict[str, dict[int, list[float]]] = {}
    for name, mask in masks.items():
        matrix = matrices[name]
        components[matrix.layer, matrix.component] = int(mask.sum()) / max(mask.numel(), 1)
        if matrix.heads and matrix.layer is not None:
            heads.setdefault(matrix.component, {})[matrix.layer] = _by_head(mask, matrix)
    return Kept(components, heads)


def mean_of(found: Sequence[Kept]) -> Kept:
    """The mean of several runs' shares, of what all of them have."""
    first = found[0]
    components = {
        key: statistics.mean(kept.components[key] for kept in found)
        for key in first.components
        if all(key in kept.components for kept in found)
    }
    heads: dict[str, dict[int, list[float]]] = {}
    for component, layers in first.heads.items():
        for layer, shares in layers.items():
            same = [kept.heads.get(component, {}).get(layer, []) for kept in found]
            if all(len(other) == len(shares) for other in same):
                heads.setdefault(component, {})[layer] = [statistics.mean(of) for of in zip(*same, strict=True)]
    return Kept(components, heads)


def layer_map(kept: Kept, caption: str) -> Html:
    """A table: a row a layer, a column a component, shaded cells."""
    inner = {key: share for key, share in kept.components.items() if key[0] is not None}
    shade = _Shade(kept.components.values())
    columns = list(dict.fromkeys(component for _, component in inner))
    heads = ["layer", *map(_name, columns)] if columns else ["part", "kept"]
    head = tag("tr", *(tag("th", name, scope="col") for name in heads))
    body = []
    for layer in sorted({layer for layer, _ in inner if layer is not None}):
        cells = [_cell(inner.get((layer, component)), shade) for component in columns]
        body.append(tag("tr", tag("th", layer + 1, scope="row"), *cells))
    for (outside, component), share in kept.components.items():
        if outside is None:
            row = tag("th", _name(component), scope="row", colspan=len(columns) or None)
            body.append(tag("tr", row, _cell(share, shade)))
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body), class_="heat")
    return tag("div", table, shade.key(), class_="scroll", tabindex=0, role="region", aria_label=caption)


def head_maps(kept: Kept, caption: str) -> Html | None:
    """A small map for each of the attention's matrices: a row a layer, a column a head. None where there are none."""
    if not kept.heads:
        return None
    shares = [share for layers in kept.heads.values() for line in layers.values() for share in line]
    shade = _Shade(shares)
    maps = [_head_map(_name(component), layers, shade) for component, layers in kept.heads.items()]
    return tag("figure", tag("figcaption", caption), tag("div", *maps, class_="maps"), shade.key())


def _head_map(name: str, layers: Mapping[int, Sequence[float]], shade: _Shade) -> Html:
    columns, rows = max(map(len, layers.values())), sorted(layers)
    width, height = 24 + columns * _CELL, 20 + len(rows) * _CELL
    parts = [tag("text", head + 1, x=24 + (head + 0.5) * _CELL, y=14, text_anchor="middle") for head in range(columns)]
    for row, layer in enumerate(rows):
        parts.append(tag("text", layer + 1, x=19, y=33 + row * _CELL, text_anchor="end"))
        for head, share in enumerate(layers[layer]):
            title = tag("title", f"layer {layer + 1}, head {head + 1}: {share:.1%}")
            place = {"x": 24 + head * _CELL, "y": 20 + row * _CELL, "width": _CELL - 1, "height": _CELL - 1}
            parts.append(tag("rect", title, class_=shade(share), **place))
    worst = [(share, layer, head) for layer, line in layers.items() for head, share in enumerate(line)]
    low, high = min(worst), max(worst)
    label = (
        f"{name}: share kept by layer (rows) and head (columns); least {low[0]:.1%} in layer {low[1] + 1}, head "
        f"{low[2] + 1}; most {high[0]:.1%} in layer {high[1] + 1}, head {high[2] + 1}"
    )
    style = f"max-width:{width * 1.4:.0f}px"
    svg = tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, style=style)
    return tag("div", tag("p", name, class_="name"), svg)


class _Shade:
    """From shares to classes of the style sheet, from the least to the most of one map."""

    def __init__(self, shares: Iterable[float]) -> None:
        known = list(shares)
        self.low, self.high = min(known, default=0.0), max(known, default=1.0)

    def __call__(self, share: float) -> str:
        span = self.high - self.low
        if span < _LEAST_SPAN:
            return f"h{SHADES // 2 - 1}"
        return f"h{min(SHADES - 1, int(SHADES * (share - self.low) / span))}"

    def key(self) -> Html:
        """What the shades mean."""
        if self.high - self.low < _LEAST_SPAN:
            return tag("p", f"kept: {self.low:.1%} to {self.high:.1%}, which is even", class_="key")
        steps = (tag("i", class_=f"h{index}") for index in range(SHADES))
        return tag(
            "p", f"kept: {self.low:.1%} ", tag("span", *steps, aria_hidden="true"), f" {self.high:.1%}", class_="key"
        )


def _by_head(mask: Tensor, matrix: Matrix) -> list[float]:
    """Query, key and value have a head's units in their rows, the attention's output in its columns."""
    heads, (rows, columns) = matrix.heads, mask.shape
    if matrix.component == "attention_output":
        counts = mask.sum(0).view(heads, columns // heads).sum(1)
    else:
        counts = mask.sum(1).view(heads, rows // heads).sum(1)
    shares = counts.to(torch.float64) * heads / mask.numel()
    return [float(share) for share in shares]


def _cell(share: float | None, shade: _Shade) -> Html:
    return tag("td") if share is None else tag("td", f"{100 * share:.1f}", class_=shade(share))


def _name(component: str) -> str:
    return component.replace("_", " ")
