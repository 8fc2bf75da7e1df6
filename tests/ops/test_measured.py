"""The table of measured winners, and the chooser that uses it. Times are made up."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

import fastlm
import fastlm.tune
from fastlm import ops, reference
from fastlm.ops import _measured, _product, _registry
from fastlm.testing import check

NATIVE = pytest.mark.skipif("cpu" not in ops.implementations("rms_norm"), reason="no kernels")
X = torch.ones(12, 64)
CLASS = "9-16 x 64"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty table in a file of the test's own."""
    path = tmp_path / "cache" / "tuned.json"
    monkeypatch.setenv("FASTLM_TUNE_FILE", str(path))
    _measured.reload()
    _registry.forget()
    yield path
    _measured.reload()
    _registry.forget()


@pytest.fixture
def times(monkeypatch):
    """What the clock says of each implementation, in microseconds."""
    us = {"cpu": 12.0, "torch": 9.0}
    monkeypatch.setattr(
        fastlm.tune, "_interleave", lambda verdict, names, *rest: {name: us[name] for name in names}
    )
    return us


def entry(**us: float) -> _measured.Entry:
    return _measured.Entry(_measured.winner(us), us, "12x64", "2026-11-23")


def tell(stem="rms_norm", facts="float32, weight=None", sizes=CLASS, **us):
    """Puts a verdict into the file, as another process would have."""
    _measured.add("cpu", stem, facts, sizes, entry(**us))
    _measured.save()
    _measured.reload()
    _registry.forget()


def chosen(call, *args, **kwargs):
    with _registry.recording() as verdicts:
        call(*args, **kwargs)
    return verdicts[-1].chosen


@pytest.mark.parametrize(
    "n, name",
    [
        (0, "0"),
        (1, "1"),
        (2, "2"),
        (3, "3-4"),
        (4, "3-4"),
        (5, "5-8"),
        (64, "33-64"),
        (65, "65-128"),
    ],
)
def test_rows_are_told_apart_by_powers_of_two(n, name):
    assert _measured.power(n) == name


def test_ties_go_to_the_first_of_the_list():
    assert _measured.winner({"cpu": 10.0, "torch": 9.8}) == "cpu"
    assert _measured.winner({"cpu": 10.0, "torch": 9.6}) == "torch"
    assert _measured.winner({"cuda": 10.0, "triton": 9.0, "torch": 8.9}) == "triton"


@NATIVE
def test_the_table_decides_for_its_class_only(table):
    assert chosen(ops.rms_norm, X) == "cpu"
    tell(cpu=12.0, torch=9.0)
    assert chosen(ops.rms_norm, X) == chosen(ops.rms_norm, X[:9]) == "torch"
    for other in (X[:8], X.bfloat16(), X[:, :63], X.clone().requires_grad_()):
        assert chosen(ops.rms_norm, other) == "cpu"
    assert chosen(ops.rms_norm, X, residual=X) == "cpu"


@NATIVE
def test_what_is_chosen_is_what_runs(table, monkeypatch):
    tell(cpu=12.0, torch=9.0)
    ran = []
    monkeypatch.setattr(torch, "rms_norm", lambda x, *rest: ran.append(len(x)) or x)
    for rows in (12, 4, 12, 16, 17):
        ops.rms_norm(X[:1].expand(rows, 64))
    assert ran == [12, 12, 16]


@NATIVE
def test_a_table_that_says_what_would_run_anyway_costs_no_look_up(table):
    from fastlm.ops import rms_norm  # the function, whose module holds the memory

    memory = sys.modules[rms_norm.__module__]._chosen
    tell(cpu=9.0, torch=12.0)
    ops.rms_norm(X)
    assert list(memory) == [(True, torch.float32, True)]
    tell(cpu=12.0, torch=9.0)
    ops.rms_norm(X)
    assert (True, torch.float32, True) not in memory and len(memory) == 1


@NATIVE
def test_an_option_that_the_winner_lacks_is_another_class(table):
    logits, target = torch.randn(12, 64), torch.zeros(12, dtype=torch.int64)
    ops.cross_entropy(logits, target, z_loss=0.1)
    tell("cross_entropy", "float32, options=()", cpu=12.0, torch=9.0)
    assert chosen(ops.cross_entropy, logits, target, z_loss=0.1) == "cpu"
    assert chosen(ops.cross_entropy, logits, target) == "torch"
    assert chosen(ops.cross_entropy, logits, target, softcap=5.0) == "cpu"


@NATIVE
def test_a_forced_backend_beats_the_table(table):
    tell(cpu=12.0, torch=9.0)
    for name in ("cpu", "reference"):
        with ops.use_backend(name):
            assert chosen(ops.rms_norm, X) == name
    assert chosen(ops.rms_norm, X) == "torch"


