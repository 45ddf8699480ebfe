from __future__ import annotations

import hashlib
import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from sparsebert.data import TASKS, load_task
from sparsebert.errors import UserError

ANSWER = {"text": ["red"], "answer_start": [13]}


def glue_row(task: str, row: int) -> dict:
    """A row in the hub's layout; the label is a class number, or a score."""
    spec = TASKS[task]
    texts = {name: f"{name} number {row}" for name in spec.text_columns}
    return texts | {"label": row % len(spec.label_names) if spec.label_names else row % 5 + 0.5, "idx": row}


def glue(task: str, rows: int) -> dict[str, list]:
    table = [glue_row(task, row) for row in range(rows)]
    return {name: [row[name] for row in table] for name in table[0]}


def squad(rows: int, answers=ANSWER) -> dict[str, list]:
    return {
        "id": [f"id{row}" for row in range(rows)],
        "context": [f"The house is red {row}." for row in range(rows)],
        "question": [f"Which colour {row}?" for row in range(rows)],
        "answers": [answers] * rows,
    }


GLUE = [name for name, spec in TASKS.items() if spec.hub and spec.kind != "span"]


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("task", GLUE)
def test_glue_tasks_in_every_format(tmp_path, write, task, ending) -> None:
    write(tmp_path / task / f"train.{ending}", glue(task, 12))
    write(tmp_path / task / f"validation.{ending}", glue(task, 6))
    data = load_task(task, str(tmp_path))
    spec = TASKS[task]
    assert data.spec == spec
    assert (len(data.train), len(data.validation), data.extra_validation) == (12, 6, {})
    assert data.train.column_names == [*spec.text_columns, "label"]
    assert data.train["label"][:] == glue(task, 12)["label"]
    assert data.validation[spec.text_columns[0]][:] == glue(task, 6)[spec.text_columns[0]]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("task", [name for name in GLUE if TASKS[name].label_names])
def test_labels_as_names(tmp_path, write, task, ending) -> None:
    columns = glue(task, 6)
    columns["label"] = [TASKS[task].label_names[number] for number in columns["label"]]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.{ending}", columns)
    assert load_task(task, tmp_path).train["label"][:] == glue(task, 6)["label"]


def test_stored_class_names_win_over_their_order(tmp_path) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["positive", "negative"])})
    table = Dataset.from_dict({"sentence": ["good", "bad"], "label": [0, 1]}, features=features)
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    assert load_task("sst2", tmp_path).train["label"][:] == [1, 0]


ORIGINAL = {
    "CoLA/train.tsv": "gj04\t1\t\tOur friends.\ngj04\t0\t*\tThem friends.\n",
    "CoLA/dev.tsv": "gj04\t1\t\tWe \"won.\ngj04\t0\t*\tUs won.\n",
    "STS-B/train.tsv": "index\tsentence1\tsentence2\tscore\n0\ta b\tc d\t5.000\n1\te\tf\t0.4\n",
    "STS-B/dev.tsv": "index\tsentence1\tsentence2\tscore\n0\tg\th\t5.000\n",
    "MRPC/train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n0\t3\t4\t\"c\td\n",
    "MRPC/dev.tsv": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\te\tf\n",
    "QQP/train.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\nbroken\n0\t1\t2\tc\td\t0\n",
    "QQP/dev.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\te\tf\t1\n",
    "MNLI/train.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
                      "0\ta\tb\tneutral\tneutral\n1\tc\td\tx\tentailment\n",
    "MNLI/dev_matched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\te\tf\tx\tcontradiction\n",
    "MNLI/dev_mismatched.tsv": "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\tg\th\tx\tneutral\n",
    "QNLI/train.tsv": "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
    "QNLI/dev.tsv": "index\tquestion\tsentence\tlabel\n0\te\tf\tnot_entailment\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "train", "validation"),
    [
        ("cola", [("Our friends.", 1), ("Them friends.", 0)], [('We "won.', 1), ("Us won.", 0)]),
        ("stsb", [("a b", "c d", 5.0), ("e", "f", 0.4)], [("g", "h", 5.0)]),
        ("mrpc", [("a", "b", 1), ('"c', "d", 0)], [("e", "f", 1)]),
        ("qqp", [("a", "b", 1), ("c", "d", 0)], [("e", "f", 1)]),
        ("mnli", [("a", "b", 1), ("c", "d", 0)], [("e", "f", 2)]),
        ("qnli", [("a", "b", 0), ("c", "d", 1)], [("e", "f", 1)]),
    ],
)
def test_glues_original_files(tmp_path, task, train, validation) -> None:
    for name, content in ORIGINAL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    data = load_task(task, tmp_path)
    assert [tuple(row.values()) for row in data.train] == train
    assert [tuple(row.values()) for row in data.validation] == validation
    assert ("1 rows with too few fields were dropped" in data.note) == (task == "qqp")
    if task == "mnli":
        assert [tuple(row.values()) for row in data.extra_validation["mismatched"]] == [("g", "h", 1)]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json"])
