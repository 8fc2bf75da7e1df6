"""`fastlm.patch`: puts fastlm's kernels into one model, and takes them out again."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.hf import _head, _probe, _trl
from fastlm.hf._blocks import Blocks
from fastlm.hf._experts import match_experts
from fastlm.hf._feed_forward import match_feed_forward
from fastlm.hf._head import LOGITS, causal_lm_loss
from fastlm.hf._modules import (
    Candidate,
    Match,
    Note,
    match_activation,
    match_linear,
    match_norm,
    named_like,
)
from fastlm.hf._paths import collapse, pattern
from fastlm.hf._structure import structure
from fastlm.ops import _registry

STEMS = (
    "activation",
    "attention",
    "cross_entropy",
    "decode_plan",
    "feed_forward",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
)

_ABSENT = object()


@dataclass(frozen=True)
class Entry:
    """What happened to one module, or to one part of it."""

    path: str  # "" for the model itself
    module: str  # class name
    state: str  # "replaced", "kept", "noted" or "already"
    text: str  # what runs now, or why it was left alone
    stems: tuple[str, ...] = ()


class Patch:
    """The handle of one patch: what was replaced, why the rest was not, and the way back.

    As a context manager it undoes itself at the end of the block.
    """

    def __init__(self, model: nn.Module, stems: frozenset[str], logits: str = "auto"):
        self.model = model
        self.stems = stems
        self.logits = logits
        self.entries: list[Entry] = []
        self._undo: list[tuple[nn.Module, str, Any, Any]] = []  # module, attribute, before, ours

    def report(self) -> str:
        """A table: module path, class, what runs there now; then what stayed and why.

        Layers that were treated alike share a line.
        """
        replaced = [e for e in self.entries if e.state == "replaced"]
        kept = [e for e in self.entries if e.state == "kept"]
        already = [e for e in self.entries if e.state == "already"]
        noted = [e for e in self.entries if e.state == "noted"]
        name = type(self.model).__name__
        lines = [f"fastlm.patch({name}): {len(replaced)} modules replaced, {len(kept)} left alone"]
        for title, entries in (
            ("", replaced),
            ("replaced by an earlier patch:", already),
            ("notes:", noted),
            ("left alone:", kept),
        ):
            if entries and title:
                lines.append(title)
            lines += _table(entries)
        if not self._undo and replaced:
            lines.append("(undone)")
        return "\n".join(lines)

    __str__ = report

    def undo(self) -> None:
        """Restores the very objects that were there before. Doing it twice is harmless.

        Raises:
            RuntimeError: another tool has replaced some of the same forwards since; those are left
                as they are, everything else is restored.
        """
        foreign = 0
        for module, name, before, ours in reversed(self._undo):
            if module.__dict__.get(name) is not ours:
                foreign += 1
            elif before is _ABSENT:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before
        self._undo.clear()
        if foreign:
            raise RuntimeError(
                f"patch.undo: {foreign} forwards were replaced by another tool after the patch and"
                " were left as they are"
            )

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def _install(self, module: nn.Module, name: str, value: Any) -> None:
        before = module.__dict__.get(name, _ABSENT)
        for i, (m, n, first, ours) in enumerate(self._undo):
            if m is module and n == name and ours is before:  # ours for ours
                before = first
                del self._undo[i]
                break
        module.__dict__[name] = value
        self._undo.append((module, name, before, value))


def patch(
    model: nn.Module,
    *,
    ops: Iterable[str] | None = None,
    strict: bool = False,
    logits: str = "auto",
) -> Patch:
    """Makes a Hugging Face model run on fastlm's kernels, in place, until `undo()`.

    Only this instance changes: a few of its modules get a `forward` of their own. Classes,
    functions, configurations, parameters and state-dict keys stay as they are, and so does every
    other model. Modules are recognised by what they are made of and each replacement is confirmed
    by a trial run on random numbers; what does not agree is left alone and reported.

    Args:
        model: a decoder of transformers; or any module, whose linear maps, norms and feed-forward
            blocks are then replaced.
        ops: the operators to bring in, by name (`fastlm.hf.patch.STEMS`); all by default.
        strict: raise instead of leaving something alone that looks as if it should be replaced.
        logits: what a causal language model returns beside a loss. "auto": where gradients are on
            and the logits are large, they are left out and made when somebody reads them from the
            output; otherwise they are made as ever. "always": as ever. "never": `out.logits` is
            None wherever labels are given, also in evaluation.

    Returns:
        A Patch: `report()`, `undo()`, and a context manager. Patching a patched model adds what is
        missing; each Patch undoes what it did itself.

    Raises:
        TypeError: model is no torch.nn.Module, or is compiled already.
        ValueError: an unknown name in ops, or logits none of the three.
        RuntimeError: strict, and something was left alone; the model is then as it was.

    >>> with patch(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) as p:
    ...     print(p.report())
    fastlm.patch(Sequential): 2 modules replaced, 0 left alone
      0  Linear     linear
      1  LayerNorm  layer_norm
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("patch: model must not be compiled yet: patch it, then torch.compile it")
    if logits not in LOGITS:
        raise ValueError(f"patch: logits must be one of {', '.join(LOGITS)}, got {logits!r}")
    made = Patch(model, _stems(ops), logits)
    try:
        _Patcher(made).run()
        if strict:
            _check_strict(made, explicit=ops is not None)
    except BaseException:
        made.undo()
        raise
    return made


