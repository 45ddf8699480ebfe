"""A pack of masks: what each task computes alone, in turn and in one batch; what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from sparsebert import MaskPack
from sparsebert.errors import UserError
from sparsebert.models import pack_layers
from sparsebert.models.load import load_base, model_fingerprint
from sparsebert.models.padding_free import padding_free
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.replace import put_folder
from sparsebert.models.storage import load_model, save_model
from sparsebert.models.task_model import TaskModel

# Every kind of task and head, and every part that masks can cover, in one pack.
TASKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mrpc": ({"kind": "classification", "num_labels": 2}, ("encoder",)),
    "stsb": ({"kind": "regression", "num_labels": 1, "pooling": "mean"}, ("encoder", "embeddings")),
    "squad": ({"kind": "span", "num_labels": 2}, ("embeddings",)),
    "mnli": ({"kind": "classification", "num_labels": 3, "head": "linear"}, ("encoder",)),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_run(folder: Path, base: Path, task: str, *, seed: int = 0, **changes: Any) -> Path:
    """What a finished run over a frozen base leaves: its model folder in its own folder."""
    about, masked = TASKS[task]
    pretrained, tokenizer = load_base(str(base))
    info = {"task": task, "method": "adapt_prune", "base_sha256": model_fingerprint(pretrained)}
    generator = torch.Generator().manual_seed(seed)
    matrices = prunable_matrices(pretrained, changes.pop("masked", masked))
    masks = {matrix.name: torch.rand(matrix.shape, generator=generator) > 0.4 for matrix in matrices}
    model = TaskModel(pretrained, **about, head_width=8, seed=seed)
    save_model(folder / "model", model, tokenizer, masks=masks, pattern="unstructured", info={**info, **changes})
    return folder


def batch(rows: int = 5, seq: int = 7) -> dict[str, Tensor]:
    """Random tokens; lengths fall by one a row."""
    ids = torch.randint(5, 21, (rows, seq), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(seq) < torch.arange(seq, seq - rows, -1)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": (ids % 2) * mask}


@pytest.fixture(scope="module", params=tiny.KINDS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run for each task, and a pack of them."""
    folder = tmp_path_factory.mktemp(request.param)
    base = tiny.save_checkpoint(folder / "base", request.param)
    pack = MaskPack.create(folder / "pack", base)
    for seed, task in enumerate(TASKS):
        assert pack.add(save_run(folder / task, base, task, seed=seed)) == task
    return folder


def alone(place: Path, task: str) -> TaskModel:
    """The run's own model, as it was saved."""
    return load_model(place / task / "model")[0]


def close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_task_computes_what_its_run_did(place: Path) -> None:
    pack = MaskPack.load(place / "pack")
    assert pack.tasks == tuple(sorted(TASKS)) and pack.task is None
    inputs = batch()
    for task in (*TASKS, *reversed(TASKS)):
        model = pack.switch(task)
        assert pack.task == task and isinstance(model, TaskModel)
        own = alone(place, task)
        weights = dict(own.base.named_parameters())
        for name, weight in model.base.named_parameters():
            assert torch.equal(weight, weights[name]), name
        close(pack(inputs), own(**inputs))
        close(pack(inputs, tasks=task), own(**inputs))


@torch.no_grad()
@pytest.mark.parametrize("current", [None, "stsb"])
def test_a_mixed_batch_computes_what_each_task_does_alone(place: Path, current: str | None) -> None:
    pack = MaskPack.load(place / "pack")
    pack.switch(current)
    running = {name: weight.clone() for name, weight in pack.base.named_parameters()}
    inputs = batch()
    for tasks in (["stsb", "mrpc", "squad", "mrpc", "mnli"], ["squad"] * 5, ["stsb"] * 5, ["mnli"] * 2 + ["mrpc"] * 3):
        answers = pack(inputs, tasks=tasks)
        expected = {task: alone(place, task)(**inputs) for task in set(tasks)}
        for row, task in enumerate(tasks):
            close(answers[row], {name: tensor[row] for name, tensor in expected[task].items()})
    # What is switched to still runs.
    assert pack.task == current
    for name, weight in pack.base.named_parameters():
        assert torch.equal(weight, running[name]), name


