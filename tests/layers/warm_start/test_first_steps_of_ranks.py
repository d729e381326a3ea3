"""The first steps of a warm-started layer with DDP: two processes with different maps."""

import copy
import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv
from tests.helpers.processes import START_METHOD


def maps(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return rank + (1 + rank) * torch.rand(2 + rank, 4, 8, 8, generator=generator)


def train(net: nn.Module, x: torch.Tensor, steps: int) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(net(x))
        outputs[-1].square().mean().backward()
        optimizer.step()
    return outputs


def in_process(rank: int, folder: str, kind: type, sync: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 3, padding=1)
    layer = kind(4, 4, 3)
    layer.load_state_dict(plain.state_dict())
    twin = copy.deepcopy(layer)
    # As MMDetection's: buffers are each rank's own, and no parameter may be left out.
    net = DistributedDataParallel(layer, broadcast_buffers=False, find_unused_parameters=False)
    if sync:  # after DDP, which does not support it on the CPU
        layer.norm = nn.SyncBatchNorm.convert_sync_batchnorm(layer.norm)
    first = train(net, maps(rank), 1)[0]
    taken = {name: buffer.clone() for name, buffer in layer.norm.named_buffers()}
    gradient = layer.conv.weight.grad / twin.constant_attention()[1]
    train(net, maps(rank), 2)
    reference = DistributedDataParallel(plain)
    expected = train(reference, maps(rank), 1)[0]
    found = dict(
        first=first.detach(),
        expected=expected.detach(),
        gradients=(gradient, plain.weight.grad),
        taken=taken,
        parameters=dict(layer.named_parameters()),
        settled=layer.settled,
    )
    torch.save(found, f"{folder}/{rank}.pth")
    os._exit(0)  # gloo's threads may hang or crash at the end of a process


@pytest.mark.parametrize(
    ("kind", "sync"), [(RFAConv, False), (RFCBAMConv, False), (RFCAConv, False), (RFAConv, True)]
)
def test_ranks_use_joint_statistics_and_stay_equal(kind, sync, tmp_path):
    arguments = (str(tmp_path), kind, sync)
    mp.start_processes(in_process, arguments, nprocs=2, start_method=START_METHOD)
    found = [torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1)]
    for one in found:
        assert one["settled"]
        torch.testing.assert_close(one["first"], one["expected"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*one["gradients"], rtol=1e-5, atol=1e-5)
    for part in ("taken", "parameters"):
        first, second = (one[part] for one in found)
        assert all(torch.equal(first[name], second[name]) for name in first)
    layer = kind(4, 4, 3)
    layer.load_state_dict(nn.Conv2d(4, 4, 3).state_dict())
    with torch.no_grad():
        responses = torch.cat([layer.feature(maps(rank)) for rank in (0, 1)])
    mean = responses.mean((0, 2, 3))
    torch.testing.assert_close(found[0]["taken"]["running_mean"], mean)
    var = responses.var((0, 2, 3), correction=0)
    torch.testing.assert_close(found[0]["taken"]["running_var"], var)