def _stems(ops: Iterable[str] | None) -> frozenset[str]:
    if ops is None:
        return frozenset(STEMS)
    names = [ops] if isinstance(ops, str) else list(ops)
    for name in names:
        if name not in STEMS:
            raise ValueError(f"patch: ops must be names among {', '.join(STEMS)}, got {name!r}")
    return frozenset(names)


def _check_strict(made: Patch, explicit: bool) -> None:
    kept = [e for e in made.entries if e.state == "kept"]
    if kept:
        raise RuntimeError("patch: strict, but left alone:\n" + "\n".join(_table(kept)))
    done = {s for e in made.entries if e.state in ("replaced", "already") for s in e.stems}
    missing = sorted(made.stems - done) if explicit else []
    if missing or not done:
        raise RuntimeError(f"patch: strict, but no module for {', '.join(missing) or 'any op'}")


class _Patcher:
    """One walk over the modules, children before parents."""

    def __init__(self, made: Patch):
        self.made = made
        device = _device(made.model, made.model).type
        lacking = {stem: why for stem in sorted(made.stems) if (why := _no_kernel(stem, device))}
        self.lacking = lacking
        self.wanted = made.stems - lacking.keys()
        self.blocks = Blocks(self.wanted, _rotary(made.model))
        self.verdicts: dict[Any, tuple[list[str], Match]] = {}

    def run(self) -> None:
        for path, module in reversed(list(self.made.model.named_modules())):
            self._module(path, module)
            self._loss(path, module)
            self._decode(path, module)
        for stem, why in self.lacking.items():
            self._note("", self.made.model, "noted", f"{stem}: {why}")
        self.made.entries.reverse()

    def _module(self, path: str, module: nn.Module) -> None:
        own = module.__dict__.get("forward", _ABSENT)
        if is_ours(own):
            self._note(path, module, "already", "", tuple(STEMS))
            return
        if own is not _ABSENT and getattr(own, "__func__", None) is not type(module).forward:
            if self._verdict(module)[1] is not None:
                reason = "another tool has replaced its forward"
                if "_hf_hook" in module.__dict__:
                    reason = "accelerate has wrapped its forward (device_map): patch before placing"
                self._note(path, module, "kept", reason)
            return
        kept, match = self._verdict(module)
        for reason in kept:
            self._note(path, module, "kept", reason)
        if isinstance(match, Candidate):
            self.made._install(module, "forward", types.MethodType(_marked(match.forward), module))
            stems = tuple(s for s in match.stems if s in STEMS)
            self._note(path, module, "replaced", match.text, stems)
        elif match is not None:
            state = "noted" if isinstance(match, Note) else "kept"
            self._note(path, module, state, match)

    def _note(
        self, path: str, module: nn.Module, state: str, text: str, stems: tuple[str, ...] = ()
    ) -> None:
        self.made.entries.append(Entry(path, type(module).__name__, state, text, stems))

    def _verdict(self, module: nn.Module) -> tuple[list[str], Match]:
        """The match of a module; modules of one structure share the trial runs."""
        key = structure(module)
        if key not in self.verdicts:
            kept, match = self._match(module)
            if isinstance(match, Candidate):
                whole = match.calls == [] or "activation" in match.stems
                if whole:  # not edited: its input may have another name
                    match = replace(match, forward=named_like(match.forward, type(module).forward))
                try:
                    _probe.compare(module, match.forward, match.calls, match.first_only)
                except _probe.Mismatch as e:
                    match = str(e)
                except Exception as e:
                    text = f"the trial run failed: {type(e).__name__}: {str(e)[:120]}"
                    # An addition beside a norm is no layer yet: that nobody fuses it is no failure.
                    match = Note(text) if match.stems == ("add_norm",) else text
            self.verdicts[key] = kept, match
        return self.verdicts[key]

    def _match(self, module: nn.Module) -> tuple[list[str], Match]:
        device = _device(module, self.made.model)
        if device.type == "meta":
            return [], "its parameters are on the meta device" if _own(module) else None
        matchers: list[tuple[str, Callable[[], Match]]] = [
            ("linear", lambda: match_linear(module)),
            ("rms_norm layer_norm", lambda: match_norm(module)),
            ("activation", lambda: match_activation(module, device)),
            ("feed_forward", lambda: match_feed_forward(module, device)),
            ("linear", lambda: match_experts(module, device)),
        ]
        for stems, matcher in matchers:
            if not self.wanted & set(stems.split()):
                continue
            match = matcher()
            if isinstance(match, Candidate) and not self.wanted & set(match.stems):
                return [], None
            if match is not None:
                return [], match
        return self.blocks.match(module)

    def _loss(self, path: str, module: Any) -> None:
        """The loss of a causal language model: a function that transformers keeps per instance."""
        fused = "linear_cross_entropy" in self.wanted and self.made.logits != "always"
        if not (fused or "cross_entropy" in self.wanted):
            return
        if not hasattr(type(module), "loss_function"):
            return
        from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

        kind = getattr(module, "loss_type", None)
        if module.get_output_embeddings() is None or (
            LOSS_MAPPING.get(kind, ForCausalLMLoss) is not ForCausalLMLoss
        ):
            return
        stems = ("cross_entropy",)
        if _computes_its_loss(type(module)):
            self._note(path, module, "kept", "cross_entropy: its forward computes the loss itself")
            return
        own = module.__dict__.get("_loss_function")
        if own is causal_lm_loss:
            self._note(path, module, "already", "loss", stems)
        elif own is not None:
            self._note(path, module, "kept", "cross_entropy: it has a loss function of its own")
            return
        else:
            self.made._install(module, "_loss_function", causal_lm_loss)
            self._note(path, module, "replaced", "cross_entropy (loss_function)", stems)
        forward = module.__dict__.get("forward")
        if fused and (not is_ours(forward) or _decodes_only(forward) or _renewed(module)):
            self._head(path, module)

    def _decode(self, path: str, module: Any) -> None:
        """A causal language model whose single tokens a plan can take."""
        language = hasattr(type(module), "loss_function") and hasattr(module, "generate")
        if "decode_plan" not in self.wanted or not language or not module.get_output_embeddings():
            return
        from fastlm.hf import decode

        own, stems = module.__dict__.get("forward"), ("decode_plan",)
        if hasattr(own, "inner"):
            self._note(path, module, "already", "decode_plan", stems)
            return
        reason = decode.obstacle(module)
        if _trl.is_exchanged(own) or (not is_ours(own) and _head.foreign(module)):
            reason = "another tool has replaced its forward"
        if reason:
            self._note(path, module, "noted", f"decode_plan: {reason}")
            return
        forward = decode.forward(type(module), getattr(own, "__func__", type(module).forward))
        self.made._install(module, "forward", types.MethodType(_marked(forward), module))
        self._note(path, module, "replaced", "decode_plan (single tokens of generate)", stems)

    def _head(self, path: str, module: Any) -> None:
        """Its head, which may leave the making of logits to the loss."""
        head, stem = module.get_output_embeddings(), "linear_cross_entropy"
        decodes = is_ours(module.__dict__.get("forward"))
        theirs = _trl.forward_of(module)
        reason = "" if theirs else _head.obstacle(head)
        if not reason and not decodes and not theirs and _head.foreign(module):
            reason = "another tool has replaced its forward"
        if not reason:
            try:
                _trl.confirm(module, theirs) if theirs else _head.confirm(module)
            except _probe.Mismatch as e:
                reason = str(e)
            except Exception as e:
                reason = f"the trial run failed: {type(e).__name__}: {str(e)[:120]}"
        if reason:
            self._note(path, module, "kept", f"{stem}: {reason}")
            return
        if theirs:
            exchanged = types.MethodType(_marked(_trl.exchanged(theirs)), module)
            self.made._install(module, "forward", exchanged)
            self._note(path, module, "replaced", f"{stem} (in TRL's forward)", (stem,))
            return
        ours = _head.head_forward if "linear" in self.wanted else _head.own_head_forward
        whole = _head.model_forward(type(module), self.made.logits)
        if decodes:  # by an earlier patch
            from fastlm.hf import decode

            whole = decode.forward(type(module), whole)
        installed = ((head, ours), (module, whole))
        for target, forward in installed[:1] if _renewed(module) else installed:
            self.made._install(target, "forward", types.MethodType(_marked(forward), target))
        text = f"{stem} (logits: {self.made.logits})"
        self._note(path, module, "replaced", text, (stem,))


