"""A hook of MkDocs: a notebook becomes a page, with the outputs that it was saved with."""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

LINK = re.compile(r"(?<=\]\()([^)\s:]+)\.ipynb(?=[)#])")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files, config):
    """Put a page in the place of each notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            text = page(json.loads(Path(file.abs_src_path).read_text(encoding="utf-8")))
            name = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, **_):
    """Link to the pages."""
    return LINK.sub(r"\1.md", markdown)


def page(notebook: dict) -> str:
    """Return a notebook as Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(fenced(source, "python"))
        parts += [part for output in cell["outputs"] if (part := shown(output))]
    return "\n\n".join(parts) + "\n"


def shown(output: dict) -> str:
    """Return one output: a picture, Markdown, or text."""
    data = output.get("data", {})
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            encoded = "".join(data[kind]).replace("\n", "")
            width = output.get("metadata", {}).get(kind, {}).get("width", 900)
            return f'<img alt="output" width="{width}" src="data:{kind};base64,{encoded}">'
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    text = "".join(output.get("text", data.get("text/plain", "")))
    return fenced(ANSI.sub("", text).strip(), "text")


def fenced(text: str, language: str) -> str:
    """Return a code block."""
    return f"```{language}\n{text}\n```"
