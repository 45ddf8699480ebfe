"""The masked layer's Triton kernels, and the split of a stored gradient, against the references in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import check_error
from torch import Tensor

from sparsebert.ops import masked_linear, pack_bits
from sparsebert.ops._backend import OPS
from sparsebert.ops.bits import expand_grid
from sparsebert.ops.masked_linear import masked_linear_backward_reference
from sparsebert.ops.split_weight_grad import split_weight_grad, split_weight_grad_reference

pytest.importorskip("triton")

BLOCKS = ((1, 1), (1, 4), (16, 16), (32, 8), (3, 5), (1, 48), (40, 2))


def make(
    device: torch.device, m: int, grid: tuple[int, int], block: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """`[grad, x, weight, masked, bits]`; the weight is in float32."""
    generator = torch.Generator().manual_seed(seed)
    n, k = grid[0] * block[0], grid[1] * block[1]
    grad, x = (torch.randn(m, size, generator=generator).to(device, dtype) for size in (n, k))
    weight = torch.randn(n, k, generator=generator).to(device)
    mask = (torch.rand(grid, generator=generator) < 0.5).to(device)
    return [grad, x, weight, torch.where(expand_grid(mask, (n, k)), weight, 0.0).to(dtype), pack_bits(mask)]


def backward(case: Sequence[Tensor], grid: Sequence[int], *needs: bool) -> tuple[Tensor, ...]:
    op = OPS["masked_linear_backward"].pick(case[0].device)
    return op(*case, list(grid), *(needs or (True, True, True)))


def check(case: Sequence[Tensor], grid: Sequence[int]) -> None:
    results = backward(case, grid)
    usual = masked_linear_backward_reference(*case, grid, True, True, True)
    double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in case]
    truth = masked_linear_backward_reference(*double, grid, True, True, True)
    grad, x, weight, masked, _ = double
    p = grad.abs().t() @ x.abs()
    scales = (grad.abs() @ masked.abs(), (p * weight.abs()).sum() / max(grid[0] * grid[1], 1), p)
    for result, own, exact, scale in zip(results, usual, truth, scales, strict=True):
        check_error(result, own, exact, 3, scale)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.sampled_from([0, 1, 3, 17, 70]),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    block=st.sampled_from(BLOCKS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_gradients_are_within_torchs_own_error(
    triton_backend: torch.device, m: int, grid: tuple[int, int], **drawn: Any
) -> None:
    check(make(triton_backend, m, grid, **drawn), grid)


@pytest.mark.parametrize(("grid", "block"), [((48, 80), (1, 1)), ((3, 5), (16, 16)), ((1, 3), (64, 32))])
def test_tokens_are_split_where_tiles_are_few(
    triton_backend: torch.device, grid: tuple[int, int], block: tuple[int, int]
) -> None:
    from sparsebert.kernels.masked_linear_backward import tiles

    assert tiles(1030, 48, 80, 4).splits == 2
    case = make(triton_backend, 1030, grid, block, torch.bfloat16)
    check(case, grid)
    first, again = (backward(case, grid) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_tiles_than_multiprocessors(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles and split ones in one launch."""
    from sparsebert.kernels import masked_linear_backward as kernel

    monkeypatch.setattr(kernel, "multiprocessors", lambda _: 4)
    tile = kernel.tiles(1030, 128, 600, 4)
    assert (tile.whole, tile.rest, tile.splits) == (4, 1, 2)
    case = make(device, 1030, (128, 600), (1, 1), torch.bfloat16)
    monkeypatch.setenv("SPARSEBERT_BACKEND", "triton")
    check(case, (128, 600))


def test_only_what_is_needed_is_computed(triton_backend: torch.device) -> None:
    for dtype, block in ((torch.bfloat16, (4, 4)), (torch.float32, (4, 4)), (torch.bfloat16, (3, 5))):
        grid = (4, 6)
        case = make(triton_backend, 9, grid, block, dtype)
        full = backward(case, grid)
        for i in range(3):
            needs = [j == i for j in range(3)]
            some = backward(case, grid, *needs)
            assert torch.equal(some[i], full[i]) and all(some[j].numel() == 0 for j in range(3) if j != i)


def test_nothing_beyond_the_edges_is_used_and_pruned_places_are_zero(triton_backend: torch.device) -> None:
    grid = (33, 50)
    case = make(triton_backend, 19, grid, (1, 1), torch.bfloat16)
    expected = backward(case, grid)
    guarded = []
    for tensor in case[:4]:
        whole = tensor.new_full((len(tensor) + 200, tensor.shape[1]), float("nan"))
        whole[100:-100] = tensor
        guarded.append(whole[100:-100])
    assert all(torch.equal(a, b) for a, b in zip(backward([*guarded, case[4]], grid), expected, strict=True))
    case[1][3, 7] = float("nan")
    dweight = backward(case, grid)[2]
    kept = case[3] != 0
    assert torch.equal(dweight[:, 7].isnan(), kept[:, 7]) and (dweight[~kept] == 0).all()
    assert not dweight[:, :7].isnan().any()


