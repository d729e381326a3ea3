"""Compare outputs and gradients of an op with its formula; only ops that match are timed."""

import torch
from torch import Tensor, nn

from benchmarks.baselines import Formula
from benchmarks.sizes import InputSize
from tests.helpers.tolerances import KINKS, TOLERANCES, without_tf32

# Nearly zero gradients, e.g. of a bias before BN, are only rounding errors. Compare them with at
# least this fraction of the largest gradient.
LEAST = 1e-2
# Odd sizes, to test all borders of tiles; small enough for float64.
PARITY_SHAPES = (InputSize(2, 64, 9, 7), InputSize(2, 64, 13, 10, 2))


def make_input(shape: InputSize, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a random map with zeros, as after a ReLU, and a non-zero mean."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, generator=generator)
    return x.add_(0.5).clamp_(min=0).to(device, dtype)


def inference(module: nn.Module, x: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """Return the output of inference, which may use another implementation."""
    with torch.no_grad(), torch.autocast(x.device.type, dtype=autocast, enabled=bool(autocast)):
        return {"output without a gradient": module.eval()(x)}


def outputs_and_gradients(
    module: nn.Module, x: Tensor, training: bool, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Run a module forward and backward with a random upstream gradient.

    Args:
        module (nn.Module): Our layer or a :class:`~baselines.Formula`.
        x (Tensor): (B, C, H, W).
        training (bool): Mode of the module.
        autocast (torch.dtype | None): Dtype for autocast; None for no autocast.

    Returns:
        dict[str, Tensor]: 'output', 'gradient of x', and 'gradient of NAME' for every parameter.
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


@without_tf32()
def differences(
    op: str,
    layer: nn.Module,
    shape: InputSize,
    dtype: torch.dtype,
    large: bool = False,
) -> list[str]:
    """Compare a layer with its op's formula, in both modes.

    Errors are relative to the norm of the formula's result in float64. If the formula itself
    exceeds the tolerance in lower precision, the layer's error may be up to 1.5 times as large.
    Nothing is rounded to TF32 here; the timed runs may do that, as convolutions do by default.

    Args:
        op (str): Name of the op.
        layer (nn.Module): Our layer, in float32 or float64, on its device.
        shape (InputSize): Size of the input.
        dtype (torch.dtype): Precision to test; half precision uses autocast.
        large (bool): Whether this is a benchmark shape. If so, skip gradients in evaluation mode,
            to save time, and allow those in training mode to differ by ``KINKS``.

    Returns:
        list[str]: Descriptions of the differences beyond the tolerance of ``dtype``.
    """
    device = next(layer.parameters()).device
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    low = dtype != torch.float64
    x, found = make_input(shape, dtype, device), []
    formula = Formula(op, layer).to(torch.float64)
    for training in (False, True):
        # Inference first, because training changes the running statistics.
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
                found.append(f"{key}, {shape}: all zero, so the comparison proves nothing")
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
                found.append(
                    f"{key}, {mode}, {shape}: error {error:.1e}, tolerance {tolerance:.0e}"
                )
    return found
