"""MaskedLinear and MaskedEmbedding against torch's own modules with W * mask in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebert.nn import MaskedEmbedding, MaskedLinear
from sparsebert.ops import pack_bits

GRIDS = st.sampled_from([(12, 8), (3, 2), (12, 1), (1, 8), (6, 4), (1, 1)])
SHAPE = (12, 8)


def expand(grid: Tensor, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Each entry repeated over its block, by plain indexing."""
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    return grid[rows[:, None] * grid.shape[0] // shape[0], columns[None, :] * grid.shape[1] // shape[1]]


def mask_over(grid: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(grid, generator=torch.Generator().manual_seed(seed)) > 0.5


def masked_linear(
    grid: tuple[int, int], dtype: torch.dtype, *, bias: bool = True, seed: int = 0
) -> tuple[MaskedLinear, nn.Linear, Tensor]:
    torch.manual_seed(seed)
    linear = nn.Linear(SHAPE[1], SHAPE[0], bias=bias, dtype=torch.float64 if dtype == torch.float64 else None)
    mask = mask_over(grid, seed)
    return MaskedLinear(linear, pack_bits(mask), grid, dtype), linear, expand(mask)


@given(GRIDS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans(), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_a_masked_linear_is_a_linear_with_weights_set_to_zero(
    grid: tuple[int, int], dtype: torch.dtype, bias: bool, seed: int
) -> None:
    masked, linear, mask = masked_linear(grid, dtype, bias=bias, seed=seed)
    x = torch.randn(5, 3, SHAPE[1], dtype=linear.weight.dtype)
    out = masked(x)
    assert out.dtype == dtype
    plain = F.linear(
        x.to(dtype), (linear.weight * mask).to(dtype), None if linear.bias is None else linear.bias.to(dtype)
    )
    torch.testing.assert_close(out, plain)


@given(GRIDS, st.integers(0, 100))
@settings(deadline=None, max_examples=40)
def test_gradients_are_those_of_the_product_with_an_expanded_mask(grid: tuple[int, int], seed: int) -> None:
    masked, linear, mask = masked_linear(grid, torch.float64, seed=seed)
    score = nn.Parameter(torch.randn(grid))
    masked.hold_score(score)
    x = torch.randn(7, SHAPE[1], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(7, SHAPE[0], dtype=torch.float64)
    masked(x).backward(upstream)
    got = {"x": x.grad, "score": score.grad, "weight": linear.weight.grad, "bias": linear.bias.grad}

    units = mask_over(grid, seed).double().requires_grad_()
    weight, bias = linear.weight.detach().requires_grad_(), linear.bias.detach().requires_grad_()
    twin = x.detach().requires_grad_()
    F.linear(twin, weight * expand(units), bias).backward(upstream)
    expected = {"x": twin.grad, "score": units.grad, "weight": weight.grad, "bias": bias.grad}
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(
            got[name], gradient.to(got[name].dtype), msg=lambda text, name=name: f"{name}: {text}"
        )
    assert torch.equal(linear.weight.grad[~mask], torch.zeros_like(linear.weight.grad)[~mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(12, 8), (3, 2), (12, 1)])
def test_the_score_gradient_is_the_weight_gradient_times_the_weight_summed_over_the_block(
    grid: tuple[int, int], dtype: torch.dtype
) -> None:
    masked, linear, _ = masked_linear(grid, dtype)
    score = nn.Parameter(torch.randn(grid))
    masked.hold_score(score)
    x, upstream = torch.randn(64, SHAPE[1]), torch.randn(64, SHAPE[0])
    masked(x).backward(upstream.to(dtype))
    dense = (upstream.to(dtype).double().T @ x.to(dtype).double()) * linear.weight.detach().double()
    rows, columns = SHAPE[0] // grid[0], SHAPE[1] // grid[1]
    blocks = dense.reshape(grid[0], rows, grid[1], columns).sum((1, 3))
    assert score.grad is not None and score.grad.dtype == torch.float32
    error = (score.grad.double() - blocks).norm() / blocks.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def test_the_value_of_a_score_says_nothing_until_the_mask_is_chosen_anew() -> None:
    masked, _, _ = masked_linear((12, 8), torch.float32)
    x = torch.randn(4, SHAPE[1])
    before = masked(x)
    masked.hold_score(nn.Parameter(torch.full((12, 8), -100.0)))
    assert torch.equal(masked(x), before)


def test_a_fixed_mask_leaves_no_gradient_on_scores() -> None:
    masked, linear, _ = masked_linear((12, 8), torch.float32)
    score = nn.Parameter(torch.zeros(12, 8))
    masked.hold_score(score)
    masked.hold_score(None)
    assert masked.score is None
    masked(torch.randn(4, SHAPE[1])).sum().backward()
    assert score.grad is None
    assert linear.weight.grad is not None


def test_a_frozen_weight_gets_no_gradient() -> None:
    masked, linear, _ = masked_linear((12, 8), torch.float32)
    linear.requires_grad_(False)
    score = nn.Parameter(torch.zeros(12, 8))
    masked.hold_score(score)
    masked(torch.randn(4, SHAPE[1])).sum().backward()
    assert linear.weight.grad is None and score.grad is not None


def test_numbers_that_are_no_numbers_in_pruned_places_do_not_get_out() -> None:
    linear = nn.Linear(8, 12)
    mask = mask_over((12, 8))
    with torch.no_grad():
        linear.weight[~mask] = float("nan")
    masked = MaskedLinear(linear, pack_bits(mask), (12, 8), torch.float32)
    assert bool(torch.isfinite(masked(torch.randn(3, 8))).all())
    assert bool(torch.isfinite(masked.plain().weight).all())


def test_a_weight_that_is_no_contiguous_tensor_is_taken() -> None:
    linear = nn.Linear(8, 12)
    linear.weight = nn.Parameter(torch.randn(8, 12).T)
    mask = mask_over((12, 8))
    masked = MaskedLinear(linear, pack_bits(mask), (12, 8), torch.float32)
    x = torch.randn(3, 8)
    torch.testing.assert_close(masked(x), F.linear(x, linear.weight * mask, linear.bias))


def test_the_product_is_made_anew_when_asked() -> None:
    masked, linear, mask = masked_linear((12, 8), torch.float32)
    x = torch.randn(3, 8)
    with torch.no_grad():
        linear.weight.mul_(2)
    masked.refresh()
    torch.testing.assert_close(masked(x), F.linear(x, linear.weight * mask, linear.bias))
    other = ~mask
    masked.set_bits(pack_bits(other))
    torch.testing.assert_close(masked(x), F.linear(x, linear.weight * other, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(12, 8), (3, 2), (12, 1), (1, 8)])
def test_a_masked_embedding_is_an_embedding_with_weights_set_to_zero(grid: tuple[int, int], dtype: torch.dtype) -> None:
    table = nn.Embedding(*SHAPE, padding_idx=2)
    nn.init.normal_(table.weight)
    mask = mask_over(grid)
    masked = MaskedEmbedding(table, pack_bits(mask), grid, dtype)
    ids = torch.tensor([[0, 1, 2, 2], [5, 5, 11, 3]])
    out = masked(ids)
    assert out.dtype == torch.float32 and out.shape == (2, 4, 8)
    torch.testing.assert_close(out, F.embedding(ids, (table.weight * expand(mask)).to(dtype)).float())


@given(GRIDS, st.sampled_from([None, 0, 5, -1]), st.lists(st.integers(0, 11), min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_an_embedding_has_the_gradients_of_the_product_with_an_expanded_mask(
    grid: tuple[int, int], padding: int | None, ids: list[int]
) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(*SHAPE, padding_idx=padding, dtype=torch.float64)
    nn.init.normal_(table.weight)
    mask = mask_over(grid)
    masked = MaskedEmbedding(table, pack_bits(mask), grid, torch.float64)
    score = nn.Parameter(torch.zeros(grid))
    masked.hold_score(score)
    upstream = torch.randn(len(ids), 8, dtype=torch.float64)
    masked(torch.tensor(ids)).backward(upstream)

    units, weight = mask.double().requires_grad_(), table.weight.detach().requires_grad_()
    F.embedding(torch.tensor(ids), weight * expand(units), table.padding_idx).backward(upstream)
    assert units.grad is not None and weight.grad is not None
    torch.testing.assert_close(score.grad, units.grad.float())
    torch.testing.assert_close(table.weight.grad, weight.grad)
    assert bool((table.weight.grad[~expand(mask)] == 0).all())


@pytest.mark.parametrize("training", [True, False])
def test_plain_gives_torch_modules_back_with_the_same_parameters(training: bool) -> None:
    masked, linear, mask = masked_linear((12, 8), torch.bfloat16)
    first = linear.weight.detach().clone()
    plain = masked.train(training).plain()
    assert type(plain) is nn.Linear and plain.training == training
    assert plain.weight is linear.weight and plain.bias is linear.bias
    assert (plain.in_features, plain.out_features) == (8, 12)
    assert torch.equal(plain.weight.view(torch.int32)[mask], first.view(torch.int32)[mask])
    assert torch.equal(plain.weight.view(torch.int32)[~mask], torch.zeros_like(first, dtype=torch.int32)[~mask])

    table = nn.Embedding(*SHAPE, padding_idx=3)
    back = MaskedEmbedding(table, pack_bits(mask), (12, 8), torch.float32).train(training).plain()
    assert type(back) is nn.Embedding and back.training == training
    assert back.weight is table.weight and back.padding_idx == 3
    assert (back.num_embeddings, back.embedding_dim) == SHAPE


def test_the_printed_module_says_what_it_is() -> None:
    masked, _, _ = masked_linear((3, 2), torch.bfloat16)
    assert repr(masked) == "MaskedLinear([12, 8], grid=(3, 2), compute=torch.bfloat16)"
