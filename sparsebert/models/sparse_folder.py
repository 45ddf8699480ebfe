"""Saving a sparsified model: a Hugging Face folder whose weights are stored in their sparse formats.

    config.json          the standard configuration, and a section `sparsebert` (see `Section`)
    model.safetensors    every sparse weight in its format's tensors (`values`, indices, `layout`), the rest as it is
    head.safetensors     of a `TaskModel`: its head, and how that is built
    head.json
    tokenizer files      where a tokenizer is given

`sparse_load.AutoSparseModel` reads it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparsebert import __version__
from sparsebert.errors import UserError, unknown
from sparsebert.models.folder import WEIGHTS
from sparsebert.models.load import model_fingerprint
from sparsebert.models.prunable import LAYOUTS
from sparsebert.models.replace import put_folder
from sparsebert.models.storage import HEAD_FILES, head_files
from sparsebert.models.task_model import TaskModel
from sparsebert.nn.masked import MaskedEmbedding, MaskedLinear
from sparsebert.nn.sparse_linear import SparseLinear
from sparsebert.ops.masked_weight import masked_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["FORMAT_VERSION", "SECTION", "Section", "header_of", "save_pretrained", "save_sparse"]

FORMAT_VERSION = 1
SECTION = "sparsebert"

# What transformers' save_pretrained takes and this one has no use for: the state is the model's own, in one file.
_IGNORED = frozenset({"state_dict", "safe_serialization", "max_shard_size"})
_CLASS_PREFIXES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
_OURS = ("config.json", WEIGHTS, "model.safetensors.index.json", "masks.safetensors", *HEAD_FILES)
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class Section:
    """The section `sparsebert` of `config.json`."""

    modules: dict[str, dict[str, Any]]
    """Of every sparse layer: `format` (its spelling), `shape` `[N, K]`, and the number of weights `stored`."""
    tied: dict[str, str]
    """Tensors that are in the file under another name only: a masked-LM decoder's, tied to the embeddings."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of the tensors' files, and of `model.safetensors` the `header_sha256`."""
    pattern: str | None = None
    """Of sparsity, as `sparsebert.parse_pattern` reads it; None where it is not known."""
    base_model: dict[str, str | None] = field(default_factory=lambda: {"name": None, "sha256": None})
    """`name` of the pre-trained model and the `sha256` of its parameters (`sparsebert.models.load.model_fingerprint`);
    None for what is not known."""
    format_version: int = FORMAT_VERSION
    sparsebert: str = __version__
    """The version of the package that saved it."""


def save_sparse(
    model: nn.Module,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pattern: str | None = None,
    base_model: str | Path | None = None,
    base_sha256: str | None = None,
) -> None:
    """Save a sparsified model, whole or not at all, for `AutoSparseModel.from_pretrained`.

    Every `SparseLinear` is stored in its format, everything else as it is; a `MaskedLinear` or `MaskedEmbedding` that
    is left becomes an ordinary layer with zeros. Tensors that are tied are stored once. An existing model in the folder
    is replaced in one step once everything is on disk; other files there are kept, and so is a tokenizer where none is
    given.

    Args:
        model: a BERT, RoBERTa or DistilBERT of transformers with any head, or a `TaskModel`; sparsified, compacted
            (`remove_structure`) or both. It is not changed.
        directory: the folder; made where it does not exist.
        tokenizer: saved beside the model.
        pattern: of sparsity; None: what the folder or run said that the model was loaded from, if anything.
        base_model: name or folder of the pre-trained model. None: as for `pattern`, else what the configuration says.
        base_sha256: its fingerprint. None: worked out where `base_model` is a folder of such a model.

    Raises:
        TypeError: no such model. UserError: a model that could not be rebuilt from the folder (another kind, a class
            that is not transformers' own, a layer with an activation of its own, weights without data), or a folder
            that cannot be written, a full disk among the reasons.
    """
    directory = Path(directory)
    base = _checked(model)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: expected a folder to save the model in, but it is a file")
    about = _provenance(model, base, pattern, base_model, base_sha256)
    state, tied = _state(base)
    files = _contents(model, state, about)
    section = Section(_modules(base), tied, _described(files), **about)
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = base.dtype

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        config.save_pretrained(folder)
        path = folder / "config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**written, SECTION: asdict(section)}, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    put_folder(directory, write, {*_OURS, *(_TOKENIZER if tokenizer is not None else ())})


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pattern: str | None = None,
    base_model: str | Path | None = None,
    base_sha256: str | None = None,
    is_main_process: bool = True,
    **others: Any,
) -> None:
    """`save_sparse` under the name, and with the arguments, that `transformers.Trainer` calls.

    A model of a kind that `AutoSparseModel` cannot build is saved by its class's own `save_pretrained`.

    Args:
        model, tokenizer, pattern, base_model, base_sha256: as for `save_sparse`.
        save_directory: the folder.
        is_main_process: nothing is written where it is False.
        others: `state_dict`, `safe_serialization` and `max_shard_size` are ignored; the rest is refused.
    """
    if str(getattr(getattr(model, "config", None), "model_type", "")) not in LAYOUTS and not isinstance(
        model, TaskModel
    ):
        type(model).save_pretrained(model, save_directory, is_main_process=is_main_process, **others)  # type: ignore[attr-defined]
        return
    for name, value in others.items():
        if name not in _IGNORED and value not in (None, False):
            raise UserError(f"save_pretrained: a sparse model takes no {name!r}; got {value!r}")
    if is_main_process:
        save_sparse(model, save_directory, tokenizer, pattern=pattern, base_model=base_model, base_sha256=base_sha256)


def header_of(content: Any) -> bytes:
    """The header of a safetensors file, its length included, from the file's first bytes or all of them."""
    return bytes(content[: 8 + int.from_bytes(content[:8], "little")])


def architecture(name: object, kind: str) -> type[PreTrainedModel]:
    """The class of transformers of that name, for a `config.model_type`.

    Raises:
        UserError: there is none.
    """
    import transformers

    found = None
    if isinstance(name, str) and name.isidentifier() and name.startswith(_CLASS_PREFIXES[kind]):
        found = getattr(transformers, name, None)
    if (
        not isinstance(found, type)
        or not issubclass(found, transformers.PreTrainedModel)
        or getattr(found.config_class, "model_type", None) != kind
    ):
        raise UserError(f"architectures: expected a {kind} model of transformers, got {name!r}")
    return found


def _checked(model: nn.Module) -> PreTrainedModel:
    """The transformers model that is saved: the base of a `TaskModel`, else the model itself."""
    from transformers import PreTrainedModel

    base = model.base if isinstance(model, TaskModel) else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"model: expected a model of transformers or a TaskModel, got {type(model).__name__}; save its "
            "state_dict() with safetensors, and load that with load_sparsified"
        )
    kind = str(base.config.model_type)
    if kind not in LAYOUTS:
        raise unknown("model type", kind, LAYOUTS)
    if architecture(type(base).__name__, kind) is not type(base):
        raise UserError(f"model: expected a class of transformers itself, got {type(base).__qualname__} of your own")
    for name, tensor in base.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"model: {name} is on the meta device, without data; load the model's weights first")
    for name, module in base.named_modules():
        if isinstance(module, SparseLinear) and module._layout.activation != "none":
            raise UserError(
                f"model: {name} applies {module._layout.activation!r} itself, as no layer of a plain {kind} model does"
            )
        if isinstance(module, (MaskedLinear, MaskedEmbedding)) and module.score is not None:
            raise UserError(f"model: {name}: its mask is still being learned; finish that first")
    return base


