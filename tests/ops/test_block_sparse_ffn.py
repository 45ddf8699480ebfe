from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.feed_forward import make

from sparsebert.ops import block_sparse_ffn, block_sparse_linear
from sparsebert.ops._backend import OPS
from sparsebert.ops._linear import ACTIVATIONS
from sparsebert.ops.block_sparse_ffn import block_sparse_ffn_reference


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.sampled_from([0, 1, 2, 7, 33]),
    blocks=st.sampled_from([((16, 16), (16, 16)), ((64, 32), (32, 64)), ((8, 2), (16, 2)), ((48, 16), (3, 8))]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_within_torchs_own_error(backend: str, activation: str, **drawn: Any) -> None:
    case = make(**drawn)
    case.check(case.call(activation), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_float64_it_is_the_formula_and_passes_gradcheck(activation: str) -> None:
    case = make(m=3, dtype=torch.float64)
    torch.testing.assert_close(case.call(activation), case.by_torch(activation, torch.float64))
    up, down = case.layers()
    torch.testing.assert_close(
        block_sparse_ffn_reference(case.x, *up, *down, case.shape, activation), case.call(activation)
    )
    transposed = {"up_transposed": case.up.transposed(), "down_transposed": case.down.transposed()}

    def layer(x: Any, up_values: Any, up_bias: Any, down_values: Any, down_bias: Any) -> Any:
        return block_sparse_ffn(
            x, up_values, *up[1:3], up_bias, down_values, *down[1:3], down_bias,
            shape=case.shape, activation=activation, **transposed,
        )  # fmt: skip

    leaves = [leaf.requires_grad_() for leaf in (case.x, up[0], up[3], down[0], down[3])]
    assert activation == "relu" or torch.autograd.gradcheck(layer, leaves, fast_mode=True)


def test_it_is_the_two_layers(backend: str) -> None:
    case = make(m=9)
    up, down = case.layers()
    n, inner, k = case.shape
    with torch.no_grad():
        hidden = block_sparse_linear(case.x, *up, shape=(inner, k), activation="gelu")
        expected = block_sparse_linear(hidden, *down, shape=(n, inner))
    torch.testing.assert_close(case.call("gelu"), expected)
    torch.testing.assert_close(case.call("gelu", case.x.view(3, 3, -1)), expected.view(3, 3, -1))
    torch.testing.assert_close(case.call("gelu", case.x.t().contiguous().t()), expected)
    x = case.x.clone().requires_grad_()
    y = case.call("gelu", x, up_transposed=case.up.transposed(), down_transposed=case.down.transposed())
    torch.testing.assert_close(y, expected)
    (dx,) = torch.autograd.grad(y.sum(), x)
    dense = case.x.clone().requires_grad_()
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(dense, case.up.to_dense(), case.up_bias))
    result = torch.nn.functional.linear(hidden, case.down.to_dense(), case.down_bias)
    torch.testing.assert_close(dx, torch.autograd.grad(result.sum(), dense)[0])


def test_autocast_casts_as_for_a_plain_linear(backend: str) -> None:
    case = make(m=9)
    low = make(m=9, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = case.call("gelu")
    assert under.dtype == torch.bfloat16 and torch.equal(under, low.call("gelu"))


def test_compiled_equals_eager(backend: str) -> None:
    case = make(m=9)
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled("gelu"), case.call("gelu"))


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    n, inner, k = case.shape
    for word in ("", "reference"):
        monkeypatch.setenv("SPARSEBERT_BACKEND", word)
        for options, message in (
            ({"shape": (n, k)}, r"shape: expected \(N, I, K\), got \[64, 64\]"),
            ({"activation": "gelo"}, "unknown activation 'gelo'; did you mean 'gelu'"),
            ({"x": case.x[:, :3]}, r"x: expected \[\.\.\., 64\] to fit the weight"),
            ({"x": case.x.double()}, "x: expected torch.float32 like values, got torch.float64"),
            ({"shape": (n, inner + 8, k)}, r"bias|block|row_starts"),
        ):
            with pytest.raises(ValueError, match=message):
                case.call(**options)
    case.down_bias = case.down_bias[1:]
    with pytest.raises(ValueError, match=r"down layer: bias: expected \[64\], got \[63\]"):
        case.call()
    monkeypatch.setenv("SPARSEBERT_BACKEND", "")
    with pytest.raises(ValueError, match=r"bias: expected \[64\], got \[63\]"):
        case.call()


def test_a_weight_without_rows_or_columns() -> None:
    case = make()
    up, down = case.layers()
    empty = (up[0][:0], up[1][:0], torch.zeros(1, dtype=torch.int32), None)
    y = block_sparse_ffn(
        case.x, *empty, down[0][:0], down[1][:0], torch.zeros(5, dtype=torch.int32), case.down_bias, shape=(64, 0, 64)
    )
    assert torch.equal(y, case.down_bias.expand(5, 64))


def test_opcheck() -> None:
    case = make()
    up, down = case.layers()
    op = OPS["block_sparse_ffn"].pick(torch.device("cpu"))
    torch.library.opcheck(op, (case.x, *up, *down, list(case.shape), "gelu"))
