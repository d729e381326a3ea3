"""Datasets in Pascal VOC format with images of any suffix; MMDetection's only support '.jpg'."""

import logging
import os
import re
from collections import defaultdict
from dataclasses import replace

import cv2
import mmcv
from mmdet.datasets import VOCDataset, XMLDataset
from mmdet.registry import DATASETS
from mmengine.fileio import LocalBackend, get, get_file_backend, list_from_file
from mmengine.logging import print_log

from rfa_mmdet.data.voc import VocBox, VocImage, describe_corrections, read_voc
from rfa_mmdet.errors import DataError
from rfa_mmdet.files import header_size

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".gif", ".jp2"),
}
_OWN_TAKEN = "the one with the XML file's name is used"


class ImageFolders:
    """Finds image files below a folder, listing each subfolder once.

    Args:
        root (str): The folder.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        # Folder -> file names by lower-case name and by lower-case stem.
        self._listed: dict[str, tuple[dict, dict]] = {}
        self._taken: dict[str, str] = {}

    def find(self, img_id: str, filename: str | None) -> tuple[str | None, str | None]:
        """Find an image by its id and by the file name in its annotations.

        Args:
            img_id (str): Path below the root, without suffix.
            filename (str | None): ``<filename>``, with or without folder and suffix.

        Returns:
            tuple[str | None, str | None]: Path below the root if found, and what was corrected.

        Raises:
            DataError: The image is ambiguous, or belongs to another id.
        """
        folder, stem = os.path.split(img_id)
        own = self._pick(folder, stem, by_stem=True)
        named = self._named(folder, filename) if filename else []
        both = [path for path in named if path in own]
        if len(both) == 1 or not own:
            found, note = both or named, None
        elif len(own) == 1:
            # As MMDetection does; <filename> may be outdated.
            found = own
            note = f"<filename> names another image; {_OWN_TAKEN}" if named else None
        else:
            found = [path for path in own if path == f"{img_id}.jpg"] or own
            note = f"several images with the same name and no usable <filename>; {_OWN_TAKEN}"
        if len(found) > 1:
            raise DataError(
                f"{img_id}.xml: <filename> {filename!r} is ambiguous in {self.root!r}: "
                f"{', '.join(sorted(found))}"
            )
        if not found:
            return None, None
        other = self._taken.setdefault(found[0], img_id)
        if other != img_id:
            raise DataError(
                f"{img_id}.xml: <filename> {filename!r} leads to {found[0]!r}, the image of "
                f"{other}.xml"
            )
        return found[0], note

    def _named(self, folder: str, filename: str) -> list[str]:
        path = filename.replace("\\", "/")
        below, name = os.path.split(path)
        by_stem = os.path.splitext(name)[1].lower() not in SUFFIXES
        # Follow only folders below the root: the files were written on other machines.
        inside = below and not re.match(r"/|\w:", path) and ".." not in below.split("/")
        for place in ([below] if inside else []) + [folder]:
            found = self._pick(place, name) or (by_stem and self._pick(place, name, by_stem=True))
            if found:
                return found
        return []

    def _pick(self, folder: str, wanted: str, by_stem: bool = False) -> list[str]:
        """Return the paths with a name or stem; exact matches of the case win."""
        names = self._list(folder)[by_stem].get(wanted.lower(), [])
        exact = [n for n in names if (os.path.splitext(n)[0] if by_stem else n) == wanted]
        return [os.path.join(folder, name) for name in exact or names]

    def _list(self, folder: str) -> tuple[dict, dict]:
        if folder not in self._listed:
            names, stems = defaultdict(list), defaultdict(list)
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:
                    for name in sorted(entry.name for entry in entries if entry.is_file()):
                        names[name.lower()].append(name)
                        stem, suffix = os.path.splitext(name)
                        if suffix.lower() in SUFFIXES:
                            stems[stem.lower()].append(name)
            except (FileNotFoundError, NotADirectoryError):
                pass  # all its images are missing
            except OSError as error:
                raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
            self._listed[folder] = names, stems
        return self._listed[folder]


def decoded_size(path: str, backend_args: dict | None = None) -> tuple[int, int]:
    """Return an image's width and height as MMDetection loads it, with EXIF orientation applied.

    Only decodes the image if its header does not tell the size, or if it is on remote storage.

    Args:
        path (str): The image file.
        backend_args (dict | None): Arguments of MMEngine's file backend. Defaults to None: local.

    Raises:
        DataError: The file is not an image.
        FileNotFoundError: The file does not exist.
    """
    if isinstance(get_file_backend(path, backend_args=backend_args), LocalBackend):
        size = header_size(path)
        if size is not None:
            return size
    content = get(path, backend_args=backend_args)
    try:
        image = mmcv.imfrombytes(content, backend="cv2")
    except cv2.error:
        image = None
    if image is None:
        raise DataError(f"{path}: cannot be decoded, and its XML file has no <size>")
    return image.shape[1], image.shape[0]


def with_size(image: VocImage, backend_args: dict | None = None) -> VocImage:
    """Return an image with its size, from the image file if the XML file has none.

    Raises:
        DataError: The XML file has no size, and the image cannot be decoded.
        FileNotFoundError: The XML file has no size, and the image does not exist.
    """
    return image if image.size else replace(image, size=decoded_size(image.path, backend_args))


def is_outside(box: VocBox, image: VocImage, backend_args: dict | None = None) -> bool:
    """Return whether a box has no area in its image; False if the image is missing."""
    if image.size and not box.is_empty(image.size):
        return False
    try:  # the size in the XML file may be wrong
        return box.is_empty(decoded_size(image.path, backend_args))
    except FileNotFoundError:
        return False


@DATASETS.register_module()
class AnyImageXMLDataset(XMLDataset):
    """MMDetection's XMLDataset, for images of any suffix and for XML files as written by tools.

    The image is the file with the XML file's name and any suffix, or else the one that
    ``<filename>`` names; if several files qualify, ``<filename>`` decides. Unambiguous mistakes are
    corrected and logged in one line (see :func:`~rfa_mmdet.data.voc.read_voc`). Boxes without any
    area in the image are ignored in training, where they would make the loss infinite. On remote
    storage, images are '<id>.jpg', as in MMDetection.

    Takes the arguments of XMLDataset.

    Raises:
        DataError: XML files cannot be read; the message names the files, fields and values.
    """

    _folders: ImageFolders | None = None

    def image_ids(self) -> list[str]:
        """Return the names listed in ``ann_file``, stripped, without empty lines."""
        try:
            lines = list_from_file(self.ann_file, backend_args=self.backend_args)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.ann_file}: is not UTF-8 text: {error}") from error
        # A list may start with a byte order mark, and use Windows separators.
        lines = [line.strip("\ufeff \t\r\n\v\f").replace("\\", "/") for line in lines]
        ids = [line for line in lines if line]
        if ids and all(re.fullmatch(r"\S+\s+(-1|0|1)", line) for line in ids):
            raise DataError(
                f"{self.ann_file}: per-class lists ({ids[0]!r}) have another format; use one name "
                "per line"
            )
        return ids

    def xml_path(self, img_id: str) -> str:
        """Return the path of an image's XML file."""
        return os.path.join(self.sub_data_root, self.ann_subdir, f"{img_id}.xml")

    def read(self, img_id: str) -> VocImage:
        """Read an image's XML file, and find the image.

        Raises:
            DataError: The file cannot be read, or the image is ambiguous.
            FileNotFoundError: The XML file does not exist.
        """
        image = read_voc(self.xml_path(img_id), self._metainfo["classes"], True, self.backend_args)
        found, note = None, None
        root = os.path.join(self.sub_data_root, self.img_subdir)
        if isinstance(get_file_backend(root, backend_args=self.backend_args), LocalBackend):
            if self._folders is None:
                self._folders = ImageFolders(root)
            found, note = self._folders.find(img_id, image.filename)
        return replace(
            image,
            path=os.path.join(root, found or f"{img_id}.jpg"),
            corrected=(*image.corrected, *filter(None, [note])),
        )

    def is_ignored(self, box: VocBox, image: VocImage) -> bool:
        """Return whether training or evaluation ignores a box."""
        if box.difficult or self.test_mode:
            return box.difficult
        if self.bbox_min_size is not None and min(box.sides) < self.bbox_min_size:
            return True
        return box.is_empty() or is_outside(box, image, self.backend_args)

    def load_data_list(self) -> list[dict]:
        """Load the annotations of all images."""
        assert self._metainfo.get("classes") is not None, (
            f"`classes` in `{type(self).__name__}` can not be None."
        )
        self.cat2label = {name: i for i, name in enumerate(self._metainfo["classes"])}
        data_list, problems, corrected = [], [], defaultdict(list)
        ids = self.image_ids()
        for img_id in ids:
            try:
                image = self.read(img_id)
                data_list.append(self._info(img_id, image))
            except (DataError, FileNotFoundError) as error:
                problems.append(str(error))
                continue
            for what in image.corrected:
                corrected[what].append(img_id)
        self._folders = None  # large, and would be copied to every worker
        if problems:
            raise DataError(
                f"{len(problems)} of the {len(ids)} images listed in {self.ann_file} cannot be "
                f"read: {'; '.join(problems[:3])}"
            )
        if corrected:
            print_log(
                f"{self.ann_file}: {describe_corrections(corrected)}", "current", logging.WARNING
            )
        return data_list

    def parse_data_info(self, img_info: dict) -> dict:
        """Read one image's annotations; only ``img_id`` is used."""
        return self._info(img_info["img_id"], self.read(img_info["img_id"]))

    def _info(self, img_id: str, image: VocImage) -> dict:
        image = with_size(image, self.backend_args)  # once for all boxes
        width, height = image.size  # type: ignore[misc]
        instances = [
            dict(
                ignore_flag=int(self.is_ignored(box, image)),
                bbox=[value - 1 for value in box.xyxy],  # VOC's pixels start at 1
                bbox_label=self.cat2label[box.name],
            )
            for box in image.boxes
        ]
        return dict(
            img_path=image.path,
            img_id=img_id,
            xml_path=self.xml_path(img_id),
            height=height,
            width=width,
            instances=instances,
        )


@DATASETS.register_module()
class AnyImageVOCDataset(AnyImageXMLDataset, VOCDataset):
    """MMDetection's VOCDataset with its 20 classes, read like :class:`AnyImageXMLDataset`."""
