"""Edits a forward function at its source: the few calls that have a kernel, nothing else.

A replacement forward is never a copy kept in this package, which would go stale with the next
release of transformers: the source of the class's own forward is parsed, the matching expressions
are exchanged, and the result is compiled against the original globals. Line numbers stay those of
the original, so a traceback points into the model's file. Whether the edited function computes the
same is not taken on trust: see `_probe`.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType
from typing import Any

import torch

_ATTENTION, _ROPE, _ADD_NORM = "_fastlm_attention", "_fastlm_rope", "_fastlm_add_norm"
_SDPA, _METHOD = "_fastlm_sdpa", "_fastlm_method"
_PRODUCT, _MATMUL, _RELEASED = "_fastlm_product", "_fastlm_matmul", "_fastlm_released"


class CannotRewrite(Exception):
    """Why a forward has to stay as it is."""


@dataclass(frozen=True)
class Sites:
    """What was found in a forward."""

    attention: int = 0  # look-ups of the attention interface
    rope: tuple[str, ...] = ()  # names of the functions of (q, k, cos, sin) that are called
    add_norm: tuple[str, ...] = ()  # attributes holding norms that follow an addition
    sdpa: int = 0  # direct calls of PyTorch's attention
    methods: tuple[str, ...] = ()  # methods of (query, key, value, attention_mask) that are called
    products: int = 0  # products before a softmax that has others after it
    hides: bool = False  # its attention_mask says what is not seen
    untold: tuple[str, ...] = ()  # children that are called without its output_attentions
    deaf: bool = False  # nobody can tell it that the weights before its products are wanted
    keeps: bool = False  # it sets attributes
    attends: bool = False  # products around a softmax, of whatever form


@dataclass
class Edit:
    """Which sites to exchange, and for what."""

    # (the interface that was looked up, whether weights are asked for) -> what stands for it
    attention: Callable[..., Any] | None = None
    rope: dict[str, Callable[..., Any]] = field(default_factory=dict)
    add_norm: Callable[..., Any] | None = None  # (norm, a, b) -> (norm(a + b), a + b)
    norms: frozenset[str] = frozenset()  # the norms for which add_norm is wanted
    sdpa: Callable[..., Any] | None = None  # with the arguments of PyTorch's
    # (module, its method, output_attentions, arguments of the method) -> what the method returns
    method: Callable[..., Any] | None = None
    # (module, output_attentions, function, its arguments) -> the product, or what stands for it
    product: Callable[..., Any] | None = None
    released: Callable[..., Any] | None = None  # of what is returned, beside product
    told: frozenset[str] = frozenset()  # the children that are to get output_attentions


def plain_forward(cls: type) -> FunctionType:
    """The forward a class defines, without what transformers wraps around it."""
    function: Any = cls.forward  # type: ignore[attr-defined]
    while _wrapper(function):
        function = function.__wrapped__
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise CannotRewrite("its forward is wrapped by a decorator")
    if function.__closure__:
        raise CannotRewrite("its forward closes over variables")
    return function


def _wrapper(function: Any) -> str:
    """Which of transformers' wrappers a function is; "" for any other function."""
    code = getattr(function, "__code__", None)
    if code is None or not hasattr(function, "__wrapped__"):
        return ""
    if code.co_name == "forward_with_checkpointing":
        return "checkpointing"
    renames = code.co_name == "wrapped_func" and {"func", "old_name"} <= set(code.co_freevars)
    return "renaming" if renames else ""


def rewrapped(cls: type, edited: Any, checkpointing: Callable[[Any], Any]) -> Any:
    """An edited forward with the wrappers around the class's own; one of ours for checkpoints."""
    wrappers, function = [], cls.forward  # type: ignore[attr-defined]
    while _wrapper(function):
        wrappers.append(function)
        function = function.__wrapped__
    for outer in reversed(wrappers):
        if _wrapper(outer) == "checkpointing":
            edited = checkpointing(edited)
            continue
        inside = dict(zip(outer.__code__.co_freevars, outer.__closure__, strict=True))
        inside["func"] = CellType(edited)
        closure = tuple(inside.values())
        made = FunctionType(outer.__code__, outer.__globals__, "forward", None, closure)
        made.__wrapped__ = edited  # type: ignore[attr-defined]
        edited = made
    return edited


