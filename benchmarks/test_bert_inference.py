"""A whole BERT-base on this processor: the ordinary model against the padding-free one, and OpenVINO where it is there.

Random weights in BERT-base's shapes, random tokens, S = 128. `full` has no padding; in `ragged` the lengths go from a
fifth of S to all of it, 0.6 on average, and every candidate but the padding-free ones computes the padding too.
Weights are as warm as the caches keep them from one call to the next. Without `--full` one sentence is all.

`where_the_time_goes` times the parts of the padding-free model apart, each as often as one forward runs it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import sparsebert
from sparsebert._openvino import compile_for_cpu
from sparsebert.models.padding_free import padding_free
from sparsebert.ops import add_layer_norm, varlen_attention

LENGTH, SPARSITY, BLOCK = 128, 0.8, (8, 2)
CASES = {"full, B=1": (1, False), "full, B=8": (8, False), "ragged, B=8": (8, True)}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Run = Callable[[], Tensor]


def prune(model: nn.Module) -> None:
    """Sets the weakest blocks of every encoder linear to 0, the same share of each."""
    rows, columns = BLOCK
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("encoder"):
            n, k = module.weight.shape
            blocks = module.weight.data.view(n // rows, rows, k // columns, columns)
            scores = blocks.square().sum((1, 3))
            bound = torch.kthvalue(scores.flatten(), int(SPARSITY * scores.numel())).values
            blocks *= (scores > bound)[:, None, :, None]


def batch(size: int, ragged: bool) -> dict[str, Tensor]:
    """Random tokens; ragged ones with a mask."""
    inputs = {"input_ids": torch.randint(1000, 30000, (size, LENGTH))}
    if ragged:
        lengths = torch.linspace(0.2, 1.0, size).mul(LENGTH).round().long()
        inputs["attention_mask"] = (torch.arange(LENGTH) < lengths[:, None]).long()
    return inputs


def built(attention: str, dtype: torch.dtype, weights: dict[str, Tensor]) -> BertModel:
    """A model on copies of `weights`, the pruned zeros stored as numbers."""
    model = BertModel(BertConfig(attn_implementation=attention)).to(dtype).eval()
    model.load_state_dict(weights)
    return model


def sparse(weights: dict[str, Tensor]) -> nn.Module:
    """The padding-free model with its encoder's linears in a sparse format, in bf16."""
    model = built("sdpa", torch.float32, weights)
    spelling = f"blocks:{BLOCK[0]}x{BLOCK[1]}"
    return padding_free(sparsebert.sparsify(model, format=spelling, dtype=torch.bfloat16))


def openvino(weights: dict[str, Tensor], inputs: dict[str, Tensor], precision: str) -> Run | None:
    """OpenVINO's compiled model at a precision hint, on the same inputs; None where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino as ov

    model = built("eager", torch.float32, weights)
    model.config.return_dict = False
    example = {name: tensor.clone() for name, tensor in inputs.items()}
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = compile_for_cpu(ov.convert_model(model, example_input=example), hints)
    request, arrays = compiled.create_infer_request(), {name: tensor.numpy() for name, tensor in inputs.items()}

    def run() -> Tensor:
        return torch.from_numpy(request.infer(arrays)[0])

    return run


def candidates(weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Run]:
    """Every way to run the model here, by name."""

    def runs(model: nn.Module) -> Run:
        return lambda: model(**inputs).last_hidden_state

    found: dict[str, Run] = {}
    for dtype, name in NAMES.items():
        for attention in ("eager", "sdpa"):
            found[f"{attention} {name}"] = runs(built(attention, dtype, weights))
        found[f"padding-free {name}"] = runs(padding_free(built("sdpa", dtype, weights)))
    found["sparse bf16"] = runs(sparse(weights))
    for precision, name in (("f32", "fp32"), ("bf16", "bf16")):
        compiled = openvino(weights, inputs, precision)
        if compiled is not None:
            found[f"openvino {name}"] = compiled
    return found


def check(found: dict[str, Run], inputs: dict[str, Tensor]) -> None:
    """No speed is reported on a wrong result: every candidate is near the ordinary fp32 model at real tokens."""
    exact = found["eager fp32"]()
    real = inputs.get("attention_mask", torch.ones(exact.shape[:2])).bool()
    for name, run in found.items():
        error = (run().float() - exact)[real].abs().mean() / exact[real].abs().mean()
        assert error < (1e-4 if name.endswith("fp32") else 3e-2), f"{name}: mean error {error}"


@pytest.mark.parametrize("case", CASES)
def test_bert_inference(bench: Any, full: bool, case: str) -> None:
    if not full and CASES[case] != (1, False):
        pytest.skip("one of the cells of --full")
    model = BertModel(BertConfig())
    prune(model)
    inputs = batch(*CASES[case])
    with torch.inference_mode():
        found = candidates(model.state_dict(), inputs)
        check(found, inputs)
        timings = bench.interleave(found)
    bench.row("bert_inference", {"batch": case, "S": LENGTH}, timings, "sparse bf16")


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("case", CASES)
def test_where_the_time_goes(bench: Any, full: bool, case: str, dtype: torch.dtype) -> None:
    if not full:
        pytest.skip("one of the cells of --full")
    inputs = batch(*CASES[case])
    model = padding_free(BertModel(BertConfig()).to(dtype).eval())
    layer, layers = model.encoder.layer[0], len(model.encoder.layer)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0))
    tokens = int(cu_seqlens[-1])
    x, wide = torch.randn(tokens, 768, dtype=dtype), torch.randn(tokens, 3072, dtype=dtype)
    heads, norm = x.view(tokens, 12, 64), layer.output.LayerNorm
    narrow = (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)

    def linears() -> None:
        for linear in (*narrow, layer.attention.output.dense, layer.intermediate.dense):
            linear(x)
        layer.output.dense(wide)

    parts: dict[str, Callable[[], Any]] = {
        "linears": linears,
        "attention": lambda: varlen_attention(heads, heads, heads, cu_seqlens),
        "add_layer_norm": lambda: [add_layer_norm(x, x, norm.weight, norm.bias) for _ in range(2)],
        "gelu": lambda: F.gelu(wide),
    }

    def times(part: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [part() for _ in range(layers)]

    with torch.inference_mode():
        timings = bench.interleave(
            {
                "whole": lambda: model(**inputs),
                **{name: times(part) for name, part in parts.items()},
                "embeddings": lambda: model.embeddings(input_ids=inputs["input_ids"]),
            }
        )
    bench.row("where_the_time_goes", {"batch": case, "dtype": NAMES[dtype], "tokens": tokens}, timings, "whole")
