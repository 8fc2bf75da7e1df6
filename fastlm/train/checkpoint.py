"""A run's folder: checkpoints that are whole or not there.

    RUN/run.json                      the settings, the source, the choice of kernels
    RUN/log.jsonl                     one line per logged step
    RUN/checkpoints/step-00001000/    config.json, model.safetensors, the tokenizer: Hugging Face's
                                      layout; optimizer.safetensors (or optimizer/, in shards) and
                                      trainer.json beside it
    RUN/latest, RUN/best              links to two of them

A checkpoint is written into a folder of another name, flushed to the disk, and renamed at the end;
a link is replaced by a rename. Whatever moment a process dies at, `latest` is a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastlm.hf.weights import COMPANIONS, read_json, write_json

Path_ = str | os.PathLike[str]
_NAME = re.compile(r"step-(\d{8,})")


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run's folder.

    Args:
        out: the folder, made if absent.
        keep: how many of the newest stay; the best one stays besides.
    """

    def __init__(self, out: Path_, keep: int = 2) -> None:
        self.out = Path(out)
        self.folder = self.out / "checkpoints"
        self.keep = keep

    def prepare(self, needed: int) -> None:
        """Makes the folder and shows that it can be written, before any work is done.

        Args:
            needed: bytes that one checkpoint will take; there must be room for two at once.

        Raises:
            TrainingError: no permission, no room.
        """
        trial = self.folder / ".trial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".*"):  # of a process that was killed while writing
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            with open(trial, "wb") as file:
                file.write(b"\0" * 4096)
                os.fsync(file.fileno())
            trial.unlink()
        except OSError as error:
            raise TrainingError(f"{self.folder} cannot be written: {error.strerror}") from error
        free = shutil.disk_usage(self.folder).free
        if free < 2 * needed:
            raise TrainingError(
                f"{self.folder}: a checkpoint takes {_size(needed)} and two must fit while one"
                f" replaces the other, but only {_size(free)} are free"
            )

    def rehearse(self, save: Callable[[Path], None]) -> None:
        """Writes a model once and removes it: what cannot be saved is found before the work.

        Raises:
            TrainingError: with the reason.
        """
        trial = self.folder / ".trial"
        try:
            trial.mkdir(exist_ok=True)
            save(trial)
        except (OSError, ValueError) as error:
            raise TrainingError(f"{self.out}: the model could not be saved: {error}") from error
        finally:
            shutil.rmtree(trial, ignore_errors=True)

    def latest(self) -> Path | None:
        """The checkpoint to go on from, None where there is none."""
        pointed = self._pointed("latest")
        if pointed is not None:
            return pointed
        whole = self._whole()
        return whole[-1] if whole else None

    def best(self) -> Path | None:
        """The checkpoint with the lowest validation loss."""
        return self._pointed("best")

    @contextlib.contextmanager
    def writing(self, step: int, first: bool = True) -> Iterator[Path]:
        """A folder to write checkpoint `step` into; `finish` makes it one.

        Args:
            step: its number.
            first: whether this process is the one that makes the folder.
        """
        fresh = self.folder / f".step-{step:08}"
        if first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
        try:
            yield fresh
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise

    def finish(self, fresh: Path, best: bool = False) -> Path:
        """Turns a written folder into a checkpoint, points the links at it, removes old ones."""
        _flush(fresh)
        target = self.folder / fresh.name.removeprefix(".")
        if target.exists():  # of a run that went on from an earlier checkpoint
            self._remove(target)
        os.replace(fresh, target)
        _flush_folder(self.folder)
        if best:
            self._point("best", target)
        self._point("latest", target)
        kept = {*self._whole()[-self.keep :], target, self.best()}
        for old in self._whole():
            if old not in kept:
                self._remove(old)
        return target

    def _whole(self) -> list[Path]:
        found = [p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def _pointed(self, name: str) -> Path | None:
        link = self.out / name
        if not link.is_symlink():
            return None
        target = self.folder / Path(os.readlink(link)).name
        return target if target.is_dir() else None

    def _point(self, name: str, target: Path) -> None:
        fresh = self.out / f".{name}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path("checkpoints") / target.name)
        os.replace(fresh, self.out / name)
        _flush_folder(self.out)

    def _remove(self, checkpoint: Path) -> None:
        # renamed first: what is half removed is no longer called a checkpoint
        doomed = self.folder / f".old-{checkpoint.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def resolve(path: Path_) -> Path:
    """A model's folder: of a run its best checkpoint, else its latest; else the path itself."""
    path = Path(path)
    if (path / "config.json").exists() or not (path / "checkpoints").is_dir():
        return path
    checkpoints = Checkpoints(path)
    found = checkpoints.best() or checkpoints.latest()
    if found is None:
        raise TrainingError(f"{path}: the run has no checkpoint yet")
    return found


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, flushed to the disk; several processes may do so at once."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with open(fresh, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _flush_folder(path.parent)


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def copy_tokenizer(source: Path_, target: Path) -> None:
    """The tokenizer's files of one folder into another."""
    for name in COMPANIONS:
        if (Path(source) / name).is_file():
            write_text(target / name, (Path(source) / name).read_text(encoding="utf-8"))


def save_decoder(model: Any, folder: Path) -> None:
    """Weights, config and tokenizer, as transformers reads them."""
    model.save_pretrained(folder)


def load_decoder(model: Any, folder: Path) -> None:
    """Reads the weights that `save_decoder` wrote into a model of the same shape."""
    from fastlm.hf.weights import load

    weight = next(model.parameters())
    stored = load(folder, weight.dtype)
    theirs, ours = _shape(stored.config), _shape(model.config)
    for key, value in ours.items():
        if theirs[key] != value:
            raise TrainingError(
                f"{folder}: a checkpoint of another shape: {key} is {theirs[key]}, the model's is"
                f" {value}"
            )
    model.load_state_dict(stored.state_dict())


def _shape(config: Any) -> dict[str, Any]:
    fields = "vocab hidden layers heads kv_heads head_dim intermediate norm positions activation"
    fields += " gated qkv_bias out_bias mlp_bias window tied_head"
    return {name: getattr(config, name) for name in fields.split()}


def _flush(folder: Path) -> None:
    """Everything below to the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(place, name), "rb+") as file:
                os.fsync(file.fileno())
        _flush_folder(Path(place))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(count: float) -> str:
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"


Save = Callable[[Any, Path], None]
__all__ = [
    "Checkpoints",
    "Save",
    "TrainingError",
    "copy_tokenizer",
    "load_decoder",
    "read_json",
    "resolve",
    "save_decoder",
    "write_json",
    "write_record",
    "write_text",
]
