"""`python -m sparsebert.evaluate`: the same score to the last digit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import Workshop

from sparsebert.evaluate import main


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture(scope="module")
def task(workshop: Workshop) -> Path:
    """The task with numbers for labels: a correlation has more digits than an accuracy."""
    folder = workshop.folder / "numbers"
    folder.mkdir()
    for path in workshop.task.iterdir():
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        rows = [f"{row[:-1]}{int(row[-1]) + number % 7 / 10}" for number, row in enumerate(rows)]
        (folder / path.name).write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(workshop: Workshop, task: Path) -> Path:
    """The folder of a finished run."""
    words = ["--untouched", "false", "--head", "linear", "--precision", "bf16", "--data-dir", str(task)]
    return workshop.run("magnitude", *words, steps=3).folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def score_of(run: Path) -> dict[str, float]:
    return dict(json.loads((run / "result.json").read_text(encoding="utf-8"))["metrics"])


def test_the_score_is_the_same_to_the_last_digit_from_anywhere(run: Path, tmp_path: Path) -> None:
    """In a process of its own, in another working folder, named by a relative path."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsebert.evaluate", os.path.relpath(run, tmp_path), "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == score_of(run)
    assert len(str(score_of(run)["spearman"])) > 10
    assert done.stderr == ""


def test_says_that_it_is_the_same(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the run has been moved and its pre-trained model is gone."""
    config = yaml.safe_load((copy / "config.yaml").read_text(encoding="utf-8"))
    config["run"]["model"] = str(copy / "gone")
    (copy / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main([str(copy)]) == 0
    said = capsys.readouterr().out
    assert "the same to the last digit" in said
    assert f"{score_of(copy)['spearman']:.6f}" in said


def test_says_what_differs(task: Path, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    moved = shutil.copytree(task, tmp_path / "moved")
    (moved / "train.tsv").unlink()
    assert main([str(copy), "--data-dir", str(moved)]) == 0
    assert "the same to the last digit" in capsys.readouterr().out
    lines = (moved / "validation.tsv").read_text(encoding="utf-8").splitlines()
    (moved / "validation.tsv").write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")
    assert main([str(copy), "--data-dir", str(moved)]) == 0
    said = capsys.readouterr().out
    assert "differs (other data: validation)" in said and str(score_of(copy)["spearman"]) in said
    (copy / "result.json").unlink()
    assert main([str(copy)]) == 0
    assert "none: the run was not finished" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *said: str) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for fragment in said:
        assert fragment in error


def test_what_is_no_finished_run(
    workshop: Workshop, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    refused(capsys, [], "run", "--help")
    refused(capsys, [str(tmp_path / "nowhere")], "nowhere", "no such folder")
    refused(capsys, [str(workshop.model)], str(workshop.model), "holds no run")
    refused(capsys, [str(copy), "--precision", "fp8"], "'fp8'")
    refused(capsys, [str(copy), "--data-dir", "nowhere"], "nowhere")
    (copy / "result.json").write_text("{", encoding="utf-8")
    refused(capsys, [str(copy)], "result.json", "damaged")
    (copy / "result.json").write_text("[]", encoding="utf-8")
    refused(capsys, [str(copy)], "result.json", "damaged")
    (copy / "result.json").unlink()
    (copy / "config.yaml").write_text("film", encoding="utf-8")
    refused(capsys, [str(copy)], "config.yaml")
    shutil.rmtree(copy / "model")
    refused(capsys, [str(copy)], "not finished", f"--resume {copy}")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.safetensors", "not the weights"),
        ("masks.safetensors", "masks.safetensors"),
        ("head.safetensors", "head.safetensors"),
        ("head.json", "head.json"),
        ("config.json", "config.json"),
    ],
)
def test_a_model_that_was_tampered_with(copy: Path, capsys: pytest.CaptureFixture[str], file: str, said: str) -> None:
    path = copy / "model" / file
    if file == "model.safetensors":
        tensors = load_file(path)
        tensors["encoder.layer.0.output.dense.bias"][0] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:40])
    refused(capsys, [str(copy)], said)
    path.unlink()
    refused(capsys, [str(copy)], file)
