"""What every storage format promises."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from formats.stored import MAKERS, SHAPES, mask_for, numbered, same
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsebert.formats import FORMATS, Format, parse_format

every = pytest.mark.parametrize("name", list(FORMATS))
drawn = given(which=st.integers(0, 9), density=st.sampled_from([0.0, 0.05, 0.4, 0.95, 1.0]), seed=st.integers(0, 999))


def pick(name: str, which: int, density: float, seed: int) -> tuple[Tensor, Tensor]:
    shape = SHAPES[name][which % len(SHAPES[name])]
    return numbered(shape), mask_for(name, shape, density, seed)


@every
@drawn
def test_to_dense_gives_the_masked_weight_back(name: str, which: int, density: float, seed: int) -> None:
    weight, mask = pick(name, which, density, seed)
    stored = MAKERS[name](weight, mask)
    stored.check()
    masked = torch.where(mask, weight, 0.0)
    assert torch.equal(stored.to_dense(), masked)
    places = stored.stored()
    assert places.dtype == torch.bool and not (mask & ~places).any()
    assert stored.nnz == int(places.sum()) and stored.exact == torch.equal(places, mask)
    assert stored.sparsity == (1 - stored.nnz / mask.numel() if mask.numel() else 0)
    # Without a mask the zeros are what is pruned.
    assert same(MAKERS[name](masked), stored)
    # The structure says which positions are stored, and nothing else does.
    again = MAKERS[name](stored.to_dense(), places)
    assert same(again.replaced(exact=stored.exact), stored)


@every
@drawn
def test_the_tensors_make_the_format_again(name: str, which: int, density: float, seed: int) -> None:
    stored = MAKERS[name](*pick(name, which, density, seed))
    tensors = stored.tensors()
    assert next(iter(tensors)) == "values" and stored.name == name
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert stored.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert same(type(stored).from_tensors(tensors, list(stored.shape), stored.options), stored)
    cls, options = parse_format(stored.spelling)
    assert cls is type(stored) and options.items() <= stored.options.items()
    for other in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert same(other, stored) and other.values is not stored.values


@every
@drawn
def test_the_layer_over_it_is_the_layer_over_the_masked_weight(
    name: str, which: int, density: float, seed: int
) -> None:
    weight, mask = pick(name, which, density, seed)
    weight = weight / max(weight.numel(), 1)
    stored = MAKERS[name](weight, mask)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, weight.shape[1], generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(weight.shape[0], generator=generator, dtype=torch.float64).requires_grad_()
    values = stored.values.clone().requires_grad_()
    trained = stored.replaced(values=values)
    y = trained.linear(x, bias, "gelu_tanh", stored.transposed())
    dense = torch.where(mask, weight, 0.0).requires_grad_()
    usual = F.gelu(F.linear(x, dense, bias), approximate="tanh")
    torch.testing.assert_close(y, usual)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    dx, dbias, dvalues = torch.autograd.grad(y, (x, bias, values), grad)
    expected = torch.autograd.grad(usual, (x, bias, dense), grad)
    torch.testing.assert_close((dx, dbias), expected[:2])
    at_stored = torch.where(stored.stored(), expected[2], 0.0)
    torch.testing.assert_close(stored.replaced(values=dvalues).to_dense(), at_stored)
    with torch.no_grad():
        torch.testing.assert_close(trained.linear(x, None, "relu"), F.relu(F.linear(x, dense)))


@every
@drawn
def test_to_dense_is_differentiable(name: str, which: int, density: float, seed: int) -> None:
    stored = MAKERS[name](*pick(name, which, density, seed))
    values = stored.values.clone().requires_grad_()
    dense = stored.replaced(values=values).to_dense()
    (gradient,) = torch.autograd.grad(dense.square().sum(), values)
    assert torch.equal(gradient, 2 * stored.values)


@every
@given(which=st.integers(0, 4), density=st.sampled_from([0.1, 0.5, 1.0]), seed=st.integers(0, 999), data=st.data())
def test_a_changed_index_is_refused_or_is_another_structure(
    name: str, which: int, density: float, seed: int, data: Any
) -> None:
    stored = MAKERS[name](*pick(name, which, density, seed))
    for key, tensor in stored.tensors().items():
        if key == "values" or not tensor.numel():
            continue
        changed = tensor.clone()
        limits = torch.iinfo(tensor.dtype)
        near = int(changed.flatten()[0])
        value = st.integers(limits.min, limits.max) | st.integers(max(near - 2, limits.min), near + 2) | st.just(0)
        place = data.draw(st.integers(0, tensor.numel() - 1))
        changed.view(-1)[place] = data.draw(value) & limits.max if limits.min == 0 else data.draw(value)
        other = stored.replaced(**{key: changed})
        try:
            other.check()
        except ValueError as error:
            assert str(error).split(":")[0] in stored.tensors(), error
        else:
            again = MAKERS[name](other.to_dense(), other.stored())
            assert same(again.replaced(exact=stored.exact), other)


@every
def test_wrong_tensors_are_named(name: str) -> None:
    shape = SHAPES[name][0]
    stored = MAKERS[name](numbered(shape), mask_for(name, shape, 0.5, 1))
    for key, tensor in stored.tensors().items():
        dtype = "float" if key == "values" else str(tensor.dtype)
        doubled = torch.stack((tensor, tensor), -1)
        for wrong, message in (
            (tensor.to(torch.int16), rf"{key}: expected {dtype} \[.*, got torch\.int16"),
            (doubled, rf"{key}: expected {dtype} \["),
            (tensor.flatten()[:-1], "expected"),
            (doubled[..., 0], rf"{key}: expected a contiguous tensor"),
        ):
            with pytest.raises(ValueError, match=message):
                stored.replaced(**{key: wrong}).check()
        missing = {k: v for k, v in stored.tensors().items() if k != key}
        with pytest.raises(ValueError, match=rf"tensors: {name} expects \[.*'{key}'.*\], got \["):
            type(stored).from_tensors(missing, stored.shape, stored.options)
    with pytest.raises(ValueError, match=f"options: {name} expects"):
        type(stored).from_tensors(stored.tensors(), stored.shape, {"size": 3})
    with pytest.raises(ValueError, match=r"shape: expected \(N, K\), got"):
        type(stored).from_tensors(stored.tensors(), (1, 2, 3), stored.options)
    with pytest.raises(ValueError, match=r"expected|does not divide"):
        type(stored).from_tensors(stored.tensors(), (1, 1), stored.options)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name][0]
    weight = torch.randn(shape[1], shape[0]).to(dtype).t()
    mask = mask_for(name, shape, 0.5, 2).t().contiguous().t()
    stored = MAKERS[name](weight, mask)
    stored.check()
    assert stored.dtype == dtype and str(stored.device) == "cpu"
    assert torch.equal(stored.to_dense(), torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert same(stored, MAKERS[name](weight.contiguous(), mask.contiguous()))
    wide = stored.to(dtype=torch.float64)
    assert wide.dtype == torch.float64 and torch.equal(wide.to_dense(), stored.to_dense().double())
    assert all(wide.tensors()[key] is tensor for key, tensor in stored.tensors().items() if key != "values")


@every
def test_it_keeps_neither_the_weight_nor_its_gradient(name: str) -> None:
    shape = SHAPES[name][0]
    weight = torch.nn.Parameter(torch.randn(shape))
    mask = mask_for(name, shape, 0.5, 3) if name != "dense" else torch.ones(shape, dtype=torch.bool)
    stored = MAKERS[name](weight, mask)
    before = stored.to_dense()
    with torch.no_grad():
        weight.zero_()
    assert not stored.values.requires_grad and torch.equal(stored.to_dense(), before)


@every
def test_a_nan_that_is_pruned_is_gone(name: str) -> None:
    shape = SHAPES[name][0]
    weight, mask = torch.full(shape, float("nan")), mask_for(name, shape, 0.5, 4)
    assert torch.equal(MAKERS[name](weight, mask).to_dense().isnan(), mask)


@every
def test_a_weight_or_mask_that_does_not_fit_is_named(name: str) -> None:
    shape = SHAPES[name][0]
    weight, mask = torch.randn(shape), mask_for(name, shape, 0.5, 5)
    for change, message in (
        ({"weight": weight[0]}, r"weight: expected float \[N, K\], got torch\.float32 \["),
        ({"weight": weight.long()}, r"weight: expected float \[N, K\], got torch\.int64"),
        ({"weight": weight.to("meta")}, "weight: expected a dense tensor with data, got .* on meta"),
        ({"weight": weight.to_sparse()}, "weight: expected a dense tensor with data, got torch.sparse_coo"),
        ({"mask": mask.float()}, r"mask: expected bool \[.*\] like weight, got torch\.float32"),
        ({"mask": mask[1:]}, r"mask: expected bool \["),
        ({"mask": mask.to("meta")}, "mask: expected on cpu like weight, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            MAKERS[name](**{"weight": weight, "mask": mask, **change})


@every
def test_it_prints_what_it_is(name: str) -> None:
    stored = MAKERS[name](torch.zeros(8, 8))
    share = "0.0%" if name == "dense" else "50.0%" if name in ("semi_structured", "two_four") else "100.0%"
    assert repr(stored) == f"<{stored.spelling} [8, 8] torch.float32, {share} sparse, {stored.nbytes:,} bytes>"


@every
def test_its_layer_compiles_into_one_graph(name: str) -> None:
    shape = SHAPES[name][0]
    stored = MAKERS[name](torch.randn(shape), mask_for(name, shape, 0.5, 6))
    x, values = torch.randn(3, shape[1], requires_grad=True), stored.values.clone().requires_grad_()

    def layer(trained: Format, x: Tensor, transposed: Sequence[Tensor]) -> Tensor:
        return trained.linear(x, None, "gelu", transposed)

    torch.compiler.reset()
    both = []
    trained = stored.replaced(values=values)
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(trained, x, stored.transposed())
        both.append((y, *torch.autograd.grad(y.square().sum(), (x, values))))
    for eager, traced in zip(*both, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_plain_tensor_is_named(name: str) -> None:
    weight = torch.ones(32, 32)
    made = FORMATS[name].from_dense(weight, torch.eye(32, dtype=torch.bool))
    with pytest.raises(TypeError, match="weight: expected a tensor, got list"):
        FORMATS[name].from_dense([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask: expected a tensor, got list"):
        FORMATS[name].from_dense(weight, [True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask: expected a dense tensor, got torch\.sparse_coo"):
        FORMATS[name].from_dense(weight, torch.eye(32, dtype=torch.bool).to_sparse())
    with pytest.raises(TypeError, match="values: expected a tensor, got NoneType"):
        FORMATS[name].from_tensors({**made.tensors(), "values": None}, made.shape, made.options)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"shape: expected \(N, K\), got 'ab'"):
        FORMATS[name].from_tensors(made.tensors(), "ab", made.options)  # type: ignore[arg-type]
    for option in made.option_names:
        for wrong in ("8x2", 8, (4.0, 2.0), (1, 2, 3)):
            with pytest.raises(ValueError, match=rf"{option}: expected \([RC nm,]*\) .* got {re.escape(repr(wrong))}"):
                FORMATS[name].from_dense(weight, **{option: wrong})
