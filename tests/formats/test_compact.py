from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sparsebert.formats import Compact


def test_by_hand() -> None:
    stored = Compact.from_dense(torch.tensor([[0.0, 1, 2], [0, 0, 0], [0, 3, 0]]))
    assert stored.values.tolist() == [[1, 2], [3, 0]]
    assert stored.kept_rows.tolist() == [0, 2] and stored.kept_columns.tolist() == [1, 2]
    assert stored.kept_rows.dtype == stored.kept_columns.dtype == torch.int32
    assert not stored.exact
    full = Compact.from_dense(torch.ones(3, 2))
    assert full.kept_rows.tolist() == full.kept_columns.tolist() == [] and full.exact
    # Nothing kept is not everything kept.
    none = Compact.from_dense(torch.zeros(3, 2))
    assert none.values.shape == (0, 0) and not none.to_dense().any() and none.exact
    none.check()


@pytest.mark.parametrize("rows", [[], [1], [0, 1, 2, 3]])
@pytest.mark.parametrize("columns", [[2], [0, 1, 2]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_without_a_row_is_its_activated_bias(
    rows: list[int], columns: list[int], bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.zeros(4, 3, dtype=dtype)
    for row in rows:
        weight[row, columns] = 2
    stored = Compact.from_dense(weight)
    for shape in ((3,), (5, 3), (0, 3), (2, 2, 3)):
        x = torch.randn(shape, dtype=dtype)
        added = torch.tensor([1.0, -2, 3, 0.5], dtype=dtype) if bias else None
        y = stored.linear(x, added, "gelu")
        exact = F.gelu(F.linear(x.float(), weight.float(), None if added is None else added.float()))
        # In bfloat16 torch rounds before the activation too.
        torch.testing.assert_close(y, exact.to(dtype), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=2e-2)


def test_autocast() -> None:
    stored = Compact.from_dense(torch.tensor([[1.0, 0], [0, 0]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = stored.linear(torch.ones(3, 2), torch.ones(2), "relu")
    assert y.dtype == torch.bfloat16 and y.tolist() == [[2, 1]] * 3


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("kept_rows", [2, 0], "kept_rows: expected ascending numbers, got 0 at 0"),
        ("kept_rows", [0, 0], "kept_rows: expected ascending numbers"),
        ("kept_rows", [0, 3], "kept_rows: expected 0 to 2, got 3 at 1"),
        ("kept_columns", [-1, 2], "kept_columns: expected 0 to 2, got -1 at 0"),
        ("kept_columns", [], r"kept_columns: expected torch\.int32 \[2\], got torch\.int32 \[0\]"),
    ],
)
def test_a_wrong_index_is_named(name: str, kept: list[int], message: str) -> None:
    stored = Compact.from_dense(torch.tensor([[0.0, 1, 2], [0, 0, 0], [0, 3, 0]]))
    with pytest.raises(ValueError, match=message):
        stored.replaced(**{name: torch.tensor(kept, dtype=torch.int32)}).check()


def test_an_operand_that_does_not_fit_is_named() -> None:
    stored = Compact.from_dense(torch.tensor([[0.0, 1, 2], [0, 0, 0], [0, 3, 0]]))
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 3\] to fit the weight \[3, 3\], got \[2, 4\]"):
        stored.linear(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"bias: expected \[3\], got \[2\]"):
        stored.linear(torch.ones(2, 3), torch.ones(2))
