"""TAMT (Liu et al., NAACL 2022, arXiv 2204.11218): a mask that is no task's, trained on the pre-training objective.

First the search: weights stay frozen, every prunable unit has a score, and the units of smallest score are pruned. The
gradient with respect to the mask is applied to the scores as it is (identity straight-through estimator). What is
minimised is the masked-LM loss on plain text (`mlm`), the distance of every layer's token states from the dense
pre-trained model's (`kd`), or their sum. Then the subnetwork, its weights as they were pre-trained, is fine-tuned on a
task. The mask of a finished run serves any other task: `--mask RUN`.

Where this departs from the paper and its released code, and why:

- *Threshold*: the exact one after every step. The released code sets it anew every 1,000 steps (100 for `kd`), and the
  sparsity drifts in between; here every forward pass computes at the sparsity that is asked for.
- *What is masked*: encoder and word embedding, without the pooler. No pre-training loss reaches the pooler, so nothing
  of it is learned, and not every model or task has one. `--masked encoder pooler word_embeddings` is the paper's.
- *Optimiser of `kd`*: AdamW without decay of the scores, as for `mlm` (the released code decays them by 0.01: towards
  zero, which is a score like any other).
- *Segments*: half of the blocks are pairs (`segments`); the paper shows nothing but first segments, and a search that
  never sees token type 1 may prune what handles it. On a BERT of two layers it did, and tasks on pairs were lost.
- *First scores* (`init`): two values as published by default. With `graded` ones 500 steps took MiniLM at 70 % to a
  held-out distance of 0.097 and left 74 % of the magnitude mask in place; from two values 1,500 steps reached 0.143 and
  left 52 %: which weights are large was forgotten before what else matters was learned.
- *A checkpoint without a masked-LM head* gets a new one, trained on the dense model first (`train_mlm_head`).

A word that the text never has gets no gradient while the threshold rises with the scores of the others, so that its row
of the word embedding is pruned: with little text, mask the encoder alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsebert.errors import UserError, unknown
from sparsebert.methods.base import Context, Method, Phase, TrainingModule, check_setting
from sparsebert.methods.given_mask import GivenMask, read_given_mask
from sparsebert.methods.phases import WEIGHTS_DEFAULTS, HeadPhase, WeightsPhase, check_head_rate, freeze
from sparsebert.methods.pretraining import LOSSES, Pretraining, frozen_copy, held_out_losses
from sparsebert.models.mlm_head import MaskedLMHead, new_mlm_head, read_mlm_head

__all__ = ["Tamt", "search_steps"]

# The two first values of a score, as in the released code; the first is also the mean of graded ones.
_KEPT, _PRUNED = 0.02, 0.0
_INITS = ("magnitude", "graded", "random")

# Sparsity and the steps of the published searches: as many as the paper's iterative pruning takes to get there.
_STEPS = ((0.0, 3000), (0.2, 3000), (0.3, 6000), (0.4, 8000), (0.5, 11000), (0.6, 14000), (0.7, 17000), (0.8, 20000),
          (0.9, 22000), (1.0, 22000))  # fmt: skip

_MASKING = 0.15
_HEAD_ON_FROZEN_RATE = 1e-3

# A search reads text and minimises its own loss: nothing of the task is watched meanwhile.
_SEARCH_ARGUMENTS: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
}


@dataclass(frozen=True)
class Settings:
    """Settings of task-agnostic mask training."""

    objective: Literal["mlm", "kd", "mlm+kd"] = "mlm"
    """What the mask is trained on: `mlm`, the masked-LM loss; `kd`, the dense model's own states, on text without
    masked tokens; `mlm+kd`, the sum of both. The paper's best is `kd` up to a sparsity of 0.6 and `mlm` from 0.7."""
    search_steps: int = 0
    """Optimiser steps of the search; 0 takes the paper's for the sparsity (17000 at 0.7)."""
    search_batch_size: int = 16
    """Blocks of text of a search step on each device."""
    score_learning_rate: float = 0.0
    """Learning rate of the scores, falling to 0 along a line; 0 takes the paper's, 5e-5, or 2e-5 for `kd`."""
    init: Literal["magnitude", "graded", "random"] = "magnitude"
    """The first scores: `magnitude`, as published, one value for what one-shot magnitude pruning keeps and one for the
    rest; `graded`, the magnitudes themselves, scaled to the mean of 0.02: the same first mask, from which the weights
    near the threshold move first, so that a short search gets much further; `random`, two values at random places."""
    segments: bool = True
    """Whether half of the blocks are shown as a pair of texts, with a [SEP] between them and token type 1 after it,
    where the model tells segments apart (BERT). False: as published, all is one segment."""
    train_mlm_head: int = 1000
    """Steps that train a new masked-LM head on the dense model first, where the objective needs one and the checkpoint
    has none."""
    mlm_head_learning_rate: float = 5e-3
    """Learning rate of a new masked-LM head in that phase; in the search it learns at the rate of the scores."""
    mask: str | None = None
    """Folder of a finished run, of any method that prunes, on the same base: its mask is fine-tuned on this task,
    and nothing is searched."""
    head_learning_rate: float = 0.0
    """Learning rate of the task's head in fine-tuning; 0 takes --learning-rate for it too."""


