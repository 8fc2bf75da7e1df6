"""LoRA: low-rank updates of frozen linear layers, in PEFT's file layout.

    y = x W^T + b + scale (x A^T) B^T,   A [r, in], B [out, r], scale = alpha / r

W has no gradient: a step needs neither its gradient nor optimiser state for it. An adapter is two
files, adapter_config.json and adapter_model.safetensors, under Hugging Face's names of the layers,
so that `peft` loads it onto the transformers model. Source: arXiv:2106.09685.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import ops
from fastlm.hf import families
from fastlm.hf.weights import CheckpointError, read_json, write_directory, write_json

if TYPE_CHECKING:
    from fastlm.models.decoder import Decoder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LAYERS = ("attention.qkv", "attention.out", "mlp.gate", "mlp.up", "mlp.down")
_GROUPS = {"all-linear": _LAYERS, "attention": _LAYERS[:2], "mlp": _LAYERS[2:]}
# What an adapter may not have, and what it must say instead.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}


class LoRALinear(torch.nn.Module):
    """A frozen linear layer and the low-rank updates of some of its parts.

    Args:
        base: the layer.
        rows: outputs of each part that Hugging Face keeps as a layer of its own (q, k and v).
        parts: the numbers of the parts with an update.
        rank, scale, dropout: r, alpha / r, and the share of inputs that the updates drop in
            training.
    """

    def __init__(
        self,
        base: torch.nn.Linear,
        rows: Sequence[int],
        parts: Sequence[int],
        rank: int,
        scale: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.rows, self.parts, self.rank = list(rows), list(parts), rank
        self.scale, self.dropout = scale, dropout
        device = base.weight.device
        a = [torch.empty(rank, base.in_features, device=device) for _ in parts]
        for value in a:
            torch.nn.init.kaiming_uniform_(value, a=math.sqrt(5))
        self.lora_a = torch.nn.ParameterList(a)
        self.lora_b = torch.nn.ParameterList(
            torch.zeros(self.rows[part], rank, device=device) for part in parts
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y = self.base(x)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = ops.linear(dropped, torch.cat([*self.lora_a]).to(x.dtype))
        pieces = list(y.split(self.rows, -1))
        for part, b, narrow in zip(self.parts, self.lora_b, low.split(self.rank, -1), strict=True):
            update = ops.linear(narrow.contiguous(), b.to(narrow.dtype))
            pieces[part] = pieces[part] + self.scale * update
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)

    @torch.no_grad()
    def merged(self) -> torch.nn.Linear:
        """The layer with the updates added to its weight, in fp32, rounded once."""
        views = self.base.weight.split(self.rows)
        for part, a, b in zip(self.parts, self.lora_a, self.lora_b, strict=True):
            views[part].copy_(views[part].float() + self.scale * (b.float() @ a.float()))
        return self.base

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, parts={self.parts}, dropout={self.dropout}"


class LoRA:
    """The adapter of a model: see `apply` and `load`.

    Attributes:
        model: the decoder, whose linear layers it replaced.
        config: what adapter_config.json says.
    """

    def __init__(self, model: Decoder, config: Mapping[str, Any]) -> None:
        self.model, self.config = model, dict(config)

    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the adapter's two files into a directory, all at once or not at all."""
        write_directory(Path(path), self.write)

    def write(self, directory: Path) -> None:
        """Writes the adapter's two files."""
        from safetensors.torch import save_file

        tensors = {}
        for name, value in self._named():
            tensors[name] = value.detach().float().contiguous().cpu()
        save_file(tensors, directory / WEIGHTS, {"format": "pt"})
        write_json(directory / CONFIG, self.config)

    @torch.no_grad()
    def read(self, directory: Path) -> None:
        """Reads the weights that `write` wrote."""
        stored = _tensors(directory / WEIGHTS)
        wanted = dict(self._named())
        for name in sorted(set(stored) ^ set(wanted)):
            what = "is missing" if name in wanted else "has no layer in this model"
            raise CheckpointError(f"{directory / WEIGHTS}: tensor {name} {what}")
        for name, value in wanted.items():
            if stored[name].shape != value.shape:
                expected, got = list(value.shape), list(stored[name].shape)
                raise CheckpointError(
                    f"{directory / WEIGHTS}: tensor {name} must be {expected}, got {got}"
                )
            value.copy_(stored[name])

    def merge(self) -> Decoder:
        """Adds the updates to the weights, for good; the model is an ordinary one again."""
        for module in [*self.model.modules()]:
            for name, child in [*module.named_children()]:
                if isinstance(child, LoRALinear):
                    setattr(module, name, child.merged())
        return self.model.requires_grad_(True)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """PEFT's name -> A or B."""
        for module, names in _layers(self.model):
            if isinstance(module, LoRALinear):
                for i, part in enumerate(module.parts):
                    stem = f"base_model.model.{names[part]}"
                    yield f"{stem}.lora_A.weight", module.lora_a[i]
                    yield f"{stem}.lora_B.weight", module.lora_b[i]


