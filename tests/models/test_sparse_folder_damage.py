"""Sparse folders that are foreign, damaged or forged: refused by name, or a valid model; never a crash or a great
amount of memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models.sparse_models import FORMATS, outputs, sparse_model, task_model
from safetensors.torch import load, save
from torch import Tensor

from sparsebert import AutoSparseModel, save_sparse
from sparsebert.errors import UserError

WEIGHTS = "model.safetensors"
QUERY = "bert.encoder.layer.0.attention.self.query"
ODD = [0, -1, 1, 2, 7, 255, 2**31, 2**40, 2**63, 10**30, 1e308, -0.5, True, None, "1", [], {}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sparse_model().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> None:
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    change(content)
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def sign(files: dict[str, bytes]) -> None:
    """Makes sizes and hashes in config.json those of the files, as a forger would."""
    config = json.loads(files["config.json"])
    for name, about in config["sparsebert"]["files"].items():
        content = files[name]
        about.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        if name == WEIGHTS:
            header = content[: 8 + int.from_bytes(content[:8], "little")]
            about["header_sha256"] = hashlib.sha256(header).hexdigest()
    files["config.json"] = json.dumps(config).encode()


def forge(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors, and signs."""
    tensors = load((folder / WEIGHTS).read_bytes())
    change(tensors)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files[WEIGHTS] = save(tensors, metadata={"format": "pt"})
    sign(files)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        AutoSparseModel.from_pretrained(folder, **options)
    return str(caught.value)


def test_foreign_folders_are_named(tmp_path: Path, folder: Path) -> None:
    assert "directory: expected a folder" in refusal(tmp_path / "nowhere")
    assert "no config.json" in refusal(tmp_path)
    plain = tiny.save_checkpoint(tmp_path / "plain")
    assert f"{plain}: not a sparse model's folder" in refusal(plain)
    (plain / "config.json").write_text("[]")
    assert "not a model's configuration" in refusal(plain)
    (plain / "config.json").write_text("{")
    assert "not readable as JSON" in refusal(plain)
    (plain / "config.json").write_text("[" * 100_000)
    assert "not readable as JSON" in refusal(plain)
    (plain / "config.json").write_text('{"model_type": "gpt2"}')
    assert "unknown model type 'gpt2'" in refusal(plain)
    assert "format: only for a run" in refusal(folder, format="unstructured")
    assert "rows: only for a run" in refusal(folder, rows=(1,))
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "a pickle" in refusal(folder)


def test_a_newer_version_is_named(folder: Path) -> None:
    edit(folder, lambda config: config["sparsebert"].update(format_version=2))
    assert "format version 2; this sparsebert reads 1; a newer one may read it" in refusal(folder)
    edit(folder, lambda config: config.update(sparsebert=7))
    assert "format version None" in refusal(folder)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, length: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:length])
    assert WEIGHTS in refusal(folder) and "truncated" in refusal(folder)


def test_altered_bytes_are_found(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[20] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert "truncated or damaged" in refusal(folder) or "header is not the one" in refusal(folder)
    content[20] ^= 1
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + 4000] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert "not the content that it was saved with" in refusal(folder, verify=True)