@NATIVE
def test_explain_shows_the_times(table):
    tell(cpu=1234.5, torch=9.0)
    text = fastlm.explain("rms_norm", X)
    assert text.splitlines()[0].endswith(": torch")
    assert f"tuned 2026-11-23: cpu 1.23 ms, torch 9.0 us for {CLASS}" in text
    assert "could run too, stands behind" in text
    assert f"tuned 2026-11-23: cpu 1.23 ms, torch 9.0 us: {CLASS} (float32, weight=None)" in (
        fastlm.explain("rms_norm")
    )


@pytest.mark.parametrize(
    "name, value",
    [("torch", "2.1.0"), ("processor", "Z80"), ("threads", 77), ("kernels", "an older build")],
)
def test_a_table_made_elsewhere_is_not_used_and_explained(table, name, value):
    tell(cpu=12.0, torch=9.0)
    content = json.loads(table.read_text())
    content["sections"][0]["for"][name] = value
    table.write_text(json.dumps(content))
    _measured.reload()
    _registry.forget()
    assert chosen(ops.rms_norm, X) == ops.implementations("rms_norm")[0]
    for text in (fastlm.explain("rms_norm", X), fastlm.explain("rms_norm")):
        assert f"a table is not used: made with {name} {value}, here" in text


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not a table of measured winners"),
        ("[1, 2]", "not a table of measured winners"),
        ('{"my": "notes"}', "not a table of measured winners"),
        ('{"kind": "fastlm measured winners", "format": 99}', "expected format 1, got 99"),
        ('{"kind": "fastlm measured winners", "format": 1, "sections": [{}]}', "damaged"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_once_and_left_alone(table, text, says):
    table.parent.mkdir()
    table.write_text(text)
    with pytest.warns(UserWarning, match=f"{table}.*{says}"):
        ops.rms_norm(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.layer_norm(X)
        _measured.add("cpu", "rms_norm", "float32, weight=None", CLASS, entry(cpu=2.0, torch=1.0))
        with pytest.raises(ValueError, match=says):
            _measured.save()
    assert table.read_text() == text
    _measured.clear()
    assert not table.exists()


def test_a_winner_that_cannot_run_here_is_passed_over(table):
    tell(cuda=9.0, cpu=12.0)
    assert chosen(ops.rms_norm, X) == ops.implementations("rms_norm")[0]


WRITER = """
import sys
from fastlm.ops import _measured
for i in range(20):
    us = {"cpu": 12.0, "torch": 9.0}
    _measured.add("cpu", sys.argv[1], "float32", str(i), _measured.Entry("torch", us, "1x1"))
    _measured.save()
    print(i, flush=True)
"""


def like_here(**environment):
    """For a process with as many threads as this one, whose verdicts are then of one kind."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}


def writer(stem, path):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, stem],
        stdout=subprocess.PIPE,
        text=True,
        env=like_here(FASTLM_TUNE_FILE=str(path)),
    )


def test_processes_that_write_at_once_lose_nothing(table):
    running = [writer(stem, table) for stem in ("rope", "linear")]
    assert [process.wait(120) for process in running] == [0, 0]
    _measured.reload()
    for stem in ("rope", "linear"):
        assert len(_measured.verdicts("cpu")[stem]["float32"]) == 20
    assert sorted(p.name for p in table.parent.iterdir()) == ["tuned.json", "tuned.json.lock"]


def test_a_process_killed_while_it_writes_leaves_a_whole_file(table):
    process = writer("rope", table)
    process.stdout.readline()
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(120)
    (table.parent / ".tuned.json.left").write_text("{")  # what a kill before the rename leaves
    assert _measured.load(table)
    tell(cpu=12.0, torch=9.0)
    assert "rope" in _measured.verdicts("cpu")
    assert sorted(p.name for p in table.parent.iterdir()) == ["tuned.json", "tuned.json.lock"]


# ---- measuring -----------------------------------------------------------------------------------


@NATIVE
def test_the_first_call_of_a_class_is_measured_and_later_ones_follow_it(table, times):
    with fastlm.tune.tuning() as results:
        ops.rms_norm(X)
        assert [r.entry.winner for r in results] == ["torch"]
        times["torch"] = 100.0
        ops.rms_norm(X[:10])  # the verdict of a class stays what it was
        assert len(results) == 1
        ops.rms_norm(X.clone().requires_grad_())
        assert results[1].verdict.sizes == f"{CLASS}, with gradients"
        assert results[1].entry.winner == "cpu"
    assert chosen(ops.rms_norm, X) == "torch"
    _measured.save()
    _measured.reload()
    _registry.forget()
    assert chosen(ops.rms_norm, X) == "torch"
    with fastlm.tune.tuning() as results:
        ops.rms_norm(X)
    assert not results
    with fastlm.tune.tuning(again=True) as results:
        ops.rms_norm(X)
        ops.rms_norm(X)
    assert [r.entry.winner for r in results] == ["cpu"]


@NATIVE
@pytest.mark.parametrize("grad", [False, True])
def test_every_operator_can_be_measured(table, times, grad):
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=grad)

    def run():
        x, w, q = leaf(20, 64), leaf(48, 64), leaf(1, 4, 20, 16)
        target = torch.zeros(20, dtype=torch.int64)
        angles = torch.ones(20, 16)
        ops.rms_norm(x, leaf(64), residual=leaf(20, 64))
        ops.layer_norm(x, leaf(64), leaf(64))
        ops.rope(q, leaf(1, 2, 20, 16), angles, angles)
        ops.rope(q, None, angles, angles)
        ops.activation(x, "gelu")
        ops.gated_activation(x, leaf(20, 64), "silu")
        ops.gated_activation(x, None, "silu")
        ops.attention(q, leaf(1, 2, 20, 16), leaf(1, 2, 20, 16), causal=True)
        if not grad:
            ops.decode_attention(q[:, :, :1], leaf(1, 2, 30, 16), leaf(1, 2, 30, 16), 20)
        ops.linear(x, w, leaf(48))
        ops.feed_forward(x, w, leaf(64, 48), b_in=leaf(48))
        ops.cross_entropy(x, target)
        ops.linear_cross_entropy(x, w, target)
        ops.quantized_linear(x, ops.quantize_weight(w.detach()))
        ops.sample(x, torch.rand(20, dtype=torch.float64))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastlm.tune.tuning() as results:
            run()
    assert not any(r.wrong for r in results), [r.wrong for r in results]
    measured = {r.verdict.stem for r in results}
    assert measured >= set(_registry.stems()) - {"sample", "rope_append", "decode_attention"}
    assert all(r.verdict.sizes.endswith("with gradients") == grad for r in results)


@NATIVE
def test_a_wrong_result_never_wins(table, times, monkeypatch):
    row = sys.modules[ops.rms_norm.__module__]
    monkeypatch.setitem(row._DIRECT, "cpu", lambda x, *rest: 1.001 * x)
    times["cpu"] = 1.0
    with fastlm.tune.tuning() as results:
        ops.rms_norm(X)
    assert "TOO LARGE" in results[0].wrong["cpu"]
    assert chosen(ops.rms_norm, X) == results[0].entry.winner == "torch"


@NATIVE
def test_the_clock_itself(table):
    with fastlm.tune.tuning(seconds=0.01) as results:
        ops.layer_norm(X)
    assert list(results[0].entry.us) == ["cpu", "torch"]
    assert all(us > 0 for us in results[0].entry.us.values())


@NATIVE
def test_operators_are_themselves_again_afterwards(table):
    before = {name: getattr(ops, name) for name in ops.__all__}
    with pytest.raises(KeyError), fastlm.tune.tuning():
        assert ops.linear is not before["linear"]
        raise KeyError
    assert before == {name: getattr(ops, name) for name in ops.__all__}


@NATIVE
def test_the_environment_asks_for_it(table):
    code = (
        "import torch\nfrom fastlm import ops\nfor i in range(3): ops.layer_norm(torch.ones(4, 8))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=like_here(FASTLM_TUNE="1"))
    assert list(_measured.verdicts("cpu")["layer_norm"]) == ["float32, weight=None, bias=None"]


# ---- what it must go together with ---------------------------------------------------------------


@NATIVE
def test_a_compiled_graph_takes_the_order_of_the_list(table, times):
    tell(cpu=12.0, torch=9.0)
    f = torch.compile(lambda x: ops.rms_norm(x) * 2, fullgraph=True)
    with fastlm.tune.tuning() as results:
        f(torch.ones(40, 24))  # not measured
    assert not results
    x = X.clone().requires_grad_()
    torch.testing.assert_close(f(X), ops.rms_norm(X) * 2)
    (grad,) = torch.autograd.grad(f(x).sum(), x)
    (expected,) = torch.autograd.grad((ops.rms_norm(x) * 2).sum(), x)
    torch.testing.assert_close(grad, expected)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_a_chosen_torch_stay_in_the_budget(table, dtype):
    x, w = torch.randn(12, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    facts = f"{name}, weight={name}"
    tell(facts=facts, sizes=f"{CLASS} + residual, with gradients", cpu=12.0, torch=9.0)

    def ours(x, w, r):
        return ops.rms_norm(x, w, residual=r)

    def theirs(x, w, r):
        return torch.rms_norm(x + r, (64,), w, 1e-6), x + r

    leaf = x.clone().requires_grad_()
    assert chosen(ours, leaf, w, x) == "torch"
    exact = lambda x, w, r: reference.rms_norm(x, w, residual=r)  # noqa: E731
    check(ours, theirs, exact, [x, w, torch.randn_like(x)])


@NATIVE
def test_what_has_to_repeat_keeps_the_verdicts_it_is_given(table, times):
    tell(cpu=12.0, torch=9.0)
    kept = copy.deepcopy(_measured.verdicts("cpu"))
    with _product.fixed({}, {}), fastlm.tune.tuning() as results:
        assert chosen(ops.rms_norm, X) == "cpu"
        ops.rms_norm(X)
    assert not results
    tell(cpu=9.0, torch=12.0)
    assert chosen(ops.rms_norm, X) == "cpu"
    with _product.fixed({}, kept):
        assert chosen(ops.rms_norm, X) == "torch"
    assert chosen(ops.rms_norm, X) == "cpu"