@torch.no_grad()
def test_a_mixed_batch_of_tokens_alone(place: Path) -> None:
    pack = MaskPack.load(place / "pack")
    ids = batch()["input_ids"].clamp(min=5)
    answers = pack({"input_ids": ids}, tasks=["squad", "stsb", "squad", "mnli", "mnli"])
    close(answers[1], {"logits": alone(place, "stsb")(ids[1:2])["logits"][0]})
    close(answers[0], {name: tensor[0] for name, tensor in alone(place, "squad")(ids[:1]).items()})
    assert pack({"input_ids": ids[:0]}, tasks=[]) == []


@torch.no_grad()
def test_the_base_comes_back_to_the_bit(place: Path) -> None:
    pack = MaskPack.load(place / "pack")
    inputs = batch()
    before = dict(load_base(str(place / "base"))[0].named_parameters())
    memory = {name: weight.data_ptr() for name, weight in pack.base.named_parameters()}
    pack.switch("stsb")
    assert any(not torch.equal(weight, before[name]) for name, weight in pack.base.named_parameters())
    assert pack.switch(None) is pack.base and pack.task is None
    for name, weight in pack.base.named_parameters():
        assert torch.equal(weight.view(torch.int32), before[name].view(torch.int32)), name
        assert weight.data_ptr() == memory[name], f"{name} was not written in place"
    with pytest.raises(UserError, match="no task is switched to"):
        pack(inputs)


@torch.no_grad()
def test_a_mixed_batch_without_padding(place: Path) -> None:
    pack = MaskPack.load(place / "pack")
    padding_free(pack.base)
    inputs, tasks = batch(), ["stsb", "mrpc", "squad", "mrpc", "mnli"]
    answers = pack(inputs, tasks=tasks)
    for row, task in enumerate(tasks):
        expected = {name: tensor[row] for name, tensor in alone(place, task)(**inputs).items()}
        close(answers[row], expected)
    # As many tokens as rows, but not row by row: nobody could tell the two apart.
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(RuntimeError, match="no row of padding alone"):
        pack({"input_ids": inputs["input_ids"][:2, :2], "attention_mask": mask}, tasks=["mrpc", "mnli"])


def test_a_pack_is_not_trained(place: Path) -> None:
    pack = MaskPack.load(place / "pack")
    assert not any(parameter.requires_grad for parameter in pack.parameters())
    assert not pack.train().training and not any(module.training for module in pack.modules())


@torch.no_grad()
def test_it_runs_in_bf16(place: Path) -> None:
    pack = MaskPack.load(place / "pack")
    pack.base.to(torch.bfloat16)
    inputs = batch()
    answers = pack(inputs, tasks=["mrpc", "mrpc", "mnli", "mnli", "mnli"])
    expected = alone(place, "mrpc")(**inputs)["logits"]
    assert answers[0]["logits"].dtype == torch.float32
    torch.testing.assert_close(answers[0]["logits"], expected[0], rtol=0.2, atol=0.2)
    with pytest.raises(UserError, match=r"this pack runs in torch\.bfloat16"):
        pack.add(place / "mrpc", "again")


def test_files_hold_one_bit_a_weight(place: Path) -> None:
    for task in TASKS:
        folder = place / "pack" / "tasks" / task
        assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.safetensors", "masks.safetensors"]
        tensors = load_file(folder / "masks.safetensors")
        masks = load_model(place / task / "model")[2]
        assert {name: len(bits) for name, bits in tensors.items()} == {
            name: (mask.numel() + 7) // 8 for name, mask in masks.items()
        }


