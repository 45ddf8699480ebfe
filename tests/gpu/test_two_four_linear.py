"""2:4 and a residue on a GPU, either way of it, against the dense layer; our kernel played by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsebert import ops
from sparsebert.formats import TwoFour
from sparsebert.ops import two_four_linear
from sparsebert.ops._linear import linear_reference

pytest.importorskip("triton")


def make(device: torch.device, dtype: torch.dtype = torch.bfloat16, n: int = 40, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((36, 72), (n, 72), (n,)))
    kept = torch.rand(n, 72, generator=generator) < 0.3
    return x.to(device), TwoFour.from_dense(weight.to(device), kept.to(device)), bias.to(device)


def call(x: Tensor, stored: TwoFour, bias: Tensor | None, activation: str = "gelu") -> Tensor:
    return two_four_linear(
        x, stored.values, stored.positions, stored.places, bias, shape=stored.shape, activation=activation
    )


def check(x: Tensor, stored: TwoFour, bias: Tensor) -> None:
    expected = linear_reference(x.double(), stored.to_dense().double(), bias.double(), "gelu")
    coarse = x.dtype == torch.bfloat16
    y = call(x, stored, bias)
    torch.testing.assert_close(y.double(), expected, rtol=0.02 if coarse else 1e-5, atol=0.05 if coarse else 1e-5)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 40), (torch.bfloat16, 40), (torch.bfloat16, 37)])
def test_the_dense_product_elsewhere(triton_backend: torch.device, dtype: torch.dtype, n: int) -> None:
    x, stored, bias = make(triton_backend, dtype, n)
    check(x, stored, bias)
    check(x[:0], stored, bias)
    check(x[None, :5], stored, bias)


class Units:
    """Our kernel and its packing by their definitions; counts packings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from sparsebert.kernels import _fastest
        from sparsebert.kernels import _two_four_units as units

        self.chosen: dict[Any, str] = {}
        self.units, self.packed, self.wrong = units, 0, 0.0
        self.ours = 0
        monkeypatch.setattr(units, "_weights", {})
        monkeypatch.setattr(_fastest, "chosen", self.chosen)
        monkeypatch.setattr(_fastest, "seconds", self.seconds)
        monkeypatch.setattr(units, "there", lambda device: ("packed", "cusparselt"))
        monkeypatch.setattr(units, "_BY", {"packed": self.multiply})
        monkeypatch.setattr(units, "_pack", self.pack)

    faster = True

    def seconds(self, run: Any, device: torch.device) -> float:
        before = self.ours
        run()
        return 1.0 if (self.ours > before) == self.faster else 2.0

    def pack(self, unit: str, call: Any) -> list[Tensor]:
        assert unit == "packed"
        self.packed += 1
        return [ops.semi_structured_pack(call.values, call.positions), *self.units._residue(call, *call.rest)]

    def multiply(self, call: Any) -> Tensor:
        self.ours += 1
        packed, *residue = self.units._packed("packed", call)
        shape = (len(call.values), call.x.shape[1])
        y = ops.semi_structured_packed_linear(
            call.x, packed, call.bias, shape=shape, activation=call.activation, residue=residue
        )
        return y + self.wrong


@pytest.fixture
def units(triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> Units:
    made = Units(monkeypatch)
    # What plays our kernel is the reference, which a forced backend refuses.
    kernel = ops.semi_structured_packed_linear
    monkeypatch.setattr(ops, "semi_structured_packed_linear", unforced(kernel, monkeypatch))
    monkeypatch.setattr(ops, "semi_structured_pack", unforced(ops.semi_structured_pack, monkeypatch))
    return made


def unforced(body: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("SPARSEBERT_BACKEND", "reference")
            return body(*args, **options)

    return run


@pytest.mark.parametrize("faster", [True, False])
def test_the_faster_way_is_kept_for_a_shape(triton_backend: torch.device, units: Units, faster: bool) -> None:
    units.faster = faster
    x, stored, bias = make(triton_backend)
    check(x, stored, bias)
    assert list(units.chosen.values()) == ["packed" if faster else "expanded"]
    before = units.ours
    check(x, stored, bias)
    assert units.ours == before + faster and units.packed == 1


def test_a_weight_that_changes_is_packed_anew_in_place_and_with_the_same_sizes(
    triton_backend: torch.device, units: Units
) -> None:
    x, stored, bias = make(triton_backend)
    check(x, stored, bias)
    (held,) = (entry[2] for entry in units.units._weights.values())
    places = [part.data_ptr() for part in held]
    # Zeros too have their place, which a graph captured earlier reads.
    stored.values[-20:] = 0
    check(x, stored, bias)
    (held,) = (entry[2] for entry in units.units._weights.values())
    assert units.packed == 2 and [part.data_ptr() for part in held] == places
    # Another residue under the same 2:4 is another weight.
    kept = stored.residue() != 0
    moved = stored.places.clone()
    free = (~stored.stored()).flatten().nonzero()[:, 0]
    moved[-1] = free[-1]
    assert int(kept.sum()) and bool((moved[1:] > moved[:-1]).all())
    stored.places.copy_(moved)
    check(x, stored, bias)
    assert units.packed == 3
    _, other, _ = make(triton_backend, seed=1)
    del stored, held
    check(x, other, bias)
    assert len(units.units._weights) == 1


def test_a_kernel_with_wrong_numbers_is_left_out_with_a_warning(triton_backend: torch.device, units: Units) -> None:
    units.wrong = 1.0
    x, stored, bias = make(triton_backend)
    with pytest.warns(RuntimeWarning, match="two_four_linear: our kernel is wrong .* another way runs"):
        check(x, stored, bias)
    assert list(units.chosen.values()) == ["expanded"]


def test_under_capture_nothing_is_packed(
    triton_backend: torch.device, units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, stored, bias = make(triton_backend)
    monkeypatch.setattr(units.units.Question, "capturing", True)
    check(x, stored, bias)
    assert not units.packed
    monkeypatch.setattr(units.units.Question, "capturing", False)
    check(x, stored, bias)
    monkeypatch.setattr(units.units.Question, "capturing", True)
    before = units.ours
    check(x, stored, bias)
    assert (units.packed, units.ours) == (1, before + 1)
    # Changed since it was packed: the dense product, on what it is now.
    stored.values.mul_(2)
    check(x, stored, bias)
    assert (units.packed, units.ours) == (1, before + 1)
