"""The CUDA kernels that make masks and split gradients, on a GPU; without one their bodies run in the emulation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsebert import _load
from sparsebert.ops import masked_weight, nm_mask, select_mask, threshold_mask
from sparsebert.ops.bits import bytes_for, pack_bits, unpack_bits
from sparsebert.ops.masked_weight import masked_weight_reference
from sparsebert.ops.nm_mask import nm_mask_reference
from sparsebert.ops.select_mask import select_mask_reference, threshold_mask_reference
from sparsebert.ops.split_weight_grad import split_weight_grad, split_weight_grad_reference

INF, NAN = float("inf"), float("nan")
CUDA = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _load.missing("cuda")
    if reason is not None:
        pytest.skip(f"no compiled CUDA kernels: {reason}")
    monkeypatch.setenv("SPARSEBERT_BACKEND", "cuda")
    torch.manual_seed(0)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n, device=CUDA),
    "magnitudes": lambda n: torch.randn(n, device=CUDA).abs(),
    "few values": lambda n: torch.randint(-2, 3, (n,), device=CUDA).float(),
    "all equal": lambda n: torch.zeros(n, device=CUDA),
    "one exponent": lambda n: 1 + torch.rand(n, device=CUDA),
    "special": lambda n: torch.tensor([INF, -INF, 0.0, -0.0, 1e-45], device=CUDA)[
        torch.randint(0, 5, (n,), device=CUDA)
    ],
}


def expected_bits(scores: list[Tensor], num_pruned: int) -> list[Tensor]:
    bits = [torch.empty(bytes_for(score.numel()), dtype=torch.uint8, device=CUDA) for score in scores]
    select_mask_reference(scores, num_pruned, [], bits, [])
    return bits


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# The last two are more than the shared memory holds: of one, all keys; of the other, those of one exponent.
@pytest.mark.parametrize("size", [1, 7, 2048, 589_824, 2_359_297, 9_000_001, 30_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_are_pruned_and_of_equals_the_earliest(kind: str, size: int) -> None:
    scores = [KINDS[kind](size)]
    for share in (0.0, 0.1, 0.5, 0.97, 1.0):
        num_pruned = int(share * size)
        assert same(select_mask(scores, num_pruned), expected_bits(scores, num_pruned)), share


def test_many_tensors_of_all_sizes_and_alignments() -> None:
    sizes = [(13 * i) % 97 + (100_003 if i % 10 == 0 else 0) for i in range(150)]
    scores = [torch.randn(n + i % 4, device=CUDA)[i % 4 :].mul(3).round() for i, n in enumerate(sizes)]
    for num_pruned in (1, 50_000, sum(sizes) - 1):
        first = select_mask(scores, num_pruned)
        assert same(first, expected_bits(scores, num_pruned)) and same(first, select_mask(scores, num_pruned))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_masked_weights(weight_dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    grids = [((96, 120), (96, 120)), ((6, 4), (96, 128)), ((5, 3), (10, 9)), ((64, 1), (64, 777)), ((1, 7), (64, 7))]
    scores = [torch.randn(cells, device=CUDA) for cells, _ in grids]
    weights = [torch.randn(shape, device=CUDA).to(weight_dtype) for _, shape in grids]
    weights[0][0] = NAN
    for op, reference, limit in (
        (select_mask, select_mask_reference, 7000),
        (threshold_mask, threshold_mask_reference, 0.25),
    ):
        out = [torch.full(shape, NAN, dtype=out_dtype, device=CUDA) for _, shape in grids]
        exact = [torch.empty_like(product) for product in out]
        bits = op(scores, limit, weights, out)
        expected = [torch.empty_like(packed) for packed in bits]
        reference(scores, limit, weights, expected, exact)
        assert same(bits, expected)
        for product, wanted in zip(out, exact, strict=True):
            torch.testing.assert_close(product, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_nan_is_refused_or_spoils_the_products(where: int) -> None:
    scores = [torch.randn(64, 64, device=CUDA) for _ in range(3)]
    scores[where][3, 5] = NAN
    for op, limit in ((select_mask, 500), (select_mask, 0), (threshold_mask, 0.0)):
        with pytest.raises(ValueError, match=rf"scores\[{where}\]: has a NaN"):
            op(scores, limit)
        weights = [torch.randn(64, 64, device=CUDA) for _ in range(3)]
        before = [weight.clone() for weight in weights]
        with pytest.raises(ValueError, match=rf"scores\[{where}\]: has a NaN"):
            op(scores, limit, weights, weights)
        assert same(weights, before)
        # As in a training step: nothing waits, and the products cannot be mistaken for good ones.
        out = [torch.zeros(64, 64, dtype=torch.bfloat16, device=CUDA) for _ in range(3)]
        bits = op(scores, limit, weights, out)
        assert all(bool(product.isnan().all()) for product in out)
        assert all(int(packed.sum()) == 0 for packed in bits)
    with pytest.raises(ValueError, match="scores: has a NaN"):
        nm_mask(scores[where], 2, 4)


def test_a_captured_graph_follows_its_scores() -> None:
    scores = [torch.randn(300, 200, device=CUDA) for _ in range(40)]
    weights = [torch.randn(300, 200, device=CUDA) for _ in range(40)]
    out = [torch.empty(300, 200, dtype=torch.bfloat16, device=CUDA) for _ in range(40)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        select_mask(scores, 1_000_000, weights, out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits = select_mask(scores, 1_000_000, weights, out)
        groups = nm_mask(scores[0], 2, 4)
    for _ in range(2):
        for score in scores:
            score.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(bits, expected_bits(scores, 1_000_000))
        assert torch.equal(groups, nm_mask_reference(scores[0], 2, 4, None))
        kept = unpack_bits(bits[7], (300, 200))
        assert torch.equal(out[7], torch.where(kept, weights[7], 0.0).bfloat16())


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 8, 16, 31, 32])
@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_nm(kind: str, m: int) -> None:
    scores = KINDS[kind](769 * 24 * m).view(769, 24 * m)
    for n, threshold in ((0, None), (m // 2, None), (m // 2, 1.0), (m, None)):
        assert torch.equal(nm_mask(scores, n, m, threshold), nm_mask_reference(scores, n, m, threshold))
    odd = scores.view(-1)[m : m + 5 * m].view(1, -1)
    assert torch.equal(nm_mask(odd, 1, m), nm_mask_reference(odd, 1, m, None))
    assert nm_mask(scores[:0], 1, m).numel() == 0


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(768, 512), (24, 16), (12, 1), (1, 512), (768, 1), (1, 1), (6, 4), (256, 128)])
def test_split(grid: tuple[int, int], product_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    shape = (768, 512)
    product = torch.randn(shape, device=CUDA).to(product_dtype)
    weight = torch.randn(shape, device=CUDA).to(weight_dtype)
    bits = pack_bits(torch.rand(grid, device=CUDA) < 0.5)
    scores, dense = split_weight_grad(product, weight, bits, grid)
    again = split_weight_grad(product, weight, bits, grid)
    assert torch.equal(scores, again[0]) and torch.equal(dense, again[1])
    assert torch.equal(dense, split_weight_grad_reference(product, weight, bits, grid, False, True)[1])
    exact = split_weight_grad_reference(product.double(), weight.double(), None, grid, True, False)[0]
    terms = split_weight_grad_reference(product.double().abs(), weight.double().abs(), None, grid, True, False)[0]
    assert ((scores.double() - exact).abs() <= 1e-6 * terms).all()
    alone = split_weight_grad(product, weight, None, grid, need_weight=False)
    assert torch.equal(alone[0], scores) and alone[1].numel() == 0


def test_split_of_a_matrix_without_rows() -> None:
    empty = torch.empty(0, 512, device=CUDA)
    bits = pack_bits(torch.ones(2, 16, dtype=torch.bool, device=CUDA))
    # Freed at once: what the allocator gives again holds NaN.
    torch.full((2, 16), NAN, device=CUDA)
    scores, dense = split_weight_grad(empty, empty, bits, (2, 16))
    assert torch.equal(scores, torch.zeros(2, 16, device=CUDA)) and dense.shape == (0, 512)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(96, 120), (6, 4), (96, 1), (1, 120), (12, 40), (1, 1)])
@pytest.mark.parametrize("skip", [0, 1])
def test_masked_weight(grid: tuple[int, int], weight_dtype: torch.dtype, out_dtype: torch.dtype, skip: int) -> None:
    # With `skip` no vector of 16 bytes is aligned.
    room = torch.randn(96 * 120 + skip, device=CUDA).to(weight_dtype)
    weight = room[skip:].view(96, 120)
    kept = torch.rand(grid, device=CUDA) < 0.5
    bits = pack_bits(kept)
    weight[~kept.repeat_interleave(96 // grid[0], 0).repeat_interleave(120 // grid[1], 1)] = NAN
    exact = torch.empty(96, 120, dtype=out_dtype, device=CUDA)
    masked_weight_reference(weight, bits, grid, exact)
    assert torch.equal(masked_weight(weight, bits, grid, dtype=out_dtype), exact)
    if weight_dtype == out_dtype:
        assert torch.equal(masked_weight(weight, bits, grid, out=weight), exact)


def test_more_than_two_to_the_31() -> None:
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of free GPU memory")
    scores = torch.empty(count, device=CUDA).uniform_(-1, 1)
    num_pruned = count - 1000
    bits = select_mask([scores], num_pruned)[0]
    (places,) = torch.nonzero(bits, as_tuple=True)
    kept = unpack_bits(bits[places], (8 * len(places),)).view(-1, 8)
    index = (places[:, None] * 8 + torch.arange(8, device=CUDA))[kept]
    assert len(index) == 1000
    limit = scores[index].min()
    scores[index] = -2.0
    assert scores.max() <= limit
