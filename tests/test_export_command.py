"""`python -m sparsebert.export`: what is written computes what the run did, says what it is, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from sparsebert import AutoSparseModel
from sparsebert.errors import UserError
from sparsebert.export import main
from sparsebert.models import export as exporting
from sparsebert.models.cut import keep_first_layers
from sparsebert.models.export import TARGETS, export
from sparsebert.models.plain_head import with_plain_head
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.storage import load_model, save_model
from sparsebert.models.task_model import TaskModel
from sparsebert.nn import Masks
from sparsebert.patterns import parse_pattern

KINDS_OF_TASK = (("classification", 3), ("regression", 1), ("span", 2))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a one-layer model with a linear head."""
    workshop = tiny.Workshop(tmp_path_factory.mktemp("workshop"))
    base = tiny.base()
    keep_first_layers(base, 1)
    base.save_pretrained(workshop.model)
    return workshop.run("magnitude", "--head", "linear", "--untouched", "false", steps=2).folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def needs(to: str) -> None:
    missing = [name for name in TARGETS[to] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")


def batch() -> dict[str, Tensor]:
    ids = torch.tensor([[2, 7, 9, 14, 3, 0, 0], [2, 5, 6, 11, 16, 8, 3]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": torch.zeros_like(ids)}


def own(run: Path) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = load_model(run / "model")[0](**batch())
    return found


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The card's YAML head and its text."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_dense_is_a_checkpoint_of_hugging_face(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert main([str(run), "--to", "dense", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "a BertForSequenceClassification of Hugging Face, pruned weights zero" in said
    assert "logits differ by at most" in said and f"from_pretrained('{tmp_path / 'out'}')" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).logits, own(run)["logits"], rtol=1e-5, atol=1e-5)
    assert model.config.id2label == {0: "0", 1: "1"} and model.config.problem_type == "single_label_classification"
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tiny.WORDS)
    masks, weights = load_model(run / "model")[2], load_file(tmp_path / "out" / "model.safetensors")
    for name, mask in masks.items():
        weight = weights[f"bert.{name}.weight"]
        assert bool((weight[~mask] == 0).all()) and bool((weight[mask] != 0).any()), name


def test_the_card_holds_what_was_measured(copy: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["run"]["text"] = [str(copy / "corpus.txt")]
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(copy), "--to", "dense"]) == 0
    head, text = card_of(copy / "export" / "dense")
    result = json.loads((copy / "result.json").read_text())
    assert head["tags"] == ["sparsebert", "sparse", "unstructured", "custom", "dense"]
    assert head["metrics"] == ["accuracy", "macro_f1"] and "base_model" not in head
    assert f"| accuracy | {result['metrics']['accuracy']:.4f} |" in text
    assert f"| seed | {result['seed']}: one run" in text and result["hardware"]["cpu"] in text
    assert f"torch {torch.__version__}" in text and f"{result['sparsity']['model']:.2%} of" in text
    assert "Not measured. `python -m sparsebert.benchmark RUN`" in text
    assert "--method" not in text and "method: magnitude" in text and "sparsebert.export RUN --to dense\n" in text
    # Nobody needs to know where the training machine kept its data.
    assert str(copy.parent) not in text and str(Path(config["run"]["data_dir"]).parent) not in text
    assert "model: pretrained" in text and "- corpus.txt" in text


def test_the_card_takes_in_a_benchmark(copy: Path) -> None:
    from sparsebert.benchmark import main as benchmark

    words = ["--batch-sizes", "1", "--seq-lens", "8", "--lengths", "full", "--threads", "1", "--repeats", "3"]
    words += ["--against", "--formats", "unstructured", "--precisions", "fp32", "--no-memory", "--no-what-if"]
    assert benchmark([str(copy), *words]) == 0
    assert main([str(copy), "--to", "dense"]) == 0
    _, text = card_of(copy / "export" / "dense")
    assert "p50 ms" in text and "### Conditions" in text and "Not measured" not in text
    (copy / "benchmark.json").write_text('{"cases": 3}')
    assert main([str(copy), "--to", "dense", "--overwrite"]) == 2


def test_a_run_without_a_result_has_a_card_without_a_score(copy: Path) -> None:
    (copy / "result.json").unlink()
    assert main([str(copy), "--to", "dense"]) == 0
    assert "there is no score" in card_of(copy / "export" / "dense")[1]


def test_sparse_is_a_folder_of_ours(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--to", "sparse", "--format", "unstructured", "--output", str(tmp_path / "out")]) == 0
    assert "6 of 7 linears stored sparse (unstructured)" in capsys.readouterr().out
    model = AutoSparseModel.from_pretrained(tmp_path / "out", verify=True)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()), own(run), rtol=1e-5, atol=1e-5)
    assert model.provenance["pattern"] == "unstructured" and model.provenance["base_model"]["sha256"]
    assert "AutoSparseModel" in card_of(tmp_path / "out")[1]


