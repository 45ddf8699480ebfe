"""The dense layer's Triton product with its activation fused, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from ops.linear_cases import check_error
from torch import Tensor

from sparsebert.ops import dense_linear
from sparsebert.ops._linear import ACTIVATIONS
from sparsebert.ops.dense_linear import dense_linear_reference

pytest.importorskip("triton")


def make(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 48, 64), (33, 130, 72), (300, 20, 3)])
def test_within_torchs_own_error(device: torch.device, m: int, n: int, k: int, activation: str) -> None:
    from sparsebert.kernels.dense_linear import product

    for dtype in (torch.bfloat16, torch.float32):
        x, weight, bias = make(device, m, n, k, dtype)
        for shift in (bias, None):
            y = product(x, weight, shift, activation)
            usual = dense_linear_reference(x, weight, shift, activation)
            double = (x.double(), weight.double(), None if shift is None else shift.double())
            scale = double[0].abs() @ double[1].abs().t() + 1
            check_error(y, usual, dense_linear_reference(*double, activation), 2, scale)
        assert torch.equal(y, product(x, weight, None, activation))


def test_nothing_beyond_the_edges_is_used(device: torch.device) -> None:
    from sparsebert.kernels.dense_linear import product

    tensors = make(device, 19, 40, 50, torch.bfloat16)
    expected = product(*tensors, "gelu")
    guarded = []
    for tensor in tensors:
        whole = tensor.new_full((len(tensor) + 200, *tensor.shape[1:]), float("nan"))
        whole[100:-100] = tensor
        guarded.append(whole[100:-100])
    assert torch.equal(product(*guarded, "gelu"), expected)


def test_the_op_asks_cublas_for_what_is_small(triton_backend: torch.device) -> None:
    x, weight, bias = make(triton_backend, 24, 16, 32, torch.bfloat16)
    y = dense_linear(x.view(2, 12, 32), weight, bias, activation="gelu")
    expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(y.view(24, 16), expected)
    assert dense_linear(x[:0], weight, bias).shape == (0, 16)


def test_the_layer_knows_whom_the_op_asks() -> None:
    from sparsebert.kernels.dense_linear import MANY
    from sparsebert.nn.sparse_linear import GPU_FEW_ROWS

    assert GPU_FEW_ROWS == MANY


def test_who_multiplies_and_what_it_costs() -> None:
    from sparsebert.kernels.dense_linear import by_triton, cost, tiles

    bf16 = torch.bfloat16
    assert by_triton(4096, 3072, 768, bf16, "gelu") and not by_triton(16, 3072, 768, bf16, "gelu")
    assert not by_triton(4096, 3072, 768, bf16, "none") and not by_triton(4096, 3072, 768, torch.float32, "gelu")
    assert (tiles(16384, 3072, bf16, 90).rows, tiles(16384, 3072, bf16, 80).rows) == (256, 128)
    fused, plain = cost(4100, 3072, 768, activation="gelu"), cost(100, 3072, 768, activation="gelu")
    assert fused.flops == 2 * 33 * 128 * 3072 * 768 and fused.written == 2 * 4100 * 3072 and fused.launches == 1
    assert plain.written == 2 * 2 * 100 * 3072 and plain.launches == 2
