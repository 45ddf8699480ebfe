"""The 2:4 layer on a GPU, each way of it, against the reference in float64; cuSPARSELt played by a fake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import check_error
from torch import Tensor

from sparsebert.formats import SemiStructured
from sparsebert.ops._linear import ACTIVATIONS
from sparsebert.ops.semi_structured_linear import semi_structured_linear, semi_structured_linear_reference

pytest.importorskip("triton")


def make(
    device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, pattern: tuple[int, int] = (2, 4), seed: int = 0
) -> tuple[Tensor, SemiStructured, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n, k), (n,)))
    kept = torch.rand(n, k // pattern[1], pattern[1], generator=generator).argsort(2).view(n, k) < pattern[0]
    stored = SemiStructured.from_dense(weight.to(device), kept.to(device), pattern)
    return x.to(device), stored, bias.to(device)


def call(x: Tensor, stored: SemiStructured, bias: Tensor | None, activation: str = "none") -> Tensor:
    options: dict[str, Any] = {"pattern": stored.pattern, "activation": activation}
    return semi_structured_linear(x, stored.values, stored.positions, bias, **options)


def check(x: Tensor, stored: SemiStructured, bias: Tensor, activation: str) -> None:
    y = call(x, stored, bias, activation)
    usual, exact = (
        semi_structured_linear_reference(
            x.to(dtype), stored.values.to(dtype), stored.positions, bias.to(dtype), stored.pattern, activation, []
        )
        for dtype in (x.dtype, torch.float64)
    )
    scale = x.double().abs() @ stored.to_dense().double().abs().t() + bias.double().abs()
    check_error(y, usual, exact, 2, scale)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.sampled_from([0, 1, 2, 17, 70]),
    n=st.sampled_from([1, 5, 16, 48, 70]),
    k=st.sampled_from([4, 12, 64, 128, 132]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_decoded_within_torchs_own_error(
    triton_backend: torch.device, activation: str, m: int, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    check(*make(triton_backend, m, n, k, dtype, seed=seed), activation)


@pytest.mark.parametrize(
    ("dtype", "pattern"), [(torch.float32, (2, 4)), (torch.bfloat16, (1, 4)), (torch.bfloat16, (4, 8))]
)
def test_expanded(triton_backend: torch.device, dtype: torch.dtype, pattern: tuple[int, int]) -> None:
    for m in (3, 140):
        x, stored, bias = make(triton_backend, m, 20, 72, dtype, pattern)
        double = (x.double(), stored.to_dense().double(), bias.double())
        expected = torch.nn.functional.gelu(torch.nn.functional.linear(*double))
        y = call(x, stored, bias, "gelu")
        torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_beyond_the_edges_is_used_and_the_same_bits(triton_backend: torch.device) -> None:
    x, stored, bias = make(triton_backend, 19, 40, 44, torch.bfloat16)
    expected = call(x, stored, bias, "gelu")
    guarded = []
    for tensor in (x, stored.values, stored.positions, bias):
        whole = tensor.new_full(
            (len(tensor) + 200, *tensor.shape[1:]), 255 if tensor is stored.positions else torch.nan
        )
        whole[100:-100] = tensor
        guarded.append(whole[100:-100])
    y = semi_structured_linear(*guarded, pattern=(2, 4), activation="gelu")
    assert torch.equal(y, expected) and torch.equal(call(x.view(1, 19, 44), stored, bias, "gelu")[0], expected)


def test_gradients_of_weight_and_bias(triton_backend: torch.device) -> None:
    x, stored, bias = make(triton_backend, 9, 16, 32, torch.float32)
    values, shift = stored.values.clone().requires_grad_(), bias.clone().requires_grad_()
    y = semi_structured_linear(x, values, stored.positions, shift, pattern=(2, 4))
    grad = torch.randn_like(y)
    dvalues, dbias = torch.autograd.grad(y, (values, shift), grad)
    torch.testing.assert_close(stored.replaced(values=dvalues).to_dense(), (grad.t() @ x) * stored.stored())
    torch.testing.assert_close(dbias, grad.sum(0))


class CuSparseLt:
    """What torch offers of cuSPARSELt, by a dense product; counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wrong: int | None = None) -> None:
        from sparsebert.kernels import _fastest
        from sparsebert.kernels import _two_four_units as units

        self.chosen: dict[Any, str] = {}
        self.units, self.packed, self.searched, self.wrong = units, 0, 0, wrong
        self.ours_packed, self.ours_wrong = 0, False
        self.used: list[int] = []
        monkeypatch.setattr(torch, "_cslt_compress", self.compress)
        monkeypatch.setattr(torch, "_cslt_sparse_mm", self.multiply)
        monkeypatch.setattr(torch, "_cslt_sparse_mm_search", self.search)
        # Seconds by the call's own name; what is not named takes one.
        self.seconds = {"cusparselt": 0.5}
        monkeypatch.setattr(units, "there", lambda device: self.there)
        monkeypatch.setattr(_fastest, "seconds", self.timed)
        monkeypatch.setattr(_fastest, "chosen", self.chosen)
        monkeypatch.setattr(units, "_BY", {name: self.counted(name, by) for name, by in units._BY.items()})
        for name in ("_algorithms", "_weights"):
            monkeypatch.setattr(units, name, {})

    there: tuple[str, ...] = ("cusparselt",)

    def counted(self, name: str, by: Any) -> Any:
        def run(call: Any) -> Tensor:
            self.last = name
            return by(call)

        return run

    def timed(self, run: Any, device: torch.device) -> float:
        self.last = "expanded"
        run()
        return self.seconds.get(self.last, 1.0)

    def compress(self, weight: Tensor) -> Tensor:
        self.packed += 1
        return weight.clone()

    def multiply(
        self, packed: Tensor, x: Tensor, *, bias: Tensor | None, transpose_result: bool, alg_id: int
    ) -> Tensor:
        assert transpose_result and x.shape[1] % 8 == 0 and x.stride(0) == 1
        self.used.append(alg_id)
        y = torch.nn.functional.linear(x.t(), packed, bias)
        return y * 2 if alg_id == self.wrong else y

    def search(self, packed: Tensor, x: Tensor, *, bias: Tensor | None, transpose_result: bool) -> int:
        self.searched += 1
        return 3


