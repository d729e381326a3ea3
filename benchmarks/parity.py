"""No numbers for an op that computes something else: its outputs and gradients come first."""

import torch
from torch import Tensor, nn

from benchmarks.baselines import Formula
from benchmarks.sizes import InputSize
from tests.helpers.tolerances import KINKS, TOLERANCES

# Of a gradient that is nearly zero, such as of a bias before BN, only rounding is left: it is
# measured by this share of the largest gradient.
LEAST = 1e-2


def make_input(shape: InputSize, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a map of a shape, with zeros as behind a ReLU and a mean that is not zero."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, generator=generator)
    return x.add_(0.5).clamp_(min=0).to(device, dtype)


def inference(module: nn.Module, x: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Return the output as inference computes it, which may be another way."""
    with torch.no_grad(), torch.autocast(x.device.type, dtype=autocast, enabled=bool(autocast)):
        return {"output without a gradient": module.eval()(x)}


def outputs_and_gradients(
    module: nn.Module, x: Tensor, training: bool, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Run a module forward and backward, for one random upstream gradient.

    Args:
        module (nn.Module): Ours or a :class:`~baselines.Formula`.
        x (Tensor): (B, C, H, W).
        training (bool): Mode of the module.
        autocast (torch.dtype | None): Half precision, or None.

    Returns:
        dict[str, Tensor]: 'output', 'gradient of x', and of every parameter by its name.
    """
    x = x.detach().requires_grad_()
    module.train(training)
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        output = module(x)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(output.shape, generator=generator).to(x.device, output.dtype)
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output, [x, *parameters], upstream)
    named = [f"gradient of {name.removeprefix('layer.')}" for name in ("x", *names)]
    return {"output": output.detach(), **dict(zip(named, gradients, strict=True))}


def differences(
    op: str,
    layer: nn.Module,
    shape: InputSize,
    dtype: torch.dtype,
    large: bool = False,
) -> list[str]:
    """Compare a layer with its op's formula, in both modes.

    Errors are shares of the norm of what the formula gives in float64. In lower precision it may
    itself be further from that than the tolerance; then the layer may be half as far again.

    Args:
        op (str): Name of the op.
        layer (nn.Module): Ours, in float32 or float64, on its device.
        shape (InputSize): Of the input.
        dtype (torch.dtype): The layer's precision; half ones by autocast over float32.
        large (bool): Whether the shape is one to be measured: then the gradients of evaluation are
            left out, to save time, and those of training may differ by ``KINKS``.

    Returns:
        list[str]: What differs by more than the tolerance of ``dtype``; empty if nothing does.
    """
    device = next(layer.parameters()).device
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    low = dtype != torch.float64
    x, found = make_input(shape, dtype, device), []
    formula = Formula(op, layer).to(torch.float64)
    for training in (False, True):
        # Inference first: of the batch statistics that training gathers, rounding is left.
        runs = [(formula, x.double(), None), (layer, x, half)]
        runs += [(Formula(op, layer), x, half)] if low else []
        values = [{} if training else inference(*run) for run in runs]
        if training or not large:
            for value, (module, of, autocast) in zip(values, runs, strict=True):
                value |= outputs_and_gradients(module, of, training, autocast)
        expected, ours, theirs = (*values, {})[:3]
        largest = max(
            (float(v.norm()) for k, v in expected.items() if k.startswith("gradient of")),
            default=0.0,
        )
        for key, value in expected.items():
            if not value.any():
                found.append(f"{key}, {shape}: all zero, which would prove nothing")
            is_gradient = key.startswith("gradient of")
            allowed = TOLERANCES[dtype]
            tolerance = allowed.layer_gradient if is_gradient else allowed.output
            least = LEAST * largest if is_gradient else 0.0
            if is_gradient and large:
                tolerance = max(tolerance, KINKS)
            scale = max(float(value.norm()), least, 1e-30)
            error = float((ours[key].double() - value).norm()) / scale
            if low:
                own = float((theirs[key].double() - value).norm()) / scale
                tolerance = max(tolerance, 1.5 * own)
            if not error <= tolerance:  # NaN counts
                mode = "training" if training else "evaluation"
                found.append(f"{key}, {mode}, {shape}: error {error:.1e}, at most {tolerance:.0e}")
    return found
