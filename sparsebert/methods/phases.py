"""Phases that several methods share."""

from __future__ import annotations

import math
from typing import Any

from sparsebert.methods.base import Method, Phase, check_setting

__all__ = ["HEAD_DEFAULTS", "WEIGHTS_DEFAULTS", "HeadPhase", "WeightsPhase", "check_head_rate", "freeze"]

_COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
    "logging_steps": 50,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 42,
}

HEAD_DEFAULTS: dict[str, Any] = {**_COMMON, "learning_rate": 1e-3, "head": "mlp"}
"""Defaults of methods that train the head, not the weights."""

WEIGHTS_DEFAULTS: dict[str, Any] = {**_COMMON, "learning_rate": 5e-5, "warmup_steps": 0.06, "head": "mlp"}
"""Defaults of methods that train the base's weights."""


class HeadPhase(Phase):
    """Trains the head alone on a frozen base: feature extraction, or the head of a finished subnetwork.

    Args:
        method: whose module is trained.
        name: of the phase.
        report: name of the score taken after it, if any.
        learning_rate: of the head; 0 takes Trainer's.
    """

    def __init__(
        self, method: Method, name: str = "head", report: str | None = None, learning_rate: float = 0.0
    ) -> None:
        super().__init__(method)
        self.name = name
        self.report = report
        self.learning_rate = learning_rate

    def start(self) -> None:
        model = self.module.model
        freeze(self.module)
        model.set_base_dropout(False)
        model.head.requires_grad_(True)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.module.model.head.parameters()), "lr": self.learning_rate or learning_rate}]


class WeightsPhase(Phase):
    """Trains the base's weights and the head, under the masks where there are any: pruned weights stay zero.

    Args:
        method: whose module is trained.
        name: of the phase.
    """

    def __init__(self, method: Method, name: str = "finetune") -> None:
        super().__init__(method)
        self.name = name

    def start(self) -> None:
        freeze(self.module)
        self.method.new_head()
        self.module.model.requires_grad_(True)
        self.module.model.set_base_dropout(True)

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        model = self.module.model
        head_rate = self.method.settings.head_learning_rate
        return [
            {"params": [p for p in model.base.parameters() if p.requires_grad], "lr": learning_rate},
            {"params": list(model.head.parameters()), "lr": head_rate or learning_rate},
        ]

    def after_step(self, step: int, total: int) -> bool:
        if self.module.masks is not None:
            # Adam's running averages move a weight that was pruned a moment ago: set it back, then renew W * mask.
            self.module.masks.zero_pruned()
            self.module.masks.refresh()
        return False


def check_head_rate(rate: float) -> None:
    """Raises a UserError unless `rate` can be the setting `head_learning_rate`."""
    check_setting("head_learning_rate", rate, 0.0 <= rate < math.inf, "0 (as --learning-rate) or a positive number")


def freeze(module: Any) -> None:
    """No parameter of the training module takes a gradient, masks stay as they are, the loss is the task's own."""
    module.objective = None
    module.requires_grad_(False)
    if module.masks is not None:
        module.masks.freeze()
