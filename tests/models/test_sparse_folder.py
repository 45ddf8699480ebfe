"""Sparse folders: what is saved comes back bit for bit, of every model and format, without a dense weight."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from models.sparse_models import FORMATS, HEADS, IDS, outputs, plain_model, same, sparse_model, task_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BertModel, GPT2Config, GPT2Model

import sparsebert
from sparsebert import AutoSparseModel, SparseLinear, save_sparse, sparsify
from sparsebert.errors import UserError
from sparsebert.formats import Format
from sparsebert.models.load import model_fingerprint
from sparsebert.models.padding_free import padding_free
from sparsebert.models.prunable import prunable_matrices
from sparsebert.models.storage import save_model
from sparsebert.models.task_model import TaskModel
from sparsebert.nn import MaskedEmbedding, MaskedLinear
from sparsebert.ops.bits import pack_bits


def section(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["sparsebert"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_head_comes_back_bit_for_bit(tmp_path: Path, kind: str, head: str) -> None:
    model = sparse_model(kind, head)
    model.save_pretrained(tmp_path / "m")
    again = AutoSparseModel.from_pretrained(tmp_path / "m")
    assert same(again, model) and not again.training
    assert len(again.sparsification.replaced) == 12 and "as saved" in str(again.sparsification)
    # What was loaded is saved again, to the same weights.
    again.save_pretrained(tmp_path / "n")
    assert (tmp_path / "n/model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_back_bit_for_bit(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    model = sparse_model(format=format).to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoSparseModel.from_pretrained(tmp_path, verify=True)
    assert same(again, model) and again.dtype == dtype == again.config.dtype
    layer = again.bert.encoder.layer[0].output.dense
    assert isinstance(layer, SparseLinear) and layer.format == format
    assert layer.values.requires_grad == layer.exact
    name = "bert.encoder.layer.0.output.dense"
    assert section(tmp_path)["modules"][name] == {"format": format, "shape": [16, 32], "stored": layer.values.numel()}


@pytest.mark.parametrize("task", ["classification", "regression", "span"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_task_model_comes_back_with_its_head(tmp_path: Path, task: str, head: str) -> None:
    model = task_model(kind=task, head=head, label_names=("no", "maybe", "yes") if task == "classification" else ())
    save_sparse(model, tmp_path, tiny.tokenizer())
    state = torch.get_rng_state()
    again = AutoSparseModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(again, model) and (again.kind, again.label_names) == (task, model.label_names)
    assert AutoTokenizer.from_pretrained(tmp_path)("the film")["input_ids"] == tiny.tokenizer()("the film")["input_ids"]
    again.save_pretrained(tmp_path / "again")
    assert same(AutoSparseModel.from_pretrained(tmp_path / "again"), model)


def test_a_tied_decoder_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    sparse_model(head="ForMaskedLM").save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "bert.embeddings.word_embeddings.weight" in names and "cls.predictions.decoder.weight" not in names
    again = AutoSparseModel.from_pretrained(tmp_path)
    assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
    assert again.cls.predictions.decoder.bias is again.cls.predictions.bias


def test_no_dense_weight_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_model().save_pretrained(tmp_path)
    for kind in (Format, *Format.__subclasses__()):
        monkeypatch.setattr(kind, "to_dense", lambda self: pytest.fail("a dense weight was made"))
        monkeypatch.setattr(kind, "from_dense", lambda *given, **more: pytest.fail("a dense weight was made"))
    sizes: list[int] = []
    real = nn.Parameter.__new__

    def seen(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        if data is not None and not data.is_meta:
            sizes.append(data.numel())
        return real(cls, data, requires_grad)

    monkeypatch.setattr(nn.Parameter, "__new__", seen)
    AutoSparseModel.from_pretrained(tmp_path)
    # The largest are the embeddings' 24 x 16; a layer's dense weight has 512.
    assert max(sizes) == 24 * 16


def test_what_is_loaded_trains_copies_and_skips_padding(tmp_path: Path) -> None:
    model = sparse_model()
    model.save_pretrained(tmp_path)
    again = AutoSparseModel.from_pretrained(tmp_path)
    assert same(copy.deepcopy(again), model)
    layer = again.bert.encoder.layer[0].attention.self.query
    before = layer.values.detach().clone()
    step = torch.optim.SGD(again.train().parameters(), lr=0.1)
    again(IDS, labels=torch.tensor([0, 1])).loss.backward()
    step.step()
    assert not torch.equal(layer.values, before)
    # A mapped file is never written to.
    assert same(AutoSparseModel.from_pretrained(tmp_path, verify=True), model)
    fast = padding_free(copy.deepcopy(model))
    save_sparse(fast, tmp_path)
    assert same(AutoSparseModel.from_pretrained(tmp_path), model)
    torch.testing.assert_close(outputs(fast)[0], outputs(model)[0], rtol=1e-4, atol=1e-4)


def test_loading_can_cast_and_choose_the_attention(tmp_path: Path) -> None:
    sparse_model().save_pretrained(tmp_path)
    again = AutoSparseModel.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert again.dtype == torch.bfloat16 and again.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="unknown attn_implementation 'kernels/flash'"):
        AutoSparseModel.from_pretrained(tmp_path, attn_implementation="kernels/flash")


def test_where_a_model_comes_from_is_kept(tmp_path: Path) -> None:
    base = tiny.save_checkpoint(tmp_path / "pretrained")
    model = sparse_model()
    save_sparse(model, tmp_path / "m", pattern="block:4x2", base_model=base)
    origin = {"name": str(base), "sha256": model_fingerprint(base)}
    again = AutoSparseModel.from_pretrained(tmp_path / "m")
    assert again.provenance == {"pattern": "block:4x2", "base_model": origin}
    again.save_pretrained(tmp_path / "n")
    assert section(tmp_path / "n")["base_model"] == origin and section(tmp_path / "n")["pattern"] == "block:4x2"
    # A model of transformers says where it was loaded from.
    loaded = sparsify(BertModel.from_pretrained(base), format="unstructured", min_sparsity=0)
    loaded.save_pretrained(tmp_path / "o")
    assert section(tmp_path / "o")["base_model"] == origin
    model.save_pretrained(tmp_path / "p", base_model="bert-base-uncased", base_sha256="00")
    assert section(tmp_path / "p")["base_model"] == {"name": "bert-base-uncased", "sha256": "00"}


def save_run(folder: Path, kind: str = "bert") -> TaskModel:
    """A finished run's folder, as far as loading a model looks at it."""
    base = tiny.base(kind)
    generator = torch.Generator().manual_seed(0)
    masks = {m.name: torch.rand(m.shape, generator=generator) < 0.3 for m in prunable_matrices(base)}
    with torch.no_grad():
        for name, mask in masks.items():
            base.get_parameter(f"{name}.weight").mul_(mask)
    model = TaskModel(base, "classification", 3, head_width=6, seed=0).eval()
    info = {"method": "random", "base_model": "a-model", "base_sha256": "12"}
    save_model(folder / "model", model, tiny.tokenizer(), masks=masks, pattern="unstructured", info=info)
    return model


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_run_is_sparsified_when_it_is_loaded(tmp_path: Path, kind: str) -> None:
    model = save_run(tmp_path, kind)
    for folder in (tmp_path, tmp_path / "model"):
        again = AutoSparseModel.from_pretrained(folder, format="unstructured")
        assert isinstance(again, TaskModel) and len(again.sparsification.replaced) == 12
        torch.testing.assert_close(outputs(again)[0], outputs(model)[0], rtol=1e-5, atol=1e-5)
    assert again.provenance["pattern"] == "unstructured" and again.provenance["info"]["method"] == "random"
    again.save_pretrained(tmp_path / "sparse")
    stored = AutoSparseModel.from_pretrained(tmp_path / "sparse")
    assert same(stored, again) and stored.provenance == again.provenance
    assert stored.provenance["base_model"] == {"name": "a-model", "sha256": "12"}
    half = AutoSparseModel.from_pretrained(tmp_path, format="blocks:4x2", dtype=torch.bfloat16, min_sparsity=0.1)
    assert half.base.dtype == torch.bfloat16 and half.head.output.weight.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    assert same(AutoSparseModel.from_pretrained(tmp_path / "half"), half)