def test_onnx_runs_in_onnxruntime(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("onnx")
    import onnx
    import onnxruntime

    assert main([str(run), "--to", "onnx", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "an ONNX graph (opset 18)" in said.out and not said.err
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    axes = [[dim.dim_param for dim in port.type.tensor_type.shape.dim] for port in model.graph.input]
    assert axes == [["batch", "sequence"]] * 3
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in batch().items()})
    torch.testing.assert_close(torch.from_numpy(logits), own(run)["logits"], rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "0", "1": "1"} and (tmp_path / "out" / "tokenizer.json").is_file()


def test_openvino_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("openvino")
    import openvino

    assert main([str(run), "--to", "openvino", "--output", str(tmp_path / "out")]) == 0
    assert "an OpenVINO model, fp32" in capsys.readouterr().out
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", settings)
    found = model({name: tensor.numpy() for name, tensor in batch().items()})
    torch.testing.assert_close(torch.from_numpy(found["logits"]), own(run)["logits"], rtol=1e-5, atol=1e-5)


def save_tiny(
    folder: Path, kind: str, task: tuple[str, int], pattern: str = "unstructured", layers: int = 2, **head: Any
) -> Path:
    """A model's folder as a run saves it, half of its encoder pruned by magnitude."""
    base = tiny.base(kind)
    keep_first_layers(base, layers)
    model = TaskModel(base, *task, head_width=8, seed=0, **head)
    masks = Masks(model.base, prunable_matrices(model.base), parse_pattern(pattern), torch.float32)
    masks.select(masks.magnitude(), 0.5, "global")
    save_model(folder, model, tiny.tokenizer(), masks=masks.remove(), pattern=pattern, info={"task": "tiny"})
    return folder


def test_hidden_states_come_through_a_graph(tmp_path: Path) -> None:
    needs("onnx")
    folder = save_tiny(tmp_path / "model", "distilbert", ("span", 2), layers=1, head="mlp")
    model, tokenizer, _, info = load_model(folder)
    assert export(model, tokenizer, tmp_path / "out", "onnx", info=info).parity <= 1e-5


@pytest.mark.parametrize("task", KINDS_OF_TASK, ids=lambda task: task[0])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_head_becomes_transformers_own_where_it_can(kind: str, task: tuple[str, int], tmp_path: Path) -> None:
    words = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
    fits = {"span": True, "classification": kind != "distilbert", "regression": kind != "distilbert"}[task[0]]
    for head in ({"head": "linear"}, {"head": "linear", "pooling": "mean"}, {"head": "mlp"}):
        expected = fits and (head == {"head": "linear"} or (task[0] == "span" and head["head"] == "linear"))
        folder = save_tiny(tmp_path / "".join(head.values()), kind, task, **head)
        model, tokenizer, _, info = load_model(folder)
        whole = with_plain_head(model)
        assert (whole is not None) == expected
        made = export(model, tokenizer, tmp_path / "out", "dense", info=info)
        assert made.parity <= 1e-5 and made.what.startswith(f"a {words[kind]}")
        assert ("the encoder alone" in made.what) == (not expected)
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert ("head.safetensors" in files) == (not expected), "files of an older export are replaced"


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("to", ["dense", "sparse"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_pruned_heads_are_taken_out(kind: str, to: str, head: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", kind, ("span", 2), "heads", head=head)
    sizes = []
    for compact in (True, False):
        model, tokenizer, _, info = load_model(folder)
        made = export(model, tokenizer, tmp_path / str(compact), to, info=info, compact=compact, format="unstructured")
        assert made.parity <= 1e-5
        sizes.append(sum(t.numel() for t in load_file(tmp_path / str(compact) / "model.safetensors").values()))
        if to == "dense":
            assert ("heads and neurons that are wholly pruned are taken out" in made.what) == compact
    assert sizes[0] < sizes[1] or to == "sparse"
    loaded = AutoSparseModel.from_pretrained(tmp_path / "True")
    assert sum(weight.numel() for weight in loaded.parameters()) < tiny.base(kind).num_parameters()


def test_pruned_neurons_are_taken_out(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "bert", ("classification", 2), "neurons", head="linear")
    model = load_model(folder)[0]
    before = sum(weight.numel() for weight in model.base.parameters())
    exporting.remove_structure(model.base)
    assert with_plain_head(model) is not None
    assert sum(weight.numel() for weight in model.base.parameters()) < before


def test_a_folder_in_use_is_not_overwritten_unasked(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main([str(run), "--to", "dense", "--output", str(out)]) == 2
    assert "exists already; choose another --output, or replace it with --overwrite" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert main([str(run), "--to", "dense", "--output", str(out), "--overwrite"]) == 0
    assert (out / "mine.txt").read_text() == "mine" and (out / "model.safetensors").is_file()


def test_what_cannot_be_is_refused_by_name(copy: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        error: str = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "unknown target 'onx'; did you mean 'onnx'" in refused(str(copy), "--to", "onx")
    assert "--to" in refused(str(copy))
    assert "format: only for --to sparse" in refused(str(copy), "--to", "dense", "--format", "unstructured")
    assert "unknown format" in refused(str(copy), "--to", "sparse", "--format", "zip")
    assert "no such folder" in refused(str(copy / "nothing"), "--to", "dense")
    assert "holds no run" in refused(str(copy / "model"), "--to", "dense")
    (copy / "file").write_text("")
    assert "exists already" in refused(str(copy), "--to", "dense", "--output", str(copy / "file"))
    assert "cannot be written" in refused(str(copy), "--to", "dense", "--output", str(copy / "file" / "out"))
    (copy / "result.json").write_text("{")
    assert "result.json: damaged" in refused(str(copy), "--to", "dense")
    shutil.rmtree(copy / "model")
    assert "the run is not finished; go on with:" in refused(str(copy), "--to", "dense")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    assert "onnx: needs onnx, onnxscript, onnxruntime, not installed here; install with:  pip install" in refused(
        str(copy), "--to", "onnx"
    )


def test_logits_that_differ_write_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _, info = load_model(run / "model")
    monkeypatch.setattr(exporting, "_run", lambda model, batch: {"logits": torch.zeros(len(batch["input_ids"]), 2)})
    with pytest.raises(UserError, match=r"dense: the exported model's logits differ by .* nothing was written"):
        export(model, tokenizer, tmp_path / "out", "dense", info=info)
    assert not (tmp_path / "out").exists()


def test_help_loads_nothing_heavy() -> None:
    code = "from sparsebert.export import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "import sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "onnx" in done.stdout and done.stdout.endswith("False\n")
