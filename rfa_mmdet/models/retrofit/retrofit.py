r"""Retrofit: replace convolutions and add plug-ins at chosen places of any module.

    model = dict(backbone=dict(
        _delete_=True, type='Retrofit', module={{_base_.model.backbone}},
        edits=[dict(where=r'layer[234]\..*\.conv2', conv=dict(type='RFAConv')),
               dict(after=r'layer4\.\d+', plugin=dict(type='EMA'))]))

The same function edits an already built module of any library:

    rfa_mmdet.retrofit(net, [dict(where=r'layer4\..*\.conv2', conv=dict(type='RFAConv'))])

It returns the module itself, with the same type and, outside the edits, the same names and
checkpoint keys, so plain checkpoints load and mmdet's tools work.
"""

from collections.abc import Sequence
from typing import Any

from mmdet.registry import MODELS
from mmdet.utils import ConfigType
from mmengine.model import BaseModule
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from rfa_mmdet.models.retrofit.edits import (
    apply_edits,
    plan_edits,
    plan_table,
    with_seen_channels,
)
from rfa_mmdet.models.retrofit.new_layers import check_strict_start, keep_new
from rfa_mmdet.models.retrofit.report import shapes


@MODELS.register_module(name="Retrofit")
def retrofit(
    module: ConfigType | nn.Module,
    edits: Sequence[ConfigType],
    example_input: Any = None,
    *,
    dry_run: bool = False,
    strict_start: bool | str = False,
    **kwargs: Any,
) -> nn.Module:
    r"""Build a module and edit it.

    The new convolution gets the channels, kernel size, stride, padding, dilation, groups and bias
    of the replaced one. The plain model's checkpoint, or the weights of a built module, warm-start
    it, and a report is logged. New layers are trained even in ``frozen_stages``. ``norm_eval`` and
    frozen stages only fix those of their norms that got statistics from a checkpoint or the warm
    start. This package's plug-ins start as the identity, so they do not change the outputs until
    they are trained.

    Args:
        module (dict | nn.Module): Config of a backbone, neck, head or detector, or a built module,
            whose current weights are used for the warm start.
        edits (Sequence[dict]): ``dict(where=PATTERN, conv=CFG)`` replaces convolutions,
            ``dict(after=PATTERN, plugin=CFG)`` adds a plug-in after modules. PATTERN is a regular
            expression for the whole name of a module; the name of a ConvModule also works for its
            convolution. Plug-ins get ``in_channels`` from the module before them, and this
            package's plug-ins get ``start='identity'``, unless set in CFG.
        example_input (Any): Input of the module, or a tuple of several inputs. The module runs once
            in eval mode to find the channels before each plug-in. Defaults to None: channels are
            inferred from the modules.
        dry_run (bool): Whether to only print a table of the edits. Defaults to False.
        strict_start (bool | str): Whether unused keys of a checkpoint are an error; a regular
            expression names keys that may be unused. Defaults to False.
        **kwargs: Arguments that mmdet's detectors pass to their parts, e.g. ``train_cfg`` of a
            head; added to the module's config.

    Returns:
        nn.Module: The edited module.

    Raises:
        ValueError, TypeError: An argument is invalid, or an edit matches nothing or something that
            cannot be replaced.

    Example:
        >>> edits = [dict(where=r"layer4\..*\.conv1", conv=dict(type="RFAConv"))]
        >>> net = retrofit(dict(type="ResNet", depth=18), edits)
        >>> type(net).__name__, type(net.layer4[0].conv1).__name__, net.layer4[0].conv1.stride
        ('ResNet', 'RFAConv', (2, 2))

        A built module keeps its outputs.

        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        >>> x = torch.rand(1, 3, 16, 16)
        >>> before = net(x)
        >>> net = retrofit(net, [dict(where="2", conv=dict(type="RFAConv"))])
        >>> torch.allclose(net(x), before, atol=1e-5)
        True
    """
    loaded = isinstance(module, nn.Module)
    if loaded and kwargs:
        raise ValueError(f"{', '.join(kwargs)}: only valid if module is a config, not a module")
    net = module if isinstance(module, nn.Module) else _build(module, kwargs)
    steps = plan_edits(net, edits)
    if example_input is not None:
        steps = with_seen_channels(net, steps, example_input)
    if dry_run:
        _print(type(net).__name__, plan_table(steps))
        return net
    check_strict_start(strict_start)  # before anything changes
    plain = shapes(net.state_dict()) if loaded else {}
    record = keep_new(net, apply_edits(net, steps, loaded), strict_start)
    if loaded:
        record.log_start(plain, checkpoint=False)
        if isinstance(net, BaseModule):  # its own train() applies frozen stages
            net.train(net.training)
    return net


def _build(cfg: Any, more: ConfigType) -> nn.Module:
    if not isinstance(cfg, dict) or "type" not in cfg:
        raise TypeError(f"module={cfg!r}: must be a config with a 'type', or a module")
    net: nn.Module = MODELS.build({**cfg, **more})
    return net


def _print(name: str, rows: list[tuple[str, ...]]) -> None:
    table = Table("module", "is", "becomes", title=f"Retrofit of {name} (dry run)")
    table.columns[0].overflow = "fold"
    table.add_column("parameters", justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
