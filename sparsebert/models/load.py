"""Loading a pre-trained base model and its tokenizer, from a folder or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsebert.errors import UserError, unknown
from sparsebert.models.folder import check_folder, first_line
from sparsebert.models.per_layer import build_uneven
from sparsebert.models.plain import plain_state
from sparsebert.models.prunable import LAYOUTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["base_label_map", "load_base", "max_tokens", "model_fingerprint", "state_fingerprint"]


def load_base(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A pre-trained encoder in fp32, in eval mode, and its tokenizer.

    Only safetensors are read; nothing is ever unpickled and no code of a checkpoint is run. Every parameter comes
    from the file, but for BERT's and RoBERTa's pooler: a checkpoint without one gives a model without one.

    Args:
        model: a folder in Hugging Face's layout (`config.json`, `model.safetensors` or its shards, tokenizer files),
            or the name of a model on the hub. A folder is never looked up on the network.

    Returns:
        The bare model (BERT, RoBERTa or DistilBERT; attention by torch's SDPA) and its tokenizer.

    Raises:
        UserError: another kind of model; a folder without weights, configuration or tokenizer; weights that are
            pickles, damaged, incomplete, of other shapes than the configuration says, or not finite; a hub that gives
            nothing.
    """
    folder = _folder_of(model)
    with _quiet(progress=folder is None):
        config = _load_config(model, folder)
        if folder is not None:
            check_folder(folder)
        base = _load_weights(model, folder, config)
        tokenizer = _load_tokenizer(model, folder, base)
    return base, tokenizer


def base_label_map(base: PreTrainedModel) -> dict[str, int] | None:
    """The labels the model's configuration names, by number; None where it has only placeholders (`LABEL_0`)."""
    labels: dict[Any, Any] = getattr(base.config, "label2id", None) or {}
    if not labels or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in labels):
        return None
    ordered = sorted(((str(name), int(number)) for name, number in labels.items()), key=lambda pair: pair[1])
    if [number for _, number in ordered] != list(range(len(ordered))):
        return None
    return dict(ordered)


def model_fingerprint(folder_or_base: str | Path | PreTrainedModel) -> str:
    """SHA-256 over a base model's parameters: names, dtypes, shapes and bytes, sorted by name.

    Two models have the same fingerprint exactly if their parameters have the same bits; how a checkpoint is cut into
    files or what else lies in it does not matter.

    Args:
        folder_or_base: a model, or what `load_base` takes.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: as `load_base`.
    """
    base = load_base(str(folder_or_base))[0] if isinstance(folder_or_base, str | Path) else folder_or_base
    return state_fingerprint(plain_state(base))


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """`model_fingerprint` of parameters by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def max_tokens(base: PreTrainedModel) -> int:
    """The longest sequence the model's position table covers, special tokens included."""
    rows = int(base.config.max_position_embeddings)
    # RoBERTa counts positions from the padding token's number + 1.
    return rows - int(base.config.pad_token_id) - 1 if base.config.model_type == "roberta" else rows


