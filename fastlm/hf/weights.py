"""Checkpoints: Hugging Face directories read and written, GGUF files read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastlm import nn
from fastlm.hf import families
from fastlm.hf._directory import (
    FLOATS,
    INTEGERS,
    CheckpointError,
    read_json,
    write_directory,
    write_json,
)
from fastlm.hf.families import Family
from fastlm.models.config import Config
from fastlm.models.decoder import Decoder
from fastlm.reference.quantized_weight import GGUF as KINDS
from fastlm.reference.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from fastlm.hf.gguf import GGUFFile

__all__ = [
    "COMPANIONS",
    "CheckpointError",
    "Safetensors",
    "Tensors",
    "as_dtype",
    "build",
    "convert_gguf",
    "hf_names",
    "load",
    "read_config",
    "read_json",
    "save",
    "write_directory",
    "write_json",
]
# What lies beside the weights and is copied with them.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MAX_SHARD_BYTES = 5_000_000_000
QUANTIZATION = "quantization_config"  # in config.json
_PARTS = ("values", "scale", "minimum")  # of a matrix in integers, beside each other
Path_ = str | os.PathLike[str]


class Tensors(Protocol):
    """The tensors of a checkpoint, read one at a time."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""

    def dtype(self) -> torch.dtype:
        """What the weights are by default."""

    def read(self, name: str) -> Tensor:
        """One tensor; it may share the file's memory."""

    def integers(self, name: str) -> QuantizedWeight | None:
        """A matrix [out, in] that is stored in integers, as it is; None for another."""

    def head_integers(self) -> QuantizedWeight | None:
        """The head in integers of a model whose head is tied to its embedding."""


