"""save_model and load_model: what is kept, what is refused, and that a save is whole or nothing."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from sparsebert.errors import UserError
from sparsebert.models.load import base_label_map
from sparsebert.models.prunable import prunable_matrices, sparsity_report
from sparsebert.models.storage import load_model, save_model
from sparsebert.models.task_model import HEADS, TaskModel

IDS = torch.tensor([[2, 5, 9, 7, 3], [2, 6, 3, 0, 0]])
INFO = {"method": "random", "seed": 3, "metrics": {"accuracy": 0.5}}
QUERY = "encoder.layer.0.attention.self.query"
TYPES = "embeddings.token_type_embeddings"


def random_masks(base: Any, density: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = ("encoder", "embeddings") if base.pooler is None else ("encoder", "embeddings", "pooler")
    return {m.name: torch.rand(m.shape, generator=generator) < density for m in prunable_matrices(base, words)}


def task_model(tiny: Any, seed: int = 0, **options: Any) -> TaskModel:
    arguments = {"kind": "classification", "num_labels": 3, "head_width": 6, "seed": seed, **options}
    return TaskModel(tiny.base(seed=seed), **arguments).eval()


@pytest.fixture
def saved(tmp_path: Path, tiny: Any) -> Path:
    model = task_model(tiny, label_names=("no", "maybe", "yes"))
    save_model(
        tmp_path / "m", model, tiny.tokenizer(), masks=random_masks(model.base), pattern="unstructured", info=INFO
    )
    return tmp_path / "m"


def rewrite(
    path: Path, change: Callable[[dict[str, Tensor]], None], about: Callable[[dict[str, Any]], None] | None = None
) -> None:
    """Alters a safetensors file's tensors and, for masks, its metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors)
    if about is not None:
        content = json.loads(metadata["sparsebert"])
        about(content)
        metadata["sparsebert"] = json.dumps(content)
    save_file(tensors, path, metadata=metadata)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("pooler", [True, False])
