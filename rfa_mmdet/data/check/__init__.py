"""Check the data of a config.

``before_run`` checks what a run reads: annotation files (``coco``, ``voc``), image files
(``images``) and classes (``classes``). ``audit`` checks every image and box one by one, and
``contact_sheet`` draws the worst images.
"""

from rfa_mmdet.data.check.before_run import check_data, find_problems
from rfa_mmdet.data.check.find import leaves
from rfa_mmdet.data.check.report import DataError
from rfa_mmdet.data.voc import read_voc
from rfa_mmdet.files import image_damage

__all__ = ["DataError", "check_data", "find_problems", "image_damage", "leaves", "read_voc"]