def _folder_of(model: str) -> Path | None:
    """The folder that `model` names, or None for a name on the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"model: expected a folder or the name of a model on the hub, but {model!r} is a file")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise UserError(f"model: there is no folder {model!r}")
    return None


def _load_config(model: str, folder: Path | None) -> PretrainedConfig:
    from transformers import AutoConfig

    if folder is not None and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json; expected a folder as save_pretrained makes")
    config: Any
    try:
        config = AutoConfig.from_pretrained(
            str(folder or model), local_files_only=folder is not None, trust_remote_code=False
        )
    except Exception as error:  # transformers and the hub raise a dozen unrelated types here
        if folder is None:
            raise _hub_error(model, error) from error
        named = _model_type(folder / "config.json")
        if named not in LAYOUTS:
            raise unknown("model type", named, LAYOUTS) from error
        raise UserError(f"{folder / 'config.json'}: not a usable configuration ({first_line(error)})") from error
    where = str(folder / "config.json" if folder is not None else model)
    if config.model_type not in LAYOUTS:
        raise UserError(f"{where}: {unknown('model type', str(config.model_type), LAYOUTS)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{where}: the model is quantised; give one with floating-point weights")
    if getattr(config, "is_decoder", False):
        raise UserError(f"{where}: the model is a decoder (is_decoder); give an encoder")
    # A configuration may name another weights file; only the usual ones have been checked.
    if getattr(config, "transformers_weights", None) is not None:
        config.transformers_weights = None
    return config


def _model_type(config: Path) -> str:
    """`model_type` as the file has it; a `UserError` for a file that is not a configuration."""
    import json

    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{config}: no model_type in it (known: {', '.join(sorted(LAYOUTS))})")
    return str(content["model_type"])


def _load_weights(model: str, folder: Path | None, config: PretrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel

    where = str(folder or model)
    kind: Any = AutoModel
    if config.is_heterogeneous:
        if folder is None:
            raise UserError(f"model: {model!r} has layers of different widths; download it and give its folder")
        kind = _uneven_kind(config)
    try:
        # A pooler that is not in the file would draw random numbers; those of the caller stay untouched.
        with torch.random.fork_rng(devices=[]):
            base, report = kind.from_pretrained(
                where,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=folder is not None,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # as for the configuration
        if folder is None:
            raise _hub_error(model, error) from error
        raise UserError(f"{folder}: the weights cannot be loaded ({first_line(error)})") from error
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise UserError(
            f"{where}: {name} is {list(found)} in the weights, but {list(expected)} by config.json; "
            "the two do not belong together"
        )
    missing = {name for name in report["missing_keys"] if not name.endswith("position_ids")}
    pooler = {name for name in missing if name.startswith("pooler.")}
    if pooler and pooler == {name for name, _ in base.named_parameters() if name.startswith("pooler.")}:
        base.pooler = None
        missing -= pooler
    if missing:
        names = ", ".join(sorted(missing)[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise UserError(f"{where}: the weights lack {names}{more}; a model filled up at random is refused")
    for name, tensor in base.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: {name} holds NaN or infinite numbers; the checkpoint is damaged")
    return base


def _uneven_kind(config: PretrainedConfig) -> Any:
    """A stand-in for the class of `config` whose `from_pretrained` builds layers of different widths."""
    from transformers import MODEL_MAPPING

    kind: Any = MODEL_MAPPING[type(config)]

    class Uneven(kind):
        # What it returns is no instance of this class but of its own, the way that build_uneven makes it.
        def __new__(cls, config: PretrainedConfig) -> Any:
            return build_uneven(kind, config)

    return Uneven


def _load_tokenizer(model: str, folder: Path | None, base: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    where = str(folder or model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, config=base.config, local_files_only=folder is not None, trust_remote_code=False
        )
    except Exception as error:  # as for the configuration
        if folder is None:
            raise _hub_error(model, error) from error
        raise UserError(
            f"{folder}: no usable tokenizer ({first_line(error)}); copy the tokenizer's files there"
        ) from error
    rows = int(base.get_parameter("embeddings.word_embeddings.weight").shape[0])
    # transformers makes a tokenizer of special tokens alone out of a folder that has no vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{where}: the tokenizer has no vocabulary; copy the tokenizer's files there")
    if len(tokenizer) > rows:
        raise UserError(f"{where}: the tokenizer has {len(tokenizer)} tokens, but the model's table only {rows} rows")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{where}: the tokenizer has no padding token")
    return tokenizer


def _hub_error(model: str, error: Exception) -> UserError:
    return UserError(
        f"model: there is no folder {model!r}, and the Hugging Face hub gave no such model ({first_line(error)}); "
        "without the network, give the folder of a downloaded model"
    )


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keeps transformers' reports and, unless `progress`, its progress bars off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars and not progress:
            logging.enable_progress_bar()
