"""The loss of a causal language model, with the logits left out where nobody needs them.

The model's forward stays as it is. While it runs with labels, its head returns a `Deferred`
(see `_deferred`), which travels through whatever the forward does to its logits, a scale or a
soft-cap, into the loss function; there the head and the loss become one operator. A trial run with
a stub in place of the model's body confirms loss and gradients before anything is installed.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.hf import _probe
from fastlm.hf._deferred import Deferred, outlet
from fastlm.hf._modules import linear_forward

LOGITS = ("auto", "always", "never")

# Below so many bytes of logits "auto" makes them: there is nothing to save, and a chunk more to
# start costs time.
WORTH = 16 << 20

_WIDTH = 8  # of the hidden states of a trial run


class _State(threading.local):
    head: nn.Module | None = None  # the head that may defer now, in this thread
    least: float = 0.0  # bytes of logits from which on it does
    fused: int = 0  # losses without logits so far
    worth: float | None = None  # replaces WORTH


_state = _State()


@contextlib.contextmanager
def worth(least: float) -> Iterator[None]:
    """Another threshold than WORTH inside the block."""
    before, _state.worth = _state.worth, least
    try:
        yield
    finally:
        _state.worth = before


@contextlib.contextmanager
def _deferring(head: nn.Module | None, least: float) -> Iterator[None]:
    before = _state.head, _state.least
    _state.head, _state.least = head, least
    try:
        yield
    finally:
        _state.head, _state.least = before


def causal_lm_loss(
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss: token n is scored on token n + 1.

    The logits are not copied to fp32 first; the kernel computes in fp32 from what they are. Those
    that a head has deferred are never made.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    form = logits.form() if isinstance(logits, Deferred) else None
    if form is not None and vocab_size == logits.shape[-1]:
        _state.fused += 1
        scale, cap = form
        x, tensors = logits.hidden, logits.head._parameters
        x = (x if scale == 1.0 else x * scale).reshape(-1, x.shape[-1])
        bias, weight = tensors.get("bias"), tensors["weight"]
        bias = bias if bias is None or scale == 1.0 else bias * scale
        loss = ops.linear_cross_entropy(x, weight, target, bias=bias, softcap=cap, **options)
    else:
        if isinstance(logits, Deferred):
            logits = logits.value()
        loss = ops.cross_entropy(logits.reshape(-1, vocab_size), target, **options)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _head_forward(plain: Callable[..., Tensor]) -> Callable[..., Any]:
    def forward(self: nn.Linear, input: Tensor) -> Any:
        if (
            not torch.compiler.is_compiling()
            and _state.head is self
            and input.numel() // input.shape[-1] * self.out_features * input.element_size()
            >= _state.least
        ):
            return Deferred(self, input, lambda x: plain(self, x))
        return plain(self, input)

    return forward


# The forward of a head: a linear map, and the promise of one inside a model that allows it.
head_forward = _head_forward(linear_forward)
own_head_forward = _head_forward(nn.Linear.forward)


def may_defer(forward: Any) -> bool:
    """Whether an instance's forward is that of a head which promises its logits."""
    return getattr(forward, "__func__", None) in (head_forward, own_head_forward)


def obstacle(head: Any) -> str:
    """Why a head's weights cannot be read instead of calling it; "" where they can."""
    if type(head) is not nn.Linear:
        package = type(head).__module__.partition(".")[0]
        return f"its head is a {type(head).__name__} of {package}, which has to be called"
    if any(
        getattr(head, f"_{kind}_hooks")
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ):
        return "its head has hooks, as offloaded and sharded ones do"
    weight = head._parameters.get("weight")
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its head's weight is a {type(weight).__name__}: sharded, quantised or parametrised"
    if hasattr(weight, "ds_id"):
        return "its head's weight is sharded (ZeRO)"
    if weight is None or not weight.is_floating_point():
        return "its head's weight is no plain floating-point parameter"
    if foreign(head, linear_forward, head_forward, own_head_forward):
        return "another tool has replaced the forward of its head"
    return ""


def foreign(module: nn.Module, *ours: Callable[..., Any]) -> bool:
    """Whether an instance's forward is neither its class's nor one of ours."""
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) not in (type(module).forward, *ours)


def model_forward(cls: type, logits: str) -> Callable[..., Any]:
    """The forward of a patched model with a head and labels: the class's own, see the file's top.

    Args:
        cls: the model's class.
        logits: "auto": made when they are looked at where gradients are on and labels given, as
            ever otherwise. "never": no logits beside a loss.
    """
    signature = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    place = list(signature.parameters).index("labels") - 1

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if labels is None and len(args) > place:
            labels = args[place]
        if labels is None:
            return type(self).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            out = type(self).forward(self, *args, **kwargs)
            return out if logits == "auto" else outlet(out, False)
        head = self.get_output_embeddings()
        if (
            (logits == "auto" and not torch.is_grad_enabled())
            or self.__dict__.get("_loss_function") is not causal_lm_loss
            or obstacle(head)
        ):
            head = None
        least = WORTH if _state.worth is None else _state.worth
        with _deferring(head, 0.0 if logits == "never" else least):
            out = type(self).forward(self, *args, **kwargs)
        return outlet(out, logits == "auto")

    forward.__signature__ = signature  # type: ignore[attr-defined]  # trainers go by it
    forward.whole = True  # type: ignore[attr-defined]  # verify compares it by loss and logits
    forward.defers = True  # type: ignore[attr-defined]
    return forward


