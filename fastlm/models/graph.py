"""Decoding on a GPU: each step a CUDA graph, the host one token behind.

A step of a model is some hundred small kernels, which a GPU ends sooner than Python can launch
them. Recorded once as a CUDA graph they are one launch. The host queues a step before it looks at
the tokens of the one before, which come through pinned memory, so that the GPU never waits for
it; what was queued beyond an end token is left unread.

A graph is bound to a cache, and kept with it: a conversation records once. `Decoder.generate`
without a cache keeps the one it made for the next call (`release` frees it).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastlm import settings
from fastlm.models.cache import KVCache
from fastlm.models.plan import is_known, unknown_fields
from fastlm.models.sampling import Sampler
from fastlm.models.static_step import BLOCK, StaticStep
from fastlm.ops import _registry

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder
    from fastlm.models.generate import Run

STEM = "decode_graph"
DEVICES = ("cuda",)  # the same steps run on a CPU, where a decode plan is faster
AHEAD = 1  # steps queued beyond the token that the host is looking at
_ROUND = 256  # tokens by which caches that are kept differ

_spares: WeakKeyDictionary[Decoder, KVCache] = WeakKeyDictionary()


def unsupported(model: Decoder, cache: KVCache) -> list[str]:
    """Why a model cannot be decoded by graphs with this cache; empty: it can."""
    weight = model.embed.weight
    device = weight.device.type
    if device not in DEVICES:
        return [f"serves {', '.join(DEVICES)} tensors, not {device}"]
    if settings.no_graphs():
        return ["FASTLM_GRAPHS=0"]
    if torch.is_autocast_enabled(device):
        return ["autocast is on"]
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return ["the stream is being captured already"]
    reasons = unknown_fields(model.config)
    if not all(is_known(module) for module in model.modules()):
        reasons.append("a module was replaced or has hooks")
    tensors = [*cache.keys, *cache.values]
    if type(cache) is not KVCache:
        reasons.append(f"the cache is a {type(cache).__name__}")
    elif any(x.device != weight.device or x.dtype != weight.dtype for x in tensors):
        reasons.append("the cache is not of the model's type and device")
    return reasons


def chosen(model: Decoder, cache: KVCache) -> bool:
    """Whether graphs decode this model; `explain(model.generate, ...)` shows the verdict."""
    weight, reasons = model.embed.weight, unsupported(model, cache)
    if weight.device.type in DEVICES:
        _registry.record(
            _registry.Verdict(
                STEM,
                weight.device.type,
                weight.dtype,
                {"batch": cache.batch, "capacity": cache.capacity},
                "modules" if reasons else "graph",
                {"graph": reasons} if reasons else {},
                [] if reasons else ["modules"],
            )
        )
    return not reasons


def borrow(model: Decoder, batch: int, capacity: int) -> KVCache:
    """An empty cache: the one kept for this model where it fits, else a new one."""
    spare = _spares.pop(model, None)
    if model.embed.weight.device.type not in DEVICES:
        return model.new_cache(batch, capacity)
    wanted = min(-(-capacity // _ROUND) * _ROUND, model.config.max_positions)
    if spare is not None and spare.batch == batch and wanted <= spare.capacity <= 4 * wanted:
        like, weight = spare.keys[0], model.embed.weight
        if like.dtype == weight.dtype and like.device == weight.device:
            spare.stand_at(0, None)
            return spare
    del spare  # its memory may be needed
    return model.new_cache(batch, wanted)


def give_back(model: Decoder, cache: KVCache) -> None:
    """Keeps a borrowed cache, with its graphs, for the next call."""
    if model.embed.weight.device.type in DEVICES:
        _spares[model] = cache


def release(model: Decoder) -> None:
    """Frees the cache and the graphs kept for this model."""
    _spares.pop(model, None)


class Bound:
    """A static step with the weights it was made of, recorded where it runs on a GPU."""

    def __init__(self, model: Decoder, cache: KVCache, sampler: Sampler, pool: Any = None) -> None:
        self.step = StaticStep(model, cache, sampler)
        self.pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._modules = [*model.modules()][1:]  # kept: an id cannot come to mean another
        self._weights = [
            (names, name, tensor.data_ptr())
            for module in self._modules
            for names in (module._parameters, module._buffers)
            for name, tensor in names.items()
            if tensor is not None
        ]

    def is_of(self, model: Decoder) -> bool:
        """Whether the model still consists of the modules that were bound."""
        now = [*model.modules()][1:]
        same = zip(now, self._modules, strict=False)
        return len(now) == len(self._modules) and all(a is b for a, b in same)

    def stale(self) -> bool:
        """Whether a weight lies elsewhere than where the step reads it."""
        for names, name, address in self._weights:
            weight = names.get(name)
            if weight is None or weight.data_ptr() != address:
                return True
        return False

    def run(self) -> None:
        """Queues one step."""
        if not self.step.tokens.is_cuda:
            self.step.run()
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        """Records the step, after all that happens at first calls has happened."""
        with torch.cuda.device(self.step.tokens.device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                rehearse(self.step)
            here.wait_stream(aside)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # other threads may allocate meanwhile
            with torch.cuda.graph(graph, self.pool, aside, capture_error_mode=mode):
                self.step.run()
        return graph


def rehearse(step: StaticStep) -> None:
    """Runs a step twice and takes back what it did.

    What it writes to the cache lies behind what is valid there; the registers are restored.
    """
    registers = step.registers()
    before = [x.clone() for x in registers]
    for _ in range(2):
        step.run()
        for x, saved in zip(registers, before, strict=True):
            x.copy_(saved)


class Ahead:
    """The tokens of a generation, in order, while the next are being computed.

    At each token the cache says of its length what it would say had the host made every step
    itself: the tokens before this one are in it.
    """

    def __init__(self, run: Run) -> None:
        self._run, cache = run, run.cache
        first = run.first()
        self._past, self._lengths = cache.length, cache.lengths
        self._queued = 0
        self._bound: Bound | None = None
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._first = first
        self._send(first)

    def token(self, step: int) -> list[int]:
        """[B], the tokens of a step; steps are asked for one after the other."""
        while self._queued < min(step + AHEAD, self._run.count - 1):
            self._queue()
        host, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        self._stand_at(step)
        values: list[int] = host.tolist()
        return values

    def _stand_at(self, step: int) -> None:
        lengths = None if self._lengths is None else self._lengths + step
        self._run.cache.stand_at(self._past + step, lengths)

    def _queue(self) -> None:
        cache, sampler = self._run.cache, self._run.sampler
        self._stand_at(self._queued)
        cache.reserve(1)
        bound = self._bind()
        if bound.step.draws and self._queued % BLOCK == 0:
            assert sampler.uniforms is not None
            rows = sampler.uniforms.rows(BLOCK)
            bound.step.give(rows.pin_memory() if bound.step.tokens.is_cuda else rows)
        bound.run()
        self._queued += 1
        self._send(bound.step.tokens)

    def _bind(self) -> Bound:
        """The step bound to the cache as it is now; made anew when cache or weights moved."""
        model, cache, sampler = self._run.model, self._run.cache, self._run.sampler
        key = (sampler.options, sampler.limit, _registry.forced())
        before = self._bound
        bound: Bound | None = cache.steps.get(key)
        if bound is not None and bound is before and not bound.stale():
            return bound
        if before is not None and before.step.tokens.is_cuda:
            torch.cuda.current_stream(before.step.tokens.device).synchronize()
        if bound is None or bound.stale() or (before is None and not bound.is_of(model)):
            pool = None if before is None else before.pool
            bound = cache.steps[key] = Bound(model, cache, sampler, pool)
        if before is None:
            bound.step.begin(self._first, cache, sampler)
        elif bound is not before:
            pairs = zip(bound.step.registers(), before.step.registers(), strict=True)
            for ours, theirs in pairs:
                ours.copy_(theirs)
        self._bound = bound
        return bound

    def _send(self, tokens: Tensor) -> None:
        """Queues a copy of the tokens to the host."""
        if not tokens.is_cuda:
            self._sent.append((tokens.clone(), None))
            return
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tokens.device))
        self._sent.append((host, event))