def load(
    path: Path_, dtype: torch.dtype | str | None = None, *, quantized: bool = False
) -> Decoder:
    """Opens a Hugging Face directory (config.json and safetensors) or a .gguf file.

    Args:
        path: the directory or file. One that holds a quantized decoder is opened as such.
        dtype: of the weights, as torch.dtype or by name ("bfloat16"); as stored by default, fp32
            for quantised GGUF files.
        quantized: keep the blocks of a GGUF file of type Q8_0, Q4_0 or Q4_1 as they are, bit for
            bit, in `fastlm.nn.QuantizedLinear`. The embedding is widened to dtype, and so are q, k
            and v of different types.

    Returns:
        The model in evaluation mode, on CPU.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: a truncated or foreign file, an unknown architecture, missing, unexpected
            or misshapen tensors; quantized, and nothing in the file is.
        ImportError: a GGUF file without the package gguf.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint directory or .gguf file")
    if path.is_file():
        from fastlm.hf.gguf import GGUFFile

        file = GGUFFile(path)
        model = build(file.config(), file, file.names(), dtype, quantized)
        model.source = file
    else:
        config = read_config(path)
        family = families.by_model_type(config.family, str(path / "config.json"))
        stored = QUANTIZATION in config.extra
        stem = INTEGERS if stored else FLOATS
        tensors = Safetensors(path, family, config.tied_head, stem)
        model = build(config, tensors, hf_names(family), dtype, stored)
        model.source = path
        how = config.extra.pop(QUANTIZATION, {}).get("activations", "exact")
        for module in model.modules():
            if isinstance(module, nn.QuantizedLinear):
                module.activations = how
    if quantized and not _quantized(model):
        raise CheckpointError(f"{path}: no weight is of {', '.join(KINDS)} or saved quantized")
    return model


def save(
    model: Decoder,
    path: Path_,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    companions: bool = True,
) -> None:
    """Writes a Hugging Face directory that transformers opens with the same logits.

    Everything is written to a directory beside and moved into place at the end; where `path`
    exists its files are replaced one by one, the weights before config.json.

    Args:
        model: what to write.
        path: the directory.
        max_shard_bytes: larger weights are split into several files.
        companions: whether to write the tokenizer's files of the checkpoint it was loaded from.

    A quantized model is written in integers, for `load`; transformers refuses it by name.

    Raises:
        ValueError: a quantized model whose layers treat x differently.
    """
    path = Path(path)
    family = families.of(model.config)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = families.write(model.config, dtype)
    how = {module.activations for module in _quantized(model).values()}
    if len(how) > 1:
        raise ValueError(f"save: the layers' activations must be alike, got {', '.join(how)}")
    if how:
        config[QUANTIZATION] = {"quant_method": "fastlm", "activations": how.pop()}

    def fill(directory: Path) -> None:
        stem = INTEGERS if QUANTIZATION in config else FLOATS
        _write_weights(exported(model, family), directory, max_shard_bytes, stem)
        if companions and model.source is not None:
            _copy_companions(model.source, directory)
        write_json(directory / "config.json", config)

    write_directory(path, fill)


def convert_gguf(
    gguf_path: Path_, out_dir: Path_, dtype: torch.dtype | str | None = None
) -> Decoder:
    """Turns a GGUF file into a Hugging Face directory; returns the model it holds.

    The directory has config.json, model.safetensors, tokenizer.json, tokenizer_config.json (with
    the chat template) and generation_config.json, and opens in transformers.
    """
    model = load(gguf_path, dtype)
    save(model, out_dir)
    return model


def build(
    config: Config,
    tensors: Tensors,
    names: Callable[[str, Config], tuple[list[str], bool]],
    dtype: torch.dtype | str | None,
    quantized: bool = False,
) -> Decoder:
    """A decoder with a checkpoint's tensors.

    Args:
        config: its shape.
        tensors: the checkpoint.
        names: parameter name -> (the checkpoint's names whose rows make it up, whether those are
            stored transposed).
        dtype: of the weights; the checkpoint's own when None.
        quantized: keep matrices that are stored in integers.
    """
    wanted = tensors.dtype() if dtype is None else as_dtype(dtype)
    with torch.device("meta"):
        model = Decoder(config)
    shapes = tensors.shapes()
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    integers: dict[str, QuantizedWeight] = {}  # module -> its weight
    for name, parameter in model.named_parameters():
        stored, transposed = names(name, config)
        module = model.get_submodule(name.rpartition(".")[0])
        linear = quantized and name.endswith(".weight") and isinstance(module, torch.nn.Linear)
        kept = _kept(tensors, stored) if linear else None
        if kept is not None:
            if kept.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{tensors.path}: {', '.join(stored)} must be {list(parameter.shape)}, got"
                    f" {list(kept.shape)}"
                )
            integers[name.removesuffix(".weight")] = kept
            used.update(stored)
            continue
        rows = config.qkv_rows if len(stored) == 3 else parameter.shape[:1]
        # always a copy: a file's bytes are not aligned and may change under a mapping
        out = torch.empty(parameter.shape, dtype=wanted)
        for piece, part in zip(out.split(list(rows)), stored, strict=True):
            expected = tuple(reversed(piece.shape)) if transposed else tuple(piece.shape)
            if part not in shapes:
                raise CheckpointError(f"{tensors.path}: tensor {part} is missing")
            if shapes[part] != expected:
                raise CheckpointError(
                    f"{tensors.path}: tensor {part} must be {list(expected)}, got"
                    f" {list(shapes[part])}"
                )
            value = tensors.read(part)
            piece.copy_(value.T if transposed else value)
            used.add(part)
        state[name] = out
    left = sorted(set(shapes) - used)
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise CheckpointError(
            f"{tensors.path}: unexpected tensors {', '.join(left[:3])}{more}: this is not the"
            f" architecture {config.family} that it is said to be"
        )
    biases = {name: state.pop(f"{name}.bias", None) for name in integers}
    for name in integers:
        _exchange(model, name, torch.nn.Identity())
    model.load_state_dict(state, strict=True, assign=True)
    for name in list(integers):
        _exchange(model, name, nn.QuantizedLinear(integers.pop(name), biases[name]))
    head = tensors.head_integers() if quantized and model.head is None else None
    if head is not None:
        model.head = nn.QuantizedLinear(head)
    if model.rope is not None:
        model.rope.to_empty(device="cpu")  # fills its tables
    return model.eval()


def _kept(tensors: Tensors, stored: list[str]) -> QuantizedWeight | None:
    """These tensors' rows in the integers that they are; None where they are not, or mixed."""
    parts = [tensors.integers(part) for part in stored]
    first, *_ = parts
    if first is None:
        return None
    form = (first.bits, first.group_size, first.minimum is None)
    found = [p for p in parts if p and (p.bits, p.group_size, p.minimum is None) == form]
    if len(found) < len(parts):
        return None
    minimums = [p.minimum for p in found if p.minimum is not None]
    return first._replace(
        values=torch.cat([p.values for p in found]),
        scale=torch.cat([p.scale for p in found]),
        minimum=torch.cat(minimums) if minimums else None,
    )