def confirm(model: Any) -> None:
    """Raises Mismatch unless loss and gradients without logits are the model's own.

    The body is replaced by a stub that returns random hidden states, a few numbers wide, and the
    head's weights by random ones of that width: what is tried is the end of the model's forward.
    """
    head = model.get_output_embeddings()
    for name, part in model.named_children():
        if part is not head and any(m is head for m in part.modules()):
            raise _probe.Mismatch(f"its head is a part of {name} ({type(part).__name__})")
    leaves, labels = leaves_and_labels(model)

    def read(whole: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, **kwargs: Any) -> list[Tensor]:
            out = whole(self, **kwargs)
            return [out["loss"], out["logits"]]  # while the weights are the random ones

        return forward

    cls = type(model)
    sides: tuple[tuple[Any, Any, Any], ...] = (
        (read(cls.forward), nn.Linear.forward, None),
        (read(model_forward(cls, "auto")), own_head_forward, causal_lm_loss),
    )
    for options in ({}, {"num_items_in_batch": 7}):
        results = []
        for forwards in sides:
            fused = _state.fused
            results.append(trial(model, *forwards, leaves, labels, options))
        if _state.fused == fused:
            raise _probe.Mismatch("its forward does more with the logits than the loss")
        _probe.agree(results[1], results[0])


def leaves_and_labels(model: Any) -> tuple[list[Tensor], Tensor]:
    """Random hidden states, weight and bias of the head, and labels, for a trial run."""
    head = model.get_output_embeddings()
    like, classes = head.weight, head.weight.shape[0]
    leaves = [_probe.random((2, 6, _WIDTH), 21, like), _probe.random((classes, _WIDTH), 22, like)]
    if head.bias is not None:
        leaves.append(_probe.random((classes,), 23, like))
    labels = torch.arange(12, device=like.device).view(2, 6) * 7 % classes
    labels[0, 3] = -100
    return leaves, labels


class _Body:
    """What a model's body returns: hidden states, and None for everything else it is asked for."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, k: Any) -> Any:
        return (self.last_hidden_state,)[k]


def trial(
    model: Any,
    forward: Callable[..., Any],
    head_forward: Callable[..., Any],
    loss_function: Callable[..., Any] | None,
    leaves: list[Tensor],
    labels: Tensor,
    options: dict[str, Any],
) -> list[Tensor]:
    """What the forward returns, the loss first, and the gradients of the leaves.

    forward: of the model, whose body is a stub. loss_function: None for that of its class.
    """
    head = model.get_output_embeddings()
    name = next(n for n, m in model.named_modules() if m is head)
    leaves = [x.clone().requires_grad_() for x in leaves]
    values = dict(zip((f"{name}.weight", f"{name}.bias"), leaves[1:], strict=False))
    parts = (m for m in model.children() if any(True for _ in m.children()))
    found = (model.base_model, model.get_decoder(), *parts)
    bodies = {id(m): m for m in found if m is not model}

    def stub(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _Body(leaves[0])

    accepted = inspect.signature(type(model).forward).parameters
    flags = {n: False for n in ("use_cache", "output_router_logits") if n in accepted}
    with contextlib.ExitStack() as stack:
        for body in bodies.values():
            stack.enter_context(_probe.installed(body, stub))
        stack.enter_context(_probe.installed(model, forward))
        stack.enter_context(_probe.installed(head, head_forward))
        stack.enter_context(_loss_function(model, loss_function))
        stack.enter_context(_probe.evaluating(model))
        stack.enter_context(_probe.unwatched(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(labels.device.type, enabled=False))
        stack.enter_context(worth(0.0))
        keywords = {"input_ids": labels.clamp(min=0), "labels": labels, **flags, **options}
        loss, *others = torch.func.functional_call(model, values, (), keywords)
        gradients = torch.autograd.grad(loss, leaves)
    return [loss.detach()[None], *(x.detach() for x in others), *gradients]


@contextlib.contextmanager
def _loss_function(model: Any, function: Any) -> Iterator[None]:
    """Makes `function` the model's loss inside the block; None for that of its class."""
    before = model.__dict__.pop("_loss_function", None)
    if function is not None:
        model.__dict__["_loss_function"] = function
    try:
        yield
    finally:
        model.__dict__.pop("_loss_function", None)
        if before is not None:
            model.__dict__["_loss_function"] = before
