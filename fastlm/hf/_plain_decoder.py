"""Which models of transformers a decode plan can read, and that it computes what they compute.

A model is read through its family's row (`families`): its modules become the plan's parts, its
parameters stay where they are. That the row describes the class is not taken on trust: a twin of
two layers is made from the model's own configuration, a few numbers wide, and continues a text on
random weights, by its own forward and by a plan. That the model is what its configuration says is
seen by comparing its modules with the twin's.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.hf import _probe, families
from fastlm.models.config import Config
from fastlm.models.parts import Layer, Parts, Rows, unfit
from fastlm.models.plan import MAX_HEAD, BoundPlan

# Rotations whose angles are a position times a frequency that no text changes.
_FIXED_ROPES = (None, "default", "linear", "llama3")
_TOKENS = 5  # of a trial's prompt
Modules = dict[str, set[tuple[type, tuple[Any, ...], tuple[str, ...]]]]


class Unfit(Exception):
    """Why a plan cannot decode a model."""


@dataclass(frozen=True)
class Layout:
    """How to read a model that a plan can decode.

    Attributes:
        config: its sizes.
        family: its row.
        output: what its forward returns.
        modules: what it is made of, see `_described`.
    """

    config: Config
    family: families.Family
    output: type
    modules: Modules

    def parts(self, model: nn.Module, places: int) -> Parts:
        """The model's modules, with tables for so many positions.

        Raises:
            Unfit: a module is missing or not as the configuration says.
        """
        _compare(_described(model, self.family), self.modules)
        return _parts(model, self.config, self.family, places)


def recognise(model: Any) -> Layout:
    """The layout of a causal language model.

    Raises:
        Unfit: a plan cannot decode it; the message says why.
    """
    config, family = _config(model)
    _parts(model, config, family, 1)
    twin = _twin(model, family)
    modules = _described(twin, family)
    _compare(_described(model, family), modules)
    layout = Layout(config, family, _confirm(twin), modules)
    reasons = unfit(layout.parts(model, 1))
    if reasons:
        raise Unfit(reasons[0])
    return layout


def _config(model: Any) -> tuple[Config, families.Family]:
    values = model.config.to_dict()
    try:
        config = families.read(values, "its configuration")
        family = families.by_model_type(config.family, "its configuration")
    except ValueError as error:
        raise Unfit(str(error)) from None
    if config.window is not None:
        raise Unfit("its attention has a sliding window, which its cache cuts off")
    assert config.head_dim is not None
    if config.head_dim > MAX_HEAD:
        raise Unfit(f"takes heads of up to {MAX_HEAD}, not {config.head_dim}")
    return config, family


def _parts(model: nn.Module, c: Config, family: families.Family, places: int) -> Parts:
    assert c.kv_heads is not None and c.head_dim is not None and c.intermediate is not None
    width, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def modules(key: str, layer: int = 0) -> list[Any]:
        try:
            return [model.get_submodule(name.format(layer)) for name in family.weights[key]]
        except AttributeError:
            raise Unfit(f"it has no {family.weights[key][0].format(layer)}") from None

    def rows(key: str, layer: int, *outputs: int) -> list[Rows]:
        found = modules(f"blocks.{{}}.{key}", layer)
        flipped = key in family.transposed
        if len(found) == len(outputs):
            return [Rows(m, 0, n, flipped) for m, n in zip(found, outputs, strict=True)]
        firsts = [sum(outputs[:i]) for i in range(len(outputs))]
        return [Rows(found[0], f, n, flipped) for f, n in zip(firsts, outputs, strict=True)]

    def layer(i: int) -> Layer:
        q, k, v = rows("attention.qkv", i, width, kv, kv)
        return Layer(
            modules("blocks.{}.attention_norm", i)[0],
            q,
            k,
            v,
            rows("attention.out", i, c.hidden)[0],
            modules("blocks.{}.mlp_norm", i)[0],
            rows("mlp.gate", i, wide)[0] if c.gated else None,
            rows("mlp.up", i, wide)[0],
            rows("mlp.down", i, c.hidden)[0],
        )

    wide = c.intermediate
    learned = modules("positions")[0] if c.positions == "learned" else None
    layers = [layer(i) for i in range(c.layers)]
    norm = modules("norm")[0]
    norms = [norm, *(n for one in layers for n in (one.attention_norm, one.mlp_norm))]
    epsilons = {float(getattr(n, "variance_epsilon", getattr(n, "eps", "nan"))) for n in norms}
    if len(epsilons) != 1 or math.isnan(min(epsilons)):
        raise Unfit("the norms' eps differ")
    return Parts(
        c,
        epsilons.pop(),
        modules("embed")[0],
        learned,
        None if learned is not None else _tables(model, places),
        places if learned is None else len(learned.weight),
        layers,
        norm,
        Rows(modules("head")[0], 0, c.vocab),
    )


def _tables(model: nn.Module, places: int) -> nn.Module:
    """The cosines and sines of the model's rotary embedding, in fp32."""
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(found) != 1:
        raise Unfit(f"it has {len(found)} rotary embeddings")
    rotary: Any = found[0]
    kind = getattr(rotary, "rope_type", None)
    if kind not in _FIXED_ROPES:
        raise Unfit(f"its rotation is of type {kind!r}, whose angles change with the text")
    made = nn.Module()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        where = torch.arange(places, dtype=torch.float32, device=rotary.inv_freq.device)
        angles = where[:, None] * rotary.inv_freq.float()
        scale = getattr(rotary, "attention_scaling", 1.0)
        made.register_buffer("cos", angles.cos() * scale)
        made.register_buffer("sin", angles.sin() * scale)
    return made