def test_squad(tmp_path, write, ending) -> None:
    for split, rows in (("train", 5), ("validation", 3)):
        write(tmp_path / "squad" / f"{split}.{ending}", squad(rows))
    data = load_task("squad", tmp_path)
    assert data.train[1] == {
        "id": "id1", "question": "Which colour 1?", "context": "The house is red 1.", "answers": ANSWER
    }  # fmt: skip
    assert len(data.validation) == 3


def test_squads_original_json(tmp_path) -> None:
    qas = [{"id": "a", "question": "Which?", "answers": [{"text": "red", "answer_start": 13}]}]
    qas.append({"id": "b", "question": "Why?", "answers": [], "is_impossible": True})
    content = {
        "version": "v2.0",
        "data": [{"title": "T", "paragraphs": [{"context": "The house is red.", "qas": qas}]}],
    }
    for name in ("train-v2.0.json", "dev-v2.0.json"):
        (tmp_path / name).write_text(json.dumps(content))
    data = load_task("squad_v2", tmp_path)
    assert data.validation["answers"][:] == [ANSWER, {"text": [], "answer_start": []}]
    assert data.validation["id"][:] == ["a", "b"]
    for name in ("train.json", "dev.json"):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="question has no answer; use --task squad_v2"):
        load_task("squad", tmp_path)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["blue"], "answer_start": [13]}, "the answer 'blue' is not at character 13"),
        ({"text": ["red"], "answer_start": [-2]}, "not at character -2"),
        ({"text": ["red", "x"], "answer_start": [13]}, "lists of one length"),
        ({"text": ["red"]}, "expected an object with the lists"),
        ("red", "expected an object with the lists"),
        ({"text": "red", "answer_start": 13}, "lists of one length"),
        ({"text": ["red"], "answer_start": ["13"]}, "expected text and an integer"),
    ],
)
def test_wrong_answers(tmp_path, write, answers, message) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", squad(2, answers))
    with pytest.raises(UserError, match=rf"train.jsonl: row 1, column 'answers'.*{message}"):
        load_task("squad", tmp_path)


def test_squad_needs_a_format_that_can_hold_answers(tmp_path, write) -> None:
    write(tmp_path / "train.csv", squad(2))
    with pytest.raises(UserError, match=r"csv cannot hold answers"):
        load_task("squad", tmp_path)


def test_shards_are_joined_in_order(tmp_path, write) -> None:
    for shard in range(3):
        columns = {"sentence": [f"shard {shard} row {row}" for row in range(4)], "label": [0, 1, 0, 1]}
        write(tmp_path / f"train-0000{shard}-of-00003.parquet", columns)
    write(tmp_path / "validation-00000-of-00001.parquet", glue("sst2", 4))
    data = load_task("sst2", tmp_path)
    assert data.train["sentence"][:] == [f"shard {shard} row {row}" for shard in range(3) for row in range(4)]
    assert len(data.fingerprint["train"]) == 3


def test_the_fingerprint_names_the_data(tmp_path, write) -> None:
    train = write(tmp_path / "train.csv", glue("sst2", 8))
    write(tmp_path / "validation.csv", glue("sst2", 4))
    data = load_task("sst2", tmp_path, max_train_samples=4, seed=2)
    digest = hashlib.sha256(train.read_bytes()).hexdigest()
    assert data.fingerprint["train"] == [{"file": "train.csv", "sha256": digest, "rows": 8}]
    assert data.fingerprint["rows"] == {"train": 4, "validation": 4}
    assert data.fingerprint["sample"] == {"seed": 2, "max_train_samples": 4, "max_eval_samples": None}
    assert json.loads(json.dumps(data.fingerprint)) == data.fingerprint
    assert str(tmp_path) not in json.dumps(data.fingerprint)


