"""Heat maps: the shares in them, by layer, component and head."""

from __future__ import annotations

import pytest
import torch
from reports.pages import Page

from sparsebert.patterns import Matrix
from sparsebert.reports.html.heatmap import SHADES, Kept, head_maps, kept_of, layer_map, mean_of

MATRICES = {
    "q": Matrix("q", (8, 6), "query", 0, 2),
    "o": Matrix("o", (6, 8), "attention_output", 0, 2),
    "f": Matrix("f", (4, 8), "ffn_in", 1),
    "e": Matrix("e", (5, 8), "word_embeddings"),
}


def masks(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(matrix.shape, generator=generator) < 0.6 for name, matrix in MATRICES.items()}


def test_shares_by_component_and_by_head() -> None:
    own = masks(0)
    kept = kept_of(own, MATRICES)
    assert kept.components[0, "query"] == pytest.approx(float(own["q"].float().mean()))
    assert kept.components[None, "word_embeddings"] == pytest.approx(float(own["e"].float().mean()))
    # A head's units are rows of the query, but columns of the attention's output.
    assert kept.heads["query"][0] == pytest.approx([float(own["q"][i : i + 4].float().mean()) for i in (0, 4)])
    columns = [float(own["o"][:, i : i + 4].float().mean()) for i in (0, 4)]
    assert kept.heads["attention_output"][0] == pytest.approx(columns)
    assert set(kept.heads) == {"query", "attention_output"}


def test_the_mean_of_seeds() -> None:
    first, second = kept_of(masks(0), MATRICES), kept_of(masks(1), MATRICES)
    mean = mean_of([first, second])
    for key, share in mean.components.items():
        assert share == pytest.approx((first.components[key] + second.components[key]) / 2)
    assert mean.heads["query"][0][1] == pytest.approx((first.heads["query"][0][1] + second.heads["query"][0][1]) / 2)
    # Of what only one of them has, there is no mean.
    assert mean_of([first, Kept({}, {})]) == Kept({}, {})


def test_the_table_has_every_share_and_the_extremes_the_extreme_shades() -> None:
    kept = Kept({(0, "query"): 0.1, (0, "key"): 0.5, (1, "query"): 0.3, (None, "pooler"): 0.9}, {})
    text = layer_map(kept, "kept")
    shown = Page(f"<html>{text}</html>")
    assert shown.rows == [["layer", "query", "key"], ["1", "10.0", "50.0"], ["2", "30.0", ""], ["pooler", "90.0"]]
    assert '<td class="h0">10.0</td>' in text and f'<td class="h{SHADES - 1}">90.0</td>' in text
    assert head_maps(kept, "heads") is None


def test_noise_is_not_shown_as_a_pattern() -> None:
    text = layer_map(Kept({(0, "query"): 0.5, (0, "key"): 0.501}, {}), "kept")
    assert "which is even" in text and 'class="h0"' not in text and text.count('<td class="h4">') == 2


def test_only_embeddings_masked() -> None:
    shown = Page(f"<html>{layer_map(Kept({(None, 'word_embeddings'): 0.25}, {}), 'kept')}</html>")
    assert shown.rows == [["part", "kept"], ["word embeddings", "25.0"]]


def test_the_maps_of_heads_say_where_most_and_least_is_kept() -> None:
    kept = Kept({}, {"query": {0: [0.1, 0.2, 0.9], 1: [0.4, 0.5, 0.6]}})
    figure = head_maps(kept, "heads")
    assert figure is not None
    shown = Page(f"<html>{figure}</html>")
    assert "least 10.0% in layer 1, head 1; most 90.0% in layer 1, head 3" in shown.pictures[0]
    assert "layer 2, head 3: 60.0%" in shown.tooltips and len(shown.tooltips) == 6
