"""Every assignment to somebody else's module at run time, with its reason."""

from rfa_mmdet.checkpoints.safe_loading import install as _install_safe_loading

_install_safe_loading()
