"""How a kernel is launched and rewritten: arguments, `and`, `or`, `not`, asserts, and one patch of the language."""

from __future__ import annotations

import ast
import inspect
import itertools
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as stock

from tests.interpreter import memory
from tests.interpreter.numbers import Builder, Handle

LAUNCH_OPTIONS = {
    "num_warps", "num_stages", "num_ctas", "maxnreg", "debug", "enable_fp_fusion", "launch_pdl",
    "launch_cooperative_grid", "waves_per_eu", "matrix_instr_nonkdim", "kpack",
}  # fmt: skip


def and_or(is_and: bool, first: Any, *others: Any) -> Any:
    """`and` and `or` as the compiler treats them: elementwise on tensors, short-circuit on compile-time values."""
    value = first
    for other in others:
        if isinstance(value, tl.tensor):
            right = other()
            if isinstance(right, tl.tensor):
                value = value.logical_and(right) if is_and else value.logical_or(right)
            elif bool(right) != is_and:
                value = right
        elif bool(value) == is_and:
            value = other()
        else:
            return value
    return value


def negation(value: Any) -> Any:
    return value == 0 if isinstance(value, tl.tensor) else not value


class Rewriter(stock.ASTTransformer):
    """Rewrites assignments as the stock interpreter does, and `and`, `or`, `not`."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        node.value = self.visit(node.value)
        return super().visit_Assign(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        first, *others = [self.visit(value) for value in node.values]
        later = [ast.Lambda(args=nothing, body=other) for other in others]
        is_and = ast.Constant(value=isinstance(node.op, ast.And))
        return ast.Call(
            func=ast.Name(id="interpreted_and_or", ctx=ast.Load()), args=[is_and, first, *later], keywords=[]
        )

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        node.operand = self.visit(node.operand)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.Call(func=ast.Name(id="interpreted_not", ctx=ast.Load()), args=[node.operand], keywords=[])


_stock_argument = stock._implicit_cvt


def argument(value: Any) -> Any:
    """A launch's argument as the kernel sees it; a pointer remembers its tensor."""
    if isinstance(value, bool):
        return tl.tensor(Handle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        return tl.tensor(Handle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    made = _stock_argument(value)
    if hasattr(value, "data_ptr"):
        made.handle.span = memory.span_of(value)
        memory.spans_in_use.append(made.handle.span)
    return made


def launch(self: stock.GridExecutor, *args: Any, **kwargs: Any) -> None:
    unknown = set(kwargs) - set(self.arg_names) - LAUNCH_OPTIONS
    if unknown:
        raise KeyError(f"unknown argument or option of a kernel: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in kwargs.items() if name in self.arg_names}
    for hook in self.pre_run_hooks:
        hook(*args, **given)
    values = inspect.getcallargs(self.fn, *args, **given)
    memory.spans_in_use.clear()
    values = {name: value if name in self.constexprs else argument(value) for name, value in values.items()}
    for name, value in values.items():
        if hasattr(getattr(value, "handle", None), "span"):
            value.handle.span.name = name
    grid = self.grid(values) if callable(self.grid) else self.grid
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"a grid has 1 to 3 dimensions, got {grid}")
    grid = tuple(int(size) for size in grid) + (1,) * (3 - len(grid))
    stock.interpreter_builder.set_grid_dim(*grid)
    with np.errstate(all="ignore"):
        for place in itertools.product(*map(range, grid)):
            stock.interpreter_builder.grid_idx = place
            self.fn(**values)


def _mend_asserts() -> None:
    def create_assert(self, condition, message):
        if not np.all(condition.data):
            raise AssertionError(f"tl.device_assert: {message}, in program {self.grid_idx}")

    def overflow_check(self, x, y, op):
        # Signed only: hashes rely on unsigned arithmetic that wraps.
        if x.type.scalar.int_bitwidth >= 64 or not x.type.scalar.is_int_signed():
            return
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[op.__name__](
            x.handle.data, y.handle.data, dtype=np.int64
        )
        limit = 1 << (x.type.scalar.int_bitwidth - 1)
        if exact.size and (exact.max() >= limit or exact.min() < -limit):
            raise AssertionError(f"{x.type.scalar} overflow in {op.__name__}, in program {self.builder.grid_idx}")

    Builder.create_assert = create_assert
    TritonSemantic.binary_op_sanitize_overflow_impl = overflow_check
    stock.interpreter_builder.options = stock.InterpreterOptions(debug=True)  # without it asserts are dropped


def mend() -> None:
    _mend_asserts()
    # The stock interpreter patches the whole language before each launch and in each call of a device function, and
    # restores it afterwards. Nothing else in this process needs the compiled language, so it is patched once.
    stock._patch_lang(type("Everything", (), {"__globals__": {"tl": tl, "core": tl.core}}))
    tl.tensor.__index__ = lambda self: int(self.handle.data.reshape(()))  # int() of a vector raises from numpy 2.4 on
    stock._patch_lang = lambda fn: stock._LangPatchScope()
    stock._implicit_cvt = argument
    stock.interpreted_and_or, stock.interpreted_not = and_or, negation  # rewritten functions see the module's names
    stock.FunctionRewriter.ast_transformer = Rewriter()
    stock.GridExecutor.__call__ = launch
    stock.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
