from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

SCRIPT = """
import gc, signal, threading
import numpy as np
from openvino import Model, opset13

from sparsebert._openvino import compile_for_cpu

def compiled():
    entry = opset13.parameter([2, 3], dtype=np.float32)
    return compile_for_cpu(Model([opset13.relu(entry)], [entry]), {})

held = [compiled(), compiled()]
assert (held[0](-np.ones((2, 3), np.float32))[0] == 0).all()
free = threading.Thread(target=lambda: (held.clear(), gc.collect()))
free.start()
free.join()
got = []
signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
signal.raise_signal(signal.SIGTERM)
assert got == [signal.SIGTERM]
"""


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_signals_are_still_handled_after_a_compiled_model_was_freed_in_another_thread() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
