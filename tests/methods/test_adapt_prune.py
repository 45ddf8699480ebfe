"""Adapting by Pruning against the paper's algorithm, and what its settings say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sparsebert.methods import Method, Phase
from sparsebert.patterns import units_to_prune

PUBLISHED: dict[str, Any] = {"init": "normal", "gamma": 1e-3, "after_target": "stop"}


def started(pattern: str = "unstructured", sparsity: float | None = None, **settings: Any) -> tuple[Method, Phase]:
    """A method and its one phase, ready for the first step."""
    method = tiny.build("adapt_prune", pattern, sparsity, **settings)
    (phase,) = method.phases()
    phase.start()
    phase.loaded()
    return method, phase


def scores_of(method: Method) -> list[Tensor]:
    return list(method.masks.scores or [])


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def kept(method: Method) -> Tensor:
    return flat(method.masks.units())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "neurons", "heads"])
def test_only_scores_and_head_are_trained_and_scores_do_not_decay(pattern: str) -> None:
    method, phase = started(pattern, score_learning_rate=3e-4)
    scores, head = phase.parameter_groups(1e-3)
    assert scores["lr"] == 3e-4 and scores["weight_decay"] == 0.0
    assert [id(p) for p in scores["params"]] == [id(p) for p in scores_of(method)]
    assert head["lr"] == 1e-3
    assert {id(p) for p in head["params"]} == {id(p) for p in method.context.model.head.parameters()}
    assert not any(p.requires_grad for p in method.context.model.base.parameters())


def test_the_base_drops_nothing_out() -> None:
    method, _ = started()
    method.module.train()
    ids = torch.randint(5, 20, (2, 5))
    states = [method.context.model.base(input_ids=ids).last_hidden_state for _ in range(2)]
    assert torch.equal(*states)


@pytest.mark.parametrize("init", ["normal", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "neurons"])
def test_first_scores(init: str, pattern: str) -> None:
    method, _ = started(pattern, init=init, init_mean=0.02, init_std=0.0)
    sizes = method.masks.pattern.magnitude(method.masks.groups, method.masks.weights())
    for score, size in zip(scores_of(method), sizes, strict=True):
        level = torch.full_like(size, 0.02) if init == "normal" else 0.02 * size / size.mean()
        torch.testing.assert_close(score.detach(), level)
    assert method.masks.sparsity() == 0.0


def test_noise_on_the_first_scores_is_that_of_the_seed() -> None:
    drawn = [flat(scores_of(started(init="normal", seed=seed)[0])) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].mean()) == pytest.approx(0.01, abs=1e-4)
    assert float(drawn[0].std()) == pytest.approx(0.001, rel=0.1)
    assert float((drawn[0] > 0).float().mean()) == 1.0, "as published: nothing starts pruned"


@pytest.mark.parametrize("slope", [1.0, 0.1, 25.0])
@pytest.mark.parametrize("pattern", ["unstructured", "heads"])
def test_the_score_gradient_goes_through_the_slope_of_a_sigmoid(slope: float, pattern: str) -> None:
    method, phase = started(pattern, backward_slope=slope, init="normal", init_std=0.05, gamma=0.004, sparsity=0.9)
    phase.after_step(1, 100)
    pushed = phase.logs()["pushed"]
    assert pushed == pytest.approx(0.004)
    generator = torch.Generator().manual_seed(0)
    for score in scores_of(method):
        gradient = torch.randn(score.shape, generator=generator)
        theta = (score.detach().double() - pushed).requires_grad_()
        torch.sigmoid(slope * theta).backward(gradient.double())
        assert theta.grad is not None
        score.grad = gradient.clone()
        phase.before_step(2, 100)
        torch.testing.assert_close(score.grad, theta.grad.float())
        score.grad = None


def test_steps_are_those_of_the_published_algorithm() -> None:
    """theta <- theta - alpha * g * t_s sigmoid'(t_s theta) - gamma; kept where theta > 0; ends at the target."""
    method, phase = started(sparsity=0.6, **{**PUBLISHED, "gamma": 5e-4}, backward_slope=2.0)
    theta = flat(scores_of(method)).double()
    optimizer = torch.optim.SGD(scores_of(method), lr=0.003)
    generator = torch.Generator().manual_seed(0)
    came_back = 0
    for step in range(1, 101):
        before = kept(method)
        gradients = [torch.randn(score.shape, generator=generator) for score in scores_of(method)]
        for score, gradient in zip(scores_of(method), gradients, strict=True):
            score.grad = gradient.clone()
        phase.before_step(step, 100)
        optimizer.step()
        stopped = phase.after_step(step, 100)
        level = torch.sigmoid(2.0 * theta)
        theta -= 0.003 * flat(gradients).double() * 2.0 * level * (1 - level) + 5e-4
        if stopped:
            break
        assert torch.equal(kept(method), theta > 0)
        came_back += int((kept(method) & ~before).sum())
        assert float((theta <= 0).double().mean()) < 0.6
    assert stopped and float((theta <= 0).double().mean()) >= 0.6, "stopped at another step than the paper's rule"
    assert came_back > 0, "connections never came back: the case shows nothing"
    phase.finish()
    pruned = units_to_prune(0.6, theta.numel())
    assert int((~kept(method)).sum()) == pruned
    assert set(torch.nonzero(~kept(method)).flatten().tolist()) == set(theta.argsort()[:pruned].tolist())


def test_a_constant_push_adds_up() -> None:
    method, phase = started(sparsity=0.9, init="normal", gamma=1e-3)
    for step in range(1, 6):
        phase.after_step(step, 100)
        assert phase.logs()["pushed"] == pytest.approx(step * 1e-3)
    assert method.masks.sparsity() == 0.0
    before = flat(scores_of(method))
    phase.after_step(6, 100)
    assert torch.equal(flat(scores_of(method)), before), "the push is kept apart from the scores"


