"""A run that is interrupted, however and wherever, and resumed is the run that was not, to the last bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Workshop
from training.breaks import Breaks, PowerCut, assert_same

from sparsebert.train import main
from sparsebert.training import run as run_room
from sparsebert.training.folder import RunFolder, last_checkpoint

# 48 examples, 8 at a time: an epoch is 6 steps, or 3 of two micro-batches.
RECIPES = {
    "adapt_prune": ["--save-strategy", "steps", "--save-steps", "2", "--logging-steps", "3"],
    "gmp": ["--gradient-accumulation-steps", "2", "--save-strategy", "steps", "--save-steps", "3", "--head", "linear",
            "--logging-steps", "2", "--prunings", "3"],
    "imp": ["--prune-rate", "0.3", "--untouched", "false", "--max-grad-norm", "0.1", "--lr-scheduler-type", "cosine"],
    "finetune": ["--save-strategy", "epoch", "--logging-steps", "4", "--precision", "bf16"],
}  # fmt: skip
STEPS = {"adapt_prune": 7, "gmp": 8, "imp": 3, "finetune": 8}


@pytest.fixture(scope="module")
def straight(workshop: Workshop) -> Callable[[str], Path]:
    """straight(method): the folder of the recipe's run without an interruption."""
    done: dict[str, Path] = {}

    def run(method: str) -> Path:
        if method not in done:
            done[method] = workshop.run(method, *RECIPES[method], steps=STEPS[method]).folder
        return done[method]

    return run


def begin(workshop: Workshop, method: str) -> list[str]:
    """The command line of the recipe's run; its last word is the folder."""
    command = workshop.command(method, *RECIPES[method], steps=STEPS[method])
    place = command.index("--output")
    return [*command[:place], *command[place + 2 :], *command[place : place + 2]]


def cut(words: list[str]) -> None:
    with pytest.raises(PowerCut):
        main(words)


def test_adapt_prune(workshop: Workshop, straight: Callable[[str], Path], breaks: Breaks) -> None:
    """In the first phase, between phases, in the last one; by signals, power cuts and in the middle of a save."""
    command = begin(workshop, "adapt_prune")
    resume = ["--resume", command[-1]]
    breaks.signal_at("untouched", 1, signal.SIGTERM)
    assert main(command) == 128 + signal.SIGTERM
    breaks.tear_at("untouched", 4)
    cut(resume)
    breaks.cut_in(RunFolder, "write_notes")  # the phase's tensors are there, its notes are not
    cut(resume)
    breaks.cut_in(run_room, "score_sets")
    cut(resume)
    breaks.cut_at("prune", 2)  # nothing is saved yet, but a line may be
    cut(resume)
    breaks.signal_at("prune", 4)
    assert main(resume) == 128 + signal.SIGINT
    breaks.tear_at("prune", 6)
    cut(resume)
    breaks.signal_at("prune", 7)
    assert main(resume) == 128 + signal.SIGINT  # at the end of the phase: nothing is left to train
    assert main(resume) == 0
    assert_same(straight("adapt_prune"), Path(command[-1]))


def test_gmp_with_accumulation_across_epochs(
    workshop: Workshop, straight: Callable[[str], Path], breaks: Breaks
) -> None:
    command = begin(workshop, "gmp")
    resume = ["--resume", command[-1]]
    breaks.signal_at("prune", 2)
    assert main(command) == 130
    breaks.cut_at("prune", 5)  # back to the checkpoint at the end of the first epoch
    cut(resume)
    breaks.signal_at("prune", 6)
    assert main(resume) == 130
    assert main(resume) == 0
    assert_same(straight("gmp"), Path(command[-1]))


def test_imp_over_its_rounds(workshop: Workshop, straight: Callable[[str], Path], breaks: Breaks) -> None:
    command = begin(workshop, "imp")
    resume = ["--resume", command[-1]]
    breaks.signal_at("round1", 3)
    assert main(command) == 130
    breaks.signal_at("round2", 1)
    assert main(resume) == 130
    breaks.cut_at("finetune", 2)
    cut(resume)
    assert main(resume) == 0
    assert_same(straight("imp"), Path(command[-1]))


def test_finetune_in_bf16_with_a_checkpoint_an_epoch(
    workshop: Workshop, straight: Callable[[str], Path], breaks: Breaks
) -> None:
    command = begin(workshop, "finetune")
    resume = ["--resume", command[-1]]
    breaks.cut_at("finetune", 7)
    cut(command)
    breaks.signal_at("finetune", 7)
    assert main(resume) == 130
    assert main(resume) == 0
    assert_same(straight("finetune"), Path(command[-1]))


