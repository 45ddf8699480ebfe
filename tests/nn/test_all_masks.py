"""All masks of a model together: replacing and restoring, gradients of coupled units, state, copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from sparsebert.errors import UserError
from sparsebert.models.prunable import prunable_matrices
from sparsebert.nn import MaskedEmbedding, MaskedLinear, Masks
from sparsebert.ops.bits import expand_grid
from sparsebert.patterns import Matrix, parse_pattern

PATTERNS = ("unstructured", "2:4", "block:4x4", "neurons", "heads")
IDS = torch.tensor([[2, 5, 6, 9, 3, 0], [2, 7, 8, 13, 14, 3]])
ATTENTION = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])


class Whole(nn.Module):
    """A base and its masks in one module, as training has them."""

    def __init__(
        self,
        kind: str = "bert",
        pattern: str = "unstructured",
        masked: Sequence[str] = ("encoder",),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.base = tiny.base(kind, seed)
        if dtype == torch.float64:
            self.base = self.base.double()
        self.masks = Masks(self.base, prunable_matrices(self.base, masked), parse_pattern(pattern), dtype)

    def forward(self) -> Tensor:
        return run(self.base)

    def scores(self, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(group.shape, generator=generator) for group in self.masks.groups]

    def prune(self, seed: int = 1, sparsity: float | None = None) -> None:
        pattern = self.masks.pattern
        self.masks.select(self.scores(seed), pattern.default_sparsity if sparsity is None else sparsity, "global")


def run(base: nn.Module) -> Tensor:
    """Last states; the fixed extra factor makes every entry matter differently."""
    states = base(input_ids=IDS, attention_mask=ATTENTION).last_hidden_state
    return states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_masks_that_keep_everything_change_nothing(kind: str) -> None:
    plain = tiny.base(kind)
    whole = Whole(kind, masked=("encoder", "embeddings"))
    torch.testing.assert_close(whole(), run(plain))
    assert whole.masks.sparsity() == 0.0
    assert all(bool(mask.all()) for mask in whole.masks.dense().values())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_masked_matrix_is_replaced_and_shares_its_parameters(kind: str) -> None:
    plain = tiny.base(kind)
    old = dict(plain.named_modules())
    matrices = prunable_matrices(plain, ("encoder", "embeddings"))
    masks = Masks(plain, matrices, parse_pattern("unstructured"), torch.float32)
    replaced = {name for name, m in plain.named_modules() if isinstance(m, MaskedLinear | MaskedEmbedding)}
    assert replaced == {matrix.name for matrix in matrices}
    for name in replaced:
        new = plain.get_submodule(name)
        assert new.weight is old[name].weight
        assert getattr(new, "bias", None) is getattr(old[name], "bias", None)
    assert masks.weights() == {matrix.name: old[matrix.name].weight for matrix in matrices}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_model_computes_with_the_masked_weights(kind: str, pattern: str) -> None:
    whole = Whole(kind, pattern)
    whole.prune()
    state = {f"{name}.weight": whole.masks.weights()[name] * mask for name, mask in whole.masks.dense().items()}
    torch.testing.assert_close(whole(), by_hand(kind, state))


def by_hand(kind: str, weights: dict[str, Tensor]) -> Tensor:
    """A plain model that runs with some weights given from outside."""
    base = tiny.base(kind)
    base.to(next(iter(weights.values())).dtype)

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = base

        def forward(self) -> Tensor:
            return run(self.base)

    return functional_call(Run(), {f"base.{name}": weight for name, weight in weights.items()}, ())


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_of_all_scores_and_weights_are_those_of_an_explicit_product(kind: str, pattern: str) -> None:
    masked = ("encoder",) if pattern in ("neurons", "heads") else ("encoder", "word_embeddings")
    whole = Whole(kind, pattern, masked, torch.float64)
    whole.prune()
    whole.masks.learn(whole.scores())
    whole().square().sum().backward()
    assert whole.masks.scores is not None

    units = [mask.double().requires_grad_() for mask in whole.masks.units()]
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in whole.masks.weights().items()}
    products = {
        f"{view.matrix.name}.weight": weights[view.matrix.name]
        * expand_grid(unit.reshape(view.grid), view.matrix.shape)
        for group, unit in zip(whole.masks.groups, units, strict=True)
        for view in group.views
    }
    by_hand(kind, products).square().sum().backward()
    for score, unit, group in zip(whole.masks.scores, units, whole.masks.groups, strict=True):
        assert score.grad is not None and unit.grad is not None
        torch.testing.assert_close(score.grad, unit.grad.float(), msg=lambda text, group=group: f"{group.name}: {text}")
        assert bool((unit.grad != 0).any())
    for name, weight in whole.masks.weights().items():
        mask = whole.masks.dense()[name]
        torch.testing.assert_close(weight.grad, weights[name].grad)
        assert bool((weight.grad[~mask] == 0).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_score_tensor_appears_once_among_the_parameters(pattern: str) -> None:
    whole = Whole(pattern=pattern)
    before = {id(parameter) for parameter in whole.parameters()}
    whole.masks.learn(whole.scores())
    scores = list(whole.masks.scores or [])
    assert [tuple(score.shape) for score in scores] == [group.shape for group in whole.masks.groups]
    names = [name for name, parameter in whole.named_parameters(remove_duplicate=False) if id(parameter) not in before]
    assert names == [f"masks.scores.{index}" for index in range(len(scores))]


def test_frozen_masks_take_no_gradient() -> None:
    whole = Whole()
    whole.masks.learn(whole.scores())
    whole.masks.freeze()
    whole().sum().backward()
    assert all(score.grad is None for score in whole.masks.scores or [])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("allocation", ["global", "matrix"])
def test_select_is_the_patterns_own_selection(pattern: str, allocation: str) -> None:
    whole = Whole(pattern=pattern)
    masks, scores = whole.masks, whole.scores()
    masks.select(scores, masks.pattern.default_sparsity, allocation)  # type: ignore[arg-type]
    expected = masks.pattern.select(masks.groups, scores, masks.pattern.default_sparsity, allocation)  # type: ignore[arg-type]
    assert all(torch.equal(bits, want) for bits, want in zip(masks.bits, expected, strict=True))
    check_products(masks)
    masks.above(scores, 0.25)
    expected = masks.pattern.above(masks.groups, scores, 0.25)
    assert all(torch.equal(bits, want) for bits, want in zip(masks.bits, expected, strict=True))
    check_products(masks)


def check_products(masks: Masks, dtype: torch.dtype = torch.float32) -> None:
    """Every module's cached product is its weight where kept and +0.0 elsewhere."""
    for name, mask in masks.dense().items():
        module = masks._base[0].get_submodule(name)
        expected = torch.where(mask, module.weight, torch.zeros(())).to(dtype)
        assert torch.equal(module.masked_weight.view(torch.uint8), expected.view(torch.uint8)), name


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "neurons"])
def test_select_refuses_what_cannot_be(pattern: str) -> None:
    masks = Whole(pattern=pattern).masks
    scores = [torch.zeros(group.shape) for group in masks.groups]
    for sparsity in (1.0, -0.1, math.nan):
        with pytest.raises(UserError, match="sparsity"):
            masks.select(scores, sparsity, "global")
    with pytest.raises(UserError, match="allocation"):
        masks.select(scores, 0.5, "rows")  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_counts_are_those_of_the_units(pattern: str) -> None:
    whole = Whole(pattern=pattern)
    whole.prune()
    units = whole.masks.units()
    pruned, total = whole.masks.counts()
    assert total == sum(unit.numel() for unit in units)
    assert pruned == sum(int((~unit).sum()) for unit in units)
    assert whole.masks.sparsity() == pruned / total == 0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dense_masks_repeat_each_unit_over_its_weights(pattern: str) -> None:
    whole = Whole(pattern=pattern)
    whole.prune()
    dense = whole.masks.dense()
    weights = whole.masks.weights()
    assert {name: mask.shape for name, mask in dense.items()} == {name: w.shape for name, w in weights.items()}
    for group, unit in zip(whole.masks.groups, whole.masks.units(), strict=True):
        for view in group.views:
            rows, columns = (side // cells for side, cells in zip(view.matrix.shape, view.grid, strict=True))
            grid = unit.reshape(view.grid)
            for i, j in ((0, 0), (view.grid[0] - 1, view.grid[1] - 1)):
                block = dense[view.matrix.name][i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                assert bool((block == grid[i, j]).all())


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_remove_leaves_a_plain_model_with_exact_zeros(kind: str, pattern: str) -> None:
    masked = ("encoder",) if pattern in ("neurons", "heads") else ("encoder", "embeddings")
    plain = tiny.base(kind)
    whole = Whole(kind, pattern, masked)
    whole.prune(sparsity=0.5)
    before = whole()
    expected = whole.masks.dense()
    masks = whole.masks.remove()
    assert {type(module) for module in whole.base.modules()} == {type(module) for module in plain.modules()}
    assert masks.keys() == expected.keys() and all(torch.equal(masks[name], expected[name]) for name in masks)
    assert whole.base.state_dict().keys() == plain.state_dict().keys()
    for name, weight in plain.named_parameters():
        kept = masks.get(name.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
        after = bits_of(whole.base.get_parameter(name))
        assert torch.equal(after, torch.where(kept, bits_of(weight), 0)), name
    torch.testing.assert_close(whole(), before)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_zero_pruned_sets_weights_to_zero_in_place(pattern: str) -> None:
    whole = Whole(pattern=pattern)
    whole.prune()
    first = {name: (weight.data_ptr(), weight.detach().clone()) for name, weight in whole.masks.weights().items()}
    whole.masks.zero_pruned()
    for name, mask in whole.masks.dense().items():
        weight = whole.masks.weights()[name]
        assert weight.data_ptr() == first[name][0]
        assert torch.equal(bits_of(weight), torch.where(mask, bits_of(first[name][1]), 0))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_comes_back_with_its_products(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    whole = Whole(pattern=pattern, dtype=dtype)
    whole.masks.learn(whole.scores())
    whole.prune()
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    other = Whole(pattern=pattern, dtype=dtype, seed=5)
    other.masks.learn(other.scores(seed=6))
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    other.masks.refresh()
    check_products(other.masks, dtype)
    assert torch.equal(other(), whole())
    assert all(torch.equal(a, b) for a, b in zip(other.masks.units(), whole.masks.units(), strict=True))
    scores = [list(masks.scores or []) for masks in (whole.masks, other.masks)]
    assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))


def test_only_weights_masks_and_scores_are_saved() -> None:
    whole = Whole()
    plain = {f"base.{name}" for name in tiny.base().state_dict()}
    masks = {f"masks.{name}_{i}" for name in ("bits", "ever_pruned") for i in range(len(whole.masks.groups))}
    assert set(whole.state_dict()) == plain | masks
    whole.masks.learn(whole.scores())
    scores = {f"masks.scores.{index}" for index in range(len(whole.masks.groups))}
    assert set(whole.state_dict()) == plain | masks | scores


@pytest.mark.parametrize("pattern", ["unstructured", "heads"])
def test_a_move_of_all_tensors_keeps_masks_and_modules_together(pattern: str) -> None:
    whole = Whole(pattern=pattern)
    whole.masks.learn(whole.scores())
    whole.prune()
    before = whole()
    whole._apply(lambda tensor: tensor.clone())  # what a move to another device does to every tensor
    assert torch.equal(whole(), before)
    whole.prune(seed=2)
    check_products(whole.masks)
    whole().sum().backward()
    assert all(score.grad is not None for score in whole.masks.scores or [])
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.prune(seed=3)
    whole._apply(lambda tensor: tensor.clone())
    whole.load_state_dict(saved)
    whole.masks.refresh()
    check_products(whole.masks)
    whole.masks.zero_pruned()
    whole.masks.remove()
    assert whole.masks.sparsity() == 0.5


def test_a_change_of_dtype_is_followed() -> None:
    whole = Whole()
    whole.prune()
    before = whole()
    whole.double()
    torch.testing.assert_close(whole(), before.double(), rtol=1e-4, atol=1e-5)


def test_a_deep_copy_stands_on_its_own() -> None:
    whole = Whole(pattern="heads")
    whole.masks.learn(whole.scores())
    whole.prune()
    before, weights = whole(), {name: w.detach().clone() for name, w in whole.masks.weights().items()}
    twin = copy.deepcopy(whole)
    assert torch.equal(twin(), before)
    twin.prune(seed=9)
    twin.masks.zero_pruned()
    check_products(twin.masks)
    twin().sum().backward()
    assert all(score.grad is not None for score in twin.masks.scores or [])
    assert all(score.grad is None for score in whole.masks.scores or [])
    twin.masks.remove()
    assert torch.equal(whole(), before)
    assert all(torch.equal(w, weights[name]) for name, w in whole.masks.weights().items())


def test_only_plain_linears_and_embeddings_can_be_masked() -> None:
    whole = Whole()
    with pytest.raises(TypeError, match=r"query.*MaskedLinear"):
        Masks(whole.base, prunable_matrices(whole.base), parse_pattern("unstructured"), torch.float32)
    base = tiny.base()
    with pytest.raises(TypeError, match=r"LayerNorm"):
        Masks(base, [Matrix("embeddings.LayerNorm", (1, 16), "pooler")], parse_pattern("unstructured"), torch.float32)


def test_magnitude_ranks_what_is_pruned_below_every_other_unit() -> None:
    whole = Whole()
    masks = whole.masks
    first = next(iter(masks.weights().values()))
    with torch.no_grad():
        first[0, :4] = 0.0  # live weights that happen to be zero
    whole.prune(seed=1, sparsity=0.3)
    before = masks.units()
    with torch.no_grad():
        for weight in masks.weights().values():
            weight.add_(1.0)  # pruned weights have moved off zero
    for score, kept, weight in zip(masks.magnitude(), before, masks.weights().values(), strict=True):
        assert bool((score[~kept] == -1).all())
        assert torch.equal(score[kept], weight.abs()[kept])
    masks.select(masks.magnitude(), 0.6, "global")
    assert not any(bool((now & ~old).any()) for now, old in zip(masks.units(), before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_of_it_on_a_gpu(pattern: str) -> None:
    base: PreTrainedModel = tiny.base().cuda()
    masks = Masks(base, prunable_matrices(base), parse_pattern(pattern), torch.float32)
    masks.select(masks.magnitude(), masks.pattern.default_sparsity, "global")
    masks.learn([score.clone() for score in masks.magnitude()])
    masks.above(list(masks.scores or []), 0.1)
    base(input_ids=IDS.cuda(), attention_mask=ATTENTION.cuda()).last_hidden_state.sum().backward()
    assert all(score.grad is not None for score in masks.scores or [])
    masks.zero_pruned()
    masks.refresh()
    assert masks.remove().keys() == masks.weights().keys()
