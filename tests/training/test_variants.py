"""Runs on changed training data: the settings reach the data and the result, apart from the run's seed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny import Workshop
from training.breaks import Breaks

from sparsebert.evaluate import main as evaluate
from sparsebert.train import main
from sparsebert.training.config import load_run_task
from sparsebert.training.settings import RunSettings

WORDS = ("--label-noise", "0.3", "--few-samples", "20", "--imbalance", "2", "--variant-seed", "5")


def test_a_result_names_its_data(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """The same rows and flips under another seed of the run; scored again without the changes."""
    one, other = (workshop.run("finetune", *WORDS, "--seed", seed, steps=2) for seed in ("1", "2"))
    done = one.result["data"]["variant"]
    assert done == other.result["data"]["variant"] and done["rows"] == 20 and done["seed"] == 5
    assert (done["imbalance"], done["label_noise"]["probability"]) == ({"ratio": 2.0, "rows": 36}, 0.3)
    assert "variant seed 5" in one.result["note"]
    capsys.readouterr()
    assert evaluate([str(one.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == one.result["metrics"]
    plain = workshop.run("finetune", steps=2)
    assert "variant" not in plain.result["data"]
    again = workshop.run("finetune", "--config", str(one.folder / "config.yaml"), steps=2)
    assert again.result["data"] == one.result["data"]


def test_an_interrupted_run_goes_on(workshop: Workshop, breaks: Breaks) -> None:
    whole = workshop.run("finetune", *WORDS, steps=4)
    command = workshop.command("finetune", *WORDS, "--save-strategy", "steps", "--save-steps", "1", steps=4)
    breaks.signal_at("finetune", 3)
    assert main(command) == 130
    folder = workshop.folder / f"run{workshop.runs}"
    config = folder / "config.yaml"
    stored = config.read_text(encoding="utf-8")
    assert "variant_seed: 5" in stored
    config.write_text(stored.replace("variant_seed: 5", "variant_seed: 6"), encoding="utf-8")
    assert main(["--resume", str(folder)]) == 2
    config.write_text(stored, encoding="utf-8")
    assert main(["--resume", str(folder)]) == 0
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["data"] == whole.result["data"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--few-samples", "0"], "few_samples"),
        (["--few-samples", "1000"], "there are 48 training rows"),
        (["--label-noise", "1"], "label_noise"),
        (["--label-noise", "nan"], "label_noise"),
        (["--imbalance", "0.5"], "imbalance"),
        (["--imbalance", "100"], "would leave no training row"),
        (["--variant-seed", "-1"], "variant_seed"),
    ],
)
def test_refused_by_name(workshop: Workshop, capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    assert main(workshop.command("finetune", *words)) == 2
    assert named in capsys.readouterr().err
    assert not (workshop.folder / f"run{workshop.runs}").exists()


def test_scoring_alone_leaves_train_as_it_is(workshop: Workshop) -> None:
    words: dict[str, Any] = {"task": "custom", "data_dir": str(workshop.task), "text_columns": ["text"]}
    run = RunSettings(**words, few_samples=10**6)
    assert len(load_run_task(run, require_train=False).train) == 48
