"""A folder that appears complete or not at all."""

from __future__ import annotations

import os
import signal
import time

import pytest

from fastlm.data import DataError
from fastlm.data.folder import complete_folder


def fill(target, text, overwrite=False):
    with complete_folder(target, "mark", overwrite) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)
        (folder / "mark").write_text(text)


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_takes_its_name_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with complete_folder(target, "mark", False) as folder:
        (folder / "mark").write_text("1")
        assert not target.exists()
    assert names(target) == ["mark"]
    assert names(target.parent) == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with (
        pytest.raises(RuntimeError, match="stop"),
        complete_folder(tmp_path / "out", "mark", False) as folder,
    ):
        (folder / "file").write_text("half")
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_an_existing_folder_stays(tmp_path):
    target = tmp_path / "out"
    fill(target, "1")
    with pytest.raises(DataError, match="the folder exists; --overwrite replaces it"):
        fill(target, "2")
    with pytest.raises(RuntimeError), complete_folder(target, "mark", True):
        raise RuntimeError
    assert (target / "inner" / "file").read_text() == "1"
    fill(target, "2", overwrite=True)
    assert (target / "inner" / "file").read_text() == "2"
    assert names(tmp_path) == ["out"]


def test_without_exchange_too(tmp_path, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    fill(tmp_path / "out", "1")
    fill(tmp_path / "out", "2", overwrite=True)
    assert (tmp_path / "out" / "mark").read_text() == "2"
    assert names(tmp_path) == ["out"]


def test_what_is_not_ours_is_not_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(DataError, match="holds no mark"):
        fill(tmp_path / "home", "1", overwrite=True)
    with pytest.raises(DataError, match="found a file"):
        fill(tmp_path / "home" / "letter", "1", overwrite=True)
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "1")
    assert names(tmp_path / "empty") == ["inner", "mark"]


def test_two_writers_of_one_folder(tmp_path):
    with complete_folder(tmp_path / "out", "mark", False) as folder:
        (folder / "mark").write_text("first")
        with pytest.raises(DataError, match="another process is writing it"):
            fill(tmp_path / "out", "second")
    assert (tmp_path / "out" / "mark").read_text() == "first"


@pytest.mark.parametrize("before", [None, "1"])
def test_killed_while_writing(tmp_path, before):
    target = tmp_path / "out"
    if before:
        fill(target, before)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with complete_folder(target, "mark", True) as folder:
            (folder / "half").write_text("half")
            os.write(writer, b"!")
            time.sleep(60)
        os._exit(1)
    assert os.read(reader, 1) == b"!"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == sorted([".out.partial", *(["out"] if before else [])])
    if before:
        assert (target / "inner" / "file").read_text() == before
    fill(target, "2", overwrite=True)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["inner", "mark"]


def test_no_permission(tmp_path, nobody):
    tmp_path.chmod(0o555)
    with nobody(tmp_path), pytest.raises(PermissionError, match="out"):
        fill(tmp_path / "out", "1")
    tmp_path.chmod(0o700)
    assert names(tmp_path) == []
