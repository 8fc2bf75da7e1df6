"""`fastlm.verify`: the error of a patched model, beside the error of the model as it was."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.hf import _head, _probe
from fastlm.hf._float64 import doubled, float64
from fastlm.hf._paths import pattern
from fastlm.hf.patch import is_ours, patch, suspended
from fastlm.ops import _registry
from fastlm.testing import FEWEST, Error


@dataclass(frozen=True)
class Report:
    """The errors of single modules, of the outputs and of the gradients, and their budgets."""

    errors: list[Error]
    notes: tuple[str, ...] = ()  # what was not compared, and why

    @property
    def ok(self) -> bool:
        """Whether every error is within its budget."""
        return all(e.ok for e in self.errors)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        rows = [
            {"name": e.name, "ours": e.ours, "torch": e.torch, "allowed": e.allowed, "ok": e.ok}
            for e in self.errors
        ]
        return {"ok": self.ok, "errors": rows, "notes": list(self.notes)}

    def __str__(self) -> str:
        """A table of errors against float64: gradients by their worst, everything else in full."""
        gradients = [e for e in self.errors if e.name.startswith("gradient of ")]
        rows = [e for e in self.errors if e not in gradients]
        gradients.sort(key=lambda e: e.ours / e.allowed if e.allowed else 0.0, reverse=True)
        shown = [e for i, e in enumerate(gradients) if i < 3 or not e.ok]
        width = max([len(e.name) for e in (*rows, *shown)] + [10])
        lines = [
            f"{'error against float64':<{width}}  {'fastlm':>9}  {'PyTorch':>9}  {'allowed':>9}"
        ]
        for e in (*rows, *shown):
            verdict = "ok" if e.ok else "TOO LARGE"
            lines.append(
                f"{e.name:<{width}}  {e.ours:9.2e}  {e.torch:9.2e}  {e.allowed:9.2e}  {verdict}"
            )
        if len(shown) < len(gradients):
            lines.append(f"... and {len(gradients) - len(shown)} gradients more, all ok")
        lines += self.notes
        lines.append("verified" if self.ok else "NOT verified")
        return "\n".join(lines)


def verify(model: nn.Module, inputs: Any = None, *, gradients: bool = True) -> Report:
    """Runs a model patched, unpatched and in float64, and compares.

    The rule is that of the kernels: an error against float64 is at most twice the error of the
    model in its own dtype, or one rounding of the typical value (of a gradient, four in fp32).
    Errors are root mean squares, over the tokens that count; they are taken of one module of each
    replaced kind (its result, and the gradients of its inputs and parameters, of which the worst
    counts), of the logits, the loss and every gradient (that of a parameter over all layers that
    have it). Logits and loss are judged over sixteen inputs of verify's own making; a loss of
    given inputs, a single number that can be right by chance, is not judged more finely than the
    logits it comes from. All elements of a gradient can share one error, of a dominant token say,
    and then there is luck in theirs and ours: where one is over its budget, all are judged again
    over sixteen inputs, or given token numbers in sixteen orders. Where a decode plan takes the
    single tokens of `generate`, their logits after prompts of verify's own are judged as well.

    Args:
        model: patched, or not: then it is patched for the time of the call.
        inputs: what to call the model with: token numbers [B, T], or a dict of arguments. Made up
            by default, with padding on the left of one row, and all but the first of 20 tokens or
            fewer. A dict without labels gets them.
        gradients: whether to compare them too; without, it takes a third of the time.

    Returns:
        A Report: `ok`, `errors`, `to_dict()`; it prints as a table.

    Raises:
        TypeError: model is no torch.nn.Module, or no inputs can be made up for it.

    A model whose own loss fails on labels that verify made up is compared without it, and
    `notes` says so.

    Takes the memory of a float64 copy of the model, and of its gradients three times.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"verify: model must be a torch.nn.Module, got {type(model).__name__}")
    first = _arguments(model, inputs)
    patched = any(is_ours(m.__dict__.get("forward")) for m in model.modules())
    pooled: dict[str, _Squares] = {}
    with (
        contextlib.nullcontext() if patched else patch(model),
        _ready(model, gradients) as names,
        _head.worth(0.0),  # the loss without logits, too
    ):
        replaced = _one_of_each(model)
        with suspended(model):
            notes = _without_loss(model, first) if "labels" not in _given(inputs) else ()
            exact_model = exact_copy(model)
            with _recorded(model, replaced) as calls:
                theirs = _run(model, first, names)
        _pool(pooled, model, exact_model, theirs, first, names)
        modules = [
            *_modules(model, exact_model, calls, bool(names)),
            *_steps(model, exact_model),
        ]

        def more(seeds: range, names: list[str]) -> None:
            for seed in seeds:
                moved = _in_another_order(inputs, seed)
                arguments = _arguments(model, moved, seed, tokens=5 + seed % FEWEST)
                if notes:
                    del arguments["labels"]
                with suspended(model):
                    theirs = _run(model, arguments, names)
                _pool(pooled, model, exact_model, theirs, arguments, names)

        if inputs is None:
            with torch.no_grad():
                more(range(1, FEWEST), [])
        errors = [*modules, *_judged(pooled, _dtype(model))]
        over = any(not e.ok and e.name.startswith("gradient of ") for e in errors)
        if over and (inputs is None or _in_another_order(inputs, 0) is not None):
            more(range(FEWEST, 2 * FEWEST - 1), names)
            errors = [*modules, *_judged(pooled, _dtype(model))]
    return Report(errors, notes)