def test_the_layer_and_its_gradients(triton_backend: torch.device) -> None:
    grid, block = (3, 4), (16, 16)
    grad, x, weight, masked, bits = make(triton_backend, 24, grid, block, torch.bfloat16)
    bias = torch.randn(48, dtype=torch.bfloat16, device=triton_backend)
    scores = torch.randn(grid, device=triton_backend)
    leaves = [t.clone().requires_grad_() for t in (x, weight, scores, bias)]

    def layer(x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x.view(2, 12, 64), weight, masked, scores, bits, bias).view(24, 48)

    torch.compiler.reset()
    both = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        both.append((y, *torch.autograd.grad(y, leaves, grad)))
    for eager, compiled in zip(*both, strict=True):
        torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(both[0][0], torch.nn.functional.linear(x, masked, bias))
    direct = backward([grad, x, weight, masked, bits], grid)
    for found, expected in zip((both[0][1], both[0][3], both[0][2]), direct, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", [*BLOCKS, (128, 1), (2, 600), (64, 64)])
def test_a_stored_gradient_is_split(triton_backend: torch.device, block: tuple[int, int]) -> None:
    grid = (3, 2)
    case = make(triton_backend, 1, grid, block, torch.float32)
    product = torch.randn(case[2].shape, generator=torch.Generator().manual_seed(1)).to(triton_backend)
    for dtype in (torch.float32, torch.bfloat16):
        p = product.to(dtype)
        scores, weight = split_weight_grad(p, case[2], case[4], grid)
        exact = split_weight_grad_reference(p.double(), case[2].double(), case[4], grid, True, True)
        torch.testing.assert_close(scores, exact[0].float(), rtol=1e-5, atol=1e-3)
        assert torch.equal(weight, exact[1].float()) and torch.equal(weight != 0, expand_grid(
            (case[3] != 0).view(grid[0], block[0], grid[1], block[1]).any(3).any(1), p.shape) & (p != 0))  # fmt: skip


def test_opcheck(triton_backend: torch.device) -> None:
    grid = (3, 4)
    case = make(triton_backend, 5, grid, (4, 4), torch.bfloat16)
    torch.library.opcheck(OPS["masked_linear_backward"].pick(triton_backend), (*case, list(grid), True, True, True))
    arguments = (case[2], case[2], case[4], list(grid), True, True)
    torch.library.opcheck(OPS["split_weight_grad"].pick(triton_backend), arguments)


def test_tiles_fill_the_device() -> None:
    from sparsebert.kernels.masked_linear_backward import fuses, tiles

    wide = tiles(4096, 3072, 768, 132)
    assert (wide.rows, wide.columns, wide.whole, wide.rest, wide.splits) == (128, 128, 132, 12, 8)
    square = tiles(4096, 768, 768, 132)
    assert (square.whole, square.rest, square.splits) == (0, 36, 3) and square.share(4096) == 1408
    assert tiles(256, 768, 768, 132).splits == 1
    bf16 = torch.bfloat16
    assert fuses(4096, 3072, 768, (1, 1), bf16) and fuses(16384, 768, 768, (64, 64), bf16)
    assert not fuses(16384, 3072, 768, (1, 1), bf16)
    assert not fuses(64, 768, 768, (1, 768), bf16) and not fuses(64, 768, 768, (1, 1), torch.float32)


def test_cost_by_hand() -> None:
    from sparsebert.kernels import masked_linear as forward
    from sparsebert.kernels import masked_linear_backward as kernel
    from sparsebert.kernels import split_weight_grad as split

    layer = forward.cost(100, 48, 64)
    assert (layer.read, layer.written, layer.flops) == (2 * (100 * 64 + 48 * 64 + 48), 2 * 100 * 48, 2 * 100 * 48 * 64)
    stored = split.cost(32, 64, (16, 16), item=2)
    assert (stored.read, stored.written) == (2048 * (2 + 4) + 1, 4 * 8 + 4 * 2048)
    # Scores alone: 36 tiles of 128 x 128, each in three parts of 1408 tokens.
    found = kernel.cost(4096, 768, 768, need_x=False)
    parts = 36 * 3 * 128 * 128 * 4
    assert found.read == 4096 * 1536 * 2 + parts + 768 * 768 * 4 and found.written == parts + 768 * 768 * 4
    assert found.flops == 2 * 36 * 3 * 1408 * 128 * 128 + 2 * 768 * 768 and found.launches == 2
    # dX, and P stored in 16 bits, and its split.
    full = kernel.cost(16384, 3072, 768, weight=True)
    size = 3072 * 768
    assert full.launches == 3 and full.flops == 4 * 16384 * size + 2 * size
    assert full.written == 2 * (16384 * 768 + size) + 8 * size
