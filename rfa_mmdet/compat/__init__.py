"""Every assignment to somebody else's module at run time.

:data:`PATCHES` is the table: what is replaced, why, for which versions. ``import rfa_mmdet``
applies those that every run needs. The environment changes that, patch by patch::

    RFA_MMDET_COMPAT=-whole_files python tools/train.py CONFIG    # without this one
    RFA_MMDET_COMPAT=flop_counts python get_flops.py CONFIG       # with this one as well
"""

import os

from rfa_mmdet.compat.table import PATCHES, VARIABLE, Patch, apply, apply_on_import

__all__ = ["PATCHES", "Patch", "apply"]

apply_on_import(os.environ.get(VARIABLE, ""))
