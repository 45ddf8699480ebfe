from __future__ import annotations

import pytest
import torch
from gpu.row_losses import RowPromises
from ops import test_hidden_mse as on_cpu

from sparsebert.ops import hidden_mse


class TestHiddenMse(RowPromises):
    of = on_cpu.TestHiddenMse()
    # layers, batch, seq, width; more layers than a launch takes
    sizes = ((1, 1, 1, 1), (2, 2, 3, 5), (3, 1, 4, 16), (35, 1, 3, 8), (2, 1, 7, 2100), (3, 2, 9, 96))
    small = (2, 2, 4, 6)


def test_stacked_layers_are_the_same_as_a_list(triton_backend: torch.device) -> None:
    student, teacher = (torch.randn(3, 2, 5, 16, device=triton_backend) for _ in range(2))
    mask = torch.rand(2, 5, device=triton_backend) < 0.6
    for keep in (None, mask):
        stacked, listed = hidden_mse(student, teacher, keep), hidden_mse(list(student), list(teacher), keep)
        torch.testing.assert_close(stacked, listed, rtol=1e-6, atol=0)


def test_all_layers_are_one_launch() -> None:
    from sparsebert.kernels.hidden_mse import cost

    # 13 layers of 16,384 x 768: 2 reads, 1 write; 16 rows of 256 columns a program; the sums; the mask.
    found = cost(13, 16384, 768)
    elements, programs = 13 * 16384 * 768, 13 * 1024
    assert found.launches == 3
    assert found.read == 4 * elements + 13 * 16384 + 4 * programs + 16384
    assert found.written == 2 * elements + 4 * programs + 4 + 8
    assert cost(33, 64, 768, masked=False).launches == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_is_scaled_where_it_lies(triton_backend: torch.device, dtype: torch.dtype) -> None:
    from sparsebert.kernels._losses import scale_

    for size in (0, 1, 4096, 5000):
        memory = torch.randn(size + 8, device=triton_backend).to(dtype)
        for factor in (1.0, -0.3):
            by, expected = torch.tensor(factor, device=triton_backend), memory.clone()
            expected[3 : 3 + size] = (expected[3 : 3 + size].float() * by).to(dtype)
            scale_(memory[3 : 3 + size], by)
            torch.testing.assert_close(memory, expected, rtol=torch.finfo(dtype).eps, atol=0.0)


def test_a_scaling_that_fails_is_done_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebert.kernels import _losses as kernels
    from sparsebert.ops import _backend, _losses

    def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resource")

    monkeypatch.delenv("SPARSEBERT_BACKEND", raising=False)
    monkeypatch.setattr(kernels, "scale_", scale_)
    monkeypatch.setattr(_backend, "_failed", {})
    _losses._in_place.cache_clear()
    try:
        by = torch.tensor(3.0)
        with pytest.warns(RuntimeWarning, match="gradient: its Triton kernel could not be built or launched"):
            assert _losses._in_place()(torch.ones(2), by).tolist() == [3.0, 3.0]
        assert _losses._in_place()(torch.ones(2), by).tolist() == [3.0, 3.0]
        monkeypatch.setenv("SPARSEBERT_BACKEND", "triton")
        with pytest.raises(RuntimeError, match="out of resource"):
            _losses._in_place()(torch.ones(2), by)
    finally:
        _losses._in_place.cache_clear()


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine"])
def test_a_pointer_of_a_tuple_is_that_layers(triton_backend: torch.device, name: str) -> None:
    from sparsebert import ops

    student = [torch.randn(1, 3, 8, device=triton_backend, requires_grad=True) for _ in range(32)]
    teacher = [torch.randn(1, 3, 8, device=triton_backend) for _ in range(32)]
    together = torch.autograd.grad(getattr(ops, name)(student, teacher), student)
    for s, t, gradient in zip(student, teacher, together, strict=True):
        (alone,) = torch.autograd.grad(getattr(ops, name)([s], [t]), s)
        torch.testing.assert_close(32 * gradient, alone, rtol=1e-5, atol=1e-7)
