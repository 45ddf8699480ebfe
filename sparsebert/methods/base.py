"""What a method is: settings, and phases that train one module."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsebert.errors import UserError, unknown
from sparsebert.models.task_model import TaskModel
from sparsebert.nn import Masks
from sparsebert.patterns import Allocation, Matrix, Pattern
from sparsebert.patterns.base import ALLOCATIONS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Objective = Callable[[dict[str, Tensor]], dict[str, Tensor]]

__all__ = ["Context", "Method", "Phase", "TrainingModule", "check_setting", "describe"]


@dataclass
class Context:
    """What a method is given."""

    model: TaskModel
    matrices: Sequence[Matrix]
    """What is masked."""
    pattern: Pattern
    sparsity: float
    allocation: Allocation
    dtype: torch.dtype
    """Compute dtype of masked weights: bf16 under `--precision bf16`."""
    seed: int
    untouched: bool = True
    """Whether a sparsifying method first trains the head on the untouched model, to compare with."""
    teacher: TaskModel | None = None
    """The dense model that is distilled, for a method that wants one. Its weights are in place when the first phase
    starts, not before."""
    source: str = ""
    """The folder or hub id that the base was loaded from."""
    tokenizer: PreTrainedTokenizerBase | None = None
    sparsity_asked: bool = True
    """Whether the sparsity was asked for; else it is the pattern's default, and a method may know better."""


class TrainingModule(nn.Module):
    """The module that Trainer trains: `forward(**batch)` gives the loss. Its state dict is the run's whole state.

    Args:
        model: base and head.
        masks: the masks over the base, or None for a dense method.
    """

    memory: Tensor
    accepts_loss_kwargs = False  # Trainer would otherwise pass `num_items_in_batch`
    _ddp_params_and_buffers_to_ignore = ("memory",)  # every rank writes its own, the same, on the CPU
    objective: Objective | None
    """What a phase trains on in place of the task's loss: takes the batch by name, returns at least `loss`. Not asked
    in eval mode, where the model is scored as it will be used."""

    def __init__(self, model: TaskModel, masks: Masks | None = None) -> None:
        super().__init__()
        self.model = model
        self.masks = masks
        self.objective = None
        # What is trained beside the model, by name: a projection to the teacher's width, a masked-LM head.
        self.extra = nn.ModuleDict()
        # What a method must remember between steps lives in a tensor, so that every checkpoint holds it.
        self.register_buffer("memory", torch.zeros(8, dtype=torch.float64))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TrainingModule:
        """`.to(...)` and the like; the memory stays where and what it is.

        Methods read it in every step, for which a GPU would have to be waited for, and objectives hold the tensor.
        """
        memory = self.memory
        super()._apply(fn, recurse)
        self.memory = memory
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The objective's result while training under one; else as `TaskModel.forward`."""
        if self.objective is None or not self.training:
            return self.model(input_ids, attention_mask, token_type_ids, labels, start_positions, end_positions)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
        }
        return self.objective({name: value for name, value in batch.items() if value is not None})


class Phase:
    """One stretch of training with one optimiser and schedule. Subclasses say what is trained and what happens after
    each optimiser step."""

    name: str = "train"
    report: str | None = None
    """If set, the model is scored on the validation set after this phase, under this name."""
    data: str = "task"
    """What is trained on: the `task`'s examples, or `text` (`--text`, packed to blocks)."""
    masking: float = 0.0
    """Share of the tokens that are to be predicted, for a phase on text."""
    note: str | None = None
    """If set, printed when the phase begins: what a user should know of it."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.module = method.module

    def training(self) -> dict[str, Any]:
        """Trainer arguments that this phase changes."""
        return {}

    def start(self) -> None:
        """Brings the module into the shape that this phase trains. Also called before a checkpoint of this phase, or
        of a later one, is loaded: whatever tensors it sets may be overwritten by the saved ones."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Optimiser groups; `learning_rate` is Trainer's `--learning-rate`."""
        raise NotImplementedError

    def loaded(self) -> None:
        """Called when the module's tensors are in place, new or from a checkpoint, before the first step."""
        if self.module.masks is not None:
            self.module.masks.refresh()

    def before_step(self, step: int, total: int) -> None:
        """Called when the gradients of optimiser step `step` (from 1) are ready."""

    def after_step(self, step: int, total: int) -> bool:
        """Called after optimiser step `step` (from 1) of `total`; True ends the phase."""
        return False

    def logs(self) -> dict[str, float]:
        """Numbers for the log beside Trainer's own."""
        return {}

    def outcome(self, held_out: Any) -> dict[str, Any]:
        """What the result should say of this phase, asked once after `finish`.

        Args:
            held_out: for a phase on text, a dataset of blocks that were not trained on; else None.
        """
        return {}

    def finish(self) -> None:
        """Called once at the end of the phase; must leave tensors changed in place only."""