def _marked(forward: Callable[..., Any]) -> Any:
    """The forward, recognisable as ours. Its name lets pickle fetch the class's own instead."""
    function: Any = forward
    function.fastlm, function.__name__ = True, "forward"
    return function


def is_ours(forward: Any) -> bool:
    """Whether an instance's forward was put there by `patch`."""
    return getattr(getattr(forward, "__func__", None), "fastlm", False)


def _decodes_only(forward: Any) -> bool:
    """Whether a forward of ours brings a decode plan to the model's own and nothing else."""
    return getattr(forward, "inner", None) is type(forward.__self__).forward


def _computes_its_loss(cls: Any) -> bool:
    """Whether a forward calls PyTorch's cross-entropy instead of the model's loss function."""
    names = inspect.unwrap(cls.forward).__code__.co_names
    return "loss_function" not in names and not {"cross_entropy", "CrossEntropyLoss"}.isdisjoint(
        names
    )


def _renewed(module: Any) -> bool:
    """Whether a patched model has got another head since, as by resize_token_embeddings."""
    forward, head = module.__dict__.get("forward"), module.get_output_embeddings()
    inner = getattr(forward, "inner", getattr(forward, "__func__", None))
    defers = getattr(inner, "defers", False)
    return defers and not _head.may_defer(head.__dict__.get("forward"))


