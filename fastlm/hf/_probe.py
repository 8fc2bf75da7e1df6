"""Trial runs that decide whether a replacement computes what the module computes.

A module is run twice on random input with random fp32 parameters of its own shapes: once with the
forward of its class, once with the candidate. The right candidate differs by rounding, about 1e-6
of the result; the wrong one by percent (a weight offset, another activation, another pairing in
the rotation), and rows near zero bring out another epsilon. The bar lies between, at 1e-4. They
are run in training mode as well, with the same random numbers, because what drops something out
there is no different in evaluation. The model's own weights are neither read nor changed, PyTorch's
random state neither.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BAR = 1e-4  # of the root mean square
BATCH, TOKENS = 2, 6  # in a trial run over hidden states

Forward = Callable[..., Any]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]  # arguments of one trial run each


class Mismatch(Exception):
    """Why a candidate was not taken."""


def random(shape: Any, seed: int, like: Tensor | None = None) -> Tensor:
    """Standard normal numbers from a generator of their own; the same in a run in float64."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch._C.DisableTorchFunction():  # float64() would draw others
        x = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    return x if like is None else x.to(like.device)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Random fp32 values for every parameter, scaled so that activations keep their size."""
    values = {}
    for i, (name, p) in enumerate(module.named_parameters(remove_duplicate=False)):
        width = min(p.shape) if p.dim() == 2 else 1
        values[name] = random(p.shape, i + 1, p) / width**0.5
    for name, b in module.named_buffers(remove_duplicate=False):
        if b.is_floating_point():
            values[name] = b.float()
    return values


def rows_of(width: int, like: Tensor | None = None) -> Tensor:
    """[2, 3, width]: what tells a function of single rows from one that looks at its neighbours."""
    return random((2, 3, width), 0, like)


def compare(module: nn.Module, candidate: Forward, calls: Calls, first_only: bool = False) -> None:
    """Raises Mismatch unless the candidate agrees with the module's own forward on every call.

    first_only: of a tuple of results the first is compared.
    """
    values = parameters(module)
    for arguments, keywords in calls:
        for training in (False, True):
            try:
                expected = run(module, type(module).forward, values, arguments, keywords, training)
            except Exception:
                if training:  # says nothing about the candidate
                    continue
                raise
            made = run(module, candidate, values, arguments, keywords, training)
            if first_only and isinstance(made, tuple) and isinstance(expected, tuple):
                made, expected = made[0], expected[0]
            agree(made, expected, " in training mode" if training else "")


def can(module: nn.Module, calls: Calls) -> bool:
    """Whether a module's own forward takes such calls at all."""
    try:
        for arguments, keywords in calls:
            run(module, type(module).forward, parameters(module), arguments, keywords)
    except Exception:
        return False
    return True


def agree(made: Any, expected: Any, where: str = "") -> None:
    """Raises Mismatch unless two results are as near as rounding leaves them."""
    worst = distance(made, expected)
    if not worst <= BAR:  # also NaN
        raise Mismatch(f"the trial run{where} differs by {worst:.1e} of the result")


def run(
    module: nn.Module,
    forward: Forward,
    values: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    training: bool = False,
) -> Any:
    """One trial run, without gradients and autocast; in training mode always of one seed."""
    device = next((v.device for v in values.values()), torch.device("cpu"))
    mode = _training(module, device) if training else evaluating(module)
    quiet = torch.autocast(device.type, enabled=False)
    with installed(module, forward), mode, unwatched(module), torch.no_grad(), quiet:
        # in training mode statistics would be written into them
        given = {n: v.clone() for n, v in values.items()} if training else values
        return torch.func.functional_call(module, given, args, kwargs)


