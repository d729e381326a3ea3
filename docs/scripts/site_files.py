"""A hook of MkDocs: what the pages link to outside docs/ becomes part of the site.

The links are those that also work in the repository, such as ../benchmarks/table.md; the site has
to open from disk without one.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")


def on_page_markdown(markdown, page, config, files):
    """Copy the files of the repository that a page links to, and link to the copies."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def copied(match):
        source = Path(os.path.normpath(folder / match[1]))
        outside = source.is_file() and not source.is_relative_to(config.docs_dir)
        if not outside or not source.is_relative_to(ROOT):
            return match[0]
        # As plain text, which browsers show, where they would offer to save the file.
        suffix = "" if source.suffix in (".json", ".txt") else ".txt"
        target = f"files/{source.relative_to(ROOT).as_posix()}{suffix}"
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(source)))
        return os.path.relpath(target, os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(copied, markdown)
