from __future__ import annotations

import pytest
import torch
from formats.stored import mask_for, numbered
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.formats import Unstructured
from sparsebert.ops.unstructured_linear import PANEL, STRIP


def by_definition(weight: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """The five tensors by loops over tiles, rows and columns."""
    (n, k), made = weight.shape, {name: [] for name in ("values", "offsets", "rows", "counts", "starts")}
    for top in range(0, n, STRIP):
        for left in range(0, k, PANEL):
            made["starts"].append(len(made["values"]))
            part = mask[top : top + STRIP, left : left + PANEL]
            for count, row in sorted((int(part[row].sum()), row) for row in range(len(part))):
                made["rows"].append(row)
                made["counts"].append(count)
                for column in part[row].nonzero().flatten().tolist():
                    made["values"].append(weight[top + row, left + column].item())
                    made["offsets"].append(column)
    made["starts"].append(len(made["values"]))
    return made


@given(
    shape=st.sampled_from([(9, 14), (STRIP + 3, PANEL + 5), (STRIP, PANEL), (2 * STRIP, 3), (2, 3 * PANEL), (0, 3)]),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_tiles_are_as_defined(shape: tuple[int, int], density: float, seed: int) -> None:
    weight, mask = numbered(shape), mask_for("unstructured", shape, density, seed)
    stored = Unstructured.from_dense(weight, mask)
    assert {name: tensor.tolist() for name, tensor in stored.tensors().items()} == by_definition(weight, mask)
    # And those of the transpose, for the gradient of x.
    permutation, *index = stored.transposed()
    turned = by_definition(weight.t(), mask.t())
    assert stored.values[permutation].tolist() == turned["values"]
    assert [tensor.tolist() for tensor in index] == [turned[name] for name in ("offsets", "rows", "counts", "starts")]
    assert permutation.dtype == torch.int64
    for name, tensor in zip(("offsets", "rows", "counts", "starts"), index, strict=True):
        assert tensor.dtype == getattr(stored, name).dtype


def test_a_byte_holds_what_a_tile_needs() -> None:
    assert 1 <= STRIP <= 256 and 1 <= PANEL <= 255


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("offsets", 0, 14, "offsets: expected less than the columns of the panel, got 14 at 0"),
        ("offsets", 3, 0, "offsets: expected ascending columns within a row, got 0 at"),
        ("rows", 2, 200, "rows: expected"),
        ("counts", 8, 15, "counts: expected at most the columns of the panel, got 15 at 8"),
        ("counts", 8, 0, "counts: expected a sum of 6[0-9] like values, got"),
        ("starts", 0, 1, "starts: expected the sums of counts before each tile, got 1 at 0"),
        ("starts", 0, -(2**63), "starts: expected"),
    ],
)
def test_a_wrong_index_is_named(name: str, place: int, value: int, message: str) -> None:
    mask = mask_for("unstructured", (9, 14), 0.5, 0)
    mask[0, 3:] = True
    stored = Unstructured.from_dense(numbered((9, 14)), mask)
    changed = getattr(stored, name).clone()
    changed[place] = value
    with pytest.raises(ValueError, match=message):
        stored.replaced(**{name: changed}).check()


def test_entries_out_of_order_are_refused() -> None:
    stored = Unstructured.from_dense(torch.eye(4))
    for rows, message in (([1, 0, 2, 3], "in the order of"), ([0, 1, 2, 2], "in the order of"), ([0, 1, 2, 4], "once")):
        with pytest.raises(ValueError, match=f"rows: expected .*{message}"):
            stored.replaced(rows=torch.tensor(rows, dtype=torch.uint8)).check()


def test_bytes_beside_each_weight() -> None:
    stored = Unstructured.from_dense(torch.ones(STRIP, 2 * PANEL, dtype=torch.bfloat16))
    assert stored.nbytes == 3 * stored.nnz + 2 * 2 * STRIP + 8 * 3
