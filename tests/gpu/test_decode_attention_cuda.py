"""decode_attention's CUDA kernels on a GPU: against float64, in graphs, beyond 2^31, same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastlm import ops, reference
from fastlm.testing import check

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or "cuda" not in ops.implementations("decode_attention", "cuda"),
    reason="needs a GPU and fastlm/_cuda.so",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, query heads, key heads, queries, cache size, head size
SHAPES = [
    (4, 32, 8, 1, 4096, 128),
    (2, 12, 2, 4, 777, 80),
    (3, 40, 2, 1, 900, 64),
    (1, 8, 1, 2, 9000, 256),
    (2, 6, 3, 1, 500, 75),
]


def inputs(shape, dtype):
    batch, heads, kv_heads, queries, keys, size = shape
    q = torch.randn(batch, heads, queries, size, dtype=dtype, device="cuda")
    k, v = (torch.randn(batch, kv_heads, keys, size, dtype=dtype, device="cuda") for _ in "kv")
    return q, k, v


def call(*args, **options):
    with ops.use_backend("cuda"):
        return ops.decode_attention(*args, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 100])
def test_matches_float64(dtype, shape, window):
    batch, queries, keys = shape[0], shape[3], shape[4]
    lengths = torch.randint(queries, keys + 1, (batch,), device="cuda")
    position = (lengths[:, None] - queries + torch.arange(queries, device="cuda"))[..., None]
    at = torch.arange(keys, device="cuda")
    seen = (at <= position) & (at > position - (window or keys + 1))
    check(
        lambda *x: call(*x, lengths, window=window),
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=seen[:, None], enable_gqa=True),
        lambda *x: reference.decode_attention(*x, lengths, window=window),
        list(inputs(shape, dtype)),
        gradients=False,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_and_int8_and_options_agree_with_triton(dtype):
    q = inputs((3, 8, 2, 2, 16, 64), dtype)[0]
    pages = [torch.randint(-127, 128, (60, 2, 16, 64), device="cuda").char() for _ in "kv"]
    scales = [torch.rand(60, 2, 16, device="cuda") / 64 for _ in "kv"]
    table = torch.randperm(60, device="cuda").view(3, 20).int()
    options = {
        "block_table": table,
        "k_scale": scales[0],
        "v_scale": scales[1],
        "alibi_slopes": torch.rand(8, device="cuda") / 8,
        "sinks": torch.randn(8, device="cuda"),
        "softcap": 20.0,
        "mask": torch.rand(3, 1, 1, 320, device="cuda") > 0.2,
    }
    lengths = torch.tensor([320, 33, 160], device="cuda")

    def theirs(q):
        with ops.use_backend("triton"):
            return ops.decode_attention(q, *pages, lengths, **options)

    check(
        lambda q: call(q, *pages, lengths, **options),
        theirs,
        lambda q: reference.decode_attention(q, *pages, lengths, **options),
        [q],
        gradients=False,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_alone_and_on_another_stream(dtype):
    q, k, v = inputs((3, 16, 4, 1, 3000, 128), dtype)
    lengths = torch.tensor([3000, 7, 1500], device="cuda", dtype=torch.int32)
    first = call(q, k, v, lengths)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = [call(q, k, v, lengths) for _ in range(5)]
    stream.synchronize()
    assert all(torch.equal(first, other) for other in again)
    for b, length in enumerate(lengths.tolist()):
        assert torch.equal(call(q[b : b + 1], k[b : b + 1], v[b : b + 1], length)[0], first[b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_follows_the_lengths_on_the_device(dtype):
    q, k, v = inputs((2, 8, 2, 1, 2000, 64), dtype)
    lengths = torch.tensor([5, 700], device="cuda")
    call(q, k, v, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(q, k, v, lengths)
    for step in (0, 1, 1290):
        lengths += step
        graph.replay()
        assert torch.equal(captured, call(q, k, v, lengths))


def test_a_cache_beyond_2_to_the_31_elements():
    q = torch.randn(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16)
    cache = torch.zeros(1, 1, 2**25 + 64, 64, device="cuda", dtype=torch.bfloat16)
    cache[:, :, -40:] = torch.randn(40, 64, device="cuda")
    keys = cache.shape[2]
    expected = call(q, cache[:, :, -40:], cache[:, :, -40:], 40)
    torch.testing.assert_close(call(q, cache, cache, keys, window=40), expected)


def test_tensors_of_two_devices_are_refused():
    q, k, v = inputs((1, 2, 1, 1, 20, 64), torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"must be on|another device"):
        ops.decode_attention(q, k.cpu(), v, 20)
    with pytest.raises((ValueError, RuntimeError), match=r"must be on|another device"):
        ops.decode_attention(q, k, v, torch.tensor([20]))