def search_steps(sparsity: float) -> int:
    """The paper's steps for a sparsity, to the hundred; on a line between the published ones."""
    for (low, few), (high, many) in pairwise(_STEPS):
        if sparsity <= high:
            return 100 * round((few + (many - few) * (sparsity - low) / (high - low)) / 100)
    return _STEPS[-1][1]


class _NewHead(Phase):
    """Trains a new masked-LM head on the dense frozen model."""

    name = "mlm_head"
    data = "text"
    masking = _MASKING

    def __init__(self, method: Tamt) -> None:
        super().__init__(method)
        self.tamt = method
        steps = method.settings.train_mlm_head
        self.note = f"the checkpoint has no masked-LM head: a new one, tied to the word embedding, gets {steps} steps"

    def training(self) -> dict[str, Any]:
        settings = self.tamt.settings
        return {
            **_SEARCH_ARGUMENTS,
            "max_steps": settings.train_mlm_head,
            "per_device_train_batch_size": settings.search_batch_size,
            "learning_rate": settings.mlm_head_learning_rate,
        }

    def start(self) -> None:
        freeze(self.module)
        self.module.model.set_base_dropout(False)
        self.tamt.mlm_head.requires_grad_(True)
        segments = self.tamt.settings.segments
        self.objective = Pretraining(self.module.model, ("mlm",), self.tamt.mlm_head, segments=segments)
        self.module.objective = self.objective

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.tamt.mlm_head.parameters()), "lr": learning_rate}]

    def logs(self) -> dict[str, float]:
        return self.objective.logs()

    def outcome(self, held_out: Any) -> dict[str, Any]:
        losses = held_out_losses(self.objective, held_out, self.tamt.context.dtype) if held_out is not None else {}
        return {"new_mlm_head": True, **losses}

    def finish(self) -> None:
        self.module.objective = None


