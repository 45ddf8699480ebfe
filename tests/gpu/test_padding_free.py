"""A padding-free model by the Triton kernels: the same numbers, and no waiting for the GPU within its layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparsebert.models.padding_free import padding_free
from sparsebert.ops._backend import OPS

KINDS = pytest.mark.parametrize("kind", tiny.KINDS)
WAITS = {"aten::_local_scalar_dense", "aten::nonzero"}


class Waits(TorchDispatchMode):
    """Lists the ops whose result's value or shape a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def ragged(device: torch.device) -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 4:] = mask[1, :3] = 0
    ids = torch.randint(5, 24, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_ordinary_model_at_real_tokens(triton_backend: torch.device, kind: str, dtype: torch.dtype) -> None:
    for op in ("varlen_attention", "add_layer_norm"):
        assert OPS[op].pick(triton_backend).namespace == "sparsebert_triton"
    model, inputs = tiny.base(kind).to(triton_backend), ragged(triton_backend)
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        exact = model.double()(**inputs).last_hidden_state[real]
        usual = model.to(dtype)(**inputs).last_hidden_state[real]
        ours = padding_free(model)(**inputs).last_hidden_state
    assert ours.dtype == dtype and not ours[~real].any()
    error, own = ((x.double() - exact).norm() / exact.norm() for x in (ours[real], usual))
    assert error <= 1.5 * own + 1e-6


@KINDS
def test_a_forward_waits_once_for_the_number_of_tokens(triton_backend: torch.device, kind: str) -> None:
    model, inputs = padding_free(tiny.base(kind).to(triton_backend)), ragged(triton_backend)
    with torch.inference_mode():
        with Waits() as padded:
            model(**inputs)
        with Waits() as whole:
            model(input_ids=inputs["input_ids"])
    assert padded.found == ["aten::nonzero"] and whole.found == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@KINDS
def test_nothing_else_waits_for_the_gpu(triton_backend: torch.device, kind: str) -> None:
    model, inputs = padding_free(tiny.base(kind).to(triton_backend)), ragged(triton_backend)
    with torch.inference_mode():
        model(**inputs)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(**inputs)
            torch.cuda.set_sync_debug_mode("error")
            model(input_ids=inputs["input_ids"])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1
