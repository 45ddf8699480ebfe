"""Part `model`: whole BERTs, latency and throughput, full and ragged batches, against transformers (G26 to G29).

All candidates of a row have the same weights, zeros in place where another stores none, and the same tokens. A sparse
model's row says which of its ops have no kernel for the GPU and run by their definitions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.bench import OURS, Bench, Cell, Check, Skip
from benchmarks.gpu.clock import Capture
from benchmarks.gpu.inputs import mask_of
from benchmarks.gpu.rows import Target

__all__ = ["bert", "cells", "tokens"]

BF16 = torch.bfloat16
SHAPES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
        "vocab_size": 100, "max_position_embeddings": 32,
    },
}  # fmt: skip
# What a padding-free model is made of beside its linears.
PARTS = ("varlen_attention", "add_layer_norm", "dense_linear")
DENSE = "padding-free dense"
HF = ("HF", "HF compiled", "HF compiled, reduce-overhead")


def cells(bench: Bench) -> list[Cell]:
    """BERT-base at 16k tokens first, then a single sentence, structure, other patterns, BERT-large and the runs."""
    tiny: dict[str, Any] = {"shape": "tiny", "batch": 2, "length": 8, "format": "blocks:16x16", "block": "16x16"}

    def whole(shape: str, batch: int, length: int, ragged: bool, *targets: Target, **more: Any) -> Cell:
        settings: dict[str, Any] = {
            "shape": shape, "batch": batch, "length": length, "ragged": ragged, "format": "blocks:64x64",
            "block": "64x64", "sparsity": 0.75, "part": "intermediate", "targets": targets,
        }  # fmt: skip
        return Cell("whole model", _whole, {**settings, **more}, tiny, (), 300.0)

    def latency(shape: str, length: int) -> Cell:
        small = {"shape": "tiny", "length": 8}
        return Cell("one sentence", _latency, {"shape": shape, "length": length}, small, (), 300.0)

    def structured(sparsity: float, least: float) -> Cell:
        small = {"shape": "tiny", "batch": 2, "length": 8, "heads": 1, "neurons": 64}
        # CoFi's shapes, about: both halves of a layer shrink alike.
        heads, neurons = {0.6: (5, 1216), 0.95: (1, 128)}[sparsity]
        settings = {"shape": "bert-base", "batch": 128, "length": 128, "heads": heads, "neurons": neurons}
        targets = (Target("G28", "faster", least, (DENSE,)),)
        return Cell("structure removed", _structured, {**settings, "targets": targets}, small, (), 300.0)

    full = Target("G26", "faster", 1.10, HF, ours=DENSE)
    short = Target("G26", "faster", 1.6, HF, ours=DENSE)
    sparse = Target("G27", "faster", 1.5, HF)
    found = [
        whole("bert-base", 128, 128, False, full, sparse),
        whole("bert-base", 128, 128, True, short),
        latency("bert-base", 128),
        structured(0.6, 2.1),
        structured(0.95, 9.0),
        *(Cell("a run", _run, {"folder": folder, "batch": 64, "length": 128}, {"batch": 2, "length": 8}, (), 200.0)
          for folder in bench.options.get("runs", ())),
        whole("bert-base", 32, 512, False, full, sparse),
        whole("bert-large", 128, 128, False),
        whole("bert-base", 128, 128, False, format="semi_structured:2:4", block="2:4", sparsity=0.5, part="."),
        whole("bert-base", 1, 128, False, format="bitmap", block="unstructured", sparsity=0.8, part="."),
        whole("bert-base", 32, 512, True, short),
        latency("bert-large", 128),
        whole("bert-large", 32, 512, True),
        whole("bert-base", 8, 128, False),
    ]  # fmt: skip
    return found


def bert(bench: Bench, shape: str, attention: str = "sdpa") -> nn.Module:
    """A random BERT in eval mode on the device; the same weights at every call."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(**SHAPES[shape], attn_implementation=attention)
        model = BertModel(config, add_pooling_layer=False)
    return model.to(bench.device).to(BF16).eval().requires_grad_(False)


def tokens(bench: Bench, shape: str, batch: int, length: int, ragged: bool) -> dict[str, Tensor]:
    """Random tokens; ragged ones, 0.6 of the length on average, with a mask."""
    words = SHAPES[shape].get("vocab_size", 30000)
    inputs = {"input_ids": torch.randint(1, words, (batch, length), device=bench.device)}
    if ragged:
        lengths = torch.linspace(0.2, 1.0, batch, device=bench.device).mul(length).round().clamp(min=1)
        inputs["attention_mask"] = (torch.arange(length, device=bench.device) < lengths[:, None]).long()
    return inputs