class _Search(Phase):
    """Trains scores (and the masked-LM head) on text; weights are frozen, the mask follows after every step."""

    name = "search"
    data = "text"

    def __init__(self, method: Tamt) -> None:
        super().__init__(method)
        self.tamt = method
        self.masking = _MASKING if method.wants_mlm else 0.0

    def training(self) -> dict[str, Any]:
        settings = self.tamt.settings
        return {
            **_SEARCH_ARGUMENTS,
            "max_steps": settings.search_steps or search_steps(self.tamt.context.sparsity),
            "per_device_train_batch_size": settings.search_batch_size,
            "learning_rate": self.tamt.score_rate,
        }

    def start(self) -> None:
        module, masks, context = self.module, self.tamt.masks, self.tamt.context
        freeze(module)
        module.model.set_base_dropout(True)
        ranks = self._ranks()
        masks.select(ranks, context.sparsity, context.allocation)
        self.first = masks.units()
        masks.learn(self._first_scores(ranks))
        self.scores: list[Tensor] = list(masks.scores or [])
        for score, group in zip(self.scores, masks.groups, strict=True):
            # No loss on tokens comes by the pooler: its mask stays as it began.
            score.requires_grad_(any(view.matrix.component != "pooler" for view in group.views))
        head, losses = None, LOSSES[self.tamt.settings.objective]
        if self.tamt.wants_mlm:
            head = self.tamt.mlm_head
            self.first_head = {name: tensor.clone() for name, tensor in head.state_dict().items()}
            head.requires_grad_(True)
        dense = self.tamt.dense.to(next(module.parameters()).device)
        self.objective = Pretraining(module.model, losses, head, dense, self.tamt.settings.segments)
        module.objective = self.objective

    def _ranks(self) -> list[Tensor]:
        masks = self.tamt.masks
        sizes = masks.pattern.magnitude(masks.groups, masks.weights())
        if self.tamt.settings.init != "random":
            return sizes
        generator = torch.Generator().manual_seed(self.tamt.context.seed)
        return [torch.rand(size.shape, generator=generator).to(size.device) for size in sizes]

    def _first_scores(self, ranks: list[Tensor]) -> list[Tensor]:
        """One score a unit, float32; all of a matrix, or of the model under a global threshold, on one scale."""
        if self.tamt.settings.init != "graded":
            return [torch.where(kept, _KEPT, _PRUNED) for kept in self.first]
        means = [rank.mean() for rank in ranks]
        if self.tamt.context.allocation == "global":
            units = sum(rank.numel() for rank in ranks)
            whole = torch.stack([rank.sum() for rank in ranks]).sum() / units
            means = [whole for _ in ranks]
        return [rank * (_KEPT / mean.clamp(min=1e-30)) for rank, mean in zip(ranks, means, strict=True)]

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        groups = [{"params": [score for score in self.scores if score.requires_grad], "lr": learning_rate}]
        if self.objective.head is not None:
            groups.append({"params": list(self.objective.head.parameters()), "lr": learning_rate})
        return [{**group, "weight_decay": 0.0} for group in groups]

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> bool:
        context = self.tamt.context
        self.tamt.masks.select(self.scores, context.sparsity, context.allocation)
        return False

    def logs(self) -> dict[str, float]:
        return {"sparsity": self.tamt.masks.sparsity(), **self.objective.logs()}

    def outcome(self, held_out: Any) -> dict[str, Any]:
        """Held-out losses of the subnetwork and, as `dense_`, of the whole model; how much of the first mask is left.

        The dense model's masked-LM loss is with the head that the search began with.
        """
        kept = sum(int(unit.sum()) for unit in self.first)
        both = zip(self.first, self.tamt.masks.units(), strict=True)
        stayed = sum(int((before & after).sum()) for before, after in both)
        found: dict[str, Any] = {"objective": self.tamt.settings.objective, "stayed": stayed / max(1, kept)}
        if held_out is None:
            return found
        objective, dtype = self.objective, self.tamt.context.dtype
        dense = self.tamt.dense
        # The distance from the dense model costs little here and is the paper's other axis.
        names = tuple(dict.fromkeys((*objective.names, "kd")))
        mine = Pretraining(objective.model, names, objective.head, dense, objective.segments)
        found |= held_out_losses(mine, held_out, dtype)
        if objective.head is not None:
            head = new_mlm_head(dense.base, 0).to(next(dense.parameters()).device)
            head.load_state_dict(self.first_head)
            whole = Pretraining(dense, ("mlm",), head, segments=objective.segments)
            losses = held_out_losses(whole, held_out, dtype)
            found |= {f"dense_{name}": value for name, value in losses.items()}
        return found

    def finish(self) -> None:
        self.module.objective = None