def _exchange(model: Decoder, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _quantized(model: Decoder) -> dict[str, nn.QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}


def hf_names(family: Family) -> Callable[[str, Config], tuple[list[str], bool]]:
    """Parameter name -> Hugging Face's names."""

    def names(parameter: str, config: Config) -> tuple[list[str], bool]:
        module, kind = parameter.rsplit(".", 1)
        head, _, rest = module.partition(".")
        layer, _, inner = rest.partition(".")
        key = module if head != "blocks" else f"blocks.{{}}.{inner}"
        if key not in family.weights:
            raise ValueError(
                f"save: {family.model_type} has no {parameter}; merge an adapter before saving"
            )
        stored = [f"{name.format(layer)}.{kind}" for name in family.weights[key]]
        return stored, kind == "weight" and inner in family.transposed

    return names


def read_config(directory: Path) -> Config:
    """The Config of a Hugging Face directory; generation_config.json may name more end tokens."""
    values = read_json(directory / "config.json")
    try:
        config = families.read(values, str(directory / "config.json"))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    generation = directory / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            config.eos_ids = tuple(eos) if isinstance(eos, list) else (eos,)
    return config


class Safetensors:
    """The tensors of a directory's model.safetensors, or of the files its index names."""

    def __init__(self, directory: Path, family: Family, tied: bool, stem: str = FLOATS) -> None:
        self.path = directory
        self._family, self._tied = family, tied
        self._files: dict[str, Any] = {}  # file name -> open file
        self._where: dict[str, str] = {}  # tensor -> file name
        files: Iterable[str]
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if (directory / single).is_file():
            self.path, files = directory / single, [single]
        elif (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{directory / index}: the key 'weight_map' is missing")
            files = sorted(set(weight_map.values()))
        else:
            pickles = sorted(p.name for p in directory.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle: save it as safetensors first" if pickles else ""
            raise CheckpointError(f"{directory}: holds no {single} or {index}{hint}")
        for file in files:
            self._open(directory, file)
        self._bare = not any(name.startswith(family.prefix) for name in self._where)

    def _open(self, directory: Path, file: str) -> None:
        from safetensors import SafetensorError, safe_open

        if Path(file).name != file or not (directory / file).is_file():
            raise CheckpointError(f"{directory / file}: the index names it, but it is not there")
        try:
            opened = safe_open(directory / file, "pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{directory / file}: not a whole safetensors file: {error}"
            ) from error
        self._files[file] = opened
        self._where.update(dict.fromkeys(opened.keys(), file))

    def _stored(self, name: str) -> str:
        prefix = self._family.prefix
        return name.removeprefix(prefix) if self._bare else name

    def _full(self, stored: str) -> str:
        bare = self._bare and not stored.startswith("lm_head.")
        return self._family.prefix + stored if bare else stored

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for stored, file in self._where.items():
            if stored.endswith(self._family.buffers) or (self._tied and stored == "lm_head.weight"):
                continue
            name, _, part = stored.rpartition(".")
            shape = tuple(self._files[file].get_slice(stored).get_shape())
            if part in _PARTS:
                if part != "values" or (self._tied and name == "lm_head.weight"):
                    continue
                signed = self._files[file].get_slice(stored).get_dtype() == "I8"
                stored, shape = name, (shape[0], shape[1] * (1 if signed else 2))
            shapes[self._full(stored)] = shape
        return shapes

    def dtype(self) -> torch.dtype:
        for name in self.shapes():
            if self._stored(name) in self._where:
                return self.read(name).dtype
        return torch.float32

    def integers(self, name: str) -> QuantizedWeight | None:
        stored = self._stored(name)
        if f"{stored}.values" not in self._where:
            return None
        values, scale, minimum = (
            self._read(f"{stored}.{part}") if f"{stored}.{part}" in self._where else None
            for part in _PARTS
        )
        if values is None or scale is None or values.dim() != 2 or scale.dim() != 2:
            raise CheckpointError(f"{self.path}: {name} in integers lacks its values or scale")
        bits = 8 if values.dtype == torch.int8 else 4
        width = values.shape[1] * 8 // bits
        if not scale.shape[1] or width % scale.shape[1] or len(scale) != len(values):
            raise CheckpointError(
                f"{self.path}: {name}: scale {list(scale.shape)} does not fit the integers"
                f" {list(values.shape)}"
            )
        return QuantizedWeight(values, scale, minimum, bits, width // scale.shape[1])

    def head_integers(self) -> QuantizedWeight | None:
        return self.integers("lm_head.weight")

    def read(self, name: str) -> Tensor:
        return self._read(self._stored(name))

    def _read(self, stored: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self._files[self._where[stored]].get_tensor(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: tensor {stored}: {error}") from error


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype, also by name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype like 'bfloat16', got {dtype!r}")
    return found


def exported(model: Decoder, family: Family) -> dict[str, Tensor]:
    """Hugging Face's name -> tensor, contiguous."""
    names = hf_names(family)
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        stored, transposed = names(name, model.config)
        value = parameter.detach()
        rows = model.config.qkv_rows if len(stored) == 3 else value.shape[:1]
        for part, piece in zip(stored, value.split(list(rows)), strict=True):
            out[part] = (piece.T if transposed else piece).contiguous().cpu()
    for name, module in _quantized(model).items():
        stored, _ = names(f"{name}.weight", model.config)
        weight = module.qweight.unpack()
        cut = list(model.config.qkv_rows) if len(stored) == 3 else [weight.shape[0]]
        for part, tensor in zip(_PARTS, weight[:3], strict=True):
            if tensor is not None:
                for base, piece in zip(stored, tensor.split(cut), strict=True):
                    out[f"{base}.{part}"] = piece.contiguous().cpu()
    return out


def _write_weights(
    tensors: dict[str, Tensor], directory: Path, limit: int, stem: str = FLOATS
) -> None:
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / f"{stem}.safetensors", {"format": "pt"})
        return
    index = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(directory / f"{stem}.safetensors.index.json", listed)


def _copy_companions(source: Path | GGUFFile, directory: Path) -> None:
    if not isinstance(source, Path):
        source.write_companions(directory)
        return
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: the checkpoint this model came from is gone and its tokenizer with it;"
            " save with companions=False"
        )
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
