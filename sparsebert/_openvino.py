"""The one place where models are compiled with OpenVINO."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

__all__ = ["compile_for_cpu"]


def compile_for_cpu(model: Any, settings: Mapping[str, Any]) -> Any:
    """A model, or the path of a saved one, compiled for the CPU with OpenVINO's own `settings`."""
    return _core().compile_model(model, "CPU", dict(settings))


@functools.cache
def _core() -> Any:
    # One for the process, which is never freed. OpenVINO's CPU plugin gives the thread an alternate signal stack and
    # takes it back when it is freed: in another thread, or out of turn among several, it leaves one that is no longer
    # mapped, and the next signal (Ctrl-C) ends the process with a segmentation fault.
    import openvino

    return openvino.Core()