@pytest.mark.parametrize("function", ["save_model", "evaluate_saved", "write_text"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_after_training(
    workshop: Workshop, straight: Callable[[str], Path], breaks: Breaks, function: str, after: bool
) -> None:
    """Training is not repeated when the run breaks between it and result.json."""
    command = begin(workshop, "finetune")
    breaks.cut_in(run_room, function, after=after)
    cut(command)
    breaks.cut_at("finetune", 1)  # would break a second training
    if function == "write_text" and after:
        assert main(["--resume", command[-1]]) == 2  # is finished; what was left goes
    else:
        assert main(["--resume", command[-1]]) == 0
    assert_same(straight("finetune"), Path(command[-1]))


@pytest.fixture
def stopped(workshop: Workshop, breaks: Breaks) -> Path:
    """The folder of a run that waits to be resumed."""
    command = begin(workshop, "finetune")
    breaks.signal_at("finetune", 2)
    assert main(command) == 130
    return Path(command[-1])


def test_a_run_is_resumed_with_what_it_began_with(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = stopped / "state" / "inputs.json"
    began = json.loads(inputs.read_text(encoding="utf-8"))
    changes = {
        "ranks": ({**began, "ranks": 2}, "ranks: 2 before, 1 now"),
        "model": ({**began, "model": "0" * 64}, "model: not what the run began with"),
        "data": ({**began, "data": {}}, "data: not what the run began with"),
    }
    capsys.readouterr()
    for changed, said in changes.values():
        inputs.write_text(json.dumps(changed), encoding="utf-8")
        assert main(["--resume", str(stopped)]) == 2
        assert said in capsys.readouterr().err
    inputs.write_text("{", encoding="utf-8")
    assert main(["--resume", str(stopped)]) == 2
    assert "inputs.json" in capsys.readouterr().err
    inputs.write_text(json.dumps(began), encoding="utf-8")
    assert main(["--resume", str(stopped)]) == 0


def test_what_a_kill_left_in_the_checkpoints_is_passed_over(
    straight: Callable[[str], Path], stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a checkpoint, an empty one, one without its mark, half a line in the log: all as if they were not there."""
    phase = stopped / "checkpoints" / "00-finetune"
    good = last_checkpoint(phase)
    assert good is not None and good.step == 2
    (phase / "checkpoint-3").mkdir()
    (phase / "checkpoint-4").mkdir()
    (phase / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    (phase / "checkpoint-5").mkdir()
    (phase / "checkpoint-5" / "complete.json").write_text('{"sizes": {"model.safetensors": 7}}', encoding="utf-8")
    with (stopped / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"phase": "finetune", "step": 3, "loss": 1}\n{"phase": "fine')
    assert main(["--resume", str(stopped)]) == 0
    assert_same(straight("finetune"), stopped)


def test_a_second_signal_stops_at_once(workshop: Workshop, breaks: Breaks, capfd: pytest.CaptureFixture[str]) -> None:
    command = begin(workshop, "finetune")
    before = signal.getsignal(signal.SIGINT)
    breaks.signal_at("finetune", 1, signal.SIGTERM, signal.SIGINT)
    assert main(command) == 130
    said = capfd.readouterr().err
    assert "saving at the next step" in said and "stopped at once" in said and f"--resume {command[-1]}" in said
    assert signal.getsignal(signal.SIGINT) is before
    assert main(["--resume", command[-1]]) == 0


def test_a_signal_while_scoring(
    workshop: Workshop,
    straight: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Scoring stops between two batches; what was trained is kept."""
    from sparsebert.training import scoring

    predict = scoring.predict

    def interrupted(*args: object, **options: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        return predict(*args, **options)  # type: ignore[arg-type]

    command = begin(workshop, "adapt_prune")
    monkeypatch.setattr(scoring, "predict", interrupted)
    assert main(command) == 143
    assert "while scoring phase untouched" in capsys.readouterr().err
    assert main(["--resume", command[-1]]) == 143
    monkeypatch.setattr(scoring, "predict", predict)
    assert main(["--resume", command[-1]]) == 0
    assert_same(straight("adapt_prune"), Path(command[-1]))


def test_ctrl_c_before_training(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_room, "load_run_task", interrupted)
    command = begin(workshop, "finetune")
    assert main(command) == 130
    assert capsys.readouterr().err == "stopped before there was anything to save\n"
    assert not Path(command[-1]).exists()


def test_a_run_in_another_thread_leaves_signals_alone(workshop: Workshop) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, begin(workshop, "finetune")).result() == 0
