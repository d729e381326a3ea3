"""All runtime patches of other packages.

:data:`PATCHES` lists what is replaced, why, and for which versions. ``import rfa_mmdet`` applies
the patches that every run needs. An environment variable turns single patches off or on::

    RFA_MMDET_COMPAT=-whole_files python tools/train.py CONFIG    # off
    RFA_MMDET_COMPAT=flop_counts python get_flops.py CONFIG       # on
"""

import os

from rfa_mmdet.compat.table import PATCHES, VARIABLE, Patch, apply, apply_on_import

__all__ = ["PATCHES", "Patch", "apply"]

apply_on_import(os.environ.get(VARIABLE, ""))
