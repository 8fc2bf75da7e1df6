"""Keeping freed memory: asked for only, by function or environment, and named."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# page faults of ten tensors of 64 MiB, each freed before the next is made
FAULTS = """
import resource, torch, fastlm
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):  # blocks are cut and aligned until the holes fit
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before, fastlm.info()["memory allocator"])
"""


def run(call="", **environment):
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"} | environment
    code = FAULTS.format(call=call)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("way", ["function", "environment"])
def test_freed_memory_is_kept_when_asked(way):
    plain = run(FASTLM_MALLOC="").stdout.split(maxsplit=1)
    if way == "function":
        kept = run("fastlm.keep_freed_memory()", FASTLM_MALLOC="").stdout.split(maxsplit=1)
    else:
        kept = run(FASTLM_MALLOC="keep").stdout.split(maxsplit=1)
    assert "keeping" not in plain[1] and "keeping freed memory" in kept[1]
    assert int(kept[0]) * 4 < int(plain[0])  # of 160,000 pages, or 320 huge ones


def test_another_word_is_refused():
    result = run(FASTLM_MALLOC="yes")
    assert result.returncode != 0
    assert "FASTLM_MALLOC: expected keep, got 'yes'" in result.stderr
