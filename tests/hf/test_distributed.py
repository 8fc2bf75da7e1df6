"""Patched models in two processes: DDP and FSDP2, patched before and after they are wrapped."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


def test_ddp_and_fsdp2():
    """One pair of processes for all of it: starting one takes longer than what it does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
        assert text.strip().endswith("all as accurate"), text


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def ddp_static(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, static_graph=True)


def ddp_unused(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_each_part(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.lm_head)
    for layer in model.model.layers:
        fully_shard(layer.mlp.up_proj)
        fully_shard(layer)
    return fully_shard(model)


def step(model: nn.Module, ids: torch.Tensor, pieces: int) -> dict[str, torch.Tensor]:
    """Loss and gradients; ids in `pieces` parts, one after another, averaged."""
    model.zero_grad()
    losses = []
    for part in ids.chunk(pieces):
        out = model(input_ids=part, labels=part, use_cache=False)
        (out["loss"] / pieces).backward()
        losses.append(out["loss"].detach())
    made = {"loss": torch.stack(losses).mean()[None]}
    for name, p in model.named_parameters():
        gradient = p.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        made[name.removeprefix("module.")] = gradient.clone()
    return made


def main() -> None:
    from tiny_models import exactly, tiny, token_numbers

    import fastlm
    from fastlm.hf._head import worth
    from fastlm.ops import _registry
    from fastlm.testing import Pool

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    draws = [token_numbers(4, seed=seed) for seed in range(16)]
    plain = tiny(tie_word_embeddings=False).train()
    exact = [exactly(step, plain, ids, 2) for ids in draws]
    cases = [(ddp, True), (ddp_static, False), (ddp_unused, True), (fsdp, True), (fsdp, False)]
    for wrap, before in [*cases, (fsdp_each_part, True)]:
        reference, model = wrap(copy.deepcopy(plain)), copy.deepcopy(plain)
        patch = fastlm.patch(model) if before else None
        model = wrap(model)
        patch = patch or fastlm.patch(model)
        pool = Pool()
        with _registry.recording() as verdicts, worth(0):
            for ids, right in zip(draws, exact, strict=True):
                ours, theirs = (step(m, ids.chunk(2)[rank], 1) for m in (model, reference))
                for made in (ours, theirs):
                    dist.all_reduce(made["loss"].div_(2))
                pool.add(ours, theirs, right)
        name = f"{wrap.__name__}, {'patched before' if before else 'patched after'}"
        bad = [str(e) for e in pool.errors() if not e.ok]
        assert not bad, f"{name}: {bad}"
        called = {v.stem for v in verdicts}
        print(name, sorted(called), flush=True)
        assert {"attention", "rms_norm", "rope"} <= called
        # What is sharded when the model is patched, or has hooks of its own later, is called.
        sharded = (wrap is fsdp and not before) or wrap is fsdp_each_part
        assert ("linear_cross_entropy" in called) == (not sharded)
        if wrap is fsdp and not before:
            assert "its head's weight is a DTensor: sharded" in patch.report()
    dist.destroy_process_group()
    print("all as accurate")


if __name__ == "__main__":
    main()