def _twin(model: Any, family: families.Family) -> Any:
    """A model of the same class and configuration, small, with random fp32 weights."""
    config = copy.deepcopy(model.config)
    sizes = _config(model)[0]
    assert sizes.head_dim is not None
    small = {
        "vocab": 64,
        "hidden": 2 * sizes.head_dim,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2 if sizes.kv_heads == sizes.heads else 1,
        "intermediate": 40,
    }
    for name, value in small.items():
        if name in family.keys:
            setattr(config, family.keys[name], value)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[: small["layers"]]
    config.pad_token_id = None  # it need not be in the small vocabulary
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            twin = type(model)(config).float().eval()
    except Exception as error:
        raise Unfit(
            f"no trial run: {type(model).__name__} cannot be made small:"
            f" {type(error).__name__}: {str(error)[:120]}"
        ) from None
    with torch.no_grad():
        values, parameters = _probe.parameters(twin), dict(twin.named_parameters())
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
    return twin


def _compare(found: Modules, expected: Modules) -> None:
    """Raises Unfit unless a model's modules are those of the twin, layer by layer."""
    for path, kinds in found.items():
        if kinds != expected.get(path):
            raise Unfit(f"{path or 'the model'} is not what its configuration says")
    missing = expected.keys() - found.keys()
    if missing:
        raise Unfit(f"it has no {min(missing)}")


def _described(model: nn.Module, family: families.Family) -> Modules:
    """Path of each module -> its class, what it is set to, its parameters; one entry of each kind.

    All layers count as the first.
    """
    layers = family.weights["blocks.{}.attention_norm"][0].partition(".{}.")[0]
    found: Modules = {}
    for path, module in model.named_modules():
        if path.startswith(f"{layers}."):
            rest = path[len(layers) + 1 :].partition(".")[2]
            path = f"{layers}.0.{rest}" if rest else f"{layers}.0"
        settings = tuple(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, (bool, float))
            and name not in ("training", "gradient_checkpointing")
            and not name.startswith("_")
        )
        names = tuple(n for n, p in module._parameters.items() if p is not None)
        found.setdefault(path, set()).add((type(module), settings, names))
    return found


def _confirm(twin: Any) -> type:
    """Raises Unfit unless a plan continues a text as the twin does; the class of its output."""
    config, family = _config(twin)
    tokens = torch.arange(2 * (_TOKENS + 2)).view(2, -1) * 11 % config.vocab
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # padding on the left
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with (
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        _probe.evaluating(twin),
    ):
        options: dict[str, Any] = {"return_dict": True}
        try:
            whole = twin(tokens, attention_mask=mask, position_ids=places, **options)
            n = _TOKENS
            begun = twin(
                tokens[:, :n],
                attention_mask=mask[:, :n],
                position_ids=places[:, :n],
                use_cache=True,
                **options,
            )
            caches = [(layer.keys, layer.values) for layer in begun.past_key_values.layers]
        except Exception as error:
            raise Unfit(f"no trial run: {type(error).__name__}: {str(error)[:120]}") from None
        made = _parts(twin, config, family, n + 2)
        reasons = unfit(made)
        if reasons:
            raise Unfit(reasons[0])
        plan = BoundPlan(made, 2)
        room = [
            [nn.functional.pad(x, (0, 0, 0, 2)).contiguous() for x in pair]
            for pair in zip(*caches, strict=True)
        ]
        plan.bind(room[0], room[1])
        first, logits = torch.tensor([2, 0]), torch.empty(2, config.vocab)
        for at in (n, n + 1):
            plan.step(
                tokens[:, at].contiguous(),
                logits,
                past=at,
                positions=places[:, at].contiguous(),
                first=first,
            )
            worst = _probe.distance(logits, whole.logits[:, at])
            if not worst <= _probe.BAR:
                raise Unfit(f"the trial run differs by {worst:.1e} of the result")
    return type(whole)
