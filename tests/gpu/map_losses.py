"""What the Triton kernels of every loss between attention maps promise; a test file of a loss subclasses this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from gpu.row_losses import check_again, check_scaled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.losses import Case, LossPromises
from torch import Tensor

from sparsebert.ops._backend import OPS

# Two classes of one file run the same examples, each by its own fixtures.
_fine = [HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow]
few = settings(max_examples=6, deadline=None, suppress_health_check=_fine)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every new tensor of a kernel's launch filled with NaN (or a large number), and listed."""
    made: list[Tensor] = []
    plain = Tensor.new_empty

    def new_empty(self: Tensor, *size: Any, **named: Any) -> Tensor:
        tensor = plain(self, *size, **named)
        if "device" in named:  # the interpreter's own
            return tensor
        tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 20)
        made.append(tensor)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield made


class MapPromises:
    """Subclasses give the promises of the CPU's test, from which the cases and the formula are taken."""

    of: ClassVar[Any]
    """An instance of the class in tests/ops."""
    sizes: ClassVar[tuple[tuple[int, ...], ...]] = (
        (1, 1, 1, 2, 2), (2, 3, 5, 4, 8), (2, 2, 17, 20, 33), (1, 1, 64, 16, 64), (1, 1, 70, 64, 64),
    )  # fmt: skip
    """Batch, heads, seq, the student's width, the teacher's."""

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

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("share", [None, 0.6])
    @pytest.mark.parametrize("index", range(5))
    def test_within_torchs_own_error(
        self, triton_backend: torch.device, dtype: torch.dtype, share: float | None, index: int
    ) -> None:
        self.compare(self.case(triton_backend, self.sizes[index], dtype, share))

    @few
    @given(
        size=st.tuples(*(st.integers(1, most) for most in (2, 2, 40, 40, 40))),
        share=st.sampled_from([None, 0.1, 0.6, 1.0]),
        dtype=st.sampled_from(DTYPES[:2]),
        seed=st.integers(0, 999),
    )
    def test_any_size(
        self,
        triton_backend: torch.device,
        size: tuple[int, ...],
        share: float | None,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.compare(self.case(triton_backend, size, dtype, share, seed))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_wide_heads(self, triton_backend: torch.device, dtype: torch.dtype) -> None:
        self.compare(self.case(triton_backend, (1, 1, 20, 100, 129), dtype))

    def test_student_and_teacher_of_two_dtypes(self, triton_backend: torch.device) -> None:
        exact = self.of.run(self.case(triton_backend, (2, 2, 19, 24, 40), torch.float64), self.of.plain)
        for student, teacher in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
            case = self.case(triton_backend, (2, 2, 19, 24, 40), torch.float64)
            case = Case(case.cast(student).student, [t.to(teacher) for t in case.teacher], case.mask)
            for result, truth in zip(self.of.run(case), exact, strict=True):
                torch.testing.assert_close(result.double(), truth, rtol=0.03, atol=0.03 * truth.abs().max().item())

    def test_gradients_in_bfloat16_are_within_one_percent(self, triton_backend: torch.device) -> None:
        case = self.case(triton_backend, (1, 2, 70, 64, 64), torch.bfloat16)
        exact = self.of.run(case.cast(torch.float64), self.of.plain)
        for result, truth in zip(self.of.run(case), exact, strict=True):
            assert (result.double() - truth).norm() <= 0.01 * truth.norm()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_give_the_same_bits(self, triton_backend: torch.device, dtype: torch.dtype) -> None:
        case = self.case(triton_backend, (1, 2, 70, 16, 32), dtype)
        first, second = self.of.run(case), self.of.run(case)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(self.of.loss(case), first[0], rtol=1e-6, atol=0.0)

    def test_with_nothing_that_counts_the_loss_is_0(self, triton_backend: torch.device) -> None:
        for size, share in (((2, 2, 7, 8, 4), 0.0), ((0, 2, 7, 8, 4), None), ((2, 2, 0, 8, 4), None)):
            loss, *gradients = self.of.run(case := self.case(triton_backend, size, share=share))
            assert loss.item() == 0.0
            assert all(g.shape == s.shape and not g.any() for g, s in zip(gradients, case.student, strict=True))

    @pytest.mark.parametrize("what", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", DTYPES[:2])
    def test_what_does_not_count_is_never_seen(
        self, triton_backend: torch.device, dtype: torch.dtype, what: float
    ) -> None:
        case = self.case(triton_backend, (3, 2, 37, 8, 16), dtype)
        assert case.mask is not None
        case.mask[1], case.mask[2, 9:] = False, False  # no token at all; nothing behind the first few
        clean = self.of.run(case)
        padding = ~case.mask[:, None, :].expand(3, 2, 37)
        with torch.no_grad():
            for tensor in (*case.student, *case.teacher):
                tensor[padding] = what
        for before, after in zip(clean, self.of.run(case), strict=True):
            assert torch.equal(before, after)
        assert all(not g[padding].any() for g in clean[1:])
        self.compare(case_without(case, padding))

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_what_is_not_finite_shows(self, triton_backend: torch.device, side: str) -> None:
        case = self.case(triton_backend, (2, 1, 20, 8, 8), share=None)
        with torch.no_grad():
            getattr(case, side)[0][1, 0, 3, 2] = float("nan")
        assert not self.of.run(case)[0].isfinite()

    def test_strides_and_offsets(self, triton_backend: torch.device) -> None:
        case = self.case(triton_backend, (2, 2, 9, 8, 4))
        plain = self.of.run(case)

        def spread(tensor: Tensor) -> Tensor:
            wide = torch.full((*tensor.shape[1:], 2 * tensor.shape[0] + 1), float("nan"), device=tensor.device)
            view = wide.movedim(-1, 0)[1::2]
            return view.copy_(tensor)

        student = [spread(s.detach()).requires_grad_() for s in case.student]
        assert case.mask is not None
        strided = Case(student, [spread(t) for t in case.teacher], case.mask.mT.contiguous().mT)
        for one, other in zip(plain, self.of.run(strided), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_gradients_are_laid_out_as_projections_want_them(self, triton_backend: torch.device) -> None:
        for gradient in self.of.run(self.case(triton_backend, (2, 3, 5, 8, 4)))[1:]:
            assert gradient.transpose(1, 2).is_contiguous()

    @pytest.mark.parametrize("share", [None, 0.6])
    def test_memory_grows_with_the_length_alone_and_all_of_it_is_written(
        self, triton_backend: torch.device, monkeypatch: pytest.MonkeyPatch, share: float | None
    ) -> None:
        batch, heads, seq, width = 1, 1, 200, 8
        case = self.case(triton_backend, (batch, heads, seq, width, width), share=share)
        clean = self.of.run(case)
        with poisoned(monkeypatch) as made:
            results = self.of.run(case)
        assert made, "nothing was counted"
        gradients = len(case.student) * batch * heads * seq * width
        # Five statistics a row at the most, the tiles' losses and the like: far from batch * heads * seq * seq.
        assert sum(tensor.numel() for tensor in made) - gradients <= 6 * batch * heads * seq
        for result, before in zip(results, clean, strict=True):
            assert torch.equal(result, before)

    def test_equal_maps_have_no_loss_and_no_gradient(self, triton_backend: torch.device) -> None:
        case = self.case(triton_backend, (2, 2, 37, 16, 16), share=None)
        loss, *gradients = self.of.run(Case(case.student, [s.detach() for s in case.student], None))
        assert abs(loss.item()) < 1e-12
        assert all(g.abs().max() < 1e-8 for g in gradients)

    def test_a_scaled_loss_in_float16_keeps_its_small_gradients(self, triton_backend: torch.device) -> None:
        check_scaled(self.of, self.case(triton_backend, (1, 1, 40, 16, 16), torch.float16, None))

    def test_a_kept_graph_gives_the_same_gradients_again(self, triton_backend: torch.device) -> None:
        check_again(self.of, self.case(triton_backend, (2, 2, 9, 8, 4)))

    def test_opcheck(self, triton_backend: torch.device) -> None:
        case = self.case(triton_backend, (2, 2, 4, 3, 5))
        body = OPS[self.of.name].pick(triton_backend)
        assert body.namespace == "sparsebert_triton"
        torch.library.opcheck(body, (*self.of.arguments(case), True))
        case = Case([s.detach() for s in case.student], case.teacher, None)
        torch.library.opcheck(body, (*self.of.arguments(case), False))


def case_without(case: Case, padding: Tensor) -> Case:
    """The case with zeros where it does not count: what plain torch can take."""
    student = [s.detach().masked_fill(padding.unsqueeze(-1), 0).requires_grad_() for s in case.student]
    some = case.mask.any(-1)  # type: ignore[union-attr]
    assert case.mask is not None
    return Case(
        [s.detach()[some].requires_grad_() for s in student],
        [t.masked_fill(padding.unsqueeze(-1), 0)[some] for t in case.teacher],
        case.mask[some],
    )
