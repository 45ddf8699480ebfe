"""Loading a 90 %-sparse BERT-base from its sparse folder against the same weights from a dense checkpoint.

Every load is a process of its own that has imported what it needs; the candidates take turns. The dense one is
transformers' `from_pretrained` of a checkpoint with the zeros in it. Both map their file, so that a load by itself
reads little: the weights come in with the first sentence (8 tokens), which is why both are stated, to the end of the
load and to the first answer. Memory is resident, file pages included: its peak above what the process had before; how
much the kernel maps around a byte that is read depends on how it holds the file, so `private` has the part that is the
process's own and no page of a file.
The files are in the page cache. `verified` compares the SHA-256 of the weights as well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import sparsebert

SPARSITY = 0.9
FORMATS = ("unstructured", "blocks:16x16")
CANDIDATES = ("dense", "sparse", "verified")

# One load, told as JSON. `clear_refs` makes the kernel's own peak begin anew.
CHILD = """
import json, sys, time
import torch
from transformers import BertForSequenceClassification
import transformers.models.bert.modeling_bert
from sparsebert import AutoSparseModel

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

name, folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
# What any first product of torch brings in is no part of loading.
torch.nn.Linear(64, 64)(torch.zeros(8, 64))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before, private, start = memory("VmRSS"), memory("RssAnon"), time.perf_counter()
if name == "dense":
    model = BertForSequenceClassification.from_pretrained(folder)
else:
    model = AutoSparseModel.from_pretrained(folder, verify=name == "verified")
found = {"load ms": 1e3 * (time.perf_counter() - start), "load MB": memory("VmHWM") - before}
found["load private MB"] = memory("RssAnon") - private
with torch.inference_mode():
    logits = model(torch.arange(1000, 1008)[None]).logits
found |= {"answer ms": 1e3 * (time.perf_counter() - start), "answer MB": memory("VmHWM") - before}
found["answer private MB"] = memory("RssAnon") - private
print(json.dumps(found | {"logits": logits.tolist()}))
"""


def prune(model: torch.nn.Module, block: int) -> None:
    """Zeros at random in every linear of the encoder, in squares of `block`."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layer." in name:
            n, k = module.weight.shape
            kept = torch.rand(n // block, k // block) >= SPARSITY
            module.weight.data *= kept.repeat_interleave(block, 0).repeat_interleave(block, 1)


def load(name: str, folder: Path) -> dict[str, Any]:
    """What one load in a new process took."""
    command = [sys.executable, "-c", CHILD, name, str(folder), str(torch.get_num_threads())]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=quiet)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("format", FORMATS)
def test_load(bench: Any, full: bool, tmp_path: Path, format: str) -> None:
    if not full and format != FORMATS[0]:
        pytest.skip("one of the cells of --full")
    model = BertForSequenceClassification(BertConfig()).eval()
    prune(model, 16 if format.startswith("blocks") else 1)
    model.save_pretrained(tmp_path / "dense")
    sparsebert.save_sparse(sparsebert.sparsify(model, format=format, include="*.layer.*"), tmp_path / "sparse")
    folders = {name: tmp_path / ("dense" if name == "dense" else "sparse") for name in CANDIDATES}
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    for turn in range(bench.repeats + 1):
        for place in range(len(CANDIDATES)):
            name = CANDIDATES[(turn + place) % len(CANDIDATES)]
            took[name].append(load(name, folders[name]))
    # No speed is reported on a wrong result. The first round warmed the page cache.
    exact = torch.tensor(took["dense"][0]["logits"])
    for runs in took.values():
        torch.testing.assert_close(torch.tensor(runs.pop(0)["logits"]), exact, rtol=1e-3, atol=1e-3)
    for until in ("load", "answer"):
        row: dict[str, Any] = {"format": format, "until": until}
        for unit in ("ms", "MB", "private MB"):
            medians = {name: statistics.median(run[f"{until} {unit}"] for run in runs) for name, runs in took.items()}
            for name, runs in took.items():
                row[f"{name} {unit}"] = round(medians[name], 1)
                values = [run[f"{until} {unit}"] for run in runs]
                row[f"{name} {unit} range"] = [round(min(values), 1), round(max(values), 1)]
            for name in CANDIDATES[1:]:
                row[f"{name} / dense {unit}"] = round(medians[name] / medians["dense"], 2)
        bench.tables.setdefault("load", []).append(row)
