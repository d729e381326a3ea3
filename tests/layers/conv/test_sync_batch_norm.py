"""SyncBatchNorm in the features: two ranks match one rank with the joint batch."""

import os
import subprocess
import sys

import pytest

from tests.helpers.backends import copy_without_kernels, require
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE

START = """
import copy, os, sys
{setup}
if WITHOUT_KERNELS and os.environ["RANK"] == "1":
    sys.path.insert(0, WITHOUT_KERNELS)
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from rfa_mmdet import layers
from rfa_mmdet.ops.receptive_field.backends import missing

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
assert bool(missing("cpu")) == bool(WITHOUT_KERNELS and rank)
"""

SAME = """
whole = torch.randn(sum(SIZES), 6, 9, 11, generator=torch.Generator().manual_seed(1)) + 2
upstream = torch.randn(sum(SIZES), 5, 9, 11, generator=torch.Generator().manual_seed(2))
start = sum(SIZES[:rank])
mine = slice(start, start + SIZES[rank])

torch.manual_seed(0)
joined = getattr(layers, KIND)(6, 5, 3, backend="reference").double()
joined.norm.weight.data.uniform_(0.5, 1.5)
layer = copy.deepcopy(joined).float()
layer.backend = BACKEND
model = DistributedDataParallel(layer, static_graph=STATIC) if PARALLEL else layer
# After DDP, because it rejects torch's SyncBatchNorm on the CPU; parameters stay the same.
sync = nn.SyncBatchNorm.convert_sync_batchnorm(layer.norm)
assert sync.weight is layer.norm.weight
layer.norm = sync

for step in range(2):
    x = whole.double().clone().requires_grad_()
    y = joined(x)
    expected = torch.autograd.grad(y, [x, *joined.parameters()], upstream.double())
    given = whole[mine].clone().requires_grad_()
    out = model(given)
    layer.zero_grad()
    # DDP averages over ranks.
    out.backward(upstream[mine] * (2 if PARALLEL else 1))
    gradients = [p.grad for p in layer.parameters()]
    if not PARALLEL:
        for gradient in gradients:
            dist.all_reduce(gradient)
    close = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4)
    close(out.detach(), y.detach()[mine])
    close(given.grad / (2 if PARALLEL else 1), expected[0][mine])
    for (name, _), a, b in zip(layer.named_parameters(), gradients, expected[1:], strict=True):
        close(a, b)
    close(layer.norm.running_mean, joined.norm.running_mean)
    close(layer.norm.running_var, joined.norm.running_var)
"""

# Errors of ranks that cannot do the same. torch's own SyncBatchNorm, which the formula calls, does
# not support CPU tensors: its error shows that the formula ran.
DIFFERENT = """
def attempt(layer):
    try:
        layer(torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0)))
        return "kernels"
    except (RuntimeError, ValueError) as error:
        return str(error)


def make(backend="auto"):
    layer = layers.RFAConv(4, 6, 3, backend=backend)
    layer.norm = nn.SyncBatchNorm.convert_sync_batchnorm(layer.norm)
    return layer


FORMULA = "SyncBatchNorm expected input tensor to be on GPU"

layer = make()
if rank == 1:
    layer.norm.register_forward_hook(lambda *args: None)
for _ in range(2):
    assert FORMULA in attempt(layer)

layer = make("auto" if rank else "reference")
assert FORMULA in attempt(layer)

layer = make("reference" if rank else "cpu")
said = attempt(layer)
assert "ranks [1] of its group must use the formula" in said, said
assert "ranks [0] force kernels" in said

# Nobody can be asked again: the other ranks do not know.
layer = make()
assert attempt(layer) == "kernels"
if rank == 0:
    layer.norm.register_forward_hook(lambda *args: None)
    assert "this rank must now use the formula" in attempt(layer)

# Another group decides separately.
layer = make()
assert attempt(layer) == "kernels"
layer.norm.process_group = dist.new_group([0, 1])
layer.backend = "auto" if rank else "reference"
assert FORMULA in attempt(layer)
"""

END = """
print("agrees", flush=True)
# Gloo's thread may need the interpreter for the last of its work, and dies where that is gone.
os._exit(0)
"""


def run_ranks(body: str, without_kernels: str = "", **settings) -> None:
    require("cpu")
    settings["without_kernels"] = without_kernels
    setup = "\n".join(f"{name.upper()} = {value!r}" for name, value in settings.items())
    code = START.format(setup=setup) + body + END
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--no-python", sys.executable, "-W", "ignore", "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("agrees") == 2


# torch's own SyncBatchNorm does not support CPU tensors, so compare with the joint batch.
@pytest.mark.parametrize(
    ("kind", "sizes", "parallel", "static"),
    [
        pytest.param("RFAConv", (3, 1), False, False, marks=pytest.mark.slow),
        pytest.param("RFAConv", (2, 2), True, False, marks=pytest.mark.slow),
        pytest.param("RFAConv", (1, 2), True, True, marks=pytest.mark.slow),
        pytest.param("RFAConv", (2, 0), False, False, marks=pytest.mark.slow),
        pytest.param("RFCBAMConv", (3, 1), False, False, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_agree_with_the_joined_batch(kind, sizes, parallel, static):
    run_ranks(SAME, kind=kind, sizes=sizes, parallel=parallel, static=static, backend="auto")


def test_rank_without_kernels_agrees_with_one_with_kernels(tmp_path):
    copy_without_kernels(tmp_path)
    settings = dict(kind="RFAConv", sizes=(3, 1), parallel=False, static=False, backend="auto")
    run_ranks(SAME, str(tmp_path), **settings)


def test_ranks_use_the_formula_together_or_raise():
    run_ranks(DIFFERENT)