def prune(model: nn.Module, pattern: str, sparsity: float, part: str) -> None:
    """Zeroes random places of every encoder linear whose name has `part` in it; the feed-forward's are both sides of
    `intermediate`."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not name.startswith("encoder"):
            continue
        feed_forward = "attention" not in name
        if part == "." or (part == "intermediate" and feed_forward):
            weight = module.weight
            weight.data.mul_(mask_of(pattern, tuple(weight.shape), sparsity, weight.device))  # type: ignore[arg-type]


def _states(model: Any, inputs: Mapping[str, Tensor]) -> Callable[[Any], Tensor]:
    def call(_: Any) -> Tensor:
        with torch.inference_mode():
            return model(**inputs).last_hidden_state

    return call


def _at_tokens(call: Callable[[Any], Tensor], inputs: Mapping[str, Tensor]) -> Callable[[Any], Tensor]:
    """The states at real tokens: what stands at padding is anyone's."""
    mask = inputs.get("attention_mask")

    def picked(s: Any) -> Tensor:
        states = call(s)
        return states if mask is None else states[mask.bool()]

    return picked


def _compiled(bench: Bench, model: nn.Module, mode: str | None = None) -> nn.Module:
    return bench.compiled(model, mode)  # type: ignore[return-value, arg-type]


def _check(model: nn.Module, inputs: Mapping[str, Tensor], ours: Callable[[Any], Tensor]) -> Check:
    """Against the same weights in float32; the ordinary bfloat16 model says how near that can be."""

    def exact(_: Any) -> Tensor:
        wide = copy.deepcopy(model).float()
        return _at_tokens(_states(wide, inputs), inputs)(None)

    return Check(exact, _at_tokens(_states(model, inputs), inputs), 2.0, 1e-4, _at_tokens(ours, inputs))


def _graph(bench: Bench, call: Callable[[Any], Tensor]) -> Callable[[Any], Any]:
    """The call as a CUDA graph's replay."""
    replay = bench.clock.capture(lambda: call(None))
    return lambda _: replay()


def _whole(
    bench: Bench,
    shape: str,
    batch: int,
    length: int,
    ragged: bool,
    format: str,
    block: str,
    sparsity: float,
    part: str,
    targets: tuple[Target, ...] = (),
) -> None:
    """transformers with SDPA, compiled too; padding-free dense; padding-free with its pruned linears stored sparse."""
    import sparsebert
    from sparsebert.formats import parse_format
    from sparsebert.models.padding_free import padding_free

    try:
        parse_format(format)
    except ValueError as error:
        raise Skip(f"format {format}: {error}") from error
    model = bert(bench, shape)
    prune(model, block, sparsity, part)
    inputs = tokens(bench, shape, batch, length, ragged)
    real = int(inputs.get("attention_mask", inputs["input_ids"].new_ones(batch, length)).sum())
    sparse = padding_free(sparsebert.sparsify(copy.deepcopy(model), format=format))
    ours = _states(sparse, inputs)
    calls: dict[str, Any] = {
        OURS: ours,
        DENSE: _states(padding_free(copy.deepcopy(model)), inputs),
        "HF": _states(model, inputs),
        "HF compiled": _states(_compiled(bench, model), inputs),
    }
    if not ragged:
        # Without a mask nothing waits for the GPU.
        calls |= _graphs(bench, {f"{OURS}, graph": ours, f"{DENSE}, graph": calls[DENSE]})
    op = {"blocks": "block_sparse_linear", "semi_structured": "semi_structured_linear", "bitmap": "bitmap_linear"}
    case = {"model": shape, "B": batch, "S": length, "tokens": real, "format": f"{format}, {sparsity:.0%}",
            "where": "feed-forward" if part == "intermediate" else "all linears", "dtype": "bf16"}  # fmt: skip
    row = bench.compare(
        case, [None], calls, state="as run", how="host", check=_check(model, inputs, ours), targets=targets,
        notes=bench.unserved((*PARTS, op.get(format.partition(":")[0], "unstructured_linear"))),
    )  # fmt: skip
    if row is not None:
        rates = {f"{name}, sequences/s": batch / (time["median"] * 1e-3) for name, time in row["times"].items()}
        bench.facts(case, rates)


def _graphs(bench: Bench, calls: Mapping[str, Callable[[Any], Tensor]]) -> dict[str, Any]:
    """Those of the calls that a CUDA graph takes, as replays."""
    found = {}
    for name, call in calls.items():
        try:
            bench.clock.warm(call, [None])
            found[name] = _graph(bench, call)
        except Capture as why:
            bench.row("skipped", {"": name}, why=str(why))
    return found


