"""Paths of modules, those of equal layers drawn together."""

from __future__ import annotations

import re
from collections.abc import Iterable


def collapsed(paths: Iterable[str]) -> list[str]:
    """Paths with those that differ in a layer's number drawn together, each once."""
    groups: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        groups.setdefault(pattern(path), []).append(path)
    return [collapse(p, members) for p, members in groups.items()]


def pattern(path: str) -> str:
    """A path with its layer numbers replaced by stars."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def collapse(pattern: str, paths: list[str]) -> str:
    """The paths of one pattern in one: their numbers as a range or a list."""
    if not pattern:
        return "(model)"
    if len(paths) == 1:
        return paths[0]
    numbers = [[int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", p)] for p in paths]
    if pattern.count("*") != 1:
        return f"{pattern} ({len(paths)})"
    found = sorted(n[0] for n in numbers)
    if found == list(range(found[0], found[-1] + 1)):
        return pattern.replace("*", f"{{{found[0]}-{found[-1]}}}")
    return pattern.replace("*", "{" + ",".join(map(str, found)) + "}")