def test_altered_configurations_are_named(folder: Path) -> None:
    original = (folder / "config.json").read_bytes()
    for change, words in (
        (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but model.safetensors has 2"),
        (lambda c: c.update(hidden_size=10**12), "hidden_size is 1000000000000, but no side of a tensor"),
        (lambda c: c.update(max_position_embeddings=10**15), "max_position_embeddings is"),
        (lambda c: c.update(num_labels=10**12), "num_labels is"),
        (lambda c: c.update(vocab_size=23), r"bert.embeddings.word_embeddings.weight: expected float \[23, 16\]"),
        (lambda c: c.update(intermediate_size=16), r"the saved weight is \[32, 16\], the layer's \[16, 16\]"),
        (lambda c: c.update(num_attention_heads=3), "no model can be built"),
        (lambda c: c.update(hidden_act="nonsense"), "no model can be built"),
        (lambda c: c.update(architectures=["BertConfig"]), "expected a bert model of transformers, got 'BertConfig'"),
        (lambda c: c.update(architectures=["os"]), "expected a bert model of transformers, got 'os'"),
        (lambda c: c.update(architectures=[]), "expected one name in 'architectures'"),
        (lambda c: c.update(architectures=["BertModel"]), "is no linear layer of the model"),
        (lambda c: c.update(is_decoder=True), "a decoder or a quantised model"),
        (lambda c: c["sparsebert"]["modules"].pop(QUERY), "a sparse layer only in one of it and config.json"),
        (lambda c: c["sparsebert"]["modules"][QUERY].update(stored=1), "but config.json says"),
        (lambda c: c["sparsebert"]["files"].update({"../x": {}}), "unexpected entry '../x'"),
        (lambda c: c["sparsebert"].update(tied=[]), "expected 'tied' to be an object"),
        (lambda c: c["sparsebert"].update(files={}), "which is not all of them"),
        (lambda c: c.update(per_layer_config={"0": {"hidden_size": 4}}), "'hidden_size' cannot differ"),
        (lambda c: c.update(per_layer_config={"0": {"intermediate_size": -4}}), "intermediate_size to be 1 or more"),
        (lambda c: c.update(per_layer_config={"7": {"intermediate_size": 4}}), "not a usable configuration"),
        (lambda c: c.update(per_layer_config={"0": {"intermediate_size": 10**17}}), "the saved weight is"),
    ):
        (folder / "config.json").write_bytes(original)
        edit(folder, change)
        with pytest.raises(UserError, match=words):
            AutoSparseModel.from_pretrained(folder)
    (folder / "config.json").write_bytes(original)
    edit(folder, lambda c: c.update(attn_implementation="someone/kernel", auto_map={"AutoModel": "x.Y"}))
    assert AutoSparseModel.from_pretrained(folder).config._attn_implementation == "sdpa"


def put(name: str, place: int, value: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QUERY}.{name}"] = tensors[f"{QUERY}.{name}"].clone()
        tensors[f"{QUERY}.{name}"][place] = value

    return change


def test_forged_tensors_are_named(folder: Path) -> None:
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    norm = "bert.embeddings.LayerNorm.weight"
    for change, words in (
        (put("offsets", 0, 200), f"{QUERY}.offsets: expected less than the columns"),
        (put("rows", 0, 99), f"{QUERY}.rows: expected"),
        (put("counts", -1, 17), f"{QUERY}.counts: expected"),
        (put("layout", 0, 2), f"{QUERY}.layout: expected version 1, got 2"),
        (put("layout", 4, 2**40), "the saved weight is"),
        (lambda t: t.pop(f"{QUERY}.rows"), f"{QUERY}.rows: missing; unstructured needs it"),
        (lambda t: t.pop(f"{QUERY}.bias"), f"{QUERY}.bias: missing"),
        (lambda t: t.pop(norm), f"{norm}: missing, though the model has it"),
        (lambda t: t.update(more=torch.zeros(1)), "more: is no tensor of the model"),
        (lambda t: t.update({norm: torch.zeros(16, dtype=torch.int64)}), f"{norm}: expected float"),
        (lambda t: t.update({f"{QUERY}.bias": torch.zeros(16).half()}), "bias: expected"),
    ):
        for name, content in original.items():
            (folder / name).write_bytes(content)
        forge(folder, change)
        with pytest.raises(UserError, match=words) as caught:
            AutoSparseModel.from_pretrained(folder)
        assert WEIGHTS in str(caught.value)


def test_a_false_tie_is_named(tmp_path: Path) -> None:
    sparse_model(head="ForMaskedLM").save_pretrained(tmp_path)
    tied = "cls.predictions.decoder.weight"
    edit(tmp_path, lambda c: c["sparsebert"]["tied"].update({tied: "bert.embeddings.LayerNorm.weight"}))
    assert f"{tied} is said to be tied to 'bert.embeddings.LayerNorm.weight', which does not fit" in refusal(tmp_path)


def leaves(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every number and word in JSON, as (holder, key)."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        if isinstance(content[key], (dict, list)):
            yield from leaves(content[key])
        else:
            yield content, key


def change_json(text: bytes, rng: random.Random) -> bytes:
    content = json.loads(text)
    holder, key = rng.choice([place for place in leaves(content) if place[1] != "transformers_version"])
    old = holder[key]
    near = [old + 1, old * 2, old // 2 - 1] if isinstance(old, int) else []
    holder[key] = rng.choice(near + ODD)
    return json.dumps(content).encode()


def mutated(files: dict[str, bytes], other: dict[str, bytes], rng: random.Random) -> str:
    """Damages a folder's files in one way, in place; which way."""
    way = rng.choice(["flip", "flip header", "cut", "grow", "swap", "number", "header number", "index", "lose"])
    name = rng.choice([name for name in files if name != "tokenizer.json"])
    content = bytearray(files[name])
    header = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    if way == "flip":
        for _ in range(rng.choice([1, 1, 8])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        files[name] = bytes(content)
    elif way == "flip header":
        content = bytearray(files[WEIGHTS])
        content[rng.randrange(header)] ^= 1 << rng.randrange(8)
        files[WEIGHTS] = bytes(content)
    elif way == "cut":
        files[name] = bytes(content[: rng.randrange(len(content))])
    elif way == "grow":
        files[name] = bytes(content) + rng.randbytes(rng.randrange(1, 100))
    elif way == "swap":
        files[name] = rng.choice([*other.values(), *files.values()])
    elif way == "number":
        name = rng.choice([name for name in files if name.endswith(".json")])
        files[name] = change_json(files[name], rng)
    elif way == "header number":
        changed = change_json(files[WEIGHTS][8:header], rng)
        files[WEIGHTS] = struct.pack("<Q", len(changed)) + changed + files[WEIGHTS][header:]
    elif way == "index":
        tensors = load(files[WEIGHTS])
        tensor = tensors[rng.choice([name for name, tensor in tensors.items() if not tensor.is_floating_point()])]
        if tensor.numel():
            info = torch.iinfo(tensor.dtype)
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([info.min, 0, 1, 3, 17, info.max])
        files[WEIGHTS] = save(tensors, metadata={"format": "pt"})
    else:
        del files[name]
    return way


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """The files of one folder for each format, some with another head or of another kind."""
    found = []
    for index, format in enumerate(FORMATS):
        folder = tmp_path_factory.mktemp("whole")
        if index % 2:
            save_sparse(task_model(("bert", "roberta", "distilbert")[index // 2], format), folder)
        else:
            head = ("ForMaskedLM", "Model", "ForQuestionAnswering")[index // 2]
            save_sparse(sparse_model(head=head, format=format), folder)
        found.append(read(folder))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_fifty_mutated_copies(tmp_path: Path, folders: list[dict[str, bytes]], seed: int) -> None:
    rng = random.Random(seed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(50):
        whole, other = rng.sample(folders, 2)
        files = dict(whole)
        way = mutated(files, other, rng)
        if rng.random() < 0.6:
            # Without the right hashes the checks behind them would never be reached. What cannot be read stays so.
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                sign(files)
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            model = AutoSparseModel.from_pretrained(folder, verify=rng.random() < 0.2)
        except ValueError as error:
            refused += 1
            assert str(error), way
            continue
        check_valid(model, way)
    assert refused >= 15
    # Kilobytes on Linux.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024


def check_valid(model: Any, way: str) -> None:
    """It runs; only a block of the feed-forward, which a configuration may choose freely, can be of a wrong size."""
    assert not any(tensor.is_meta for tensor in model.state_dict().values()), way
    base = getattr(model, "base", model)
    if base.config.chunk_size_feed_forward == 0:
        assert all(isinstance(tensor, Tensor) for tensor in outputs(model)), way
