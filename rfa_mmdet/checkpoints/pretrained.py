"""Locate the pretrained weights that a config names, and download them before a run.

MMEngine imports the package torchvision to resolve names such as ``torchvision://resnet50``, but
only needs the file's URL, which it ships as well.
"""

import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import mmengine
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.fileio import load
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
    load_from_http,
    load_from_local,
)
from torch.hub import download_url_to_file

from rfa_mmdet.errors import UserError

TORCHVISION = ("torchvision://", "modelzoo://")
SECONDS = 30  # timeout of the server


def torchvision_urls() -> dict[str, str]:
    """Return the URLs of torchvision's weights by name.

    Example:
        >>> torchvision_urls()["resnet50"]
        'https://download.pytorch.org/models/resnet50-0676ba61.pth'
    """
    try:
        return get_torchvision_models()
    except Exception:  # not installed, or built for another torch, which fails in many ways
        return load(os.path.join(mmengine.__path__[0], "hub", "torchvision_0.12.json"))


def _openmmlab_urls() -> dict[str, str]:
    urls = get_external_models()
    renamed = get_deprecated_model_names().items()
    return urls | {old: urls[new] for old, new in renamed if new in urls}


# Prefix -> function that returns URLs by name
_NAMES: dict[str, Callable[[], dict[str, str]]] = {
    **dict.fromkeys(TORCHVISION, torchvision_urls),
    **dict.fromkeys(("open-mmlab://", "openmmlab://"), _openmmlab_urls),
    "mmcls://": get_mmcls_models,
}


def url_of(source: str) -> str | None:
    """Return the URL of a checkpoint, or None if it is not a download.

    Args:
        source (str): A checkpoint as in configs: a name such as 'torchvision://resnet50', a URL or
            a file.

    Raises:
        UserError: The name is unknown.

    Example:
        >>> url_of("torchvision://resnet5")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: 'torchvision://resnet5': no such weights; did you mean ...
    """
    prefix, mark, name = source.partition("://")
    if prefix in ("http", "https"):
        return source
    if prefix + mark not in _NAMES:
        return None
    urls = _NAMES[prefix + mark]()
    if name not in urls:
        near = ", ".join(prefix + mark + one for one in get_close_matches(name, urls, n=3))
        raise UserError(f"{source!r}: no such weights{near and f'; did you mean {near}?'}")
    url = urls[name]
    return url if "://" in url else None


def cached_file(url: str) -> Path:
    """Return the file in torch's cache that a URL is downloaded to."""
    return Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))


def fetch(source: str) -> None:
    """Download a checkpoint unless it is already cached or local.

    Args:
        source (str): A checkpoint, see :func:`url_of`.

    Raises:
        UserError: The file or name does not exist, the download fails, or the hash does not match.
    """
    url = url_of(source)
    if url is None:
        is_local = CheckpointLoader._get_checkpoint_loader(source) is load_from_local
        if is_local and not Path(source).expanduser().is_file():
            raise UserError(f"{source!r}: no such file")
        return  # local, or on a storage that MMEngine reads
    file = cached_file(url)
    # Only torchvision's file names are sure to end in digits of their hash.
    digits = file.stem.rpartition("-")[2] if source.startswith(TORCHVISION) else None
    if file.is_file():
        if digits and not _sha256(file).startswith(digits):
            print(
                f"warning: {source}: {file} is not torchvision's file, whose SHA-256 starts with "
                f"{digits}; using it anyway",
                file=sys.stderr,
            )
        return
    print(f"downloading {url} to {file}", file=sys.stderr)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _patience():
            download_url_to_file(url, str(file), digits, progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # RuntimeError: wrong hash
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{source!r}: {url} cannot be downloaded ({reason}); download it on another machine "
            f"and copy it to {file}, or use a local file"
        ) from error


@contextmanager
def _patience() -> Iterator[None]:
    """Set a timeout for servers that do not answer, e.g. behind a firewall."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_from_torchvision(filename: str, map_location: Any = None) -> Any:
    """Load ``torchvision://NAME`` without the package torchvision, as a loader for MMEngine.

    Args:
        filename (str): A name with a prefix of :data:`TORCHVISION`.
        map_location (Any): As for ``torch.load``.

    Raises:
        UserError: See :func:`fetch`.
    """
    if get_rank() == 0:
        fetch(filename)
    return load_from_http(url_of(filename), map_location)  # the other ranks wait there


def sources(cfg: Config) -> Iterator[tuple[str, str]]:
    """Yield the config key and value of all pretrained weights that training loads.

    Example:
        >>> init = dict(type="Pretrained", checkpoint="torchvision://resnet18")
        >>> list(sources(Config(dict(model=dict(backbone=dict(init_cfg=init))))))
        [('model.backbone.init_cfg.checkpoint', 'torchvision://resnet18')]
    """

    def walk(node: Any, path: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict):
            kind = node.get("type")
            keys = {"pretrained", "teacher_ckpt"}
            if str(getattr(kind, "__name__", kind)).startswith("Pretrained"):
                keys.add("checkpoint")
            for key, value in node.items():
                if key in keys and isinstance(value, str):
                    yield f"{path}.{key}", value
                yield from walk(value, f"{path}.{key}")
        elif isinstance(node, (list, tuple)):
            for i, value in enumerate(node):
                yield from walk(value, f"{path}.{i}")

    yield from walk(cfg.get("model"), "model")


def fetch_all(cfg: Config, training: bool) -> None:
    """Download all weights that a run loads, so problems show before it starts.

    Args:
        cfg (Config): A detector's config.
        training (bool): Whether the run loads the pretrained weights in the model's config; a test
            only loads ``load_from``.

    Raises:
        UserError: See :func:`fetch`; the message names the config key.
    """
    start = [("load_from", cfg.load_from)] if cfg.get("load_from") is not None else []
    for key, source in [*start, *(sources(cfg) if training else ())]:
        try:
            fetch(source)
        except UserError as error:
            parent, _, last = key.rpartition(".")
            scratch = f", or train from scratch by {parent}=None" if last == "checkpoint" else ""
            hint = f" (--cfg-options {key}=FILE{scratch})" if training else ""
            raise UserError(f"{key}={error}{hint}") from error