# What follows does not depend on the kind of model.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one run, and a pack that refers to the base."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.save_checkpoint(folder / "base")
    save_run(folder / "run", base, "mrpc")
    MaskPack.create(folder / "pack", base, copy=False).add(folder / "run", "one")
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy of it all, the pack referring to the copied base."""
    shutil.copytree(made, tmp_path / "copy")
    about = tmp_path / "copy" / "pack" / "pack.json"
    about.write_text(about.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


def test_a_pack_may_refer_to_its_base(made: Path) -> None:
    assert sorted(path.name for path in (made / "pack").iterdir()) == ["pack.json", "tasks"]
    pack = MaskPack.load(str(made / "pack"))
    assert pack.tasks == ("one",) and "tasks: one, running: the base" in repr(pack)
    assert json.loads((made / "pack" / "pack.json").read_text())["sha256"] == model_fingerprint(str(made / "base"))


def test_the_models_own_folder_and_a_name_of_ones_own(copied: Path) -> None:
    pack = MaskPack.load(copied / "pack")
    pack.switch("one")
    for name in ("items", "v1.2"):
        assert pack.add(copied / "run" / "model", name) == name
    assert pack.tasks == ("items", "one", "v1.2") == MaskPack.load(copied / "pack").tasks
    assert pack.task == "one"
    logits = {task: pack(batch(), tasks=task)["logits"] for task in pack.tasks}
    assert torch.equal(logits["one"], logits["items"]) and torch.equal(logits["one"], logits["v1.2"])


def test_a_task_that_masks_more_is_added_to_a_running_one(copied: Path) -> None:
    pack = MaskPack.load(copied / "pack")
    pack.switch("one")
    before = pack(batch())["logits"]
    pack.add(save_run(copied / "more", copied / "base", "stsb"), "more")
    assert torch.equal(pack(batch())["logits"], before)
    pack.switch("more")
    pack.switch("one")
    assert torch.equal(pack(batch())["logits"], before)


def test_a_dense_head_on_the_frozen_base_is_a_task(copied: Path) -> None:
    base, tokenizer = load_base(str(copied / "base"))
    model = TaskModel(base, "classification", 2, head_width=8, seed=1)
    save_model(copied / "dense" / "model", model, tokenizer, masks={}, pattern="unstructured", info={"task": "cola"})
    pack = MaskPack.load(copied / "pack")
    assert pack.add(copied / "dense") == "cola"
    torch.testing.assert_close(pack(batch(), tasks="cola")["logits"], model.eval()(**batch())["logits"].detach())


@pytest.mark.parametrize("tensor", ["encoder.layer.0.output.dense.weight", "encoder.layer.1.output.LayerNorm.bias"])
def test_trained_weights_are_refused(copied: Path, tensor: str) -> None:
    model, tokenizer, masks, info = load_model(copied / "run" / "model")
    weight = model.base.get_parameter(tensor)
    with torch.no_grad():
        place = int((weight.reshape(-1) != 0).nonzero()[0])
        weight.view(-1)[place] = torch.nextafter(weight.view(-1)[place], torch.tensor(9.0))
    save_model(copied / "tuned" / "model", model, tokenizer, masks=masks, pattern=info.pop("pattern"), info=info)
    pack = MaskPack.load(copied / "pack")
    with pytest.raises(UserError, match=rf"{tensor}: 1 weights are not the base's.*--to sparse"):
        pack.add(copied / "tuned", "two")
    assert pack.tasks == ("one",) and not (copied / "pack" / "tasks" / "two").exists()


def test_runs_that_do_not_belong_are_refused(copied: Path) -> None:
    pack = MaskPack.load(copied / "pack")
    with pytest.raises(UserError, match="the pack has a task 'one' already"):
        pack.add(copied / "run", "one")
    for name in ("", "../out", ".hidden", "a/b"):
        with pytest.raises(UserError, match="name: expected letters, digits"):
            pack.add(copied / "run", name)
    with pytest.raises(UserError, match="nothing: no such folder"):
        pack.add(copied / "nothing")
    other = tiny.save_checkpoint(copied / "other", seed=1)
    with pytest.raises(UserError, match="made from another base"):
        pack.add(save_run(copied / "foreign", other, "mrpc"), "two")
    with pytest.raises(UserError, match="weights are not the base's"):
        pack.add(save_run(copied / "foreign", other, "mrpc", base_sha256=None), "two")
    smaller = tiny.save_checkpoint(copied / "smaller", "distilbert")
    with pytest.raises(UserError, match="made from another model"):
        pack.add(save_run(copied / "small", smaller, "mrpc", base_sha256=None), "two")
    assert MaskPack.load(copied / "pack").tasks == ("one",)


def test_another_base_or_masks_of_another_pack_are_refused(copied: Path) -> None:
    MaskPack.create(copied / "second", tiny.save_checkpoint(copied / "other", seed=1))
    shutil.copytree(copied / "pack" / "tasks" / "one", copied / "second" / "tasks" / "one")
    with pytest.raises(UserError, match=r"one/masks\.safetensors: masks over another base"):
        MaskPack.load(copied / "second")
    shutil.copy(copied / "other" / "model.safetensors", copied / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"base: another model than .*pack was made for"):
        MaskPack.load(copied / "pack")
    shutil.rmtree(copied / "base")
    with pytest.raises(UserError, match="there is no folder"):
        MaskPack.load(copied / "pack")


def test_folders_that_are_in_use_are_refused(copied: Path) -> None:
    with pytest.raises(UserError, match=r"in use; open it with MaskPack\.load"):
        MaskPack.create(copied / "pack", copied / "base")
    with pytest.raises(UserError, match="base: expected a new or an empty folder"):
        MaskPack.create(copied / "base", copied / "base")
    with pytest.raises(UserError, match=r"pack\.json: missing; expected a folder that MaskPack\.create made"):
        MaskPack.load(copied / "base")


@pytest.mark.parametrize("file", ["pack.json", "tasks/one/masks.safetensors", "tasks/one/head.safetensors",
                                  "tasks/one/head.json"])  # fmt: skip
def test_damaged_files_are_refused_by_name(copied: Path, file: str) -> None:
    path = copied / "pack" / file
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            MaskPack.load(copied / "pack")
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        MaskPack.load(copied / "pack")


def test_changed_numbers_are_refused(copied: Path) -> None:
    about = copied / "pack" / "pack.json"
    content = json.loads(about.read_text())
    for change, words in (({"version": 2}, "a pack of version 2"), ({"sha256": 3}, "sha256 and base should be text")):
        about.write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=words):
            MaskPack.load(copied / "pack")
    about.write_text(json.dumps(content))
    head = copied / "pack" / "tasks" / "one" / "head.safetensors"
    tensors = load_file(head)
    save_file({**tensors, "output.bias": torch.zeros(3)}, head)
    with pytest.raises(UserError, match=r"head\.safetensors: output\.bias: expected"):
        MaskPack.load(copied / "pack")


def test_a_killed_add_leaves_nothing_that_loads(copied: Path) -> None:
    tasks = copied / "pack" / "tasks"
    shutil.copytree(tasks / "one", tasks / ".two.saving-0123")
    (tasks / ".two.saving-0123" / "masks.safetensors").write_bytes(b"")
    assert MaskPack.load(copied / "pack").tasks == ("one",)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="pack: no space left on its disk"):
        put_folder(tmp_path / "pack", write, ())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        put_folder(tmp_path / "file" / "pack", lambda folder: None, ())
    assert not (tmp_path / "pack").exists()


def test_what_cannot_be_run_is_refused(made: Path) -> None:
    pack = MaskPack.load(made / "pack")
    inputs = batch(3)
    wrong: list[tuple[Any, str]] = [
        ("two", "unknown task 'two'"),
        (["one", "two", "one"], "unknown task 'two'"),
        (["one", None, "one"], "tasks: expected a name for each row"),
        (["one"], "expected one for each of 3 rows, got 1"),
    ]
    for tasks, words in wrong:
        with pytest.raises(UserError, match=words):
            pack(inputs, tasks=tasks)
    with pytest.raises(UserError, match="unknown task 'two'"):
        pack.switch("two")
    with pytest.raises(UserError, match="unknown input 'labels'"):
        pack({**inputs, "labels": torch.zeros(3)}, tasks="one")
    with pytest.raises(UserError, match="batch: expected input_ids"):
        pack({"attention_mask": inputs["attention_mask"]}, tasks="one")
    assert pack.task is None


def test_an_interrupted_switch_leaves_no_task_running(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = MaskPack.load(made / "pack")
    pack.switch("one")

    def stop(weights: Any, bits: Any, out: Sequence[Tensor]) -> None:
        out[0].zero_()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pack_layers, "masked_weights", stop)
        with pytest.raises(KeyboardInterrupt):
            pack.switch("one")
        assert pack.task is None
    before = copy.deepcopy(dict(load_base(str(made / "base"))[0].named_parameters()))
    base = pack.switch(None)
    assert isinstance(base, nn.Module)
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
