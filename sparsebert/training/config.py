"""The resolved configuration of a run, and what it must satisfy before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from sparsebert.data import TaskData, Variant, load_task
from sparsebert.errors import UserError, unknown
from sparsebert.training.settings import RunSettings

__all__ = ["Config", "check_trainer", "load_run_task", "max_length", "typed"]

_LONGEST = {"demo": 64, "squad": 384, "squad_v2": 384}
_CHOICES = {
    "allocation": ("global", "matrix"),
    "pooling": ("cls", "mean"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}


@dataclass
class Config:
    """Everything a run depends on, resolved."""

    run: RunSettings
    method: Any
    """An instance of the method's `Settings`."""
    trainer: dict[str, Any]
    """Hugging Face `TrainingArguments` by name, where they differ from its own defaults."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for config.yaml; paths of this run itself are left out."""
        run = {k: v for k, v in dataclasses.asdict(self.run).items() if k not in ("output", "resume", "config")}
        return {"run": run, "settings": dataclasses.asdict(self.method), "trainer": dict(self.trainer)}

    def check(self) -> None:
        """A `UserError` for words and numbers that no run can work with, before anything is loaded."""
        for name, known in _CHOICES.items():
            if getattr(self.run, name) not in known:
                raise unknown(name, str(getattr(self.run, name)), known)
        if self.run.max_length is not None and self.run.max_length < 1:
            raise UserError(f"max_length: expected at least 1 token, got {self.run.max_length}")
        check_trainer(self.trainer)
        if self.run.watch_train and self.trainer.get("eval_strategy", "no") == "no":
            raise UserError("watch_train: nothing is watched; add --eval-strategy steps or epoch")


def max_length(run: RunSettings) -> int:
    """The longest input in tokens."""
    return _LONGEST.get(run.task, 128) if run.max_length is None else run.max_length


def load_run_task(run: RunSettings, *, require_train: bool = True) -> TaskData:
    """The data that a run's settings name; without `require_train`, for scoring alone, the train split as it is."""
    variant = Variant(run.few_samples, run.label_noise, run.imbalance, run.variant_seed)
    return load_task(
        run.task,
        run.data_dir,
        run.text_columns or None,
        run.label_column,
        max_train_samples=run.max_train_samples,
        max_eval_samples=run.max_eval_samples,
        require_train=require_train,
        variant=variant if require_train else None,
    )


# Trainer's own numbers: the least that makes sense, and whether the least itself does.
_AT_LEAST: dict[str, tuple[float, bool]] = {
    "num_train_epochs": (0, False),
    "learning_rate": (0, True),
    "weight_decay": (0, True),
    "max_grad_norm": (0, True),
    "warmup_steps": (0, True),
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "logging_steps": (0, False),
    "save_steps": (0, False),
    "eval_steps": (0, False),
    "eval_accumulation_steps": (1, True),
    "save_total_limit": (1, True),
    "seed": (0, True),
    "data_seed": (0, True),
    "dataloader_num_workers": (0, True),
}
_HIGHEST_SEED = 2**32 - 1  # NumPy's


def check_trainer(values: Mapping[str, Any]) -> None:
    """A `UserError` for numbers that Trainer would take without a word, or fail over halfway."""
    steps = values.get("max_steps", -1)
    if steps != -1 and steps < 1:
        raise UserError(f"max_steps: expected at least 1 (or -1: as many as --num-train-epochs says), got {steps}")
    for name, (least, inclusive) in _AT_LEAST.items():
        value = values.get(name)
        if value is None:
            continue
        # Written so that NaN fails too.
        if not ((value >= least if inclusive else value > least) and math.isfinite(value)):
            words = f"at least {least}" if inclusive else f"more than {least}"
            raise UserError(f"{name}: expected {words}, got {value}")
    for name in ("seed", "data_seed"):
        if (values.get(name) or 0) > _HIGHEST_SEED:
            raise UserError(f"{name}: expected at most {_HIGHEST_SEED}, got {values[name]}")
    if values.get("load_best_model_at_end") and values.get("eval_strategy", "no") == "no":
        raise UserError("load_best_model_at_end: nothing is watched; add --eval-strategy steps or epoch")


def typed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as the dataclass declares them: `1e-5`, which YAML reads as text, becomes a number.

    Raises:
        UserError: a value of another type, naming it.
    """
    hints = get_type_hints(cls)
    return {name: _cast(name, value, hints[name]) for name, value in values.items()}


def _cast(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(name, str(value), map(str, get_args(hint)))
        return value
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    if list[str] in kinds:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        if str not in kinds:
            raise UserError(f"{name}: expected a list of words, got {value!r}")
    if bool in kinds and isinstance(value, bool):
        return value
    if set(kinds) <= {bool, types.NoneType}:
        raise UserError(f"{name}: expected true or false, got {value!r}")
    if str in kinds or not {int, float} & set(kinds):
        if set(kinds) <= {str, types.NoneType} and not isinstance(value, str):
            raise UserError(f"{name}: expected a word, got {value!r}")
        return value
    return _number(name, value, float in kinds)


def _number(name: str, value: Any, fraction: bool) -> Any:
    kind = "a number" if fraction else "a whole number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"{name}: expected {kind}, got {value!r}")
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name}: expected {kind}, got {value!r}") from error
    if fraction:
        return number
    if not number.is_integer():
        raise UserError(f"{name}: expected {kind}, got {value!r}")
    return int(value) if isinstance(value, int) else int(number)
