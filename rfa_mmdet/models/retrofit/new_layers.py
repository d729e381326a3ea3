"""Keep track of a module's new layers, which plain checkpoints do not contain, and report them.

MMDetection's ``frozen_stages`` and ``norm_eval`` freeze by position, but new layers must not be
frozen at untrained values. Their parameters are trained even in frozen stages, right from the
start, because DDP needs to know before a checkpoint is loaded. Norms without statistics from a
checkpoint use those of the batch. The state dict's metadata records these norms, next to torch's
module versions, so a resumed run continues the same way although its checkpoint has statistics.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from torch import nn

from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.warm_start.plugin import Plugin
from rfa_mmdet.layers.warm_start.start import Start, WarmStartable, WarmStartError, matching
from rfa_mmdet.models.retrofit.report import StartReport, shapes

# Key in a module's metadata: new norms that use batch statistics where others are frozen.
ON_BATCHES = "rfa_mmdet_on_batches"


def keep_new(
    module: nn.Module, layers: dict[str, nn.Module], strict_start: bool | str = False
) -> "NewLayers":
    """Keep track of a module's new layers, in addition to those of earlier edits.

    Args:
        module (nn.Module): The module.
        layers (dict[str, nn.Module]): The new layers, by name in ``module``.
        strict_start (bool | str): See :func:`check_strict_start`. Defaults to False.

    Returns:
        NewLayers: The record of the module, also available as its ``new_layers``.

    Raises:
        TypeError, ValueError: ``strict_start`` is invalid.
    """
    before = getattr(module, "new_layers", None)
    if not isinstance(before, NewLayers):
        return NewLayers(module, layers, strict_start)
    before.strict_start = check_strict_start(strict_start) or before.strict_start
    before.add(layers)
    return before


def check_strict_start(strict_start: Any) -> bool | str:
    r"""Return the argument if it is valid.

    Args:
        strict_start (bool | str): Whether unused keys of a checkpoint are an error; a regular
            expression names keys that may be unused.

    Raises:
        TypeError: It is neither a bool nor a string.
        ValueError: It is not a regular expression.

    Example:
        >>> check_strict_start(r"fc\..*")
        'fc\\..*'
    """
    if not isinstance(strict_start, (bool, str)):
        raise TypeError(f"strict_start={strict_start!r}: must be a bool or a regular expression")
    try:
        re.compile(strict_start if isinstance(strict_start, str) else "")
    except re.error as error:
        raise ValueError(
            f"strict_start={strict_start!r} is not a regular expression: {error}"
        ) from error
    return strict_start


class _Filled:
    """Records the names of a layer's values that checkpoints set."""

    def __init__(self) -> None:
        self.names: frozenset[str] = frozenset()

    def __call__(
        self, layer: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        self.names |= matching(layer, state_dict, prefix)


class NewLayers:
    """Keeps a module's new layers trainable, and reports how checkpoints are loaded into them.

    Attaches itself to the module as ``new_layers``, wraps ``train`` and ``init_weights``, and hooks
    into loading. Build it with :func:`keep_new`.

    Args:
        module, layers, strict_start: See :func:`keep_new`.
    """

    def __init__(
        self, module: nn.Module, layers: dict[str, nn.Module], strict_start: bool | str
    ) -> None:
        self.module: Any = module  # of any class
        self.layers: dict[str, nn.Module] = {}
        self.strict_start = check_strict_start(strict_start)
        # Values that checkpoints set in third-party layers; ours record this themselves.
        self._filled: dict[str, _Filled] = {}
        self._given: dict[str, tuple[int, ...]] = {}
        self._on_batches: set[str] = set()
        vars(module)["new_layers"] = self
        # On the instance, to keep the module's type.
        vars(module)["train"] = self.train
        if hasattr(module, "init_weights"):
            vars(module)["init_weights"] = self.init_weights
        self.add(layers)
        module._register_state_dict_hook(self._note)
        module._register_load_state_dict_pre_hook(self._before_load)
        module.register_load_state_dict_post_hook(self._after_load)

    def add(self, layers: dict[str, nn.Module]) -> None:
        """Keep track of more new layers, by name in the module."""
        self.layers.update(layers)
        for name, layer in layers.items():
            if not isinstance(layer, WarmStartable):
                self._filled[name] = filled = _Filled()
                # On the layer: a checkpoint may be loaded into a part of the module.
                layer._register_load_state_dict_pre_hook(filled, with_module=True)

    def start_of(self, name: str) -> Start:
        """Return where the values of a new layer come from, including third-party layers.

        Args:
            name (str): Name of the layer in the module.
        """
        layer = self.layers[name]
        if isinstance(layer, WarmStartable):
            return layer.start
        return Start(self._filled[name].names)

    @contextmanager
    def kept(self, mode: bool) -> Iterator[None]:
        """Let the module freeze layers in this context, then undo it for the new ones.

        Args:
            mode (bool): Whether the module is in training mode.
        """
        trained = {p: p.requires_grad for layer in self.layers.values() for p in layer.parameters()}
        yield
        for parameter, trains in trained.items():
            parameter.requires_grad_(trains)
        for layer_name, layer in self.layers.items():
            filled = self.start_of(layer_name).filled
            for name, child in layer.named_modules():
                full_name = f"{layer_name}.{name}" if name else layer_name
                has_statistics = child._buffers.get("running_mean") is not None
                if has_statistics and full_name not in self._on_batches:
                    if (f"{name}.running_mean" if name else "running_mean") in filled:
                        continue
                    if child.training != mode:
                        self._on_batches.add(full_name)
                child.training = mode

    def train(self, mode: bool = True) -> nn.Module:
        """Set the module's mode; new layers follow even where the others are frozen."""
        module: nn.Module = self.module
        with self.kept(mode):
            type(module).train(module, mode)
        return module

    def init_weights(self) -> None:
        """Initialise the module, and new layers without loaded values in their own way."""
        # MMEngine initialises a module only once; likewise the layers, which may be trained by now.
        again = getattr(self.module, "is_init", False)
        type(self.module).init_weights(self.module)
        for name, layer in self.layers.items():
            if again or self.start_of(name).filled:
                continue
            if isinstance(layer, AttentionConv2d):
                layer.reset_attention()
            elif isinstance(layer, Plugin):
                layer.init_weights()

    def log_start(self, given: dict[str, tuple[int, ...]], checkpoint: bool = True) -> StartReport:
        """Log where the module's values come from.

        Args:
            given (dict[str, tuple[int, ...]]): Keys of the given values -> shapes.
            checkpoint (bool): Whether a checkpoint gave them, or else the module itself before it
                was edited. Defaults to True.

        Returns:
            StartReport: The logged report.
        """
        report = StartReport.of(
            self.module, self.layers.values(), given, self._identities(), checkpoint
        )
        print_log(str(report), logger="current")
        return report

    def _identities(self) -> dict[str, str]:
        """Return the plug-ins that start as the identity, because no checkpoint has them."""
        return {
            name: type(layer).__name__ + ("" if layer.exact else ", nearly")
            for name, layer in self.layers.items()
            if isinstance(layer, Plugin)
            and layer.start == "identity"
            and not self.start_of(name).filled
        }

    def _note(self, module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        if self._on_batches:
            metadata[ON_BATCHES] = sorted(self._on_batches)

    def _before_load(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        self._given = shapes(given)
        if given:
            noted = metadata.get(ON_BATCHES)
            noted = noted if isinstance(noted, list) else []
            self._on_batches = {name for name in noted if isinstance(name, str)}

    def _after_load(self, module: nn.Module, incompatible: Any) -> None:
        given, self._given = self._given, {}
        if not (given and self.layers):
            return
        report = self.log_start(given)
        allowed = self.strict_start if isinstance(self.strict_start, str) else r"(?!)"
        skipped = [key for key in report.skipped if not re.fullmatch(allowed, key)]
        if self.strict_start and skipped:
            raise WarmStartError(
                f"strict_start={self.strict_start!r}: {type(module).__name__} does not use "
                f"{len(skipped)} keys of the checkpoint: {', '.join(skipped)}. To allow some, pass "
                "a regular expression, e.g. strict_start=r'fc\\..*'"
            )


def new_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full name and module of each layer added to a model by Retrofit and the like.

    Example:
        >>> list(new_layers(nn.Conv2d(3, 3, 3)))
        []
    """
    for prefix, module in model.named_modules():
        record = getattr(module, "new_layers", None)
        if isinstance(record, NewLayers):
            for name, layer in record.layers.items():
                yield f"{prefix}.{name}" if prefix else name, layer
