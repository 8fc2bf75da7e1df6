"""Cases of a shape that a user names, such as `--op attention --shape 1x16x4x2048x128`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .case import DTYPES, Case


@dataclass(frozen=True)
class Form:
    """How an operator's shape is written, and the cases it stands for."""

    names: str  # the numbers, in order
    make: Callable[..., Case]  # (module, dtype, backward, *numbers)
    backward: bool = True  # whether there is a backward to time


def _plain(module: Any, dtype: str, backward: bool, *numbers: int) -> Case:
    return module.case(dtype, *numbers, backward=backward)


def _forward(module: Any, dtype: str, backward: bool, *numbers: int) -> Case:
    return module.case(dtype, *numbers)


def _activation(module: Any, dtype: str, backward: bool, *numbers: int) -> Case:
    return module.case(dtype, "silu", *numbers, gated=True, backward=backward)


def _attention(
    module: Any, dtype: str, backward: bool, batch: int, heads: int, kv: int, tokens: int, head: int
) -> Case:
    return module.case(dtype, batch, heads, tokens, head, kv_heads=kv, backward=backward)


def _quantized(module: Any, dtype: str, backward: bool, *numbers: int) -> Case:
    return module.case(dtype, 8, *numbers)


def _sample(module: Any, dtype: str, backward: bool, *numbers: int) -> Case:
    return module.case(dtype, *numbers, 50, 0.9)


FORMS = {
    "rms_norm": Form("ROWSxWIDTH", _plain),
    "layer_norm": Form("ROWSxWIDTH", _plain),
    "rope": Form("BATCHxTOKENSxHEADSxKV_HEADSxHEAD_DIM", _plain),
    "rope_append": Form("BATCHxTOKENSxHEADSxKV_HEADSxHEAD_DIMxKEYS", _forward, False),
    "activation": Form("ROWSxWIDTH", _activation),
    "attention": Form("BATCHxHEADSxKV_HEADSxTOKENSxHEAD_DIM", _attention),
    "decode_attention": Form("BATCHxHEADSxKV_HEADSxKEYSxHEAD_DIM", _forward, False),
    "linear": Form("ROWSxINxOUT", _plain),
    "feed_forward": Form("ROWSxHIDDENxINTERMEDIATE", _plain),
    "cross_entropy": Form("ROWSxCLASSES", _plain),
    "linear_cross_entropy": Form("ROWSxHIDDENxCLASSES", _plain),
    "quantized_linear": Form("ROWSxINxOUT", _quantized, False),
    "sample": Form("ROWSxCLASSES", _sample, False),
}


def cases(op: str, shape: str) -> list[Case]:
    """Forward, and forward and backward where there is one, in every dtype.

    Raises:
        ValueError: a shape that is not of the operator's form; the message shows it.
    """
    form = FORMS[op]
    numbers = [int(n) for n in re.findall(r"\d+", shape)]
    wanted = form.names.count("x") + 1
    if not re.fullmatch(r"\d+(x\d+)*", shape) or len(numbers) != wanted or 0 in numbers:
        raise ValueError(f"{op}: shape must be {form.names}, whole numbers from 1, got {shape!r}")
    module = importlib.import_module(f"{__package__}.ops.test_{op}")
    passes = (False, True) if form.backward else (False,)
    return [form.make(module, dtype, back, *numbers) for back in passes for dtype in DTYPES]
