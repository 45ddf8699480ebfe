"""`python -m sparsebert.train` as a user meets it: what is refused and how, signals, what it leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import Workshop

from sparsebert.train import main

GOOD = "".join(f"good {word} film\tgood\nbad {word} film\tbad\n" for word in ("a", "the", "very", "plot", "was", "and"))
HEADER = "text\tlabel\n"
Refused = Callable[..., str]


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


@pytest.fixture
def refused(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(words, *said): the command fails with status 2 and one line that has all of `said`; gives the line."""

    def check(words: list[str], *said: str, method: str = "adapt_prune", starts: bool = False) -> str:
        command = workshop.command(method, "--untouched", "false", "--head", "linear", *words, steps=2)
        output = Path(command[command.index("--output") + 1])
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        for fragment in said:
            assert fragment in error
        assert starts or "--output" in words or not output.exists()
        return error

    return check


def data(folder: Path, **files: str) -> Path:
    """A folder of files; `train_tsv` is train.tsv."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--method adaptprune", ["unknown method 'adaptprune'", "did you mean 'adapt_prune'", "finetune"]),
        ("--pattern blok:4x4", ["unknown pattern 'blok:4x4'", "did you mean 'block:RxC'", "unstructured"]),
        ("--pattern block:7x3", ["block:7x3", "does not divide", "query (16x16)"]),
        ("--pattern block:0x3", ["block:0x3"]),
        ("--pattern 4:2", ["4:2"]),
        ("--max-stps 3", ["'--max-stps'", "did you mean --max-steps"]),
        ("--sparcity 0.5", ["'--sparcity'", "did you mean --sparsity"]),
        ("--prune-rate 0.3", ["--prune-rate", "is a setting of imp", "adapt_prune"]),
        ("film", ["unknown argument 'film'"]),
        ("--sparsity 1.0", ["sparsity 1", "[0, 1)"]),
        ("--sparsity -0.1", ["sparsity -0.1"]),
        ("--sparsity nan", ["sparsity nan"]),
        ("--sparsity abc", ["--sparsity", "'abc'"]),
        ("--sparsity 0.7 --pattern 2:4", ["0.7", "2:4", "0.5"]),
        ("--masked encoder embeddings --pattern heads", ["heads", "embeddings"]),
        ("--masked embedings", ["'embedings'", "did you mean 'embeddings'"]),
        ("--masked pooler --head mlp", ["pooler", "--head linear"]),
        ("--method finetune --sparsity 0.5", ["--sparsity", "finetune", "prunes nothing"]),
        ("--method feature_extraction --pattern heads", ["--pattern", "feature_extraction"]),
        ("--max-steps abc", ["--max-steps", "'abc'"]),
        ("--max-steps 0", ["max_steps", "got 0"]),
        ("--max-steps -5", ["max_steps", "-5"]),
        ("--num-train-epochs 0", ["num_train_epochs"]),
        ("--learning-rate nan", ["learning_rate", "nan"]),
        ("--per-device-train-batch-size 0", ["per_device_train_batch_size", "at least 1"]),
        ("--seed -1", ["seed", "-1"]),
        ("--seed 99999999999", ["seed", "99999999999"]),
        ("--max-train-samples 0", ["max_train_samples"]),
        ("--max-length 0", ["max_length", "got 0"]),
        ("--max-length 4000", ["max_length", "at most 20 tokens", "4000"]),
        ("--head foo", ["unknown head 'foo'", "mlp"]),
        ("--pooling max", ["--pooling", "'max'", "mean"]),
        pytest.param("--precision fp16", ["fp16", "needs a GPU"],
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
        ("--bf16", ["--bf16", "use --precision"]),
        ("--output-dir x", ["--output-dir", "use --output"]),
        ("--gradient-checkpointing", ["--gradient-checkpointing"]),
        ("--save-only-model", ["--save-only-model", "resume"]),
        ("--label-smoothing-factor 0.1", ["--label-smoothing-factor"]),
        ("--train-sampling-strategy group_by_length", ["train_sampling_strategy", "'sequential'"]),
        ("--optim foo", ["--optim", "'foo'", "adafactor"]),
        ("--optim-args nothing", ["optim"]),
        ("--lr-scheduler-type cosine_with_min_lr", ["cosine_with_min_lr", "min_lr"]),
        ("--lr-scheduler-kwargs {bad", ["training arguments"]),
        ("--report-to foo", ["foo", "tensorboard"]),
        ("--load-best-model-at-end", ["load_best_model_at_end", "--eval-strategy"]),
        ("--eval-strategy epoch --metric-for-best-model f2", ["metric_for_best_model 'f2'", "accuracy"]),
        ("--eval-strategy steps --eval-steps 1 --max-train-samples 1", ["hold out"]),
        ("--torch-compile-mode foo", ["foo", "reduce-overhead"]),
        ("--accelerator-config nothing.json", ["nothing.json"]),
        ("--model nowhere/at/all", ["model", "'nowhere/at/all'"]),
        ("--data-dir nowhere", ["data_dir", "nowhere"]),
        ("--text-columns txt", ["train.tsv", "'txt'", "'text'"]),
        ("--label-column lab", ["train.tsv", "'lab'", "'label'"]),
        ("--text-columns text label", ["'label'"]),
        ("--config nowhere.yaml", ["nowhere.yaml"]),
        ("--resume nowhere", ["nowhere", "no config.yaml"]),
    ],
)  # fmt: skip
def test_words_and_numbers_that_cannot_work(refused: Refused, words: str, said: list[str]) -> None:
    refused(words.split(), *said)


@pytest.mark.parametrize("task", ["sst", "squd", "demoo"])
def test_an_unknown_task(task: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--task", task, "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: unknown task '{task}'; did you mean") and error.count("\n") == 1
    assert "mnli" in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", ["cannot be read"]),
        ("", ["sections"]),
        ("- 1", ["sections"]),
        ("film: 1", ["sections"]),
        ("run: [1, 2]", ["section run"]),
        ("run: {mehtod: x}", ["'mehtod'", "did you mean 'method'"]),
        ("run: {method: [1]}", ["method"]),
        ("run: {max_length: long}", ["max_length", "'long'"]),
        ("run: {masked: encoder}", ["masked", "list"]),
        ("run: {pooling: max}", ["pooling 'max'"]),
        ("run: {output: here}", ["'output'"]),
        ("run: {untouched: 3}", ["untouched", "true or false"]),
        ("settings: {after_target: x}", ["after_target 'x'", "hold"]),
        ("settings: {gama: 1}", ["'gama'", "did you mean 'gamma'"]),
        ("trainer: {weight_decay: much}", ["weight_decay", "'much'"]),
        ("trainer: {seed: 2.5}", ["seed", "2.5"]),
        ("trainer: {bf16: true}", ["bf16", "--precision"]),
        ("trainer: {optim: foo}", ["foo"]),
    ],
)
def test_bad_configuration_files(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: list[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["--config", str(path), "--model", str(workshop.model), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for fragment in said:
        assert fragment in error


def test_data_that_cannot_work(refused: Refused, tmp_path: Path) -> None:
    def given(name: str, *said: str, words: list[str] | None = None, **files: str) -> None:
        refused(["--data-dir", str(data(tmp_path / name, **files)), *(words or [])], *said)

    good = HEADER + GOOD
    given("empty", "train.tsv", "empty", train_tsv="", validation_tsv=good)
    given("header", "train.tsv", "no rows", train_tsv=HEADER, validation_tsv=good)
    given("blank", "blank", train_tsv=HEADER + " \tgood\n \tbad\n", validation_tsv=good)
    given("nothing", "no train or validation file")
    given("untrained", "no train split", validation_tsv=good)
    given("one class", "one class only", train_tsv=HEADER + "a\tgood\nb\tgood\n")
    given("unlabelled", "no label", "row 1", train_tsv=HEADER + "a\t\nb\tgood\n")
    given("another", "'fine'", "bad, good", train_tsv=good, validation_tsv=HEADER + "a\tfine\n")


def test_models_that_cannot_work(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    def given(name: str, change: Callable[[Path], object], *said: str, words: tuple[str, ...] = ()) -> None:
        folder = tmp_path / name
        shutil.copytree(workshop.model, folder)
        change(folder)
        refused(["--model", str(folder), *words], *said)

    def relabel(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {"label2id": {"spam": 0, "ham": 1}, "id2label": {"0": "spam", "1": "ham"}}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")

    def infinite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["embeddings.word_embeddings.weight"][0, 0] = torch.inf
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    given("other labels", relabel, "does not know the labels", "spam, ham")
    given("no weights", lambda folder: (folder / "model.safetensors").unlink(), "no weights", "model.safetensors")
    given("pickle", pickled, "pickle", "pytorch_model.bin", "safetensors")
    given("infinite", infinite, "word_embeddings", "infinite")
    given("cut", lambda folder: os.truncate(folder / "model.safetensors", 1000), "model.safetensors", "truncated")


def test_places_that_cannot_take_a_run(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    refused(["--output", str(file)], str(file), "choose another --output")
    refused(["--output", str(file / "run")], str(file / "run"), "Not a directory")
    refused(["--output", str(tmp_path)], "not empty")
    refused(["--output", str(tmp_path / ("x" * 300))], "too long")
    assert file.read_text() == "mine" and sorted(tmp_path.iterdir()) == [file]
    done = workshop.run("finetune", steps=1).folder
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    refused(["--output", str(done)], "already holds a run", f"--resume {done}")
    assert {path: path.read_bytes() for path in done.rglob("*") if path.is_file()} == before


def test_resume_takes_nothing_beside(workshop: Workshop, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = workshop.run("finetune", steps=1).folder
    for words in (["--max-steps", "3"], ["--output", str(tmp_path / "x")], ["--config", str(done / "config.yaml")]):
        capsys.readouterr()
        assert main(["--resume", str(done), *words]) == 2
        assert words[0] in capsys.readouterr().err
    assert main(["--resume", str(done)]) == 2
    error = capsys.readouterr().err
    assert "finished" in error and str(done / "result.json") in error


def test_a_loss_that_is_not_finite_is_named_within_a_step(refused: Refused, workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / "overflow"
    shutil.copytree(workshop.model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith("LayerNorm.weight"):
            tensors[name].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(["--model", str(folder)], "phase prune", "the loss is nan at step 1", "--learning-rate", starts=True)
    error = refused(["--learning-rate", "1e38", "--max-steps", "9"], "the loss is", method="finetune", starts=True)
    found = re.search(r"at step (\d)", error)
    assert found and int(found.group(1)) <= 3


def test_a_read_only_place(workshop: Workshop, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    refused([], "Read-only file system", "choose another --output")


def test_help_names_methods_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--method", "gmp", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for word in ("adapt_prune", "--prunings", "--max-steps", "--precision", "--sparsity", "--resume"):
        assert word in said


def test_importing_the_command_loads_nothing_heavy() -> None:
    code = (
        "import sys, sparsebert, sparsebert.train, sparsebert.evaluate; "
        "print({'torch', 'transformers', 'datasets', 'accelerate', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# What follows starts processes and is slow.


def started(words: list[str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_saves_and_says_how_to_go_on_and_sigterm_too(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is printed is run as it is printed; the run has a blank in its path, and ends like any other."""
    words = workshop.command("finetune", "--head", "linear", "--save-strategy", "steps", steps=60)
    place = words.index("--output")
    words[place + 1] = "my runs/first"
    process = started(["-m", "sparsebert.train", *words], tmp_path)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("finetune  2/60"):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    lines = said.strip().splitlines()
    assert "saving at the next step" in lines[0]
    step = int(re.findall(r"stopped by SIGINT after step (\d+)", lines[-1])[0])
    printed = shlex.split(lines[-1].split("go on with:")[1])
    assert printed == ["python", "-m", "sparsebert.train", "--resume", "my runs/first"]

    process = started(printed[1:], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(f"finetune  {step + 1}/60")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"go on with:  {shlex.join(printed)}" in said

    folder = tmp_path / "my runs" / "first"
    monkeypatch.chdir(tmp_path)
    assert main(printed[3:]) == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 61), 60]
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 60
