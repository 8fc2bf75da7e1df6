"""The table of measured winners: which implementation was fastest for a class of calls, here.

`fastlm tune` writes it, the chooser reads it: one JSON file in the user's cache folder
(`settings.tune_file`). It holds a section per machine, thread count, build and set of versions, and
is read once per process; a section of another one is never used. In a section a verdict is found by
operator, element type and facts of the call ("bfloat16, weight=bfloat16"), and the class of its
sizes ("9-16 x 4096"): widths and head counts as they are, numbers of rows up to the next power of
two, forward alone or with gradients.

Written whole or not at all, under a lock, each process adding to what the others wrote.

Files of the same form come with the package (`SHIPPED`), one per GPU that `make gpu` was run on
(`tools/gpu_report.py DIR --table` writes them). They count on GPUs of that name and capability for
classes of calls that were not measured here; the versions they were made with are noted in them and
shown with the times, but need not be those of here.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastlm import _ext, settings
from fastlm._version import __version__

FORMAT = 1
KIND = "fastlm measured winners"
SHIPPED = Path(__file__).with_name("gpus")
MARGIN = 0.97  # a later backend must be at least this much faster than one before it in the list

Identity = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What was measured for one class of calls."""

    winner: str
    us: dict[str, float]  # microseconds per call of each backend, in the order of the row's list
    shape: str  # of the call that was measured
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    note: str = ""  # where it was measured, if not here

    def __post_init__(self) -> None:
        texts = (self.winner, self.shape, self.date, self.note, *self.us)
        if not all(isinstance(text, str) for text in texts) or self.winner not in self.us:
            raise TypeError("no winner among the backends measured")
        if not all(isinstance(us, (int, float)) for us in self.us.values()):
            raise TypeError("times are numbers")

    def __str__(self) -> str:
        times = ", ".join(f"{name} {_short(us)}" for name, us in self.us.items())
        return f"{self.note or 'tuned'} {self.date}: {times}"

    def stored(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            name: value for name, value in asdict(self).items() if (name, value) != ("note", "")
        }


Classes = dict[str, Entry]  # class of sizes -> what was measured
Facts = dict[str, Classes]  # element type and facts -> their classes
Verdicts = dict[str, Facts]  # operator -> its facts


def winner(us: dict[str, float]) -> str:
    """The fastest; where times are near each other, the first of them in the row's order."""
    names = list(us)
    best = names[0]
    for name in names[1:]:
        if us[name] < MARGIN * us[best]:
            best = name
    return best


def power(n: int) -> str:
    """The class of a number of rows: "1", "2", "3-4", "5-8", "9-16" and so on."""
    if n <= 2:
        return str(n)
    top = 1 << (n - 1).bit_length()
    return f"{top // 2 + 1}-{top}"


def rows(shape: tuple[int, ...]) -> str:
    """The class of [..., width]: "9-16 x 4096"."""
    count = 1
    for n in shape[:-1]:
        count *= n
    return f"{power(count)} x {shape[-1] if shape else 1}"


def direction(grad: bool) -> str:
    """The end of a class's name."""
    return ", with gradients" if grad else ""


# ---- this machine --------------------------------------------------------------------------------


