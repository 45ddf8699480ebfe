"""What every distillation loss promises, tested against plain autograd; a test file of a loss subclasses this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebert.ops._backend import OPS

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
Within = Callable[..., None]
CPU = torch.device("cpu")


@dataclass
class Case:
    """Arguments of a loss: the student's tensors (leaves), the teacher's, and what counts."""

    student: list[Tensor]
    teacher: list[Tensor]
    mask: Tensor | None

    def cast(self, dtype: torch.dtype) -> Case:
        student = [s.detach().to(dtype).requires_grad_() for s in self.student]
        return Case(student, [t.to(dtype) for t in self.teacher], self.mask)


class LossPromises:
    """Subclasses say how to make a case, what the op is and what it must equal."""

    name: ClassVar[str]
    sizes: ClassVar[Sequence[tuple[int, ...]]]
    large: ClassVar[tuple[int, ...]]
    """A size of several tasks for several threads."""
    small: ClassVar[tuple[int, ...]]
    floor: ClassVar[float] = 0.0
    """Error the loss may have whatever torch's is: a rounding of the numbers near 1 that it is a difference of."""
    gradient_floor: ClassVar[float] = 0.0
    """The same of each number of a gradient."""
    spread: ClassVar[float] = 1.5
    """Standard deviation of the numbers: a loss near its minimum is a small difference of large ones."""

    def shapes(self, size: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], tuple[int, ...]]:
        """Shapes of the student's tensors, the teacher's and the mask."""
        raise NotImplementedError

    def loss(self, case: Case) -> Tensor:
        """The op under test."""
        raise NotImplementedError

    def plain(self, case: Case) -> Tensor:
        """What it promises, in torch at the case's dtype."""
        raise NotImplementedError

    def arguments(self, case: Case) -> tuple[Any, ...]:
        """The registered op's, up to `need_grad`."""
        raise NotImplementedError

    def token(self, tensor: Tensor, index: tuple[int, ...]) -> Tensor:
        """What belongs to the mask's entry `index`, as a view."""
        raise NotImplementedError

    def make(
        self, size: tuple[int, ...], dtype: torch.dtype = torch.float32, share: float | None = 0.6, seed: int = 0
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)
        student, teacher, mask = self.shapes(size)

        def normal(shape: tuple[int, ...]) -> Tensor:
            return (self.spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        keep = None
        if share is not None:
            keep = torch.rand(mask, generator=generator) < share
            if keep.numel() and share > 0:
                keep.view(-1)[0] = True
        return Case([normal(s).requires_grad_() for s in student], [normal(t) for t in teacher], keep)

    def run(self, case: Case, function: Callable[[Case], Tensor] | None = None) -> tuple[Tensor, ...]:
        """The loss and its gradients."""
        loss = (function or self.loss)(case)
        return (loss, *torch.autograd.grad(loss, case.student))

    def compare(self, within: Within, case: Case) -> None:
        results = self.run(case)
        usual, exact = self.run(case, self.plain), self.run(case.cast(torch.float64), self.plain)
        # The loss is one number, on which torch may be exact by chance.
        if not abs(results[0].item() - exact[0].item()) <= self.floor:
            within(results[0].detach(), usual[0].detach(), exact[0].detach(), 2.0, tiny=True)
        for result, own, truth in zip(results[1:], usual[1:], exact[1:], strict=True):
            if not torch.allclose(result.double(), truth, rtol=0.0, atol=self.gradient_floor):
                within(result, own, truth, 3.0, tiny=True)
        assert results[0].dtype == torch.float32 and results[0].shape == ()
        assert all(g.dtype == s.dtype for g, s in zip(results[1:], case.student, strict=True))

    @shared
    @given(data=st.data(), seed=st.integers(0, 999), share=st.sampled_from([None, 0.1, 0.6, 1.0]))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_within_torchs_own_error(
        self, backend: str, within: Within, dtype: torch.dtype, data: st.DataObject, seed: int, share: float | None
    ) -> None:
        self.compare(within, self.make(data.draw(st.sampled_from(self.sizes)), dtype, share, seed))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("share", [None, 0.6])
    def test_every_instruction_set(self, isa: str, within: Within, dtype: torch.dtype, share: float | None) -> None:
        for size in self.sizes:
            self.compare(within, self.make(size, dtype, share))

    def test_in_float16_and_mixed_dtypes(self) -> None:
        exact = self.run(self.make(self.small, torch.float64), self.plain)
        for student, teacher in (
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
        ):
            case = self.make(self.small, torch.float64)
            case = replace(case.cast(student), teacher=[t.to(teacher) for t in case.teacher])
            results = self.run(case)
            assert results[0].dtype == torch.float32 and results[1].dtype == student
            for result, truth in zip(results, exact, strict=True):
                torch.testing.assert_close(result.double(), truth, rtol=0.03, atol=0.03 * truth.abs().max().item())

    def test_in_float64_it_is_the_formula_and_passes_gradcheck(self) -> None:
        for share in (None, 0.6):
            case = self.make(self.small, torch.float64, share)
            results = self.run(case)
            assert results[0].dtype == torch.float64
            for result, truth in zip(results, self.run(case, self.plain), strict=True):
                torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-12)
            assert torch.autograd.gradcheck(
                lambda *student, c=case: self.loss(replace(c, student=list(student))), case.student
            )

    def test_repeats_and_threads_give_the_same_bits(self, threads: Callable[[int], None]) -> None:
        if OPS[self.name].missing("cpu") is not None:
            pytest.skip("torch's own sums depend on the number of threads")
        for dtype in (torch.float32, torch.bfloat16):
            case = self.make(self.large, dtype)
            found = []
            for count in (1, 2, 3, 1):
                threads(count)
                found.append(self.run(case))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))

    def test_with_nothing_that_counts_the_loss_is_0(self, backend: str) -> None:
        for case in (self.make(self.small, share=0.0), self.make((0, *self.small[1:]), share=None)):
            loss, *gradients = self.run(case)
            assert loss.item() == 0.0
            assert all(g.shape == s.shape and not g.any() for g, s in zip(gradients, case.student, strict=True))

    @pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")])
    def test_what_does_not_count_is_never_seen(self, backend: str, what: float) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            case = self.make(self.small, dtype)
            clean = self.run(case)
            assert case.mask is not None and not case.mask.all()
            with torch.no_grad():
                for index in (~case.mask).nonzero().tolist():
                    for tensor in (*case.student, *case.teacher):
                        self.token(tensor, tuple(index)).fill_(what)
            for before, after in zip(clean, self.run(case), strict=True):
                assert torch.equal(before, after)
            for gradient in clean[1:]:
                for index in (~case.mask).nonzero().tolist():
                    assert not self.token(gradient, tuple(index)).any()

    @pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_what_is_not_finite_shows(self, isa: str, side: str, what: float) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            case = self.make(self.small, dtype, None)
            with torch.no_grad():
                getattr(case, side)[0].view(-1)[3] = what
            if what == -float("inf") and not self.plain(case).isnan():
                continue  # a class of probability 0
            assert not self.loss(case).isfinite()
            assert not self.run(case)[0].isfinite()

    def test_strides_and_offsets(self, backend: str) -> None:
        case = self.make(self.small)
        plain = self.run(case)

        def spread(tensor: Tensor) -> Tensor:
            """The same numbers, every second of a longer last dimension, the first dimension last in memory."""
            wide = torch.full((*tensor.shape[1:], 2 * tensor.shape[0] + 1), 7.0, dtype=tensor.dtype)
            view = wide.movedim(-1, 0)[1::2]
            view.copy_(tensor)
            return view

        student = [spread(s.detach()).requires_grad_() for s in case.student]
        mask = None if case.mask is None else case.mask.mT.contiguous().mT
        strided = Case(student, [spread(t) for t in case.teacher], mask)
        assert not strided.teacher[0].is_contiguous()
        for one, other in zip(plain, self.run(strided), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_autocast_changes_nothing(self, backend: str) -> None:
        case = self.make(self.small)
        plain = self.run(case)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = self.run(case)
        assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))

    def test_without_gradients(self, backend: str) -> None:
        case = self.make(self.small)
        usual = self.loss(case)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                loss = self.loss(case)
            assert not loss.requires_grad and torch.equal(loss, usual)

    def test_the_teacher_is_a_constant(self, backend: str) -> None:
        case = self.make(self.small)
        teacher = [t.clone().requires_grad_() for t in case.teacher]
        self.loss(replace(case, teacher=teacher)).backward()
        assert all(t.grad is None for t in teacher) and all(s.grad is not None for s in case.student)
        alone = self.make(self.small)
        for other in alone.student[1:]:
            other.requires_grad_(False)
        (gradient,) = torch.autograd.grad(self.loss(alone), alone.student[:1])
        assert torch.equal(gradient, case.student[0].grad)

    def test_the_losss_weight_and_a_second_backward(self, backend: str) -> None:
        case = self.make(self.small)
        loss, *gradients = self.run(case)
        for weight in (0.25, 0.0, 3.0):
            for result, gradient in zip(
                torch.autograd.grad(weight * self.loss(case), case.student), gradients, strict=True
            ):
                torch.testing.assert_close(result, weight * gradient, rtol=1e-6, atol=1e-9)
        loss = self.loss(case)
        loss.backward(retain_graph=True)
        loss.backward()
        for leaf, gradient in zip(case.student, gradients, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=1e-6, atol=1e-9)

    def test_compiled_gradients_equal_eager_ones(self, backend: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            torch._dynamo.reset()
            case = self.make(self.small, dtype)

            def weighted(student: list[Tensor], case: Case = case) -> Tensor:
                return 0.5 * self.loss(replace(case, student=[2 * s for s in student]))

            compiled = torch.compile(weighted, fullgraph=True, backend="aot_eager")
            eager, traced = weighted(case.student), compiled(case.student)
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
            pairs = zip(*(torch.autograd.grad(loss, case.student) for loss in (eager, traced)), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            with torch.no_grad():
                torch.testing.assert_close(compiled(case.student), eager, rtol=1e-6, atol=1e-7)

    def test_second_derivatives_are_refused(self, backend: str) -> None:
        case = self.make(self.small)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(self.loss(case), case.student[0], create_graph=True)

    def test_opcheck(self, backend: str) -> None:
        case = self.make(self.small)
        body = OPS[self.name].pick(CPU)
        torch.library.opcheck(body, (*self.arguments(case), True))
        fixed = replace(case, student=[s.detach() for s in case.student], mask=None)
        torch.library.opcheck(body, (*self.arguments(fixed), True))
        torch.library.opcheck(body, (*self.arguments(fixed), False))