def test_files_of_the_users_are_kept_and_an_old_model_is_not(tmp_path: Path) -> None:
    save_sparse(task_model(), tmp_path, tiny.tokenizer())
    (tmp_path / "notes.txt").write_text("mine")
    model = sparse_model()
    save_sparse(model, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt", "tokenizer.json", "tokenizer_config.json"}
    assert same(AutoSparseModel.from_pretrained(tmp_path), model)
    # Over the folder that the model itself is mapped from.
    again = AutoSparseModel.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert same(AutoSparseModel.from_pretrained(tmp_path), model) and same(again, model)


def test_layers_that_are_masked_still_become_ordinary_ones(tmp_path: Path) -> None:
    model = sparse_model()
    embeddings, pooler = model.bert.embeddings, model.bert.pooler
    masks = {"table": torch.rand(24, 16) < 0.5, "dense": torch.rand(16, 16) < 0.5}
    words = embeddings.word_embeddings
    embeddings.word_embeddings = MaskedEmbedding(words, pack_bits(masks["table"]), (24, 16), torch.float32)
    pooler.dense = MaskedLinear(pooler.dense, pack_bits(masks["dense"]), (16, 16), torch.float32)
    before = pooler.dense.weight.detach().clone()
    save_sparse(model, tmp_path)
    assert torch.equal(pooler.dense.weight, before)
    again = AutoSparseModel.from_pretrained(tmp_path)
    assert type(again.bert.pooler.dense) is nn.Linear
    assert bool((again.bert.embeddings.word_embeddings.weight[~masks["table"]] == 0).all())
    torch.testing.assert_close(outputs(again)[0], outputs(model)[0], rtol=1e-5, atol=1e-5)
    pooler.dense.hold_score(torch.zeros(256))
    with pytest.raises(UserError, match=r"bert\.pooler\.dense: its mask is still being learned"):
        save_sparse(model, tmp_path)


def test_what_trainer_passes_is_taken(tmp_path: Path) -> None:
    model = sparse_model()
    model.save_pretrained(str(tmp_path / "m"), state_dict=model.state_dict(), safe_serialization=True, token=None)
    assert same(AutoSparseModel.from_pretrained(tmp_path / "m"), model)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="a sparse model takes no 'push_to_hub'"):
        model.save_pretrained(tmp_path / "m", push_to_hub=True)