def test_saved_base_is_a_plain_checkpoint(tmp_path: Path, tiny: Any, kind: str, pooler: bool) -> None:
    base = tiny.base(kind)
    if kind != "distilbert" and not pooler:
        base.pooler = None
    if kind == "distilbert":
        words = ("encoder", "embeddings")
        masks = {m.name: torch.rand(m.shape) < 0.5 for m in prunable_matrices(base, words)}
    else:
        masks = random_masks(base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = TaskModel(base, "classification", 2, seed=0)
    save_model(tmp_path / "m", model, tiny.tokenizer(), masks=masks, pattern="unstructured", info={})
    plain = AutoModel.from_pretrained(tmp_path / "m").state_dict()
    for name, tensor in before.items():
        mask = masks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if mask is None:
            assert torch.equal(plain[name], tensor), name
        else:
            assert torch.equal(plain[name][mask], tensor[mask])
            pruned = plain[name][~mask]
            assert (pruned == 0).all() and not torch.signbit(pruned).any()
        # Saving must not prune the model in hand.
        assert torch.equal(base.state_dict()[name], tensor)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("the film")["input_ids"] == [2, 9, 7, 3]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == [type(base).__name__]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("task", ["classification", "regression", "span"])
def test_round_trip(tmp_path: Path, tiny: Any, task: str, head: str) -> None:
    model = task_model(tiny, kind=task, head=head, pooling="mean")
    masks = random_masks(model.base)
    save_model(tmp_path, model, tiny.tokenizer(), masks=masks, pattern="2:4", info=INFO)
    again, tokenizer, loaded, info = load_model(tmp_path)
    assert info == {**INFO, "pattern": "2:4"}
    assert list(loaded) == [m.name for m in prunable_matrices(again.base, ("encoder", "embeddings", "pooler"))]
    assert all(torch.equal(loaded[name], mask) and loaded[name].dtype == torch.bool for name, mask in masks.items())
    assert (again.kind, again.head_kind, again.pooling, again.head_width) == (task, head, "mean", 6)
    assert not again.training and len(tokenizer) == len(tiny.tokenizer())
    with torch.no_grad():
        for name, mask in masks.items():
            model.base.get_parameter(f"{name}.weight").masked_fill_(~mask, 0.0)
        for key, value in model(input_ids=IDS).items():
            assert torch.equal(again(input_ids=IDS)[key], value)
    assert sparsity_report(again.base, loaded) == sparsity_report(model.base, masks)


def test_dense_model_and_label_names(tmp_path: Path, tiny: Any) -> None:
    model = task_model(tiny, label_names=("no", "maybe", "yes"))
    save_model(tmp_path, model, tiny.tokenizer(), masks={}, pattern="dense", info={})
    again, _, masks, _ = load_model(tmp_path)
    assert masks == {}
    assert again.label_names == ("no", "maybe", "yes")
    assert base_label_map(again.base) == {"no": 0, "maybe": 1, "yes": 2}
    assert all(torch.equal(t, model.base.state_dict()[n]) for n, t in again.base.state_dict().items())


def test_nan_and_negative_weights_that_are_pruned_become_zero(tmp_path: Path, tiny: Any) -> None:
    model = task_model(tiny)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[0] = False
    with torch.no_grad():
        model.base.get_parameter(f"{QUERY}.weight")[0] = torch.tensor([math.nan, math.inf, -1, -0.0, 1, 2, 3, 4])
    save_model(tmp_path, model, tiny.tokenizer(), masks={QUERY: mask}, pattern="unstructured", info={})
    row = load_model(tmp_path)[0].base.get_parameter(f"{QUERY}.weight")[0]
    assert (row == 0).all() and not torch.signbit(row).any()


def test_state_that_training_puts_beside_the_weights_is_left_out(tmp_path: Path, tiny: Any) -> None:
    class Masked(nn.Linear):
        """Holds what a module in training does: scores, bits, and the same `weight` and `bias`."""

        def __init__(self, of: nn.Linear) -> None:
            super().__init__(of.in_features, of.out_features)
            self.weight, self.bias = of.weight, of.bias
            self.scores = nn.Parameter(torch.zeros_like(of.weight))
            self.register_buffer("bits", torch.zeros(8, dtype=torch.uint8))

    model = task_model(tiny)
    attention = model.base.encoder.layer[0].attention.self
    attention.query = Masked(attention.query)
    mask = torch.rand(8, 8) < 0.5
    save_model(tmp_path, model, tiny.tokenizer(), masks={QUERY: mask}, pattern="unstructured", info={})
    assert load_file(tmp_path / "model.safetensors").keys() == tiny.base().state_dict().keys()
    assert torch.equal(load_model(tmp_path)[2][QUERY], mask)


def test_equal_models_give_equal_files(tmp_path: Path, tiny: Any) -> None:
    for name in "ab":
        model = task_model(tiny)
        masks = dict(reversed(random_masks(model.base).items())) if name == "b" else random_masks(model.base)
        save_model(tmp_path / name, model, tiny.tokenizer(), masks=masks, pattern="2:4", info=INFO)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_masks_take_one_bit_a_weight(saved: Path) -> None:
    bits = load_file(saved / "masks.safetensors")
    base = load_model(saved)[0].base
    assert {name: tuple(tensor.shape) for name, tensor in bits.items()} == {
        m.name: ((m.shape[0] * m.shape[1] + 7) // 8,)
        for m in prunable_matrices(base, ("encoder", "embeddings", "pooler"))
    }
    assert {tensor.dtype for tensor in bits.values()} == {torch.uint8}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({QUERY: torch.ones(8, 7, dtype=torch.bool)}, r"expected bool \(8, 8\), got torch.bool \(8, 7\)"),
        ({QUERY: torch.ones(8, 8)}, "got torch.float32"),
        ({"encoder.layer.7.output.dense": torch.ones(8, 12, dtype=torch.bool)}, "no prunable matrix"),
        ({"embeddings.LayerNorm": torch.ones(8, dtype=torch.bool)}, "no prunable matrix"),
    ],
)
def test_masks_that_do_not_fit_are_not_saved(tmp_path: Path, tiny: Any, masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "m", task_model(tiny), tiny.tokenizer(), masks=masks, pattern="2:4", info={})
    assert not any(tmp_path.iterdir())


