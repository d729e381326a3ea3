r"""Retrofit: any module of a detector, with other convolutions and plug-ins in chosen places.

    model = dict(backbone=dict(
        _delete_=True, type='Retrofit', module={{_base_.model.backbone}},
        edits=[dict(where=r'layer[234]\..*\.conv2', conv=dict(type='RFAConv')),
               dict(after=r'layer4\.\d+', plugin=dict(type='EMA'))]))

Any other module that is built, of any library, is edited by the same function:

    rfa_mmdet.retrofit(net, [dict(where=r'layer4\..*\.conv2', conv=dict(type='RFAConv'))])

What comes out is the module itself: its type, and the names and checkpoint keys outside the edits,
are those of the plain one, so that plain checkpoints load, and mmdet's tools see what they know.
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


@MODELS.register_module(name="Retrofit")
def retrofit(
    module: ConfigType | nn.Module,
    edits: Sequence[ConfigType],
    dry_run: bool = False,
    strict_start: bool | str = False,
    example_input: Any = None,
    **kwargs: Any,
) -> nn.Module:
    r"""Build a module and edit it.

    A replaced convolution hands on its channels, kernel, stride, padding, dilation, groups and
    whether it has a bias. The plain model's checkpoint warm-starts it, and a report of that is
    logged. What is put in is trained, in stages of ``frozen_stages`` too; they and ``norm_eval``
    hold its norms where a checkpoint or the warm start gave them statistics. Plug-ins of
    this package start as the identity, so that they change nothing until they are trained.

    Args:
        module (dict | nn.Module): Config of a backbone, neck, head or detector, or one that is
            built; that one's weights count as loaded, and are warm-started from.
        edits (Sequence[dict]): ``dict(where=PATTERN, conv=CFG)`` replaces the convolutions,
            ``dict(after=PATTERN, plugin=CFG)`` puts a plug-in behind the modules, whose whole name
            matches the regular expression. A ConvModule stands for the convolution in it. The
            plug-in gets the channels of the module before it as ``in_channels``, and one of this
            package ``start='identity'``, unless given.
        dry_run (bool): Print what would be done, as a table, and do nothing. Defaults to False.
        strict_start (bool | str): Whether keys of a checkpoint that go nowhere are an error; as a
            regular expression, which keys may. Defaults to False.
        example_input (Any): What the module can be called with, a tuple for several arguments. It
            runs once, in eval mode, and plug-ins get the channels that they would see then.
            None: the channels that the modules before them name. Defaults to None.
        **kwargs: What mmdet's detectors hand on to their parts, such as ``train_cfg`` of a head:
            goes into the module's config.

    Returns:
        nn.Module: The module, edited.

    Raises:
        ValueError, TypeError: An argument is not as above, or an edit matches nothing, or what
            cannot be replaced.

    Example:
        >>> edits = [dict(where=r"layer4\..*\.conv1", conv=dict(type="RFAConv"))]
        >>> net = retrofit(dict(type="ResNet", depth=18), edits)
        >>> type(net).__name__, type(net.layer4[0].conv1).__name__, net.layer4[0].conv1.stride
        ('ResNet', 'RFAConv', (2, 2))

        A module that is built keeps what it computes.

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
        raise ValueError(f"{', '.join(kwargs)}: go into a config, but module is built already")
    net = module if isinstance(module, nn.Module) else _build(module, kwargs)
    steps = plan_edits(net, edits)
    if example_input is not None:
        steps = with_seen_channels(net, steps, example_input)
    if dry_run:
        _print(type(net).__name__, plan_table(steps))
        return net
    check_strict_start(strict_start)  # before anything changes
    keep_new(net, apply_edits(net, steps, loaded), strict_start)
    if loaded and isinstance(net, BaseModule):  # whose own train() holds what it freezes
        net.train(net.training)
    return net


def _build(cfg: Any, more: ConfigType) -> nn.Module:
    if not isinstance(cfg, dict) or "type" not in cfg:
        raise TypeError(f"module={cfg!r}: must be a config with a 'type', or a module")
    net: nn.Module = MODELS.build({**cfg, **more})
    return net


def _print(name: str, rows: list[tuple[str, ...]]) -> None:
    table = Table("module", "is", "becomes", title=f"Retrofit of {name}, dry run: not done")
    table.columns[0].overflow = "fold"
    table.add_column("parameters", justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