def test_other_kinds_of_models_save_in_their_own_way(tmp_path: Path) -> None:
    model = GPT2Model(GPT2Config(vocab_size=24, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    model.extra = nn.Linear(4, 4)
    with torch.no_grad():
        model.extra.weight[:3] = 0
    sparsify(model, format="unstructured")
    model.save_pretrained(tmp_path)
    assert "extra.values" in load_file(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="unknown model type 'gpt2'"):
        save_sparse(model, tmp_path)
    # Nothing was replaced: transformers saves it.
    dense = plain_model()
    sparsify(dense, min_sparsity=1.0, format="unstructured")
    assert "save_pretrained" not in vars(dense)


class Own(BertModel):
    """A class that no folder can name."""


def test_models_that_could_not_be_rebuilt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a model of transformers or a TaskModel, got Sequential"):
        save_sparse(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(UserError, match="expected a bert model of transformers, got 'Own'"):
        save_sparse(Own(tiny.config()), tmp_path)
    with pytest.raises(UserError, match="is on the meta device"):
        save_sparse(BertModel(tiny.config()).to("meta"), tmp_path)
    model = plain_model()
    dense = model.bert.encoder.layer[0].intermediate
    dense.dense = SparseLinear.from_linear(dense.dense, format="unstructured", activation="gelu")
    with pytest.raises(UserError, match=r"bert\.encoder\.layer\.0\.intermediate\.dense applies 'gelu' itself"):
        save_sparse(model, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="expected a folder to save the model in, but it is a file"):
        save_sparse(sparse_model(), tmp_path / "file")
    with pytest.raises(TypeError, match="pattern: expected the name"):
        save_sparse(sparse_model(), tmp_path, pattern=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is not instantiated"):
        AutoSparseModel()
    assert sparsebert.AutoSparseModel is AutoSparseModel
