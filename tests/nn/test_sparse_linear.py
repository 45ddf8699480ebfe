"""SparseLinear against torch's own linear with the pruned weights set to zero."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.sparse_layers import FORMATS, close, linear_of, mask_for, pair
from torch import nn
from torch.nn import functional as F

from sparsebert.errors import UserError
from sparsebert.nn import Choice, MaskedLinear, SparseLinear
from sparsebert.ops import pack_bits

ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
}


@given(
    st.sampled_from(FORMATS),
    st.sampled_from([(4, 4), (24, 16), (260, 132), (8, 300)]),
    st.sampled_from([(), (1,), (3,), (2, 5), (0,), (40,), (2, 0, 3)]),
    st.booleans(),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=80)
def test_it_is_a_linear_with_the_pruned_weights_at_zero(
    spelling: str, shape: tuple[int, int], leading: tuple[int, ...], bias: bool, activation: str, dtype: torch.dtype
) -> None:
    n, k = shape
    sparse, linear, _ = pair(spelling, n, k, bias=bias, dtype=dtype, activation=activation)
    x = torch.randn(*leading, k, dtype=dtype)
    with torch.inference_mode():
        out = sparse(x)
        close(out, ACTIVATIONS[activation](linear(x)))
    assert out.dtype == dtype and sparse.format == spelling and sparse.in_features == k and sparse.out_features == n


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("format", ["auto", "unstructured", "dense", "compact"])
@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (1, 1)])
def test_layers_of_no_size_run(n: int, k: int, format: str) -> None:
    linear = nn.Linear(k, n)
    for sparse in (
        SparseLinear.from_linear(linear, format=format, rows=(2,)),
        SparseLinear.from_linear(linear, format=format, rows=(2,), trainable=True),
    ):
        x = torch.randn(20, k, requires_grad=True)
        close(sparse(x), linear(x))
        sparse(x).sum().backward()


@pytest.mark.parametrize("spelling", FORMATS)
def test_numbers_that_are_no_numbers_in_pruned_places_do_not_get_in(spelling: str) -> None:
    linear, mask = linear_of(24, 16), mask_for(spelling, 24, 16)
    with torch.no_grad():
        linear.weight[~mask] = float("nan")
    sparse = SparseLinear.from_linear(linear, mask, format=spelling)
    assert bool(torch.isfinite(sparse(torch.randn(3, 16))).all())
    assert torch.equal(sparse.weight != 0, mask)


@pytest.mark.parametrize("spelling", FORMATS)
def test_without_a_mask_the_weight_tells_by_its_zeros(spelling: str) -> None:
    _, linear, mask = pair(spelling)
    sparse = SparseLinear.from_linear(linear, format=spelling)
    assert torch.equal(sparse.weight, linear.weight) and torch.equal(sparse.stored, mask)
    assert sparse.exact and sparse.sparsity == pytest.approx(1 - mask.float().mean().item())


@pytest.mark.parametrize("format", ["unstructured", "auto"])
def test_a_masked_linear_brings_its_own_mask(format: str) -> None:
    linear, bits = linear_of(24, 16), torch.rand(6, 8) > 0.7
    masked = MaskedLinear(linear, pack_bits(bits), (6, 8), torch.float32)
    sparse = SparseLinear.from_linear(masked, format=format, timer=lambda calls: dict.fromkeys(calls, 1.0))
    x = torch.randn(5, 16)
    close(sparse(x), masked(x))
    with pytest.raises(UserError, match="mask: a MaskedLinear has its own"):
        SparseLinear.from_linear(masked, torch.ones(24, 16, dtype=torch.bool))


@pytest.mark.parametrize("spelling", FORMATS)
def test_gradients_are_those_of_the_stored_weights(spelling: str) -> None:
    sparse, linear, mask = pair(spelling, dtype=torch.float64, activation="tanh", trainable=True)
    x = torch.randn(2, 20, 16, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    upstream = torch.randn(2, 20, 24, dtype=torch.float64)
    sparse(x).backward(upstream)
    torch.tanh(linear(twin)).backward(upstream)
    close(x.grad, twin.grad)
    close(sparse.bias.grad, linear.bias.grad)
    dense = copy.deepcopy(sparse)
    with torch.no_grad():
        dense.values.copy_(sparse.values.grad)
    close(dense.weight, linear.weight.grad * mask)


@pytest.mark.parametrize("spelling", FORMATS[:4])
def test_pruned_weights_stay_zero_in_training(spelling: str) -> None:
    sparse, _, mask = pair(spelling, trainable=True)
    before = sparse.weight.detach().clone()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
    assert torch.equal(sparse.weight != 0, mask)
    assert bool((sparse.weight != before)[mask].all())


def test_formats_that_store_pruned_weights_cannot_be_trained() -> None:
    linear, mask = linear_of(24, 16), mask_for("unstructured", 24, 16)
    for spelling in ("blocks:4x2", "dense"):
        with pytest.raises(UserError, match=f"'{spelling}': it stores pruned weights as zeros here"):
            SparseLinear.from_linear(linear, mask, format=spelling, trainable=True)
        sparse = SparseLinear.from_linear(linear, mask, format=spelling)
        assert not sparse.exact and not sparse.values.requires_grad and sparse.bias.requires_grad
        assert repr(sparse).endswith("activation=none, frozen: pruned weights are stored too)")
        # The gradient of x is right all the same.
        x = torch.randn(3, 16, requires_grad=True)
        sparse(x).sum().backward()
        close(x.grad, (linear.weight * mask).sum(0).expand(3, 16).detach())
        sparse.requires_grad_(True)
        for rows in (3, 40):
            with pytest.raises(UserError, match=r"freeze the layer with requires_grad_\(False\)"):
                sparse(torch.randn(rows, 16))
            with torch.no_grad():
                sparse(torch.randn(rows, 16))


def test_auto_in_training_never_takes_a_format_that_cannot_be_trained() -> None:
    linear, mask = linear_of(32, 32), mask_for("unstructured", 32, 32)
    quick_dense = {"F.linear": 1.0, "dense_linear": 1.0}
    sparse = SparseLinear.from_linear(
        linear, mask, trainable=True, timer=lambda calls: {name: quick_dense.get(name, 2.0) for name in calls}
    )
    assert sparse.format == "unstructured" and sparse.choice is not None and sparse.choice.format == "dense"
    assert set(sparse.choice.seconds) == {"F.linear", "dense_linear", "unstructured"}


def test_auto_takes_what_the_timer_says() -> None:
    linear, mask = linear_of(32, 32), mask_for("blocks:4x2", 32, 32)
    linear, times = linear.bfloat16(), {"blocks:4x2": 0.5, "F.linear": 2.0}
    sparse = SparseLinear.from_linear(linear, mask, timer=lambda calls: {name: times.get(name, 1.0) for name in calls})
    assert sparse.format == "blocks:4x2" and isinstance(sparse.choice, Choice) and sparse.choice.speedup == 2.0
    dense = SparseLinear.from_linear(linear, mask, timer=lambda calls: dict.fromkeys(calls, 1.0), rows=(7,))
    assert dense.format == "dense" and dense.choice is not None and dense.choice.rows == (7,)


@pytest.mark.parametrize("spelling", FORMATS)
def test_back_to_a_linear(spelling: str) -> None:
    for trainable in (False, True):
        sparse, linear, _ = pair(spelling, trainable=trainable)
        back = sparse.eval().to_linear()
        assert type(back) is nn.Linear and not back.training and back.weight.requires_grad == trainable
        assert torch.equal(back.weight, linear.weight) and torch.equal(back.bias, linear.bias)
        assert back.weight.data_ptr() != sparse.values.data_ptr()
    with pytest.raises(UserError, match=r"'relu', which nn.Linear cannot"):
        pair(spelling, activation="relu")[0].to_linear()


def test_its_tensors_are_its_own() -> None:
    linear = linear_of(24, 16)
    sparse = SparseLinear.from_linear(linear, format="dense")
    with torch.no_grad():
        sparse.values.zero_()
        sparse.bias.zero_()
    assert bool((linear.weight != 0).all()) and bool((linear.bias != 0).all())


def test_the_printed_module_says_what_it_is() -> None:
    sparse, _, mask = pair("blocks:4x2", activation="gelu")
    kept = int(mask.sum())
    assert repr(sparse) == (
        f"SparseLinear(in_features=16, out_features=24, bias=True, format=blocks:4x2, sparsity={1 - kept / 384:.1%}, "
        f"bytes={kept * 4 + kept // 8 * 4 + 28:,} (dense 1,536), activation=gelu)"
    )


@pytest.mark.parametrize("trained", [False, True])
def test_under_autocast_it_computes_as_nn_linear_does(trained: bool) -> None:
    sparse, linear, _ = pair("unstructured", 260, 132, trainable=trained)
    x = torch.randn(20, 132, requires_grad=trained)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = sparse(x), linear(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    if trained:
        out.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == sparse.values.grad.dtype == torch.float32


def test_what_from_linear_refuses() -> None:
    linear = linear_of(24, 16)
    ones = torch.ones(24, 16, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"linear: expected nn.Linear or MaskedLinear, got Conv1d"):
        SparseLinear.from_linear(nn.Conv1d(4, 4, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask: expected \[24, 16\] like the weight, got \[16, 24\]"):
        SparseLinear.from_linear(linear, ones.T)
    with pytest.raises(TypeError, match=r"mask: expected bool, True where kept, got torch.float32"):
        SparseLinear.from_linear(linear, ones.float())
    with pytest.raises(ValueError, match="weight: expected data, got a tensor on the meta device"):
        SparseLinear.from_linear(nn.Linear(4, 4, device="meta"))
    with pytest.raises(UserError, match="unknown format 'unstructurd'; did you mean 'unstructured'"):
        SparseLinear.from_linear(linear, format="unstructurd")
    with pytest.raises(UserError, match="unknown activation 'gulu'; did you mean 'gelu'"):
        SparseLinear.from_linear(linear, activation="gulu")
    with pytest.raises(ValueError, match="2:4 keeps at most 2 of 4, but row 0"):
        SparseLinear.from_linear(linear, format="semi_structured:2:4")
    with pytest.raises(ValueError, match=r"block: 5x2 does not divide the weight \[24, 16\]"):
        SparseLinear.from_linear(linear, format="blocks:5x2")
    with pytest.raises(UserError, match=r"dtype: expected a float dtype such as torch.bfloat16, got torch.int8"):
        SparseLinear.from_linear(linear, dtype=torch.int8)
    with pytest.raises(UserError, match=r"rows: expected numbers of rows of x, .* got \(\)"):
        SparseLinear.from_linear(linear, rows=())
    linear.weight = nn.Parameter(torch.ones(24, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"weight: expected a float tensor, got torch.int8"):
        SparseLinear.from_linear(linear)
    with pytest.raises(UserError, match="format: 'auto' needs a weight to measure"):
        SparseLinear(16, 24, format="auto")
    for sizes, name in (((-1, 24), "in_features"), ((16, 2.0), "out_features"), ((16, "24"), "out_features")):
        with pytest.raises(UserError, match=f"{name}: expected a number of features, got"):
            SparseLinear(*sizes)  # type: ignore[arg-type]


def test_what_is_no_tensor_or_word_is_named() -> None:
    linear = linear_of(24, 16)
    for mask, kind in (([[True]], "list"), (torch.ones(24, 16, dtype=torch.bool).to_sparse(), "torch.sparse_coo")):
        with pytest.raises(TypeError, match=rf"mask: expected a bool tensor \[24, 16\], got a {kind}"):
            SparseLinear.from_linear(linear, mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"format: expected the spelling of one, e.g. 'blocks:8x2', got None"):
        SparseLinear.from_linear(linear, format=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown activation None; did you mean 'none'"):
        SparseLinear.from_linear(linear, activation=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dtype: expected a float dtype .* got torch.float8_e4m3fn"):
        SparseLinear.from_linear(linear, dtype=torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"got a SparseLinear; give its to_linear\(\)"):
        SparseLinear.from_linear(SparseLinear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: expected data, got a lazy layer's"):
        SparseLinear.from_linear(nn.LazyLinear(4))
    linear.weight = nn.Parameter(torch.eye(4).to_sparse())
    with pytest.raises(TypeError, match=r"weight: expected a plain tensor, got a torch.sparse_coo"):
        SparseLinear.from_linear(linear)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("spelling", FORMATS)
def test_an_x_that_does_not_fit_is_named(spelling: str, activation: str, rows: int) -> None:
    sparse = pair(spelling, activation=activation)[0]
    for x in (torch.randn(rows, 24), torch.randn(())):
        with pytest.raises(ValueError, match=rf"x: expected \[..., 16\] .* got {re.escape(str(list(x.shape)))}"):
            sparse(x)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        with pytest.raises(ValueError, match=rf"x: expected torch.float32 like \w+, got {dtype}"):
            sparse(torch.ones(rows, 16, dtype=dtype))
    if spelling != "dense":
        with pytest.raises(ValueError, match=r"x: expected on cpu like .* got meta"):
            sparse(torch.ones(rows, 16, device="meta"))


def test_what_could_be_trained_still_can() -> None:
    linear, mask = linear_of(24, 16), mask_for("unstructured", 24, 16)
    sparse = SparseLinear.from_linear(linear, mask, format="unstructured")
    assert sparse.values.requires_grad and sparse.bias.requires_grad
    linear.bias.requires_grad_(False)
    sparse = SparseLinear.from_linear(linear, mask, format="unstructured")
    assert sparse.values.requires_grad and not sparse.bias.requires_grad
    for asked in (False, True):
        sparse = SparseLinear.from_linear(linear, mask, format="unstructured", trainable=asked)
        assert sparse.values.requires_grad == sparse.bias.requires_grad == asked
    # Measured for inference, unless it is asked for.
    measured = SparseLinear.from_linear(linear, mask, timer=lambda calls: dict.fromkeys(calls, 1.0))
    assert measured.format == "dense" and not measured.values.requires_grad and "frozen" in repr(measured)


def test_the_activation_may_be_set_to_a_known_one() -> None:
    sparse, linear, _ = pair("unstructured")
    sparse.activation = "relu"
    x = torch.randn(3, 16)
    close(sparse(x), linear(x).relu())
    with pytest.raises(UserError, match="unknown activation 'gulu'; did you mean 'gelu'"):
        sparse.activation = "gulu"
    # What is saved is the weight as it was made: the activation belongs to the model around it.
    pair("unstructured")[0].load_state_dict(sparse.state_dict())