def find_sites(function: FunctionType) -> Sites:
    """Looks for what could be exchanged in a forward."""
    tree = _parse(function)
    finder = _Editor(function, None, tree)
    finder.visit(tree)
    rope, norms, methods = map(tuple, (finder.rope, finder.add_norm, finder.methods))
    found = finder.attention, rope, norms, finder.sdpa, methods, len(finder.products)
    hides = "masked_fill(attention_mask" in ast.unparse(tree)
    deaf = bool(finder.products) and finder.asks == "None"
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    keeps = any(isinstance(n.ctx, ast.Store) for n in attributes)
    attends = bool(_around_softmax(tree, einsum=True))
    return Sites(*found, hides, tuple(finder.untold), deaf, keeps, attends)


def rewrite(function: FunctionType, edit: Edit) -> FunctionType:
    """The function with the sites exchanged."""
    tree = _parse(function)
    tree = ast.fix_missing_locations(_Editor(function, edit, tree).visit(tree))
    helpers: dict[str, Any] = {_ATTENTION: edit.attention, _ADD_NORM: edit.add_norm}
    helpers |= {_SDPA: edit.sdpa, _METHOD: edit.method}
    helpers |= {_PRODUCT: edit.product, _MATMUL: torch.matmul, _RELEASED: edit.released}
    helpers |= {f"{_ROPE}_{name}": rope for name, rope in edit.rope.items()}
    factory = ast.parse(f"def factory({', '.join(helpers)}):\n    return None")
    body = factory.body[0]
    assert isinstance(body, ast.FunctionDef)
    body.body = [tree, *ast.parse(f"return {tree.name}").body]
    ast.fix_missing_locations(factory)
    code = compile(factory, function.__code__.co_filename, "exec", dont_inherit=True)
    inner = next(c for c in code.co_consts if isinstance(c, CodeType))
    # The helpers arrive through a closure: the original globals are used and stay untouched.
    made = FunctionType(inner, function.__globals__)(*helpers.values())
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    return made


def _parse(function: FunctionType) -> ast.FunctionDef:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise CannotRewrite("the source of its forward is not available") from None
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    if not isinstance(tree, ast.FunctionDef) or any(
        not ast.unparse(d).startswith("deprecate_kwarg(") for d in tree.decorator_list
    ):
        raise CannotRewrite("its forward is decorated")
    tree.decorator_list = []  # `rewrapped` puts it on again
    ast.increment_lineno(tree, first - 1)
    arguments = tree.args
    for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        a.annotation = None  # they would be evaluated again
    for star in (arguments.vararg, arguments.kwarg):
        if star is not None:
            star.annotation = None
    # Taken over from the function itself: the values, not the expressions.
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    if function.__kwdefaults__:
        given = function.__kwdefaults__
        arguments.kw_defaults = [
            ast.Constant(None) if a.arg in given else None for a in arguments.kwonlyargs
        ]
    tree.returns = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("__") != node.attr.endswith(
            "__"
        ):
            raise CannotRewrite("its forward uses private names of the class")
    return tree


