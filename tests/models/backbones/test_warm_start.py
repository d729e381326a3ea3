"""ResNets with each convolution, started from a plain one: outputs and gradients."""

import copy
import functools
import os
from contextlib import nullcontext

import pytest
import torch
from mmdet.models.backbones.resnet import ResNet
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.models import RFAResNet
from tests.helpers.norms import randomise_norms
from tests.helpers.processes import START_METHOD
from tests.helpers.registered import CONVS
from tests.helpers.resnet import image

MODES = ("eval", "norm_eval", "batches")


@functools.cache
def plain_net(depth: int, norm_eval: bool) -> ResNet:
    torch.manual_seed(1)
    return randomise_norms(ResNet(depth, base_channels=8, norm_eval=norm_eval)).double()


def both(name: str, depth: int, mode: str, dtype=torch.float64) -> tuple[ResNet, RFAResNet]:
    plain = copy.deepcopy(plain_net(depth, mode == "norm_eval")).to(dtype)
    rfa = dict(type=name)
    net = RFAResNet(depth, rfa=rfa, base_channels=8, norm_eval=mode == "norm_eval").to(dtype)
    net.load_state_dict(plain.state_dict())
    for one in (plain, net):
        one.train(mode != "eval")
    return plain, net


def run(
    net: nn.Module, dtype=torch.float64, context=None, rank: int | None = None
) -> tuple[list[Tensor], dict]:
    forward, x = net, image(4)
    if rank is not None:  # each has other images
        forward, x = DistributedDataParallel(net, broadcast_buffers=False), image(8)[4 * rank :][:4]
    with context or nullcontext():
        out = forward(x.to(dtype))
    torch.manual_seed(2)
    # In one dtype: the same seed gives other numbers in another one.
    upstream = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in out]
    torch.autograd.backward(out, upstream)
    return [y.detach() for y in out], {n: p.grad for n, p in net.named_parameters()}


def shared(net: RFAResNet, gradients: dict, of_plain: dict) -> list[tuple[Tensor, Tensor]]:
    """Yield pairs of gradients; final weights are scaled by their factor."""
    pairs = []
    for name, gradient in of_plain.items():
        layer = net.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, AttentionConv2d):
            found = gradients[f"{name.removesuffix('.weight')}.conv.weight"]
            pairs.append((found / layer.constant_attention()[1], gradient))
        else:
            pairs.append((gradients[name], gradient))
    return pairs


def differences(pairs) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_match_the_plain_net(name, depth, mode):
    plain, net = both(name, depth, mode)
    expected, of_plain = run(plain)
    found, gradients = run(net)
    assert differences(zip(found, expected, strict=True)) <= 1e-5
    assert differences(shared(net, gradients, of_plain)) <= 1e-5
    assert not [n for n, gradient in gradients.items() if gradient is None]


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_match_in_float32(name, mode):
    """A network magnifies rounding errors; compare the plain one with float64 to see how much."""
    plain, net = both(name, 18, mode, torch.float32)
    exact, of_exact = run(both(name, 18, mode)[0])
    expected, of_plain = run(plain, torch.float32)
    found, gradients = run(net, torch.float32)
    rounding = differences(zip(expected, exact, strict=True))
    assert differences(zip(found, exact, strict=True)) <= max(20 * rounding, 1e-5)
    rounding = differences((of_plain[n], of_exact[n]) for n in of_exact)
    assert differences(shared(net, gradients, of_exact)) <= max(20 * rounding, 1e-5)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_match_with_autocast(name, mode):
    plain, net = both(name, 18, mode, torch.float32)
    exact, _ = run(both(name, 18, mode)[0])
    amp = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    expected, _ = run(plain, torch.float32, amp())
    found, gradients = run(net, torch.float32, amp())
    rounding = differences(zip(expected, exact, strict=True))
    assert differences(zip(found, exact, strict=True)) <= 5 * rounding
    assert not [n for n, gradient in gradients.items() if gradient is None]


def errors(pairs) -> Tensor:
    """Return the relative error of each gradient, in norm."""
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs])


def lengths(pairs) -> Tensor:
    """Return by how much each gradient's length along the exact one is wrong, relatively."""
    return torch.stack([((a * b).sum() / b.square().sum() - 1).abs() for a, b in pairs])


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("depth", [18, 50])
def test_gradients_match_with_autocast(name, depth):
    """With norm_eval: statistics of few values magnify rounding until gradients say nothing."""
    plain, net = both(name, depth, "norm_eval", torch.float32)
    _, exact = run(both(name, depth, "norm_eval")[0])
    amp = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    _, rounded = run(plain, torch.float32, amp())
    _, gradients = run(net, torch.float32, amp())
    pairs = shared(net, gradients, exact)
    # The plain net's own rounding, for scale. RFAConv also rounds its average pooling;
    # on other images, its mean error is up to 1.9 times as large.
    rounding = errors((rounded[name], gradient) for name, gradient in exact.items())
    assert errors(pairs).mean() <= 3 * rounding.mean()
    # Rounding errors point anywhere, so they hardly change a gradient's length along the exact one:
    # on eight other images, by 2.5 times the plain net's at most.
    rounding = lengths((rounded[name], gradient) for name, gradient in exact.items())
    assert lengths(pairs).max() <= 5 * rounding.max()


ON_RANKS = [(name, depth, mode) for name in CONVS for depth in (18, 50) for mode in MODES[1:]]


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, depth, mode in ON_RANKS:
        plain, net = both(name, depth, mode)
        expected, of_plain = run(plain, rank=rank)
        outputs, gradients = run(net, rank=rank)
        found[name, depth, mode] = (
            differences(zip(outputs, expected, strict=True)),
            differences(shared(net, gradients, of_plain)),
        )
    torch.save(found, f"{folder}/{rank}.pth")
    os._exit(0)  # gloo's threads may hang or crash at the end of a process


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> list[dict]:
    """Return the largest differences of outputs and gradients, by case, on each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(in_process, (str(folder),), nprocs=2, start_method=START_METHOD)
    return [torch.load(folder / f"{rank}.pth") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_RANKS, ids=str)
def test_two_ranks_match_the_plain_net(case, on_ranks):
    for found in on_ranks:
        outputs, gradients = found[case]
        assert outputs <= 1e-5
        assert gradients <= 1e-5
