"""SparseLinear's tensors: saved, loaded into layers of any format, moved, cast and copied; indices validated."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nn.sparse_layers import FORMATS, close, pair
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsebert.errors import UserError
from sparsebert.nn import SparseLinear

INDEX = {
    "unstructured": ("offsets", "rows", "counts", "starts"),
    "blocks:4x2": ("columns", "row_starts"),
    "semi_structured:2:4": ("positions",),
    "compact": ("kept_rows", "kept_columns"),
    "dense": (),
    "bitmap": ("bits", "starts"),
    "two_four": ("positions", "places"),
}


@pytest.mark.parametrize("spelling", FORMATS)
def test_an_empty_layer_has_nothing_but_zeros(spelling: str) -> None:
    layer = SparseLinear(16, 24, format=spelling)
    assert layer.format == spelling and bool((layer(torch.randn(3, 16)) == 0).all())
    assert set(layer.state_dict()) == {"values", "bias", "layout", *INDEX[spelling]}
    bare = SparseLinear(16, 24, bias=False, format=spelling, dtype=torch.bfloat16, trainable=True)
    assert bare.bias is None and bare.values.dtype == torch.bfloat16 and bare.values.requires_grad


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("target", FORMATS)
def test_a_saved_layer_loads_into_one_of_any_format(source: str, target: str, assign: bool, tmp_path: Path) -> None:
    sparse, _, _ = pair(source, activation="gelu")
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    layer = SparseLinear(16, 24, format=target, activation="gelu")
    layer.load_state_dict(state, assign=assign)
    x = torch.randn(20, 16)
    assert layer.format == source and layer.exact and torch.equal(layer(x), sparse(x)) and repr(layer) == repr(sparse)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in sparse.state_dict().items())


def test_it_is_found_in_a_model_by_its_prefix_and_survives_torch_save() -> None:
    model = nn.Sequential(pair("unstructured")[0], nn.ReLU(), pair("blocks:4x2", 16, 24)[0])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = nn.Sequential(SparseLinear(16, 24), nn.ReLU(), SparseLinear(24, 16))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 16)
    assert torch.equal(fresh(x), model(x))


def test_a_layer_that_is_loaded_keeps_its_parameters_dtype_and_freeze() -> None:
    sparse, _, _ = pair("unstructured")
    layer = pair("unstructured", dtype=torch.float64, trainable=True)[0]
    values, bias = layer.values, layer.bias
    layer.load_state_dict(sparse.state_dict())
    # The same parameters: an optimizer that has them goes on.
    assert layer.values is values and layer.bias is bias and values.dtype == torch.float64 and values.requires_grad
    torch.testing.assert_close(layer.weight.float(), sparse.weight)
    layer.load_state_dict(pair("blocks:4x2")[0].state_dict())
    assert layer.values.dtype == torch.float64 and layer.values.requires_grad and layer.choice is None


def test_what_was_inexact_is_so_after_loading() -> None:
    linear = pair("unstructured")[1]
    sparse = SparseLinear.from_linear(linear, format="blocks:4x2")
    layer = SparseLinear(16, 24, trainable=True)
    layer.load_state_dict(sparse.state_dict())
    assert not layer.exact and not layer.values.requires_grad and layer.bias.requires_grad
    layer(torch.randn(3, 16))
    with pytest.raises(UserError, match="it stores pruned weights as zeros here"):
        layer.requires_grad_()(torch.randn(3, 16))


def test_after_loading_the_gradient_of_x_is_that_of_the_new_weight() -> None:
    layer, other = pair("unstructured", 24, 24)[0], pair("unstructured", 24, 24)[0]
    with torch.no_grad():
        moved = SparseLinear.from_linear(nn.Linear(24, 24), other.stored.T.contiguous(), format="unstructured")
    layer.prepare()
    layer.load_state_dict(moved.state_dict())
    x = torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    close(x.grad, moved.weight.sum(0).expand(3, 24))


@pytest.mark.parametrize("spelling", FORMATS)
def test_keys_that_are_missing_or_unexpected_are_torchs_errors(spelling: str) -> None:
    state = pair(spelling)[0].state_dict()
    for key in state:
        layer = nn.Sequential(SparseLinear(16, 24, format="unstructured"))
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        some = {f"0.{name}": tensor for name, tensor in state.items() if name != key}
        with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: .*"0\.{key}"'):
            layer.load_state_dict(some)
        if key != "bias":
            result = layer.load_state_dict(some, strict=False)
            assert key in "".join(result.missing_keys) and result.unexpected_keys == list(some)
            assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    layer = SparseLinear(16, 24)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "more"'):
        layer.load_state_dict({**state, "more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        layer.load_state_dict(nn.Linear(16, 24).state_dict())
    result = layer.load_state_dict({"values": torch.zeros(0)}, strict=False)
    assert "layout" in result.missing_keys and result.unexpected_keys == ["values"]


def test_a_layer_of_another_shape_or_activation_is_refused() -> None:
    state = pair("unstructured")[0].state_dict()
    with pytest.raises(RuntimeError, match=r"the saved weight is \[24, 16\], the layer's \[16, 24\]"):
        SparseLinear(24, 16).load_state_dict(state)
    with pytest.raises(RuntimeError, match="the saved layer applies 'none' after its bias, this one 'relu'"):
        SparseLinear(16, 24, activation="relu").load_state_dict(state)


@given(st.sampled_from(FORMATS[:4]), st.data())
@settings(deadline=None, max_examples=150)
def test_an_index_that_was_tampered_with_is_never_taken(spelling: str, data: Any) -> None:
    state = {name: tensor.clone() for name, tensor in pair(spelling)[0].state_dict().items()}
    name = data.draw(st.sampled_from([*INDEX[spelling], "layout"]))
    tensor = state[name]
    place = data.draw(st.integers(0, tensor.numel() - 1))
    limits = torch.iinfo(tensor.dtype)
    value = data.draw(st.sampled_from([limits.min, limits.max, 0, 1, 200]))
    changed = tensor.view(-1)[place].item() != value
    tensor.view(-1)[place] = value
    layer = SparseLinear(16, 24)
    try:
        layer.load_state_dict(state)
    except ValueError as error:
        assert changed and layer.format == "unstructured" and layer.values.numel() == 0
        assert str(error).split(":")[0] in state
    except RuntimeError as error:  # a layout of another shape or activation, or other tensors than it says
        assert changed and name == "layout" and "Error(s) in loading state_dict" in str(error)
    else:
        # Another index of the same weight count may be a right one; then it is what the layer has.
        layer._stored().check()
        layer(torch.randn(20, 16))


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("offsets", torch.zeros(3), "offsets: expected torch.uint8"),
        ("values", torch.zeros(3, dtype=torch.int64), "values: expected float"),
        ("layout", torch.zeros(3), "layout: expected an int64 tensor"),
        ("layout", torch.tensor([2, 1, 0, 1, 24, 16, 256, 128]), "layout: expected version 1, got 2"),
        ("layout", torch.tensor([1, 9, 0, 1, 24, 16]), "layout: expected .version, format, activation"),
        ("layout", torch.tensor([1, 1, 0, 1, 24, 16, 999, 128]), "layout: expected tiles of"),
        ("layout", torch.tensor([1, 1, 0, 1, 24, 16]), "layout: expected 8 numbers for unstructured"),
    ],
)
def test_a_tensor_that_cannot_be_is_named_with_its_key(name: str, tensor: Tensor, said: str) -> None:
    state = {**pair("unstructured")[0].state_dict(), name: tensor}
    model = nn.ModuleDict({"ffn": SparseLinear(16, 24)})
    with pytest.raises(ValueError, match=rf"ffn\.{said}"):
        model.load_state_dict({f"ffn.{key}": value for key, value in state.items()})


@pytest.mark.parametrize("spelling", FORMATS)
def test_casting_changes_the_parameters_alone(spelling: str) -> None:
    for cast in ("to", "type"):
        sparse, linear, _ = pair(spelling)
        index = {name: tensor.clone() for name, tensor in sparse.named_buffers()}
        getattr(sparse.prepare(), cast)(torch.float64)
        assert sparse.values.dtype == sparse.bias.dtype == torch.float64
        for name, tensor in sparse.named_buffers():
            assert tensor.dtype == index[name].dtype and torch.equal(tensor, index[name])
        x = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
        close(sparse(x), linear.double()(x))
        sparse(x).sum().backward()


@pytest.mark.parametrize("spelling", FORMATS)
def test_the_meta_device_and_back(spelling: str) -> None:
    sparse = pair(spelling)[0]
    meta = SparseLinear(16, 24, format=spelling, device="meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    with torch.device("meta"):
        assert SparseLinear(16, 24, format=spelling).values.is_meta
    meta.load_state_dict(sparse.state_dict(), assign=True)
    x = torch.randn(20, 16)
    assert torch.equal(meta(x), sparse(x))
    # Memory that is not filled holds no index that a kernel may read.
    empty = copy.deepcopy(sparse).to("meta").to_empty(device="cpu")
    empty._stored().check()
    assert empty.format == spelling
    empty.load_state_dict(sparse.state_dict())
    assert torch.equal(empty(x), sparse(x))
    emptied = copy.deepcopy(sparse).to_empty(device="cpu")
    emptied._stored().check()


@pytest.mark.parametrize("spelling", FORMATS)
def test_copies_are_whole_and_independent(spelling: str) -> None:
    sparse = pair(spelling, trainable=True)[0]
    x = torch.randn(3, 16, requires_grad=True)
    sparse(x).sum().backward()
    expected = sparse(x).detach()
    for other in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), expected) and repr(other) == repr(sparse)
        with torch.no_grad():
            other.values.zero_()
        assert torch.equal(sparse(x), expected)
        sparse.zero_grad()
        other(x).sum().backward()
        assert sparse.values.grad is None and other.values.grad is not None
