"""Analyses that are made from results and logs alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from reports.finished import finished

from sparsebert.errors import UserError
from sparsebert.reports.analysis import ANALYSES, Options
from sparsebert.reports.analysis.curves import curves_of

OPTIONS = Options()


def search(**losses: float) -> list[dict[str, object]]:
    return [
        {"phase": "mlm_head", "new_mlm_head": True, "mlm_loss": 9.0},
        {"phase": "search", "steps": 3, **losses},
        {"phase": "finetune"},
    ]


def test_loss_on_text_against_the_score_with_its_correlation(tmp_path: Path) -> None:
    points = [(2.0, 0.1, 0.9), (3.0, 0.3, 0.8), (5.0, 0.2, 0.6)]
    runs = [
        finished(tmp_path / f"run{i}", phases=search(mlm_loss=mlm, kd_loss=kd), score=score)
        for i, (mlm, kd, score) in enumerate(points)
    ]
    runs.append(finished(tmp_path / "other", phases=search(kd_loss=0.5), score=0.1, task="rte"))
    found = ANALYSES["pretraining"].make(runs, OPTIONS)
    assert [point.get("mlm_loss") for point in found.data["points"]] == [2.0, 3.0, 5.0, None]
    by_loss = {(entry["task"], entry["loss"]): entry for entry in found.data["correlations"]}
    assert set(by_loss) == {("sst2", "mlm_loss"), ("sst2", "kd_loss")}, "one run of a task correlates with nothing"
    assert by_loss["sst2", "mlm_loss"]["pearson"] == pytest.approx(-1.0)
    assert by_loss["sst2", "kd_loss"]["spearman"] == pytest.approx(-0.5)
    assert "-1.000" in found.tables[1].plain()


def test_a_mask_from_another_run_brings_that_runs_losses(tmp_path: Path) -> None:
    searched = finished(tmp_path / "searched", phases=search(kd_loss=0.25))
    given = [{"phase": "finetune", "mask": {"run": str(searched.folder)}}]
    run = finished(tmp_path / "given", phases=given)
    assert ANALYSES["pretraining"].make([run], OPTIONS).data["points"][0]["kd_loss"] == 0.25
    lost = finished(tmp_path / "lost", phases=[{"phase": "finetune", "mask": {"run": str(tmp_path / "gone")}}])
    for other in (lost, finished(tmp_path / "none")):
        assert "no losses on held-out text" in str(ANALYSES["pretraining"].unfit(other, OPTIONS))


def test_train_and_dev_curves_and_the_gap_at_their_end(tmp_path: Path) -> None:
    log = []
    for step, train, dev in ((2, 0.7, 0.6), (4, 0.9, 0.8), (6, 1.0, 0.7)):
        log += [
            {"phase": "train", "step": step, "loss": 1 / step, "learning_rate": 1.0},
            {"phase": "train", "step": step, "eval_accuracy": dev, "eval_loss": 1 - dev, "eval_runtime": 3.0},
            {"phase": "train", "step": step, "eval_train_accuracy": train, "eval_train_loss": 1 - train},
        ]
    log.append({"phase": "train", "step": 6, "train_loss": 0.3, "train_seconds": 1.0})
    run = finished(tmp_path / "run", log)
    assert curves_of(run)["train"]["loss"] == [[2, 0.5], [4, 0.25], [6, pytest.approx(1 / 6)]]
    assert set(curves_of(run)["train"]) == {
        "loss", "eval_accuracy", "eval_loss", "eval_train_accuracy", "eval_train_loss",
    }  # fmt: skip
    ends = {end["name"]: end for end in ANALYSES["curves"].make([run], OPTIONS).data["runs"]["run"]["ends"]}
    accuracy, loss = ends["accuracy"], ends["loss"]
    assert (accuracy["train"], accuracy["dev"], accuracy["best"], accuracy["best_step"]) == (1.0, 0.7, 0.8, 4)
    assert accuracy["gap"] == pytest.approx(0.3) and loss["gap"] == pytest.approx(0.3), "over-fitting is positive"
    assert loss["best_step"] == 4


def test_curves_need_something_watched_and_do_with_dev_alone(tmp_path: Path) -> None:
    blind = finished(tmp_path / "blind", [{"phase": "train", "step": 1, "loss": 0.5}])
    assert "--watch-train" in str(ANALYSES["curves"].unfit(blind, OPTIONS))
    dev = finished(tmp_path / "dev", [{"phase": "train", "step": 1, "eval_loss": 0.5}])
    assert ANALYSES["curves"].unfit(dev, OPTIONS) is None
    end = ANALYSES["curves"].make([dev], OPTIONS).data["runs"]["dev"]["ends"][0]
    assert (end["train"], end["gap"], end["dev"]) == (None, None, 0.5)


def test_scores_over_training_rows(tmp_path: Path) -> None:
    def trained(name: str, rows: int, score: float, **changes: object) -> object:
        return finished(tmp_path / name, score=score, data={"rows": {"train": rows}}, **changes)

    runs = [
        trained("a", 1000, 0.9),
        trained("b", 100, 0.5, seed=1),
        trained("c", 100, 0.7, seed=2),
        trained("d", 50, 0.1, method="gmp"),
    ]
    (curve,) = ANALYSES["scarcity"].make(runs, OPTIONS).data["curves"]  # type: ignore[arg-type]
    assert (curve["method"], curve["sparsity"]) == ("tamt", 0.5)
    assert [(point["rows"], point["mean"]) for point in curve["points"]] == [(100, pytest.approx(0.6)), (1000, 0.9)]
    assert curve["points"][0]["std"] == pytest.approx(0.1414, abs=1e-4) and curve["points"][1]["std"] is None
    with pytest.raises(UserError, match="--few-samples"):
        ANALYSES["scarcity"].make([runs[0], runs[3]], OPTIONS)  # type: ignore[list-item]


def test_recovery_is_what_the_result_says(tmp_path: Path) -> None:
    about = {"kept": 40, "recovered": 10, "share": 0.25, "by_group": {"x": 0.25}}
    run = finished(tmp_path / "run", recovery=about)
    found = ANALYSES["recovery"].make([run], OPTIONS)
    assert found.data["runs"]["run"] == about and "25.00%" in found.tables[0].plain()
    assert "train it again" in str(ANALYSES["recovery"].unfit(finished(tmp_path / "old"), OPTIONS))
    dense = finished(tmp_path / "dense", pattern=None, method="finetune")
    for name in ("recovery", "sparsity", "similarity", "shuffle", "reinit"):
        assert ANALYSES[name].unfit(dense, OPTIONS) == "its method, finetune, prunes nothing", name
