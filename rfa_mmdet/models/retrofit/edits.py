"""Edit a built module: replace convolutions, and add plug-ins after other modules.

Everything else keeps its type, name and checkpoint keys. All edits are planned on the original
module before the first one is applied, so an invalid one changes nothing.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import chain
from typing import Any

import torch
from mmcv.cnn import build_conv_layer, build_plugin_layer
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmdet.utils import ConfigType
from mmengine.registry import MODELS as LAYERS
from torch import Tensor, nn

from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.warm_start.plugin import Plugin

# Kind of edit -> what it adds. Subclasses of nn.Conv2d with their own forward, e.g. with their own
# padding, cannot be replaced, because their behaviour would get lost.
KINDS = {"where": "conv", "after": "plugin"}
PLAIN = (nn.Conv2d, MMCVConv2d)


@dataclass(frozen=True)
class Step:
    """One module to replace, or to add a plug-in after.

    Attributes:
        names (tuple[str, ...]): Names of the module; several if heads share it.
        module (nn.Module): The module.
        cfg (dict): Config of the new layer.
        inserts (bool): Whether the new layer is a plug-in after the module.
    """

    names: tuple[str, ...]
    module: nn.Module
    cfg: ConfigType
    inserts: bool

    def build(self) -> tuple[str, nn.Module]:
        """Build the new layer.

        Returns:
            tuple[str, nn.Module]: Its name in its parent, and the layer.

        Raises:
            ValueError, TypeError: The config does not fit the place; the message names both.
        """
        try:
            return _build_plugin(self) if self.inserts else _build_conv(self)
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{self.names[0]}: {self.cfg} does not fit here: {error}") from error


def plan_edits(module: nn.Module, edits: Sequence[ConfigType]) -> list[Step]:
    """Resolve a list of edits for a module.

    Args:
        module (nn.Module): Any module; not modified.
        edits (Sequence[dict]): Each ``dict(where=PATTERN, conv=CFG)`` or
            ``dict(after=PATTERN, plugin=CFG)``. PATTERN is a regular expression for the whole name
            of a module; the name of a ConvModule also works for its convolution. This package's
            plug-ins get ``start='identity'``, unless CFG has a ``start``.

    Returns:
        list[Step]: The steps in the order of execution.

    Raises:
        ValueError, TypeError: An edit is invalid, or matches nothing or something that cannot be
            replaced; the message lists similar names.

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
                        f"{replaced[target]} already replaces"
                    )
                replaced[target] = f"edits[{i}]"
            steps.append(Step(tuple(names[target]), target, cfg, kind == "after"))
    # Plug-ins last: they come after the replaced modules.
    return sorted(steps, key=lambda step: step.inserts)


def plan_at(
    module: nn.Module, names: Iterable[str], cfg: ConfigType, argument: str, inserts: bool = False
) -> list[Step]:
    """Plan one edit of modules given by name.

    Args:
        module (nn.Module): Any module; not modified.
        names (Iterable[str]): Names of convolutions to replace, or of modules to add a plug-in
            after.
        cfg (dict): Config of the new layer.
        argument (str): The user's name for ``cfg``, for errors.
        inserts (bool): Whether the new layer is a plug-in. Defaults to False.

    Returns:
        list[Step]: One step per name.

    Raises:
        ValueError, TypeError: ``cfg`` is not a config, or a convolution cannot be replaced.

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
    """Find the channels before each plug-in by running the module once.

    Args:
        module (nn.Module): The module that was planned for; runs in eval mode, and is not modified.
        steps (Sequence[Step]): Returned by :func:`plan_edits`. ``in_channels`` in a plug-in's
            config are kept.
        example_input (Any): Input of the module, or a tuple of several inputs.

    Returns:
        list[Step]: The steps with channels, in the same order.

    Raises:
        ValueError: A module before a plug-in does not return a feature map.

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
            f"example_input: {_some(silent)} did not return a feature map (B, C, H, W); set "
            "in_channels in the plug-in's config"
        )
    return [
        replace(step, cfg={**step.cfg, "in_channels": seen[step.module]})
        if step in unknown
        else step
        for step in steps
    ]


def apply_edits(module: nn.Module, steps: Sequence[Step], loaded: bool) -> dict[str, nn.Module]:
    """Apply planned edits.

    Args:
        module (nn.Module): The module that was planned for; changed in place.
        steps (Sequence[Step]): Returned by :func:`plan_edits` or :func:`plan_at`.
        loaded (bool): Whether to warm-start replacements from the module's weights.

    Returns:
        dict[str, nn.Module]: The new layers, by name in ``module``.

    Raises:
        ValueError, TypeError: A config does not fit its place; ``module`` is unchanged.
    """
    # Build and fill all before changing anything.
    built = [(step, *step.build()) for step in steps]
    inserted: set[str] = set()
    for step, name, layer in built:
        if step.inserts:
            target, full_name = module.get_submodule(step.names[0]), f"{step.names[0]}.{name}"
            if hasattr(target, name) or full_name in inserted:
                raise ValueError(
                    f"{step.names[0]} already has a {name!r}; add a postfix to the plug-in's "
                    f"config, e.g. {dict(step.cfg, postfix='_2')}"
                )
            inserted.add(full_name)
            if loaded:
                _follow(target, module, layer)
        elif loaded and isinstance(step.module, nn.Conv2d):
            _copy_weights(step, layer)
    new: dict[str, nn.Module] = {}
    for step, name, layer in built:
        if step.inserts:
            _insert(module.get_submodule(step.names[0]), name, layer)
            new[f"{step.names[0]}.{name}"] = layer
            continue
        for full_name in step.names:
            parent, _, child = full_name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
        new[step.names[0]] = layer
    return new