class _Editor(ast.NodeTransformer):
    """Counts the sites; exchanges those that an edit names."""

    def __init__(self, function: FunctionType, edit: Edit | None, tree: ast.FunctionDef):
        self.globals = function.__globals__
        self.edit = edit or Edit()
        self.attention = 0
        self.rope: list[str] = []
        self.add_norm: list[str] = []
        self.sdpa = 0
        self.methods: list[str] = []
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        rest = f"{tree.args.kwarg.arg}.get('output_attentions')" if tree.args.kwarg else "None"
        self.asks = "output_attentions" if "output_attentions" in names else rest
        self.products = _around_softmax(tree)
        self.untold: list[str] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if node in self.products:
            return node if self.edit.product is None else self._handed_over(node, _PRODUCT)
        if self._is_untold(node):
            assert isinstance(node.func, ast.Attribute)
            self.untold.append(node.func.attr)
            if node.func.attr in self.edit.told:
                value = ast.copy_location(ast.Name(self.asks, ast.Load()), node)
                node.keywords.append(ast.keyword(self.asks, value))
        if self._is_sdpa(node.func):
            self.sdpa += 1
            if self.edit.sdpa is not None:
                node.func = ast.copy_location(ast.Name(_SDPA, ast.Load()), node.func)
            return node
        if self._is_method(node):
            self.methods.append(ast.unparse(node.func).removeprefix("self."))
            return node if self.edit.method is None else self._handed_over(node, _METHOD)
        if ast.unparse(node.func) == "ALL_ATTENTION_FUNCTIONS.get_interface":
            return self._interface(node)
        if isinstance(node.func, ast.Name) and self._rotates(node.func.id):
            name = node.func.id
            self.rope.append(name)
            if name in self.edit.rope:
                node.func = ast.copy_location(ast.Name(f"{_ROPE}_{name}", ast.Load()), node.func)
        return node

    def _is_untold(self, node: ast.Call) -> bool:
        """self.child(...) without output_attentions, which the forward itself has."""
        func = node.func
        return (
            self.asks == "output_attentions"
            and isinstance(func, ast.Attribute)
            and ast.unparse(func.value) == "self"
            and all(k.arg not in (None, self.asks) for k in node.keywords)
        )

    def _handed_over(self, node: ast.Call, helper: str) -> ast.Call:
        """function(...) as helper(self, whether weights are asked for, function, ...)."""
        extra = ast.parse(f"(self, {ast.unparse(node.func)}, {self.asks})", mode="eval").body
        assert isinstance(extra, ast.Tuple)
        node.args = [*extra.elts, *node.args]
        node.func = ast.copy_location(ast.Name(helper, ast.Load()), node.func)
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if self.edit.product is not None and node.value is not None:
            call = ast.Call(ast.Name(_RELEASED, ast.Load()), [node.value], [])
            node.value = ast.copy_location(call, node.value)
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """a @ b as torch.matmul(a, b)."""
        self.generic_visit(node)
        if node not in self.products or self.edit.product is None:
            return node
        function = ast.Name(_MATMUL, ast.Load())
        call = ast.copy_location(ast.Call(function, [node.left, node.right], []), node)
        return self._handed_over(ast.fix_missing_locations(call), _PRODUCT)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        named = isinstance(node.value, ast.Name) and node.value.id == "ALL_ATTENTION_FUNCTIONS"
        return self._interface(node) if named and isinstance(node.ctx, ast.Load) else node

    def _is_sdpa(self, func: ast.expr) -> bool:
        path = ast.unparse(func).split(".")
        if path[-1] != "scaled_dot_product_attention" or len(path) < 2:
            return False
        found: Any = self.globals.get(path[0])
        for name in path[1:]:
            found = getattr(found, name, None)
        return found is torch.nn.functional.scaled_dot_product_attention

    def _is_method(self, node: ast.Call) -> bool:
        """self.anything(query, key, value, attention_mask), perhaps with output_attentions."""
        func = node.func
        if not (isinstance(func, ast.Attribute) and ast.unparse(func.value) == "self"):
            return False
        names = [ast.unparse(a) for a in node.args]
        wanted = ["query", "key", "value", "attention_mask", "output_attentions"]
        return not node.keywords and names in (wanted, wanted[:-1])

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        return self._eager(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return self._eager(node)

    def _eager(self, node: Any) -> ast.AST:
        """`interface = eager_attention_forward`, which releases before 5.2 look up apart."""
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and node.value.id == "eager_attention_forward":
            node.value = self._interface(node.value)
        return node

    def _interface(self, node: ast.expr) -> ast.expr:
        self.attention += 1
        if self.edit.attention is None:
            return node
        given = [node]
        if self.asks == "output_attentions":  # an argument, which need not be passed on
            given.append(ast.Name(self.asks, ast.Load()))
        call = ast.Call(ast.Name(_ATTENTION, ast.Load()), given, [])
        return ast.copy_location(call, node)

    def _rotates(self, name: str) -> bool:
        function = self.globals.get(name)
        if not callable(function):
            return False
        try:
            parameters = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            return False
        return parameters[:4] == ["q", "k", "cos", "sin"]

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, self._fuse(block))
        return node

    def _fuse(self, block: list[ast.stmt]) -> list[ast.stmt]:
        """Exchanges `x = a + b; r = x; y = self.norm(x)` for `y, r = add_norm(self.norm, a, b)`."""
        out: list[ast.stmt] = []
        i = 0
        while i < len(block):
            match = _add_norm_at(block, i)
            if match is None:
                out.append(block[i])
                i += 1
                continue
            self.add_norm.append(match.norm)
            wanted = self.edit.add_norm is not None and match.norm in self.edit.norms
            out += match.fused() if wanted else block[i : i + match.length]
            i += match.length
        return out