class _FineTune(WeightsPhase):
    """Trains the subnetwork on the task from its pre-trained weights, which the search has left as they were."""

    def start(self) -> None:
        super().start()
        masks, method = self.module.masks, self.method
        assert isinstance(method, Tamt) and masks is not None
        if method.given is not None:
            device = next(self.module.parameters()).device
            masks.set_bits([bits.to(device) for bits in method.given.bits])
        masks.zero_pruned()
        masks.refresh()

    def outcome(self, held_out: Any) -> dict[str, Any]:
        given = self.method.given  # type: ignore[attr-defined]
        return {} if given is None else given.about


class Tamt(Method):
    """Finds a mask on text, for any task, and fine-tunes the subnetwork on one."""

    name = "tamt"
    summary = "a task-agnostic mask trained on text (masked LM or the dense model's states), then fine-tuning"
    Settings = Settings
    defaults: ClassVar[dict[str, Any]] = {
        **WEIGHTS_DEFAULTS,
        "learning_rate": 2e-5,
        "warmup_steps": 0,
        "head": "linear",
        "allocation": "matrix",
        "masked": ["encoder", "word_embeddings"],
    }

    given: GivenMask | None = None
    """The mask that `--mask` names."""

    def __init__(self, context: Context, settings: Any) -> None:
        if settings.mask is not None:
            self.given = read_given_mask(settings.mask, context)
            context.sparsity = self.given.sparsity
        super().__init__(context, settings)

    def check(self) -> None:
        super().check()
        settings = self.settings
        for name, known in (("objective", tuple(LOSSES)), ("init", _INITS)):
            if getattr(settings, name) not in known:
                raise unknown(name, str(getattr(settings, name)), known)
        for name in ("search_steps", "train_mlm_head"):
            check_setting(name, getattr(settings, name), getattr(settings, name) >= 0, "0 or a number of steps")
        check_setting("search_batch_size", settings.search_batch_size, settings.search_batch_size >= 1, "at least 1")
        rate = settings.score_learning_rate
        check_setting("score_learning_rate", rate, 0.0 <= rate < math.inf, "0 (the paper's) or a positive number")
        rate = settings.mlm_head_learning_rate
        check_setting("mlm_head_learning_rate", rate, 0.0 < rate < math.inf, "a positive number")
        check_head_rate(settings.head_learning_rate)

    def build(self) -> TrainingModule:
        context = self.context
        self.new_mlm_head = False
        head = None
        if self.wants_mlm:
            head = read_mlm_head(context.source, context.model.base)
            if head is None:
                if self.settings.train_mlm_head == 0:
                    raise UserError(
                        f"train_mlm_head 0: {context.source or 'the model'} has no masked-LM head, which objective "
                        f"{self.settings.objective} needs; expected a number of steps to train one, or objective kd"
                    )
                self.new_mlm_head = True
                head = new_mlm_head(context.model.base, context.seed)
        self.dense = frozen_copy(context.model)
        module = super().build()
        if head is not None:
            module.extra["mlm_head"] = head
        return module

    @property
    def wants_mlm(self) -> bool:
        """Whether a search needs a masked-LM head."""
        return self.given is None and "mlm" in LOSSES[self.settings.objective]

    @property
    def mlm_head(self) -> MaskedLMHead:
        """The masked-LM head, where one is wanted."""
        head = self.module.extra["mlm_head"]
        assert isinstance(head, MaskedLMHead)
        return head

    @property
    def score_rate(self) -> float:
        """Learning rate of the search."""
        published = 2e-5 if self.settings.objective == "kd" else 5e-5
        return self.settings.score_learning_rate or published

    def untouched_phases(self) -> list[Phase]:
        phases = super().untouched_phases()
        for phase in phases:
            if isinstance(phase, HeadPhase):
                # The rate of fine-tuning would leave a head on frozen features where it began.
                phase.learning_rate = self.settings.head_learning_rate or _HEAD_ON_FROZEN_RATE
        return phases

    def phases(self) -> list[Phase]:
        phases = self.untouched_phases()
        if self.given is None:
            phases += [_NewHead(self)] if self.new_mlm_head else []
            phases.append(_Search(self))
        return [*phases, _FineTune(self)]
