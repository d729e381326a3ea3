"""Unroll loops over the positions of a window before Triton compiles a kernel.

Kernels hold the K values of a window, and K * K coefficients, in registers. Triton has no arrays of
tensors (tuples only since 3.4; torch 2.1 ships 2.1), so kernels are written with loops and arrays,
and expanded to source with one variable per value:

    for j in unroll(KW):                     row_0 = tap_3
        row[j] = tap[KW + j]       ->        row_1 = tap_4
                                             row_2 = tap_5

``include`` inserts fragments that several kernels share; they use the kernel's variables.
"""

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from typing import Any


def unroll(count: int) -> range:
    """Mark a loop to unroll, in the source of a kernel."""
    raise TypeError("unroll() is only for the source of kernels; see unrolled()")


def include(part: Callable[[], None], **constants: int) -> None:
    """Insert the statements of a fragment into the source of a kernel.

    Args:
        part (Callable): A function without arguments, in the same module.
        constants (int): Values of names in its source.
    """
    raise TypeError("include() is only for the source of kernels; see unrolled()")


def unrolled(function: Callable[..., Any], **constants: float) -> Callable[..., Any]:
    """Unroll a function.

    Loops over ``unroll(n)`` become n copies of their body. Elements of lists become variables if
    the index is then a number. Constants replace their names.

    Args:
        function (Callable): A function whose source is available.
        constants (float): Values of names in its source.

    Returns:
        Callable: The function, with source and with the same name and globals.

    Example:
        >>> def total(values):
        ...     power = []
        ...     for i in unroll(N):
        ...         power[i] = values ** i
        ...     found = 0
        ...     for i in unroll(N):
        ...         found += power[i]
        ...     return found
        >>> unrolled(total, N=3)(5)
        31
    """
    tree = _parsed(function)
    tree.body = _Unroll(constants, function.__globals__).block(tree.body)
    text = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    settings = ", ".join(f"{name}={value}" for name, value in constants.items())
    name = f"<{function.__name__} for {settings}>"
    # inspect, and thus Triton, finds the source here.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    found: dict[str, Any] = {}
    exec(compile(text, name, "exec"), function.__globals__, found)
    made: Callable[..., Any] = found[function.__name__]
    made.__module__ = function.__module__
    return made


def _parsed(function: Callable[..., Any]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    return tree


class _Unroll(ast.NodeTransformer):
    """Unrolls statements, given the values of names."""

    def __init__(self, constants: dict[str, float], parts: dict[str, Any]) -> None:
        self.constants, self.parts = constants, parts

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in statements:
            made = self.visit(ast.parse(ast.unparse(statement)).body[0])  # a deep copy
            found += made if isinstance(made, list) else [made] if made else []
        return found

    def visit_For(self, node: ast.For) -> Any:
        call = node.iter
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "unroll"):
            node.iter = self.visit(node.iter)
            node.body = self.block(node.body)
            return node
        (count,), name = (self.visit(a) for a in call.args), ast.unparse(node.target)
        number = _number(count)
        if number is None:
            raise ValueError(f"line {node.lineno}: unroll({ast.unparse(count)}): must be a number")
        found = []
        for value in range(number):
            found += _Unroll({**self.constants, name: value}, self.parts).block(node.body)
        return found

    def visit_Expr(self, node: ast.Expr) -> Any:
        call = node.value
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "include"):
            return self.generic_visit(node)
        constants = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        part = _parsed(self.parts[ast.unparse(call.args[0])])
        return _Unroll({**self.constants, **constants}, self.parts).block(part.body[1:])

    def visit_If(self, node: ast.If) -> Any:
        node.test = self.visit(node.test)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        number = _number(node.test)
        if number is None:
            return node
        return node.body if number else node.orelse

    def visit_Assign(self, node: ast.Assign) -> Any:
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if all(isinstance(value, ast.List) and not value.elts for value in values):
            return None  # declares arrays
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> Any:
        if node.id in self.constants:
            return ast.Constant(self.constants[node.id])
        return node

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        self.generic_visit(node)
        number = _number(node.slice)
        if number is None or not isinstance(node.value, ast.Name):
            return node
        return ast.Name(f"{node.value.id}_{number}", node.ctx)


def _number(node: ast.expr) -> int | None:
    """Return the value of a constant integer expression; None for others."""
    for part in ast.walk(node):
        if isinstance(part, (ast.Slice, ast.Tuple)):
            return None
        if isinstance(part, ast.Name) and part.id not in ("min", "max"):
            return None
        if isinstance(part, ast.Constant) and not isinstance(part.value, int):
            return None
    value = eval(compile(ast.Expression(ast.fix_missing_locations(node)), "<number>", "eval"))
    return int(value)
