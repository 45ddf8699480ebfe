"""`--watch-train`: rows that are trained on are scored beside those held out, and neither changes what is trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny import Workshop
from training.breaks import Breaks, assert_same

from sparsebert.train import main

WATCH = ["--eval-strategy", "steps", "--eval-steps", "2", "--watch-train"]


def test_both_slices_are_scored_while_training_and_at_the_end(workshop: Workshop, monkeypatch: Any) -> None:
    from sparsebert.training import run as run_room

    texts: list[tuple[bool, list[str]]] = []
    encode = run_room.encode

    def seen(dataset, *rest, training, **more):  # type: ignore[no-untyped-def]
        texts.append((training, list(dataset["text"])))
        return encode(dataset, *rest, training=training, **more)

    monkeypatch.setattr(run_room, "encode", seen)
    run = workshop.run("finetune", *WATCH, steps=6)
    trained = set(max((rows for training, rows in texts if training), key=len))
    slices = {frozenset(rows) for training, rows in texts if not training}
    assert sorted(len(rows) for rows in slices) == [4, 4]
    assert sorted(len(trained & rows) for rows in slices) == [0, 4]
    for kind in ("eval_", "eval_train_"):
        assert [line["step"] for line in run.log if f"{kind}accuracy" in line] == [2, 4, 6]
    last = {kind: [line for line in run.log if f"{kind}loss" in line][-1] for kind in ("eval_", "eval_train_")}
    assert run.result["held_out_score"] == last["eval_"]["eval_accuracy"]
    assert run.result["train_score"] == last["eval_train_"]["eval_train_accuracy"]
    assert all(math.isfinite(line["eval_train_loss"]) for line in run.log if "eval_train_loss" in line)


def test_the_best_checkpoint_is_still_the_held_out_slices(workshop: Workshop, breaks: Breaks) -> None:
    words = [*WATCH, "--save-strategy", "steps", "--save-steps", "2", "--load-best-model-at-end"]
    words += ["--metric-for-best-model", "accuracy", "--learning-rate", "1e-3"]
    straight = workshop.run("gmp", *words, "--untouched", "false", steps=6)
    command = workshop.command("gmp", *words, "--untouched", "false", steps=6)
    folder = Path(command[command.index("--output") + 1])
    breaks.signal_at("prune", 4)
    assert main(command) == 130
    assert main(["--resume", str(folder)]) == 0
    assert_same(straight.folder, folder)


def test_there_must_be_something_to_watch(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(workshop.command("finetune", "--watch-train")) == 2
    assert "watch_train" in capsys.readouterr().err


def test_a_teacher_does_not_know_what_its_student_is_watched_on(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sparsebert.training import run as run_room

    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path))
    split = run_room.hold_out
    held: list[list[str]] = []

    def seen(*given):  # type: ignore[no-untyped-def]
        kept, held_out = split(*given)
        held.append(list(held_out["text"]))
        return kept, held_out

    monkeypatch.setattr(run_room, "hold_out", seen)
    run = workshop.run("kd", *WATCH[:4], "--teacher-max-steps", "2", steps=2)
    assert len(held) == 2 and held[0] == held[1]
    assert "train_score" not in run.result and "held_out_score" in run.result
