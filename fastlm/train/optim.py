"""Optimisers, their state by parameter names, and clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastlm.train.config import TrainConfig


def make(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that have gradients.

    Weight decay is decoupled from the gradient (also with SGD) and falls on matrices that multiply:
    not on norms and biases, nor on tables that are only looked up. An embedding that is also the
    head multiplies, and decays. PyTorch's fused AdamW passes over the state once.
    """
    decayed: list[torch.nn.Parameter] = []
    kept: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if decays(model, name, parameter) else kept).append(parameter)
    if not decayed and not kept:
        raise ValueError("train: the model has no parameter with a gradient")
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(groups, config.lr, betas, config.eps, fused=True)
    return SGD(groups, config.lr, config.momentum)


def decays(model: torch.nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether weight decay falls on a parameter."""
    module, _, _ = name.rpartition(".")
    if parameter.dim() < 2:
        return False
    if not isinstance(model.get_submodule(module), torch.nn.Embedding):
        return True
    config = getattr(model, "config", None)
    return name == "embed.weight" and bool(getattr(config, "tied_head", False))


class SGD(torch.optim.SGD):
    """torch.optim.SGD whose weight decay is decoupled: w -= lr * decay * w, beside the gradient."""

    def __init__(self, groups: list[dict[str, object]], lr: float, momentum: float) -> None:
        for group in groups:
            group["decoupled"], group["weight_decay"] = group["weight_decay"], 0.0
        super().__init__(groups, lr, momentum)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            if group["decoupled"]:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * group["decoupled"])
        super().step(closure)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """For every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Parameter name -> what the optimiser keeps of it, made empty where it has not begun.

    These are the optimiser's own tensors: written into, they are its state.
    """
    out: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            _begin(optimizer, parameter, state)
        out[name] = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    return out


def _begin(
    optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor | None]
) -> None:
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        names = ["exp_avg", "exp_avg_sq"]
    else:  # a zero buffer at the first update is what PyTorch makes of none: it adds the gradient
        names = ["momentum_buffer"] if optimizer.param_groups[0]["momentum"] else []
    for name in names:
        state[name] = torch.zeros_like(parameter, requires_grad=False)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, over all processes' shares."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, foreach=True)
    whole = getattr(norm, "full_tensor", None)  # of a sharded model
    return norm if whole is None else whole()


@torch.no_grad()
def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """In place."""
    if factor != 1.0:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


class LossScale:
    """What fp16 losses are multiplied with, so that small gradients do not vanish.

    Halved when a gradient overflows (that step is left out), doubled after 1000 good steps.
    """

    def __init__(self, used: bool, value: float = 2.0**16, good: int = 0) -> None:
        self.used = used
        self.value = value if used else 1.0
        self.good = good

    def update(self, finite: bool) -> None:
        """After each step."""
        if not self.used:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good == 1000:
            self.value, self.good = self.value * 2, 0
