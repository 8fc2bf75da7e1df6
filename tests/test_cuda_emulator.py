"""The emulator finds what it promises to find: kernels with one fault each."""

from __future__ import annotations

import ctypes
import re
import shutil

import pytest
from cuda_emulator.harness import compile_kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

KERNELS = r"""
#include <cuda_runtime.h>

#include <stdexcept>
#include <string.h>

#include "memory.h"
#include "mma.cuh"
#include "reduce.cuh"

__global__ void block_sum(const float* x, float* y, int fault) {
  __shared__ float all[64];
  const int t = threadIdx.x;
  all[t] = x[t];
  if (fault != 1) __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < 64; ++i) sum += all[i];
  if (fault != 2) __syncthreads();
  all[t] = sum;
  y[t] = all[t];
}

__global__ void warp_turn(const float* x, float* y, int fault) {
  __shared__ float all[64];
  const int t = threadIdx.x, lane = t % 32;
  all[t] = x[t];
  if (fault != 1) __syncwarp();
  y[t] = all[t - lane + (lane + 1) % 32];
  if (fault == 2) all[t] = 0.0f;
  if (fault == 3) y[t] = all[(t + 32) % 64];
  if (fault == 4) all[t] = __shfl_xor_sync(~0u, y[t], 1);
}

__global__ void bounds(const float* x, float* y, int fault) {
  __shared__ float all[65];
  const int t = threadIdx.x;
  all[t] = x[fault == 1 ? t + 1 : t];
  y[fault == 2 ? t - 1 : t] = all[t];
  if (fault == 3 && t == 63) all[t + 2] = 0.0f;
  if (fault == 4) y[t] = all[t - 1];
  if (fault == 5) const_cast<float*>(x)[t] = 1.0f;
  if (fault == 6) reinterpret_cast<float4*>(y)[t / 4 + 1] = {};
  if (fault == 7) y[t] = reinterpret_cast<const float4*>(x + 4)[t / 4].w;
  if (fault == 8) y[t] = reinterpret_cast<const float4*>(x + 1)[t / 8].w;
}

__global__ void meetings(const float* x, float* y, int fault) {
  const int t = threadIdx.x;
  if (fault == 1 && t == 40) return;
  if (fault == 2 && t >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  float v[1] = {x[t]};
  if (fault == 3 && t == 3) return;
  fastlm::sum_over<32>(v, nullptr);
  y[t] = v[0];
}

__global__ void dynamic(const float* x, float* y, int fault) {
  extern __shared__ float4 many[];
  float* all = reinterpret_cast<float*>(many);
  const int t = threadIdx.x;
  all[t + fault] = x[t];
  __syncthreads();
  y[t] = all[63 - t];
}

// 0, or 1 with the error in `said`.
extern "C" int launch(const char* which, int fault, const float* x, float* y, char* said) {
  emulator::allow(x, 64 * sizeof(float), false, "x");
  emulator::allow(y, 64 * sizeof(float), true, "y");
  try {
    if (strcmp(which, "block_sum") == 0) block_sum<<<2, 64, 0, nullptr>>>(x, y, fault);
    if (strcmp(which, "warp_turn") == 0) warp_turn<<<2, 64, 0, nullptr>>>(x, y, fault);
    if (strcmp(which, "bounds") == 0) bounds<<<2, 64, 0, nullptr>>>(x, y, fault);
    if (strcmp(which, "meetings") == 0) meetings<<<2, 64, 0, nullptr>>>(x, y, fault);
    if (strcmp(which, "dynamic") == 0) dynamic<<<2, 64, 256, nullptr>>>(x, y, fault);
  } catch (const std::runtime_error& error) {
    strncpy(said, error.what(), 999);
  }
  emulator::forget_all();
  return said[0] != 0;
}

__global__ void product_kernel(const float* a, const float* b, float* c) {
  const int g = threadIdx.x / 4, col = 2 * (threadIdx.x % 4);
  const auto two = [](const float* p, int step) {
    return fastlm::pack<__half>(p[0], p[step]);
  };
  uint32_t left[4], right[2];
  for (int i = 0; i < 4; ++i) left[i] = two(a + (g + i % 2 * 8) * 16 + col + i / 2 * 8, 1);
  for (int i = 0; i < 2; ++i) right[i] = two(b + (col + i * 8) * 8 + g, 8);
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[(g + i / 2 * 8) * 8 + col + i % 2];
  fastlm::mma_16x8x16<__half>(sum, left, right);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + col + i % 2] = sum[i];
}

extern "C" void product(const float* a, const float* b, float* c) {
  emulator::allow(a, 256 * sizeof(float), false, "a");
  emulator::allow(b, 128 * sizeof(float), false, "b");
  emulator::allow(c, 128 * sizeof(float), true, "c");
  product_kernel<<<1, 32, 0, nullptr>>>(a, b, c);
  emulator::forget_all();
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    source = folder / "faults.cu"
    source.write_text(KERNELS)
    return ctypes.CDLL(str(compile_kernels(source, folder)))


def launch(library, which: str, fault: int) -> tuple[str, list[float]]:
    """What the emulator says of a launch, and y."""
    x, y = ((ctypes.c_float * 256)(*map(float, range(64))) for _ in "xy")  # apart from each other
    said = ctypes.create_string_buffer(1000)
    failed = library.launch(which.encode(), fault, x, y, said)
    assert bool(failed) == bool(said.value)
    return said.value.decode(), list(y[:64])


RACE = (
    r"thread \d+ (reads|writes) 4 bytes at \d+ of shared array 'all', "
    r"which (thread \d+|other threads) (read|wrote) with no barrier between"
)


def test_sound_kernels_pass(library):
    x = [float(i) for i in range(64)]
    warps = [sum(x[:32])] * 32 + [sum(x[32:])] * 32
    turned = [x[t // 32 * 32 + (t + 1) % 32] for t in range(64)]
    for which, y in {
        "block_sum": [sum(x)] * 64,
        "warp_turn": turned,
        "bounds": x,
        "meetings": warps,
        "dynamic": x[::-1],
    }.items():
        assert launch(library, which, 0) == ("", y)


@pytest.mark.parametrize(
    "which, fault, text",
    [
        *(
            (which, fault, RACE)
            for which, n in (("block_sum", 2), ("warp_turn", 4))
            for fault in range(1, n + 1)
        ),
        ("bounds", 1, "thread 63 reads 4 bytes 0 beyond the end of x"),
        ("bounds", 2, "thread 0 writes 4 bytes 4 before the start of y"),
        ("bounds", 3, "thread 63 writes 4 bytes 0 beyond the end of shared array 'all'"),
        ("bounds", 4, "thread 0 reads 4 bytes 4 before the start of shared array 'all'"),
        ("bounds", 5, "thread 0 writes 4 bytes of x, which is an input"),
        ("bounds", 6, "thread 60 writes 16 bytes 0 beyond the end of y"),
        ("bounds", 7, "thread 60 reads 4 bytes 12 beyond the end of x"),
        ("bounds", 8, "thread 0 meets an address that is no multiple of 16"),
        ("meetings", 1, "threads that never come: thread 0 to 39 waits at faults.cpp:"),
        ("meetings", 2, "waits at __syncthreads of faults.cpp:"),
        ("meetings", 3, "threads that never come: thread 0 to 2 waits at reduce.cuh:"),
        ("dynamic", 1, "thread 63 writes 4 bytes 0 beyond the end of shared array 'extern'"),
    ],
)
def test_faults_are_found(library, which, fault, text):
    said, _ = launch(library, which, fault)
    assert said.startswith(f"{which}, block 0: "), said
    assert re.search(text, said), said
    if which != "meetings":  # the line of the access
        head = f"{which}(const float* x, float* y, int fault) {{"
        first = next(n for n, line in enumerate(KERNELS.split("\n"), 1) if line.endswith(head))
        assert first < int(said.rsplit("faults.cpp:", 1)[1]) < first + 12, said


def test_products_of_fragments(library):
    a, b, c = (
        (ctypes.c_float * n)(*(i * step % 13 - 6 for i in range(n)))
        for n, step in ((256, 5), (128, 7), (128, 3))
    )
    before = list(c)
    library.product(a, b, c)
    for row in range(16):
        for col in range(8):
            total = sum(a[16 * row + k] * b[8 * k + col] for k in range(16))
            assert c[8 * row + col] == before[8 * row + col] + total
