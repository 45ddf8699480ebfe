"""SparseLinear under torch.compile in one piece, and on two ranks of DistributedDataParallel."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nn.sparse_layers import FORMATS, close, pair
from torch import nn

from sparsebert.nn import SparseLinear


@pytest.fixture(autouse=True)
def fresh_tracer() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("spelling", FORMATS)
def test_compiled_it_is_one_graph_with_eager_gradients(spelling: str, rows: int) -> None:
    layer = pair(spelling, trainable=True, activation="gelu")[0]
    eager = copy.deepcopy(layer)
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="aot_eager")
    x, twin = (torch.randn(rows, 16, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    out, expected = compiled(x), eager(twin)
    close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    close(x.grad, twin.grad)
    close(layer.values.grad, eager.values.grad)
    close(layer.bias.grad, eager.bias.grad)
    with torch.inference_mode():
        close(compiled(x.detach()), expected)


# A process of its own: inductor imports setuptools, which refuses where something has imported distutils before it.
INDUCTOR = """
import copy, torch
from sparsebert.nn import SparseLinear

torch.manual_seed(0)
linear = torch.nn.Linear(16, 24)
mask = torch.ones(24, 16, dtype=torch.bool)
mask[::3], mask[:, ::4] = False, False
layer = SparseLinear.from_linear(linear, mask, format="compact", activation="gelu", trainable=True)
eager, compiled, x = copy.deepcopy(layer), torch.compile(layer, fullgraph=True), torch.randn(2, 20, 16)
torch.testing.assert_close(compiled(x), eager(x))
compiled(x).square().sum().backward()
eager(x).square().sum().backward()
torch.testing.assert_close(layer.values.grad, eager.values.grad)
torch.testing.assert_close(layer.bias.grad, eager.bias.grad)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_what_eager_does() -> None:
    # The format made of most ops of torch; a result once came out wrong that every other backend had right.
    done = subprocess.run([sys.executable, "-c", INDUCTOR], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_frozen_it_passes_the_gradient_of_x_through_when_compiled() -> None:
    layer = pair("unstructured")[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16, requires_grad=True)
    compiled(x).sum().backward()
    close(x.grad, layer.weight.sum(0).expand(3, 16))


def test_layers_that_are_compiled_one_by_one_share_a_trace() -> None:
    # More of them than torch compiles one function for.
    layers = [pair("unstructured", 16, 16, trainable=True)[0] for _ in range(10)]
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for layer in layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        model = nn.Sequential(*layers)
        for _ in range(2):
            x = torch.randn(3, 16, requires_grad=True)
            model(x).sum().backward()
    assert all(layer.values.grad is not None for layer in layers)


def test_it_is_prepared_by_the_first_call_that_needs_it() -> None:
    layer = pair("unstructured", trainable=True)[0]
    layer(torch.randn(3, 16)).sum().backward()
    assert layer._transposed is None and layer.values.grad is not None
    with torch.no_grad():
        layer(torch.randn(3, 16, requires_grad=True))
    assert layer._transposed is None
    layer(torch.randn(3, 16, requires_grad=True)).sum().backward()
    prepared = layer._transposed
    assert prepared is not None and len(prepared) == 5
    assert layer.prepare()._transposed is prepared and not any("transposed" in key for key in layer.state_dict())
    other = pair("unstructured")[0]
    with torch.inference_mode():
        other.prepare()
    other_x = torch.randn(3, 16, requires_grad=True)
    other(other_x).sum().backward()


def test_two_ranks_of_ddp_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    script = Path(__file__).with_name("sparse_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    notes = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert notes[0]["weight"] == notes[1]["weight"]
    from nn.sparse_ranks import build, train

    model = build()
    train(model, model, torch.arange(8))
    layer = model[0]
    assert isinstance(layer, SparseLinear)
    torch.testing.assert_close(torch.tensor(notes[0]["weight"]), layer.weight.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight != 0, torch.tensor(notes[0]["weight"]) != 0)
