"""The ways to run a model that are measured: dense ones, and the subnetwork in every format that fits its masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsebert.errors import UserError, unknown
from sparsebert.formats import parse_format
from sparsebert.models.padding_free import padding_free
from sparsebert.nn import sparsify
from sparsebert.nn.choose import ROWS
from sparsebert.nn.structure import Structure, structure_of
from sparsebert.ops.dense_linear import prefers_onednn
from sparsebert.reports.subject import Readout
from sparsebert.training.hardware import has_native_bf16

__all__ = [
    "PRECISIONS",
    "Plan",
    "Variant",
    "build",
    "formats_that_fit",
    "has_onednn",
    "in_precision",
    "plan",
    "precisions_here",
    "weight_bytes",
]

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

AUTO = "auto"

# A layer is put in a format that leaves out at least this share of it; single weights need `sparsify`'s own share.
_LEAST_GONE = 0.1
_LEAST_SINGLE = 0.3
# A format fits a model where it takes the layers that hold this share of what is pruned.
_LEAST_COVER = 0.5


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    kind: str
    """"dense", "subnetwork" (padding-free, in a sparse format), or "against" (other software, dense)."""
    way: str
    """For dense ones `torch`, `oneDNN` or `padding-free`, the spelling of a format, or the other software's name."""
    precision: str
    """A key of `PRECISIONS`."""

    @property
    def name(self) -> str:
        """As tables show it: `blocks:8x2 bf16`."""
        return f"{self.way} {self.precision}"


def precisions_here(asked: Sequence[str] | None, device: torch.device) -> list[str]:
    """The precisions to measure: those asked for, else fp32 and, where the hardware multiplies it, bf16.

    Raises:
        UserError: an unknown word.
    """
    if asked is None:
        return ["fp32", "bf16"] if has_native_bf16(device) else ["fp32"]
    for word in asked:
        if word not in PRECISIONS:
            raise unknown("precision", word, PRECISIONS)
    return [name for name in PRECISIONS if name in asked]


@dataclass
class Plan:
    """What is to be measured."""

    variants: list[Variant] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why others are not measured, by name."""
    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    """The format of every sparse layer, by the subnetwork's variants; "auto" is missing until it is built."""


def plan(readout: Readout, formats: Sequence[str] | None, precisions: Sequence[str], device: torch.device) -> Plan:
    """The dense variants and those of the subnetwork.

    Args:
        readout: the masked model.
        formats: spellings that are asked for; None takes "auto" and all that fit.
        precisions: keys of `PRECISIONS`.
        device: where it will run.

    Raises:
        UserError: a spelling that is no sparse format's.
    """
    for spelling in formats or ():
        if spelling != AUTO and parse_format(spelling)[0].name == "dense":
            raise UserError("formats: dense ones are measured always; leave 'dense' out")
    found = Plan()
    for precision in precisions:
        ways = ["torch", *(["oneDNN"] if precision == "fp32" and has_onednn(device) else []), "padding-free"]
        found.variants += [Variant("dense", way, precision) for way in ways]
    for precision in precisions:
        fit, why_not = formats_that_fit(readout, PRECISIONS[precision], formats or ())
        if not fit and not why_not:
            continue
        for spelling in formats if formats is not None else [*fit, AUTO]:
            variant = Variant("subnetwork", spelling, precision)
            if spelling not in fit and spelling != AUTO:
                found.left_out[variant.name] = why_not.get(spelling, "it does not fit the masks")
                continue
            found.variants.append(variant)
            if spelling != AUTO:
                found.layers[variant.name] = dict.fromkeys(fit[spelling], spelling)
    return found


