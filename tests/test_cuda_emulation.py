"""The CUDA kernels' bodies, run on the host block after block: their digits, ties, tiles and indices."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert import _load
from sparsebert.ops import pack_bits, unpack_bits
from sparsebert.ops.bits import bytes_for
from sparsebert.ops.nm_mask import nm_mask_reference
from sparsebert.ops.select_mask import select_mask_reference, threshold_mask_reference
from sparsebert.ops.split_weight_grad import split_weight_grad_reference

INF, NAN = float("inf"), float("nan")
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def host() -> ModuleType:
    module = _load.host()
    if module is None or not hasattr(module, "emulate_select"):
        pytest.skip("the host module was not built")
    return module


def buffer(tensor: Tensor | None) -> Any:
    """The tensor's own memory; bfloat16 as the words it is stored in."""
    if tensor is None:
        return None
    flat = tensor.detach().view(-1)
    return (flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat).numpy()


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def new_bits(scores: list[Tensor]) -> list[Tensor]:
    return [torch.full((bytes_for(score.numel()),), 0xA5, dtype=torch.uint8) for score in scores]


def values(draw: st.DrawFn, count: int) -> Tensor:
    """Scores with few or many ties, zeros of both signs, infinities, denormals, all of one exponent."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    kind = draw(st.sampled_from(["normal", "few", "special", "one", "narrow", "denormal"]))
    if kind == "normal":
        return torch.randn(count, generator=generator)
    if kind == "few":
        return torch.randint(-2, 3, (count,), generator=generator).float()
    if kind == "special":
        table = torch.tensor([INF, -INF, 0.0, -0.0, 1.0, -1.0, 3.4e38, -3.4e38, 1e-45, -1e-45])
        return table[torch.randint(0, len(table), (count,), generator=generator)]
    if kind == "one":
        return torch.full((count,), draw(st.sampled_from([0.0, -0.0, 2.5, -INF, INF])))
    if kind == "narrow":
        return 1 + torch.randint(0, 64, (count,), generator=generator) * 2.0**-23
    return torch.randint(-9, 10, (count,), generator=generator) * 1e-45


@st.composite
def launches(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "blocks": draw(st.integers(1, 9)),
        "threads": draw(st.sampled_from([1, 2, 32, 33, 64, 640])),
        "capacity": 8 * draw(st.sampled_from([0, 1, 4, 1000])),
        "backwards": draw(st.booleans()),
    }


@st.composite
def selections(draw: st.DrawFn) -> dict[str, Any]:
    scores, weights, out, grids = [], [], [], []
    with_weights = draw(st.booleans())
    for _ in range(draw(st.integers(1, 4))):
        rows, cols = draw(st.integers(0, 9)), draw(st.integers(1, 40))
        height, width = draw(st.sampled_from([(1, 1), (1, 1), (2, 3), (1, 8), (4, 1), (3, 16)]))
        # Every other tensor starts off a multiple of 16 bytes.
        skip = draw(st.sampled_from([0, 1]))
        score = values(draw, rows * cols + skip)[skip:].view(rows, cols)
        scores.append(score)
        if with_weights and rows:
            dtypes = st.sampled_from([torch.float32, torch.bfloat16])
            weights.append(torch.randn(rows * height, cols * width).to(draw(dtypes)))
            out.append(poisoned((rows * height, cols * width), draw(dtypes)))
            grids.append([rows, cols, height, width])
    if len(out) != len(scores):
        weights, out, grids = [], [], []
    return {"scores": scores, "weights": weights, "out": out, "grids": grids}


def emulate(
    host: ModuleType, case: dict[str, Any], launch: dict[str, Any], num_pruned: int | None, threshold: float = 0.0
) -> tuple[int, list[Tensor]]:
    bits = new_bits(case["scores"])
    lists = {name: [buffer(tensor) for tensor in case[name]] for name in ("scores", "weights", "out")}
    found = host.emulate_select(
        **lists,
        bits=[buffer(tensor) for tensor in bits],
        num_pruned=num_pruned,
        threshold=threshold,
        grids=case["grids"],
        **launch,
    )
    return found, bits


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@shared
@given(case=selections(), launch=launches(), share=st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]))
def test_the_smallest_are_pruned_and_of_equals_the_earliest(
    host: ModuleType, case: dict[str, Any], launch: dict[str, Any], share: float
) -> None:
    num_pruned = round(share * sum(score.numel() for score in case["scores"]))
    found, bits = emulate(host, case, launch, num_pruned)
    expected, products = new_bits(case["scores"]), [poisoned(tuple(out.shape), out.dtype) for out in case["out"]]
    select_mask_reference(case["scores"], num_pruned, case["weights"], expected, products)
    assert found == -1 and same(bits, expected) and same(case["out"], products)


@shared
@given(case=selections(), launch=launches(), threshold=st.sampled_from([0.0, -0.0, 1.0, 1e-50, -1e-50, -INF, INF, 0.1]))
def test_thresholds(host: ModuleType, case: dict[str, Any], launch: dict[str, Any], threshold: float) -> None:
    found, bits = emulate(host, case, launch, None, threshold)
    expected, products = new_bits(case["scores"]), [poisoned(tuple(out.shape), out.dtype) for out in case["out"]]
    threshold_mask_reference(case["scores"], threshold, case["weights"], expected, products)
    assert found == -1 and same(bits, expected) and same(case["out"], products)


@shared
@given(case=selections(), launch=launches(), num_pruned=st.sampled_from([None, 0, 1, 3]), where=st.integers(0, 10**6))
def test_the_first_tensor_with_a_nan_is_told_and_nothing_looks_usable(
    host: ModuleType, case: dict[str, Any], launch: dict[str, Any], num_pruned: int | None, where: int
) -> None:
    total = sum(score.numel() for score in case["scores"])
    if total < 3:
        return
    flat = where % total
    first = 0
    while flat >= case["scores"][first].numel():
        flat -= case["scores"][first].numel()
        first += 1
    case["scores"][first].view(-1)[flat] = NAN
    case["scores"][-1].view(-1)[-1:] = -NAN
    found, bits = emulate(host, case, launch, num_pruned)
    assert found == first
    assert all(int(packed.sum()) == 0 for packed in bits) and all(bool(out.isnan().all()) for out in case["out"])


@shared
@given(case=selections(), launch=launches(), num_pruned=st.sampled_from([None, 0, 1, 3]), nan=st.booleans())
def test_weights_written_over_survive_a_nan(
    host: ModuleType, case: dict[str, Any], launch: dict[str, Any], num_pruned: int | None, nan: bool
) -> None:
    total = sum(score.numel() for score in case["scores"])
    if total < 3 or not case["out"]:
        return
    case["out"] = case["weights"]
    before = [weight.clone() for weight in case["weights"]]
    if nan:
        next(score for score in case["scores"] if score.numel()).view(-1)[0] = NAN
        assert emulate(host, case, launch, num_pruned)[0] >= 0
        assert same(case["weights"], before)
        return
    _, bits = emulate(host, case, launch, num_pruned)
    products = [poisoned(tuple(out.shape), out.dtype) for out in case["out"]]
    if num_pruned is None:
        threshold_mask_reference(case["scores"], 0.0, before, bits, products)
    else:
        select_mask_reference(case["scores"], num_pruned, before, bits, products)
    assert same(case["out"], products)


@pytest.mark.parametrize("capacity", [0, 512, 8192])
@pytest.mark.parametrize("num_pruned", [1, 4095, 4096, 4097, 11111, 19999])
def test_ties_across_blocks_and_tensors(host: ModuleType, num_pruned: int, capacity: int) -> None:
    scores = [torch.zeros(7001), torch.randn(3001).round(), torch.zeros(9998)]
    case = {"scores": scores, "weights": [], "out": [], "grids": []}
    _, bits = emulate(
        host, case, {"blocks": 7, "threads": 64, "capacity": capacity, "backwards": capacity == 512}, num_pruned
    )
    expected = new_bits(scores)
    select_mask_reference(scores, num_pruned, [], expected, [])
    assert same(bits, expected)


@shared
@given(data=st.data(), launch=launches(), m=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 31, 32]))
def test_nm(host: ModuleType, data: st.DataObject, launch: dict[str, Any], m: int) -> None:
    groups, n = data.draw(st.integers(0, 400)), data.draw(st.integers(0, m))
    scores = values(data.draw, groups * m)
    threshold = data.draw(st.sampled_from([None, 0.0, 1.0, -INF]))
    bits = new_bits([scores])[0]
    launch = {name: launch[name] for name in ("blocks", "threads", "backwards")}
    assert not host.emulate_nm(buffer(scores), buffer(bits), n, m, threshold, **launch)
    assert torch.equal(bits, nm_mask_reference(scores.view(1, -1), n, m, threshold))
    if groups:
        scores[data.draw(st.integers(0, groups * m - 1))] = NAN
        assert host.emulate_nm(buffer(scores), buffer(bits), n, m, threshold, **launch)


# Rows, columns, height and width of the cells.
TALL = [(1, 300, 70, 1), (3, 300, 5, 1), (2, 9, 37, 64), (1, 2, 65, 256), (2, 3, 128, 128), (1, 1, 100, 700)]
WIDE = [(6, 40, 1, 8), (40, 3, 1, 100), (9, 1, 1, 600), (3, 2, 2, 300)]
SMALL = [(5, 9, 1, 1), (7, 5, 3, 7), (4, 3, 16, 16), (3, 5, 32, 32)]
GRIDS = st.sampled_from([*TALL, *WIDE, *SMALL])


@shared
@given(
    grid=GRIDS,
    dtypes=st.tuples(*2 * [st.sampled_from([torch.float32, torch.bfloat16])]),
    needs=st.sampled_from([(True, True), (True, False), (False, True)]),
    blocks=st.integers(1, 9),
    backwards=st.booleans(),
    seed=st.integers(0, 999),
)
def test_split(
    host: ModuleType,
    grid: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    blocks: int,
    backwards: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    shape, cells = (grid[0] * grid[2], grid[1] * grid[3]), grid[:2]
    product, weight = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
    kept = torch.rand(cells) < 0.5
    bits = pack_bits(kept)
    scores = poisoned(cells, torch.float32) if needs[0] else None
    dense = poisoned(shape, weight.dtype) if needs[1] else None
    product[~kept.repeat_interleave(grid[2], 0).repeat_interleave(grid[3], 1)] = NAN if not needs[0] else 1.0
    arguments = [buffer(tensor) for tensor in (product, weight, bits)]
    host.emulate_split(*arguments, list(grid), buffer(scores), buffer(dense), blocks, backwards)
    if dense is not None:
        assert torch.equal(dense, split_weight_grad_reference(product, weight, bits, cells, False, True)[1])
    if scores is not None:
        exact = split_weight_grad_reference(product.double(), weight.double(), None, cells, True, False)[0]
        terms = split_weight_grad_reference(product.double().abs(), weight.double().abs(), None, cells, True, False)[0]
        assert ((scores.double() - exact).abs() <= 1e-6 * terms).all()
        again = poisoned(cells, torch.float32)
        host.emulate_split(*arguments, list(grid), buffer(again), None, blocks % 9 + 1, not backwards)
        assert torch.equal(scores, again)


def test_unpacked_by_hand(host: ModuleType) -> None:
    scores = torch.tensor([3.0, -0.0, 0.0, INF, 0.0, -INF, -1.0, 0.0, 5.0])
    case = {"scores": [scores], "weights": [], "out": [], "grids": []}
    launch = {"blocks": 2, "threads": 1, "capacity": 8, "backwards": False}
    _, bits = emulate(host, case, launch, 4)
    assert unpack_bits(bits[0], (9,)).tolist() == [True, False, False, True, True, False, False, True, True]
