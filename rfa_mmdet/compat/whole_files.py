"""Write MMEngine's checkpoints and other files atomically.

MMEngine's own backend writes directly to the final name: a run killed meanwhile leaves a truncated
file, and destroys the one it overwrites.
"""

import os
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from rfa_mmdet.files import written_whole


class WholeFileBackend(LocalBackend):
    """MMEngine's backend for local files, with :func:`~rfa_mmdet.files.written_whole`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     WholeFileBackend().put_text("whole", f"{folder}/a.txt")
        ...     os.listdir(folder)
        ['a.txt']
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes. Follows symbolic links, as the base class does.

        Args:
            obj (bytes): Data to write.
            filepath (str | Path): File to write; its folder is created.

        Raises:
            UserError: The file cannot be written there.
        """
        with written_whole(os.path.realpath(filepath)) as part:
            super().put(obj, part)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text; see :meth:`put`.

        Args:
            obj (str): Text to write.
            filepath (str | Path): File to write; its folder is created.
            encoding (str): Encoding of the file. Defaults to 'utf-8'.

        Raises:
            UserError: The file cannot be written there.
        """
        with written_whole(os.path.realpath(filepath)) as part:
            super().put_text(obj, part, encoding)


def apply() -> None:
    """Make MMEngine write local files through :class:`WholeFileBackend`.

    It replaces the backend 'local' under the same name, so configs need no ``backend_args``, the
    config that a run dumps still loads in plain MMDetection, every checkpoint hook is covered, and
    paths with a prefix such as s3:// keep their own backends.

    Example:
        >>> apply()
        >>> apply()
    """
    register_backend("local", WholeFileBackend, force=True, prefixes="")
