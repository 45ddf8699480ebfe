"""Analyses of masks: sparsity, similarity, recovery, and masks with as many weights kept at other places."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparsebert.errors import UserError
from sparsebert.reports.analysis import ANALYSES, Options
from sparsebert.reports.analysis.rank import magnitude_masks, pretrained_weights, random_masks
from sparsebert.reports.analysis.similarity import expected_jaccard, jaccard
from sparsebert.reports.runs import RunRecord, read_run, read_runs

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = Options()
QUICK = ("--untouched", "false", "--head", "linear")


@pytest.fixture(scope="module")
def magnitude(workshop: tiny.Workshop) -> RunRecord:
    return read_run(workshop.run("magnitude", *QUICK, "--sparsity", "0.7", "--allocation", "matrix", steps=1).folder)


@pytest.fixture(scope="module")
def learned(workshop: tiny.Workshop) -> RunRecord:
    words = ("--score-learning-rate", "3e-3", "--prune-until", "0.3", "--sparsity", "0.7")
    return read_run(workshop.run("adapt_prune", *QUICK, *words, steps=8).folder)


def test_sparsity_by_part_adds_up(learned: RunRecord, magnitude: RunRecord) -> None:
    found = ANALYSES["sparsity"].make([learned, magnitude], OPTIONS)
    about = found.data["runs"][learned.label]
    assert about["masked"] == learned.result["sparsity"]["masked"]
    assert about["by_component"] == learned.result["sparsity"]["by_component"]
    assert list(about["by_layer"].values()) == learned.result["sparsity"]["by_layer"]
    masks = learned.masks()
    for name, entry in about["by_matrix"].items():
        assert entry["sparsity"] == pytest.approx(1 - float(masks[name].float().mean()))
        assert (entry["component"], entry["layer"]) == (learned.matrices[name].component, learned.matrices[name].layer)
    (table,) = found.tables
    assert table.heads == ("part", learned.label, magnitude.label)
    assert [row[0] for row in table.rows][:2] == ["all masked", "query"] and table.rows[-1][0] == "layer 2"


@given(st.integers(0, 2**20 - 1), st.integers(0, 2**20 - 1))
def test_jaccard_is_what_its_name_says(one: int, other: int) -> None:
    masks = [torch.tensor([number >> place & 1 for place in range(20)], dtype=torch.bool) for number in (one, other)]
    both, either = (one & other).bit_count(), (one | other).bit_count()
    assert jaccard(*masks) == (both / either if either else 1.0)
    assert jaccard(masks[0], masks[0]) == 1.0


def test_chance_is_what_independent_masks_come_to() -> None:
    generator = torch.Generator().manual_seed(0)
    for p, q in ((0.1, 0.1), (0.5, 0.9), (0.3, 0.6)):
        one, other = (torch.rand(1000, 1000, generator=generator) < share for share in (p, q))
        assert jaccard(one, other) == pytest.approx(expected_jaccard(p, q), abs=3e-3)
    assert expected_jaccard(0.0, 0.0) == 1.0 and expected_jaccard(1.0, 1.0) == 1.0


def test_similarity_of_every_pair_and_to_magnitude(learned: RunRecord, magnitude: RunRecord) -> None:
    found = ANALYSES["similarity"].make([learned, magnitude], OPTIONS)
    pairs = {tuple(pair["runs"]): pair for pair in found.data["pairs"]}
    between = pairs[learned.label, magnitude.label]
    masks, others = learned.masks(), magnitude.masks()
    assert between["by_matrix"] == {name: jaccard(masks[name], others[name]) for name in masks}
    assert between["jaccard"] == pytest.approx(sum(between["by_matrix"].values()) / len(masks))
    assert between["expected"] == pytest.approx(0.3 * 0.3 / 0.51, abs=0.02)
    assert pairs[magnitude.label, "one-shot magnitude"]["jaccard"] == 1.0, "it is that"
    assert pairs[learned.label, "one-shot magnitude"]["jaccard"] < 1.0


def test_masks_of_two_bases_are_not_compared(
    tmp_path: Path, workshop: tiny.Workshop, learned: RunRecord, magnitude: RunRecord
) -> None:
    folder = Path(shutil.copytree(magnitude.folder, tmp_path / "other"))
    text = (folder / "result.json").read_text(encoding="utf-8").replace(magnitude.base, "0" * 64)
    (folder / "result.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="other began with another pre-trained model"):
        ANALYSES["similarity"].make([learned, read_run(folder)], OPTIONS)
    fewer = workshop.run("magnitude", *QUICK, "--masked", "pooler", steps=1).folder
    with pytest.raises(UserError, match="masks other matrices than"):
        ANALYSES["similarity"].make(read_runs([learned.folder, fewer]), OPTIONS)


def test_without_the_pretrained_weights_the_rest_is_compared(
    tmp_path: Path, learned: RunRecord, magnitude: RunRecord
) -> None:
    tiny.save_checkpoint(tmp_path / "changed", seed=4)
    runs = [read_run(learned.folder), read_run(magnitude.folder)]
    for run, model in zip(runs, ("gone", "changed"), strict=True):
        run.config["run"]["model"] = str(tmp_path / model)
    found = ANALYSES["similarity"].make(runs, OPTIONS)
    assert [pair["runs"] for pair in found.data["pairs"]] == [[run.label for run in runs]]
    notes = " ".join(found.tables[0].notes)
    assert "there is no folder" in notes and "model changed is not what the run began with" in notes
    with pytest.raises(UserError, match="nothing to compare"):
        ANALYSES["similarity"].make(runs[:1], OPTIONS)


def test_a_run_says_what_it_recovered(learned: RunRecord, magnitude: RunRecord) -> None:
    found = ANALYSES["recovery"].make([learned, magnitude], OPTIONS).data["runs"]
    kept = sum(int(mask.sum()) for mask in learned.masks().values())
    assert found[learned.label]["kept"] == kept
    assert 0 < found[learned.label]["recovered"] < kept
    assert found[magnitude.label]["recovered"] == 0


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "neurons", "heads"])
def test_other_masks_keep_as_many_units_in_every_matrix(magnitude: RunRecord, pattern: str) -> None:
    run = read_run(magnitude.folder)
    masks = tiny.build("random", pattern).masks
    masks.select(masks.magnitude(), 0.5, "global")
    run.result["pattern"], run.__dict__["_masks"] = pattern, masks.dense()
    weights = pretrained_weights(run)
    for chosen in (magnitude_masks(run, weights), random_masks(run, 5)):
        assert chosen.keys() == run.masks().keys()
        for name, mask in run.masks().items():
            assert chosen[name].shape == mask.shape and int(chosen[name].sum()) == int(mask.sum()), name
    shuffled = [random_masks(run, seed) for seed in (5, 5, 6)]
    same = [all(torch.equal(shuffled[0][name], other[name]) for name in other) for other in shuffled]
    assert same == [True, True, False]
    if pattern == "2:4":
        assert all(int(mask.view(-1, 4).sum(1).max()) == 2 for mask in shuffled[0].values())


def test_a_matrix_that_is_all_pruned_stays_so(magnitude: RunRecord) -> None:
    run = read_run(magnitude.folder)
    name = next(iter(run.masks()))
    run.masks()[name].zero_()
    assert not bool(random_masks(run, 0)[name].any())
    assert not bool(magnitude_masks(run, pretrained_weights(run))[name].any())


def test_fewer_layers_than_the_pretrained_model_are_refused(tmp_path: Path, magnitude: RunRecord) -> None:
    run = magnitude
    state = load_file(run.files.model / "model.safetensors")
    cut = {name: tensor for name, tensor in state.items() if ".layer.1." not in name}
    folder = Path(shutil.copytree(run.folder, tmp_path / "cut"))
    save_file(cut, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    config = folder / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(UserError, match="fewer layers"):
        pretrained_weights(read_run(folder))
