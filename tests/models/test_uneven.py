"""Models with layers of different widths as any other: loaded as a base, pruned, trained, saved, shown; or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from sparsebert import AutoSparseModel, MaskPack, remove_structure
from sparsebert.errors import UserError
from sparsebert.models.capture import Capture, Needs
from sparsebert.models.cut import keep_first_layers
from sparsebert.models.graft import check_graft
from sparsebert.models.load import load_base
from sparsebert.models.per_layer import widths_of
from sparsebert.models.prunable import LAYOUTS, heads_of, prunable_matrices
from sparsebert.models.storage import load_model, save_model
from sparsebert.models.task_model import TaskModel

IDS = torch.tensor([[2, 5, 6, 7, 3]])


@torch.no_grad()
def uneven(kind: str = "bert") -> Any:
    """The first layer has 2 heads and 28 neurons, the second 4 and 8."""
    base: Any = tiny.base(kind)
    layout = LAYOUTS[base.config.model_type]
    for index, (heads, neurons) in enumerate(((2, 28), (4, 8))):
        parts = {name: base.get_submodule(f"{layout.layers}.{index}.{place}") for name, place in layout.linears}
        parts["value"].weight[4 * heads :] = 0
        parts["ffn_in"].weight[neurons:] = 0
    return remove_structure(base)


def checkpoint(folder: Path, kind: str = "bert") -> Path:
    uneven(kind).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_saved_one_is_loaded_as_a_base(tmp_path: Path, kind: str) -> None:
    base, _ = load_base(str(checkpoint(tmp_path / "base", kind)))
    assert type(base) is type(tiny.base(kind))
    assert widths_of(base) == [(2, 28), (4, 8)]
    assert torch.equal(base(IDS).last_hidden_state, uneven(kind)(IDS).last_hidden_state)
    again = AutoSparseModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_its_matrices_have_their_own_shapes_and_heads(kind: str) -> None:
    base = uneven(kind)
    assert heads_of(base) == [2, 4]
    found = {(matrix.layer, matrix.component): (matrix.shape, matrix.heads) for matrix in prunable_matrices(base)}
    assert found[0, "query"] == found[0, "value"] == ((8, 16), 2)
    assert found[0, "attention_output"] == ((16, 8), 2)
    assert found[1, "key"] == ((16, 16), 4)
    assert found[0, "ffn_in"] == ((28, 16), 0) and found[1, "ffn_out"] == ((16, 8), 0)


@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_saved_with_masks_it_is_loaded_to_the_bit(tmp_path: Path, kind: str, head: str) -> None:
    model = TaskModel(uneven(kind), "classification", 2, head=head, seed=1).eval()
    masks = {
        matrix.name: torch.rand(matrix.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        for matrix in prunable_matrices(model.base)
    }
    for name, mask in masks.items():
        model.base.get_submodule(name).weight.data *= mask  # type: ignore[operator]
    save_model(tmp_path / "model", model, tiny.tokenizer(), masks=masks, pattern="unstructured", info={})
    again, _, found, info = load_model(tmp_path / "model")
    assert found.keys() == masks.keys() and all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert info["pattern"] == "unstructured"
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(again(IDS)["logits"], model(IDS)["logits"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "pattern"), [("adapt_prune", "unstructured"), ("magnitude", "heads"), ("imp", "neurons")]
)
def test_it_is_pruned_further_and_runs_sparse(tmp_path: Path, method: str, pattern: str) -> None:
    shop = tiny.Workshop(tmp_path / "shop")
    shop.model = checkpoint(tmp_path / "base")
    run = shop.run(method, "--pattern", pattern, "--sparsity", "0.5")
    run.check_zeros()
    pruned, size = run.pruned()
    assert 0.3 < pruned / size < 0.7
    model, *_ = load_model(run.folder / "model")
    assert widths_of(model.base) == [(2, 28), (4, 8)]
    sparse = AutoSparseModel.from_pretrained(run.folder, format="unstructured")
    torch.testing.assert_close(sparse(IDS)["logits"], model(IDS)["logits"], rtol=1e-5, atol=1e-5)
    if method == "adapt_prune":
        run.check_survivors()
        pack = MaskPack.create(tmp_path / "pack", shop.model)
        pack.add(run.folder, "one")
        torch.testing.assert_close(pack({"input_ids": IDS}, "one")["logits"], model(IDS)["logits"])
    smaller = remove_structure(model.base)
    assert widths_of(smaller) != [(2, 28), (4, 8)] or pattern == "unstructured"


def test_captured_states_are_by_the_layers_own_heads() -> None:
    base = uneven()
    with Capture(base, Needs(attention=frozenset({1, 2}), values=frozenset({1}))) as capture:
        base(IDS)
    assert capture.states.query[1].shape == capture.states.value[1].shape == (1, 2, 5, 4)
    assert capture.states.key[2].shape == (1, 4, 5, 4)


def test_its_first_layers_keep_their_widths(tmp_path: Path) -> None:
    base = uneven()
    keep_first_layers(base, 1)
    base.save_pretrained(tmp_path)
    again = AutoSparseModel.from_pretrained(tmp_path)
    assert widths_of(again) == [(2, 28)]
    assert torch.equal(again(IDS).last_hidden_state, base(IDS).last_hidden_state)


def test_it_shows_its_heads() -> None:
    assert "width 16, 2 to 4 heads" in TaskModel(uneven(), "classification", 2)._repr_html_()
    assert "width 16, 4 heads" in TaskModel(tiny.base(), "classification", 2)._repr_html_()


def test_layers_are_grafted_only_on_their_like() -> None:
    mine, other = (TaskModel(base, "classification", 2) for base in (uneven(), tiny.base()))
    check_graft(mine, TaskModel(uneven(), "classification", 2))
    with pytest.raises(UserError, match=r"student's num_attention_heads, \[2, 4\], got 4"):
        check_graft(mine, other)


def test_attention_maps_of_unequal_heads_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsebert.train import main

    shop = tiny.Workshop(tmp_path / "shop")
    even, shop.model = shop.model, checkpoint(tmp_path / "base")
    words = ("--teacher-model", str(even), "--student-layers", "2")
    assert main(shop.command("tinybert", *words)) == 2
    assert "maps of 2 or 4 heads (student) and 4 (teacher) cannot be compared" in capsys.readouterr().err
    assert main(shop.command("minilm", *words, "--relation-heads", "16")) == 2
    assert "expected a divisor of 8 (widths 8 and 16)" in capsys.readouterr().err
    shop.run("minilm", *words)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_size": 8}, "'hidden_size' cannot differ between layers"), ({"intermediate_size": 4}, "by config.json")],
)
def test_a_configuration_of_other_widths_is_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    import json

    path = checkpoint(tmp_path / "base") / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["per_layer_config"]["0"].update(change)
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_base(str(tmp_path / "base"))
