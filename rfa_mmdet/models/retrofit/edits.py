"""Edit a module that is built: other convolutions in chosen places, plug-ins behind others.

Everything else of the module stays what it was, in type, name and checkpoint key. All edits are
planned on the module as it came, before the first is carried out: a wrong one changes nothing.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_plugin_layer
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmdet.utils import ConfigType
from mmengine.registry import MODELS as LAYERS
from torch import Tensor, nn

from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.warm_start.plugin import Plugin

# What each kind of edit puts in; nn.Conv2d's subclasses with a forward of their own, such as those
# that pad by themselves, cannot be replaced: nobody takes that over.
KINDS = {"where": "conv", "after": "plugin"}
PLAIN = (nn.Conv2d, MMCVConv2d)


@dataclass(frozen=True)
class Step:
    """One module to be replaced, or to be followed by a plug-in.

    Attributes:
        names (tuple[str, ...]): Of the module; several where heads share it.
        module (nn.Module): It itself.
        cfg (dict): Of what is put in.
        inserts (bool): Whether that is a plug-in, put behind it.
    """

    names: tuple[str, ...]
    module: nn.Module
    cfg: ConfigType
    inserts: bool

    def build(self) -> tuple[str, nn.Module]:
        """Build what is put in.

        Returns:
            tuple[str, nn.Module]: Its name in its parent, and it.

        Raises:
            ValueError, TypeError: The config does not suit the place; the message names both.
        """
        try:
            return _build_plugin(self) if self.inserts else _build_conv(self)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self.names[0]}: {self.cfg} does not fit there: {error}") from error


def plan_edits(module: nn.Module, edits: Sequence[ConfigType]) -> list[Step]:
    """Find what a list of edits means for a module.

    Args:
        module (nn.Module): Any; stays as it is.
        edits (Sequence[dict]): Each ``dict(where=PATTERN, conv=CFG)`` or
            ``dict(after=PATTERN, plugin=CFG)``; PATTERN is a regular expression that a module's
            whole name matches, where a ConvModule stands for the convolution in it. This package's
            plug-ins get ``start='identity'``, unless CFG has a ``start``.

    Returns:
        list[Step]: In the order in which to carry them out.

    Raises:
        ValueError, TypeError: An edit is not as above, matches nothing, or something that cannot
            be replaced; the message lists the nearest names.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> [step.names for step in plan_edits(net, [dict(where="0", conv=dict(type="RFAConv"))])]
        [('0',)]
    """
    if isinstance(edits, dict) or not isinstance(edits, Sequence) or not edits:
        raise TypeError(f"edits={edits!r}: must be a list of dicts, at least one")
    names: dict[nn.Module, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        if name:
            names.setdefault(child, []).append(name)
    steps: list[Step] = []
    replaced: dict[nn.Module, str] = {}
    for i, edit in enumerate(edits):
        kind, pattern, cfg = _check_edit(i, edit)
        for target in _find(names, kind, pattern, f"edits[{i}]: {kind}={edit[kind]!r}"):
            if kind == "where":
                if target in replaced:
                    raise ValueError(
                        f"edits[{i}]: {kind}={edit[kind]!r} matches {names[target][0]}, which "
                        f"{replaced[target]} replaces already"
                    )
                replaced[target] = f"edits[{i}]"
            steps.append(Step(tuple(names[target]), target, cfg, kind == "after"))
    # Plug-ins last: they stand behind what is there then.
    return sorted(steps, key=lambda step: step.inserts)


def plan_at(
    module: nn.Module, names: Iterable[str], cfg: ConfigType, argument: str, inserts: bool = False
) -> list[Step]:
    """Plan one edit of modules that the caller knows by name.

    Args:
        module (nn.Module): Any; stays as it is.
        names (Iterable[str]): Of convolutions in it to be replaced, or of modules in it to be
            followed by a plug-in.
        cfg (dict): Of what is put in.
        argument (str): The user's name for ``cfg``, for messages.
        inserts (bool): Whether that is a plug-in. Defaults to False.

    Returns:
        list[Step]: In the order of the names.

    Raises:
        ValueError, TypeError: ``cfg`` is no config, or a convolution cannot be replaced.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> steps = plan_at(net, ["0"], dict(type="RFAConv"), "rfa")
        >>> list(apply_edits(net, steps, loaded=False))
        ['0']
    """
    cfg = _check_config(argument, cfg)
    steps = [Step((name,), module.get_submodule(name), cfg, inserts) for name in names]
    for step in steps:
        if not inserts and (obstacle := _obstacle(step.module)):
            raise ValueError(f"{argument}={cfg}: cannot replace {step.names[0]}, which {obstacle}")
    return steps


def with_seen_channels(module: nn.Module, steps: Sequence[Step], example_input: Any) -> list[Step]:
    """Let one run of an example tell the channels in front of plug-ins.

    Args:
        module (nn.Module): That the plan was made for; runs once, in eval mode, and stays as it is.
        steps (Sequence[Step]): From :func:`plan_edits`. A plug-in whose config has ``in_channels``
            keeps them.
        example_input (Any): What the module is called with; a tuple holds several arguments.

    Returns:
        list[Step]: In the same order.

    Raises:
        ValueError: No map came out of a module in front of a plug-in.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.PixelShuffle(2))
        >>> steps = plan_edits(net, [dict(after="1", plugin=dict(type="SE"))])
        >>> with_seen_channels(net, steps, torch.rand(1, 4, 8, 8))[0].cfg["in_channels"]
        2
    """
    unknown = [step for step in steps if step.inserts and "in_channels" not in step.cfg]
    seen: dict[nn.Module, int] = {}

    def look(target: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            seen[target] = output.shape[1]

    modes = {child: child.training for child in module.modules()}
    handles = [step.module.register_forward_hook(look) for step in unknown]
    try:
        with torch.no_grad():
            module.eval()
            module(*(example_input if isinstance(example_input, tuple) else (example_input,)))
    finally:
        for handle in handles:
            handle.remove()
        for child, mode in modes.items():
            child.training = mode
    silent = [step.names[0] for step in unknown if step.module not in seen]
    if silent:
        raise ValueError(
            f"example_input: no map (B, C, H, W) came out of {_some(silent)}; pass in_channels in "
            "the plug-in's config"
        )
    return [
        replace(step, cfg={**step.cfg, "in_channels": seen[step.module]})
        if step in unknown
        else step
        for step in steps
    ]


def apply_edits(module: nn.Module, steps: Sequence[Step], loaded: bool) -> dict[str, nn.Module]:
    """Carry out a plan.

    Args:
        module (nn.Module): That the plan was made for; changed in place.
        steps (Sequence[Step]): From :func:`plan_edits` or :func:`plan_at`.
        loaded (bool): Whether the module's weights count: replacements are then warm-started.

    Returns:
        dict[str, nn.Module]: What was put in, by its name in ``module``.

    Raises:
        ValueError, TypeError: A config does not suit its place; ``module`` is as it was.
    """
    # Build all before changing anything.
    built = [(step, *step.build()) for step in steps]
    new: dict[str, nn.Module] = {}
    for step, name, layer in built:
        if step.inserts:
            target = module.get_submodule(step.names[0])
            if hasattr(target, name):
                raise ValueError(
                    f"{step.names[0]} has a {name!r} already; give the plug-in a postfix, as in "
                    f"{dict(step.cfg, postfix='_2')}"
                )
            if loaded:
                _follow(target, layer)
            _insert(target, name, layer)
            new[f"{step.names[0]}.{name}"] = layer
            continue
        if loaded and isinstance(step.module, nn.Conv2d):
            _copy_weights(step.module, layer)
        for full_name in step.names:
            parent, _, child = full_name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
        new[step.names[0]] = layer
    return new


def plan_table(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """Describe a plan, without building anything large.

    Args:
        steps (Sequence[Step]): From :func:`plan_edits`.

    Returns:
        list[tuple[str, ...]]: For each module its name, what is there, what it becomes, and by how
        many parameters that differs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
        >>> plan_table(plan_edits(net, [dict(where="0", conv=dict(type="RFAConv"))]))
        [('0', 'Conv2d 8 -> 8, 3x3, stride 1', 'RFAConv', '+864')]
    """
    rows: list[tuple[str, ...]] = []
    for step in steps:
        with torch.device("meta"):
            name, layer = step.build()
        more = sum(p.numel() for p in layer.parameters())
        there, becomes = type(step.module).__name__, type(layer).__name__
        if step.inserts:
            becomes = f"itself, then {becomes} as .{name}"
        elif isinstance(conv := step.module, nn.Conv2d):
            more -= sum(p.numel() for p in conv.parameters())
            size, stride = conv.kernel_size, conv.stride
            there += f" {conv.in_channels} -> {conv.out_channels}, {size[0]}x{size[1]}, stride "
            there += str(stride[0] if stride[0] == stride[1] else stride)
            if conv.groups > 1:
                there += f", groups {conv.groups}"
        rows.append((" = ".join(step.names), there, becomes, f"{more:+,}"))
    return rows


def output_channels(module: nn.Module) -> int | None:
    """Return the channels of a module's output, as far as its structure tells them.

    Args:
        module (nn.Module): A convolution, a norm, or a block whose last convolution has one of the
            names that blocks of mmdet and mmcv give it.

    Returns:
        int | None: None: it does not tell.

    Example:
        >>> output_channels(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        8
    """
    for attribute in ("out_channels", "num_features", "num_channels"):
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value
    if isinstance(module, nn.Sequential):
        for child in reversed(module):
            channels = output_channels(child)
            if channels is not None:
                return channels
        return None
    for name in ("final_conv", "conv3", "conv2", "linear_conv", "pointwise_conv", "conv"):
        last = getattr(module, name, None)
        if isinstance(last, nn.Module):
            return output_channels(last)
    return None


def _check_config(argument: str, cfg: Any) -> ConfigType:
    if not isinstance(cfg, dict) or "type" not in cfg:
        raise TypeError(f"{argument}={cfg!r}: must be a dict with a 'type'")
    with LAYERS.switch_scope_and_registry(None) as registry:  # as mmcv looks it up
        if isinstance(cfg["type"], str) and registry.get(cfg["type"]) is None:
            raise ValueError(f"{argument}.type={cfg['type']!r} is registered nowhere")
    return dict(cfg)


def _is_plugin(kind: Any) -> bool:
    with LAYERS.switch_scope_and_registry(None) as registry:
        found = registry.get(kind) if isinstance(kind, str) else kind
    return isinstance(found, type) and issubclass(found, Plugin)


def _check_edit(i: int, edit: Any) -> tuple[str, re.Pattern[str], ConfigType]:
    valid = "dict(where=PATTERN, conv=CFG) or dict(after=PATTERN, plugin=CFG)"
    if not isinstance(edit, dict):
        raise TypeError(f"edits[{i}]={edit!r}: must be {valid}")
    kind = next((k for k, what in KINDS.items() if set(edit) == {k, what}), None)
    if kind is None:
        raise ValueError(f"edits[{i}] has the keys {sorted(edit)}: must be {valid}")
    cfg = _check_config(f"edits[{i}]: {KINDS[kind]}", edit[KINDS[kind]])
    if kind == "after" and _is_plugin(cfg["type"]):
        cfg.setdefault("start", "identity")
    try:
        return kind, re.compile(edit[kind]), cfg
    except (re.error, TypeError) as error:
        raise ValueError(
            f"edits[{i}]: {kind}={edit[kind]!r} is no regular expression: {error}"
        ) from error


def _find(
    names: dict[nn.Module, list[str]], kind: str, pattern: re.Pattern[str], what: str
) -> list[nn.Module]:
    matched = [m for m, own in names.items() if any(pattern.fullmatch(name) for name in own)]
    possible = [m for m in names if kind == "after" or not _obstacle(m)]
    nearest = _nearest(pattern, [name for m in possible for name in names[m]])
    if not matched:
        raise ValueError(f"{what} matches no module{nearest}")
    if kind == "after":
        return matched
    # A ConvModule and its convolution may both match; they are one place.
    found = list(dict.fromkeys(_convolution(m) or m for m in matched))
    wrong = {names[m][0]: _obstacle(m) for m in found if _obstacle(m)}
    if wrong:
        shown = [f"{name} {obstacle}" for name, obstacle in list(wrong.items())[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        right = [names[m][0] for m in found if m in possible]
        hint = f"; among its matches, these can be: {_some(right)}" if right else nearest
        raise ValueError(
            f"{what} matches what cannot be replaced: {'; '.join(shown)}{more}{hint}. "
            "The pattern has to match the whole name"
        )
    return found


def _convolution(module: nn.Module) -> nn.Module | None:
    """Return the convolution that a ConvModule holds; None for other modules."""
    conv = getattr(module, "conv", None)
    is_conv_module = hasattr(module, "conv_cfg") and hasattr(module, "with_activation")
    return conv if is_conv_module and isinstance(conv, nn.Module) else None


def _obstacle(module: nn.Module) -> str:
    if isinstance(module, AttentionConv2d):
        return f"is a {type(module).__name__} already"
    if type(module) not in PLAIN:
        return f"is a {type(module).__name__}, no plain convolution"
    if module.kernel_size == (1, 1):
        return "is a 1x1 convolution, with no neighbours to attend to"
    if isinstance(module.padding, str):
        return f"pads by {module.padding!r}"
    return ""


def _nearest(pattern: re.Pattern[str], names: list[str]) -> str:
    if not names:
        return "; there is none that it could"
    text = re.sub(r"[\\^$]", "", pattern.pattern)
    # Not get_close_matches, which leaves out most for a pattern that is shorter than names.
    near = sorted(names, key=lambda name: -SequenceMatcher(None, text, name).ratio())
    return f"; nearest of {len(names)}: {_some(near)}"


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _build_conv(step: Step) -> tuple[str, nn.Module]:
    conv = step.module
    # Only what is not the default: not every registered convolution takes all of them.
    extra = {} if conv.padding_mode == "zeros" else dict(padding_mode=conv.padding_mode)
    layer = build_conv_layer(
        {"bias": conv.bias is not None, **step.cfg},
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        **extra,
    )
    weight = conv.weight
    return step.names[0].rpartition(".")[2], layer.to(weight.dtype).train(conv.training)


def _build_plugin(step: Step) -> tuple[str, nn.Module]:
    cfg = dict(step.cfg)
    postfix = cfg.pop("postfix", "")
    if isinstance(step.module, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(f"a {type(step.module).__name__} has no output; match what is in it")
    if "in_channels" not in cfg:
        cfg["in_channels"] = output_channels(step.module)
        if cfg["in_channels"] is None:
            raise ValueError(
                f"the output channels of a {type(step.module).__name__} are not known; pass "
                "example_input, or in_channels in the plug-in's config"
            )
    name, layer = build_plugin_layer(cfg, postfix=postfix)
    return name, layer.train(step.module.training)


def _copy_weights(conv: nn.Conv2d, layer: nn.Module) -> None:
    layer.to(conv.weight.device)
    state = conv.state_dict()
    layer.load_state_dict(state, strict=isinstance(layer, AttentionConv2d))
    final = layer.conv if isinstance(layer, AttentionConv2d) else layer
    # A bias that the plain one had not is new, and trained.
    own = dict(final.named_parameters())
    for name, parameter in conv.named_parameters():
        if name in own:
            own[name].requires_grad_(parameter.requires_grad)


def _follow(target: nn.Module, layer: nn.Module) -> None:
    # To the device and precision of what it stands behind.
    first = next(target.parameters(), None)
    if first is not None:
        layer.to(first.device, first.dtype)


def _insert(target: Any, name: str, layer: nn.Module) -> None:
    target.add_module(name, layer)
    if isinstance(target, nn.Sequential):
        return  # which runs its last child last
    if not hasattr(target, "inserted_plugins"):
        target.inserted_plugins = []
        # A hook, as a wrapping module would give new names to all that it wraps.
        target.register_forward_hook(_run_inserted)
    target.inserted_plugins.append(name)


def _run_inserted(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    for name in module.inserted_plugins:
        output = getattr(module, name)(output)
    return output