def _provenance(
    model: nn.Module, base: PreTrainedModel, pattern: str | None, name: str | Path | None, sha256: str | None
) -> dict[str, Any]:
    """`pattern` and `base_model` of the section."""
    known: Mapping[str, Any] = getattr(model, "provenance", None) or {}
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern: expected the name of a sparsity pattern, got {pattern!r}")
    origin = dict(known.get("base_model") or {})
    if name is not None or not origin.get("name"):
        origin = {"name": str(name or getattr(base.config, "_name_or_path", "")) or None, "sha256": None}
    if sha256 is not None:
        origin["sha256"] = sha256
    folder = origin["name"]
    if origin.get("sha256") is None and folder and Path(folder).expanduser().is_dir():
        # A folder of something else than a plain model has no fingerprint.
        with suppress(UserError):
            origin["sha256"] = model_fingerprint(folder)
    return {"pattern": pattern if pattern is not None else known.get("pattern"), "base_model": origin}


def _state(base: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor on the CPU under its first name, and the other names of those that have several."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        state[name] = tensor.detach()
    for name, module in base.named_modules():
        if isinstance(module, (MaskedLinear, MaskedEmbedding)) and f"{name}.weight" in state:
            state[f"{name}.weight"] = masked_weight(module.weight.detach(), module.bits, module.grid)
    return {name: tensor.cpu().contiguous() for name, tensor in state.items()}, tied


def _contents(model: nn.Module, state: Mapping[str, Tensor], about: dict[str, Any]) -> dict[str, bytes]:
    """Name and content of the tensors' files, and of what says how a head is built."""
    from safetensors.torch import save

    # Whole files in memory, written by Python: then a full disk is an OSError like any other.
    files = {WEIGHTS: save(dict(state), metadata={"format": "pt"})}
    if isinstance(model, TaskModel):
        info = {**(getattr(model, "provenance", None) or {}).get("info", {})}
        files.update(head_files(model, info))
    return files


def _described(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    described[WEIGHTS]["header_sha256"] = hashlib.sha256(header_of(files[WEIGHTS])).hexdigest()
    return described


def _modules(base: PreTrainedModel) -> dict[str, dict[str, Any]]:
    return {
        name: describe(module._stored()) for name, module in base.named_modules() if isinstance(module, SparseLinear)
    }


def describe(stored: Any) -> dict[str, Any]:
    """What the section says of a weight in its format."""
    return {"format": stored.spelling, "shape": list(stored.shape), "stored": stored.nnz}


if set(_CLASS_PREFIXES) != set(LAYOUTS):
    raise RuntimeError("every kind of model needs the prefix of its classes in sparsebert/models/sparse_folder.py")
