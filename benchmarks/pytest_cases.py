"""The same cases under pytest-benchmark: `pytest benchmarks/ops --benchmark-group-by=group`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch

from . import driver
from .case import Case, Work


def benchmark_test(cases: Sequence[Case]) -> Callable[..., None]:
    """A test that checks each case once, then times ours and eager in one group.

    Without pytest, which `fastlm bench` does not need, the test only says so.
    """
    try:
        import pytest
    except ModuleNotFoundError as missing:
        return functools.partial(_refuse, missing)

    @pytest.mark.parametrize("implementation", ["ours", "eager"])
    @pytest.mark.parametrize("case", cases, ids=lambda case: case.id.split("/", 1)[1])
    def test(case: Case, implementation: str, benchmark) -> None:
        work, backend, wrong = _checked(case)
        if backend == "reference":
            pytest.skip("no kernel of its own here")
        assert not wrong, wrong
        works = [work] + [driver.build(case, copy) for copy in range(1, driver.copies(case))]
        pick = driver.implementations(work)[implementation]
        turn = itertools.cycle([driver.thunk(case, w, pick(w)) for w in works])
        for warm in itertools.islice(turn, len(works)):
            warm()
        benchmark.group = case.id
        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, backend=backend)
        with torch.set_grad_enabled(case.backward):
            benchmark(lambda: next(turn)())

    return test


def _refuse(missing: ModuleNotFoundError) -> None:
    raise missing


@functools.lru_cache(maxsize=1)  # the two implementations of a case follow each other
def _checked(case: Case) -> tuple[Work, str, str]:
    work = driver.build(case, 0)
    backend = driver.backends(case, work)
    return work, backend, "" if backend == "reference" else driver.problems(case, work)