def apply(
    model: Decoder,
    rank: int = 8,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> LoRA:
    """Freezes a decoder and gives its linear layers updates to train, which are zero at first.

    Args:
        model: the decoder, changed in place.
        rank: r.
        alpha: the updates count alpha / rank times; 2 rank by default.
        dropout: share of the updates' inputs dropped in training.
        targets: "all-linear", "attention", "mlp", or Hugging Face's names of layers ("q_proj",
            "v_proj"), also as one text with commas.
        seed: of A's first values.

    Raises:
        ValueError: a number out of range, a name that no layer has.
    """
    if rank < 1:
        raise ValueError(f"lora: rank must be 1 or more, got {rank}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora: dropout must be at least 0 and below 1, got {dropout}")
    alpha = 2 * rank if alpha is None else alpha
    wanted = _targets(model, targets)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _source(model),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in wanted}),
        "bias": "none",
        "fan_in_fan_out": bool(families.of(model.config).transposed),
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "modules_to_save": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _replace(model, wanted, rank, alpha / rank, dropout)
    return LoRA(model, config)


def load(model: Decoder, path: str | os.PathLike[str]) -> LoRA:
    """Puts a saved adapter onto a decoder, ours or PEFT's.

    Raises:
        CheckpointError: no adapter, one of another model, a variant beyond plain LoRA.
    """
    directory = Path(path)
    file = directory / CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type must be LORA, got {config.get('peft_type')!r}")
    for key, values in _REFUSED.items():
        if key in config and config[key] not in values:
            raise CheckpointError(f"{file}: {key} must be {values[0]!r}, got {config[key]!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{file}: r and lora_alpha must be numbers, got {rank!r}, {alpha!r}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    stems = {name.split(".lora_")[0] for name in _tensors(directory / WEIGHTS)}
    wanted = {stem.removeprefix("base_model.model.") for stem in stems}
    known = {name for _, names in _layers(model) for name in names}
    if foreign := sorted(wanted - known):
        raise CheckpointError(f"{directory / WEIGHTS}: this model has no layer {foreign[0]}")
    _replace(model, wanted, rank, scale, float(config.get("lora_dropout") or 0.0))
    lora = LoRA(model, config)
    lora.read(directory)
    return lora


def _layers(model: Decoder) -> Iterator[tuple[Any, list[str]]]:
    """The linear layers of the blocks, and Hugging Face's names of their parts."""
    weights = families.of(model.config).weights
    for i in range(model.config.layers):
        for inner in _LAYERS:
            if f"blocks.{{}}.{inner}" not in weights:
                continue
            names = [name.format(i) for name in weights[f"blocks.{{}}.{inner}"]]
            yield model.get_submodule(f"blocks.{i}.{inner}"), names


def _targets(model: Decoder, targets: str | Sequence[str]) -> set[str]:
    """Hugging Face's names of the parts that get an update."""
    asked = targets.split(",") if isinstance(targets, str) else list(targets)
    weights = families.of(model.config).weights
    leaves: set[str] = set()
    everything = {
        name: {n.format(i) for i in range(model.config.layers) for n in weights[name]}
        for name in (f"blocks.{{}}.{inner}" for inner in _LAYERS)
        if name in weights
    }
    known = {n.rpartition(".")[2] for names in everything.values() for n in names}
    for target in map(str.strip, asked):
        if target in _GROUPS:
            for inner in _GROUPS[target]:
                leaves |= everything.get(f"blocks.{{}}.{inner}", set())
        elif target in known:
            leaves |= {n for names in everything.values() for n in names if _leaf(n) == target}
        else:
            expected = ", ".join([*_GROUPS, *sorted(known)])
            raise ValueError(f"lora: targets must be among {expected}; got {target!r}")
    return leaves


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _replace(model: Decoder, wanted: set[str], rank: int, scale: float, dropout: float) -> None:
    """Freezes the model and wraps its layers."""
    for module, _ in _layers(model):
        if not isinstance(module, torch.nn.Linear):
            raise ValueError(
                f"lora: the layers must be plain linear ones, got {type(module).__name__}"
            )
    model.requires_grad_(False)
    parents = {
        id(child): (module, name)
        for module in model.modules()
        for name, child in module.named_children()
    }
    for module, names in [*_layers(model)]:
        parts = [i for i, name in enumerate(names) if name in wanted]
        if parts:
            rows = model.config.qkv_rows if len(names) == 3 else (module.out_features,)
            parent, name = parents[id(module)]
            wrapped = LoRALinear(module, rows, parts, rank, scale, dropout)
            setattr(parent, name, wrapped.train(module.training))


def _source(model: Decoder) -> str | None:
    source = model.source
    return None if source is None else str(getattr(source, "path", source))


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise CheckpointError(f"{file}: the file is missing")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
