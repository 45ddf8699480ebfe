"""BERT-EMD (Li et al., 2020): every student layer learns from every teacher layer, as much as moves most cheaply.

Layers have weights. The earth mover's distance between the student's and the teacher's, with the squared differences of
attention scores (and, in a second one, of hidden states) as the cost between two layers, is the loss; the flow that
attains it says which layers learn from which. After each step a layer whose mass moved cheaply gets more weight (cost
attention): the softmax of the inverse costs per mass, the mean of those for maps and states. Then come the logits.

Where this departs from the paper, and why:

- The student is a cut of the pre-trained model (or any smaller checkpoint), and there is no data augmentation: the
  setting in which CR-ILD compares it.
- Padding does not count, neither in the maps nor in the states.
- The softmax is over the inverse costs relative to their sum, which do not depend on the losses' scale (the released
  code does the same); a cost of nearly nothing counts as a millionth of the sum, where the code would divide by 0.
- Gradients are computed for the pairs with a flow alone, at most layers of both minus one: the others have none.
- With several processes the costs are averaged, so that all have the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparsebert.methods.base import TrainingModule, check_setting
from sparsebert.methods.distilling import Outputs, Term
from sparsebert.methods.layers_first import LAYERS_FIRST_DEFAULTS, LayersFirst, LayersSettings
from sparsebert.models.capture import Needs
from sparsebert.ops.attention_mse import attention_mse
from sparsebert.ops.hidden_mse import hidden_mse

__all__ = ["BertEmd", "EarthMover", "LayerWeights", "transport"]

_LEAST_FLOW = 1e-9


@dataclass(frozen=True)
class Settings(LayersSettings):
    """Settings of BERT-EMD."""

    temperature: float = 1.0
    ild_learning_rate: float = 5e-5
    emd_temperature: float = 1.0
    """Of the softmax over layers' inverse costs: high spreads the weights."""
    cost_attention: bool = True
    """Whether the layers' weights follow the costs; else all layers keep the same."""