def _around_softmax(tree: ast.AST, einsum: bool = False) -> list[ast.expr]:
    """Products of a forward that come before its softmax, where others come after."""

    def ends(node: ast.expr) -> tuple[int, int]:
        return node.end_lineno or 0, node.end_col_offset or 0

    def before(a: ast.expr, b: ast.expr) -> bool:
        """Whether a is computed first: it is a part of b, or ends before b begins."""
        apart = ends(a) <= (b.lineno, b.col_offset)
        return apart or (a is not b and any(n is a for n in ast.walk(b)))

    known = {"torch.matmul", "torch.bmm"} | ({"torch.einsum"} if einsum else set())
    products: list[ast.expr] = []
    softmax: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if last == "softmax":
                softmax.append(node)
            elif name in known or last == "baddbmm":
                products.append(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            products.append(node)
    if not softmax or not any(all(before(s, p) for s in softmax) for p in products):
        return []
    return [p for p in products if all(before(p, s) for s in softmax)]


@dataclass
class _AddNorm:
    """An addition whose sum goes to a norm, perhaps with an `if` and a copy in between."""

    total: str  # x
    sum: ast.BinOp
    copy: str | None  # r
    output: str  # y
    norm: str
    branch: ast.If | None
    tail: list[ast.stmt]  # the statements after the branch, as they stood
    length: int
    addition: ast.stmt

    def fused(self) -> list[ast.stmt]:
        copy = self.copy or "_fastlm_sum"
        if self.copy is None and self.total != self.output:
            copy = self.total
        a, b = ast.unparse(self.sum.left), ast.unparse(self.sum.right)
        text = f"{self.output}, {copy} = {_ADD_NORM}(self.{self.norm}, {a}, {b})"
        if self.total not in (self.output, copy):
            text += f"\n{self.total} = {copy}"
        made: list[ast.stmt] = ast.parse(text).body
        for statement in made:
            for node in ast.walk(statement):
                ast.copy_location(node, self.addition)
        if self.branch is None:
            return made
        # x = a + b; if c: ...; r = x; y = norm(x)  ->  if c: all of it as it was; else: fused
        branch = ast.If(self.branch.test, [self.addition, *self.branch.body, *self.tail], made)
        return [ast.copy_location(branch, self.branch)]


def _add_norm_at(block: list[ast.stmt], i: int) -> _AddNorm | None:
    first = _assigned(block[i])
    if first is None or not isinstance(first[1], ast.BinOp) or not isinstance(first[1].op, ast.Add):
        return None
    total, addition = first[0], first[1]
    rest, branch, copy = block[i + 1 :], None, None
    if rest and isinstance(rest[0], ast.If) and not rest[0].orelse:
        branch = rest[0]
        read = {n.id for n in ast.walk(branch.test) if isinstance(n, ast.Name)}
        if total in read or not _pure(branch.test):
            return None
        rest = rest[1:]
    tail = rest
    step = _assigned(rest[0]) if rest else None
    if step is not None and isinstance(step[1], ast.Name) and step[1].id == total:
        copy, rest = step[0], rest[1:]
        step = _assigned(rest[0]) if rest else None
    if step is None or (branch is not None and copy is None):
        return None
    output, call = step
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "self"
        and len(call.args) == 1
        and not call.keywords
        and isinstance(call.args[0], ast.Name)
        and call.args[0].id in (total, copy)
    ):
        return None
    length = len(block) - i - len(rest) + 1
    tail = tail[: len(tail) - len(rest) + 1]
    norm = call.func.attr
    return _AddNorm(total, addition, copy, output, norm, branch, tail, length, block[i])


def _assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    """(name, value) of `name = value`."""
    if (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
    ):
        return statement.targets[0].id, statement.value
    return None


def _pure(test: ast.expr) -> bool:
    """Whether a condition only reads names: then it may be evaluated earlier."""
    values = ast.Name | ast.Constant | ast.Load
    operations = ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Is | ast.IsNot | ast.And | ast.Or
    return all(isinstance(node, values | operations | ast.Not) for node in ast.walk(test))