def unpatch(model: nn.Module) -> int:
    """Removes everything any patch put into a model, also into a copy of it; returns how many."""
    return len(_taken_out(model))


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The model without any patch inside the block."""
    taken = _taken_out(model)
    try:
        yield
    finally:
        for module, name, value in taken:
            module.__dict__[name] = value


def _taken_out(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Takes every patch out; returns what was where."""
    taken = []
    for module in model.modules():
        for name in ("forward", "_loss_function"):
            value = module.__dict__.get(name)
            if is_ours(value) or value is causal_lm_loss:
                taken.append((module, name, module.__dict__.pop(name)))
                if _trl.is_exchanged(value):
                    module.__dict__[name] = _trl.below(value, module)
    return taken


def _no_kernel(stem: str, device: str) -> str:
    """Why an operator would run on PyTorch's kernels here, no faster than the model's own."""
    if stem == "decode_plan":  # is no operator; it runs that one's kernel
        return "" if "cpu" in _registry.implementations("decode_attention", device) else "no kernel"
    ours = set(_registry.implementations(stem, device)) - {"torch", "reference"}
    if _registry.forced() or ours:
        return ""
    reasons = [why for b in _registry.backends(stem) for why in _registry.absent(stem, b, device)]
    return f"no kernel here ({'; '.join(reasons) or 'none was written yet'})"


def _rotary(model: nn.Module) -> nn.Module | None:
    """The module that makes the model's rotation tables."""
    named = None
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, Tensor) and frequencies.dim() == 1:
            return module
        if named is None and "rotary" in type(module).__name__.lower():
            named = module  # which may hold the tables themselves
    return named


def _own(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    for m in (module, model):
        p = next(m.parameters(), None)
        if p is not None:
            return p.device
    return torch.device("cpu")


def _table(entries: list[Entry]) -> list[str]:
    """One line per group of layers that share everything but their numbers."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for e in entries:
        groups.setdefault((pattern(e.path), e.module, e.text), []).append(e.path)
    rows = [(collapse(p, paths), m, t) for (p, m, t), paths in groups.items()]
    if not rows:
        return []
    widths = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return [f"  {p:<{widths[0]}}  {m:<{widths[1]}}  {t}".rstrip() for p, m, t in rows]
