"""Analyses that run models: errors of layers, flatness, shuffled masks and new weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from sparsebert.errors import UserError
from sparsebert.models.graft import grafted
from sparsebert.models.storage import load_model
from sparsebert.reports.analysis import ANALYSES, Options
from sparsebert.reports.analysis.flatness import RADII, direction
from sparsebert.reports.analysis.layers import layer_errors
from sparsebert.reports.analysis.opened import OpenRun
from sparsebert.reports.analysis.perturbed import SCALES
from sparsebert.reports.runs import RunRecord, read_run

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = Options(max_samples=24, seeds=(0, 1), head_steps=20)
QUICK = ("--untouched", "false", "--head", "linear")


@pytest.fixture(scope="module")
def dense(workshop: tiny.Workshop) -> RunRecord:
    return read_run(workshop.run("finetune", "--head", "linear", "--learning-rate", "1e-3", steps=4).folder)


@pytest.fixture(scope="module")
def student(workshop: tiny.Workshop, dense: RunRecord) -> RunRecord:
    words = ("--teacher", str(dense.folder), "--sparsity", "0.5", "--learning-rate", "1e-3")
    return read_run(workshop.run("spd", *words, steps=4).folder)


@pytest.fixture(scope="module")
def learned(workshop: tiny.Workshop) -> RunRecord:
    return read_run(workshop.run("adapt_prune", "--untouched", "false", "--sparsity", "0.5", steps=6).folder)


def test_errors_of_layers_are_those_of_a_model_that_is_grafted(student: RunRecord, dense: RunRecord) -> None:
    mine, theirs = (load_model(run.files.model)[0] for run in (student, dense))
    # A layer that is not the student's first must see something else than the teacher's states.
    ids = torch.tensor([[2, 5, 9, 14, 3, 0], [2, 6, 13, 16, 15, 3]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    alone, apart = layer_errors(mine, theirs, [batch, batch])

    def states(model: torch.nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)  # type: ignore[operator]
        return [state[batch["attention_mask"].bool()] for state in output.hidden_states[1:]]

    targets, own = states(theirs.base), states(mine.base)
    for layer in range(2):
        with grafted(theirs.base, mine.base, [layer != place for place in range(2)]):
            one = states(theirs.base)[layer]
        norm = float(targets[layer].norm())
        assert apart[layer] == pytest.approx(float((one - targets[layer]).norm()) / norm, rel=1e-4)
        assert alone[layer] == pytest.approx(float((own[layer] - targets[layer]).norm()) / norm, rel=1e-4)
    assert alone[0] == pytest.approx(apart[0]), "the embeddings are the teacher's"
    assert layer_errors(copy.deepcopy(theirs), theirs, [batch]) == ([0.0, 0.0], [0.0, 0.0])


def test_layers_of_a_run_against_its_teacher(student: RunRecord, dense: RunRecord, tmp_path: Path) -> None:
    analysis = ANALYSES["layers"]
    assert analysis.unfit(student, OPTIONS) is None
    found = analysis.make([student], OPTIONS).data["runs"][student.label]
    assert found["rows"] == 16 and len(found["alone"]) == len(found["grafted"]) == 2
    assert found["alone"][0] == pytest.approx(found["grafted"][0]) and found["grafted"][0] > 0
    assert "had no teacher" in str(analysis.unfit(dense, OPTIONS))
    given = Options(teacher=dense.folder)
    assert "its own teacher" in str(analysis.unfit(dense, given))
    with pytest.raises(UserError, match="takes a dense run"):
        analysis.make([student], Options(teacher=student.folder))
    moved = read_run(student.folder)
    moved.result = {**moved.result, "teacher": {"folder": str(tmp_path / "gone")}}
    assert "no longer where it was" in str(analysis.unfit(moved, OPTIONS))


def test_directions_are_as_long_as_the_rows_and_move_no_pruned_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, generator=generator) * (torch.rand(8, 12, generator=generator) < 0.5)
    weight[3] = 0.0
    found = direction({"a": weight, "bias": torch.ones(4)}, seed=1)
    assert set(found) == {"a"}
    assert torch.equal(found["a"] != 0, weight != 0)
    torch.testing.assert_close(found["a"].norm(dim=1), weight.norm(dim=1))
    assert not torch.equal(found["a"], direction({"a": weight}, seed=2)["a"])


def test_flatness_is_of_the_saved_model_and_leaves_it_alone(learned: RunRecord, dense: RunRecord) -> None:
    found = ANALYSES["flatness"].make([learned, dense], OPTIONS).data["runs"]
    for run in (learned, dense):
        about = found[run.label]
        assert about["rows"] == 24 and about["loss"] > 0
        assert [point["radius"] for point in about["points"]] == list(RADII)
        assert all(len(point["losses"]) == 2 for point in about["points"])
        moved = [abs(point["mean"] - about["loss"]) for point in about["points"]]
        assert 0 < moved[0] < moved[-1]
    again = ANALYSES["flatness"].make([learned], OPTIONS).data["runs"]
    assert again[learned.label] == found[learned.label]


def test_a_shuffled_mask_has_new_heads_and_the_pretrained_weights(
    learned: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = OpenRun.put
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(OpenRun, "put", lambda self, weights: seen.append(weights) or put(self, weights))
    found = ANALYSES["shuffle"].make([learned], OPTIONS).data["runs"][learned.label]
    before = load_model(learned.files.model)[0].base
    assert len(seen) == 2
    for weights in seen:
        for name, mask in learned.masks().items():
            assert int((weights[name] != 0).sum()) == int(mask.sum())
            assert not torch.equal(weights[name] != 0, mask)
            both = mask & (weights[name] != 0)
            assert torch.equal(weights[name][both], before.get_submodule(name).weight[both])  # type: ignore[index]
    assert found["saved"] == learned.result["score"], "16 rows are all of them"
    assert list(found["variants"]) == ["as it is", "shuffled within the layer"]
    assert all(len(of["scores"]) == 2 for of in found["variants"].values())


def test_new_weights_lie_where_the_old_ones_did(learned: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    put = OpenRun.put
    seen: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(OpenRun, "put", lambda self, weights: seen.append(weights) or put(self, weights))
    found = ANALYSES["reinit"].make([learned], Options(max_samples=24, seeds=(3,), head_steps=5))
    own = load_model(learned.files.model)[0].base
    for spread, weights in zip((*SCALES, None), seen, strict=True):
        for name, mask in learned.masks().items():
            old: torch.Tensor = own.get_submodule(name).weight.detach()  # type: ignore[union-attr,operator]
            assert torch.equal(weights[name] != 0, mask)
            if spread is not None:
                factor = weights[name][mask] / old[mask]
                assert float(factor.std()) == pytest.approx(spread, rel=0.4)
                assert float(factor.mean()) == pytest.approx(1, abs=spread)
    assert [row[2] for row in found.tables[0].rows][1:] == [
        "as it is", "rescaled by N(1, 0.01)", "rescaled by N(1, 0.1)", "drawn anew",
    ]  # fmt: skip


def test_a_mask_is_not_shuffled_over_trained_weights(student: RunRecord) -> None:
    with pytest.raises(UserError, match=f"{student.label}: its weights were trained"):
        ANALYSES["shuffle"].make([student], OPTIONS)


def test_data_that_are_not_at_hand_are_named_with_the_run(learned: RunRecord, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{learned.label}: .*nowhere"):
        ANALYSES["flatness"].make([learned], Options(data_dir=str(tmp_path / "nowhere")))
    moved = Path(shutil.copytree(learned.config["run"]["data_dir"], tmp_path / "moved"))
    here = ANALYSES["flatness"].make([learned], Options(data_dir=str(moved), max_samples=4, seeds=(0,)))
    assert here.data["runs"][learned.label]["rows"] == 4
