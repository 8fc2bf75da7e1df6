"""One process or many: what a training loop asks of the others."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.train.checkpoint import TrainingError

_MINUTES = 10  # without an answer from another process


class WorkerLost(TrainingError):
    """Another process of the run has died."""


class Engine:
    """The processes that train one model together; one where torchrun did not start this.

    Args:
        kind: "ddp", every process holds the whole model; or "fsdp", each holds a share of weights,
            gradients and optimiser state (FSDP2).
        device: "cpu" or "cuda"; by default CUDA where there is one. Processes on GPUs speak through
            NCCL, on CPUs through Gloo.

    Attributes:
        kind: "single" for one process (unless fsdp was asked for), "ddp" or "fsdp".
        rank, world: this process among all.
        device: of the model and the batches.
    """

    def __init__(self, kind: str = "ddp", device: torch.device | str | None = None) -> None:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._own = False
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            backend = "nccl" if wanted.type == "cuda" else "gloo"
            if wanted.type == "cuda":
                wanted = torch.device("cuda", dist.get_node_local_rank() or 0)
                torch.cuda.set_device(wanted)
            dist.init_process_group(backend, timeout=timedelta(minutes=_MINUTES))
            self._own = True
        started = dist.is_initialized()
        self.rank = dist.get_rank() if started else 0
        self.world = dist.get_world_size() if started else 1
        self.device = wanted
        if kind == "fsdp" and not started:
            raise TrainingError("engine fsdp needs torchrun: torchrun --nproc-per-node 2 -m ...")
        self.kind = kind if self.world > 1 or kind == "fsdp" else "single"

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def close(self) -> None:
        """Leaves the group that this engine made."""
        if self._own and dist.is_initialized():
            dist.destroy_process_group()

    def shard(self, model: torch.nn.Module) -> None:
        """Leaves this process its share of the weights, block by block (fsdp only)."""
        if self.kind != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleList):
                for block in module:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def settle(self, model: torch.nn.Module) -> None:
        """After a forward pass without a backward one: shares again, no whole weights (fsdp)."""
        if self.kind != "fsdp":
            return
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def wrap(self, model: torch.nn.Module, compiled: bool) -> Any:
        """What is called in the model's place; the model itself keeps its parameters' names."""
        forward: Any = torch.compile(model) if compiled else model
        if self.kind == "ddp":
            with _watched():
                parallel: Any = torch.nn.parallel.DistributedDataParallel
                # the only buffers are tables, alike everywhere; the option's name has changed
                names = inspect.signature(parallel).parameters
                new = "forward_sync_buffers" in names
                option = "forward_sync_buffers" if new else "broadcast_buffers"
                forward = parallel(forward, **{option: False})
        return forward

    @contextlib.contextmanager
    def exchange(self, forward: Any, last: bool) -> Iterator[None]:
        """Around a micro-batch: gradients are exchanged with the last one of a step."""
        with _watched():
            if self.kind == "ddp" and not last:
                with forward.no_sync():
                    yield
                return
            if self.kind == "fsdp":
                model = getattr(forward, "_orig_mod", forward)
                model.set_requires_gradient_sync(last)
            yield

    def sum(self, *values: float) -> list[float]:
        """Each value, summed over the processes."""
        if self.world == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        with _watched():
            dist.all_reduce(numbers)
        return numbers.tolist()

    def from_first(self, values: Sequence[float]) -> list[float]:
        """The first process's values."""
        return self.sum(*(x if self.first else 0.0 for x in values))

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum(0.0)

    @contextlib.contextmanager
    def whole(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, the first process's model has whole parameters (fsdp; else nothing changes)."""
        if self.kind != "fsdp":
            yield
            return
        shares: list[tuple[dict[str, Any], str, Any]] = []
        with _watched():
            for module in model.modules():
                for name, share in module._parameters.items():
                    if share is not None:
                        shares.append((module._parameters, name, share))
            values: list[Tensor] = []  # only the first process keeps them
            for _, _, share in shares:
                value = share.full_tensor().detach().cpu()
                if self.first:
                    values.append(value)
        for (table, name, share), value in zip(shares, values, strict=False):
            table[name] = torch.nn.Parameter(value, share.requires_grad)
        try:
            yield
        finally:
            for table, name, share in shares:
                table[name] = share


def save_tensors(engine: Engine, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    """Writes safetensors: one file `name`.safetensors, or a folder of shards (fsdp).

    All processes call it.
    """
    if engine.kind == "fsdp":
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        if engine.first:
            (folder / name).mkdir()
        engine.wait()
        with _watched():
            save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(folder / name), save_distributed=True),
            )
    elif engine.first:
        from safetensors.torch import save_file

        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(plain, folder / f"{name}.safetensors")


@torch.no_grad()
def load_tensors(engine: Engine, tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    """Fills tensors with what `save_tensors` wrote, by whatever engine and number of processes."""
    if (folder / name).is_dir():
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with _watched():
            reader = HuggingFaceStorageReader(str(folder / name))
            load(tensors, storage_reader=reader, no_dist=engine.kind == "single")
        return
    from safetensors import SafetensorError, safe_open
    from torch.distributed.tensor import DTensor, distribute_tensor

    path = folder / f"{name}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(tensors):
                odd = sorted(set(file.keys()) ^ set(tensors))[0]
                raise TrainingError(f"{path}: of another model or optimiser: {odd}")
            for key, tensor in tensors.items():
                value = file.get_tensor(key)
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(  # each process cuts its own share out
                        value.to(tensor.device),
                        tensor.device_mesh,
                        tensor.placements,
                        src_data_rank=None,
                    )
                tensor.copy_(value)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: not a whole safetensors file: {error}") from error


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    """Turns the errors of a broken exchange into WorkerLost."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        words = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "TCPStore")
        if isinstance(error, TrainingError) or not any(word in text for word in words):
            raise
        first = text.strip().splitlines()[0].partition(". This is")[0]
        raise WorkerLost(f"another process of the run has died ({first})") from error
