"""Tiny random models, a tokenizer and a text task, made in a test's own folder; methods trained on them by hand or by
the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

if TYPE_CHECKING:
    from sparsebert.methods import Method, Phase

    Watch = Callable[[Phase, int], None]

KINDS = ("bert", "roberta", "distilbert")
GOOD, BAD = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "dull")
OTHER = ("a", "the", "film", "plot", "was", "very", "and", "is")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]


def config(kind: str = "bert") -> PretrainedConfig:
    """Two layers of width 16 with four heads and 32 neurons; every side of a matrix is divided by 4."""
    if kind == "distilbert":
        return DistilBertConfig(
            vocab_size=24, dim=16, n_layers=2, n_heads=4, hidden_dim=32, max_position_embeddings=20, pad_token_id=0
        )
    sizes: dict[str, Any] = {
        "vocab_size": 24,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 20,
        "pad_token_id": 0,
    }
    return RobertaConfig(**sizes, type_vocab_size=4) if kind == "roberta" else BertConfig(**sizes, type_vocab_size=4)


def base(kind: str = "bert", seed: int = 0) -> PreTrainedModel:
    """A random model in eval mode; no parameter is zero, biases and the padding row included."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(config(kind), attn_implementation="sdpa")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over `WORDS`."""
    inner = Tokenizer(models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


def save_checkpoint(folder: Path, kind: str = "bert", seed: int = 0) -> Path:
    """A pre-trained model's folder, as transformers writes it."""
    base(kind, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_task(folder: Path, train: int = 48, validation: int = 16) -> Path:
    """A folder of two tsv files: sentences with a good or a bad word, labelled so; all texts differ."""
    folder.mkdir(parents=True)
    number = 0
    for split, rows in (("train", train), ("validation", validation)):
        lines = ["text\tlabel"]
        for row in range(rows):
            verdict = (BAD, GOOD)[row % 2][number // 2 % 4]
            rest = [OTHER[number // 8**place % 8] for place in range(3)]
            lines.append(f"{' '.join(rest)} {verdict}\t{row % 2}")
            number += 1
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class Workshop:
    """A folder with a pre-trained model and a task, in which the training command is run.

    Args:
        folder: an empty or a new folder.
        kind: of the model.
    """

    def __init__(self, folder: Path, kind: str = "bert") -> None:
        self.folder = folder
        self.model = save_checkpoint(folder / "pretrained", kind)
        self.task = save_task(folder / "task")
        self.runs = 0

    def command(self, method: str, *words: str, steps: int = 4) -> list[str]:
        """The command line of a run; later `words` win."""
        self.runs += 1
        return [
            *("--method", method, "--model", str(self.model), "--task", "custom", "--data-dir", str(self.task)),
            *("--text-columns", "text", "--label-column", "label", "--max-steps", str(steps), "--precision", "fp32"),
            *("--per-device-train-batch-size", "8", "--save-strategy", "no", "--logging-steps", "1"),
            *("--output", str(self.folder / f"run{self.runs}"), *words),
        ]

    def run(self, method: str, *words: str, steps: int = 4) -> Outcome:
        """Runs `python -m sparsebert.train` in this process; fails the test unless it ends well."""
        from sparsebert.train import main

        status = main(self.command(method, *words, steps=steps))
        assert status == 0, f"the command ended with status {status}"
        return Outcome(self.folder / f"run{self.runs}", self.model)


class Outcome:
    """What a finished run left.

    Args:
        folder: of the run.
        model: of the pre-trained model.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        from sparsebert.models.storage import load_model

        self.folder = folder
        self.result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        self.log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        self.before: dict[str, Tensor] = load_file(model / "model.safetensors")
        self.after: dict[str, Tensor] = load_file(folder / "model" / "model.safetensors")
        self.masks: dict[str, Tensor] = load_model(folder / "model")[2]

    def numbers(self, key: str, phase: str) -> list[float]:
        """The values of `key` in the log of a phase, one per logged step."""
        return [entry[key] for entry in self.log if entry["phase"] == phase and key in entry and "loss" in entry]

    def pruned(self) -> tuple[int, int]:
        """Pruned and all weights of the masked matrices."""
        return sum(int((~mask).sum()) for mask in self.masks.values()), sum(m.numel() for m in self.masks.values())

    def check_zeros(self) -> None:
        """Fails unless exactly what the masks prune is +0.0 in the saved weights."""
        for name, mask in self.masks.items():
            weight = self.after[f"{name}.weight"]
            assert torch.equal(weight.view(torch.int32)[~mask], torch.zeros_like(weight, dtype=torch.int32)[~mask]), (
                name
            )
            assert bool((weight[mask] != 0).all()), name

    def check_survivors(self) -> None:
        """Fails unless every parameter is bit-identical to the pre-trained one, but for the pruned weights."""
        assert self.after.keys() == self.before.keys()
        for name, weight in self.before.items():
            mask = self.masks.get(name.removesuffix(".weight"), torch.ones_like(weight, dtype=torch.bool))
            assert torch.equal(self.after[name].view(torch.int32)[mask], weight.view(torch.int32)[mask]), name


def batch(phase: Phase, rows: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Random words in sequences of 6 as the phase takes them: labelled, or text with one place in three to predict."""
    ids = torch.randint(5, len(WORDS), (rows, 6), generator=generator)
    if phase.data == "task":
        return {"input_ids": ids, "labels": ids[:, 0] % 2}
    labels = torch.full_like(ids, -100)
    if phase.masking:
        labels[:, ::3] = ids[:, ::3]
        ids = ids.masked_fill(labels != -100, WORDS.index("[MASK]"))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def by_hand(method: Method, steps: int, watch: Watch | None = None, rate: float = 1e-2) -> None:
    """Trains a method as a run does, without Trainer: `steps` optimiser steps of Adam in every phase.

    Args:
        method: whose phases are trained.
        steps: in each phase.
        watch: called as `watch(phase, step)` after each step, and with step 0 before the first.
        rate: learning rate given to the phases.
    """
    generator = torch.Generator().manual_seed(7)
    for phase in method.phases():
        phase.start()
        groups = [group for group in phase.parameter_groups(rate) if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
        phase.loaded()
        method.module.train()
        for step in range(steps + 1):
            if step:
                optimizer.zero_grad()
                method.module(**batch(phase, 8, generator))["loss"].backward()
                phase.before_step(step, steps)
                optimizer.step()
            stop = step > 0 and phase.after_step(step, steps)
            if watch is not None:
                watch(phase, step)
            if stop:
                break
        phase.finish()
        phase.loaded()


def build(
    name: str,
    pattern: str = "unstructured",
    sparsity: float | None = None,
    *,
    kind: str = "bert",
    masked: Sequence[str] = ("encoder",),
    allocation: Any = "global",
    seed: int = 0,
    untouched: bool = False,
    **settings: Any,
) -> Method:
    """A method on a tiny model, with its default settings but for those given."""
    from sparsebert.methods import METHODS, Context
    from sparsebert.models.prunable import prunable_matrices
    from sparsebert.models.task_model import TaskModel
    from sparsebert.patterns import parse_pattern

    method, chosen = METHODS[name], parse_pattern(pattern)
    given = method.Settings(**settings)
    small = base(kind)
    method.shape(small, given)
    head = method.defaults.get("head", "mlp")
    model = TaskModel(small, "classification", 2, head_width=8, seed=seed, head=head)
    teacher = None
    if method.wants_teacher(given):
        teacher = TaskModel(base(kind, seed=1), "classification", 2, head_width=8, seed=seed + 1, head=head).eval()
    context = Context(
        model=model,
        matrices=prunable_matrices(model.base, masked),
        pattern=chosen,
        sparsity=chosen.default_sparsity if sparsity is None else sparsity,
        allocation=allocation,
        dtype=torch.float32,
        seed=seed,
        untouched=untouched,
        teacher=teacher,
        sparsity_asked=sparsity is not None,
    )
    return method(context, given)