def test_samples(tmp_path, write) -> None:
    write(tmp_path / "train.csv", glue("mnli", 60))
    for split in ("validation_matched", "validation_mismatched"):
        write(tmp_path / f"{split}.csv", glue("mnli", 30))
    one, two = (load_task("mnli", tmp_path, max_train_samples=10, max_eval_samples=5) for _ in range(2))
    assert one.train["premise"][:] == two.train["premise"][:]
    assert (len(one.train), len(one.validation), len(one.extra_validation["mismatched"])) == (10, 5, 5)
    other = load_task("mnli", tmp_path, max_train_samples=10, seed=1)
    assert other.train["premise"][:] != one.train["premise"][:]
    with pytest.raises(UserError, match="max_eval_samples: expected at least 1"):
        load_task("mnli", tmp_path, max_eval_samples=0)


def test_notes_on_size_and_overlap(tmp_path, write) -> None:
    write(tmp_path / "train.csv", glue("rte", 12))
    write(tmp_path / "validation.csv", glue("rte", 6))
    note = load_task("rte", tmp_path).note
    assert "train has 12 rows, the official set 2,490" in note
    assert "validation has 6 rows, the official set 277" in note
    assert "6 of 6 validation inputs are in train too" in note


def test_no_train_split(tmp_path, write) -> None:
    write(tmp_path / "qnli" / "validation.csv", glue("qnli", 6))
    with pytest.raises(UserError, match=r"task qnli has no train split in .*: found validation only"):
        load_task("qnli", tmp_path)
    data = load_task("qnli", tmp_path, require_train=False, max_train_samples=3)
    assert (len(data.train), len(data.validation)) == (0, 6)
    assert data.train.column_names == data.validation.column_names
    assert "no train split" in data.note


def test_no_validation_split(tmp_path, write) -> None:
    write(tmp_path / "train.csv", glue("sst2", 100))
    data, again = load_task("sst2", tmp_path), load_task("sst2", tmp_path)
    assert (len(data.train), len(data.validation)) == (90, 10)
    assert sum(data.validation["label"][:]) == 5
    assert data.validation["sentence"][:] == again.validation["sentence"][:]
    assert "no validation file: 10 of the training rows (10 %, stratified by label" in data.note
    assert data.fingerprint["split"] == {"held_out": 0.1, "seed": 0, "validation": 10}


def test_only_mismatched(tmp_path, write) -> None:
    write(tmp_path / "validation_mismatched.csv", glue("mnli", 6))
    with pytest.raises(UserError, match="validation_matched is needed"):
        load_task("mnli", tmp_path, require_train=False)


def test_the_hub(monkeypatch) -> None:
    def fake(repo, config):
        assert (repo, config) == ("nyu-mll/glue", "mnli")
        columns = glue("mnli", 9)
        features = Features(
            {"premise": Value("string"), "hypothesis": Value("string"),
             "label": ClassLabel(names=["entailment", "neutral", "contradiction"]), "idx": Value("int32")}
        )  # fmt: skip
        hidden = Dataset.from_dict(columns | {"label": [-1] * 9}, features=features)
        data = Dataset.from_dict(columns, features=features)
        names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
        return DatasetDict({name: hidden if "test" in name else data for name in names})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = load_task("mnli")
    assert data.train["label"][:] == glue("mnli", 9)["label"]
    assert list(data.extra_validation) == ["mismatched"]
    assert data.fingerprint["hub"] == "nyu-mll/glue (mnli)"
    json.dumps(data.fingerprint)


def test_the_hubs_squad(monkeypatch) -> None:
    table = Dataset.from_dict(squad(3))
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config: DatasetDict(train=table, validation=table))
    data = load_task("squad")
    assert data.validation["answers"][:] == [ANSWER] * 3
    assert data.validation["id"][:] == ["id0", "id1", "id2"]


@pytest.mark.parametrize("error", [ConnectionError("no route\nmore"), OSError("offline"), RuntimeError("")])
def test_no_network(monkeypatch, error) -> None:
    def fail(*_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"could not load nyu-mll/glue \(sst2\) .*give --data-dir") as caught:
        load_task("sst2")
    assert "\n" not in str(caught.value)
    assert type(error).__name__ in str(caught.value)
