from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebert.formats import Blocks
from sparsebert.ops import block_cluster_linear
from sparsebert.ops._backend import OPS

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def make(dtype: torch.dtype = torch.bfloat16, size: int = 64) -> tuple[Tensor, Blocks, Tensor]:
    torch.manual_seed(0)
    keep = (torch.rand(3, 2) < 0.6).repeat_interleave(size, 0).repeat_interleave(size, 1)
    weight = (torch.randn(3 * size, 2 * size) / 8).to(dtype)
    x, bias = torch.randn(5, 2 * size).to(dtype), torch.randn(3 * size).to(dtype)
    return x, Blocks.from_dense(weight, keep, block=(size, size)), bias


def call(x: Tensor, stored: Blocks, bias: Tensor | None, **options: Any) -> Tensor:
    options = {"shape": stored.shape, **options}
    return block_cluster_linear(x, stored.values, stored.columns, stored.row_starts, bias, **options)


@dtypes
@pytest.mark.parametrize("size", [64, 128])
def test_it_is_the_layer(dtype: torch.dtype, size: int) -> None:
    x, stored, bias = make(dtype, size)
    y = call(x, stored, bias, activation="gelu")
    exact = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), stored.to_dense().double(), bias.double()))
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.01)
    assert call(x[:0].view(0, 3, 2 * size), stored, None).shape == (0, 3, 3 * size)


def test_opcheck_and_compile() -> None:
    x, stored, bias = make()
    op = OPS["block_cluster_linear"].pick(torch.device("cpu"))
    index = (stored.columns, stored.row_starts)
    torch.library.opcheck(op, (x, stored.values, *index, bias, list(stored.shape), "gelu"))
    compiled = torch.compile(lambda x: call(x, stored, bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), call(x, stored, bias))


def test_what_does_not_fit_is_named() -> None:
    x, stored, bias = make()
    for change, message in (
        ({"x": x.float()}, "x: expected bfloat16 or float16, got torch.float32"),
        ({"x": x.half()}, "x: expected torch.bfloat16 like values, got torch.float16"),
        ({"x": x[:, :9]}, r"x: expected \[..., 128\] to fit the weight"),
        ({"bias": bias[:5]}, r"bias: expected \[192\], got \[5\]"),
        ({"activation": "gelo"}, "unknown activation 'gelo'; did you mean 'gelu'"),
        ({"x": x.clone().requires_grad_()}, "no gradient flows through this op; use block_sparse_linear"),
    ):
        options: dict[str, Any] = {"x": x, "bias": bias, **change}
        with pytest.raises(ValueError, match=message):
            call(options.pop("x"), stored, options.pop("bias"), **options)
    with pytest.raises(ValueError, match=r"values: expected \[B, 64, 64\] or \[B, 128, 128\], got \[4, 32, 32\]"):
        block_cluster_linear(x, stored.values[:4, :32, :32], *(stored.columns, stored.row_starts), shape=(192, 128))
    with pytest.raises(ValueError, match=r"columns: expected torch.int32"):
        call(x, stored.replaced(columns=stored.columns.long()), bias)
