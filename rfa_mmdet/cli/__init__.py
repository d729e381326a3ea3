"""The tools: parsing, printing, exit codes; one module a tool."""

import ast
import sys
from importlib import import_module
from pathlib import Path

# What not every tool needs, by the extra of this package that brings it.
_EXTRAS = {
    "tools": {"jinja2", "matplotlib", "pandas", "rich", "scipy", "tensorboard"},
    "onnx": {"onnx", "onnxruntime"},
}


def find_tools() -> dict[str, str]:
    """Return the first line of each tool's docstring by its name, without importing any."""
    tools = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            tools[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return tools


def run_tool(name: str) -> int | str | None:
    """Run a tool on ``sys.argv[1:]``.

    Args:
        name: Of :func:`find_tools`.

    Returns:
        What the process exits with.
    """
    if name != "doctor":  # which must run where nothing else can be imported
        try:
            import_module("rfa_mmdet").register()
        except ImportError as error:
            if error.__cause__ is None:  # no word about the environment, but a fault of ours
                raise
            print(f"error: {error}", file=sys.stderr)
            return 1
    try:
        return import_module(f"rfa_mmdet.cli.{name}").main()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, names in _EXTRAS.items() if package in names), None)
        if extra is None:
            raise
        fix = f'pip install "rfa_mmdet[{extra}]"'
        print(f"error: {name} needs {package}, which is not installed: {fix}", file=sys.stderr)
        return 1
