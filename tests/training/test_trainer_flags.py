"""Trainer's own flags do what their names say, and what is left is where it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import Workshop
from training.breaks import Breaks, assert_same

from sparsebert.train import main

SHORT = ["--untouched", "false", "--head", "linear"]
NEEDED = {
    "method", "task", "pattern", "metric", "score", "metrics", "sparsity", "seed", "seconds", "versions", "hardware",
}  # fmt: skip
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def test_what_a_run_leaves(workshop: Workshop) -> None:
    run = workshop.run("adapt_prune", "--pattern", "neurons", "--save-strategy", "steps", "--save-steps", "1", steps=3)
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == ["config.yaml", "metrics.jsonl", "model", "result.json"]
    assert not [path for path in run.folder.rglob("*") if path.suffix in PICKLES]
    result = run.result
    assert result.keys() >= NEEDED
    assert (result["method"], result["task"], result["pattern"]) == ("adapt_prune", "custom", "neurons")
    assert result["score"] == result["metrics"][result["metric"]]
    assert 0 < result["sparsity"]["model"] < result["sparsity"]["encoder"] < 1
    assert result["untouched"].keys() == result["metrics"].keys()
    assert result["seed"] == 42 and result["seconds"] > 0
    assert result["versions"].keys() >= {"python", "torch", "transformers"}
    assert result["hardware"].keys() >= {"cpu", "cores"}
    assert [(phase["phase"], phase["steps"]) for phase in result["phases"]] == [("untouched", 3), ("prune", 3)]
    steps = [(line["phase"], line["step"], "loss" in line) for line in run.log]
    each = [(1, True), (2, True), (3, True), (3, False)]
    assert steps == [(phase, *line) for phase in ("untouched", "prune") for line in each]
    means = [sum(run.numbers("loss", phase)) / 3 for phase in ("untouched", "prune")]
    assert [line["train_loss"] for line in run.log if "train_loss" in line] == pytest.approx(means)


def test_tensorboard_has_the_methods_numbers_and_outlives_the_run(workshop: Workshop) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = workshop.run("adapt_prune", *SHORT, "--report-to", "tensorboard", steps=3)
    folder = run.folder / "tensorboard" / "prune"
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/sparsity")] == [1, 2, 3]
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(run.numbers("loss", "prune"), rel=1e-6)


def test_evaluation_while_training_never_sees_validation(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of train is held out; and the best of what was watched can be kept."""
    from sparsebert.training import run as run_room

    seen: list[tuple[str, list[str]]] = []
    encode = run_room.encode

    def watched(dataset, spec, tokenizer, length, *, training, label_ids):  # type: ignore[no-untyped-def]
        seen.append(("train" if training else "held out", list(dataset["text"])))
        return encode(dataset, spec, tokenizer, length, training=training, label_ids=label_ids)

    monkeypatch.setattr(run_room, "encode", watched)
    words = ["--eval-strategy", "steps", "--eval-steps", "2", "--save-strategy", "steps", "--save-steps", "2",
             "--learning-rate", "0.3", "--load-best-model-at-end", "--metric-for-best-model", "accuracy"]  # fmt: skip
    run = workshop.run("finetune", *words, steps=6)
    rows = [line.split("\t")[0] for line in (workshop.task / "train.tsv").read_text().splitlines()[1:]]
    texts = {kind: set(values) for kind, values in seen}
    assert texts["train"] | texts["held out"] == set(rows) and not texts["train"] & texts["held out"]
    assert len(texts["held out"]) == 4  # a tenth of each class
    watched_steps = {line["step"]: line["eval_loss"] for line in run.log if "eval_loss" in line}
    assert list(watched_steps) == [2, 4, 6]


