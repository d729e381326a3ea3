"""Random numbers that follow from (seed, epoch, rank), so that a resumed run repeats them.

MMEngine restores weights, optimizer and schedules, but no random state: after a resume, dropout,
samplers and augmentations draw other numbers than in the run that was not interrupted.
"""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, set_random_seed
from numpy.random import SeedSequence


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed python, numpy and torch anew at the start of every epoch.

    Workers of the data loader are seeded by torch from the main process: they are started anew in
    every epoch, also with ``persistent_workers=True``, and MMEngine's own seeding of them, the same
    in every epoch, is taken off.

    Example:
        >>> custom_hooks = [dict(type="EpochSeedHook")]
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Runner) -> None:
        """Leave the seeding of workers to torch, and give the sampler the seed of the run."""
        loader = runner.train_dataloader
        loader.worker_init_fn = None
        # Where the config names no seed, the Runner drew one for the sampler before it took over
        # that of the checkpoint.
        randomness = runner.cfg.get("randomness") or {}
        if hasattr(loader.sampler, "seed") and not randomness.get("diff_rank_seed", False):
            loader.sampler.seed = runner.seed

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed this process for the epoch that begins, and the workers that it starts."""
        runner.train_dataloader._iterator = None  # where it keeps workers that persist
        entropy = (runner.seed, runner.epoch, runner.rank)
        set_random_seed(int(SeedSequence(entropy).generate_state(1)[0]))