def plan_table(steps: Sequence[Step]) -> list[tuple[str, ...]]:
    """Describe planned edits, without allocating memory for them.

    Args:
        steps (Sequence[Step]): Returned by :func:`plan_edits`.

    Returns:
        list[tuple[str, ...]]: For each module its name, the old layer, the new layer, and the
        difference in parameters.

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
    """Infer the output channels of a module from its structure.

    Args:
        module (nn.Module): A convolution, a norm, or a block whose last convolution has one of the
            names used in mmdet and mmcv.

    Returns:
        int | None: None if the channels cannot be inferred.

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
    with LAYERS.switch_scope_and_registry(None) as registry:  # as mmcv does
        if isinstance(cfg["type"], str) and registry.get(cfg["type"]) is None:
            raise ValueError(f"{argument}.type={cfg['type']!r} is not registered")
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
            f"edits[{i}]: {kind}={edit[kind]!r} is not a regular expression: {error}"
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
    # A ConvModule and its convolution may both match, but are the same place.
    found = list(dict.fromkeys(_convolution(m) or m for m in matched))
    wrong = {names[m][0]: _obstacle(m) for m in found if _obstacle(m)}
    if wrong:
        shown = [f"{name} {obstacle}" for name, obstacle in list(wrong.items())[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        right = [names[m][0] for m in found if m in possible]
        hint = f"; the pattern also matches {_some(right)}, which can be" if right else nearest
        raise ValueError(
            f"{what} matches modules that cannot be replaced: {'; '.join(shown)}{more}{hint}. "
            "The pattern must match whole names"
        )
    return found


def _convolution(module: nn.Module) -> nn.Module | None:
    """Return the convolution of a ConvModule; None for other modules."""
    conv = getattr(module, "conv", None)
    is_conv_module = hasattr(module, "conv_cfg") and hasattr(module, "with_activation")
    return conv if is_conv_module and isinstance(conv, nn.Module) else None


def _obstacle(module: nn.Module) -> str:
    if isinstance(module, AttentionConv2d):
        return f"is already a {type(module).__name__}"
    if type(module) not in PLAIN:
        return f"is a {type(module).__name__}, not a plain convolution"
    if module.kernel_size == (1, 1):
        return "is a 1x1 convolution, without neighbours to attend to"
    if isinstance(module.padding, str):
        return f"has padding={module.padding!r}"
    return ""


def _nearest(pattern: re.Pattern[str], names: list[str]) -> str:
    if not names:
        return "; the module has none that it could match"
    text = re.sub(r"[\\^$]", "", pattern.pattern)
    # get_close_matches finds too few for a pattern shorter than the names.
    near = sorted(names, key=lambda name: -SequenceMatcher(None, text, name).ratio())
    return f"; similar names (of {len(names)}): {_some(near)}"


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _build_conv(step: Step) -> tuple[str, nn.Module]:
    conv = step.module
    # Only non-default values: not every registered convolution accepts this argument.
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
        raise ValueError(f"a {type(step.module).__name__} has no output; match its children")
    if "in_channels" not in cfg:
        cfg["in_channels"] = output_channels(step.module)
        if cfg["in_channels"] is None:
            raise ValueError(
                f"the output channels of a {type(step.module).__name__} are unknown; pass "
                "example_input, or set in_channels in the plug-in's config"
            )
    name, layer = build_plugin_layer(cfg, postfix=postfix)
    return name, layer.train(step.module.training)


def _copy_weights(step: Step, layer: nn.Module) -> None:
    conv: Any = step.module
    layer.to(conv.weight.device)
    layer.load_state_dict(conv.state_dict(), strict=False)
    if isinstance(layer, AttentionConv2d) and layer.start.refused:
        raise ValueError(
            f"{step.names[0]}: {type(layer).__name__} cannot start from the convolution that it "
            f"replaces: {layer.start.refused}"
        )
    if isinstance(layer, AttentionConv2d):
        layer.start = layer.start._replace(name=step.names[0])
    final = layer.conv if isinstance(layer, AttentionConv2d) else layer
    # A bias that the plain one does not have is new, and trained.
    own = dict(final.named_parameters())
    for name, parameter in conv.named_parameters():
        if name in own:
            own[name].requires_grad_(parameter.requires_grad)


def _follow(target: nn.Module, module: nn.Module, layer: nn.Module) -> None:
    # To the device and dtype of the module before it, or else of the whole.
    first = next(chain(target.parameters(), module.parameters()), None)
    if first is not None:
        layer.to(first.device, first.dtype)


def _insert(target: Any, name: str, layer: nn.Module) -> None:
    target.add_module(name, layer)
    if type(target).forward is nn.Sequential.forward:
        return  # the new child runs last
    if not hasattr(target, "inserted_plugins"):
        target.inserted_plugins = []
        # A hook, because a wrapper would rename everything inside.
        target.register_forward_hook(_run_inserted)
    target.inserted_plugins.append(name)


def _run_inserted(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    for name in module.inserted_plugins:
        output = getattr(module, name)(output)
    return output
