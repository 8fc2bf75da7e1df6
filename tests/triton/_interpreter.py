"""What the interpreter of Triton does unlike a GPU, or slowly, done otherwise.

Its time goes into objects for types and shapes, not into arithmetic: the same few are kept here.
"""

from __future__ import annotations

import numpy as np


def prepare() -> None:
    """Changes Triton's interpreter in this process; once."""
    _round_as_gpus_do()
    _multiply_exactly()
    _patch_once()
    _keep_types()
    _match_at_once()
    _watch_overflow()


def _round_as_gpus_do() -> None:
    """The interpreter cuts fp32 off to bf16; the hardware rounds to the nearest, ties to even."""
    import triton.language as tl
    from triton.runtime import interpreter

    others = interpreter._convert_float

    def convert(values, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            nan = (bits & 0x7FFFFFFF) > 0x7F800000
            return np.where(nan, 0x7FC0, nearest).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return values.view(np.uint16).astype(np.uint32) << 16
        return others(values, source, target, rounding)

    interpreter._convert_float = convert


def _multiply_exactly() -> None:
    """The interpreter multiplies the bits of bf16 as integers; tensor cores widen to fp32.

    And it leaves the order of a product's sum to NumPy's library, whose kernels differ from
    processor to processor and between a product and its transpose. On a GPU both have one order:
    scores of 10,000 come out alike in the forward and the backward pass, where their last digit is
    a percent of a weight. Here a product's own sum is exact, and rounded once.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    others = interpreter.InterpreterBuilder.create_dot
    wide = {tl.float32, tl.float16, tl.bfloat16}

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x.data.astype(np.float64)
        bits = x.data.view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)

    def create_dot(self, a, b, d, *rest):
        if not {a.dtype.scalar, b.dtype.scalar} <= wide or d.data.dtype != np.float32:
            return others(self, a, b, d, *rest)
        with np.errstate(over="ignore"):  # to infinity, as in fp32
            sums = np.matmul(widened(a), widened(b)).astype(np.float32)
        return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_once() -> None:
    """The interpreter replaces the language's functions anew in every call within a kernel."""
    import types

    import triton.language as tl
    from triton.runtime import interpreter

    patch, modules = (
        interpreter._patch_lang,
        types.SimpleNamespace(__globals__={"a": tl, "b": tl.core}),
    )
    running = False

    def patch_lang(function):
        nonlocal running
        scope = interpreter._LangPatchScope()
        if not running:
            running, scope = True, patch(modules)
            restore = scope.restore

            def stop():
                nonlocal running
                running = False
                restore()

            scope.restore = stop
        return scope

    interpreter._patch_lang = patch_lang


def _keep_types() -> None:
    """Every operation makes types, shapes and dtypes anew: a few hundred, millions of times."""
    import triton.language as tl
    from triton.runtime import interpreter

    core = tl.core
    make_block, make_tensor, to_numpy = (
        core.block_type.__init__,
        core.tensor.__init__,
        interpreter._get_np_dtype,
    )
    blocks: dict = {}
    forms: dict = {}
    dtypes: dict = {}

    def block_type(self, element_ty, shape):
        sizes = tuple([s.value if type(s) is core.constexpr else s for s in shape])
        key = id(element_ty), sizes  # what is kept holds the element type, so the id stays its own
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            if not element_ty.is_ptr():  # which are made anew for every argument
                blocks[key] = dict(self.__dict__)
        else:
            self.__dict__.update(known)

    def tensor(self, handle, type):
        sizes = tuple(type.shape.values) if type.is_block() else ()
        known = forms.get(sizes)
        if known is None:
            make_tensor(self, handle, type)
            forms[sizes] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known

    def get_np_dtype(type):
        scalar = type.scalar
        name = "pointer" if scalar.is_ptr() else scalar.name
        if name not in dtypes:
            dtypes[name] = to_numpy(type)
        return dtypes[name]

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = get_np_dtype


def _match_at_once() -> None:
    """Two operands of one type, or a tensor and a number of its kind, need no rules of promotion.

    Whatever else there may be goes Triton's way.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import TensorHandle

    tensor = tl.core.tensor
    match, broadcast = (
        TritonSemantic.binary_op_type_checking_impl,
        TritonSemantic.broadcast_impl_value,
    )
    plain = {id(tl.float32), id(tl.int32), id(tl.int64)}  # pointers have no hash
    constants: dict = {}

    def constant(self, value, dtype):
        key = type(value), value, dtype.name
        found = constants.get(key)
        if found is None:
            found = constants[key] = self.scalar_constant(value, dtype)
        return found

    def fits(value, dtype):
        if dtype is tl.float32:
            return type(value) in (int, float) and value == value
        return type(value) is int and -(2**31) <= value < 2**31

    def binary_op_type_checking_impl(self, lhs, rhs, *rules, **more):
        left, right = type(lhs) is tensor, type(rhs) is tensor
        if left and right:
            if lhs.dtype is rhs.dtype and id(lhs.dtype) in plain:
                return self.broadcast_impl_value(lhs, rhs)
        elif left and id(lhs.dtype) in plain and fits(rhs, lhs.dtype):
            return self.broadcast_impl_value(lhs, constant(self, rhs, lhs.dtype))
        elif right and id(rhs.dtype) in plain and fits(lhs, rhs.dtype):
            return self.broadcast_impl_value(constant(self, lhs, rhs.dtype), rhs)
        return match(self, lhs, rhs, *rules, **more)

    def spread(x, like):
        """A scalar as a block: its one element again and again."""
        type = like.with_element_ty(x.type.scalar)
        data, sizes = x.handle.data, like.shape.values
        data = np.ndarray(sizes, data.dtype, data, 0, (0,) * len(sizes))
        return tensor(TensorHandle(data, x.handle.dtype), type)

    def broadcast_impl_value(self, lhs, rhs):
        a, b = lhs.type, rhs.type
        if a.is_block():
            if not b.is_block():
                return lhs, spread(rhs, a)
            if a.shape.values == b.shape.values:
                return lhs, rhs
        elif b.is_block():
            return spread(lhs, b), rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl
    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _watch_overflow() -> None:
    """Sums and products of integers are checked in NumPy, not in a dozen operations of Triton."""
    from triton.language.semantic import TritonSemantic

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, lhs, rhs, operation):
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        x, y = (side.handle.data.astype(np.int64) for side in (lhs, rhs))
        found = exact[operation.__name__](x, y)
        inside = (found >= kind.get_int_min_value()) & (found <= kind.get_int_max_value())
        assert inside.all(), f"{kind} overflow in {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check