@pytest.mark.parametrize("settings", [{}, PUBLISHED, {"gamma": 1e-3}])
def test_stop_ends_the_phase_at_the_first_step_that_reaches_the_target(settings: dict[str, Any]) -> None:
    method = tiny.build("adapt_prune", sparsity=0.5, **{**settings, "after_target": "stop"})
    levels: list[float] = []
    tiny.by_hand(method, 40, lambda phase, step: levels.append(method.masks.sparsity()), rate=1e-3)
    assert 2 < len(levels) < 40
    assert all(level < 0.5 for level in levels[:-1])
    assert levels[-1] >= 0.5
    assert method.masks.sparsity() == 0.5, "what the last step prunes too much is taken back"


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "neurons"])
@pytest.mark.parametrize("settings", [{}, {"gamma": 1e-3}, {"gamma": 1e-3, "init": "normal"}])
def test_hold_keeps_exactly_the_target_to_the_last_step(pattern: str, settings: dict[str, Any]) -> None:
    method = tiny.build("adapt_prune", pattern, **settings)
    levels: list[float] = []
    masks: list[Tensor] = []

    def watch(phase: Phase, step: int) -> None:
        levels.append(method.masks.sparsity())
        masks.append(kept(method))

    tiny.by_hand(method, 60, watch)
    assert len(levels) == 61
    reached = levels.index(0.5)
    assert 2 < reached < 50
    assert set(levels[reached:]) == {0.5}


def test_scores_train_on_after_the_target() -> None:
    method = tiny.build("adapt_prune", prune_until=0.2, score_learning_rate=1e-2)
    masks: list[Tensor] = []
    tiny.by_hand(method, 30, lambda phase, step: masks.append(kept(method)))
    assert not torch.equal(masks[8], masks[-1])
    assert int(masks[8].sum()) == int(masks[-1].sum())


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "2:4"])
@pytest.mark.parametrize("until", [0.5, 1.0])
def test_without_a_gamma_the_sparsity_rises_along_a_cubic_to_the_target(pattern: str, until: float) -> None:
    method = tiny.build("adapt_prune", pattern, prune_until=until)
    counts: list[int] = []
    tiny.by_hand(method, 20, lambda phase, step: counts.append(method.masks.counts()[0]))
    total, target = method.masks.counts()[1], method.context.sparsity
    left = [max(0.0, 1.0 - step / (20 * until)) for step in range(21)]
    expected = [units_to_prune(target * (1.0 - share**3), total) for share in left]
    assert counts == expected


@pytest.mark.parametrize("settings", [{}, {"gamma": 1e-3, "init": "normal"}])
def test_pruned_connections_may_come_back(settings: dict[str, Any]) -> None:
    assert returns(score_learning_rate=3e-3, **settings) > 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("settings", [{}, {"gamma": 1e-3, "init": "normal"}])
def test_without_regrowth_they_never_do(pattern: str, settings: dict[str, Any]) -> None:
    assert returns(pattern, score_learning_rate=3e-3, regrowth=False, **settings) == 0


def returns(pattern: str = "unstructured", **settings: Any) -> int:
    """How often a unit that was pruned after one step is kept after a later one, or in the end."""
    method = tiny.build("adapt_prune", pattern, **settings)
    gone = torch.zeros(method.masks.counts()[1], dtype=torch.bool)
    found = 0

    def watch(phase: Phase, step: int) -> None:
        nonlocal found
        now = kept(method)
        found += int((now & gone).sum())
        gone.logical_or_(~now)

    tiny.by_hand(method, 30, watch)
    assert method.masks.sparsity() == 0.5
    return found + int((kept(method) & gone).sum())


def test_the_push_stands_at_the_highest_pruned_score_while_the_target_is_held() -> None:
    method = tiny.build("adapt_prune", prune_until=0.3)
    seen: list[tuple[float, float]] = []

    def watch(phase: Phase, step: int) -> None:
        if step and step % 10 == 0:
            seen.append((phase.logs()["pushed"], float(flat(scores_of(method))[~kept(method)].max())))

    tiny.by_hand(method, 30, watch)
    assert len(seen) == 3
    assert all(pushed == pytest.approx(highest) and math.isfinite(pushed) for pushed, highest in seen)


def test_scores_follow_the_task() -> None:
    """What the loss wants kept is kept: one query matrix is made useful by its gradient, another harmful."""
    method, phase = started(sparsity=0.5, init="normal", score_learning_rate=1e-3)
    optimizer = torch.optim.Adam(scores_of(method), lr=1e-3)
    for step in range(1, 41):
        for index, score in enumerate(scores_of(method)):
            score.grad = torch.full_like(score, {0: -1.0, 6: 1.0}.get(index, 0.0))
        phase.before_step(step, 40)
        optimizer.step()
        phase.after_step(step, 40)
    phase.finish()
    masks = list(method.masks.dense().values())
    assert bool(masks[0].all()) and not bool(masks[6].any())
    assert method.masks.sparsity() == 0.5


def test_a_checkpoint_brings_push_mask_and_scores_back() -> None:
    settings = {"gamma": 2e-3, "init": "normal", "sparsity": 0.5}
    method, phase = started(**settings)
    for step in range(1, 5):
        phase.after_step(step, 40)
    state = {name: tensor.clone() for name, tensor in method.module.state_dict().items()}
    other, resumed = started(**settings, seed=9)
    other.module.load_state_dict(state)
    resumed.loaded()
    for step in range(5, 12):
        assert phase.after_step(step, 40) == resumed.after_step(step, 40)
        assert torch.equal(kept(method), kept(other))
        assert phase.logs() == resumed.logs()
