"""The teacher of a distilling run: trained once, kept by what it depends on, given, or refused by name."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from sparsebert.train import main

SHORT = ("--teacher-max-steps", "3")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.Workshop:
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "cache"))
    return tiny.Workshop(tmp_path)


def kept(shop: tiny.Workshop) -> list[Path]:
    return sorted(path for path in (shop.folder / "cache" / "teachers").iterdir() if path.is_dir())


def refused(shop: tiny.Workshop, capsys: pytest.CaptureFixture[str], *words: str, method: str = "kd") -> str:
    command = shop.command(method, *words)
    assert main(command) == 2
    assert not Path(command[command.index("--output") + 1]).exists(), "something was written before the refusal"
    return capsys.readouterr().err


def test_a_teacher_is_trained_once_for_all_seeds(shop: tiny.Workshop) -> None:
    first = shop.run("kd", *SHORT)
    trained = (kept(shop)[0] / "result.json").stat().st_mtime_ns
    second = shop.run("kd", *SHORT, "--seed", "7", "--learning-rate", "1e-4")
    (folder,) = kept(shop)
    assert (folder / "result.json").stat().st_mtime_ns == trained
    score = json.loads((folder / "result.json").read_text(encoding="utf-8"))["score"]
    for outcome in (first, second):
        assert outcome.result["teacher"]["key"] == folder.name
        assert outcome.result["teacher"]["score"] == score
    assert first.result["seed"] != second.result["seed"]


@pytest.mark.parametrize(
    "words", [("--teacher-seed", "1"), ("--teacher-learning-rate", "1e-4"), ("--max-train-samples", "40")]
)
def test_another_teacher_is_trained_where_it_would_be_another(shop: tiny.Workshop, words: tuple[str, ...]) -> None:
    shop.run("kd", *SHORT)
    shop.run("kd", *SHORT, *words)
    assert len(kept(shop)) == 2


def test_what_a_teacher_does_not_depend_on_trains_no_other_one(shop: tiny.Workshop) -> None:
    whole = shop.run("kd", *SHORT)
    part = shop.run("kd", *SHORT, "--max-eval-samples", "8")
    assert len(kept(shop)) == 1
    assert part.result["teacher"]["key"] == whole.result["teacher"]["key"]
    # Its score was taken on other rows than this run's.
    assert "score" in whole.result["teacher"] and "score" not in part.result["teacher"]


def test_a_given_teacher_is_taken_as_it_is(shop: tiny.Workshop) -> None:
    teacher = shop.run("finetune", "--head", "linear")
    student = shop.run("kd", "--teacher", str(teacher.folder))
    assert not (shop.folder / "cache" / "teachers").exists()
    assert student.result["teacher"]["score"] == teacher.result["score"]
    after = load_file(teacher.folder / "model" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in teacher.after.items())


def test_kept_and_given_teachers_teach_the_same(shop: tiny.Workshop) -> None:
    first = shop.run("kd", *SHORT)
    second = shop.run("kd", "--teacher", str(kept(shop)[0]))
    assert all(torch.equal(second.after[name], tensor) for name, tensor in first.after.items())


def test_half_of_the_layers_learn(shop: tiny.Workshop) -> None:
    outcome = shop.run("kd", *SHORT)
    layers = {name.split(".")[2] for name in outcome.after if name.startswith("encoder.layer.")}
    assert layers == {"0"}
    changed = outcome.after["encoder.layer.0.attention.self.query.weight"]
    assert not torch.equal(changed, outcome.before["encoder.layer.0.attention.self.query.weight"])


def test_an_interrupted_teacher_is_gone_on_with(shop: tiny.Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsebert.training.interrupt import InterruptCallback

    words = ("--teacher-max-steps", "6", "--save-strategy", "steps", "--save-steps", "2")
    whole = shop.run("kd", *words)
    monkeypatch.setenv("SPARSEBERT_CACHE", str(shop.folder / "cache2"))
    original, asked = InterruptCallback.on_step_end, [0]

    def stop_at_three(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        asked[0] += 1
        if asked[0] == 3:
            self.received = signal.SIGINT
        original(self, args, state, control, **more)

    monkeypatch.setattr(InterruptCallback, "on_step_end", stop_at_three)
    command = shop.command("kd", *words)
    assert main(command) == 128 + signal.SIGINT
    monkeypatch.setattr(InterruptCallback, "on_step_end", original)
    folder = command[command.index("--output") + 1]
    assert main(["--resume", folder]) == 0
    resumed = tiny.Outcome(Path(folder), shop.model)
    assert all(torch.equal(resumed.after[name], tensor) for name, tensor in whole.after.items())


def test_what_is_no_teacher_is_refused_by_name(
    shop: tiny.Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected the folder of a finished run" in refused(shop, capsys, "--teacher", str(tmp_path / "none"))
    pruned = shop.run("magnitude")
    capsys.readouterr()
    assert "its weights are pruned" in refused(shop, capsys, "--teacher", str(pruned.folder))
    assert "a number of layers" in refused(shop, capsys, "--student-layers", "-2")
    assert "expected 1 to 2" in refused(shop, capsys, "--student-layers", "3")


def test_another_vocabulary_is_refused_by_name(
    shop: tiny.Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.save_checkpoint(tmp_path / "other", seed=3)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    (other / "tokenizer.json").write_text(text.replace('"plot"', '"yarn"'), encoding="utf-8")
    assert "its vocabulary of" in refused(shop, capsys, "--teacher-model", str(other))


def test_a_cache_that_cannot_be_written_to_is_named(
    shop: tiny.Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SPARSEBERT_CACHE", str(tmp_path / "file"))
    assert main(shop.command("kd", *SHORT)) == 2
    assert "set SPARSEBERT_CACHE" in capsys.readouterr().err
