"""Checkpoints: Hugging Face directories read and written, GGUF files read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastlm import nn
from fastlm.hf import families
from fastlm.hf.families import Family
from fastlm.models.config import Config
from fastlm.models.decoder import Decoder

if TYPE_CHECKING:
    from fastlm.hf.gguf import GGUFFile

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
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
Path_ = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message names the file and what is wrong with it."""


class Tensors(Protocol):
    """The tensors of a checkpoint, read one at a time."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""

    def dtype(self) -> torch.dtype:
        """What the weights are by default."""

    def read(self, name: str) -> Tensor:
        """One tensor; it may share the file's memory."""


def load(path: Path_, dtype: torch.dtype | str | None = None) -> Decoder:
    """Opens a Hugging Face directory (config.json and safetensors) or a .gguf file.

    Args:
        path: the directory or file.
        dtype: of the weights, as torch.dtype or by name ("bfloat16"); as stored by default, fp32
            for quantised GGUF files.

    Returns:
        The model in evaluation mode, on CPU.

    Raises:
        FileNotFoundError: nothing there.
        CheckpointError: a truncated or foreign file, an unknown architecture, missing, unexpected
            or misshapen tensors.
        ImportError: a GGUF file without the package gguf.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint directory or .gguf file")
    if path.is_file():
        from fastlm.hf.gguf import GGUFFile

        file = GGUFFile(path)
        model = build(file.config(), file, file.names(), dtype)
        model.source = file
        return model
    config = read_config(path)
    family = families.by_model_type(config.family, str(path / "config.json"))
    model = build(config, Safetensors(path, family, config.tied_head), hf_names(family), dtype)
    model.source = path
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

    Raises:
        ValueError: a quantized model.
    """
    if any(isinstance(module, nn.QuantizedLinear) for module in model.modules()):
        raise ValueError("save: a quantized model cannot be saved; save it before `quantize`")
    path = Path(path)
    family = families.of(model.config)
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = families.write(model.config, dtype)

    def fill(directory: Path) -> None:
        _write_weights(exported(model, family), directory, max_shard_bytes)
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
) -> Decoder:
    """A decoder with a checkpoint's tensors.

    Args:
        config: its shape.
        tensors: the checkpoint.
        names: parameter name -> (the checkpoint's names whose rows make it up, whether those are
            stored transposed).
        dtype: of the weights; the checkpoint's own when None.
    """
    wanted = tensors.dtype() if dtype is None else as_dtype(dtype)
    with torch.device("meta"):
        model = Decoder(config)
    shapes = tensors.shapes()
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        stored, transposed = names(name, config)
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
    model.load_state_dict(state, strict=True, assign=True)
    if model.rope is not None:
        model.rope.to_empty(device="cpu")  # fills its tables
    return model.eval()


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

    def __init__(self, directory: Path, family: Family, tied: bool) -> None:
        self.path = directory
        self._family, self._tied = family, tied
        self._files: dict[str, Any] = {}  # file name -> open file
        self._where: dict[str, str] = {}  # tensor -> file name
        files: Iterable[str]
        if (directory / _SINGLE).is_file():
            self.path, files = directory / _SINGLE, [_SINGLE]
        elif (directory / _INDEX).is_file():
            index = read_json(directory / _INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise CheckpointError(f"{directory / _INDEX}: the key 'weight_map' is missing")
            files = sorted(set(index.values()))
        else:
            pickles = sorted(p.name for p in directory.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle: save it as safetensors first" if pickles else ""
            raise CheckpointError(f"{directory}: holds no {_SINGLE} or {_INDEX}{hint}")
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
            shapes[self._full(stored)] = tuple(self._files[file].get_slice(stored).get_shape())
        return shapes

    def dtype(self) -> torch.dtype:
        dtypes = {self.read(name).dtype for name in list(self.shapes())[:1]}
        return dtypes.pop() if dtypes else torch.float32

    def read(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        stored = self._stored(name)
        file = self._where[stored]
        try:
            return self._files[file].get_tensor(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: tensor {name}: {error}") from error


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
    return out


def _write_weights(tensors: dict[str, Tensor], directory: Path, limit: int) -> None:
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
        save_file(shards[0], directory / _SINGLE, {"format": "pt"})
        return
    index = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file, {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the file is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a fresh directory and moves what it wrote to `path`.

    When `fill` raises, `path` is as it was.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: exists and is no directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fill(fresh)
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o777 & ~mask)
        for file in fresh.iterdir():  # safetensors writes for the owner only
            file.chmod(0o666 & ~mask)
        if not path.exists() or not any(path.iterdir()):
            os.replace(fresh, path)
            return
        written = {p.name for p in fresh.iterdir()}
        for name in sorted(written, key=lambda name: (name == "config.json", name)):
            os.replace(fresh / name, path / name)
        # weights of an earlier save under other names would be read in their place
        for old in [*path.glob("model*.safetensors"), path / _INDEX]:
            if old.name not in written:
                old.unlink(missing_ok=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