class Method(ABC):
    """A way to turn a pre-trained model into a result.

    Args:
        context: the model and what is asked of it.
        settings: an instance of `Settings`.

    Raises:
        UserError: a setting, sparsity or allocation that cannot work, or a matrix that the pattern does not fit.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `--help`."""
    Settings: ClassVar[type]
    """Frozen dataclass of the method's own settings; flags are made from it."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults that differ from Trainer's or the run's, by argument name."""
    sparsifies: ClassVar[bool] = True

    @classmethod
    def wants_teacher(cls, settings: Any) -> bool:
        """Whether a run with these settings needs a teacher."""
        return False

    @classmethod  # noqa: B027 (most methods change nothing)
    def shape(cls, base: PreTrainedModel, settings: Any) -> None:
        """Changes the loaded base before a head is put on it: a student of fewer layers."""

    def __init__(self, context: Context, settings: Any) -> None:
        self.context = context
        self.settings = settings
        if context.teacher is None and self.wants_teacher(settings):
            raise TypeError(f"{self.name}: these settings need a teacher in the context")
        self.check()
        self.module = self.build()
        self._first_head = {name: tensor.clone() for name, tensor in context.model.head.state_dict().items()}

    def check(self) -> None:
        """Raises a UserError for what cannot work, before anything is built; methods add checks of their settings."""
        if self.sparsifies:
            self.context.pattern.check_sparsity(self.context.sparsity)
            if self.context.allocation not in ALLOCATIONS:
                raise unknown("allocation", self.context.allocation, ALLOCATIONS)

    def build(self) -> TrainingModule:
        """Makes the training module: masks (all kept) for a sparsifying method."""
        context = self.context
        masks = None
        if self.sparsifies:
            masks = Masks(context.model.base, context.matrices, context.pattern, context.dtype)
        return TrainingModule(context.model, masks)

    @property
    def masks(self) -> Masks:
        """The module's masks, of a sparsifying method."""
        masks = self.module.masks
        if masks is None:
            raise TypeError(f"{self.name} has no masks")
        return masks

    def new_head(self) -> None:
        """Puts the head back to its first values."""
        self.context.model.head.load_state_dict(self._first_head)

    @abstractmethod
    def phases(self) -> list[Phase]:
        """The phases, in order."""

    def finish(self) -> dict[str, Tensor]:
        """Puts plain modules back (pruned weights zero) and returns the bool masks by matrix name."""
        self.module.cpu()
        return self.masks.remove() if self.module.masks is not None else {}

    def untouched_phases(self) -> list[Phase]:
        """The comparison that a sparsifying method's result is shown beside."""
        from sparsebert.methods.phases import HeadPhase  # phases stand on this module

        return [HeadPhase(self, "untouched", report="untouched")] if self.context.untouched else []


def check_setting(name: str, value: float, fits: bool, expected: str) -> None:
    """Raises a UserError that names the setting `name` and what was `expected`, unless its value `fits`."""
    if not fits:
        raise UserError(f"{name} {value:g}: expected {expected}")


def describe(settings: type) -> dict[str, str]:
    """Field name to the docstring under it, for flags' help; inherited fields included, "" where there is none."""
    import ast
    import inspect
    import itertools
    import textwrap

    notes: dict[str, str] = {}
    for cls in reversed(settings.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        except (OSError, TypeError):  # written at a prompt: there is no source to read
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for pair in itertools.pairwise(body):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    notes[name] = " ".join(text.split())
    return {field.name: notes.get(field.name, "") for field in dataclasses.fields(settings)}
