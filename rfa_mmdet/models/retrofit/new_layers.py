"""The layers of a module that its plain checkpoint does not know: kept trainable, and reported.

MMDetection's ``frozen_stages`` and ``norm_eval`` go by position. A new layer in such a place must
not be held at values that nobody trained. Its parameters train, in frozen stages too: that is so
from the beginning, as DDP wants to know them before a checkpoint is read. Norms whose statistics
no checkpoint filled use those of the batch. That they did is noted in the state dict's metadata,
beside torch's versions of modules: a resumed run goes on so, although its checkpoint fills all.
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
from rfa_mmdet.models.retrofit.report import StartReport

# In the metadata of a module with new layers: its norms that used batches where others were held.
ON_BATCHES = "rfa_mmdet_on_batches"


def keep_new(
    module: nn.Module, layers: dict[str, nn.Module], strict_start: bool | str = False
) -> "NewLayers":
    """Keep track of a module's new layers, together with those of an earlier edit.

    Args:
        module (nn.Module): That holds the layers.
        layers (dict[str, nn.Module]): Them, by name in ``module``.
        strict_start (bool | str): As of :func:`check_strict_start`.

    Returns:
        NewLayers: Of the module, also as its ``new_layers``.

    Raises:
        TypeError, ValueError: ``strict_start`` is not as above.
    """
    before = getattr(module, "new_layers", None)
    if not isinstance(before, NewLayers):
        return NewLayers(module, layers, strict_start)
    before.strict_start = check_strict_start(strict_start) or before.strict_start
    before.layers.update(layers)
    return before


def check_strict_start(strict_start: Any) -> bool | str:
    r"""Return the argument if it is valid.

    Args:
        strict_start (bool | str): Whether a checkpoint's keys that go nowhere are an error; a
            regular expression names those that may be left out.

    Raises:
        TypeError: It is neither a bool nor a string.
        ValueError: It is no regular expression.

    Example:
        >>> check_strict_start(r"fc\..*")
        'fc\\..*'
    """
    if not isinstance(strict_start, (bool, str)):
        raise TypeError(f"strict_start={strict_start!r}: must be a bool or a pattern")
    try:
        re.compile(strict_start if isinstance(strict_start, str) else "")
    except re.error as error:
        raise ValueError(
            f"strict_start={strict_start!r} is no regular expression: {error}"
        ) from error
    return strict_start


class NewLayers:
    """Keeps the new layers of a module trained, and reports what each checkpoint gave them.

    Attaches itself to the module: as ``new_layers``, around ``train`` and ``init_weights``, and to
    its loading. Build it with :func:`keep_new`.

    Args:
        module, layers, strict_start: As of :func:`keep_new`.
    """

    def __init__(
        self, module: nn.Module, layers: dict[str, nn.Module], strict_start: bool | str
    ) -> None:
        self.module: Any = module  # of any class
        self.layers = dict(layers)
        self.strict_start = check_strict_start(strict_start)
        # What checkpoints filled of other people's layers; ours keep it themselves.
        self._filled: dict[str, frozenset[str]] = {}
        self._given: dict[str, tuple[int, ...]] = {}
        self._on_batches: set[str] = set()
        vars(module)["new_layers"] = self
        # On the instance, so that the module's type stays what it was.
        vars(module)["train"] = self.train
        if hasattr(module, "init_weights"):
            vars(module)["init_weights"] = self.init_weights
        module._register_state_dict_hook(self._note)
        module._register_load_state_dict_pre_hook(self._before_load)
        module.register_load_state_dict_post_hook(self._after_load)

    def start_of(self, name: str) -> Start:
        """Return where the values of a new layer come from, whoever wrote the layer.

        Args:
            name (str): Of the layer in the module.
        """
        layer = self.layers[name]
        if isinstance(layer, WarmStartable):
            return layer.start
        return Start(self._filled.get(name, frozenset()))

    @contextmanager
    def kept(self, mode: bool) -> Iterator[None]:
        """Let the module hold what it wants inside, then undo that for what is new.

        Args:
            mode (bool): Whether the module trains.
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
        """Switch the mode of the module; what is new follows even where the rest is held."""
        module: nn.Module = self.module
        with self.kept(mode):
            type(module).train(module, mode)
        return module

    def init_weights(self) -> None:
        """Initialise the module; what is new, and no checkpoint filled, in its own way."""
        # MMEngine initialises a module once; so are the layers, which may be trained by then.
        again = getattr(self.module, "is_init", False)
        type(self.module).init_weights(self.module)
        for name, layer in self.layers.items():
            if again or self.start_of(name).filled:
                continue
            if isinstance(layer, AttentionConv2d):
                layer.reset_attention()
            elif isinstance(layer, Plugin):
                layer.init_weights()

    def _identities(self) -> dict[str, str]:
        """Return the plug-ins that begin as the identity, as no checkpoint filled them."""
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
        self._given = {name: tuple(getattr(value, "shape", ())) for name, value in given.items()}
        if given:
            noted = metadata.get(ON_BATCHES)
            noted = noted if isinstance(noted, list) else []
            self._on_batches = {name for name in noted if isinstance(name, str)}
        for name, layer in self.layers.items():
            if not isinstance(layer, WarmStartable):
                found = matching(layer, state_dict, f"{prefix}{name}.")
                self._filled[name] = self.start_of(name).filled | found

    def _after_load(self, module: nn.Module, incompatible: Any) -> None:
        given, self._given = self._given, {}
        if not (given and self.layers):
            return
        report = StartReport.of(module, self.layers.values(), given, self._identities())
        print_log(str(report), logger="current")
        allowed = self.strict_start if isinstance(self.strict_start, str) else r"(?!)"
        skipped = [key for key in report.skipped if not re.fullmatch(allowed, key)]
        if self.strict_start and skipped:
            raise WarmStartError(
                f"strict_start={self.strict_start!r}: {len(skipped)} keys of the checkpoint go "
                f"nowhere in {type(module).__name__}: {', '.join(skipped)}. A pattern, as in "
                "strict_start=r'fc\\..*', names keys that may"
            )


def new_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full name and the layer, for each that Retrofit and its kin put into a model.

    Example:
        >>> list(new_layers(nn.Conv2d(3, 3, 3)))
        []
    """
    for prefix, module in model.named_modules():
        record = getattr(module, "new_layers", None)
        if isinstance(record, NewLayers):
            for name, layer in record.layers.items():
                yield f"{prefix}.{name}" if prefix else name, layer