def distance(made: Any, expected: Any) -> float:
    """The largest relative distance of the tensors in two results, by rows of the last axis."""
    ours, theirs = list(_tensors(made)), list(_tensors(expected))
    if [t.shape for t in ours] != [t.shape for t in theirs] or not ours:
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        error = (a - b).square().mean(-1).sqrt()
        scale = b.square().mean(-1).sqrt()
        ratio = torch.where(error == 0, 0.0, error / scale)
        worst = max(worst, float(ratio.max())) if not ratio.isnan().any() else float("nan")
    return worst


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def installed(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Makes `forward` the module's forward inside the block."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward.__get__(module)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextlib.contextmanager
def evaluating(module: nn.Module, training: bool = False) -> Iterator[None]:
    """Evaluation mode inside the block, or training mode."""
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = training
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextlib.contextmanager
def _training(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Training mode without checkpoints, and random numbers of one seed, inside the block."""
    checkpointed = [m for m in module.modules() if m.__dict__.get("gradient_checkpointing")]
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), evaluating(module, training=True):
        for generator in (
            torch.default_generator,
            *(torch.cuda.default_generators[i] for i in cuda),
        ):
            generator.manual_seed(0)
        for m in checkpointed:
            m.__dict__["gradient_checkpointing"] = False
        try:
            yield
        finally:
            for m in checkpointed:
                m.__dict__["gradient_checkpointing"] = True


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def unwatched(module: nn.Module) -> Iterator[None]:
    """No hooks inside the block: a trial run is nobody's business."""
    taken = [(m, n, m.__dict__[n]) for m in module.modules() for n in _HOOKS if m.__dict__.get(n)]
    for m, name, _ in taken:
        m.__dict__[name] = OrderedDict()
    try:
        yield
    finally:
        for m, name, hooks in taken:
            m.__dict__[name] = hooks


def arguments_for(
    forward: Forward,
    width: int,
    tables: Any,
    like: Tensor,
    mask_form: str = "seen",
    biases: dict[str, Tensor] | None = None,
) -> Calls:
    """Calls for a forward over hidden states [BATCH, TOKENS, width]: without a mask, and with one.

    tables: what the model's rotary embedding makes for six positions, or None.
    mask_form: "seen" (bool), "hides" (bool, the other way) or "additive", as transformers makes it
    for eager attention; "tokens": [BATCH, TOKENS], ones and zeros.
    biases: of the scores, by the names of the arguments that take them.
    Raises Mismatch when the forward asks for an argument whose meaning is not known here.
    """
    batch = BATCH
    signature = list(inspect.signature(forward).parameters.values())[1:]
    known: dict[str, Any] = {"position_ids": torch.arange(TOKENS, device=like.device)[None]}
    known["alibi"] = None  # without; what adds it is exercised by the model as a whole
    for seed, name in enumerate(("q", "k", "v", "residual"), 13):  # apart from hidden_states
        known[name] = random((batch, TOKENS, width), seed, like)
    for name in (
        "mask",
        "cache",
        "past",
        "past_key_value",
        "past_key_values",
        "layer_past",
        "use_cache",
    ):
        known[name] = None
    known |= biases or {}
    if tables is not None:
        known["position_embeddings"] = tables
        known |= _as_arguments(tables)
    keywords = {}
    for p in signature[1:]:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name == "attention_mask":
            continue
        if p.name in known:
            keywords[p.name] = known[p.name]
        elif p.default is p.empty or p.name == "position_embeddings":
            raise Mismatch(f"no trial run: its forward asks for {p.name!r}")
    hidden = random((batch, TOKENS, width), 11, like)
    calls: Calls = [((hidden,), {**keywords, "attention_mask": None})]
    if all(p.name != "attention_mask" for p in signature):
        return [((hidden,), keywords)]
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=like.device).tril()
    mask = mask.repeat(batch, 1, 1, 1)
    mask[0, :, 2:, 0] = False  # one padded key
    if mask_form == "hides":
        mask = ~mask
    if mask_form == "additive":
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(mask.shape, device=like.device).masked_fill(~mask, lowest)
    if mask_form == "tokens":
        mask = torch.ones(batch, TOKENS, device=like.device)
        mask[0, 0] = 0
    calls.append(((hidden,), {**keywords, "attention_mask": mask}))
    return calls


def _as_arguments(tables: Any) -> dict[str, Any]:
    """Rotation tables under the names that forwards written by hand have for them."""
    if not (isinstance(tables, tuple) and len(tables) == 2 and tables[0].dim() == 3):
        return {}
    (cos, sin), half = tables, tables[0].shape[-1] // 2
    narrow = cos[0, :, :half].float(), sin[0, :, :half].float()
    named = {"cos": cos, "sin": sin, "freqs_cos": narrow[0], "freqs_sin": narrow[1]}
    return {**named, "freqs_cis": torch.complex(*narrow)}


def rotation_tables(rotary: nn.Module | None, width: int | None, like: Tensor) -> Any:
    """What the model's rotary embedding makes for TOKENS positions.

    Where it cannot be called so: tables (cos, sin) of random angles, of the width given.
    """
    if rotary is not None:
        positions = torch.arange(3, 3 + TOKENS, device=like.device)[None]
        with contextlib.suppress(Exception), torch.no_grad():
            return rotary(random((1, TOKENS, 4), 8, like), positions)
        frequencies = getattr(rotary, "inv_freq", None)
        width = width if frequencies is None else 2 * len(frequencies)
    if width is None:
        return None
    angles = random((1, TOKENS, width // 2), 7, like).repeat(1, 1, 2)
    return angles.cos(), angles.sin()
