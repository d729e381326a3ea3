"""Keep a resumed run from removing files other than its own."""

import re
from collections.abc import Callable
from functools import wraps
from pathlib import PurePath

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from rfa_mmdet.checkpoints.contents import is_number
from rfa_mmdet.texts import shown


def keep_to_own_files(before_train: Callable) -> Callable:
    """Wrap ``before_train`` of MMEngine's CheckpointHook, which removes files a checkpoint names.

    With the wrapper, the best checkpoint is always a ``best_*`` file in this run's checkpoint
    folder, wherever the previous run saved it; ids of old checkpoints must be integers.

    Args:
        before_train (Callable): The method to wrap.

    Returns:
        Callable: The wrapper, with the same signature.
    """

    @wraps(before_train)
    def wrapped(self: CheckpointHook, runner: Runner) -> None:
        info = runner.message_hub.runtime_info
        ids = info.get("keep_ckpt_ids", [])
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            del info["keep_ckpt_ids"]
            runner.logger.warning(
                "ignoring the checkpoint's keep_ckpt_ids, which is not a list of integers"
            )
        paths = {key: info.pop(key) for key in list(info) if key.startswith("best_ckpt")}
        before_train(self, runner)
        for key, path in paths.items():
            score = key.replace("best_ckpt", "best_score", 1)
            if not is_number(info.get(score, 0.0)):
                del info[score]
                runner.logger.warning(
                    f"ignoring the checkpoint's {shown(score)}, which is not a number"
                )
            name = re.split(r"[/\\]", path)[-1] if isinstance(path, str) else ""
            own = self.file_backend.join_path(self.out_dir, name)
            suffix = PurePath(self.filename_tmpl).suffix
            if not (name.startswith("best_") and name.endswith(suffix)):
                why = f"does not match best_*{suffix}"
            elif not self.file_backend.exists(own):
                why = f"is not in {self.out_dir}"
            else:
                info[key] = own
                indicator = key.removeprefix("best_ckpt_")
                if hasattr(self, "best_ckpt_path"):
                    self.best_ckpt_path = own if key == "best_ckpt" else self.best_ckpt_path
                elif indicator in getattr(self, "best_ckpt_path_dict", {}):
                    self.best_ckpt_path_dict[indicator] = own
                continue
            runner.logger.warning(f"ignoring the previous best checkpoint {shown(path)}: it {why}")

    return wrapped