def test_cusparselt_packs_once_a_weight_and_searches_once_a_shape(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = CuSparseLt(monkeypatch)
    x, stored, bias = make(triton_backend, 141, 32, 64, torch.bfloat16)
    for activation in ("none", "gelu"):
        check(x, stored, bias, activation)
    assert call(x, stored, bias).is_contiguous()
    # The activation is part of the shape: without it and with it, each once.
    assert (fake.packed, fake.searched, fake.used[-1]) == (1, 2, 3)
    call(x[:130], stored, bias)
    assert fake.searched == 2 and fake.packed == 1
    call(torch.cat((x, x)), stored, bias)
    assert fake.searched == 3 and fake.packed == 1


def packed_at(fake: CuSparseLt) -> list[int]:
    return [entry[2][0].data_ptr() for entry in fake.units._weights.values()]


def test_a_weight_that_changes_or_goes_is_packed_anew(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = CuSparseLt(monkeypatch)
    x, stored, bias = make(triton_backend, 136, 32, 64, torch.bfloat16)
    call(x, stored, bias)
    stored.values.mul_(2)
    check(x, stored, bias, "none")
    assert fake.packed == 2 and len(fake.units._weights) == 1
    # In the same place: a captured graph reads it there.
    place = packed_at(fake)
    with torch.inference_mode():
        stored.values.mul_(2)
        check(x, stored, bias, "none")
    stored.values.mul_(2)
    check(x, stored, bias, "none")
    assert fake.packed == 4 and packed_at(fake) == place
    del stored
    _, other, _ = make(triton_backend, 136, 32, 64, torch.bfloat16, seed=1)
    check(x, other, bias, "none")
    assert fake.packed == 5 and len(fake.units._weights) == 1
    with torch.inference_mode():
        _, other, _ = make(triton_backend, 136, 32, 64, torch.bfloat16, seed=2)
        check(x, other, bias, "none")
        other.values.mul_(2)
        check(x, other, bias, "none")


def test_an_algorithm_that_is_wrong_is_not_used(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = CuSparseLt(monkeypatch, wrong=3)
    x, stored, bias = make(triton_backend, 136, 32, 64, torch.bfloat16)
    check(x, stored, bias, "none")
    assert fake.used[-1] == 0


def test_where_it_fails_the_dense_product_runs_and_says_so_once(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    CuSparseLt(monkeypatch)

    def fails(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("CUDA error: operation not supported when calling cusparseLtMatmul")

    monkeypatch.setattr(torch, "_cslt_sparse_mm", fails)
    x, stored, bias = make(triton_backend, 136, 32, 64, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=r"semi_structured_linear: cuSPARSELt failed .* another way runs") as warned:
        check(x, stored, bias, "gelu")
        check(x, stored, bias, "gelu")
    assert len(warned) == 1


def test_which_units_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebert.kernels import _two_four_units as units

    assert units.there(torch.device("cpu")) == ()
    assert not units.is_compiled("no_such_op")
    monkeypatch.setattr(units, "is_compiled", lambda op: op == "semi_structured_packed_linear")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    for sm, there in ((75, ()), (80, ("cusparselt",)), (90, ("packed", "cusparselt")), (100, ("cusparselt",))):
        monkeypatch.setattr(units, "capability", lambda device, sm=sm: sm)
        assert units.there(torch.device("cuda")) == there


def ours_by_definition(monkeypatch: pytest.MonkeyPatch, fake: CuSparseLt) -> None:
    """Our own unit, by its definition."""
    from sparsebert import ops

    def ours(call: Any) -> Tensor:
        fake.last = "packed"
        packed = fake.units._packed("packed", call)
        y = ops.semi_structured_packed_linear(
            call.x, packed, call.bias, shape=(len(call.values), call.x.shape[1]), activation=call.activation
        )
        return y + 1 if fake.ours_wrong else y

    def pack(unit: str, call: Any) -> Tensor:
        fake.ours_packed += 1
        return ops.semi_structured_pack(call.values, call.positions)

    usual = fake.units._pack
    monkeypatch.setattr(fake.units, "_pack", lambda unit, call: (pack if unit == "packed" else usual)(unit, call))
    fake.units._BY["packed"] = ours
    fake.there = ("packed", "cusparselt")


@pytest.mark.parametrize("fastest", ["packed", "cusparselt", "expanded"])
def test_the_fastest_way_is_kept_for_a_shape(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    fake = CuSparseLt(monkeypatch)
    monkeypatch.delenv("SPARSEBERT_BACKEND")
    ours_by_definition(monkeypatch, fake)
    fake.seconds = {fastest: 0.1}
    x, stored, bias = make(triton_backend, 136, 32, 64, torch.bfloat16)
    arguments = (x, stored.values, stored.positions, bias, (2, 4), "gelu", [])
    from sparsebert.kernels.semi_structured_linear import semi_structured_linear as kernel

    first = kernel(*arguments)
    assert list(fake.chosen.values()) == [fastest]
    fake.last = "expanded"
    second = kernel(*arguments)
    assert fake.last == fastest and fake.ours_packed == 1
    for y in (first, second):
        torch.testing.assert_close(y, semi_structured_linear_reference(*arguments), rtol=0.02, atol=0.05)


def test_a_unit_with_wrong_numbers_is_left_out_with_a_warning(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = CuSparseLt(monkeypatch)
    monkeypatch.delenv("SPARSEBERT_BACKEND")
    ours_by_definition(monkeypatch, fake)
    fake.seconds, fake.ours_wrong = {"packed": 0.1, "cusparselt": 0.2}, True
    x, stored, bias = make(triton_backend, 136, 32, 64, torch.bfloat16)
    from sparsebert.kernels.semi_structured_linear import semi_structured_linear as kernel

    # By numbers that are not finite nothing can be told, and nothing is chosen.
    kernel(x * torch.inf, stored.values, stored.positions, bias, (2, 4), "none", [])
    assert not fake.chosen
    with pytest.warns(RuntimeWarning, match="our kernel is wrong .* another way runs in its place"):
        kernel(x, stored.values, stored.positions, bias, (2, 4), "none", [])
    assert list(fake.chosen.values()) == ["cusparselt"]


def test_under_capture_nothing_is_measured_searched_or_kept(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, fake = triton_backend, CuSparseLt(monkeypatch)
    monkeypatch.setattr(fake.units.Question, "capturing", True)
    x, stored, bias = make(device, 136, 32, 64, torch.bfloat16)
    check(x, stored, bias, "gelu")
    assert fake.used == [0] and not (fake.units._weights or fake.chosen or fake.searched)


def test_which_way_and_what_it_costs() -> None:
    from sparsebert.kernels.semi_structured_linear import cost, packed_traffic, residue_cost, tiles, ways

    bf16, both = torch.bfloat16, ("packed", "cusparselt")
    assert ways(64, 768, 768, bf16, (2, 4), both) == ("decoded",)
    assert ways(4096, 768, 768, bf16, (2, 4), both) == ("packed", "cusparselt", "expanded")
    assert ways(4096, 768, 776, bf16, (2, 4), both) == ("packed", "expanded")
    for case in ((768, 768, torch.float32, (2, 4), both), (768, 768, bf16, (2, 4), ()),
                 (768, 772, bf16, (2, 4), both), (768, 768, bf16, (1, 4), both)):  # fmt: skip
        assert ways(4096, *case) == ("expanded",)
    assert tiles(1, 3072, bf16) == (32, 16, 32) and tiles(128, 768, bf16) == (16, 64, 32)
    few = cost(5, 768, 768)
    stored = 768 * 384 * 2 + 768 * 96
    assert few.read == 2 * (5 * 768 + 768) + stored and few.flops == 2 * 16 * 768 * 768 and few.launches == 1
    # Whole tiles of 128 x 64, with an eighth of their bytes for positions; nothing more for the activation.
    ours = cost(4096, 3072, 768, activation="gelu")
    assert ours.read == 2 * (4096 * 768 + 3072) + 24 * 12 * 9216 and ours.written == 2 * 4096 * 3072
    assert ours.flops == 4096 * 3072 * 768 and ours.launches == 1
    # 24 x 32 blocks in clusters of 4 x 2; 6 x 77 in 2 x 4 with three more to fill the last; 3 x 2 in 1 x 2.
    assert packed_traffic(4096, 3072, 768) == 24 * 32 * 12 * (9216 // 2 + 16384 // 4)
    assert packed_traffic(9830, 768, 3072) == 6 * 80 * 48 * (9216 // 4 + 16384 // 2)
    assert packed_traffic(256, 384, 64) == 3 * 2 * (9216 // 2 + 16384)
    many = cost(4096, 3072, 768, activation="gelu", how="cusparselt")
    assert many.flops == 4096 * 3072 * 768 and many.written == 2 * 2 * 4096 * 3072 and many.launches == 2
    # A residue: 48 groups of 64 rows, one chunk of 4 products, for 32 tiles of tokens.
    extra = residue_cost(4096, 3072, 1, 4)
    assert extra.read == 48 * 4 * 64 * 16 * 2 and extra.flops == 2 * 48 * 4 * 64 * 16 * 128 * 32
    made = cost(4096, 768, 768, how="expanded")
    assert made.written == 2 * (768 * 768 + 4096 * 768) and made.flops == 2 * 4096 * 768 * 768


def test_on_a_gpu_the_gradient_of_x_is_a_dense_product(
    triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    op = importlib.import_module("sparsebert.ops.semi_structured_linear")
    monkeypatch.setattr(op, "_prefers_dense", lambda grad: True)
    x, stored, bias = make(triton_backend, 9, 16, 32, torch.float32)
    leaf = x.clone().requires_grad_()
    y = semi_structured_linear(
        leaf, stored.values, stored.positions, bias, pattern=(2, 4), transposed=stored.transposed()
    )
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, leaf, grad)[0], grad @ stored.to_dense())
