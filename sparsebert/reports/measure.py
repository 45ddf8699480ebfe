"""Dense model and subnetwork side by side: outputs compared first, then timed in turns; memory, layers and scores."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsebert.data import Collator
from sparsebert.errors import UserError
from sparsebert.models.load import max_tokens
from sparsebert.reports.against import plan_against, prepare
from sparsebert.reports.compare import best_of, disagreement, is_faster, mean_error, numbers, verdict
from sparsebert.reports.inputs import LENGTHS, SST2_LENGTHS, SST2_SOURCE, Case, cases
from sparsebert.reports.layers import Clock, break_even, layer_rows
from sparsebert.reports.memory import memory_of
from sparsebert.reports.subject import UNKNOWN, Readout, Subject
from sparsebert.reports.timing import STOPWATCHES, interleave
from sparsebert.reports.variants import Plan, Variant, build, in_precision, plan, precisions_here, weight_bytes
from sparsebert.reports.what_if import suggestion, what_if
from sparsebert.training.evaluation import predict, score
from sparsebert.training.hardware import hardware, versions

__all__ = ["SCHEMA", "Settings", "measure"]

SCHEMA = 1
"""Version of benchmark.json."""

_LAYER_ROUNDS = 9
_LAYER_SECONDS = 1.0
# Dense paths that other patterns are timed in turns with.
_RIVALS = 2


@dataclass(frozen=True)
class Settings:
    """What is measured, and how."""

    batch_sizes: tuple[int, ...] = (1, 8)
    """Sentences of a batch."""
    seq_lens: tuple[int, ...] | None = None
    """Tokens of a sentence; None takes 128, or what the model can."""
    lengths: tuple[str, ...] = LENGTHS
    """Kinds of lengths."""
    threads: int | None = None
    """None leaves torch's."""
    device: str | None = None
    """"cpu" or "cuda"; None takes the GPU where there is one."""
    against: tuple[str, ...] | None = None
    """See `plan_against`."""
    formats: tuple[str, ...] | None = None
    """See `plan`."""
    precisions: tuple[str, ...] | None = None
    """See `precisions_here`."""
    repeats: int = 20
    """Rounds, in each of which every variant is timed once."""
    seconds_budget: float = 300.0
    """For all timed rounds of whole models together; there are 3 rounds at least."""
    seed: int = 0
    """Of the tokens, and of random masks."""
    score: bool = False
    """Whether each variant is scored on the validation set."""
    memory: bool = True
    """Whether each variant's memory is measured, in a process of its own."""
    break_even: bool = False
    """Whether break-evens are measured on random masks."""
    what_if: bool | None = None
    """Whether other patterns are measured; None: where the subnetwork is not faster."""
    data_dir: str | None = None
    """Where the run's data are now, if they have moved."""


Say = Callable[[str], None]


def measure(subject: Subject, settings: Settings, command: str, say: Say = lambda line: None) -> dict[str, Any]:
    """Everything that benchmark.json holds.

    Args:
        subject: moved to the device.
        settings: what to measure.
        command: the command line, for the record.
        say: gets a line when a part begins.

    Raises:
        UserError: a setting that cannot be.
    """
    return _Bench(subject, settings, say).report(command)


def pick_device(word: str | None) -> torch.device:
    """The device that `--device` names; None is the GPU where there is one.

    Raises:
        UserError: CUDA where there is none, or another word.
    """
    there = torch.cuda.is_available()
    if word is None:
        return torch.device("cuda" if there else "cpu")
    if word not in ("cpu", "cuda"):
        raise UserError(f"device: expected cpu or cuda, got {word!r}")
    if word == "cuda" and not there:
        why = f"torch {torch.__version__} was built without it" if torch.version.cuda is None else "torch sees no GPU"
        raise UserError(f"device cuda: there is no CUDA here ({why}); use --device cpu")
    return torch.device(word)


