"""What every method promises, on every pattern: the target met exactly, zeros exact, settings checked."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sparsebert.errors import UserError
from sparsebert.methods import METHODS, Method, Phase
from sparsebert.patterns import units_to_prune

SPARSIFYING = tuple(name for name, method in METHODS.items() if method.sparsifies)
RESETTABLE = ("gmp", "imp", "magnitude", "random")
MOVEMENT = ("movement", "soft_movement")  # a weight that they prune may come back: it is zero in the end only
TEACHABLE = (*RESETTABLE, *MOVEMENT, "smp")
FROZEN = ("adapt_prune", "smp")
CASES = {"unstructured": 0.37, "2:4": None, "block:4x4": 0.6, "neurons": 0.3, "heads": 0.5}
BITS = torch.int32


def weights_of(method: Method) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in method.context.model.base.named_parameters()}


def check_zeros(method: Method, masks: dict[str, Tensor]) -> None:
    """Exactly the pruned weights are +0.0."""
    for name, mask in masks.items():
        weight = method.context.model.base.get_parameter(f"{name}.weight").detach()
        assert torch.equal(weight.view(BITS) == 0, ~mask), name


def check_survivors(method: Method, masks: dict[str, Tensor], first: dict[str, Tensor]) -> None:
    """Everything else has the bits it began with."""
    for name, weight in method.context.model.base.named_parameters():
        kept = masks.get(name.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight.detach().view(BITS)[kept], first[name].view(BITS)[kept]), name


@pytest.mark.parametrize("pattern", CASES)
@pytest.mark.parametrize("name", SPARSIFYING)
def test_the_target_is_met_to_the_last_unit(name: str, pattern: str) -> None:
    method = tiny.build(name, pattern, CASES[pattern])
    first = weights_of(method)
    tiny.by_hand(method, 4)
    pruned, total = method.masks.counts()
    assert pruned == units_to_prune(method.context.sparsity, total)
    masks = method.finish()
    assert {name: mask.dtype for name, mask in masks.items()} == dict.fromkeys(masks, torch.bool)
    check_zeros(method, masks)
    if name in FROZEN:
        check_survivors(method, masks, first)
    else:
        query = "encoder.layer.0.attention.self.query.bias"
        assert not torch.equal(method.context.model.base.get_parameter(query), first[query]), "nothing was trained"


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "heads"])
def test_the_target_is_met_in_every_matrix_if_so_asked(name: str, pattern: str) -> None:
    method = tiny.build(name, pattern, 0.4, allocation="matrix")
    tiny.by_hand(method, 3)
    for unit in method.masks.units():
        assert int((~unit).sum()) == units_to_prune(0.4, unit.numel())


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
def test_other_kinds_of_models_are_pruned_alike(name: str, kind: str) -> None:
    method = tiny.build(name, "neurons", 0.5, kind=kind)
    tiny.by_hand(method, 3)
    masks = method.finish()
    check_zeros(method, masks)
    assert sum(int((~mask).sum()) for mask in masks.values()) * 2 == sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("sparsity", [0.0, 0.9999])
def test_the_ends_of_the_range_work(name: str, sparsity: float) -> None:
    settings = {"prune_rate": 0.9} if name == "imp" else {}
    method = tiny.build(name, sparsity=sparsity, **settings)
    tiny.by_hand(method, 2)
    pruned, total = method.masks.counts()
    assert pruned == units_to_prune(sparsity, total)
    check_zeros(method, method.finish())


@pytest.mark.parametrize("name", SPARSIFYING)
def test_one_step_is_enough_to_end_at_the_target(name: str) -> None:
    method = tiny.build(name, sparsity=0.5)
    tiny.by_hand(method, 1)
    assert method.masks.sparsity() == 0.5


@pytest.mark.parametrize("name", SPARSIFYING)
def test_embeddings_are_pruned_where_asked(name: str) -> None:
    method = tiny.build(name, sparsity=0.5, masked=("encoder", "embeddings"))
    tiny.by_hand(method, 3)
    masks = method.finish()
    tables = [mask for name, mask in masks.items() if "embeddings" in name]
    assert len(tables) == 3
    assert sum(int((~mask).sum()) for mask in tables) > 0
    check_zeros(method, masks)


@pytest.mark.parametrize("name", (*RESETTABLE, *MOVEMENT))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "heads"])
def test_pretrained_weights_come_back_bit_for_bit(name: str, pattern: str) -> None:
    method = tiny.build(name, pattern, weights="pretrained", masked=("encoder",))
    first = weights_of(method)
    tiny.by_hand(method, 3)
    pruned, total = method.masks.counts()
    assert pruned == units_to_prune(method.context.sparsity, total)
    masks = method.finish()
    check_zeros(method, masks)
    check_survivors(method, masks, first)


@pytest.mark.parametrize("weights", ["trained", "pretrained"])
@pytest.mark.parametrize("name", RESETTABLE)
def test_pruned_weights_are_zero_after_every_step(name: str, weights: str) -> None:
    method = tiny.build(name, "unstructured", 0.5, weights=weights)

    def watch(phase: Phase, step: int) -> None:
        for matrix, mask in method.masks.dense().items():
            weight = method.masks.weights()[matrix].detach()
            assert bool((weight.view(BITS)[~mask] == 0).all()), f"{phase.name}, step {step}: {matrix}"
            product = method.context.model.base.get_submodule(matrix).masked_weight
            assert torch.equal(product, weight), f"{phase.name}, step {step}: {matrix} computes with other weights"

    tiny.by_hand(method, 4, watch)


@pytest.mark.parametrize("name", SPARSIFYING)
def test_the_untouched_model_is_scored_first_and_left_as_it_was(name: str) -> None:
    method = tiny.build(name, untouched=True)
    first, phase = weights_of(method), method.phases()[0]
    assert (phase.name, phase.report) == ("untouched", "untouched")
    assert [p.report for p in method.phases()[1:]] == [None] * (len(method.phases()) - 1)
    method.phases = lambda: [phase]  # type: ignore[method-assign]
    tiny.by_hand(method, 3)
    check_survivors(method, {}, first)
    assert method.masks.sparsity() == 0.0
    assert all(p.report is None for p in tiny.build(name, untouched=False).phases())


@pytest.mark.parametrize("name", (*RESETTABLE, *MOVEMENT, "smp"))
def test_a_new_head_follows_the_untouched_one(name: str) -> None:
    method = tiny.build(name, untouched=True)
    first = {key: tensor.clone() for key, tensor in method.context.model.head.state_dict().items()}
    seen: dict[str, dict[str, Tensor]] = {}

    def watch(phase: Phase, step: int) -> None:
        if step == 0:
            seen[phase.name] = {key: t.clone() for key, t in method.context.model.head.state_dict().items()}

    tiny.by_hand(method, 2, watch)
    assert len(seen) >= 2
    for head in seen.values():
        assert all(torch.equal(head[key], first[key]) for key in first)


def test_feature_extraction_leaves_the_base_untouched_bit_for_bit() -> None:
    method = tiny.build("feature_extraction")
    first, head = weights_of(method), method.context.model.head.output.weight.detach().clone()
    tiny.by_hand(method, 5)
    assert method.finish() == {}
    check_survivors(method, {}, first)
    assert not torch.equal(method.context.model.head.output.weight, head)
    assert method.module.masks is None
    with pytest.raises(TypeError, match="feature_extraction has no masks"):
        _ = method.masks


def test_fine_tuning_trains_everything_and_prunes_nothing() -> None:
    method = tiny.build("finetune")
    first = weights_of(method)
    tiny.by_hand(method, 3)
    assert method.finish() == {}
    unused = {name for name in first if "pooler" in name}
    for name, weight in method.context.model.base.named_parameters():
        assert torch.equal(weight, first[name]) == (name in unused), name


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_that_is_trained_has_a_gradient(name: str) -> None:
    method = tiny.build(name)
    for phase in method.phases():
        phase.start()
        given = {id(p) for group in phase.parameter_groups(1e-3) for p in group["params"]}
        trained = {n: p for n, p in method.module.named_parameters() if p.requires_grad}
        assert {id(p) for p in trained.values()} == given, phase.name
        phase.loaded()
        for _ in range(10):  # one pass may leave out layers where they are grafted
            method.module(**tiny.batch(phase, 4))["loss"].backward()
        assert [n for n, p in trained.items() if p.grad is None and "pooler" not in n] == [], phase.name
        phase.finish()
        phase.loaded()


@pytest.mark.parametrize("name", SPARSIFYING)
@pytest.mark.parametrize("sparsity", [1.0, -0.5, 7.0, float("nan")])
def test_a_sparsity_out_of_range_is_refused_before_anything_is_replaced(name: str, sparsity: float) -> None:
    with pytest.raises(UserError, match="sparsity"):
        tiny.build(name, sparsity=sparsity)


@pytest.mark.parametrize("name", SPARSIFYING)
def test_combinations_that_make_no_sense_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match="2:4"):
        tiny.build(name, "2:4", 0.7)
    with pytest.raises(UserError, match="word_embeddings"):
        tiny.build(name, "heads", masked=("encoder", "embeddings"))
    with pytest.raises(UserError, match=r"'rows'.*global, matrix"):
        tiny.build(name, allocation="rows")


GRAFTING = ("spd", "theseus")
BAD: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"weights": "rewound"}, "weights") for name in (*RESETTABLE, *MOVEMENT)),
    *((name, {"head_learning_rate": -1e-3}, "head_learning_rate") for name in (*RESETTABLE, "finetune")),
    *((name, {"head_learning_rate": float("nan")}, "head_learning_rate") for name in (*RESETTABLE, "finetune")),
    *((name, {"head_learning_rate": float("inf")}, "head_learning_rate") for name in (*RESETTABLE, "finetune")),
    ("gmp", {"prune_from": -0.1}, "prune_from"),
    ("gmp", {"prune_from": 1.0}, "prune_from"),
    ("gmp", {"prune_from": 0.7}, "prune_until"),
    ("gmp", {"prune_until": 1.1}, "prune_until"),
    ("gmp", {"prune_until": 0.0}, "prune_until"),
    ("gmp", {"initial_sparsity": 0.6}, "initial_sparsity"),
    ("gmp", {"initial_sparsity": -0.1}, "initial_sparsity"),
    ("gmp", {"initial_sparsity": float("nan")}, "initial_sparsity"),
    ("gmp", {"prunings": 0}, "prunings"),
    *(("imp", {"prune_rate": rate}, "prune_rate") for rate in (0.0, 1.0, -0.2, 20.0, float("nan"))),
    *(("adapt_prune", {"score_learning_rate": rate}, "score_learning_rate") for rate in (0.0, -1e-5, float("nan"))),
    *(("adapt_prune", {"init_std": std}, "init_std") for std in (-0.001, float("inf"))),
    *(("adapt_prune", {"init_mean": mean}, "init_mean") for mean in (0.0, -0.01, float("nan"))),
    *(("adapt_prune", {"gamma": gamma}, "gamma") for gamma in (-1e-7, float("nan"), float("inf"))),
    *(("adapt_prune", {"prune_until": until}, "prune_until") for until in (0.0, 1.5, -1.0)),
    *(("adapt_prune", {"backward_slope": slope}, "backward_slope") for slope in (0.0, -1.0)),
    ("adapt_prune", {"after_target": "halt"}, "after_target"),
    ("adapt_prune", {"init": "uniform"}, "init"),
    ("tamt", {"objective": "clm"}, "objective"),
    ("tamt", {"init": "uniform"}, "init"),
    ("tamt", {"search_steps": -1}, "search_steps"),
    ("tamt", {"search_batch_size": 0}, "search_batch_size"),
    ("tamt", {"train_mlm_head": -1}, "train_mlm_head"),
    ("tamt", {"train_mlm_head": 0}, "train_mlm_head"),
    ("tamt", {"mask": "nowhere"}, "finished run"),
    *(("tamt", {"mlm_head_learning_rate": rate}, "mlm_head_learning_rate") for rate in (0.0, -1e-5, float("nan"))),
    *(("tamt", {"score_learning_rate": rate}, "score_learning_rate") for rate in (-1e-5, float("nan"), float("inf"))),
    *(("tamt", {"head_learning_rate": rate}, "head_learning_rate") for rate in (-1e-5, float("nan"), float("inf"))),
    *((name, {"temperature": value}, "temperature") for name in TEACHABLE for value in (0.0, -1.0)),
    *((name, {"hard_labels": value}, "hard_labels") for name in TEACHABLE for value in (-0.1, 1.1)),
    *((name, {"score_learning_rate": 0.0}, "score_learning_rate") for name in (*MOVEMENT, "smp")),
    *((name, {"prune_from": 1.0}, "prune_from") for name in (*MOVEMENT, "smp")),
    *((name, {"prune_from": 0.5, "prune_until": 0.5}, "prune_until") for name in (*MOVEMENT, "smp")),
    *(("soft_movement", {"threshold": tau}, "threshold") for tau in (0.0, 0.5, float("nan"))),
    *(("soft_movement", {"penalty": penalty}, "penalty") for penalty in (-1.0, float("inf"), float("nan"))),
    *((name, {"graft_probability": p}, "graft_probability") for name in GRAFTING for p in (0.0, 1.5, float("nan"))),
    *((name, {"graft_schedule": "cosine"}, "graft_schedule") for name in GRAFTING),
    *((name, {"graft_until": until}, "graft_until") for name in GRAFTING for until in (0.0, 1.1)),
    ("spd", {"graft_schedule": "mixed", "graft_hold": 0.7}, "graft_hold"),
    ("spd", {"temperature": 0.0}, "temperature"),
    ("spd", {"attention_weight": -1.0}, "attention_weight"),
    ("spd", {"hidden_weight": 0.0, "attention_weight": 0.0, "soft_label_weight": 0.0}, "hidden_weight"),
    ("spd", {"prunings": 0}, "prunings"),
    ("theseus", {"student_layers": 3}, "student_layers"),
    ("theseus", {"head_learning_rate": -1.0}, "head_learning_rate"),
]


@pytest.mark.parametrize(("name", "settings", "word"), BAD)
def test_a_setting_out_of_range_is_refused_by_name(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word) as error:
        tiny.build(name, **settings)
    assert "expected" in str(error.value) or "known:" in str(error.value)
