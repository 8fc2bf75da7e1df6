"""A folder that appears complete or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastlm.data import DataError


@contextlib.contextmanager
def complete_folder(target: str | os.PathLike[str], mark: str, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes the name `target` when the block ends without error.

    The work stands in a hidden sibling, `.NAME.partial`. It is written to the disk and then
    renamed in one step, so a process killed at any moment leaves either no `target`, the old one
    or the new one. What a killed process left behind is removed by the next.

    Args:
        target: the folder to make. An empty one may exist already.
        mark: a file that says a folder is of this kind: only such a folder is overwritten.
        overwrite: replace a `target` that exists; it stays until the new one is complete.

    Raises:
        DataError: `target` exists, is of another kind, or is being written by another process.
        OSError: no permission, no space.
    """
    target = Path(os.path.abspath(target))
    _check_target(target, mark, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.partial"
    with _own(partial, target):
        try:
            yield partial
            _sync(partial)
            _take_name(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_target(target: Path, mark: str, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise DataError(f"{target}: expected a folder or nothing, found a file")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise DataError(f"{target}: the folder exists; --overwrite replaces it")
    if not (target / mark).is_file():
        raise DataError(
            f"{target}: holds no {mark}, so it was not written by this command; not overwritten"
        )


@contextlib.contextmanager
def _own(partial: Path, target: Path) -> Iterator[None]:
    """An empty `partial`, locked; what a dead process left in it is removed."""
    for _ in range(10):
        partial.mkdir(exist_ok=True)
        handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(handle), os.stat(partial)):
                raise FileNotFoundError  # renamed by its owner since we opened it
        except BlockingIOError:
            os.close(handle)
            raise DataError(f"{target}: another process is writing it now") from None
        except FileNotFoundError:
            os.close(handle)
            continue
        try:
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
        finally:
            os.close(handle)
        return
    raise DataError(f"{target}: other processes are writing it")


def _sync(folder: Path) -> None:
    """Everything below `folder` to the disk."""
    for root, _, files in os.walk(folder):
        for path in [*(os.path.join(root, file) for file in files), root]:
            _sync_one(path)


def _sync_one(path: str | os.PathLike[str]) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_name(partial: Path, target: Path) -> None:
    if not target.is_dir():
        os.rename(partial, target)
        return _sync_one(target.parent)
    handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # it will bear the name of work in progress
        _exchange(partial, target)
        _sync_one(target.parent)
        shutil.rmtree(partial)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders' names in one step; in two where the file system cannot."""
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), swap) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code), str(old))
    aside = old.parent / f".{old.name}.old"
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(old, aside)
    os.rename(new, old)
    os.rename(aside, new)
