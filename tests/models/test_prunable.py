"""Which matrices are prunable, and the shares that a report gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sparsebert.errors import UserError
from sparsebert.models.prunable import MASKED, prunable_matrices, sparsity_report
from sparsebert.patterns.matrix import COMPONENTS

LAYER = ["query", "key", "value", "attention_output", "ffn_in", "ffn_out"]


def test_encoder_is_six_linears_a_layer_in_order(tiny: Any, kind: str) -> None:
    base = tiny.base(kind)
    matrices = prunable_matrices(base)
    assert [matrix.component for matrix in matrices] == LAYER * 2
    assert [matrix.layer for matrix in matrices] == [0] * 6 + [1] * 6
    assert [matrix.shape for matrix in matrices[:6]] == [(8, 8)] * 4 + [(12, 8), (8, 12)]
    assert [matrix.heads for matrix in matrices[:6]] == [2, 2, 2, 2, 0, 0]
    for matrix in matrices:
        assert isinstance(base.get_submodule(matrix.name), nn.Linear)


def test_matrices_are_in_the_order_they_run(tiny: Any, kind: str) -> None:
    base = tiny.base(kind)
    words = ("embeddings", "encoder") if kind == "distilbert" else ("pooler", "encoder", "embeddings")
    names = [matrix.name for matrix in prunable_matrices(base, words)]
    ran: list[str] = []
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    base(input_ids=torch.tensor([[2, 5, 3]]))
    # Every linear and every table of these models is prunable; the tables' own order is ours.
    tables = [name for name in names if name.startswith("embeddings.")]
    assert names == tables + [name for name in ran if name not in tables]
    assert sorted(tables) == sorted(name for name in ran if name.startswith("embeddings."))
    assert all(matrix.component in COMPONENTS for matrix in prunable_matrices(base, words))


def test_each_word(tiny: Any) -> None:
    base = tiny.base("bert")
    shapes = {
        "pooler": [(8, 8)],
        "word_embeddings": [(20, 8)],
        "position_embeddings": [(14, 8)],
        "token_type_embeddings": [(2, 8)],
        "embeddings": [(20, 8), (14, 8), (2, 8)],
    }
    for word, expected in shapes.items():
        matrices = prunable_matrices(base, (word,))
        assert [matrix.shape for matrix in matrices] == expected
        assert all(matrix.layer is None and matrix.heads == 0 for matrix in matrices)
    everything = prunable_matrices(base, MASKED)
    assert len(everything) == 16 == len({matrix.name for matrix in everything})


def test_embeddings_takes_the_tables_that_exist(tiny: Any) -> None:
    assert [m.component for m in prunable_matrices(tiny.base("distilbert"), ("embeddings",))] == [
        "word_embeddings",
        "position_embeddings",
    ]


@pytest.mark.parametrize(
    ("kind", "word"), [("distilbert", "token_type_embeddings"), ("distilbert", "pooler"), ("bert", "pooler")]
)
def test_what_the_model_lacks_is_an_error_by_name(tiny: Any, kind: str, word: str) -> None:
    base = tiny.base(kind)
    if kind == "bert":
        base.pooler = None
    with pytest.raises(UserError, match=f"'{word}'.*{kind}"):
        prunable_matrices(base, ("encoder", word))


def test_unknown_and_missing_words(tiny: Any) -> None:
    with pytest.raises(UserError, match=r"'encodr'; did you mean 'encoder'\?.*known: embeddings"):
        prunable_matrices(tiny.base(), ("encodr",))
    with pytest.raises(UserError, match="at least one"):
        prunable_matrices(tiny.base(), ())
    assert prunable_matrices(tiny.base(), "pooler")[0].name == "pooler.dense"  # type: ignore[arg-type]


def test_another_kind_of_model(tiny: Any) -> None:
    base = tiny.base()
    base.config.model_type = "gpt2"
    with pytest.raises(UserError, match="gpt2"):
        prunable_matrices(base)


def test_report_by_hand(tiny: Any) -> None:
    base = tiny.base("bert")
    query = torch.ones(8, 8, dtype=torch.bool)
    query[0] = False
    words = torch.ones(20, 8, dtype=torch.bool)
    words[:, :3] = False
    out = torch.zeros(8, 12, dtype=torch.bool)
    report = sparsity_report(
        base,
        {
            "encoder.layer.0.attention.self.query": query,
            "encoder.layer.1.output.dense": out,
            "embeddings.word_embeddings": words,
        },
    )
    layer = 4 * 64 + 2 * 96
    parameters = sum(parameter.numel() for parameter in base.parameters())
    assert report == {
        "model": (8 + 96 + 60) / parameters,
        "encoder": (8 + 96) / (2 * layer),
        "masked": (8 + 96 + 60) / (64 + 96 + 160),
        "by_component": {"word_embeddings": 60 / 160, "query": 8 / 64, "ffn_out": 1.0},
        "by_layer": [8 / layer, 96 / layer],
        "pruned": 164,
        "parameters": parameters,
        "mask_bytes": 8 + 12 + 20,
    }


def test_report_rounds_each_mask_up_to_bytes_and_leaves_out_training_state(tiny: Any) -> None:
    base = tiny.base("roberta")
    parameters = sum(parameter.numel() for parameter in base.parameters())
    linear = base.encoder.layer[0].output.dense
    linear.scores = nn.Parameter(torch.zeros(8, 12))
    report = sparsity_report(base, {"embeddings.token_type_embeddings": torch.zeros(1, 8, dtype=torch.bool)})
    assert report["mask_bytes"] == 1
    assert report["parameters"] == parameters
    assert sparsity_report(base, {})["masked"] == 0.0


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("encoder.layer.0.output.dense", torch.ones(12, 8, dtype=torch.bool)),
        ("encoder.layer.0.output.dense", torch.ones(8, 12)),
        ("encoder.layer.0.output.LayerNorm", torch.ones(8, dtype=torch.bool)),
        ("encoder.layer.9.output.dense", torch.ones(8, 12, dtype=torch.bool)),
    ],
)
def test_masks_that_do_not_fit(tiny: Any, name: str, mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=name):
        sparsity_report(tiny.base(), {name: mask})
