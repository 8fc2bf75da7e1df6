"""llama.cpp as a peer, where llama-cpp-python is installed: a GGUF file written and decoded."""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.models import Decoder

TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


def version() -> dict[str, str]:
    """What is installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return {"llama_cpp_python": importlib.metadata.version("llama_cpp_python")}
    return {}


def write(model: Decoder, path: Path, kind: str) -> None:
    """Writes a Llama-shaped decoder; matrices as `kind` says, norms in fp32."""
    import gguf
    from gguf.quants import quantize

    c = model.config
    target = gguf.GGMLQuantizationType[TYPES[kind]]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(c.max_positions)
    out.add_embedding_length(c.hidden)
    out.add_block_count(c.layers)
    out.add_feed_forward_length(c.intermediate)
    out.add_head_count(c.heads)
    out.add_head_count_kv(c.kv_heads)
    out.add_layer_norm_rms_eps(c.norm_eps)
    out.add_rope_dimension_count(c.head_dim)
    out.add_vocab_size(c.vocab)
    out.add_string("tokenizer.ggml.model", "no_vocab")

    def add(name: str, tensor: Tensor) -> None:
        values = tensor.detach().float().numpy()
        if tensor.dim() == 1 or kind == "fp32":
            out.add_tensor(f"{name}.weight", values)
        else:
            out.add_tensor(f"{name}.weight", quantize(values, target), raw_dtype=target)

    def pairs(w: Tensor) -> Tensor:
        """Rows in the order of llama.cpp's rotation, which turns neighbours."""
        return w.view(-1, 2, c.head_dim // 2, c.hidden).transpose(1, 2).reshape(w.shape)

    add("token_embd", model.embed.weight)
    add("output_norm", model.norm.weight)
    if model.head is not None:
        add("output", model.head.weight)
    block: Any
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.split(c.qkv_rows)
        layer = {
            **{"attn_q": pairs(q), "attn_k": pairs(k), "attn_v": v},
            "attn_output": block.attention.out.weight,
            "attn_norm": block.attention_norm.weight,
            "ffn_norm": block.mlp_norm.weight,
            "ffn_gate": block.mlp.gate.weight,
            "ffn_up": block.mlp.up.weight,
            "ffn_down": block.mlp.down.weight,
        }
        for name, tensor in layer.items():
            add(f"blk.{i}.{name}", tensor)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Callable[[list[int], int], list[float]]]:
    """(prompt, count) -> the moments at which greedily decoded tokens were there."""
    import llama_cpp as lib

    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, None)
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        raise RuntimeError(f"llama.cpp does not open {path}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = 256
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, settings)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(tokens: list[int]) -> int:
        held = (lib.llama_token * len(tokens))(*tokens)
        batch = lib.llama_batch_get_one(held, len(tokens))
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode")
        logits = lib.llama_get_logits_ith(context, -1)
        array = (lib.ctypes.c_float * vocab).from_address(lib.ctypes.addressof(logits.contents))
        return int(torch.frombuffer(array, dtype=torch.float32).argmax())

    def turn(prompt: list[int], count: int) -> list[float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        at, token = [], decode(prompt)
        at.append(time.perf_counter())
        while len(at) < count:
            token = decode([token])
            at.append(time.perf_counter())
        return at

    try:
        yield turn
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)
