"""A pytest plugin: one JSON line per finished test, appended to $FASTLM_TEST_LINES at once."""

from __future__ import annotations

import json
import os


def pytest_runtest_logreport(report) -> None:
    """Writes the outcome of a test's body, or of a set-up that failed or skipped it."""
    if report.when != "call" and report.outcome == "passed":
        return
    if "PYTEST_XDIST_WORKER" in os.environ:  # whoever started the workers writes
        return
    note = ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        note = report.longrepr[2]
    elif report.outcome == "failed":
        note = str(report.longrepr)[-600:]
    fact = {
        "id": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 3),
        "note": note,
    }
    with open(os.environ["FASTLM_TEST_LINES"], "a") as file:
        file.write(json.dumps(fact) + "\n")