def transport(costs: np.ndarray, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The cheapest flow between two distributions (Kantorovich's linear programme), exact and deterministic.

    Args:
        costs: `[S, T]`, finite and not negative.
        student: `[S]` masses, their sum that of `teacher`.
        teacher: `[T]` masses.

    Returns:
        `[S, T]` float64, rows summing to `student` and columns to `teacher`.
    """
    from scipy.optimize import linprog

    rows, columns = costs.shape
    sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    masses = np.concatenate([student, teacher])
    # The solver's tolerances are absolute; and the last column's sum follows from the others.
    scaled = (costs / max(float(costs.max()), 1e-300)).ravel()
    found = linprog(scaled, A_eq=sums[:-1], b_eq=masses[:-1], method="highs-ds")
    if found.x is None:
        raise RuntimeError(f"no transport between layers was found: {found.message}")
    return found.x.reshape(rows, columns).clip(min=0.0)


class LayerWeights(nn.Module):
    """The masses of the layers, in every checkpoint; at first all alike.

    Args:
        student, teacher: numbers of layers.
    """

    student: Tensor
    teacher: Tensor

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.register_buffer("student", torch.empty(student, dtype=torch.float64))
        self.register_buffer("teacher", torch.empty(teacher, dtype=torch.float64))
        self.reset()

    def reset(self) -> None:
        """All layers alike."""
        for mass in (self.student, self.teacher):
            mass.fill_(1.0 / len(mass))


def new_weights(moved: np.ndarray, masses: np.ndarray, temperature: float) -> np.ndarray:
    """Layers' next masses from the cost that each one's mass `moved` at, both `[layers]`."""
    costs = np.divide(moved, masses, out=np.zeros_like(moved), where=masses > 0.0)
    total = costs.sum()
    if total <= 0.0:
        return masses
    inverse = total / costs.clip(min=1e-6 * total) / temperature
    powers = np.exp(inverse - inverse.max())
    return powers / powers.sum()


class EarthMover(Term):
    """The earth mover's distances between two models' attention scores and hidden states; moves the layers' weights.

    Args:
        weights: of the layers; changed in place by each `loss`.
        temperature: of the weights' softmax; None leaves them alone.
        project: a linear to the teacher's width, or None.
    """

    name = "emd"

    def __init__(self, weights: LayerWeights, temperature: float | None, project: nn.Module | None = None) -> None:
        super().__init__()
        self.weights, self.temperature, self.project = weights, temperature, project
        self.shape = (len(weights.student), len(weights.teacher))

    def needs(self) -> tuple[Needs, Needs]:
        both = [frozenset(range(1, layers + 1)) for layers in self.shape]
        return Needs(hidden=both[0], attention=both[0]), Needs(hidden=both[1], attention=both[1])

    def trained(self) -> nn.Module | None:
        return self.project

    def loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        masses = [mass.cpu().numpy().copy() for mass in (self.weights.student, self.weights.teacher)]
        losses: list[Tensor] = []
        new: list[tuple[np.ndarray, np.ndarray]] = []
        for distance in (self._maps, self._states):
            costs = self._costs(distance, student, teacher)
            # Where a cost is not finite, the loss must not be either: the run then says so.
            finite = bool(np.isfinite(costs).all())
            flow = transport(costs, *masses) if finite else np.outer(*masses)
            moving = [(int(i), int(j)) for i, j in zip(*np.nonzero(flow > _LEAST_FLOW), strict=True)]
            losses += [float(flow[i, j]) * distance(student, teacher, i + 1, j + 1) for i, j in moving]
            if self.temperature is not None and finite:
                moved = flow * costs
                sides = ((moved.sum(1), masses[0]), (moved.sum(0), masses[1]))
                new.append(tuple(new_weights(*side, self.temperature) for side in sides))  # type: ignore[arg-type]
        if len(new) == 2:
            for place, mass in enumerate((self.weights.student, self.weights.teacher)):
                mass.copy_(torch.from_numpy((new[0][place] + new[1][place]) / 2))
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _costs(self, distance: object, student: Outputs, teacher: Outputs) -> np.ndarray:
        """`[S, T]` float64 of one kind of distance, the mean over all processes."""
        rows, columns = self.shape
        pairs = [(i, j) for i in range(1, rows + 1) for j in range(1, columns + 1)]
        costs = torch.stack([distance(student, teacher, i, j) for i, j in pairs]).double()  # type: ignore[operator]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(costs)
            costs /= torch.distributed.get_world_size()
        return costs.view(rows, columns).cpu().numpy()

    def _maps(self, student: Outputs, teacher: Outputs, mine: int, theirs: int) -> Tensor:
        s, t = student.states, teacher.states
        return attention_mse(
            s.query[mine], s.key[mine], t.query[theirs], t.key[theirs], student.token_mask, on="scores"
        )

    def _states(self, student: Outputs, teacher: Outputs, mine: int, theirs: int) -> Tensor:
        state = student.states.hidden[mine]
        if self.project is not None:
            state = self.project(state.float())
        return hidden_mse(state, teacher.states.hidden[theirs], student.token_mask)


class BertEmd(LayersFirst):
    """Distils all layers into all layers by the earth mover's distance, then the logits."""

    name = "bert_emd"
    summary = "BERT-EMD: every layer from every layer by the earth mover's distance, then the teacher's logits"
    Settings = Settings
    defaults = {**LAYERS_FIRST_DEFAULTS, "num_train_epochs": 3.0}  # noqa: RUF012 (a Mapping in the base)

    def check(self) -> None:
        super().check()
        self.check_width()
        self.check_heads("use --method minilm, which compares relations")
        temperature = self.settings.emd_temperature
        check_setting("emd_temperature", temperature, 0.0 < temperature < math.inf, "a positive number")

    def build(self) -> TrainingModule:
        module = super().build()
        module.extra["layers"] = LayerWeights(*self.layers())
        return module

    def layer_terms(self) -> Sequence[Term]:
        weights = self.module.extra["layers"]
        assert isinstance(weights, LayerWeights)
        weights.reset()
        settings = self.settings
        return [EarthMover(weights, settings.emd_temperature if settings.cost_attention else None, self.project)]
