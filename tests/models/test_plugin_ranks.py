"""Plug-ins that start as the identity on two ranks: gradients match the plain net's."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

RANKS = """
import os
import torch
import torch.distributed as dist
from mmdet.models.backbones.resnet import ResNet
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch.nn.parallel import DistributedDataParallel
from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.models import RFAResNet
from tests.helpers.identity import IDENTITIES, furthest, run
from tests.helpers.norms import randomise_norms

torch.set_num_threads(1)
dist.init_process_group("gloo")
init_default_scope("mmdet")
generator = torch.Generator().manual_seed(dist.get_rank())  # each rank has different images
image = (torch.randn(2, 3, 64, 64, generator=generator).requires_grad_(),)
places = ("after_conv1", "after_conv2")
plugins = [dict(cfg=cfg, position=p) for cfg, p in zip(IDENTITIES.values(), 3 * places)]

for norm_eval in (True, False):
    kwargs = dict(depth=18, base_channels=8, norm_eval=norm_eval)
    torch.manual_seed(0)
    plain = randomise_norms(ResNet(**kwargs))
    net = RFAResNet(plugins=plugins, **kwargs)
    net.init_weights()
    load_state_dict(net, plain.state_dict())
    layers = [m for m in net.modules() if isinstance(m, Plugin)]
    assert len(layers) == 8 * 6
    plain.train()
    net.train()
    # All parameters take part in the first step: DDP need not look for those that do not.
    pair = [DistributedDataParallel(m, find_unused_parameters=False) for m in (plain, net)]
    for _ in range(2):
        expected, found = (run(m, image) for m in pair)
        assert furthest(found, expected, outputs=True) <= 1e-6
        assert furthest(found, expected, outputs=False) <= 1e-5
    assert all(layer.is_identity() for layer in layers)
    for layer in layers:
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        assert not layer.is_identity()
        for parameter in layer.parameters():
            both = [torch.empty_like(parameter.data) for _ in range(2)]
            dist.all_gather(both, parameter.data)
            assert both[0].equal(both[1])
    assert furthest(run(pair[1], image), expected, outputs=True) > 1e-4
print("agrees", flush=True)
# Gloo's thread may need the interpreter for the last of its work, and dies where that is gone.
os._exit(0)
"""


@pytest.mark.slow
def test_two_ranks_match_the_model_without_plugins():
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--no-python", sys.executable, "-W", "ignore", "-c", RANKS]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees") == 2
