"""Other software that runs the same model, dense: OpenVINO, ONNX Runtime and torch.compile."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sparsebert._openvino import compile_for_cpu
from sparsebert.errors import UserError, unknown
from sparsebert.reports.subject import Readout
from sparsebert.reports.variants import Variant

__all__ = ["AGAINST", "plan_against", "prepare"]

AGAINST: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "openvino": (("openvino",), ("fp32", "bf16")),
    "onnxruntime": (("onnxruntime", "onnx", "onnxscript"), ("fp32",)),
    "compile": ((), ("fp32", "bf16")),
}
"""By name: the packages that it needs, and the precisions that it is measured in."""

_DEFAULT = ("openvino", "onnxruntime")


def plan_against(
    asked: Sequence[str] | None, precisions: Sequence[str], device: torch.device
) -> tuple[list[Variant], dict[str, str]]:
    """The variants of other software, and why others are left out, by name.

    Args:
        asked: names; None takes what is installed of OpenVINO and ONNX Runtime (`compile` takes minutes).
        precisions: keys of `PRECISIONS`.
        device: OpenVINO and ONNX Runtime are measured on the CPU alone.

    Raises:
        UserError: an unknown name, or one that is asked for and not installed.
    """
    variants, left_out = [], {}
    for name in _DEFAULT if asked is None else dict.fromkeys(asked):
        if name not in AGAINST:
            raise unknown("software to measure against", name, AGAINST)
        packages, known = AGAINST[name]
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing and asked is not None:
            raise UserError(f"against {name}: not installed; pip install {' '.join(missing)}")
        if missing:
            left_out[name] = f"not installed (pip install {' '.join(missing)})"
        elif name != "compile" and device.type != "cpu":
            left_out[name] = "measured on the CPU alone"
        else:
            variants += [Variant("against", name, precision) for precision in precisions if precision in known]
    return variants, left_out


def prepare(variant: Variant, master: Readout, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The call that runs `master` on `inputs` by a variant's software.

    Args:
        variant: of kind "against".
        master: the masked model: in fp32, but for `compile`, which takes the variant's precision.
        inputs: as `Case.inputs` makes them; shapes are fixed to theirs.
    """
    twin = master.twin()
    if variant.way == "compile":
        eager = variant.precision == "bf16" and inputs["input_ids"].device.type == "cpu"
        twin.base.set_attn_implementation("eager" if eager else "sdpa")
        compiled = torch.compile(twin, dynamic=False)
        return lambda: compiled(**inputs)
    twin.base.set_attn_implementation("eager")
    # Tracers take no parameters that want gradients, nor inference tensors.
    with torch.inference_mode(False), torch.no_grad(), _quiet():
        example = {name: tensor.clone() for name, tensor in inputs.items()}
        maker = _openvino if variant.way == "openvino" else _onnxruntime
        return maker(twin, example, variant.precision)


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracers warn of shapes that they hold fixed, which is what is wanted, and of packages that nobody needs."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _openvino(model: Readout, inputs: dict[str, Tensor], precision: str) -> Callable[[], Tensor]:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = compile_for_cpu(openvino.convert_model(model, example_input=inputs), hints)
    request, arrays = compiled.create_infer_request(), {name: tensor.numpy() for name, tensor in inputs.items()}
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def _onnxruntime(model: Readout, inputs: dict[str, Tensor], precision: str) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        # A file, since large weights go into another beside it.
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (), path, kwargs=inputs, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    arrays = dict(zip(names, (tensor.numpy() for tensor in inputs.values()), strict=True))
    return lambda: torch.from_numpy(session.run(None, arrays)[0])