def test_info_that_is_not_json(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(ValueError, match="info: expected what JSON can hold"):
        save_model(
            tmp_path / "m", task_model(tiny), tiny.tokenizer(), masks={}, pattern="dense", info={"x": torch.zeros(1)}
        )
    save_model(tmp_path / "m", task_model(tiny), tiny.tokenizer(), masks={}, pattern="dense", info={"loss": math.nan})
    assert math.isnan(load_model(tmp_path / "m")[3]["loss"])


def test_pattern_is_a_name(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(TypeError, match="pattern: expected the name of a sparsity pattern, got None"):
        save_model(tmp_path / "m", task_model(tiny), tiny.tokenizer(), masks={}, pattern=None, info={})  # type: ignore


def tamper_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


@pytest.mark.parametrize(
    ("change", "about", "message"),
    [
        (tamper_tensor(QUERY, lambda b: b[:-1].clone()), None, rf"{QUERY}: expected uint8 \[8\] for 64 weights"),
        (tamper_tensor(QUERY, lambda b: b.to(torch.int16)), None, rf"{QUERY}: expected uint8"),
        (tamper_tensor(QUERY, lambda b: b.view(2, 4)), None, rf"{QUERY}: expected uint8"),
        (tamper_tensor(QUERY, torch.zeros_like), None, rf"{QUERY}\.weight: \d+ weights that the mask prunes"),
        (lambda t: t.pop(QUERY), None, f"{QUERY}' is only in one"),
        (lambda t: t.update(x=torch.zeros(1, dtype=torch.uint8)), None, "'x' is only in one"),
        (
            lambda t: t.update(x=torch.zeros(1, dtype=torch.uint8)),
            lambda a: a["shapes"].update(x=[1, 1]),
            "'x' is no prunable matrix",
        ),
        (lambda t: None, lambda a: a["shapes"].update({QUERY: [4, 16]}), rf"{QUERY}: mask of shape \[4, 16\]"),
        (lambda t: None, lambda a: a["shapes"].update({QUERY: "8,8"}), f"{QUERY}: mask of shape 8,8"),
        (lambda t: None, lambda a: a.update(version=2), "format version 2"),
        (lambda t: None, lambda a: a.update(pattern=None), "expected 'pattern' to be str"),
        (lambda t: None, lambda a: a.update(shapes=[]), "expected 'shapes' to be dict"),
        (lambda t: None, lambda a: a.pop("fingerprint"), "expected 'fingerprint' to be str"),
        (lambda t: None, lambda a: a.update(fingerprint="0" * 64), "not the weights that"),
    ],
)
def test_altered_masks_are_refused(saved: Path, change: Any, about: Any, message: str) -> None:
    rewrite(saved / "masks.safetensors", change, about or (lambda a: None))
    with pytest.raises(UserError, match=message) as caught:
        load_model(saved)
    assert "safetensors" in str(caught.value)


def test_a_single_cleared_mask_bit_is_found(saved: Path) -> None:
    kept = int(load_model(saved)[2][QUERY].view(-1).nonzero()[0])

    def clear(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY][kept // 8] ^= 1 << kept % 8

    rewrite(saved / "masks.safetensors", clear)
    with pytest.raises(UserError, match=rf"model\.safetensors: {QUERY}\.weight: 1 weights"):
        load_model(saved)


def test_a_single_changed_weight_is_found(saved: Path) -> None:
    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["embeddings.LayerNorm.bias"][0] += 1

    rewrite(saved / "model.safetensors", nudge)
    with pytest.raises(UserError, match=r"model\.safetensors: not the weights"):
        load_model(saved)


def test_weights_where_the_mask_says_zero(saved: Path) -> None:
    def fill(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QUERY}.weight"].fill_(1.0)

    rewrite(saved / "model.safetensors", fill)
    with pytest.raises(UserError, match=rf"{QUERY}\.weight: \d+ weights that the mask prunes are not 0"):
        load_model(saved)


@pytest.mark.parametrize("name", ["head.json", "head.safetensors", "masks.safetensors"])
def test_missing_and_damaged_parts(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_model(saved)
    (saved / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        load_model(saved)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "gone")
    (tmp_path / ".gone.previous").mkdir()
    with pytest.raises(UserError, match=r"cut off, and the model before it lies in .*\.gone\.previous"):
        load_model(tmp_path / "gone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "unknown kind of task"),
        ({"head": "linear"}, "is only in one of"),
        ({"pooling": "max"}, "unknown pooling"),
        ({"num_labels": 10**12}, r"output\.weight is \[3, 6\], but head\.json says num_labels 1000000000000"),
        ({"head_width": 10**12}, r"dense\.weight is \[6, 8\], but head\.json says head_width"),
        ({"head_width": "6"}, "expected 'head_width' to be int"),
        ({"label_names": ["a"]}, "expected 3 names"),
        ({"info": []}, "expected 'info' to be dict"),
        ({"version": 9}, "format version 1"),
    ],
)
def test_altered_description_of_the_head(saved: Path, change: dict[str, Any], message: str) -> None:
    about = json.loads((saved / "head.json").read_text())
    (saved / "head.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(UserError, match=message):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(mix=torch.zeros(4)), r"mix: expected torch.float32 \[3\], got torch.float32 \[4\]"),
        (lambda t: t.update(mix=torch.zeros(3, dtype=torch.float64)), "mix: expected torch.float32"),
        (lambda t: t.update(mix=torch.full((3,), math.nan)), "mix holds NaN"),
        (lambda t: t.pop("gamma"), "'gamma' is only in one"),
    ],
)
def test_altered_head(saved: Path, change: Any, message: str) -> None:
    rewrite(saved / "head.safetensors", change)
    with pytest.raises(UserError, match=message):
        load_model(saved)


@pytest.mark.parametrize("part", ["model.safetensors", "head.json", "masks.safetensors"])
def test_full_disk_leaves_the_old_model(saved: Path, tiny: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(saved)
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == part:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    model = task_model(tiny, seed=1)
    with pytest.raises(UserError, match=r"no space left.*needs [\d,]+ bytes") as caught:
        save_model(saved, model, tiny.tokenizer(), masks={}, pattern="dense", info={})
    assert str(saved) in str(caught.value)
    assert snapshot(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["m"]
    with pytest.raises(UserError, match="no space left"):
        save_model(saved.parent / "new", model, tiny.tokenizer(), masks={}, pattern="dense", info={})
    assert [path.name for path in saved.parent.iterdir()] == ["m"]


def test_full_disk_while_the_tokenizer_writes(saved: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(saved)
    tokenizer = tiny.tokenizer()

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match="no space left"):
        save_model(saved, task_model(tiny, seed=1), tokenizer, masks={}, pattern="dense", info={})
    assert snapshot(saved) == before


def test_folders_that_cannot_be_written(tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "file").write_text("x")
    arguments = {"masks": {}, "pattern": "dense", "info": {}}
    with pytest.raises(UserError, match="but it is a file"):
        save_model(tmp_path / "file", task_model(tiny), tiny.tokenizer(), **arguments)
    with pytest.raises(UserError, match="cannot save the model there"):
        save_model(tmp_path / "file" / "m", task_model(tiny), tiny.tokenizer(), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_second_save_replaces_the_model_and_keeps_other_files(saved: Path, tiny: Any) -> None:
    (saved / "README.md").write_text("mine")
    (saved / "vocab.txt").write_text("of an older tokenizer")
    model = task_model(tiny, seed=1)
    save_model(saved, model, tiny.tokenizer(), masks={}, pattern="dense", info={})
    again, _, masks, info = load_model(saved)
    assert masks == {} and info == {"pattern": "dense"}
    assert torch.equal(again.head.output.weight, model.head.output.weight)
    assert (saved / "README.md").read_text() == "mine"
    assert not (saved / "vocab.txt").exists()
