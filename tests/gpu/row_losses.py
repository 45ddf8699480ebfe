"""What the Triton kernels of every loss on rows promise (logits, states); a test file of a loss subclasses this."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.losses import Case, LossPromises

from sparsebert.ops._backend import OPS

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_scaled(of: Any, case: Case) -> None:
    """As automatic mixed precision trains: the loss is scaled up, as float16 could not hold its gradients."""
    generator = torch.Generator().manual_seed(0)
    near = [t + torch.randn(t.shape, generator=generator).to(t) / 256 for t in case.teacher]
    case = Case([s.requires_grad_() for s in near], case.teacher, case.mask)
    wide = case.cast(torch.float64)
    truth = torch.autograd.grad(of.plain(wide), wide.student)
    scale = 2.0 ** round(-math.log2(max(g.abs().max().item() for g in truth)))
    loss = of.loss(case)
    for result, exact in zip(torch.autograd.grad(loss * scale, case.student), truth, strict=True):
        assert (result.double() - scale * exact).norm() <= 0.01 * (scale * exact).norm()


def check_again(of: Any, case: Case) -> None:
    """The backward scales in place where nobody comes back, and only there."""
    loss = 3.0 * of.loss(case)
    first, second = (torch.autograd.grad(loss, case.student, retain_graph=True) for _ in range(2))
    kept = [g.clone() for g in first]
    last = torch.autograd.grad(loss, case.student)
    for gradients in (first, second, last):
        for one, other in zip(gradients, kept, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)


class RowPromises:
    """Subclasses give the promises of the CPU's test, from which cases and formula are taken."""

    of: ClassVar[Any]
    """An instance of the class in tests/ops."""
    sizes: ClassVar[tuple[tuple[int, ...], ...]]
    small: ClassVar[tuple[int, ...]]

    def case(
        self,
        device: torch.device,
        size: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        share: float | None = 0.6,
        seed: int = 0,
    ) -> Case:
        promises: LossPromises = self.of
        case = promises.make(size, dtype, share, seed)
        student = [s.detach().to(device).requires_grad_() for s in case.student]
        return Case(student, [t.to(device) for t in case.teacher], None if case.mask is None else case.mask.to(device))

    def compare(self, case: Case) -> None:
        """The design's budget; the loss is one number, on which torch may be exact by chance."""
        results = self.of.run(case)
        usual, exact = self.of.run(case, self.of.plain), self.of.run(case.cast(torch.float64), self.of.plain)
        for i, (result, own, truth) in enumerate(zip(results, usual, exact, strict=True)):
            largest = truth.abs().max()
            slack = max(1e-6, torch.finfo(own.dtype).eps) * largest + (0 if i else self.of.floor)
            allowed = (3 if i else 2) * (own.double() - truth).abs().max() + slack
            assert (result.double() - truth).abs().max() <= allowed
        assert results[0].dtype == torch.float32 and results[0].shape == ()
        assert all(g.dtype == s.dtype for g, s in zip(results[1:], case.student, strict=True))

    @few
    @given(data=st.data(), share=st.sampled_from([None, 0.1, 0.6, 1.0]), seed=st.integers(0, 999))
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_within_torchs_own_error(
        self, triton_backend: torch.device, dtype: torch.dtype, data: st.DataObject, share: float | None, seed: int
    ) -> None:
        self.compare(self.case(triton_backend, data.draw(st.sampled_from(self.sizes)), dtype, share, seed))

    def test_every_size(self, triton_backend: torch.device) -> None:
        for size in self.sizes:
            self.compare(self.case(triton_backend, size, torch.bfloat16))

    def test_student_and_teacher_of_two_dtypes(self, triton_backend: torch.device) -> None:
        exact = self.of.run(self.case(triton_backend, self.small, torch.float64), self.of.plain)
        for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
            case = self.case(triton_backend, self.small, torch.float64)
            case = Case(case.cast(student).student, [t.to(teacher) for t in case.teacher], case.mask)
            for result, truth in zip(self.of.run(case), exact, strict=True):
                torch.testing.assert_close(result.double(), truth, rtol=0.03, atol=0.03 * truth.abs().max().item())

    def test_gradients_in_bfloat16_are_within_one_percent(self, triton_backend: torch.device) -> None:
        for size in self.sizes[-2:]:
            case = self.case(triton_backend, size, torch.bfloat16)
            exact = self.of.run(case.cast(torch.float64), self.of.plain)
            for result, truth in zip(self.of.run(case), exact, strict=True):
                assert (result.double() - truth).norm() <= 0.01 * truth.norm()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_give_the_same_bits(self, triton_backend: torch.device, dtype: torch.dtype) -> None:
        case = self.case(triton_backend, self.sizes[-1], dtype)
        first, second = self.of.run(case), self.of.run(case)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with torch.no_grad():
            assert torch.equal(self.of.loss(case), first[0])

    def test_with_nothing_that_counts_the_loss_is_0(self, triton_backend: torch.device) -> None:
        for size, share in ((self.small, 0.0), ((0, *self.small[1:]), None)):
            loss, *gradients = self.of.run(case := self.case(triton_backend, size, share=share))
            assert loss.item() == 0.0
            assert all(g.shape == s.shape and not g.any() for g, s in zip(gradients, case.student, strict=True))

    @pytest.mark.parametrize("what", [float("nan"), float("inf")])
    def test_what_does_not_count_is_never_seen(self, triton_backend: torch.device, what: float) -> None:
        for size in (self.small, self.sizes[-1]):
            case = self.case(triton_backend, size, torch.bfloat16, 0.5)
            clean = self.of.run(case)
            assert case.mask is not None
            with torch.no_grad():
                for index in (~case.mask).nonzero().tolist():
                    for tensor in (*case.student, *case.teacher):
                        self.of.token(tensor, tuple(index)).fill_(what)
            for before, after in zip(clean, self.of.run(case), strict=True):
                assert torch.equal(before, after)

    def test_rows_beside_what_is_not_the_tensors(self, triton_backend: torch.device) -> None:
        """Guards of NaN before and behind, and addresses that are no multiples of 16."""
        case = self.case(triton_backend, self.small, torch.bfloat16)

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            memory = torch.full((tensor.numel() + 131,), float("nan"), dtype=tensor.dtype, device=tensor.device)
            return memory[65 : 65 + tensor.numel()].view(tensor.shape).copy_(tensor)

        plain = self.of.run(case)
        student = [guarded(s.detach()).requires_grad_() for s in case.student]
        beside = Case(student, [guarded(t) for t in case.teacher], case.mask)
        for one, other in zip(plain, self.of.run(beside), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_what_is_not_finite_shows(self, triton_backend: torch.device, side: str) -> None:
        for size in (self.small, self.sizes[-1]):
            case = self.case(triton_backend, size, share=None)
            with torch.no_grad():
                getattr(case, side)[0].view(-1)[3] = float("nan")
            assert not self.of.run(case)[0].isfinite()

    def test_a_scaled_loss_in_float16_keeps_its_small_gradients(self, triton_backend: torch.device) -> None:
        check_scaled(self.of, self.case(triton_backend, self.sizes[-1], torch.float16))

    def test_a_kept_graph_gives_the_same_gradients_again(self, triton_backend: torch.device) -> None:
        check_again(self.of, self.case(triton_backend, self.small))

    def test_opcheck(self, triton_backend: torch.device) -> None:
        case = self.case(triton_backend, self.small)
        body = OPS[self.of.name].pick(triton_backend)
        assert body.namespace == "sparsebert_triton"
        torch.library.opcheck(body, (*self.of.arguments(case), True))
        case = Case([s.detach() for s in case.student], case.teacher, None)
        torch.library.opcheck(body, (*self.of.arguments(case), False))
