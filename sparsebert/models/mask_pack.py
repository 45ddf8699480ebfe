"""Many tasks beside one base model: one bit a weight and a head for each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsebert._html import table
from sparsebert._show import rich_table
from sparsebert.errors import UserError, unknown
from sparsebert.models.folder import first_line
from sparsebert.models.load import load_base, model_fingerprint
from sparsebert.models.masks import pack_masks, read_bits
from sparsebert.models.pack_layers import PackedEmbedding, PackedLinear, Running, show
from sparsebert.models.plain import plain_state
from sparsebert.models.prunable import all_matrices
from sparsebert.models.replace import put_folder
from sparsebert.models.storage import HEAD_FILES, head_files, load_head, load_model
from sparsebert.models.task_model import TaskModel

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MaskPack"]

PACK_VERSION = 1

_ABOUT, _BASE, _TASKS, _MASKS = "pack.json", "base", "tasks", "masks.safetensors"
_HEADS = ("task", "kind", "outputs", "bytes of masks", "")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class MaskPack(nn.Module):
    """One frozen base model, and for each task one mask bit a weight and a head.

    What Adapting by Pruning and other methods that train masks over frozen weights find is such a task. `switch` puts
    a task's W·mask in place in the running model; a batch whose rows belong to different tasks runs in one pass.

        pack = MaskPack.create("tasks", "bert-base-uncased")
        pack.add("runs/mrpc-adapt_prune-1")
        pack.switch("mrpc")
        logits = pack(batch)["logits"]
        rows = pack(batch, tasks=["mrpc", "rte", "mrpc"])

    A pack's folder holds `pack.json` (version, where the base is and its SHA-256), `base/` unless the base is only
    referred to, and `tasks/NAME/` with `masks.safetensors` (bits, 1/8 byte a masked weight), `head.safetensors` and
    `head.json`. Made by `create` and `load`; a module in eval mode whose parameters are all frozen. In memory the
    masked matrices are there twice: the base's own weights, and the product that runs. `pack.base.to(torch.bfloat16)`
    makes it run in bf16, and `padding_free(pack.base)` on the real tokens alone.
    """

    def __init__(
        self, directory: Path, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str
    ) -> None:
        super().__init__()
        self.directory = directory
        self.base = base
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        """SHA-256 of the base's parameters (`model_fingerprint`)."""
        self._running = Running()
        self._packed: dict[str, PackedLinear | PackedEmbedding] = {}
        # Names of tasks may be words that a ModuleDict does not take; the list makes `to` find the heads.
        self._models: dict[str, TaskModel] = {}
        self._held = nn.ModuleList()
        self._known = {matrix.name: matrix for matrix in all_matrices(base)}
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def create(cls, directory: str | Path, base_model: str | Path, *, copy: bool = True) -> MaskPack:
        """A new pack without tasks.

        Args:
            directory: its folder, new or empty.
            base_model: a folder or hub name (`load_base`).
            copy: whether the base is copied into the pack; otherwise `pack.json` names it and its SHA-256.

        Raises:
            UserError: a folder that is in use or cannot be written, or a base that cannot be loaded.
        """
        directory = Path(directory).expanduser()
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            hint = "; open it with MaskPack.load" if (directory / _ABOUT).is_file() else ""
            raise UserError(f"{directory}: expected a new or an empty folder for the pack, but it is in use{hint}")
        base, tokenizer = load_base(str(base_model))
        folder = Path(base_model).expanduser()
        source = str(folder.resolve()) if folder.is_dir() else str(base_model)
        about = {"version": PACK_VERSION, "base": None if copy else source, "sha256": model_fingerprint(base)}

        def write(fresh: Path) -> None:
            if copy:
                base.save_pretrained(fresh / _BASE)
                tokenizer.save_pretrained(fresh / _BASE)
            (fresh / _TASKS).mkdir()
            (fresh / _ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

        put_folder(directory, write, ())
        return cls(directory, base, tokenizer, about["sha256"])  # type: ignore[arg-type]

    @classmethod
    def load(cls, directory: str | Path) -> MaskPack:
        """The pack of a folder with all its tasks, the base's own weights running.

        Raises:
            UserError: no pack, a base that is missing or is another than the pack was made for, or a damaged file.
        """
        directory = Path(directory).expanduser()
        about = _read_about(directory / _ABOUT)
        source = str(directory / _BASE) if about["base"] is None else about["base"]
        base, tokenizer = load_base(source)
        fingerprint = model_fingerprint(base)
        if fingerprint != about["sha256"]:
            raise UserError(
                f"{source}: another model than {directory} was made for (SHA-256 {fingerprint[:12]}…, "
                f"expected {about['sha256'][:12]}…); put the right one back"
            )
        pack = cls(directory, base, tokenizer, fingerprint)
        for folder in sorted((directory / _TASKS).glob("*")):
            if folder.is_dir() and not folder.name.startswith("."):  # a killed save leaves hidden ones
                pack._take(folder)
        return pack

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, sorted."""
        return tuple(sorted(self._models))

    @property
    def task(self) -> str | None:
        """The task whose weights are running; None for the base's own."""
        return self._running.task

    def add(self, run: str | Path, name: str | None = None) -> str:
        """Takes a finished run's masks and head into the pack and its folder.

        Args:
            run: a run's folder, or the model folder in it. Its weights must be the base's own wherever they are kept.
            name: of the task, letters, digits and `._-`; by default what the run says it was trained on.

        Returns:
            The task's name.

        Raises:
            UserError: a name that is taken or cannot be a folder's; a run that cannot be read, was made from another
                base, or has trained weights; a full disk. The pack is as it was then.
        """
        folder = Path(run).expanduser()
        folder = folder / "model" if (folder / "model").is_dir() else folder
        model, tokenizer, masks, info = load_model(folder)
        name = str(info.get("task", "")) if name is None else name
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"name: expected letters, digits and ._- for a task's name, got {name!r}; give another")
        if name in self._models:
            raise UserError(f"name: the pack has a task {name!r} already; give this run another name")
        self._check_frozen(folder, model, masks, info.get("base_sha256"))
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(f"{folder}: its tokenizer is not the base's; the pack's rows share one")
        pattern = info.pop("pattern")
        files = {_MASKS: pack_masks(masks, pattern, self.fingerprint), **head_files(model, info)}

        def write(fresh: Path) -> None:
            for file, content in files.items():
                (fresh / file).write_bytes(content)

        target = self.directory / _TASKS / name
        put_folder(target, write, (_MASKS, *HEAD_FILES))
        self._take(target)
        return name

    def switch(self, task: str | None) -> nn.Module:
        """Puts a task's weights in place in the running model, or with None the base's own, to the bit.

        Returns:
            The task's model (base and head, a `TaskModel`); for None the base. All tasks share the base, so what was
            returned before computes with the new weights too.

        Raises:
            UserError: a task that is not in the pack.
        """
        self._check_task(task)
        # An interruption must not leave a task's name on weights that are not all its own.
        self._running.task = None
        show(list(self._packed.values()), task)
        self._running.task = task
        return self.base if task is None else self._models[task]

    def forward(
        self, batch: Mapping[str, Tensor], tasks: str | Sequence[str] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Runs a batch.

        Args:
            batch: `input_ids` `[rows, seq]`, and `attention_mask` and `token_type_ids` of that shape where needed.
            tasks: one task for all rows (it is switched to); or one for each row, in one pass, whatever is switched
                to. None takes the task that was switched to.

        Returns:
            For one task what `TaskModel` returns. For a task a row, a list: what each row's own task returns for it,
            without the axis of rows.

        Raises:
            UserError: an unknown task, no task, or numbers of rows and tasks that differ.
        """
        inputs = _inputs(batch)
        if tasks is not None and not isinstance(tasks, str):
            return self._mixed(inputs, list(tasks))
        if tasks is not None and tasks != self.task:
            self.switch(tasks)
        if self.task is None:
            raise UserError("tasks: no task is switched to; call switch(task) first, or name the tasks")
        return self._models[self.task](**inputs)

    def _mixed(self, inputs: dict[str, Tensor], tasks: list[str]) -> list[dict[str, Tensor]]:
        for task in tasks:
            if task is None:
                raise UserError("tasks: expected a name for each row, got None")
            self._check_task(task)
        if len(tasks) != len(inputs["input_ids"]):
            raise UserError(f"tasks: expected one for each of {len(inputs['input_ids'])} rows, got {len(tasks)}")
        if not tasks:
            return []
        order = sorted(range(len(tasks)), key=tasks.__getitem__)
        counts = {task: len(list(rows)) for task, rows in groupby(order, key=tasks.__getitem__)}
        rows = torch.tensor(order, device=inputs["input_ids"].device)
        inputs = {name: tensor[rows] for name, tensor in inputs.items()}
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        tokens = [int((part != 0).sum()) for part in mask.split(list(counts.values()))]
        models = {task: self._models[task] for task in counts}
        states: dict[str, Any] = {}
        if any(model.wants_all_states for model in models.values()):
            states["output_hidden_states"] = True
        with self._running.mixed(list(counts), list(counts.values()), tokens):
            output = next(iter(models.values())).encode(**inputs, **states)
        answers: list[dict[str, Tensor]] = [{} for _ in tasks]
        first = 0
        for task, count in counts.items():
            part = slice(first, first + count)
            found = models[task].answer(_rows_of(output, part), mask[part])
            for place, row in enumerate(order[part]):
                answers[row] = {name: tensor[place] for name, tensor in found.items()}
            first += count
        return answers

    def train(self, mode: bool = True) -> MaskPack:
        """Stays in eval mode: a pack is not trained."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{self.directory}, tasks: {', '.join(self.tasks) or 'none'}, running: {self.task or 'the base'}"

    def _shown(self) -> Sequence[tuple[str, ...]]:
        """A row a task: name, kind, classes, size of the masks, whether it is running."""
        rows = []
        for name in self.tasks:
            model, size = self._models[name], sum(layer.bits[name].numel() for layer in self._packed.values())
            outputs = ", ".join(model.label_names) or str(model.num_labels)
            rows.append((name, model.kind, outputs, f"{size:,}", "running" if name == self.task else ""))
        return rows

    def __rich__(self) -> Table:
        return rich_table(f"MaskPack {self.directory}", _HEADS, self._shown())

    def _repr_html_(self) -> str:
        return table(f"MaskPack {self.directory}", _HEADS, self._shown())

    def _check_task(self, task: str | None) -> None:
        if task is not None and (not isinstance(task, str) or task not in self._models):
            raise unknown("task", task, self._models)

    def _take(self, folder: Path) -> None:
        """Reads a task's folder into the running model."""
        masks = folder / _MASKS
        bits, _, fingerprint = read_bits(masks, self._known)
        if fingerprint != self.fingerprint:
            raise UserError(f"{masks}: masks over another base than this pack's; add the run to this pack again")
        model, _ = load_head(folder, self.base)
        for name, packed in bits.items():
            self._pack(name).bits[folder.name] = packed.to(self.base.device)
        self._models[folder.name] = model.requires_grad_(False)
        self._held.append(model)

    def _pack(self, name: str) -> PackedLinear | PackedEmbedding:
        """The packed layer in a matrix's place, put there where it is not."""
        if name not in self._packed:
            parent, _, child = name.rpartition(".")
            old = self.base.get_submodule(name)
            kind = PackedEmbedding if isinstance(old, nn.Embedding) else PackedLinear
            self._packed[name] = kind(old, self._running).eval()  # type: ignore[arg-type]
            setattr(self.base.get_submodule(parent), child, self._packed[name])
        return self._packed[name]

    def _check_frozen(self, folder: Path, model: TaskModel, masks: Mapping[str, Tensor], made_from: Any) -> None:
        """A `UserError` unless every weight that the masks keep, and all others, are the base's to the bit."""
        if made_from is not None and made_from != self.fingerprint:
            raise UserError(
                f"{folder}: made from another base (SHA-256 {str(made_from)[:12]}…) than this pack's "
                f"({self.fingerprint[:12]}…)"
            )
        if self.base.dtype != torch.float32:
            raise UserError(f"{folder}: this pack runs in {self.base.dtype}; add to one that was just loaded (float32)")
        theirs, ours = plain_state(model.base), plain_state(self.base)
        ours |= {f"{name}.weight": layer.full for name, layer in self._packed.items()}
        if {name: tensor.shape for name, tensor in theirs.items()} != {name: t.shape for name, t in ours.items()}:
            raise UserError(f"{folder}: its base has other parameters than this pack's; it was made from another model")
        for name, weight in theirs.items():
            other = weight.view(torch.int32) != ours[name].detach().cpu().view(torch.int32)
            mask = masks.get(name.removesuffix(".weight"))
            changed = int((other if mask is None else other & mask).sum())
            if changed:
                raise UserError(
                    f"{folder}: {name}: {changed} weights are not the base's; a pack holds masks over frozen weights. "
                    "Fine-tuned weights need a folder of their own: python -m sparsebert.export RUN --to sparse"
                )


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name in batch:
        if name not in _INPUTS:
            raise unknown("input", name, _INPUTS)
    if "input_ids" not in batch:
        raise UserError("batch: expected input_ids [rows, seq], got none")
    return dict(batch)


def _rows_of(output: Any, part: slice) -> Any:
    """The base's output for some of its rows."""
    pooled, states = getattr(output, "pooler_output", None), getattr(output, "hidden_states", None)
    return SimpleNamespace(
        last_hidden_state=output.last_hidden_state[part],
        pooler_output=None if pooled is None else pooled[part],
        hidden_states=None if states is None else [state[part] for state in states],
    )


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: missing; expected a folder that MaskPack.create made")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(about["sha256"], str) or not isinstance(about["base"], str | None):
            raise TypeError("sha256 and base should be text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable as a pack's description ({first_line(error)})") from error
    if about.get("version") != PACK_VERSION:
        raise UserError(f"{path}: a pack of version {about.get('version')!r}; this sparsebert reads {PACK_VERSION}")
    return dict(about)
