"""Tasks, their data and their metrics.

`load_task` reads a task's splits from a folder, a file, the hub or the demo's package and checks them; `encode` and
`Collator` turn a split into batches; `compute_metrics` and `span_metrics` score a model's outputs. A `Variant` changes
a task's training rows. `load_text`, `pack_text` and `MaskedText` turn plain text into masked-language-model examples.
"""

from __future__ import annotations

from sparsebert.data.demo import demo_model_path
from sparsebert.data.encode import Collator, Encoded, encode
from sparsebert.data.labels import label_ids
from sparsebert.data.load import TaskData, load_task
from sparsebert.data.metrics import compute_metrics
from sparsebert.data.span_metrics import span_metrics, span_predictions
from sparsebert.data.split import hold_out, sample
from sparsebert.data.tasks import TASKS, TaskSpec
from sparsebert.data.text import MaskedText, PackedText, TextData, load_text, pack_text
from sparsebert.data.variants import Variant

__all__ = [
    "TASKS",
    "Collator",
    "Encoded",
    "MaskedText",
    "PackedText",
    "TaskData",
    "TaskSpec",
    "TextData",
    "Variant",
    "compute_metrics",
    "demo_model_path",
    "encode",
    "hold_out",
    "label_ids",
    "load_task",
    "load_text",
    "pack_text",
    "sample",
    "span_metrics",
    "span_predictions",
]