class _Bench:
    """One measurement: the models that are built, and what was found."""

    def __init__(self, subject: Subject, settings: Settings, say: Say) -> None:
        self.subject, self.settings, self.say = subject, settings, say
        self.device = pick_device(settings.device)
        if settings.threads is not None and settings.threads < 1:
            raise UserError(f"threads: expected at least 1, got {settings.threads}")
        if settings.repeats < 1:
            raise UserError(f"repeats: expected at least 1, got {settings.repeats}")
        if not settings.seconds_budget > 0:
            raise UserError(f"seconds-budget: expected more than 0, got {settings.seconds_budget}")
        self.precisions = precisions_here(settings.precisions, self.device)
        self.cases, self.real_lengths = self._cases()
        against, left_out = plan_against(settings.against, self.precisions, self.device)
        self.plan: Plan = plan(subject.readout, settings.formats, self.precisions, self.device)
        self.plan.variants += against
        self.plan.left_out |= left_out
        if settings.score:
            subject.task(settings.data_dir)  # an error now rather than after minutes
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        subject.readout.to(self.device)
        self.watch = STOPWATCHES["cuda" if self.device.type == "cuda" else "wall"]
        names = dict.fromkeys(["fp32", *self.precisions])
        self.masters = {name: in_precision(subject.readout, name) for name in names}
        self.models: dict[str, Readout] = {}
        self.rivals: dict[Case, dict[str, Callable[[], Tensor]]] = {}

    def report(self, command: str) -> dict[str, Any]:
        """Measures everything."""
        settings = self.settings
        self._build()
        found = [self._time(case) for case in self.cases]
        other = self._what_if(found)
        for case in found:
            same = [row for row in other if row["case"] == case["case"]]
            case["verdict"] = verdict(case, same, suggestion(same))
        rows = sorted({case.tokens for case in self.cases})
        clock = Clock(_LAYER_ROUNDS, self.watch, _LAYER_SECONDS)
        layers = self._layers(rows, clock)
        return {
            "schema": SCHEMA,
            "subject": self._about(),
            "conditions": self._conditions(command),
            "cases": found,
            "variants": self._variants(),
            "left_out": self.plan.left_out,
            "accuracy": self._accuracy(),
            "layers": layers,
            "break_even": self._break_even(rows, clock) if settings.break_even else [],
            "what_if": other,
        }

    def _cases(self) -> tuple[list[Case], dict[str, Any]]:
        most = max_tokens(self.subject.readout.base)
        longest = self.settings.seq_lens or (min(128, most),)
        if max(longest) > most:
            raise UserError(f"seq-lens: the model takes at most {most} tokens, got {max(longest)}")
        real: Sequence[int] = SST2_LENGTHS
        about: dict[str, Any] = {"source": SST2_SOURCE}
        if "real" in self.settings.lengths and self.subject.config is not None:
            try:
                data, sets = self.subject.task(self.settings.data_dir)
                real = sets[""].lengths
                about = {"source": f"validation set of {data.spec.name}, {len(real)} inputs"}
            except UserError as error:
                about["note"] = f"the run's own data are not at hand: {error}"
        return cases(self.settings.batch_sizes, longest, self.settings.lengths, real), about

    def _inputs(self, case: Case) -> dict[str, Tensor]:
        config = self.subject.readout.base.config
        return case.inputs(int(config.vocab_size), int(config.pad_token_id), self.settings.seed, self.device)

    def _build(self) -> None:
        tokens = sorted({case.tokens for case in self.cases})
        for variant in self.plan.variants:
            if variant.kind == "against":
                continue
            self.say(f"building {variant.name}")
            layers = self.plan.layers.get(variant.name, None if variant.kind == "subnetwork" else {})
            model, chosen = build(variant, self.masters[variant.precision], layers, tokens)
            self.models[variant.name] = model
            if variant.kind == "subnetwork":
                self.plan.layers[variant.name] = chosen

    def _run(self, variant: Variant, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
        if variant.kind == "against":
            precision = variant.precision if variant.way == "compile" else "fp32"
            return prepare(variant, self.masters[precision], inputs)
        return functools.partial(self.models[variant.name], **inputs)

    def _time(self, case: Case) -> dict[str, Any]:
        """Checks and times every variant on one batch."""
        self.say(f"timing {case.name}")
        inputs = self._inputs(case)
        rows = {variant.name: {"variant": variant.name, "kind": variant.kind} for variant in self.plan.variants}
        runs: dict[str, Callable[[], Tensor]] = {}
        with torch.inference_mode():
            exact = self.subject.readout(**inputs)
            agrees = self._agrees(inputs, exact)
            for variant in self.plan.variants:
                row: dict[str, Any] = rows[variant.name]
                try:
                    run = self._run(variant, inputs)
                    reason = agrees(run(), exact, variant.precision)
                except Exception as error:  # other software raises what it likes; it costs its own row alone
                    reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                row["status"] = "ok" if reason is None else "failed"
                if reason is None:
                    runs[variant.name] = run
                else:
                    row["reason"] = reason
            budget = self.settings.seconds_budget / len(self.cases)
            timings = interleave(runs, self.settings.repeats, self.watch, budget=budget)
        for name, timing in timings.items():
            rows[name] |= numbers(timing, case)
        dense = [name for name in runs if rows[name]["kind"] != "subnetwork"]
        best = sorted(dense, key=lambda name: timings[name].median)[:_RIVALS]
        self.rivals[case] = {name: runs[name] for name in best}
        return {"case": case.name, **asdict(case), "tokens": case.tokens, **best_of(list(rows.values()))}

    def _agrees(self, inputs: dict[str, Tensor], exact: Tensor) -> Callable[[Tensor, Tensor, str], str | None]:
        """`disagreement` for this batch."""
        mask = inputs["attention_mask"].bool() if self.subject.readout.per_token else None
        model = self.models.get("torch bf16")
        own = 0.0 if model is None else mean_error(model(**inputs), exact, mask)
        return functools.partial(disagreement, mask=mask, own=own)

    def _what_if(self, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Other patterns, on the batches where that is asked for or the subnetwork is not faster."""
        asked, rows = self.settings.what_if, []
        for case, measured in zip(self.cases, found, strict=True):
            if asked is False or (asked is None and (is_faster(measured) or not self.subject.masks)):
                continue
            self.say(f"timing other patterns on {case.name}")
            inputs = self._inputs(case)
            with torch.inference_mode():
                agrees = self._agrees(inputs, self.subject.readout(**inputs))
            clock = Clock(self.settings.repeats, self.watch, self.settings.seconds_budget / len(self.cases))
            rows += what_if(
                self.subject,
                self.masters["fp32"],
                self.precisions,
                self.rivals[case],
                case,
                inputs,
                agrees,
                clock,
                self.settings.seed,
            )
        return rows

    def _layers(self, rows: Sequence[int], clock: Clock) -> list[dict[str, Any]]:
        self.say("timing layers")
        base = self.subject.readout.base
        linears = {matrix.name: base.get_submodule(matrix.name) for matrix in self.subject.matrices}
        with torch.inference_mode():
            return layer_rows(linears, rows, self.precisions, self.settings.formats, clock)  # type: ignore[arg-type]

    def _break_even(self, rows: Sequence[int], clock: Clock) -> list[dict[str, Any]]:
        self.say("looking for break-evens")
        shapes = list(dict.fromkeys(matrix.shape for matrix in self.subject.matrices))
        pattern = self.subject.pattern if self.subject.pattern not in (None, UNKNOWN) else "unstructured"
        with torch.inference_mode():
            return break_even(shapes, rows, pattern, self.precisions, clock, self.device, self.settings.seed)

    def _variants(self) -> list[dict[str, Any]]:
        """Weights and memory of every variant."""
        largest = max(self.cases, key=lambda case: (case.batch * case.width, case.tokens))
        found = []
        for variant in self.plan.variants:
            about: dict[str, Any] = {"variant": variant.name, "kind": variant.kind, "precision": variant.precision}
            layers = self.plan.layers.get(variant.name, {})
            if variant.kind == "subnetwork":
                about["layers"] = {word: list(layers.values()).count(word) for word in sorted(set(layers.values()))}
            if variant.name in self.models:
                about["weights"] = weight_bytes(self.models[variant.name])
            if self.settings.memory:
                self.say(f"measuring the memory of {variant.name}")
                about["memory"] = {"case": largest.name, **memory_of(self._job(variant, largest, layers))}
            found.append(about)
        return found

    def _job(self, variant: Variant, case: Case, layers: Mapping[str, str]) -> dict[str, Any]:
        subject = self.subject
        return {
            "where": subject.where,
            "pattern": subject.pattern if subject.imposed else None,
            "sparsity": subject.target if subject.imposed else None,
            "variant": [variant.kind, variant.way, variant.precision],
            "layers": dict(layers),
            "case": asdict(case),
            "seed": self.settings.seed,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
        }

    def _accuracy(self) -> dict[str, Any]:
        """The run's score, and with `score` that of every variant."""
        result, found = self.subject.result, dict[str, Any]()
        if result is not None:
            found = {name: result[name] for name in ("task", "metric", "score", "precision") if name in result}
        if not self.settings.score:
            return found
        data, sets = self.subject.task(self.settings.data_dir)
        scores = {}
        for name, readout in self.models.items():
            self.say(f"scoring {name}")
            outputs = predict(
                readout.model,  # type: ignore[arg-type]
                sets[""],
                Collator(self.subject.tokenizer),  # type: ignore[arg-type]
                batch_size=max(self.settings.batch_sizes),
                dtype=torch.float32,  # no autocast: the variant's own precision
                device=self.device,
            )
            scores[name] = score(outputs, sets[""], data.spec)
        return {**found, "metric": data.spec.metric, "examples": len(data.validation), "scores": scores}

    def _about(self) -> dict[str, Any]:
        subject = self.subject
        return {
            "where": Path(subject.where).name if os.path.isabs(subject.where) else subject.where,
            "model_type": str(subject.readout.base.config.model_type),
            "output": "task" if subject.folder is not None or not subject.readout.per_token else "last hidden state",
            "pattern": subject.pattern,
            "sparsity": round(subject.sparsity, 6) if subject.masks else 0.0,
            "imposed": subject.imposed,
        }

    def _conditions(self, command: str) -> dict[str, Any]:
        settings = self.settings
        found = versions()
        for package in ("openvino", "onnxruntime", "triton"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "command": command,
            "device": self.device.type,
            "hardware": hardware(),
            "versions": found,
            "threads": torch.get_num_threads(),
            "repeats": settings.repeats,
            "seconds_budget": settings.seconds_budget,
            "seed": settings.seed,
            "lengths": self.real_lengths if "real" in settings.lengths else {},
        }
