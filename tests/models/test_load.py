"""load_base: what it gives, and that nothing doubtful passes for a pre-trained model."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, BertForMaskedLM, BertForSequenceClassification

from sparsebert.errors import UserError
from sparsebert.models.load import base_label_map, load_base, max_tokens, model_fingerprint

WEIGHTS = "model.safetensors"


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replaces (or, with None, removes) tensors of a checkpoint."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_every_kind_comes_back_bit_for_bit(tmp_path: Path, kind: str, tiny: Any) -> None:
    base, tokenizer = load_base(str(tiny.save(tmp_path / "m", kind)))
    expected = tiny.base(kind).state_dict()
    assert base.config.model_type == kind
    assert not base.training
    assert base.config._attn_implementation == "sdpa"
    assert base.state_dict().keys() == expected.keys()
    for name, tensor in base.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    assert tokenizer("the film")["input_ids"] == [2, 9, 7, 3]


def test_half_precision_weights_are_widened(tmp_path: Path, tiny: Any) -> None:
    half = tiny.base().half()
    half.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    base, _ = load_base(str(tmp_path))
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(base.state_dict()[name], half.state_dict()[name].float())


def test_loading_is_quiet_and_draws_no_random_numbers(
    checkpoint: Path, capfd: pytest.CaptureFixture[str], tiny: Any
) -> None:
    model = BertForMaskedLM(tiny.config("bert"))
    model.save_pretrained(checkpoint)
    capfd.readouterr()
    before = torch.random.get_rng_state()
    base, _ = load_base(str(checkpoint))
    assert torch.equal(torch.random.get_rng_state(), before)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    # A masked-LM checkpoint has a prefix on every name, an extra head and no pooler.
    assert base.pooler is None
    assert torch.equal(base.state_dict()["embeddings.word_embeddings.weight"], model.get_input_embeddings().weight)


def test_verbosity_is_put_back(checkpoint: Path) -> None:
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    load_base(str(checkpoint))
    with pytest.raises(UserError):
        load_base(str(checkpoint / "nothing" / "here"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_task_checkpoint_keeps_its_pooler_and_labels(checkpoint: Path, tiny: Any) -> None:
    config = tiny.config("bert")
    config.id2label = {0: "no", 1: "yes"}
    config.label2id = {"yes": 1, "no": 0}
    model = BertForSequenceClassification(config)
    model.save_pretrained(checkpoint)
    base, _ = load_base(str(checkpoint))
    assert torch.equal(base.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert base_label_map(base) == {"no": 0, "yes": 1}


def test_placeholder_labels_are_no_label_map(tiny: Any) -> None:
    assert base_label_map(tiny.base()) is None


def test_old_names_of_layer_norm_are_understood(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, checkpoint / WEIGHTS, metadata={"format": "pt"})
    base, _ = load_base(str(checkpoint))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.state_dict().items())


def test_shards(tmp_path: Path, tiny: Any) -> None:
    tiny.base().save_pretrained(tmp_path, max_shard_size="1KB")
    tiny.tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS).exists()
    assert model_fingerprint(tmp_path) == model_fingerprint(tiny.base())
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[0]
    content = (tmp_path / shard).read_bytes()
    (tmp_path / shard).write_bytes(content[:-5])
    with pytest.raises(UserError, match=f"{shard}: truncated"):
        load_base(str(tmp_path))
    (tmp_path / shard).unlink()
    with pytest.raises(UserError, match=f"{shard}: missing"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 3}'])
def test_bad_index_of_shards(checkpoint: Path, content: str) -> None:
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / f"{WEIGHTS}.index.json").write_text(content)
    with pytest.raises(UserError, match="index"):
        load_base(str(checkpoint))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "bert.ckpt"])
def test_pickles_are_refused_unread(checkpoint: Path, name: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("unpickled",))

    (checkpoint / WEIGHTS).unlink()
    (checkpoint / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=rf"pickle \({name}\).*convert to safetensors"):
        load_base(str(checkpoint))


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"no weights; expected model\.safetensors"):
        load_base(str(checkpoint))


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"", lambda b: b"\xff" * 20 + b[20:]])
def test_damaged_weights_name_the_file(checkpoint: Path, damage: Callable[[bytes], bytes]) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged"):
        load_base(str(checkpoint))


def test_git_lfs_pointer(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_base(str(checkpoint))


def test_missing_configuration(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_base(str(checkpoint))


@pytest.mark.parametrize("content", ["", "{not json", "[1]", "{}", '{"model_type": "bert", "hidden_size": "wide"}'])
def test_broken_configuration(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        load_base(str(checkpoint))


@pytest.mark.parametrize("named", ["gpt2", "albert", "never-heard-of"])
def test_other_kinds_of_model_are_named(checkpoint: Path, named: str) -> None:
    configure(checkpoint, model_type=named)
    with pytest.raises(UserError, match=rf"{named}.*known: bert, distilbert, roberta"):
        load_base(str(checkpoint))


def test_decoder_and_quantised_models_are_refused(checkpoint: Path) -> None:
    configure(checkpoint, is_decoder=True)
    with pytest.raises(UserError, match="decoder"):
        load_base(str(checkpoint))
    configure(checkpoint, is_decoder=False, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(UserError, match="quantised"):
        load_base(str(checkpoint))


def test_a_configuration_cannot_name_other_weights(checkpoint: Path, tiny: Any) -> None:
    configure(checkpoint, transformers_weights="other.safetensors")
    tiny.save(checkpoint.parent / "b", seed=1)
    (checkpoint.parent / "b" / WEIGHTS).rename(checkpoint / "other.safetensors")
    base, _ = load_base(str(checkpoint))
    assert model_fingerprint(base) == model_fingerprint(tiny.base())


def test_adapters_and_distributed_checkpoints_are_refused(checkpoint: Path) -> None:
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter"):
        load_base(str(checkpoint))
    (checkpoint / "adapter_config.json").unlink()
    (checkpoint / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match="distributed checkpoint"):
        load_base(str(checkpoint))


def test_missing_tokenizer(checkpoint: Path) -> None:
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_base(str(checkpoint))


def test_broken_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="tokenizer"):
        load_base(str(checkpoint))


def test_tokenizer_without_padding(checkpoint: Path, tiny: Any) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="padding"):
        load_base(str(checkpoint))


def test_tokenizer_larger_than_the_table(checkpoint: Path, tiny: Any) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"word{index}" for index in range(30)])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="42 tokens, but the model's table only 20 rows"):
        load_base(str(checkpoint))


@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.bias", "embeddings.LayerNorm.weight"])
def test_random_weights_never_pass(checkpoint: Path, name: str) -> None:
    edit(checkpoint, {name: None})
    with pytest.raises(UserError, match=rf"lack {name}; a model filled up at random"):
        load_base(str(checkpoint))


def test_a_wholly_different_checkpoint_is_refused(checkpoint: Path) -> None:
    save_file({"x": torch.zeros(2)}, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack .* and \d+ more"):
        load_base(str(checkpoint))


def test_half_a_pooler_is_refused_and_none_is_accepted(checkpoint: Path) -> None:
    edit(checkpoint, {"pooler.dense.bias": None})
    with pytest.raises(UserError, match=r"pooler\.dense\.bias"):
        load_base(str(checkpoint))
    edit(checkpoint, {"pooler.dense.weight": None})
    base, _ = load_base(str(checkpoint))
    assert base.pooler is None
    assert base(input_ids=torch.tensor([[2, 5, 3]])).pooler_output is None


def test_other_shapes_than_the_configuration_says(checkpoint: Path) -> None:
    edit(checkpoint, {"encoder.layer.0.intermediate.dense.weight": torch.zeros(11, 8)})
    with pytest.raises(UserError, match=r"intermediate\.dense\.weight is \[11, 8\] in the weights, but \[12, 8\]"):
        load_base(str(checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint: Path, value: float) -> None:
    weight = load_file(checkpoint / WEIGHTS)["encoder.layer.0.attention.self.key.weight"]
    weight[3, 3] = value
    edit(checkpoint, {"encoder.layer.0.attention.self.key.weight": weight})
    with pytest.raises(UserError, match=r"self\.key\.weight holds NaN"):
        load_base(str(checkpoint))


def test_a_file_and_a_missing_folder(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="is a file"):
        load_base(str(checkpoint / WEIGHTS))
    for missing in (str(checkpoint / "gone"), "./gone", "a/b/c", ""):
        with pytest.raises(UserError):
            load_base(missing)


def test_a_hub_out_of_reach_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more lines")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(UserError) as caught:
        load_base("google-bert/bert-base-uncased")
    assert "couldn't connect" in str(caught.value) and "give the folder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fingerprint_is_of_the_parameters_alone(checkpoint: Path, tiny: Any) -> None:
    expected = model_fingerprint(tiny.base())
    assert len(expected) == 64
    assert model_fingerprint(checkpoint) == expected == model_fingerprint(str(checkpoint))
    assert model_fingerprint(tiny.base(seed=1)) != expected
    changed = tiny.base()
    with torch.no_grad():
        changed.embeddings.LayerNorm.bias[0] += 1e-6
    assert model_fingerprint(changed) != expected
    # What training puts beside a weight is no part of the base.
    extended = tiny.base()
    extended.encoder.layer[0].output.dense.register_buffer("scores", torch.zeros(3))
    assert model_fingerprint(extended) == expected


def test_fingerprint_draws_no_random_numbers(tiny: Any, kind: str) -> None:
    config = tiny.config(kind)
    if kind == "distilbert":
        config.sinusoidal_pos_embds = True
    base = AutoModel.from_config(config)
    before = torch.random.get_rng_state()
    assert model_fingerprint(base) == model_fingerprint(base)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_fingerprint_of_a_base_that_lost_parameters(tiny: Any) -> None:
    base = tiny.base()
    del base.encoder.layer[0].output.dense.weight
    with pytest.raises(ValueError, match=r"layer\.0\.output\.dense\.weight"):
        model_fingerprint(base)


def test_max_tokens_runs_to_the_end_of_the_table(kind: str, tiny: Any) -> None:
    base = tiny.base(kind)
    longest = max_tokens(base)
    assert longest == {"bert": 14, "roberta": 13, "distilbert": 14}[kind]
    base(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        base(input_ids=torch.full((1, longest + 1), 5))


def test_masked_lm_of_transformers_reads_what_we_read(checkpoint: Path) -> None:
    base, _ = load_base(str(checkpoint))
    other = AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert torch.equal(other.bert.encoder.layer[1].output.dense.weight, base.encoder.layer[1].output.dense.weight)