def formats_that_fit(
    readout: Readout, dtype: torch.dtype, asked: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """By spelling, the linears to put in each format that fits the model's masks, and why others do not fit.

    Both are empty for a model without zeros. A format fits where it takes the layers that hold half of the zeros.

    Args:
        readout: the masked model.
        dtype: that the weights are to have; it decides which sizes of blocks there are kernels for.
        asked: formats to look at besides those that have kernels.
    """
    zeros, reasons = 0, dict[str, str]()
    taken, names = dict[str, int](), dict[str, list[str]]()
    for name, module in readout.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        structure = structure_of(module.weight)
        gone = structure.size - structure.kept
        zeros += gone
        stored, why = _stored(structure, dtype, asked)
        reasons.update(why)
        for spelling in stored:
            names.setdefault(spelling, []).append(name)
            taken[spelling] = taken.get(spelling, 0) + gone
    fit = {spelling: names[spelling] for spelling in names if taken[spelling] >= _LEAST_COVER * zeros > 0}
    why_not = {spelling: reason for spelling, reason in reasons.items() if spelling not in fit}
    return fit, why_not if zeros else {}


def _stored(structure: Structure, dtype: torch.dtype, asked: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Candidates that leave out enough of a layer to be worth it, and why others are none."""
    if structure.kept == structure.size or not structure.kept:
        return {}, {}
    candidates, left_out = structure.candidates(dtype, trainable=False)
    for spelling in asked:
        block = parse_format(spelling)[1].get("block") if spelling != AUTO else None
        if block is not None and spelling not in {**candidates, **left_out}:
            count = structure.in_blocks(block)
            candidates |= {} if count is None else {spelling: count}
    found = {}
    for spelling, stored in candidates.items():
        least = _LEAST_SINGLE if spelling in ("unstructured", "bitmap") else _LEAST_GONE
        if stored <= (1 - least) * structure.size:
            found[spelling] = stored
        else:
            left_out[spelling] = f"it would store {stored / structure.size:.0%} of the weights"
    return found, left_out


def build(
    variant: Variant, master: Readout, layers: Mapping[str, str] | None = None, rows: Sequence[int] = ROWS
) -> tuple[Readout, dict[str, str]]:
    """A twin of `master` that runs as the variant says.

    Args:
        variant: of kind "dense" or "subnetwork".
        master: the masked model in the variant's precision (`in_precision`), on its device. Shared, unchanged.
        layers: the format of every sparse layer of a subnetwork; None measures which ("auto").
        rows: numbers of real tokens that matter to "auto".

    Returns:
        The model, and the formats by layer.
    """
    twin, device = master.twin(), next(master.parameters()).device
    fp32, sparse = variant.precision == "fp32", variant.kind == "subnetwork"
    if variant.kind == "dense" and variant.way == "torch":
        # torch's fused attention multiplies bf16 on a CPU without the processor's bf16 instructions.
        twin.base.set_attn_implementation("sdpa" if fp32 or device.type == "cuda" else "eager")
        return twin, {}
    twin.base.set_attn_implementation("sdpa")
    chosen = dict(layers or {})
    if sparse and layers is None:
        records = sparsify(twin, rows=tuple(rows)).sparsification
        chosen = {record.name: record.format for record in records if record.action == "replaced"}  # type: ignore[union-attr]
    else:
        for spelling in sorted(set(chosen.values())):
            named = [name for name, word in chosen.items() if word == spelling]
            sparsify(twin, format=spelling, include=named, min_sparsity=0)
    if fp32 and has_onednn(device):
        # What stays dense in fp32 runs faster by oneDNN here.
        sparsify(twin, format="dense", min_sparsity=0)
    if sparse or variant.way == "padding-free":
        padding_free(twin)
    return twin, chosen


def weight_bytes(readout: Readout) -> dict[str, int]:
    """Bytes of all parameters and buffers (`total`), and of the encoder's linears (`linears`), as they are stored."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*readout.parameters(), *readout.buffers())}
    linears = [
        tensor
        for module in readout.base.modules()
        if hasattr(module, "in_features") and not list(module.children())
        for tensor in (*module.parameters(), *module.buffers())
    ]
    return {
        "total": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "linears": sum(tensor.numel() * tensor.element_size() for tensor in linears),
    }


def in_precision(readout: Readout, precision: str) -> Readout:
    """A copy with the base in a precision and the head in fp32; in fp32 a twin, which shares its tensors."""
    if precision == "fp32":
        return readout.twin()
    copied = copy.deepcopy(readout)
    copied.base.to(dtype=PRECISIONS[precision])  # type: ignore[call-arg]
    return copied


def has_onednn(device: torch.device) -> bool:
    """Whether dense layers in fp32 have another path than torch's own there."""
    return device.type == "cpu" and prefers_onednn()
