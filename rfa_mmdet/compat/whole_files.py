"""Checkpoints, and whatever else MMEngine writes to disk, complete or not at all.

MMEngine's own backend opens a checkpoint under its final name and then writes it: a run that is
killed meanwhile leaves half a file there, and where it overwrites one, not even the one before.
"""

import os
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

from rfa_mmdet.files import written_whole


class WholeFileBackend(LocalBackend):
    """MMEngine's files on the disk, by :func:`~rfa_mmdet.files.written_whole`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     WholeFileBackend().put_text("whole", f"{folder}/a.txt")
        ...     os.listdir(folder)
        ['a.txt']
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes; through a link, as the base class does, to what it leads to.

        Args:
            obj (bytes): Data to be written.
            filepath (str | Path): Its folder is made.

        Raises:
            UserError: The file cannot be written there.
        """
        with written_whole(os.path.realpath(filepath)) as part:
            super().put(obj, part)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text, otherwise as :meth:`put`.

        Args:
            obj (str): Data to be written.
            filepath (str | Path): Its folder is made.
            encoding (str): Of the file.

        Raises:
            UserError: The file cannot be written there.
        """
        with written_whole(os.path.realpath(filepath)) as part:
            super().put_text(obj, part, encoding)


def apply() -> None:
    """Let MMEngine write its local files through :class:`WholeFileBackend`.

    In the place of the backend 'local', and under its name: a config needs no ``backend_args``, so
    the one that a run dumps, which names no class of ours for it, loads in plain MMDetection; every
    checkpoint hook is covered; and paths with a prefix, such as s3://, keep their own backends.

    Example:
        >>> apply()
        >>> apply()
    """
    register_backend("local", WholeFileBackend, force=True, prefixes="")
