"""fastlm's attention as an attention function of transformers.

`register()` makes it selectable as `attn_implementation="fastlm"`, with its mask function, without
which transformers would drop padding in silence. A patched model does not need that: its
configuration stays as it is and only the look-up of SDPA inside its attention layers is answered
with `in_place_of_sdpa`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastlm import ops
from fastlm.ops._library import autocasts

# Arguments that travel with the call and say nothing about the product: a sliding window and the
# boundaries of packed sequences are in the mask already, as they are for SDPA.
_HARMLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "output_router_logits",
        "num_items_in_batch",
        "sliding_window",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "softcap",
        "s_aux",
        "position_embeddings",
        "shift_labels",
        "ignore_index",
    }
)


# What decode_attention has a kernel for; its reference would be slower than SDPA.
_DECODED = (torch.float32, torch.bfloat16, torch.float16)


def register() -> None:
    """Registers the name "fastlm" with transformers, for attention and for masks."""
    AttentionInterface.register("fastlm", attention)
    AttentionMaskInterface.register("fastlm", sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the arguments and the results of transformers' attention functions.

    Args:
        module: the attention layer; its `is_causal` decides where the argument is None.
        query: [B, Hq, Tq, D].
        key: [B, Hkv, Tk, D], heads not repeated.
        value: [B, Hkv, Tk, Dv].
        attention_mask: bool or additive, broadcastable to [B, Hq, Tq, Tk]; None for causal.
        dropout: of the attention weights; anything but 0 is left to SDPA.
        scaling: of the scores.
        is_causal: overrides the module's.
        **kwargs: softcap and s_aux (sinks) are honoured; those without a meaning here are
            accepted.

    Returns:
        ([B, Tq, Hq, Dv] contiguous, None)

    Raises:
        TypeError: an argument this attention does not know, with a value.
    """
    unknown = _unknown(kwargs)
    if unknown:
        raise TypeError(f"fastlm attention: unknown arguments {', '.join(unknown)}")
    if dropout:
        if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
            raise ValueError("fastlm attention: no dropout beside softcap or sinks, got both")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    return _attend(module, query, key, value, attention_mask, scaling, is_causal, kwargs), None


def in_place_of_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention`, leaving to SDPA what it does not cover: nothing that ran may stop running."""
    unknown = _unknown(kwargs)
    if dropout or unknown:
        if unknown:
            warnings.warn(
                f"attention of {type(module).__name__} runs in PyTorch: fastlm's does not know "
                f"the arguments {', '.join(unknown)}",
                stacklevel=2,
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    return _attend(module, query, key, value, attention_mask, scaling, is_causal, kwargs), None


def select(function: Callable[..., Any], asked: bool | None = None) -> Callable[..., Any]:
    """fastlm's attention for SDPA and for a model's own; any other (flex has own masks) stays.

    asked: whether the layer is to return its weights, where it does not say so to the function.
    """
    if asked:
        return function
    if function is sdpa_attention_forward:
        return in_place_of_sdpa
    if getattr(function, "__name__", "") == "eager_attention_forward":
        return functools.partial(in_place_of_eager, function)
    return function


def in_place_of_eager(
    eager: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention` for a model's own function, which the trial run of the layer has compared.

    The model's own still runs where the weights are asked for (`output_attentions`), where they
    are dropped out, and for arguments unknown here. Without a mask every key is seen.
    """
    wanted = kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    )
    if wanted or args or (dropout and module.training) or _unknown(kwargs):
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        return eager(module, query, key, value, attention_mask, *args, **options)
    if kwargs.get("s_aux") is None and isinstance(getattr(module, "sinks", None), Tensor):
        kwargs["s_aux"] = module.sinks  # read from the module, not passed on
    return _attend(module, query, key, value, attention_mask, scaling, False, kwargs), None


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's scaled_dot_product_attention, by fastlm's kernels where they compute the same."""
    queries, keys = query.shape[-2], key.shape[-2]
    if (
        dropout_p
        or not (query.dim() == key.dim() == value.dim() == 4)
        or not (len(query) == len(key) == len(value))
        or not (enable_gqa or key.shape[1] in (1, query.shape[1]))
        or (is_causal and (queries != keys or attn_mask is not None))  # aligned at the other end
        or not (query.dtype == key.dtype == value.dtype)
    ):
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        function = nn.functional.scaled_dot_product_attention
        return function(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if attn_mask is None and queries == 1 and query.is_cpu and query.dtype in _DECODED:
        return ops.decode_attention(query, key, value, keys, scale=scale)
    return ops.attention(query, key, value, mask=attn_mask, causal=is_causal, scale=scale)


def _unknown(kwargs: dict[str, Any]) -> list[str]:
    return [n for n, value in kwargs.items() if n not in _HARMLESS and value is not None]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> Tensor:
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if not (query.dtype == key.dtype == value.dtype) and autocasts(query):
        # a norm of queries and keys gave them another dtype than a product the values
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    queries = query.shape[2]
    if mask is not None:
        out = ops.attention(query, key, value, mask=mask, scale=scale, softcap=softcap, sinks=sinks)
    elif queries == 1 and query.is_cpu and query.dtype in _DECODED:  # it sees every key
        out = ops.decode_attention(
            query, key, value, key.shape[2], scale=scale, softcap=softcap, sinks=sinks
        )
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = causal and queries > 1
        if causal and key.shape[2] > queries:
            # No mask although there are more keys: the first pass into a static cache, whose later
            # entries are still empty. The queries stand at its beginning.
            key, value = key[:, :, :queries], value[:, :, :queries]
        out = ops.attention(
            query, key, value, causal=causal, scale=scale, softcap=softcap, sinks=sinks
        )
    return out.transpose(1, 2).contiguous()
