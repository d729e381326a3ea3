"""Derive random numbers from (seed, epoch, rank), so a resumed run repeats them.

MMEngine restores weights, optimizer and schedules, but no random state: after resuming, dropout,
samplers and augmentations draw different numbers than in an uninterrupted run.
"""

import torch
from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed
from numpy.random import SeedSequence

from rfa_mmdet.errors import ConfigError


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Reseed Python, NumPy and torch at the start of every epoch.

    torch seeds the dataloader's workers from the main process: they are restarted in every epoch,
    even with ``persistent_workers=True``, and MMEngine's own seeding, which is the same in every
    epoch, is disabled.

    Raises:
        ConfigError: Training is not by epochs.

    Example:
        >>> custom_hooks = [dict(type="EpochSeedHook")]
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Let torch seed the workers, and give the sampler the seed of the run."""
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise ConfigError(
                f"custom_hooks: EpochSeedHook does not work with {type(runner.train_loop).__name__}"
                "; use an EpochBasedTrainLoop, or remove the hook"
            )
        loader = runner.train_dataloader
        loader.worker_init_fn = None
        # Without a seed in the config, the Runner drew one for the sampler before it restored the
        # checkpoint's. All ranks need the same, also with diff_rank_seed.
        if hasattr(loader.sampler, "seed"):
            seed = torch.tensor(runner.seed)
            broadcast(seed)
            loader.sampler.seed = int(seed)

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed this process, and so the workers that it starts, for the next epoch."""
        runner.train_dataloader._iterator = None  # drops persistent workers
        entropy = (runner.seed, runner.epoch, runner.rank)
        set_random_seed(int(SeedSequence(entropy).generate_state(1)[0]))
