"""A found subnetwork in the forms that other software takes: Hugging Face, ONNX, OpenVINO, and sparse folders."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsebert._openvino import compile_for_cpu
from sparsebert.errors import UserError, unknown
from sparsebert.models.load import load_base, max_tokens
from sparsebert.models.per_layer import remove_structure
from sparsebert.models.plain_head import labelled_config, with_plain_head
from sparsebert.models.replace import put_folder
from sparsebert.models.sparse_folder import save_sparse
from sparsebert.models.sparse_load import AutoSparseModel
from sparsebert.models.storage import head_files, load_head
from sparsebert.models.task_model import TaskModel
from sparsebert.nn.sparsify import sparsify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PARITY", "TARGETS", "Exported", "check_packages", "export"]

PARITY = 1e-5
"""How far the logits of what was exported may be from the run's own, relative to the largest where that is above 1."""

TARGETS: dict[str, tuple[str, ...]] = {
    "dense": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "sparse": (),
}
"""What can be exported to, and the optional packages that needs."""

_OPSET = 18
# Everything that an export may have written before; other files of the folder are the user's.
_WRITTEN = (
    "README.md", "added_tokens.json", "chat_template.jinja", "config.json", "head.json", "head.safetensors",
    "masks.safetensors", "merges.txt", "model.onnx", "model.onnx.data", "model.safetensors",
    "model.safetensors.index.json", "openvino_model.bin", "openvino_model.xml", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Exported:
    """What an export made."""

    to: str
    what: str
    """In a sentence."""
    usage: str
    """Python code that runs it."""
    parity: float
    """The largest difference between its logits and the run's, relative to the largest of them where that exceeds 1."""


def export(
    model: TaskModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | Path,
    to: str,
    *,
    info: Mapping[str, Any],
    compact: bool = True,
    format: str = "auto",
    card: Callable[[Exported], str] | None = None,
) -> Exported:
    """Writes a saved run's model in another form, whole or not at all, and checks that it computes the same.

    - "dense": a checkpoint of Hugging Face, pruned weights zero. A linear head becomes transformers' own where that
      computes the same (`sparsebert.models.plain_head`); any other lies beside the encoder in `head.safetensors` and
      `head.json`.
    - "onnx": `model.onnx` (opset 18), batch and sequence of any size, checked with onnxruntime.
    - "openvino": `openvino_model.xml` and `.bin` in fp32, likewise.
    - "sparse": the layers that gain by it in a sparse format, for `AutoSparseModel.from_pretrained`.

    Args:
        model: as `load_model` gives it; it is changed.
        tokenizer: written beside it.
        directory: the folder; of an older export in it the files are replaced, others are kept.
        to: a word of `TARGETS`.
        info: of `load_model`: `pattern`, `base_model`, `base_sha256`.
        compact: whether heads and neurons that are wholly pruned are taken out, where the pattern removes such.
        format: for "sparse": as `sparsify` takes it.
        card: gives the text of `README.md`.

    Raises:
        UserError: an unknown target, a package that is missing, logits that differ by more than `PARITY`, or a folder
            that cannot be written. Nothing is changed then.
    """
    check_packages(to)
    directory = Path(directory).expanduser()
    inputs = _examples(model.base, tokenizer)
    expected = [_run(model, batch) for batch in inputs]
    removed = _compact(model) if compact and info.get("pattern") in ("heads", "neurons") else ""
    made: list[Exported] = []

    def write(fresh: Path) -> None:
        what, usage, run = _WRITERS[to](fresh, model, tokenizer, info, format)
        parity = max(_difference(batch, ours, run(batch)) for batch, ours in zip(inputs, expected, strict=True))
        if not parity <= PARITY:
            raise UserError(
                f"{to}: the exported model's logits differ by {parity:.1e} from the run's, more than {PARITY:.0e}; "
                "nothing was written"
            )
        made.append(Exported(to, what + removed, usage, parity))
        if to != "sparse":
            tokenizer.save_pretrained(fresh)
        if card is not None:
            (fresh / "README.md").write_text(card(made[0]), encoding="utf-8")

    put_folder(directory, write, _WRITTEN)
    return made[0]


def _compact(model: TaskModel) -> str:
    """Takes out what is wholly pruned, and says so if there was any."""
    before = model.base.num_parameters()
    remove_structure(model.base)
    gone = model.base.num_parameters() < before
    return "; heads and neurons that are wholly pruned are taken out" if gone else ""


def check_packages(to: str) -> None:
    """A `UserError` for an unknown target, or one that needs packages which are not installed."""
    if to not in TARGETS:
        raise unknown("target", to, TARGETS)
    missing = [name for name in TARGETS[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{to}: needs {', '.join(missing)}, not installed here; install with:  pip install 'sparsebert[export]'"
        )


Written = tuple[str, str, Run]


def _dense(folder: Path, model: TaskModel, tokenizer: Any, info: Mapping[str, Any], format: str) -> Written:
    whole = with_plain_head(model)
    uneven = bool(getattr(model.base.config, "is_heterogeneous", False))
    if whole is not None:
        whole.save_pretrained(folder)
        name = type(whole).__name__
        what = f"a {name} of Hugging Face, pruned weights zero"
        loader: Any = AutoSparseModel if uneven else type(whole)
        loaded = loader.from_pretrained(folder).eval()
        usage = (
            "import sparsebert\n\nmodel = sparsebert.AutoSparseModel.from_pretrained(FOLDER)"
            if uneven
            else f"from transformers import {name}\n\nmodel = {name}.from_pretrained(FOLDER)"
        )
        if uneven:
            what += "; its layers differ in width, which transformers' own from_pretrained cannot build"
        return what, usage, lambda batch: _plain_answer(loaded, model, batch)
    if uneven:
        save_sparse(model, folder, tokenizer, pattern=info.get("pattern"))
        sparse = AutoSparseModel.from_pretrained(folder)
        usage = "import sparsebert\n\nmodel = sparsebert.AutoSparseModel.from_pretrained(FOLDER)"
        return f"the encoder and the run's own {model.head_kind} head", usage, lambda b: _run(sparse, b)
    model.base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, content in head_files(model, dict(info)).items():
        (folder / file).write_bytes(content)
    base, _ = load_base(str(folder))
    again, _ = load_head(folder, base)
    name = type(model.base).__name__
    what = (
        f"a {name} of Hugging Face, pruned weights zero; the encoder alone, for transformers has no head that computes "
        f"what the run's {model.head_kind} head does, which lies beside it in head.safetensors and head.json"
    )
    usage = (
        "from pathlib import Path\n\nfrom sparsebert.models.load import load_base\n"
        "from sparsebert.models.storage import load_head\n\n"
        "base, tokenizer = load_base(FOLDER)  # or transformers' AutoModel.from_pretrained(FOLDER)\n"
        "model, info = load_head(Path(FOLDER), base)"
    )
    return what, usage, lambda batch: _run(again, batch)


def _sparse(folder: Path, model: TaskModel, tokenizer: Any, info: Mapping[str, Any], format: str) -> Written:
    sparsify(model.base, format=format)
    report: Any = model.base.sparsification
    save_sparse(
        model,
        folder,
        tokenizer,
        pattern=info.get("pattern"),
        base_model=info.get("base_model"),
        base_sha256=info.get("base_sha256"),
    )
    loaded = AutoSparseModel.from_pretrained(folder, verify=True)
    words = sorted({record.format for record in report.replaced})
    stored = ", ".join(words) or "dense was faster everywhere"
    what = f"a sparse model, {len(report.replaced)} of {len(report)} linears stored sparse ({stored})"
    usage = "import sparsebert\n\nmodel = sparsebert.AutoSparseModel.from_pretrained(FOLDER)"
    return what, usage, lambda batch: _run(loaded, batch)


def _onnx(folder: Path, model: TaskModel, tokenizer: Any, info: Mapping[str, Any], format: str) -> Written:
    import onnxruntime

    path, names, outputs = folder / "model.onnx", _input_names(model), _output_names(model)
    with _quiet():
        program = torch.onnx.export(
            _program(model), dynamo=True, opset_version=_OPSET, input_names=names, output_names=outputs, verbose=False
        )
        batch, sequence = program.model.graph.inputs[0].shape  # type: ignore[union-attr, misc]
        program.rename_axes({batch: "batch", sequence: "sequence"})  # type: ignore[union-attr, dict-item]
        program.save(path)  # type: ignore[union-attr]
    labelled_config(model).save_pretrained(folder)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    usage = (
        'import onnxruntime\n\nsession = onnxruntime.InferenceSession(FOLDER + "/model.onnx")\n'
        f"outputs = session.run({outputs}, inputs)  # {', '.join(names)}: int64 [batch, sequence]"
    )

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(outputs, {name: batch[name].numpy() for name in names})
        return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}

    return f"an ONNX graph (opset {_OPSET}), fp32, batch and sequence of any size", usage, run


def _openvino(folder: Path, model: TaskModel, tokenizer: Any, info: Mapping[str, Any], format: str) -> Written:
    import openvino

    path, names, outputs = folder / "openvino_model.xml", _input_names(model), _output_names(model)
    with _quiet():
        graph = openvino.convert_model(_program(model))
    for port, name in zip((*graph.inputs, *graph.outputs), (*names, *outputs), strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(graph, path, compress_to_fp16=False)
    labelled_config(model).save_pretrained(folder)
    compiled = compile_for_cpu(path, {"INFERENCE_PRECISION_HINT": "f32"})
    usage = (
        'import openvino\n\nmodel = openvino.compile_model(FOLDER + "/openvino_model.xml", "CPU")\n'
        f"outputs = model(inputs)  # {', '.join(names)}: int64 [batch, sequence]"
    )

    def run(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = compiled({name: batch[name].numpy() for name in names})
        return {name: torch.from_numpy(found[name]) for name in outputs}

    return "an OpenVINO model, fp32, batch and sequence of any size", usage, run


_WRITERS = {"dense": _dense, "onnx": _onnx, "openvino": _openvino, "sparse": _sparse}


class _Positional(nn.Module):
    """A task model that takes and gives tensors by position, as exporters want it."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of `_input_names`; those of `_output_names`."""
        return tuple(self.model(*inputs).values())


def _program(model: TaskModel) -> torch.export.ExportedProgram:
    """The whole model as a graph with any batch and sequence. (torch.jit's tracer, the other way to one, loses the
    hidden states that the mlp head reads.)"""
    example = (torch.full((2, 4), 5), torch.ones(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    inputs = example[: len(_input_names(model))]
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=max_tokens(model.base))}
    with torch.no_grad():
        return torch.export.export(_Positional(model).eval(), inputs, dynamic_shapes=((sizes,) * len(inputs),))


def _input_names(model: TaskModel) -> list[str]:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    return names if model.base.config.model_type == "bert" else names[:2]


def _output_names(model: TaskModel) -> list[str]:
    return ["start_logits", "end_logits"] if model.kind == "span" else ["logits"]


def _examples(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """Batches of random tokens, one padded at the end of its last row."""
    generator, longest = torch.Generator().manual_seed(0), max_tokens(base)
    rows, pad = int(base.config.vocab_size), int(tokenizer.pad_token_id or 0)  # type: ignore[arg-type]
    batches = []
    for count, length in ((1, 1), (1, min(longest, 9)), (3, min(longest, 32))):
        ids = torch.randint(rows - 1, (count, length), generator=generator)
        ids += ids >= pad  # any token but padding's
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        types = torch.zeros_like(ids) if count == 1 else torch.arange(length).ge(length // 2).long().expand_as(ids)
        types = types.clamp(max=int(getattr(base.config, "type_vocab_size", 1)) - 1)
        ids = ids.where(mask.bool(), pad)
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": (types * mask).contiguous()})
    return batches


def _run(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = model(**batch)
    return found


def _plain_answer(loaded: nn.Module, model: TaskModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model of transformers gives, in a task model's words."""
    with torch.no_grad():
        output = loaded(**{name: batch[name] for name in _input_names(model)})
    found = {name: output[name] for name in _output_names(model)}
    return {"logits": found["logits"].squeeze(-1)} if model.kind == "regression" else found


def _difference(batch: dict[str, Tensor], expected: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    """The largest difference of the logits (spans: at real tokens), relative to the largest where that exceeds 1."""
    worst = 0.0
    for name, ours in expected.items():
        theirs = got[name]
        if ours.shape != theirs.shape:
            return float("inf")
        if ours.shape == batch["attention_mask"].shape and name != "logits":
            ours, theirs = ours[batch["attention_mask"].bool()], theirs[batch["attention_mask"].bool()]
        worst = max(worst, float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the terminal what exporters say of packages that are not needed, and of torch's own calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
