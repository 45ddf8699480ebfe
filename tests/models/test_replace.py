"""Replacing a folder: whole or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsebert.models import replace
from sparsebert.models.replace import out_of_space, previous_of, replace_folder


def fill(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "a").write_text(content)
        (folder / "b").write_text(content)

    return write


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same promises where the system cannot exchange two folders."""
    if request.param == "two renames":
        monkeypatch.setattr(replace, "_exchange", lambda *_: False)


@pytest.mark.usefixtures("either_way")
def test_new_then_replaced_and_nothing_left_behind(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    replace_folder(target, fill("1"), ["a", "b"])
    assert content(target) == {"a": "1", "b": "1"}
    replace_folder(target, lambda folder: (folder / "a").write_text("2") and None, ["a", "b"])
    assert content(target) == {"a": "2"}
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.usefixtures("either_way")
def test_other_files_of_the_user_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "README.md").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("mine too")
    (target / "link").symlink_to("README.md")
    (target / "old").write_text("part of the old model")
    replace_folder(target, fill("1"), ["a", "b", "old"])
    assert content(target) == {
        "a": "1",
        "b": "1",
        "README.md": "mine",
        "runs/log": "mine too",
        "link": "mine",
    }
    assert (target / "link").is_symlink()


def test_copies_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    monkeypatch.setattr(os, "link", refuse)
    replace_folder(tmp_path / "model", fill("1"), [])
    assert content(tmp_path / "model")["mine"] == "mine"


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), RuntimeError("x")])
def test_an_error_while_writing_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    replace_folder(target, fill("1"), ["a", "b"])

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise error

    with pytest.raises(type(error)):
        replace_folder(target, fail, ["a", "b"])
    assert content(target) == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("step", ["_flush", "_put_in_place"])
def test_an_error_at_any_later_step_changes_nothing(tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    replace_folder(tmp_path / "model", fill("1"), ["a", "b"])
    monkeypatch.setattr(replace, step, fail)
    with pytest.raises(OSError, match="broken disk"):
        replace_folder(tmp_path / "model", fill("2"), ["a", "b"])
    assert content(tmp_path / "model") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_second_rename_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_folder(tmp_path / "model", fill("1"), ["a", "b"])
    rename = os.rename

    def second_fails(source: Path, place: Path) -> None:
        if ".saving-" in str(source):
            raise OSError(errno.EIO, "broken disk")
        rename(source, place)

    monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="broken disk"):
        replace_folder(tmp_path / "model", fill("2"), ["a", "b"])
    assert content(tmp_path / "model") == {"a": "1", "b": "1"}
    assert os.listdir(tmp_path) == ["model"]


def in_child_until_killed(action: Callable[[], None]) -> None:
    """Runs `action` in a process that dies without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_while_writing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    replace_folder(target, fill("1"), ["a", "b"])

    def die(folder: Path) -> None:
        (folder / "a").write_text("half")
        os._exit(9)

    in_child_until_killed(lambda: replace_folder(target, die, ["a", "b"]))
    assert content(target) == {"a": "1", "b": "1"}
    (leftover,) = (path for path in tmp_path.iterdir() if path != target)
    replace_folder(target, fill("2"), ["a", "b"])
    assert leftover.exists(), "a young one may belong to a save that still runs"
    os.utime(leftover, (0, 0))
    replace_folder(target, fill("3"), ["a", "b"])
    assert os.listdir(tmp_path) == ["model"] and content(target) == {"a": "3", "b": "3"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    replace_folder(target, fill("1"), ["a", "b"])
    monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    rename = os.rename

    def first_then_die(source: Path, place: Path) -> None:
        rename(source, place)
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", first_then_die)
        in_child_until_killed(lambda: replace_folder(target, fill("2"), ["a", "b"]))
    assert not target.exists() and content(previous_of(target)) == {"a": "1", "b": "1"}

    def fail(_: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_folder(target, fail, ["a", "b"])
    assert content(target) == {"a": "1", "b": "1"}


def test_symlinked_target_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "model").symlink_to("real")
    for text in "12":
        replace_folder(tmp_path / "model", fill(text), ["a", "b"])
        assert (tmp_path / "model").is_symlink() and content(tmp_path / "real")["a"] == text


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_folder(tmp_path / "model", fill("1"), [])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_folders_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def no_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "cannot flush a folder")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    replace_folder(tmp_path / "model", fill("1"), [])
    assert content(tmp_path / "model") == {"a": "1", "b": "1"}


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (Exception("Error: No space left on device (os error 28)"), True),
        (Exception("something else"), False),
    ],
)
def test_out_of_space(error: BaseException, full: bool) -> None:
    assert out_of_space(error) is full
