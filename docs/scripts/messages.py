"""Messages in the package's sources, with placeholders for the parts that vary."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def messages(file: str) -> list[str]:
    """Return the texts in a file, with … where a value is put in.

    Args:
        file: Below the checkout.

    Returns:
        Those of at least three words, in the file's order.
    """
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    # Parts of a text, and docstrings.
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, (ast.JoinedStr, ast.Expr))
        for part in ast.iter_child_nodes(node)
    }
    texts = [
        " ".join(_text(node).split())
        for node in ast.walk(tree)
        if isinstance(node, (ast.JoinedStr, ast.Constant)) and id(node) not in inner
    ]
    return list(dict.fromkeys(text for text in texts if len(text.split()) > 2))


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.FormattedValue):
        return "'…'" if node.conversion == ord("r") else "…"
    return "".join(map(_text, node.values))


def message(file: str, pattern: str) -> str:
    """Return the one message of a file that a pattern occurs in.

    Raises:
        LookupError: There is none, or more than one.
    """
    found = [text for text in messages(file) if re.search(pattern, text)]
    if len(found) != 1:
        raise LookupError(f"{file}: {pattern!r} is in {len(found)} messages, not in one: {found}")
    return found[0]
