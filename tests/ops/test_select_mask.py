from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.ops import masked_weight, pack_bits, select_mask, threshold_mask, unpack_bits
from sparsebert.ops._backend import OPS

INF, NAN = float("inf"), float("nan")
# Fixtures only name an instruction set here, which every example may share.
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

KINDS: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "normal": lambda g, n: torch.randn(n, generator=g),
    "zeros": lambda g, n: torch.zeros(n),
    "few values": lambda g, n: torch.randint(-2, 3, (n,), generator=g).float(),
    "sorted": lambda g, n: torch.randn(n, generator=g).sort().values,
    "periodic": lambda g, n: (torch.arange(n) % 769).float(),
    "mostly one": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.9, 5.0, torch.randn(n, generator=g)),
    "denormal": lambda g, n: torch.randint(0, 50, (n,), generator=g) * 1e-45,
    "special": lambda g, n: torch.tensor([INF, -INF, 0.0, -0.0, 1.0])[torch.randint(0, 5, (n,), generator=g)],
}


@st.composite
def score_lists(draw: st.DrawFn) -> list[Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sizes = draw(st.lists(st.sampled_from([0, 1, 7, 8, 9, 100, 1001, 40000, 70001]), min_size=1, max_size=4))
    return [KINDS[draw(st.sampled_from(sorted(KINDS)))](generator, n) for n in sizes]


def oracle(scores: list[Tensor], num_pruned: int) -> list[Tensor]:
    """The promise, in numpy: a stable ascending order, whose first places are pruned."""
    flat = np.concatenate([score.reshape(-1).double().numpy() for score in scores]) + 0.0
    kept = np.ones(flat.size, dtype=bool)
    kept[np.argsort(flat, kind="stable")[:num_pruned]] = False
    return [pack_bits(part) for part in torch.from_numpy(kept).split([score.numel() for score in scores])]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@shared
@given(scores=score_lists(), share=st.sampled_from([0.0, 0.001, 0.3, 0.5, 0.9, 0.999, 1.0]))
def test_the_smallest_are_pruned_and_of_equals_the_earliest(isa: str, scores: list[Tensor], share: float) -> None:
    num_pruned = int(share * sum(score.numel() for score in scores))
    bits = select_mask(scores, num_pruned)
    assert same(bits, oracle(scores, num_pruned))
    pruned = sum(int((~unpack_bits(b, s.shape)).sum()) for b, s in zip(bits, scores, strict=True))
    assert pruned == num_pruned


@shared
@given(scores=score_lists(), share=st.floats(0, 1))
def test_the_reference_keeps_the_promise_too(
    monkeypatch: pytest.MonkeyPatch, scores: list[Tensor], share: float
) -> None:
    monkeypatch.setenv("SPARSEBERT_BACKEND", "reference")
    num_pruned = int(share * sum(score.numel() for score in scores))
    assert same(select_mask(scores, num_pruned), oracle(scores, num_pruned))


def sampled_places(total: int) -> Tensor:
    """Where the kernel samples 8192 of `total` scores, by its own fixed generator."""
    state, width, places = 0x9E3779B97F4A7C15, total // 8192, []
    for i in range(8192):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        places.append(i * width + (state >> 33) % width)
    return torch.tensor(places)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_sample_that_misleads_costs_time_but_not_correctness(isa: str, share: float) -> None:
    total = 60000
    scores = torch.rand(total)
    num_pruned = int(share * total)
    scores[sampled_places(total)] = 1000 + torch.rand(8192)  # all seen are above all unseen
    assert same(select_mask([scores], num_pruned), oracle([scores], num_pruned))
    scores[sampled_places(total)] = torch.rand(8192).round() * 4 - 2  # everything unseen lies inside the bracket
    assert same(select_mask([scores], num_pruned), oracle([scores], num_pruned))


@pytest.mark.parametrize("num_pruned", [1, 65535, 65536, 65537, 70000, 139999])
def test_ties_across_chunks_and_tensors(isa: str, num_pruned: int) -> None:
    scores = [torch.zeros(70000), torch.zeros(70000)]
    assert same(select_mask(scores, num_pruned), oracle(scores, num_pruned))


def test_minus_zero_equals_zero(backend: str) -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert unpack_bits(select_mask([scores], 2)[0], (4,)).tolist() == [False, False, True, True]


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("num_pruned", [0, 3, 40005])
def test_a_nan_is_an_error_that_names_the_tensor(backend: str, where: int, num_pruned: int) -> None:
    scores = [torch.randn(5), torch.randn(40000)]
    scores[where][3] = NAN
    with pytest.raises(ValueError, match=rf"scores\[{where}\]: has a NaN"):
        select_mask(scores, num_pruned)
    with pytest.raises(ValueError, match=rf"scores\[{where}\]: has a NaN"):
        threshold_mask(scores, 0.0)


@pytest.mark.parametrize("num_pruned", [-1, 13])
def test_num_pruned_out_of_range(num_pruned: int) -> None:
    with pytest.raises(ValueError, match=f"num_pruned: expected 0 to 12 .* got {num_pruned}"):
        select_mask([torch.randn(3, 4)], num_pruned)


def test_no_scores_give_no_bits(backend: str) -> None:
    assert select_mask([], 0) == [] and threshold_mask([], 0.0) == []
    assert [b.numel() for b in select_mask([torch.empty(0), torch.empty(3, 0)], 0)] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_ranked_exactly(dtype: torch.dtype) -> None:
    scores = [torch.randn(50, 9).to(dtype), torch.randn(33).to(dtype)]
    if dtype == torch.float64:
        scores[0] = 1 + torch.arange(450, dtype=dtype).view(50, 9) * 1e-12  # all equal as float32
    assert same(select_mask(scores, 200), oracle(scores, 200))


def test_strides_and_offsets_do_not_matter(backend: str) -> None:
    whole = torch.randn(40, 30)
    for scores in (whole.t(), whole[3:, 5:], whole.view(-1)[7:]):
        assert same(select_mask([scores], 300), oracle([scores], 300))


def test_threads_and_repeats_give_the_same_bits(threads: Callable[[int], None]) -> None:
    scores = [torch.randint(0, 1000, (300, 768)).float(), torch.randn(200, 768)]
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(select_mask(scores, 200_000))
    assert same(results[0], results[1]) and same(results[1], results[2])


@given(threshold=st.floats(allow_nan=False), seed=st.integers(0, 99))
def test_the_threshold_is_not_rounded(threshold: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    near = np.float32(threshold) if abs(threshold) < 3e38 else np.float32(0)
    ends = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    scores = torch.cat([torch.randn(20, generator=generator), torch.tensor(np.array(ends)), torch.tensor([INF, -INF])])
    kept = unpack_bits(threshold_mask([scores], threshold)[0], scores.shape)
    assert kept.tolist() == [value > threshold for value in scores.tolist()]


def test_thresholds_by_hand(backend: str) -> None:
    first, second = threshold_mask([torch.tensor([0.5, 0.6, -1.0]), torch.tensor([[0.51], [0.0]])], 0.5)
    assert (first.tolist(), second.tolist()) == ([0b010], [0b01])
    with pytest.raises(ValueError, match="threshold: expected a number, got NaN"):
        threshold_mask([torch.zeros(3)], NAN)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_fused_pass_writes_the_masked_weights(
    backend: str, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    scores = [torch.randn(12, 20), torch.randn(5, 3), torch.randn(1, 7)]
    weights = [torch.randn(12, 20), torch.randn(10, 9), torch.randn(64, 7)]
    weights = [weight.to(weight_dtype) for weight in weights]
    weights[0][0] = NAN
    out = [torch.full(weight.shape, NAN, dtype=out_dtype) for weight in weights]
    bits = select_mask(scores, 130, weights, out)
    assert same(bits, oracle(scores, 130))
    for b, score, weight, result in zip(bits, scores, weights, out, strict=True):
        rows, cols = weight.shape[0] // score.shape[0], weight.shape[1] // score.shape[1]
        kept = unpack_bits(b, score.shape).repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        assert (result[~kept] == 0).all()
        torch.testing.assert_close(result[kept], weight[kept].to(out_dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(result, masked_weight(weight, b, score.shape, dtype=out_dtype), equal_nan=True)


def test_out_may_be_the_weight_and_its_version_moves(backend: str) -> None:
    score, weight = torch.randn(6, 6), torch.randn(6, 6)
    expected, before = weight.clone(), weight._version
    bits = select_mask([score], 18, [weight], [weight])
    assert torch.equal(weight, torch.where(unpack_bits(bits[0], (6, 6)), expected, torch.zeros(())))
    assert weight._version > before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "weights and out: give both"),
        ({"weights": []}, "weights and out: expected 1 like scores, got 0 and 1"),
        ({"weights": [torch.zeros(5, 8)]}, r"scores\[0\]: \[4, 8\] does not divide the matrix \[5, 8\]"),
        ({"out": [torch.zeros(4, 9)]}, r"out\[0\]: expected float \[4, 8\] like its weight"),
        ({"out": [torch.zeros(4, 8, dtype=torch.int32)]}, r"out\[0\]: expected float"),
        ({"out": [torch.zeros(8, 4).t()]}, r"out\[0\]: expected a contiguous tensor"),
        ({"scores": [torch.zeros(32)]}, r"scores\[0\]: expected two sizes"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, list[Tensor] | None], message: str) -> None:
    arguments = {"scores": [torch.zeros(4, 8)], "weights": [torch.zeros(4, 8)], "out": [torch.zeros(4, 8)], **change}
    with pytest.raises(ValueError, match=message):
        select_mask(num_pruned=0, **arguments)


def test_scores_must_be_floats() -> None:
    with pytest.raises(TypeError, match=r"scores\[0\]: expected a float tensor, got torch\.int64"):
        select_mask([torch.arange(3)], 1)


def test_an_instruction_set_nobody_has_is_an_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "cpu":
        pytest.skip("the reference has no instruction sets")
    monkeypatch.setenv("SPARSEBERT_ISA", "avx1024")
    with pytest.raises(
        RuntimeError, match="SPARSEBERT_ISA: expected avx512_bf16, avx512, avx2 or generic, got avx1024"
    ):
        select_mask([torch.zeros(3)], 1)


def test_compiled_into_a_graph_it_does_the_same(backend: str) -> None:
    scores, weights = [torch.randn(8, 8)], [torch.randn(8, 8)]
    out = [torch.empty(8, 8)]

    def masks(values: list[Tensor]) -> list[Tensor]:
        return select_mask(values, 20, weights, out)

    bits = torch.compile(masks, fullgraph=True, backend="aot_eager")(scores)
    assert same(bits, oracle(scores, 20))
    assert torch.equal(out[0], masked_weight(weights[0], bits[0]))


@pytest.mark.parametrize("name", ["select_mask", "threshold_mask"])
def test_opcheck(backend: str, name: str) -> None:
    scores, weights = [torch.randn(4, 8), torch.randn(3)], [torch.randn(8, 8)]
    bits = [torch.empty(4, dtype=torch.uint8), torch.empty(1, dtype=torch.uint8)]
    op = OPS[name].pick(torch.device("cpu"))
    limit = 12 if name == "select_mask" else 0.3
    torch.library.opcheck(op, (scores, limit, [], bits, []))
    torch.library.opcheck(op, (scores[:1], limit, weights, bits[:1], [torch.empty(8, 8)]))