def exact_copy(model: nn.Module) -> nn.Module:
    """The model in float64. Its experts, if any, run one by one: grouped_mm knows no float64."""
    made = copy.deepcopy(model).double()
    for module in made.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", "eager") != "eager":
            config._experts_implementation = "eager"
    return made


@dataclass
class _Squares:
    """Sums of squares over all tensors of one name: errors of ours and PyTorch's, and the size."""

    ours: float = 0.0
    theirs: float = 0.0
    size: float = 0.0
    count: int = 0
    draws: int = 0

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        self.draws += 1
        self.ours += float((ours.double() - exact).square().sum())
        self.theirs += float((theirs.double() - exact).square().sum())
        self.size += float(exact.double().square().sum())
        self.count += exact.numel()

    def merge(self, other: _Squares) -> None:
        """Adds what another counted."""
        self.ours, self.theirs = self.ours + other.ours, self.theirs + other.theirs
        self.size, self.count = self.size + other.size, self.count + other.count
        self.draws += other.draws

    def error(self, name: str, dtype: torch.dtype, gradient: bool = False) -> Error:
        """Root mean squares and the budget; a gradient's, where it is one or is named so."""
        n = max(self.count, 1)
        ours, theirs, typical = ((x / n) ** 0.5 for x in (self.ours, self.theirs, self.size))
        floor = torch.finfo(dtype).eps
        if gradient or name.startswith("gradient of "):
            # Factors that all elements share, a mean's 1/n for one, are single fp32 numbers
            # whatever the dtype: four roundings of such, where PyTorch happened to make none.
            floor = max(floor, 4 * torch.finfo(torch.float32).eps)
        return Error(name, ours, theirs, max(2 * theirs, floor * typical))


def _pool(
    pooled: dict[str, _Squares],
    model: nn.Module,
    exact_model: nn.Module,
    theirs: dict[str, Tensor],
    arguments: dict[str, Any],
    names: list[str],
) -> None:
    """Adds what one input brings; equal parameters of all layers go under one name."""
    with float64():
        exact = _run(exact_model, doubled(arguments), names)
    ours = _run(model, arguments, names)
    keep = arguments.get("attention_mask")
    for name, tensor in ours.items():
        three = (tensor, theirs[name], exact[name])
        if name == "logits" and keep is not None and keep.dim() == 2:
            a, b, c = (x[keep.bool()] for x in three)
            three = (a, b, c)
        together = pattern(name) if name.startswith("gradient of ") else name
        pooled.setdefault(together, _Squares()).add(*three)


def _judged(pooled: dict[str, _Squares], dtype: torch.dtype) -> Iterator[Error]:
    noise = 0.0
    for name, squares in pooled.items():
        made = squares.error(name, dtype)
        if name == "logits":
            noise = made.torch
        elif name == "loss" and squares.draws < FEWEST:
            made = replace(made, allowed=max(made.allowed, noise))
        yield made


