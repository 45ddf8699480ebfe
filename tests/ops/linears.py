"""What every linear layer over a stored weight promises; each op's test file says which op and which storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.linear_cases import DTYPES, Case, by_torch, check_error, skip_without
from torch import Tensor
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.formats import Format
from sparsebert.ops._backend import OPS
from sparsebert.ops._linear import ACTIVATIONS, activate

shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors])


class LinearPromises:
    """The tests, for a subclass that names the op, makes its storage and calls it."""

    op: ClassVar[str]
    gradients: ClassVar[Sequence[str]] = ()
    """The ops that its gradients take."""
    transposed_count: ClassVar[int]
    shapes: ClassVar[Sequence[tuple[int, int]]]
    """(N, K), every option dividing the first."""
    options: ClassVar[Sequence[Any]] = (None,)

    def store(self, weight: Tensor, density: float, option: Any, generator: torch.Generator) -> Format:
        raise NotImplementedError

    def call(self, stored: Format, x: Tensor, values: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _kernels(self, request: pytest.FixtureRequest) -> None:
        skip_without(request, self.op, *self.gradients)

    def make(
        self,
        rows: int = 5,
        shape: tuple[int, int] | None = None,
        density: float = 0.4,
        option: Any = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

        n, k = shape or self.shapes[0]
        stored = self.store(normal(n, k), density, option or self.options[0], generator)
        leaves = (normal(rows, k), stored.values.clone(), normal(n))
        x, values, bias = (leaf.requires_grad_() for leaf in leaves)
        return Case(stored, x, values, bias, normal(rows, n), stored.transposed())

    def run(self, case: Case, activation: str = "none") -> tuple[Tensor, ...]:
        """`(y, dx, dvalues, dbias)`."""
        y = self.call(case.stored, case.x, case.values, case.bias, activation=activation, transposed=case.transposed)
        return (y, *torch.autograd.grad(y, case.leaves, case.grad))

    def check_budget(self, case: Case, activation: str, small: bool = True) -> None:
        """Result and gradients, the result with its activation fused too, against torch's own at the same dtype."""
        usual, exact = (by_torch(case, dtype) for dtype in (case.x.dtype, torch.float64))
        scales = by_torch(case, torch.float64, magnitudes=True)
        for i, result in enumerate(self.run(case)):
            factor = 2.0 if i == 0 else 3.0
            check_error(result.detach(), usual[i], exact[i], factor, scales[i] if small else None)
        with torch.no_grad():
            fused = self.call(case.stored, case.x, case.values, case.bias, activation=activation)
            own, truth = activate(usual[0], activation), activate(exact[0], activation)
            check_error(fused, own, truth, 2.0, scales[0] if small else None)
            plain = self.call(case.stored, case.x, case.values, None, activation=activation)
            zero = self.call(case.stored, case.x, case.values, 0 * case.bias, activation=activation)
            torch.testing.assert_close(plain, zero)
        # Where a gradient is wanted the activation follows as torch's own op.
        y = self.call(case.stored, *case.leaves, transposed=case.transposed)
        after = activate(y, activation)
        for one, other in zip(
            self.run(case, activation), (after, *torch.autograd.grad(after, case.leaves, case.grad)), strict=True
        ):
            assert torch.equal(one, other)

    drawn = given(
        rows=st.sampled_from([0, 1, 2, 3, 4, 7, 17, 33, 70]),
        picked=st.tuples(st.integers(0, 99), st.integers(0, 99)),
        density=st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9, 1.0]),
        kind=st.tuples(st.sampled_from(DTYPES), st.sampled_from(ACTIVATIONS)),
        seed=st.integers(0, 999),
    )

    def check_drawn(self, rows: int, picked: Any, density: float, kind: Any, seed: int) -> None:
        shape, option = self.shapes[picked[0] % len(self.shapes)], self.options[picked[1] % len(self.options)]
        self.check_budget(self.make(rows, shape, density, option, kind[0], seed), kind[1])

    @shared
    @drawn
    def test_within_torchs_own_error_on_each_backend(self, backend: str, **drawn: Any) -> None:
        self.check_drawn(**drawn)

    @shared
    @drawn
    def test_within_torchs_own_error_on_each_instruction_set(self, isa: str, **drawn: Any) -> None:
        self.check_drawn(**drawn)

    @pytest.mark.parametrize("rows", [1, 16, 130])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_at_a_layers_size(self, backend: str, rows: int, dtype: torch.dtype) -> None:
        for option in self.options:
            self.check_budget(self.make(rows, (384, 768), 0.2, option, dtype), "gelu", small=False)

    def test_float16_runs(self) -> None:
        self.check_budget(self.make(dtype=torch.float16), "tanh")

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_in_float64_it_is_the_formula_and_passes_gradcheck(self, activation: str) -> None:
        case = self.make(3, dtype=torch.float64)

        def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
            return self.call(case.stored, x, values, bias, activation=activation, transposed=case.transposed)

        y = layer(*case.leaves)
        torch.testing.assert_close(y, activate(F.linear(case.x, case.weight, case.bias), activation))
        assert activation == "relu" or torch.autograd.gradcheck(layer, case.leaves, fast_mode=True)

    @pytest.mark.parametrize("place", [(), (2,), (0,), (3, 0), (2, 3, 4), (1, 1)])
    def test_leading_dimensions(self, backend: str, place: tuple[int, ...]) -> None:
        case = self.make()
        x = torch.randn(*place, case.x.shape[1], requires_grad=True)
        y = self.call(case.stored, x, case.values, case.bias, transposed=case.transposed)
        torch.testing.assert_close(y, F.linear(x, case.weight, case.bias))
        y.sum().backward()
        assert x.grad is not None and case.values.grad is not None
        torch.testing.assert_close(x.grad, case.weight.sum(0).expand(x.shape))

    def test_strides_offsets_and_expanded_gradients(self, backend: str) -> None:
        case = self.make()
        n, k = case.stored.shape
        whole = torch.randn(4, 20, k)
        bias = torch.randn(2 * n)[::2]
        for x in (whole.transpose(0, 1), whole[1:, 3:], torch.randn(k, 6).t(), torch.randn(7, k + 3)[:, 3:]):
            x = x.detach().requires_grad_()
            y = self.call(case.stored, x, case.values, bias, transposed=case.transposed)
            torch.testing.assert_close(y, F.linear(x, case.weight, bias))
            # The gradient of a sum is one number with stride 0; a transposed one comes from attention.
            for grad in (torch.ones(()).expand(y.shape), torch.randn(y.mT.shape).mT):
                dx, dvalues = torch.autograd.grad(y, (x, case.values), grad, retain_graph=True)
                torch.testing.assert_close(dx, grad @ case.weight)
                dense = grad.reshape(-1, n).t() @ x.detach().reshape(-1, k)
                gathered = case.stored.replaced(values=dvalues).to_dense()
                torch.testing.assert_close(gathered, dense * case.stored.stored())

    def test_only_what_is_needed_is_computed(self, backend: str) -> None:
        case = self.make()
        full = self.run(case)[1:]
        for leaf, gradient in zip(case.leaves, full, strict=True):
            for other in case.leaves:
                other.requires_grad_(other is leaf)
            # Only the gradient of x needs the structure of W^T.
            transposed = case.transposed if leaf is case.x else ()
            y = self.call(case.stored, *case.leaves, transposed=transposed)
            (alone,) = torch.autograd.grad(y, leaf, case.grad)
            torch.testing.assert_close(alone, gradient)

    def test_a_gradient_of_x_needs_the_transposed_structure(self, backend: str) -> None:
        case = self.make()
        if not self.transposed_count:
            pytest.skip("needs none")
        wanted = f"transposed: expected the {self.transposed_count} tensors .* got"
        with pytest.raises(ValueError, match=f"{wanted} 0"):
            self.call(case.stored, *case.leaves)
        with pytest.raises(ValueError, match=f"{wanted} 1"):
            self.call(case.stored, *case.leaves, transposed=case.transposed[:1])
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                y = self.call(case.stored, *case.leaves)
            assert not y.requires_grad
            torch.testing.assert_close(y, F.linear(case.x, case.weight, case.bias).detach())

    def test_a_nan_in_a_stored_weight_reaches_its_output_and_no_other(self, backend: str) -> None:
        weight = torch.full((self.shapes[0]), float("nan"))
        stored = self.store(weight, 0.3, self.options[0], torch.Generator().manual_seed(1))
        hit = stored.stored().any(1)
        assert hit.any()
        x = torch.ones(3, weight.shape[1])
        with torch.no_grad():
            y = self.call(stored, x, stored.values, None)
        assert y[:, hit].isnan().all() and not y[:, ~hit].isnan().any()
        # A row of x stays in its row of y.
        stored = self.make().stored
        x[1] = float("nan")
        with torch.no_grad():
            y = self.call(stored, x, stored.values, None)
        assert not y[[0, 2]].isnan().any() and y[1].isnan().any()

    @pytest.mark.parametrize("rows", [1, 40])
    def test_autocast_casts_as_for_a_plain_linear(self, backend: str, rows: int) -> None:
        case = self.make(rows)
        low = [leaf.detach().bfloat16().requires_grad_() for leaf in case.leaves]
        plain = self.call(case.stored, *low, activation="gelu", transposed=case.transposed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = self.call(case.stored, *case.leaves, activation="gelu", transposed=case.transposed)
            assert under.dtype == torch.bfloat16 and torch.equal(under, plain)
            # A backward within autocast stays in the dtypes of its forward.
            gradients = torch.autograd.grad(under, case.leaves, case.grad.bfloat16())
        for leaf, one, other in zip(
            case.leaves, gradients, torch.autograd.grad(plain, low, case.grad.bfloat16()), strict=True
        ):
            assert one.dtype == leaf.dtype == torch.float32 and torch.equal(one, other.float())
        full = self.run(case)
        y = self.call(case.stored, *case.leaves, transposed=case.transposed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            later = torch.autograd.grad(y, case.leaves, case.grad)
        assert all(torch.equal(a, b) for a, b in zip(full[1:], later, strict=True))

    def test_autocast_leaves_float64(self) -> None:
        case = self.make(dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(self.run(case)[0], F.linear(case.x, case.weight, case.bias))

    @pytest.mark.parametrize("activation", ["none", "gelu"])
    def test_compiled_gradients_equal_eager_ones(self, backend: str, activation: str) -> None:
        case = self.make(20)

        def layer(x: Tensor, values: Tensor, bias: Tensor, transposed: Sequence[Tensor] = ()) -> Tensor:
            return 2 * self.call(case.stored, x, values, bias, activation=activation, transposed=transposed)

        # One code object for every case of this test: without a reset they would share a limit of recompilations.
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        both = []
        for function in (layer, compiled):
            y = function(*case.leaves, case.transposed)
            both.append((y, *torch.autograd.grad(y, case.leaves, case.grad)))
        for eager, traced in zip(*both, strict=True):
            torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*case.leaves), layer(*case.leaves), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_and_threads_give_the_same_bits(
        self, backend: str, dtype: torch.dtype, threads: Callable[[int], None]
    ) -> None:
        if backend == "reference":
            pytest.skip("torch's own products depend on the number of threads")
        case = self.make(70, (384, 768), dtype=dtype)
        first = self.run(case, "gelu")
        for number in (1, 2, 3, 1):
            threads(number)
            for i, (a, b) in enumerate(zip(first, self.run(case, "gelu"), strict=True)):
                assert torch.equal(a, b) or self.is_torchs(i)

    def is_torchs(self, i: int) -> bool:
        """Whether result i of `run` is computed by torch itself."""
        return False

    def test_what_was_changed_after_the_forward_is_noticed(self, backend: str) -> None:
        case = self.make()
        values = case.values.detach().clone()
        y = self.call(case.stored, case.x, values, case.bias, transposed=case.transposed)
        values.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_second_derivatives_are_refused(self, backend: str) -> None:
        case = self.make()
        y = self.call(case.stored, *case.leaves, transposed=case.transposed)
        with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
            torch.autograd.grad(y.sum(), case.x, create_graph=True)

    @pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
    def test_a_weight_without_rows_or_columns(self, backend: str, shape: tuple[int, int]) -> None:
        stored = self.store(torch.zeros(shape), 1.0, self.empty_option(), torch.Generator())
        x, bias = torch.randn(3, shape[1], requires_grad=True), torch.randn(shape[0])
        y = self.call(stored, x, stored.values, bias, activation="relu", transposed=stored.transposed())
        assert torch.equal(y, F.relu(bias).expand(3, shape[0]))
        y.sum().backward()
        assert x.grad is not None and not x.grad.any()

    def empty_option(self) -> Any:
        return self.options[0]

    def test_an_operand_that_does_not_fit_is_named(self) -> None:
        case = self.make()
        n, k = case.stored.shape
        x, values, bias = (leaf.detach() for leaf in case.leaves)
        name = "weight" if self.op == "dense_linear" else "values"
        for change, message in (
            ({"x": torch.zeros(5, k + 1)}, rf"x: expected \[\.\.\., {k}\] to fit the weight \[{n}, {k}\], got \[5, "),
            ({"x": torch.zeros(())}, r"x: expected \[\.\.\., "),
            ({"x": x.bfloat16()}, rf"x: expected torch\.float32 like {name}, got torch\.bfloat16"),
            ({"x": x.long()}, rf"x: expected torch\.float32 like {name}, got torch\.int64"),
            ({"x": x.to("meta")}, rf"x: expected on cpu like {name}, got meta"),
            ({"bias": bias.double()}, rf"bias: expected torch\.float32 like {name}, got torch\.float64"),
            ({"bias": torch.zeros(n + 1)}, rf"bias: expected \[{n}\], got \[{n + 1}\]"),
            ({"bias": bias.to("meta")}, rf"bias: expected on cpu like {name}, got meta"),
            ({"values": values.reshape(-1, 1, 1, 1)}, rf"{name}: expected \["),
        ):
            with pytest.raises(ValueError, match=message):
                self.call(case.stored, **{"x": x, "values": values, "bias": bias, **change})
        with pytest.raises(TypeError, match=rf"{name}: expected a float tensor, got torch\.int64"):
            self.call(case.stored, x, values.long(), bias)
        with pytest.raises(ValueError, match="unknown activation 'gelo'; did you mean 'gelu'"):
            self.call(case.stored, x, values, bias, activation="gelo")

    def test_an_index_tensor_that_does_not_fit_is_named(self) -> None:
        case = self.make()
        leaves = [leaf.detach() for leaf in case.leaves]
        for name, tensor in case.stored.tensors().items():
            if name == "values":
                continue
            wide = torch.stack((tensor, tensor), -1)
            for wrong, message in (
                (tensor.float(), f"{name}: expected {tensor.dtype} .*, got torch.float32"),
                (tensor[:-1], rf"{name}: expected {tensor.dtype} \[{len(tensor)}.*, got {tensor.dtype} "),
                (wide[..., 0], f"{name}: expected a contiguous tensor"),
                (tensor.to("meta"), f"{name}: expected on cpu like the values, got meta"),
            ):
                with pytest.raises(ValueError, match=message):
                    self.call(case.stored.replaced(**{name: wrong}), *leaves)

    def test_a_forced_backend_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        case = self.make(dtype=torch.float64)
        for word, message in {
            "cpu": f"{self.op} has no cpu kernel for these dtypes",
            "cuda": "which that backend does not serve",
        }.items():
            monkeypatch.setenv("SPARSEBERT_BACKEND", word)
            with pytest.raises(UserError, match=message):
                self.call(case.stored, *case.leaves, transposed=case.transposed)

    def test_opcheck(self, backend: str) -> None:
        case = self.make(20)
        seen: list[tuple[Any, ...]] = []
        op = OPS[self.op]
        picked = op.pick(torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "differentiable", lambda *_: lambda *inputs: seen.append(inputs) or picked(*inputs))
            self.call(case.stored, *case.leaves, transposed=case.transposed)
            self.call(case.stored, case.x.detach(), case.values, None)
        torch.library.opcheck(picked, seen[0])
        torch.library.opcheck(picked, seen[1])
        frozen = [part.detach() if isinstance(part, Tensor) else part for part in seen[0]]
        activation = next(i for i, part in enumerate(frozen) if isinstance(part, str))
        frozen[activation] = "gelu"
        torch.library.opcheck(picked, tuple(frozen))
        # Its formula is that of the product alone.
        recorded = list(seen[0])
        recorded[activation] = "gelu"
        with pytest.raises(ValueError, match="activation: expected 'none' where a gradient is recorded, got 'gelu'"):
            picked(*recorded)
