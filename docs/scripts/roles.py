"""An extension of griffe: docstrings as this package writes them become Markdown.

Roles such as :func:`~a.b` become links, `Example:` the section that griffe calls `Examples:`, and
a list of arguments that share a description may go over two lines.
"""

import re
from collections.abc import Iterator
from typing import Any

from griffe import Alias, Extension, Module, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"(?m)^Example:$")
SHARED = re.compile(r"(?m)^( +[\w, ]+,)\n +(?=[\w, ]+:)")


class Roles(Extension):
    """Rewrite docstrings before they are rendered."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Rewrite all docstrings of a package."""
        for obj in objects(pkg):
            if obj.is_module:
                obj.exports = None  # what a package imports is shown once, where it is defined
            if obj.docstring:
                text = SHARED.sub(r"\1 ", EXAMPLE.sub("Examples:", obj.docstring.value))
                obj.docstring.value = ROLE.sub(lambda role, obj=obj: link(role, obj, pkg), text)


def objects(parent: Object) -> Iterator[Object]:
    """Yield a package's modules, classes and functions."""
    yield parent
    for member in parent.members.values():
        if not isinstance(member, Alias):
            yield from objects(member)


def link(role: re.Match, obj: Object, pkg: Module) -> str:
    """Return a role as a link, or as code where the reference does not have its target."""
    tilde, path = role.groups()
    name = path.rpartition(".")[2] if tilde else path
    scopes = [obj.path, obj.parent.path if obj.parent else pkg.path, obj.module.path]
    for whole in (path, *(f"{scope}.{path}" for scope in scopes)):
        target = find(pkg, whole)
        if target and target.docstring and "._" not in target.path:
            return f"[`{name}`][{target.path}]"
    return f"`{name}`"


def find(pkg: Module, path: str) -> Object | None:
    """Return the object of a dotted path, if the package has it."""
    if not path.startswith(f"{pkg.path}."):
        return None
    try:
        found = pkg[path.removeprefix(f"{pkg.path}.")]
        return found.final_target if isinstance(found, Alias) else found
    except Exception:  # an import from a package that griffe has not loaded
        return None
