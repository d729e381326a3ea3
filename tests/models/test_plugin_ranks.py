"""Plug-ins that start as the identity on two ranks: gradients match the plain net's."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

RANKS = """
import copy
import os
import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch.nn.parallel import DistributedDataParallel
from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.models import retrofit
from tests.helpers.identity import IDENTITIES, furthest, run
from tests.helpers.norms import randomise_norms
from tests.helpers.zoo import CASES, inputs_of

torch.set_num_threads(1)
dist.init_process_group("gloo")
init_default_scope("mmdet")


# Compare a module with one that has a number of plug-ins, in training.
def compare(plain, net, case, number):
    torch.manual_seed(0)
    plain = randomise_norms(MODELS.build(copy.deepcopy(plain)))
    if isinstance(net, dict):
        net = MODELS.build(net)
    net.init_weights()
    load_state_dict(net, plain.state_dict())
    layers = [m for m in net.modules() if isinstance(m, Plugin)]
    assert len(layers) == number
    assert {type(layer).__name__ for layer in layers} == set(IDENTITIES)
    plain.train()
    net.train()
    inputs = inputs_of(case, seed=dist.get_rank())  # different on each rank
    # All parameters take part in the first step: DDP need not look for those that do not.
    pair = [DistributedDataParallel(m, find_unused_parameters=False) for m in (plain, net)]
    for _ in range(2):
        expected, found = (run(m, inputs) for m in pair)
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
    assert furthest(run(pair[1], inputs), expected, outputs=True) > 1e-4


# Each plug-in at each place.
def everywhere(*places):
    plugins = [(p, dict(cfg, postfix="_" + p)) for p in places for cfg in IDENTITIES.values()]
    return [dict(cfg=cfg, position=p) for p, cfg in plugins]


def behind(cfg, after):
    edits = [dict(after=after, plugin=plugin) for plugin in IDENTITIES.values()]
    return retrofit(copy.deepcopy(cfg), edits)


image = CASES["ResNet"]
for norm_eval in (True, False):
    r18 = dict(type="ResNet", depth=18, base_channels=8, norm_eval=norm_eval)
    plugins = everywhere("after_conv1", "after_conv2")
    compare(r18, dict(r18, type="RFAResNet", plugins=plugins), image, 8 * 2 * 6)
    r50 = dict(image.cfg, norm_eval=norm_eval)
    plugins = everywhere("after_conv1", "after_conv2", "after_conv3")
    compare(r50, dict(r50, type="RFAResNet", plugins=plugins), image, 16 * 3 * 6)
r50 = image.cfg
compare(r50, dict(r50, plugins=everywhere("after_conv3")), image, 16 * 6)
compare(r50, behind(r50, r"layer[34]\\.\\d"), image, 9 * 6)
fpn = CASES["FPN"]
plugins = everywhere("after_lateral", "after_output")
compare(fpn.cfg, dict(fpn.cfg, type="PluginFPN", plugins=plugins), fpn, 3 * 2 * 6)
head = CASES["RetinaHead"]
compare(head.cfg, behind(head.cfg, head.after), head, 6)
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