def _arguments(model: nn.Module, inputs: Any, seed: int = 0, tokens: int = 48) -> dict[str, Any]:
    if inputs is None:
        config = getattr(model, "config", None)
        vocabulary = getattr(config, "vocab_size", None)
        if not isinstance(vocabulary, int):
            raise TypeError("verify: inputs must be given for a model without config.vocab_size")
        tokens = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocabulary, (2, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, : (tokens + 2) // 8] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if isinstance(inputs, Tensor):
        named = open_ended or "input_ids" in accepted or not accepted
        inputs = {"input_ids" if named else next(iter(accepted)): inputs}
    device = next(model.parameters()).device
    made: dict[str, Any] = {
        n: v.to(device) if isinstance(v, Tensor) else v for n, v in dict(inputs).items()
    }
    if "labels" in accepted and "labels" not in made and "input_ids" in made:
        labels = made["input_ids"].clone()
        given = made.get("attention_mask")
        if given is not None and given.shape == labels.shape:
            labels[given == 0] = -100
        made["labels"] = labels
    if "use_cache" in accepted or (open_ended and hasattr(model, "config")):
        made.setdefault("use_cache", False)
    return made


def _given(inputs: Any) -> dict[str, Any]:
    return {} if inputs is None or isinstance(inputs, Tensor) else dict(inputs)


def _without_loss(model: nn.Module, arguments: dict[str, Any]) -> tuple[str, ...]:
    """Takes labels away that the model cannot use: some losses want an image beside the text."""
    if "labels" not in arguments:
        return ()
    try:
        with torch.no_grad():
            model(**arguments)
    except Exception as error:
        labels = arguments.pop("labels")
        with torch.no_grad():
            model(**arguments)  # where the labels are not what fails, its own words are best
        shape = list(labels.shape)
        why = f"{type(error).__name__}: {error}"
        return (f"its own loss was not compared, it fails with labels {shape} alone: {why}",)
    return ()


def _in_another_order(inputs: Any, seed: int) -> Any:
    """Given inputs with their tokens permuted, all else as it is; None without tokens."""
    ids = inputs if isinstance(inputs, Tensor) else _given(inputs).get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
        return None
    order = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(seed))
    moved = ids[:, order.to(ids.device)]
    return moved if ids is inputs else {**inputs, "input_ids": moved}


