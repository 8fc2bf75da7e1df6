"""Triton kernels of the operators, for any GPU that Triton compiles for.

`fastlm.ops` imports a module of this package with the first call that runs there, never before: it
imports Triton. Each module X holds kernels and, under the names of the operators they implement,
the functions that launch them; `examples()` in it lists calls for ahead-of-time compilation
(tools/compile_kernels.py).
"""