def _latency(bench: Bench, shape: str, length: int) -> None:
    """B = 1: transformers as it comes, compiled with CUDA graphs, and ours in one (G29)."""
    from sparsebert.models.padding_free import padding_free

    model, inputs = bert(bench, shape), tokens(bench, shape, 1, length, False)
    ours = _states(padding_free(copy.deepcopy(model)), inputs)
    graphs = _graphs(bench, {OURS: ours})
    calls: dict[str, Any] = {
        OURS: graphs.get(OURS, ours),
        f"{OURS}, without a graph": ours,
        "HF eager": _states(bert(bench, shape, "eager"), inputs),
        "HF": _states(model, inputs),
        "HF compiled": _states(_compiled(bench, model), inputs),
        "HF compiled, reduce-overhead": _states(_compiled(bench, copy.deepcopy(model), "reduce-overhead"), inputs),
    }
    targets = [Target("G29", "faster", 12.0, ("HF eager",)), Target("G29", "faster", 1.3, HF[1:])]
    bench.compare(
        {"model": shape, "B": 1, "S": length, "dtype": "bf16", "": "dense"}, [None], calls, state="as run", how="host",
        check=_check(model, inputs, ours), targets=targets, notes=bench.unserved(PARTS),
    )  # fmt: skip


def _structured(
    bench: Bench,
    shape: str,
    batch: int,
    length: int,
    heads: int,
    neurons: int,
    targets: tuple[Target, ...] = (),
) -> None:
    """So many heads and neurons of each layer left, the others removed, against the whole model run alike."""
    import sparsebert
    from sparsebert.models.padding_free import padding_free

    model, inputs = bert(bench, shape), tokens(bench, shape, batch, length, False)
    cut: Any = copy.deepcopy(model)
    size = cut.config.hidden_size // cut.config.num_attention_heads
    for layer in cut.encoder.layer:
        layer.attention.self.value.weight.data[heads * size :] = 0
        layer.attention.output.dense.weight.data[:, heads * size :] = 0
        layer.intermediate.dense.weight.data[neurons:] = 0
        layer.output.dense.weight.data[:, neurons:] = 0
    zeroed = copy.deepcopy(cut)
    cut = sparsebert.remove_structure(cut)
    ours = _states(padding_free(cut), inputs)
    calls: dict[str, Any] = {
        OURS: ours, DENSE: _states(padding_free(copy.deepcopy(model)), inputs), "HF": _states(model, inputs),
        "HF compiled": _states(_compiled(bench, model), inputs),
    }  # fmt: skip
    count = sum(parameter.numel() for parameter in cut.encoder.parameters())
    whole = sum(parameter.numel() for parameter in model.encoder.parameters())  # type: ignore[union-attr]
    bench.compare(
        {"model": shape, "B": batch, "S": length, "heads": heads, "neurons": neurons, "dtype": "bf16",
         "encoder's weights gone": round(1 - count / whole, 3)},
        [None], calls, state="as run", how="host", check=_check(zeroed, inputs, ours), targets=targets,
        notes=bench.unserved(PARTS),
    )  # fmt: skip


def _run(bench: Bench, folder: str, batch: int, length: int) -> None:
    """A subnetwork that a method found, stored as `auto` chooses, against its dense model: full and ragged."""
    import sparsebert
    from sparsebert.models.padding_free import padding_free
    from sparsebert.models.storage import load_model

    root = Path(folder)
    root = root / "model" if (root / "model").is_dir() else root
    dense = load_model(root)[0].base.to(bench.device).to(BF16).eval().requires_grad_(False)
    # Sparsified here: what `AutoSparseModel` would choose on loading is measured on the CPU.
    sparse = padding_free(sparsebert.sparsify(copy.deepcopy(dense)))
    words = int(dense.config.vocab_size)
    for ragged in (False, True):
        inputs = tokens(bench, "bert-base", batch, length, ragged)
        inputs["input_ids"] = inputs["input_ids"] % (words - 1) + 1
        ours = _states(sparse, inputs)
        calls = {
            OURS: ours,
            DENSE: _states(padding_free(copy.deepcopy(dense)), inputs),
            "HF": _states(dense, inputs),
            "HF compiled": _states(_compiled(bench, dense), inputs),
        }
        case = {"run": Path(folder).name, "B": batch, "S": length, "ragged": ragged, "dtype": "bf16"}
        notes = [str(sparse.sparsification).splitlines()[0]]
        bench.compare(case, [None], calls, state="as run", how="host", check=_check(dense, inputs, ours),
                      notes=[*notes, *bench.unserved(PARTS)])  # fmt: skip
