"""The Triton layer over stored blocks and the gradient of its input, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import check_error, pick_mask
from torch import Tensor

from sparsebert.formats import Blocks
from sparsebert.ops import block_sparse_linear
from sparsebert.ops._backend import OPS
from sparsebert.ops._linear import ACTIVATIONS
from sparsebert.ops.block_sparse_linear import block_sparse_linear_reference

pytest.importorskip("triton")

BLOCKS = ((16, 16), (64, 64), (8, 2), (48, 16), (3, 5), (32, 64), (16, 128), (1, 1), (160, 32), (32, 96))


def make(
    device: torch.device,
    m: int = 5,
    grid: tuple[int, int] = (3, 4),
    block: tuple[int, int] = (16, 16),
    density: float = 0.5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Blocks, Tensor, Tensor]:
    """`(x, stored, bias, grad)`."""
    generator = torch.Generator().manual_seed(seed)
    n, k = grid[0] * block[0], grid[1] * block[1]
    kept = pick_mask(grid, density, generator).repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    x, weight, bias, grad = (
        torch.randn(size, generator=generator).to(device, dtype) for size in ((m, k), (n, k), (n,), (m, n))
    )
    return x, Blocks.from_dense(weight, kept.to(device), block=block), bias, grad


def call(x: Tensor, stored: Blocks, bias: Tensor | None, activation: str = "none", **options: Any) -> Tensor:
    values = options.pop("values", stored.values)
    options |= {"shape": stored.shape, "activation": activation}
    return block_sparse_linear(x, values, stored.columns, stored.row_starts, bias, **options)


def exact(x: Tensor, stored: Blocks, bias: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    place = (stored.columns, stored.row_starts)
    return block_sparse_linear_reference(
        x.to(dtype), stored.values.to(dtype), *place, bias.to(dtype), stored.shape, activation, []
    )


def check(case: tuple[Tensor, Blocks, Tensor, Tensor], activation: str) -> None:
    x, stored, bias, grad = case
    y = call(x, stored, bias, activation)
    scale = x.double().abs() @ stored.to_dense().double().abs().t() + bias.double().abs()
    check_error(
        y, exact(x, stored, bias, activation, x.dtype), exact(x, stored, bias, activation, torch.double), 2, scale
    )
    leaf, values = x.clone().requires_grad_(), stored.values.clone().requires_grad_()
    y = call(leaf, stored, bias, values=values, transposed=stored.transposed())
    dx, dvalues = torch.autograd.grad(y, (leaf, values), grad)
    weight = stored.to_dense()
    scale = grad.double().abs() @ weight.double().abs()
    check_error(dx, grad @ weight, grad.double() @ weight.double(), 3, scale)
    kept = stored.stored()
    gathered = stored.replaced(values=dvalues).to_dense()
    scale = grad.double().abs().t() @ x.double().abs()
    check_error(gathered, (grad.t() @ x) * kept, (grad.double().t() @ x.double()) * kept, 3, scale)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.sampled_from([0, 1, 2, 7, 17, 33, 70]),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    block=st.sampled_from(BLOCKS),
    density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_result_and_gradients_are_within_torchs_own_error(
    triton_backend: torch.device, activation: str, **drawn: Any
) -> None:
    check(make(triton_backend, **drawn), activation)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_size_is_served(triton_backend: torch.device, block: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(make(triton_backend, 20, (4, 3), block, 0.5, dtype), "gelu")


@pytest.mark.parametrize("m", [1, 129])
def test_larger_tiles(triton_backend: torch.device, m: int) -> None:
    check(make(triton_backend, m, (3, 10), (64, 64), 0.4, torch.bfloat16), "gelu_tanh")
    check(make(triton_backend, m, (2, 2), (128, 128), 0.7, torch.bfloat16), "tanh")


def test_float16_in_the_kernel_itself(device: torch.device) -> None:
    from sparsebert.kernels.block_sparse_linear import block_sparse_linear as kernel

    x, stored, bias, _ = make(device, 20, dtype=torch.float16)
    y = kernel(x, stored.values, stored.columns, stored.row_starts, bias, stored.shape, "tanh", [])
    usual, truth = (exact(x, stored, bias, "tanh", dtype) for dtype in (torch.float16, torch.double))
    check_error(y, usual, truth, 2, torch.ones((), device=device).double())


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
def test_block_rows_of_every_length(triton_backend: torch.device, rows: int) -> None:
    """The last row has all blocks, the first none: whatever order the programs take them in."""
    kept = torch.ones(rows, 2, dtype=torch.bool).tril(-1).repeat_interleave(16, 0).repeat_interleave(16, 1)
    x, _, bias, _ = make(triton_backend, 9, (rows, 2))
    weight = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)).to(triton_backend)
    stored = Blocks.from_dense(weight, kept.to(triton_backend))
    torch.testing.assert_close(call(x, stored, bias), exact(x, stored, bias, "none", torch.double).float())


@pytest.mark.parametrize("block", [(16, 16), (64, 64), (8, 2)])
def test_nothing_beyond_the_edges_is_used(triton_backend: torch.device, block: tuple[int, int]) -> None:
    x, stored, bias, _ = make(triton_backend, 19, (3, 4), block, 0.5)
    expected = call(x, stored, bias)
    guarded = []
    for tensor in (x, stored.values, bias):
        whole = tensor.new_full((len(tensor) + 200, *tensor.shape[1:]), float("nan"))
        whole[100:-100] = tensor
        guarded.append(whole[100:-100])
    index = [torch.cat((part.new_full((64,), 10**6), part, part.new_full((64,), 10**6)))[64:-64] for part in
             (stored.columns, stored.row_starts)]  # fmt: skip
    y = block_sparse_linear(guarded[0], guarded[1], *index, guarded[2], shape=stored.shape)
    assert torch.equal(y, expected)


def test_a_nan_stays_in_its_row_and_out_of_pruned_places(triton_backend: torch.device) -> None:
    x, stored, bias, _ = make(triton_backend, 70, (3, 4), (16, 16), 0.5)
    stores = stored.stored()
    x[3, 20] = float("nan")
    y = call(x, stored, bias, "relu")
    assert torch.equal(y[3].isnan(), stores[:, 20]) and not y[[0, 1, 2, 4]].isnan().any() and not y[5:].isnan().any()
    values = stored.values.clone()
    values[0, 2, 1] = float("nan")
    y = call(torch.ones_like(x), stored, None, values=values)
    assert int(y.isnan().any(0).sum()) == 1 and y.isnan().any(1).all()


def test_strides_offsets_and_leading_dimensions(triton_backend: torch.device) -> None:
    x, stored, bias, _ = make(triton_backend, 24)
    expected = call(x, stored, bias)
    torch.testing.assert_close(call(x.t().contiguous().t(), stored, bias), expected)
    torch.testing.assert_close(call(torch.cat((x, x), 1)[:, 64:], stored, bias), expected)
    flat = torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x)
    torch.testing.assert_close(call(flat, stored, bias), expected)
    torch.testing.assert_close(call(x.view(2, 3, 4, 64), stored, bias), expected.view(2, 3, 4, 48))
    torch.testing.assert_close(call(x[0], stored, bias), expected[0])


def test_the_same_bits_every_time(triton_backend: torch.device) -> None:
    for m in (33, 1030):
        x, stored, bias, grad = make(triton_backend, m, (2, 2), (32, 32))
        results = []
        for _ in range(2):
            leaves = [part.clone().requires_grad_() for part in (x, stored.values, bias)]
            y = call(leaves[0], stored, leaves[2], values=leaves[1], transposed=stored.transposed())
            results.append((y, *torch.autograd.grad(y, leaves, grad)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_gradients_equal_eager_ones(triton_backend: torch.device) -> None:
    x, stored, bias, grad = make(triton_backend, 20)
    leaves = [part.requires_grad_() for part in (x, stored.values.clone(), bias)]

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return call(x, stored, bias, "gelu", values=values, transposed=transposed)

    transposed = stored.transposed()
    torch.compiler.reset()
    both = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        both.append((y, *torch.autograd.grad(y, leaves, grad)))
    for eager, compiled in zip(*both, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_opcheck_of_the_input_gradient(triton_backend: torch.device) -> None:
    _, stored, _, grad = make(triton_backend, 20)
    op = OPS["block_sparse_input_grad"].pick(triton_backend)
    torch.library.opcheck(op, (grad, stored.values, *stored.transposed(), list(stored.shape)))


def by_panels(x: Tensor, stored: Blocks, bias: Tensor | None, activation: str, grad: bool = False) -> Tensor:
    """The kernel that keeps x in shared memory, whatever the number of tokens; every entry of y must be written."""
    from sparsebert.kernels.block_sparse_linear import by_panels as kernel

    permutation, *place = stored.transposed() if grad else (None, stored.columns, stored.row_starts)
    y = x.new_full((len(x), stored.shape[1 if grad else 0]), float("nan"))
    return kernel(x, stored.values, permutation, *place, bias, y, activation)


@pytest.mark.parametrize(("m", "grid"), [(5, (1, 1)), (150, (3, 2)), (5, (2, 12)), (130, (4, 1))])
def test_x_in_shared_memory(device: torch.device, m: int, grid: tuple[int, int]) -> None:
    x, stored, bias, grad = make(device, m, grid, (64, 64), 0.4 if grid[0] > 1 else 1.0, torch.bfloat16, seed=3)
    y = by_panels(x, stored, bias, "gelu")
    scale = x.double().abs() @ stored.to_dense().double().abs().t() + bias.double().abs()
    usual, truth = (exact(x, stored, bias, "gelu", dtype) for dtype in (torch.bfloat16, torch.double))
    check_error(y, usual, truth, 2, scale)
    assert torch.equal(y, by_panels(x, stored, bias, "gelu"))
    dx, weight = by_panels(grad, stored, None, "none", grad=True), stored.to_dense()
    check_error(dx, grad @ weight, grad.double() @ weight.double(), 3, grad.double().abs() @ weight.double().abs())


def test_x_in_shared_memory_with_empty_rows_and_edges(device: torch.device) -> None:
    kept = torch.zeros(7, 3, dtype=torch.bool)
    for row, column in ((1, 2), (3, 0), (3, 1), (5, 1)):
        kept[row, column] = True
    x, _, bias, _ = make(device, 133, (7, 3), (64, 64), dtype=torch.bfloat16)
    weight = torch.randn(7 * 64, 3 * 64, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    mask = kept.repeat_interleave(64, 0).repeat_interleave(64, 1).to(device)
    stored = Blocks.from_dense(weight, mask, block=(64, 64))
    whole = x.new_full((400, x.shape[1]), float("nan"))
    whole[100:233] = x
    y = by_panels(whole[100:233], stored, bias, "relu")
    torch.testing.assert_close(y, exact(x, stored, bias, "relu", torch.double).bfloat16(), rtol=0.02, atol=0.1)
    x[7, 70] = float("nan")
    y = by_panels(x, stored, bias, "none")
    assert torch.equal(y[7].isnan(), stored.stored()[:, 70]) and int(y.isnan().any(1).sum()) == 1


def test_groups_of_block_rows_fill_the_device() -> None:
    from sparsebert.kernels._block_panel import groups
    from sparsebert.kernels.block_sparse_linear import uses_panel

    assert groups(16384, 48, 132) == 1 and groups(4096, 48, 132) == 4 and groups(128, 3, 132) == 3
    bf16 = torch.bfloat16
    assert uses_panel((64, 64), 48, 768, 144, 4096, bf16, 90)
    for other in (((64, 64), 12, 3072, 144), ((32, 32), 96, 768, 144), ((64, 64), 48, 768, 0)):
        assert not uses_panel(*other, 4096, bf16, 90)
    for arch in (80, 100):
        assert not uses_panel((64, 64), 48, 768, 144, 4096, bf16, arch)


def test_cost_by_hand() -> None:
    from sparsebert.kernels import block_sparse_input_grad as backward
    from sparsebert.kernels import block_sparse_linear as forward

    # 100 tokens in one tile of 128 (all else equal, 64 where programs are few): 2 * 128 FLOPs a stored weight.
    cost = forward.cost(100, 128, 256, (64, 64), 3)
    assert cost.read == 2 * (100 * 256 + 3 * 64 * 64 + 128) + 4 * (3 + 3)
    assert cost.written == 2 * 100 * 128 and cost.flops == 2 * 128 * 3 * 64 * 64 and cost.launches == 1
    # 48 rows are computed as 64.
    assert forward.cost(64, 96, 32, (48, 16), 4).flops == 2 * 64 * 4 * 64 * 16
    assert forward.staged(64, 96, 32, (48, 16), 4) == 4 * 16 * (64 + 64) * 2
    # 32 panels of 128 tokens, four groups of block rows: 12 first products each, and 196 608 bytes.
    panel = forward.cost(4096, 3072, 768, (64, 64), 144)
    assert panel.flops == 2 * 4096 * 64 * 64 * (144 + 4 * 12)
    assert forward.staged(4096, 3072, 768, (64, 64), 144) == 32 * (4 * (128 * 768 + 4096) + 144 * 4096) * 2
    turned = backward.cost(64, 128, 256, (64, 64), 3)
    assert turned.read == 2 * (64 * 128 + 3 * 64 * 64) + 4 * (3 + 5) + 8 * 3 and turned.launches == 1
    assert turned.written == 2 * 64 * 256


def test_tiles_fit_the_shape_and_the_architecture() -> None:
    from sparsebert.kernels._block_rows import tiles

    bf16 = torch.bfloat16
    wide = tiles((64, 64), 48, 48 * 12, 16384, bf16, 90)
    assert (wide.rows, wide.tokens, wide.swapped) == (64, 256, True)
    short = tiles((64, 64), 48, 48 * 3, 16384, bf16, 90)
    assert (short.tokens, short.warps) == (128, 4)
    assert tiles((64, 64), 12, 12 * 12, 512, bf16, 90).tokens == 64
    assert tiles((64, 64), 12, 12 * 12, 1, bf16, 90).tokens == 16
    assert tiles((16, 16), 48, 480, 4096, bf16, 90).swapped is False
    for block in BLOCKS:
        for dtype in (bf16, torch.float32):
            for arch in (80, 90, 100):
                tile = tiles(block, 8, 40, 1000, dtype, arch)
                bytes_staged = (tile.rows + tile.tokens) * tile.depth * dtype.itemsize * tile.stages
                assert bytes_staged <= (163 if arch == 80 else 227) * 1024
                assert min(tile.rows, tile.depth, tile.tokens) >= 16


def test_with_many_tokens_clusters_are_measured_beside_triton(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from sparsebert.kernels import _fastest

    kernel = importlib.import_module("sparsebert.kernels.block_sparse_linear")
    chosen: dict[Any, str] = {}
    monkeypatch.setattr(_fastest, "chosen", chosen)
    case = make(triton_backend, 40, (3, 2), (64, 64), dtype=torch.bfloat16)
    check(case, "gelu")
    assert not chosen
    # Nowhere but on a Hopper GPU, with Triton not forced and tokens enough.
    assert not kernel.clusters_there(triton_backend)
    assert kernel.may_cluster((64, 64), 768, 1024, torch.bfloat16)
    for unfit in (((32, 32), 768, 1024), ((64, 128), 768, 1024), ((64, 64), 8256, 1024), ((64, 64), 768, 1023)):
        assert not kernel.may_cluster(*unfit, torch.bfloat16)
    assert not kernel.may_cluster((64, 64), 768, 1024, torch.float32)
    ran: list[str] = []
    pace: dict[str, float] = {}

    def clusters(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
        ran.append("clusters")
        return block_sparse_linear_reference(x, values, *rest, [])

    def seconds(run: Any, device: torch.device) -> float:
        ran.clear()
        run()
        return pace["clusters"] if ran else 1.0

    monkeypatch.setattr(kernel, "clusters_there", lambda device: True)
    monkeypatch.setattr(kernel, "LEAST_TOKENS", 32)
    monkeypatch.setattr(torch.ops.sparsebert, "block_cluster_linear", clusters, raising=False)
    monkeypatch.setattr(_fastest, "seconds", seconds)
    x, stored, bias, _ = case
    for activation, quick, faster in (("gelu", 0.5, "clusters"), ("relu", 2.0, "Triton")):
        pace["clusters"] = quick
        first = call(x, stored, bias, activation)
        ran.clear()
        again = call(x, stored, bias, activation)
        assert list(chosen.values())[-1] == faster and ran == ["clusters"] * (faster == "clusters")
        for y in (first, again):
            torch.testing.assert_close(y, exact(x, stored, bias, activation, torch.bfloat16), rtol=0.02, atol=0.05)
    assert len(chosen) == 2
