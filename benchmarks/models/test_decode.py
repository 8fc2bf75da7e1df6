"""Decoding a model of 15M parameters under pytest: right first, then timed in turns."""

from __future__ import annotations

import importlib.util

import pytest

from . import decode

PEERS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_decode(kind, capsys):
    there = [name for name, package in PEERS.items() if importlib.util.find_spec(package)]
    found = decode.measure("15M", kind, ["modules", *there], rounds=2, realtime=False)
    with capsys.disabled():
        print("\n" + decode.line(found))
    assert found["tokens_per_second"]["ours"] > 0
