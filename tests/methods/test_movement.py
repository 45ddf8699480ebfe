"""Movement pruning, hard and soft, against the paper's rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sparsebert.methods import Method, Phase
from sparsebert.methods.gmp import cubic_sparsity
from sparsebert.ops.bits import block_sum
from sparsebert.patterns import units_to_prune

PATTERNS = ("unstructured", "2:4", "block:4x4", "neurons", "heads")
BOTH = ("movement", "soft_movement")


def started(
    name: str, pattern: str = "unstructured", sparsity: float | None = None, **settings: Any
) -> tuple[Method, Phase]:
    """A method and its one phase, ready for the first step."""
    method = tiny.build(name, pattern, sparsity, **settings)
    (phase,) = method.phases()
    phase.start()
    phase.loaded()
    method.module.train()
    return method, phase


def scores_of(method: Method) -> list[Tensor]:
    return list(method.masks.scores or [])


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def lowest_go(method: Method) -> bool:
    scores, kept = flat(scores_of(method)), flat(method.masks.units())
    return bool(kept.all()) or float(scores[~kept].max()) <= float(scores[kept].min())


@pytest.mark.parametrize("name", (*BOTH, "smp"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_scores_start_at_zero_and_their_gradient_is_that_of_the_weight_times_the_weight(
    name: str, pattern: str
) -> None:
    settings: dict[str, Any] = {"kd": False} if name == "smp" else {}
    method, phase = started(name, pattern, **settings)
    assert all(not score.any() for score in scores_of(method)) and method.masks.sparsity() == 0.0
    for parameter in method.masks.weights().values():
        parameter.requires_grad_(True)  # frozen in smp
    method.context.model.eval()
    method.module(**tiny.batch(phase, 8))["loss"].backward()
    for group, score in zip(method.masks.groups, scores_of(method), strict=True):
        wanted = torch.zeros(group.shape)
        for view in group.views:
            weight = method.masks.weights()[view.matrix.name]
            assert weight.grad is not None
            wanted += block_sum((weight.grad * weight).detach(), view.grid).reshape(group.shape)
        assert score.grad is not None
        torch.testing.assert_close(score.grad, wanted, rtol=1e-4, atol=1e-6)


def test_what_is_pruned_has_a_score_gradient_but_no_weight_gradient() -> None:
    method, phase = started("movement", sparsity=0.5)
    method.masks.select(method.masks.magnitude(), 0.5, "global")
    method.module(**tiny.batch(phase, 8))["loss"].backward()
    for score, (name, weight) in zip(scores_of(method), method.masks.weights().items(), strict=True):
        pruned = ~method.masks.dense()[name]
        assert weight.grad is not None and score.grad is not None
        assert not weight.grad[pruned].any()
        assert score.grad[pruned].any()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("settings", [{}, {"prune_from": 0.3, "prune_until": 1.0}])
def test_the_highest_scores_are_kept_on_the_cubic_schedule(pattern: str, settings: dict[str, float]) -> None:
    method, steps = tiny.build("movement", pattern, **settings), 20
    levels: list[float] = []

    def watch(phase: Phase, step: int) -> None:
        levels.append(phase.logs()["sparsity"])
        assert pattern == "2:4" or lowest_go(method)

    tiny.by_hand(method, steps, watch)
    first, last = int(settings.get("prune_from", 0.1) * steps), int(settings.get("prune_until", 0.8) * steps)
    total = method.masks.counts()[1]
    target = method.context.sparsity
    wanted = [cubic_sparsity((step - first) / (last - first), target) for step in range(steps + 1)]
    assert levels == [units_to_prune(level, total) / total for level in wanted]
    assert levels[first] == 0.0 and levels[first + 1] > 0.0
    assert levels[last:] == [levels[-1]] * (steps + 1 - last)


@pytest.mark.parametrize("name", BOTH)
def test_a_pruned_weight_keeps_its_value_until_the_end_and_may_come_back(name: str) -> None:
    method = tiny.build(name, sparsity=0.5)
    gone: dict[str, Tensor] = {}
    back = 0

    def watch(phase: Phase, step: int) -> None:
        nonlocal back
        for matrix, kept in method.masks.dense().items():
            weight, module = method.masks.weights()[matrix], method.context.model.base.get_submodule(matrix)
            assert bool((weight != 0).all()), f"step {step}: a weight was lost"
            assert torch.equal(module.masked_weight, torch.where(kept, weight, 0.0)), f"step {step}: {matrix}"
            back += int((kept & gone.get(matrix, ~kept & kept)).sum())
            gone[matrix] = ~kept

    tiny.by_hand(method, 20, watch)
    assert back > 0
    for matrix, kept in method.finish().items():
        weight = method.context.model.base.get_parameter(f"{matrix}.weight")
        assert torch.equal(weight != 0, kept)


@pytest.mark.parametrize("name", BOTH)
def test_weights_head_and_scores_are_trained_each_at_its_rate(name: str) -> None:
    _, phase = started(name, score_learning_rate=0.03)
    scores, base, head = phase.parameter_groups(5e-5)
    assert (scores["lr"], scores["weight_decay"], base["lr"], head["lr"]) == (0.03, 0.0, 5e-5, 1e-3)


def test_the_soft_threshold_is_one_on_the_sigmoid_that_rises_with_the_schedule() -> None:
    method, phase = started("soft_movement", sparsity=0.9, threshold=0.2, prune_from=0.0, prune_until=1.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for score in scores_of(method):
            score.copy_(2.0 * torch.randn(score.shape, generator=generator))
    for step in (1, 10, 50, 99):
        phase.after_step(step, 100)
        tau = 0.2 * (1.0 - (1.0 - step / 100) ** 3)
        levels = flat(scores_of(method)).double().sigmoid()
        clear = (levels - tau).abs() > 1e-9
        assert torch.equal(flat(method.masks.units())[clear], (levels > tau)[clear])
        assert 0.0 < method.masks.sparsity() < 0.9


@pytest.mark.parametrize("allocation", ["global", "matrix"])
def test_soft_movement_never_prunes_more_than_the_target_and_ends_there(allocation: str) -> None:
    method, phase = started("soft_movement", sparsity=0.5, allocation=allocation, prune_from=0.0, prune_until=0.5)
    with torch.no_grad():
        for number, score in enumerate(scores_of(method)):
            score.copy_(torch.linspace(-19.0, -16.0 + number, score.numel()).view_as(score))
    for step in (1, 40, 49, 50, 51, 100):
        phase.after_step(step, 100)
        assert method.masks.sparsity() == 0.5
    with torch.no_grad():
        for score in scores_of(method):
            score.add_(100.0)  # all far above the threshold
    phase.after_step(49, 100)
    assert method.masks.sparsity() == 0.0
    phase.after_step(50, 100)
    assert method.masks.sparsity() == 0.5


@pytest.mark.parametrize("pattern", ["unstructured", "neurons"])
def test_a_given_penalty_is_that_times_the_mean_sigmoid_rising_with_the_schedule(pattern: str) -> None:
    method, phase = started("soft_movement", pattern, penalty=30.0, prune_from=0.1, prune_until=0.9)
    for step, rise in ((5, 0.0), (50, 1.0 - 0.5**3), (95, 1.0)):
        for score in scores_of(method):
            torch.nn.init.normal_(score)
            score.grad = torch.ones_like(score)
        copies = [score.detach().double().requires_grad_() for score in scores_of(method)]
        (rise * 30.0 * torch.stack([copy.sigmoid().mean() for copy in copies]).mean()).backward()
        phase.before_step(step, 100)
        for score, double in zip(scores_of(method), copies, strict=True):
            assert score.grad is not None and double.grad is not None
            torch.testing.assert_close(score.grad, (1.0 + double.grad).float())


def test_the_automatic_penalty_pushes_by_the_mean_gradient_harder_while_behind() -> None:
    method, phase = started("soft_movement", sparsity=0.8, prune_from=0.0, prune_until=0.5)
    for score in scores_of(method):
        score.grad = torch.full_like(score, -0.25)
    phase.before_step(50, 100)
    for score in scores_of(method):
        assert score.grad is not None
        torch.testing.assert_close(score.grad, torch.zeros_like(score))  # 0.25 down against 0.25 up
    strengths = [phase.logs()["strength"]]
    for step in range(1, 10):  # scores of 0 are above any threshold
        phase.after_step(step, 100)
        strengths.append(phase.logs()["strength"])
    assert strengths == pytest.approx([1.1**power for power in range(10)])
    with torch.no_grad():
        for score in scores_of(method):
            score.fill_(-20.0)
    phase.after_step(10, 100)
    assert phase.logs()["strength"] == pytest.approx(1.1**8)
    for _ in range(300):
        phase.after_step(10, 100)
    assert phase.logs()["strength"] == pytest.approx(1e-3), "it does not vanish"


def test_with_the_automatic_penalty_the_sparsity_keeps_to_its_schedule() -> None:
    method, steps = tiny.build("soft_movement", sparsity=0.7, score_learning_rate=0.1), 100
    levels: list[float] = []
    tiny.by_hand(method, steps, lambda phase, step: levels.append(phase.logs()["sparsity"]))
    wanted = [cubic_sparsity((step - 10) / 70, 0.7) for step in range(steps + 1)]
    assert all(level == 0.0 for level in levels[:11])
    assert max(abs(level - goal) for level, goal in zip(levels[60:], wanted[60:], strict=True)) < 0.15


@pytest.mark.parametrize("name", (*BOTH, "smp"))
@pytest.mark.parametrize("pattern", ["unstructured", "heads"])
def test_a_checkpoint_holds_all_that_the_next_step_needs(name: str, pattern: str) -> None:
    """Ten steps in one go, and five, a save, a load into a new method, and five more: the same bits."""

    def begin() -> tuple[Any, Any, torch.optim.Optimizer]:
        method, phase = started(name, pattern, sparsity=0.5, prune_from=0.0)
        groups = [group for group in phase.parameter_groups(1e-3) if group["params"]]
        return method, phase, torch.optim.AdamW(groups, lr=1e-3)

    def go(method: Any, phase: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            method.module(**tiny.batch(phase, 8))["loss"].backward()
            phase.before_step(step, 10)
            optimizer.step()
            phase.after_step(step, 10)

    whole = begin()
    go(*whole, range(1, 11))
    first = begin()
    go(*first, range(1, 6))
    saved = copy.deepcopy((first[0].module.state_dict(), first[2].state_dict()))
    second = begin()
    second[0].module.load_state_dict(saved[0])
    second[2].load_state_dict(saved[1])
    second[1].loaded()
    go(*second, range(6, 11))
    for key, tensor in whole[0].module.state_dict().items():
        assert torch.equal(tensor, second[0].module.state_dict()[key]), key
