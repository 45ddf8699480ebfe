from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from ops.losses import Case, LossPromises
from torch import Tensor
from torch.nn import functional as F

from sparsebert.ops import hidden_mse


class TestHiddenMse(LossPromises):
    name = "hidden_mse"
    # layers, batch, seq, width
    sizes = ((1, 1, 1, 1), (2, 2, 3, 5), (3, 1, 4, 16), (2, 3, 5, 33), (1, 2, 9, 64), (4, 2, 3, 100), (2, 1, 7, 2100))
    large: ClassVar[tuple[int, ...]] = (3, 8, 40, 96)
    small: ClassVar[tuple[int, ...]] = (2, 2, 4, 6)

    def shapes(self, size: tuple[int, ...]) -> Any:
        layers = [size[1:]] * max(size[0], 1)
        batch = 0 if size[0] == 0 else size[1]  # "nothing at all" is an empty batch, not no layer
        layers = [(batch, *size[2:])] * len(layers)
        return layers, layers, (batch, size[2])

    def loss(self, case: Case) -> Tensor:
        return hidden_mse(case.student, case.teacher, case.mask)

    def plain(self, case: Case) -> Tensor:
        pairs = zip(case.student, case.teacher, strict=True)
        rows = torch.stack([(s - t).square().mean(-1) for s, t in pairs])
        return (rows if case.mask is None else rows[:, case.mask]).mean()

    def arguments(self, case: Case) -> tuple[Any, ...]:
        return case.student, case.teacher, case.mask

    def token(self, tensor: Tensor, index: tuple[int, ...]) -> Tensor:
        return tensor[index]

    @pytest.mark.parametrize("share", [None, 0.5])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_stacked_layers_are_the_same_as_a_list(self, backend: str, share: float | None, dtype: torch.dtype) -> None:
        if backend == "cpu" and dtype == torch.float64:
            pytest.skip("only the reference takes float64")
        case = self.make(self.large, dtype, share)
        stacked = torch.stack([s.detach() for s in case.student]).requires_grad_()
        loss, *gradients = self.run(case)
        other = self.loss_of(stacked, torch.stack(case.teacher), case.mask)
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(other, stacked)
        assert torch.equal(gradient, torch.stack(gradients))
        one = self.loss_of(stacked[0], case.teacher[0], case.mask)
        torch.testing.assert_close(one, self.loss(Case(case.student[:1], case.teacher[:1], case.mask)))

    def loss_of(self, student: Any, teacher: Any, mask: Any = None) -> Tensor:
        return hidden_mse(student, teacher, mask)

    def test_layers_that_need_no_gradient_get_none(self, backend: str) -> None:
        case = self.make((3, 2, 4, 6))
        full = self.run(case)[1:]
        case.student[1].requires_grad_(False)
        loss = self.loss(case)
        found = torch.autograd.grad(loss, [case.student[0], case.student[2]])
        assert torch.equal(found[0], full[0]) and torch.equal(found[1], full[2])

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (([], []), ValueError, "teacher: expected as many layers as student, at least 1, got 0 and 0"),
            (([torch.zeros(1, 2, 3)], []), ValueError, "expected as many layers as student, at least 1, got 0 and 1"),
            (
                (torch.zeros(2, 3), torch.zeros(2, 3)),
                ValueError,
                r"student: expected \[\(layers,\) batch, seq, width\]",
            ),
            (([torch.zeros(2, 3)], [torch.zeros(2, 3)]), ValueError, r"student\[0\]: expected \[batch, seq, width\]"),
            (
                ([torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 4)]),
                ValueError,
                r"teacher\[0\]: expected \[1, 2, 3\] like student\[0\], got \[1, 2, 4\]",
            ),
            (
                ([torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)], [torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)]),
                ValueError,
                r"student\[1\]: expected torch.float32 \[1, 2, 3\] on cpu like student\[0\], got",
            ),
            (
                ([torch.zeros(1, 2, 3)] * 2, [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).double()]),
                ValueError,
                r"teacher\[1\]: expected torch.float32 like teacher\[0\], got torch.float64",
            ),
            (
                ([torch.zeros(1, 2, 3).long()], [torch.zeros(1, 2, 3)]),
                TypeError,
                r"student\[0\]: expected a float tensor, got torch.int64",
            ),
            (
                (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.ones(2, 1, dtype=torch.bool)),
                ValueError,
                r"token_mask: expected bool \[1, 2\], got torch.bool \[2, 1\]",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, arguments: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.loss_of(*arguments)

    def test_a_direct_call_of_the_op_cannot_read_out_of_bounds(self) -> None:
        from sparsebert import _load

        if _load.missing("cpu") is not None:
            pytest.skip("no compiled CPU kernels")
        op, x = getattr(torch.ops.sparsebert, self.name), torch.zeros(2, 3, 4)
        for student, teacher, mask in (
            ([x], [], None),
            ([x, x], [x, x[:1]], None),
            ([x, x[..., :2].contiguous()], [x, x[..., :2].contiguous()], None),
            ([x], [torch.zeros(2, 4, 3)], None),
            ([x], [torch.zeros(4, 3, 2).transpose(0, 2)], None),
            ([x, x.bfloat16()], [x, x], None),
            ([x.half()], [x], None),
            ([x.double()], [x], None),
            ([x], [x], torch.ones(4, dtype=torch.bool)),
            ([x], [x], torch.ones(0, dtype=torch.bool)),
            ([x], [x], torch.ones(6, dtype=torch.uint8)),
        ):
            with pytest.raises(RuntimeError, match=r"expected|does not fit"):
                op(student, teacher, mask, True)


def test_it_is_mse_loss() -> None:
    student, teacher = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    torch.testing.assert_close(hidden_mse(student, teacher), F.mse_loss(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_a_projection_is_a_linear_before(dtype: torch.dtype, shared: bool) -> None:
    student = [torch.randn(2, 5, 6).to(dtype).requires_grad_() for _ in range(3)]
    teacher = [torch.randn(2, 5, 8).to(dtype) for _ in range(3)]
    weights = [torch.randn(8, 6, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()]
    weights = weights if shared else [weights[0].detach().clone().requires_grad_() for _ in range(3)]
    mask = torch.rand(2, 5) < 0.6
    mask[0, 0], mask[1, 4] = True, False
    loss = hidden_mse(student, teacher, mask, projection=weights[0] if shared else weights)
    mine = [F.linear(s.to(w.dtype), w) for s, w in zip(student, weights * 3 if shared else weights, strict=True)]
    usual = hidden_mse(mine, teacher, mask)
    torch.testing.assert_close(loss, usual)
    gradients = [torch.autograd.grad(one, [*student, *weights]) for one in (loss, usual)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        student[0][1, 4] = float("nan")
    again = torch.autograd.grad(hidden_mse(student, teacher, mask, weights[0] if shared else weights), weights)
    torch.testing.assert_close(again, gradients[0][3:])


def test_a_projection_of_stacked_layers_and_what_does_not_fit() -> None:
    student, teacher, weight = torch.randn(3, 2, 5, 6), torch.randn(3, 2, 5, 8), torch.randn(8, 6)
    mask = torch.rand(2, 5) < 0.6
    listed = hidden_mse(list(student), list(teacher), mask, weight)
    torch.testing.assert_close(hidden_mse(student, teacher, mask, weight), listed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hidden_mse(list(student), list(teacher), mask, weight), listed)
    for wrong, message in (
        (weight.t(), r"projection: expected \[teacher's width, 6\], got \[6, 8\]"),
        ([weight] * 2, "projection: expected one for all layers or 3, got 2"),
        ([weight, weight, torch.zeros(6)], r"projection\[2\]: expected \[teacher's width, 6\], got \[6\]"),
        (torch.zeros(9, 6), r"teacher\[0\]: expected \[2, 5, 9\] like student\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            hidden_mse(list(student), list(teacher), mask, wrong)
    with pytest.raises(TypeError, match="projection: expected floats"):
        hidden_mse(list(student), list(teacher), mask, weight.long())