def identity(device: str) -> Identity:
    """What a section is measured on and with; another one's figures say nothing here."""
    facts: Identity = {"device": device, "fastlm": __version__, "torch": torch.__version__}
    if device == "cpu":
        facts["kernels"] = _digest("_C.*.so")
        facts["processor"] = processor()
        facts["instruction set"] = _ext.native.cpu_isa() if _ext.native else None
        facts["threads"] = torch.get_num_threads()
    elif device == "cuda" and torch.cuda.is_available():
        facts["kernels"] = _digest("_cuda.so")
        facts["GPU"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        if not _ext.triton_error():
            import triton

            facts["triton"] = triton.__version__
    return facts


def gpu() -> Identity | None:
    """What a table that comes with the package is for; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return for_gpu(found.name, f"{found.major}.{found.minor}")


def for_gpu(name: str, capability: str) -> Identity:
    """What a table of GPUs of this name is for."""
    return {"device": "cuda", "GPU": name, "capability": capability}


@functools.cache
def _digest(pattern: str) -> str | None:
    """Of the built kernels: those built anew, of the same version or not, are measured anew."""
    for library in sorted(Path(_ext.__file__).parent.glob(pattern)):
        return hashlib.blake2b(library.read_bytes(), digest_size=6).hexdigest()
    return None


def processor() -> str:
    """The processor's own name."""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


# ---- what the chooser reads ----------------------------------------------------------------------

_sections: list[dict[str, Any]] | None = None  # of the file, read at the first question
_shipped: list[dict[str, Any]] | None = None  # of the package's files
_here: dict[tuple[str, int], Verdicts] = {}  # by device type and threads
_added: dict[tuple[str, int], Verdicts] = {}  # of these, what this process measured
_fixed: Verdicts | None = None


def verdicts(device: str) -> Verdicts:
    """What was measured on tensors of this device type, here and with these versions."""
    if _fixed is not None:
        return _fixed
    key = _place(device)
    if key not in _here:
        kept, table = _read(), _of_package(device)
        if kept:
            merge(table, parsed(_section(kept, identity(device))["verdicts"]))
        _here[key] = table
    return _here[key]


def stale(stem: str, device: str) -> list[str]:
    """Why verdicts of an operator in the file are not used: what differs from here."""
    mine, reasons = identity(device), []
    for section in _read():
        other = section["for"]
        if other == mine or other.get("device") != device or stem not in section["verdicts"]:
            continue
        names = [n for n in (mine | other) if mine.get(n) != other.get(n)]
        differs = ", ".join(f"{n} {other.get(n)}, here {mine.get(n)}" for n in names)
        reasons.append(f"a table is not used: made with {differs}")
    if device == "cuda" and not _of_package(device):
        here = gpu() or {}
        for section in _read_shipped():
            names = [n for n, value in section["for"].items() if value != here.get(n)]
            differs = ", ".join(f"{n} {section['for'][n]}, here {here.get(n)}" for n in names)
            if stem in section["verdicts"]:
                reasons.append(f"a table of the package is not used: made with {differs}")
    return reasons


def _of_package(device: str) -> Verdicts:
    """What the package's files say of the GPU that is here."""
    made: Verdicts = {}
    here = gpu() if device == "cuda" and _read_shipped() else None
    for section in _read_shipped() if here else ():
        if section["for"] == here:
            table = parsed(section["verdicts"])
            for facts in table.values():
                for classes in facts.values():
                    for sizes, entry in classes.items():
                        classes[sizes] = replace(entry, note=section["note"])
            merge(made, table)
    return made


def merge(table: Verdicts, more: Verdicts) -> None:
    """Adds verdicts to a table; they count where both know a class."""
    for stem, facts in more.items():
        for name, classes in facts.items():
            table.setdefault(stem, {}).setdefault(name, {}).update(classes)


def add(device: str, stem: str, facts: str, sizes: str, entry: Entry) -> None:
    """Takes up a verdict for this process; `save` keeps it."""
    for table in (verdicts(device), _added.setdefault(_place(device), {})):
        table.setdefault(stem, {}).setdefault(facts, {})[sizes] = entry


def reload() -> None:
    """Forgets what was read and added: the next question reads the file."""
    global _sections, _shipped
    _sections = _shipped = None
    _here.clear()
    _added.clear()


def _place(device: str) -> tuple[str, int]:
    return device, torch.get_num_threads() if device == "cpu" else 0


@contextlib.contextmanager
def fixed(table: Verdicts) -> Iterator[None]:
    """Inside, these verdicts stand in place of the file's, and nothing is measured."""
    global _fixed
    before, _fixed = _fixed, table
    try:
        yield
    finally:
        _fixed = before


def stored(device: str) -> dict[str, Any]:
    """The verdicts of here as JSON has them; `parsed` reads them again."""
    return {
        stem: {
            name: {sizes: entry.stored() for sizes, entry in classes.items()}
            for name, classes in facts.items()
        }
        for stem, facts in verdicts(device).items()
    }


def is_fixed() -> bool:
    """Whether `fixed` is in force."""
    return _fixed is not None


# ---- the file ------------------------------------------------------------------------------------


def save() -> Path:
    """Adds what this process measured to the file, beside what others have written meanwhile.

    Raises:
        ValueError: the file is there and is no such table, or a table cannot be kept.
        OSError: it cannot be written.
    """
    path = location()
    with _locked(path):
        sections = load(path)
        for (device, threads), measured in _added.items():
            here = identity(device)
            section = _section(sections, here | {"threads": threads} if threads else here)
            for stem, facts in measured.items():
                for name, classes in facts.items():
                    kept = section["verdicts"].setdefault(stem, {}).setdefault(name, {})
                    kept.update({sizes: entry.stored() for sizes, entry in classes.items()})
        write(path, sections)
    return path


def clear() -> Path:
    """Removes the file, whatever is in it."""
    path = location()
    with _locked(path):
        path.unlink(missing_ok=True)
    reload()
    return path


def location() -> Path:
    """Where the table lies; ValueError where there is to be none."""
    path = settings.tune_file()
    if path is None:
        raise ValueError("FASTLM_TUNE_FILE is 'none': there is no file to keep a table in")
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """The sections of a file, none where there is none; ValueError for a file of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a table of measured winners: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path}: not a table of measured winners")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, got {content.get('format')!r}")
    sections = content.get("sections")
    try:
        assert isinstance(sections, list)
        for section in sections:
            assert isinstance(section["for"], dict)
            parsed(section["verdicts"])
    except (AssertionError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{path}: a table of measured winners that is damaged") from None
    return sections


def _read() -> list[dict[str, Any]]:
    """The file's sections, read once; a file that cannot be used is named once and ignored."""
    global _sections
    if _sections is None:
        path = settings.tune_file()
        try:
            _sections = [] if path is None else load(path)
        except (OSError, ValueError) as error:
            _sections = []
            warnings.warn(
                f"fastlm goes on without measured winners: {error}; "
                "`fastlm tune --clear` removes the file",
                stacklevel=2,
            )
    return _sections


def _read_shipped() -> list[dict[str, Any]]:
    """The sections of the package's files, read once; none where no table is to be read."""
    global _shipped
    if _shipped is None:
        _shipped = []
        for path in sorted(SHIPPED.glob("*.json")) if settings.tune_file() is not None else ():
            try:
                sections = load(path)
                if not all(isinstance(section.get("note"), str) for section in sections):
                    raise ValueError(f"{path}: a table of a GPU that does not say how it was made")
                _shipped += sections
            except (OSError, ValueError) as error:
                warnings.warn(f"fastlm goes on without a GPU's winners: {error}", stacklevel=2)
    return _shipped


def _section(sections: list[dict[str, Any]], wanted: Identity) -> dict[str, Any]:
    """The section of an identity; an empty one, added to the list, where there is none."""
    for section in sections:
        if section["for"] == wanted:
            return section
    sections.append({"for": wanted, "verdicts": {}})
    return sections[-1]


def parsed(stored: dict[str, Any]) -> Verdicts:
    """The verdicts from JSON; TypeError for what is none."""
    return {
        stem: {
            name: {sizes: Entry(**entry) for sizes, entry in classes.items()}
            for name, classes in facts.items()
        }
        for stem, facts in stored.items()
    }


def write(path: Path, sections: list[dict[str, Any]]) -> None:
    """Writes a file of these sections, whole or not at all."""
    content = {"kind": KIND, "format": FORMAT, "sections": sections}
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time reads and writes; the lock goes with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        with contextlib.suppress(ImportError):  # where there is no flock, the last one wins
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _short(us: float) -> str:
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.1f} us"
