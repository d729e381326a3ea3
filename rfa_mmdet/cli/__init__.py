"""The tools: parsing, printing and exit codes; one module per tool."""

import ast
import sys
from importlib import import_module
from pathlib import Path

# Packages that only some tools need, by the extra that installs them.
_EXTRAS = {
    "tools": {"jinja2", "matplotlib", "pandas", "rich", "scipy", "tensorboard"},
    "onnx": {"onnx", "onnxruntime"},
}


def find_tools() -> dict[str, str]:
    """Map each tool's name to the first line of its docstring, without importing any."""
    tools = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            tools[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return tools


def run_tool(name: str) -> int | str | None:
    """Run a tool on ``sys.argv[1:]``.

    Args:
        name: A key of :func:`find_tools`.

    Returns:
        The exit status.
    """
    if name != "doctor":  # the doctor must run even where nothing else can be imported
        try:
            import_module("rfa_mmdet").register()
        except ImportError as error:
            if error.__cause__ is None:  # our own bug, not a problem of the environment
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
