"""Every kind of task, every kind of model, labels by their names: trained, saved and scored again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import GOOD, OTHER, Outcome, Workshop, save_checkpoint
from training.breaks import Breaks

from sparsebert.evaluate import main as evaluate
from sparsebert.train import main

WORDS = ["--untouched", "false", "--max-steps", "3", "--logging-steps", "1", "--precision", "fp32"]


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir()
    for split, content in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return folder


def sentence(number: int, word: str = "") -> str:
    return " ".join([OTHER[number // 8**place % 8] for place in range(3)] + [word]).strip()


def trained(tmp_path: Path, model: Path, task: str, *words: str) -> Outcome:
    """A run of three steps that scores the same when it is evaluated."""
    output = tmp_path / "run"
    command = ["--model", str(model), "--task", task, "--data-dir", str(tmp_path / "data"), "--output", str(output)]
    assert main([*command, *WORDS, *words]) == 0
    return Outcome(output, model)


def same_again(run: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert evaluate([str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == run.result["metrics"]


@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
@pytest.mark.parametrize("pattern", ["unstructured", "heads"])
def test_other_models(
    tmp_path: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str], kind: str, pattern: str
) -> None:
    model = save_checkpoint(tmp_path / kind, kind)
    run = workshop.run("adapt_prune", *WORDS, "--model", str(model), "--pattern", pattern, "--head", "linear", steps=3)
    assert run.result["sparsity"]["masked"] == pytest.approx(0.5, abs=1e-6)
    same_again(run, capsys)


def test_pairs_and_numbers(tmp_path: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(first: int, count: int) -> list[dict[str, Any]]:
        return [
            {"sentence1": sentence(number), "sentence2": sentence(number * 7), "label": number % 11 / 2}
            for number in range(first, first + count)
        ]

    write(tmp_path / "data", {"train": rows(0, 40), "validation": rows(40, 16)})
    run = trained(tmp_path, workshop.model, "stsb", "--pooling", "mean", "--eval-strategy", "epoch")
    assert run.result["metric"] == "spearman"
    assert run.result["metrics"].keys() == {"spearman", "pearson", "combined"}
    same_again(run, capsys)


def test_spans(tmp_path: Path, workshop: Workshop, breaks: Breaks, capsys: pytest.CaptureFixture[str]) -> None:
    """Contexts longer than a window; interrupted once on the way."""

    def rows(first: int, count: int) -> list[dict[str, Any]]:
        made = []
        for number in range(first, first + count):
            before, answer = sentence(number), GOOD[number % 4]
            context = f"{before} {answer} " + " ".join(sentence(number * place) for place in (3, 5, 7, 11))
            answers = {"text": [answer], "answer_start": [len(before) + 1]}
            made.append({"id": str(number), "question": "the film", "context": context, "answers": answers})
        return made

    write(tmp_path / "data", {"train": rows(0, 24), "validation": rows(24, 8)})
    output = tmp_path / "run"
    command = [
        *(
            "--model",
            str(workshop.model),
            "--task",
            "squad",
            "--data-dir",
            str(tmp_path / "data"),
            "--max-length",
            "19",
        ),
        *("--method", "gmp", "--eval-strategy", "steps", "--eval-steps", "2", "--output", str(output), *WORDS),
    ]
    breaks.signal_at("prune", 2)
    assert main(command) == 130
    assert main(["--resume", str(output)]) == 0
    run = Outcome(output, workshop.model)
    assert run.result["metrics"].keys() == {"f1", "exact_match"}
    assert run.result["metric"] == "f1"
    same_again(run, capsys)


def test_labels_are_matched_by_name(tmp_path: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that counts MRPC's classes the other way round: F1 is still about "equivalent"."""

    def rows(first: int, count: int) -> list[dict[str, Any]]:
        return [
            {"sentence1": sentence(number), "sentence2": sentence(number * 7), "label": int(number % 4 > 0)}
            for number in range(first, first + count)
        ]

    write(tmp_path / "data", {"train": rows(0, 40), "validation": rows(40, 16)})
    model = save_checkpoint(tmp_path / "reversed")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {
        "label2id": {"equivalent": 0, "not_equivalent": 1},
        "id2label": {"0": "equivalent", "1": "not_equivalent"},
    }
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["--method", "finetune", "--learning-rate", "0.01", "--max-steps", "12", "--eval-strategy", "epoch"]
    run = trained(tmp_path, model, "mrpc", *words)
    # Three in four are equivalent, so that is what it says of everything, or nearly.
    assert run.result["metrics"]["accuracy"] >= 0.7
    assert run.result["metrics"]["f1"] >= 0.8
    watched = [line for line in run.log if "eval_f1" in line]
    assert watched and watched[-1]["eval_f1"] >= 0.7
    saved = json.loads((run.folder / "model" / "config.json").read_text(encoding="utf-8"))
    assert saved["label2id"] == {"equivalent": 0, "not_equivalent": 1}
    same_again(run, capsys)


def test_both_validation_sets_of_mnli(tmp_path: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(first: int, count: int) -> list[dict[str, Any]]:
        return [
            {"premise": sentence(number), "hypothesis": sentence(number * 7), "label": number % 3}
            for number in range(first, first + count)
        ]

    splits = {"train": rows(0, 30), "validation_matched": rows(30, 12), "validation_mismatched": rows(42, 9)}
    write(tmp_path / "data", splits)
    run = trained(tmp_path, workshop.model, "mnli", "--method", "random", "--pattern", "2:4")
    assert run.result["metrics"].keys() == {"accuracy", "accuracy_mismatched"}
    assert run.result["score"] == run.result["metrics"]["accuracy"]
    same_again(run, capsys)