def test_the_best_checkpoint_is_what_is_kept(workshop: Workshop, breaks: Breaks) -> None:
    """Watched by its loss, a run with a mad learning rate keeps its first checkpoint; also where it was interrupted."""
    words = ["--eval-strategy", "steps", "--eval-steps", "1", "--save-strategy", "steps", "--save-steps", "1",
             "--save-total-limit", "1", "--learning-rate", "2", "--head-learning-rate", "0", "--optim", "sgd",
             "--lr-scheduler-type", "constant", "--warmup-steps", "0", *SHORT[2:]]  # fmt: skip
    first = workshop.run("finetune", *words, "--load-best-model-at-end", steps=5)
    losses = [line["eval_loss"] for line in first.log if "eval_loss" in line]
    best = losses.index(min(losses)) + 1
    assert best < 5, losses
    shorter = ["--lr-scheduler-type", "constant", "--eval-strategy", "steps"]
    until = workshop.run("finetune", *words, *shorter, steps=best)
    assert all((first.after[name] == until.after[name]).all() for name in until.after)
    command = workshop.command("finetune", *words, "--load-best-model-at-end", steps=5)
    folder = Path(command[command.index("--output") + 1])
    breaks.signal_at("finetune", 4)
    assert main(command) == 130
    breaks.signal_at("finetune", 5)
    assert main(["--resume", str(folder)]) == 130
    assert main(["--resume", str(folder)]) == 0
    assert_same(first.folder, folder)


@pytest.mark.parametrize(
    "words",
    [
        "--optim adafactor --lr-scheduler-type cosine --warmup-steps 2",
        "--optim sgd --max-grad-norm 0.01 --weight-decay 0.1",
        "--gradient-accumulation-steps 2 --dataloader-num-workers 1 --logging-strategy epoch",
        "--train-sampling-strategy random --num-train-epochs 1 --max-steps -1 --lr-scheduler-type constant",
    ],
)
def test_flags_that_reach_trainer(workshop: Workshop, words: str) -> None:
    run = workshop.run("finetune", *SHORT[2:], *words.split())
    assert run.result["phases"][0]["steps"] == (6 if "epochs" in words else 4)
    rates = run.numbers("learning_rate", "finetune")
    if "cosine" in words:
        assert rates[0] < rates[1] < rates[2] > rates[3] > 0
    if "random" in words:
        assert rates == [5e-5] * 6
    changed = [name for name in run.after if not (run.after[name] == run.before[name]).all()]
    assert len(changed) > 10


def test_the_configuration_repeats_a_run_and_flags_beside_it_win(workshop: Workshop, tmp_path: Path) -> None:
    first = workshop.run("gmp", *SHORT, "--seed", "7", "--prunings", "2", "--masked", "encoder", "word_embeddings")
    config = str(first.folder / "config.yaml")
    again, other = tmp_path / "again", tmp_path / "other"
    assert main(["--config", config, "--output", str(again)]) == 0
    assert_same(first.folder, again)
    assert main(["--config", config, "--output", str(other), "--sparsity", "0.25", "--max-steps", "2"]) == 0
    result = json.loads((other / "result.json").read_text(encoding="utf-8"))
    assert result["sparsity"]["masked"] == 0.25 and result["seed"] == 7
    assert {phase["steps"] for phase in result["phases"]} == {2}


def test_the_configuration_of_another_method(workshop: Workshop, tmp_path: Path) -> None:
    """What a user chose is kept; what the other method chose for itself is not."""
    import yaml

    first = workshop.run("adapt_prune", *SHORT, "--gamma", "1e-3", "--seed", "5", steps=2)
    output = tmp_path / "run"
    words = ["--config", str(first.folder / "config.yaml"), "--method", "finetune", "--output", str(output)]
    assert main(words) == 0
    config = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    assert config["run"]["method"] == "finetune" and config["run"]["sparsity"] is None
    assert config["trainer"]["seed"] == 5 and config["trainer"]["max_steps"] == 2
    assert config["trainer"]["learning_rate"] == 5e-5 and "gamma" not in config["settings"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(workshop: Workshop) -> None:
    one, two = (workshop.run("finetune", "--seed", "3", steps=3) for _ in range(2))
    three = workshop.run("finetune", "--seed", "4", steps=3)
    assert one.log[0] == two.log[0]
    assert_same(one.folder, two.folder)
    assert one.log[0]["loss"] != three.log[0]["loss"]
    assert any((one.after[name] != three.after[name]).any() for name in one.after)
