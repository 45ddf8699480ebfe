from __future__ import annotations

import pytest

from sparsebert.data import TASKS
from sparsebert.data.find import find_splits
from sparsebert.errors import UserError


def touch(folder, *names) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def found(folder, task) -> dict[str, list[str]]:
    spec = TASKS[task] if task else None
    return {split: [str(p.relative_to(folder)) for p in paths] for split, paths in find_splits(folder, spec).items()}


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("inside", ["rte/", "glue/rte/", "RTE/", "glue/RTE/", "", "rte/data/", "data/"])
@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_layouts(tmp_path, ending, inside, validation) -> None:
    touch(tmp_path, f"{inside}train.{ending}", f"{inside}{validation}.{ending}", f"{inside}test.{ending}")
    touch(tmp_path, f"{inside}README.md", f"{inside}notes.{ending}")
    assert found(tmp_path, "rte") == {
        "train": [f"{inside}train.{ending}"], "validation": [f"{inside}{validation}.{ending}"]
    }  # fmt: skip


@pytest.mark.parametrize(("folder", "task"), [("SST-2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola")])
def test_names_of_the_original_folders(tmp_path, folder, task) -> None:
    touch(tmp_path, f"{folder}/train.tsv", f"{folder}/dev.tsv", "WNLI/train.tsv")
    assert found(tmp_path, task) == {"train": [f"{folder}/train.tsv"], "validation": [f"{folder}/dev.tsv"]}


def test_the_tasks_own_folder_goes_before_the_root(tmp_path) -> None:
    touch(tmp_path, "train.csv", "sst2/train.csv")
    assert found(tmp_path, "sst2") == {"train": ["sst2/train.csv"]}
    assert found(tmp_path, "rte") == {"train": ["train.csv"]}
    assert found(tmp_path, None) == {"train": ["train.csv"]}


@pytest.mark.parametrize("prefix", ["validation_", "dev_", "validation-"])
def test_mnli(tmp_path, prefix) -> None:
    names = [f"MNLI/{prefix}matched.tsv", f"MNLI/{prefix}mismatched.tsv"]
    touch(tmp_path, "MNLI/train.tsv", *names, "MNLI/test_matched.tsv", "MNLI/test_mismatched.tsv")
    assert found(tmp_path, "mnli") == {"train": ["MNLI/train.tsv"], "validation": names[:1], "mismatched": names[1:]}


def test_shards_come_in_order(tmp_path) -> None:
    touch(tmp_path, *(f"train-0000{n}-of-00003.parquet" for n in (2, 0, 1)), "validation-00000-of-00001.parquet")
    assert found(tmp_path, "sst2")["train"] == [f"train-0000{n}-of-00003.parquet" for n in range(3)]


def test_a_missing_shard_is_named(tmp_path) -> None:
    touch(tmp_path, "train-00000-of-00003.parquet", "train-00002-of-00003.parquet")
    with pytest.raises(UserError, match=r"train-\*-of-00003\.parquet lacks shard 1"):
        find_splits(tmp_path, None)


@pytest.mark.parametrize(
    "second", ["train.parquet", "train-00000-of-00001.csv", "training.csv", "train-00000-of-00002.csv"]
)
def test_a_split_that_is_there_twice_is_refused(tmp_path, second) -> None:
    touch(tmp_path, "train.csv", second)
    with pytest.raises(UserError, match=r"train split is there more than once .*train.csv.*keep one"):
        find_splits(tmp_path, None)


def test_squad_versions_are_kept_apart(tmp_path) -> None:
    touch(tmp_path, "train-v1.1.json", "dev-v1.1.json", "train-v2.0.json", "dev-v2.0.json")
    assert found(tmp_path, "squad") == {"train": ["train-v1.1.json"], "validation": ["dev-v1.1.json"]}
    assert found(tmp_path, "squad_v2") == {"train": ["train-v2.0.json"], "validation": ["dev-v2.0.json"]}


@pytest.mark.parametrize("inside", ["squad/plain_text/", "plain_text/"])
def test_layout_of_the_hubs_squad(tmp_path, inside) -> None:
    names = [f"{inside}{split}-00000-of-00001.parquet" for split in ("train", "validation")]
    touch(tmp_path, *names)
    assert found(tmp_path, "squad") == {"train": names[:1], "validation": names[1:]}


def test_a_file_is_train(tmp_path) -> None:
    touch(tmp_path, "reviews.csv")
    assert find_splits(tmp_path / "reviews.csv", None) == {"train": [tmp_path / "reviews.csv"]}


def test_nothing_there(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none does not exist"):
        find_splits(tmp_path / "none", None)
    with pytest.raises(UserError, match=r"no data of task sst2 .* there is nothing"):
        find_splits(tmp_path, TASKS["sst2"])
    touch(tmp_path, "rte/train.csv", "a.txt")
    with pytest.raises(UserError, match=r"no data of task sst2 .*expected DIR/sst2/train.EXT.*there is a.txt, rte"):
        find_splits(tmp_path, TASKS["sst2"])
    with pytest.raises(UserError, match=r"no train or validation file .*expected DIR/train.EXT"):
        find_splits(tmp_path, None)


def test_a_test_split_alone_is_not_used(tmp_path) -> None:
    touch(tmp_path, "test.csv")
    with pytest.raises(UserError, match="a test split only, which is never used"):
        find_splits(tmp_path, None)