@contextlib.contextmanager
def _ready(model: nn.Module, gradients: bool) -> Iterator[list[str]]:
    """Evaluation mode, with gradients on; yields the parameters to take them of."""
    if not gradients:
        with _probe.evaluating(model), torch.no_grad():
            yield []
        return
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    wanted = {n: p for n, p in floating.items() if p.requires_grad} or floating
    before = [(p, p.requires_grad) for p in wanted.values()]
    for p in wanted.values():
        p.requires_grad_(True)
    try:
        with _probe.evaluating(model), torch.enable_grad():
            yield list(wanted)
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def _run(model: nn.Module, arguments: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    out = model(**arguments)
    logits: Any = next(
        (out[n] for n in ("logits", "last_hidden_state") if isinstance(out, dict) and n in out), out
    )
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    loss: Any = out.get("loss") if isinstance(out, dict) else None
    found = {"logits": logits.detach()}
    if loss is None:
        loss = (logits * _probe.random(logits.shape, 5, logits).to(logits.dtype)).sum()
    else:
        found["loss"] = loss.detach()
    if not names:
        return found
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
    for name, g in zip(names, gradients, strict=True):
        if g is not None:
            found[f"gradient of {name}"] = g
    return found


def _one_of_each(model: nn.Module) -> list[str]:
    """Paths of one module for each pair of class and replacement."""
    seen: dict[Any, str] = {}
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if path and is_ours(forward) and not hasattr(forward, "whole"):
            seen.setdefault((type(module), forward.__func__), path)
    return list(seen.values())


@contextlib.contextmanager
def _recorded(model: nn.Module, paths: list[str]) -> Iterator[dict[str, Any]]:
    """Collects what the modules at these paths are called with, for the first time each."""
    calls: dict[str, Any] = {}
    handles = []

    def recorder(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.setdefault(path, _detached((args, kwargs)))

        return hook

    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(recorder(path), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _detached(value: Any) -> Any:
    """Tensors apart from the graph that made them; which of them had one is kept."""

    def alone(x: Any) -> Any:
        return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return torch.utils._pytree.tree_map(alone, value)


def _modules(
    model: nn.Module, exact_model: nn.Module, calls: dict[str, Any], gradients: bool
) -> Iterator[Error]:
    """The errors of single modules, on what they were called with in the model."""
    dtype = _dtype(model)
    for path, call in calls.items():
        name = f"{path} ({type(model.get_submodule(path)).__name__})"
        with torch.no_grad():
            squares = _three(model, exact_model, path, call, -1)["result"]
        yield squares.error(name, dtype)
        if not gradients:
            continue
        pooled: dict[str, _Squares] = {}
        # As of the whole model: one draw can be luck, so what is over is judged over sixteen.
        for draws in (range(1), range(1, FEWEST)):
            for seed in draws:
                for part, squares in _three(model, exact_model, path, call, seed).items():
                    pooled.setdefault(part, _Squares()).merge(squares)
            errors = [s.error(name, dtype, gradient=True) for s in pooled.values()]
            if all(e.ok for e in errors):
                break
        if errors:
            worst = max(errors, key=lambda e: e.ours / e.allowed if e.allowed else e.ours)
            yield replace(worst, name=f"{name}, backward")


def _three(
    model: nn.Module, exact_model: nn.Module, path: str, call: Any, seed: int
) -> dict[str, _Squares]:
    """One module, patched and not, against float64: its result; its gradients for a seed >= 0."""
    module = model.get_submodule(path)
    ours = _called(module, call, seed)
    with suspended(module):
        theirs = _called(module, call, seed)
    with float64():
        exact = _called(exact_model.get_submodule(path), doubled(call), seed)
    made: dict[str, _Squares] = {}
    for part in ours.keys() & theirs.keys():
        made[part] = _Squares()
        made[part].add(ours[part], theirs[part], exact[part])
    return made


def _called(module: nn.Module, call: Any, seed: int) -> dict[str, Tensor]:
    """The (first) result of a module; or its gradients, for random ones of that result."""
    leaves: dict[str, Tensor] = {}

    def leaf(x: Any) -> Any:
        if seed < 0 or not isinstance(x, Tensor) or not x.requires_grad:
            return x
        return leaves.setdefault(f"input {len(leaves)}", x.detach().clone().requires_grad_())

    args, kwargs = torch.utils._pytree.tree_map(leaf, call)
    out = module(*args, **kwargs)
    out = out[0] if isinstance(out, (tuple, list)) else out
    if seed < 0:
        return {"result": out}
    if not out.requires_grad:
        return {}
    leaves |= {n: p for n, p in module.named_parameters() if p.requires_grad}
    weights = _probe.random(out.shape, seed + 31, out).to(out.dtype)
    made = torch.autograd.grad(out, list(leaves.values()), weights, allow_unused=True)
    return {n: g for n, g in zip(leaves, made, strict=True) if g is not None}


def _steps(model: nn.Module, exact_model: nn.Module) -> Iterator[Error]:
    """The error of single tokens after a prompt, where a decode plan takes them."""
    if not hasattr(model.__dict__.get("forward"), "inner"):
        return
    squares = _Squares()
    with torch.no_grad(), _registry.recording() as verdicts:
        for seed in range(4):
            given = _arguments(model, None, seed, tokens=9 + seed)
            ours = _followed(model, given)
            with suspended(model):
                theirs = _followed(model, given)
            with float64():
                squares.add(ours, theirs, _followed(exact_model, given))
    if any(v.stem == "decode_plan" and v.chosen == "cpu" for v in verdicts):
        yield squares.error("logits of single tokens (decode_plan)", _dtype(model))


def _followed(model: Any, given: dict[str, Any], steps: int = 4) -> Tensor:
    """[B, steps, V]: the logits of the last tokens, taken one by one after the others."""
    ids, mask = given["input_ids"], given["attention_mask"]
    where = (mask.cumsum(1) - 1).clamp(min=0)
    count, cache, found = ids.shape[1], None, []
    for first, last in ((0, count - steps), *((i, i + 1) for i in range(count - steps, count))):
        out = model(
            input_ids=ids[:, first:last],
            attention_mask=mask[:, :last],
            position_ids=where[:, first:last],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        found.append(out.logits[:, -1:])
    return torch.cat(found[1:], 1)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
