"""The layers of a module that its plain checkpoint knows nothing of: trained, and reported.

MMDetection's ``frozen_stages`` and ``norm_eval`` go by position. What stands there anew must not be
held at values that nobody trained: parameters that no checkpoint filled stay trainable, and norms
without statistics from one use those of the batch.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log
from torch import nn

from rfa_mmdet.layers.conv.base import AttentionConv2d
from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import Start, WarmStartError, matching


@dataclass(frozen=True)
class StartReport:
    """What a checkpoint gave a module with new layers.

    Attributes:
        module (str): Name of its class.
        loaded (int): Keys that were taken as they are.
        warm_started (dict[str, str]): Layer to the class of it, of those that were made from a
            plain convolution.
        taken (int): Keys of these plain convolutions.
        new (tuple[str, ...]): The module's keys that the checkpoint does not fill.
        skipped (dict[str, str]): The checkpoint's keys that go nowhere, and why, if there is
            more to say than that the module has no such key.
    """

    module: str
    loaded: int
    warm_started: dict[str, str]
    taken: int
    new: tuple[str, ...]
    skipped: dict[str, str]

    @classmethod
    def of(
        cls, module: nn.Module, layers: Iterable[nn.Module], given: dict[str, tuple]
    ) -> "StartReport":
        """Compare a module, after the load, with what it was given.

        Args:
            module (nn.Module): That holds the layers.
            layers (Iterable[nn.Module]): What is new in it.
            given (dict[str, tuple]): Keys of the checkpoint for ``module``, and their shapes.
        """
        own = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        loaded = {key for key in given if key in own}
        skipped = {
            key: f"shape {given[key]}, here {own[key]}" for key in loaded if given[key] != own[key]
        }
        loaded -= skipped.keys()
        covered, warm, taken = set(loaded), {}, 0
        layers = set(layers)
        for name, layer in module.named_modules(remove_duplicate=False):
            start = getattr(layer, "start", Start()) if layer in layers else Start()
            if start.refused and f"{name}.weight" in given:
                skipped[f"{name}.weight"] = start.refused
            plain = {f"{name}.{key}" for key in start.plain}
            if plain and plain <= given.keys():
                warm[name] = type(layer).__name__
                taken += len(plain)
                covered |= plain | {f"{name}.{key}" for key in _own_keys(layer, layers)}
            published = {f"{name}.{theirs}": f"{name}.{ours}" for theirs, ours in _published(layer)}
            renamed = published.keys() & given.keys() - loaded
            loaded |= renamed
            covered |= renamed | {published[key] for key in renamed}
        skipped |= {key: "" for key in given if key not in covered and key not in skipped}
        # A file without this count, as of old PyTorch, is none the worse.
        new = [key for key in own if key not in covered and not key.endswith("num_batches_tracked")]
        return cls(type(module).__name__, len(loaded), warm, taken, tuple(new), skipped)

    def __str__(self) -> str:
        """Write the report: a line for each kind of key, or one where all is as it was."""
        if not (self.warm_started or self.new or self.skipped):
            return f"{self.module}, from its checkpoint: all {self.loaded} keys"
        kinds = ", ".join(sorted(set(self.warm_started.values())))
        skipped = [f"{key} ({why})" if why else key for key, why in self.skipped.items()]
        return "\n".join(
            [
                f"{self.module}, from its checkpoint:",
                f"  loaded        {self.loaded} keys as they are",
                f"  warm-started  {self.taken} keys, for {len(self.warm_started)} layers"
                f"{f' ({kinds})' if kinds else ''}{_listed(self.warm_started)}",
                f"  new           {len(self.new)} keys{_listed(self.new)}",
                f"  skipped       {len(self.skipped)} keys of the checkpoint{_listed(skipped)}",
            ]
        )


def _own_keys(layer: nn.Module, layers: set[nn.Module]) -> list[str]:
    """Return a layer's keys, less those of another new layer in it."""
    inner = [f"{name}." for name, child in layer.named_modules() if name and child in layers]
    return [key for key in layer.state_dict() if not key.startswith(tuple(inner))]


def _published(layer: nn.Module) -> Iterable[tuple[str, str]]:
    name = layer.published_name() if isinstance(layer, AttentionConv2d) else ""
    return PUBLISHED.get(name, {}).items()


def _listed(names: Iterable[str], limit: int = 100) -> str:
    names = list(names)
    if not names:
        return ""
    shown = names if len(names) <= limit else [*names[:limit], f"and {len(names) - limit} more"]
    return f": {', '.join(shown)}"


class NewLayers:
    """Keeps the new layers of a module trained, and reports what each checkpoint gave them.

    Attaches itself to the module: as ``new_layers``, around ``train`` and ``init_weights``, and to
    its loading.

    Args:
        module (nn.Module): That holds the layers.
        layers (dict[str, nn.Module]): Them, by name in ``module``.
        strict_start (bool | str): Whether a checkpoint's keys that go nowhere are an error; a
            regular expression names those that may be left out.

    Raises:
        TypeError, ValueError: ``strict_start`` is not as above.
    """

    def __init__(
        self, module: nn.Module, layers: dict[str, nn.Module], strict_start: bool | str = False
    ) -> None:
        if not isinstance(strict_start, (bool, str)):
            raise TypeError(f"strict_start={strict_start!r}: must be a bool or a pattern")
        try:
            re.compile(strict_start if isinstance(strict_start, str) else "")
        except re.error as error:
            raise ValueError(
                f"strict_start={strict_start!r} is no regular expression: {error}"
            ) from error
        self.module = module
        self.layers = dict(layers)
        self.strict_start = strict_start
        self._given: dict[str, tuple] = {}
        before = getattr(module, "new_layers", None)
        if before is not None:  # edited twice: one report of both
            before.layers.update(self.layers)
            before.strict_start = strict_start or before.strict_start
            return
        module.new_layers = self
        # On the instance, so that the module's type stays what it was.
        module.train = self.train
        if hasattr(module, "init_weights"):
            module.init_weights = self.init_weights
        module._register_load_state_dict_pre_hook(self._before_load)
        module.register_load_state_dict_post_hook(self._after_load)

    def unfilled(self) -> Iterator[tuple[str, nn.Module, set[str]]]:
        """Yield name, layer, and the layer's names that no checkpoint filled, for each."""
        for name, layer in self.layers.items():
            start = getattr(layer, "start", Start())
            yield name, layer, set(layer.state_dict()) - start.filled

    @contextmanager
    def kept(self, mode: bool) -> Iterator[None]:
        """Let the module freeze inside, and take back what it must not.

        Args:
            mode (bool): Whether the module trains.
        """
        trained = {p: p.requires_grad for layer in self.layers.values() for p in layer.parameters()}
        yield
        for _, layer, unfilled in self.unfilled():
            for name, parameter in layer.named_parameters():
                if name in unfilled:
                    parameter.requires_grad_(trained[parameter])
            for name, child in layer.named_modules():
                prefix = f"{name}." if name else ""
                statistics = prefix + "running_mean"
                own = unfilled & {prefix + key for key in child.state_dict()}
                is_norm = statistics in layer.state_dict()
                if (statistics in unfilled) if is_norm else own:
                    child.training = mode

    def train(self, mode: bool = True) -> nn.Module:
        """Switch the mode of the module; what is new follows even where the rest is held."""
        with self.kept(mode):
            type(self.module).train(self.module, mode)
        return self.module

    def init_weights(self) -> None:
        """Initialise the module; what is new, and no checkpoint filled, in its own way."""
        # MMEngine initialises a module once; so are the layers, which may be trained by then.
        again = getattr(self.module, "is_init", False)
        type(self.module).init_weights(self.module)
        for layer in self.layers.values():
            if isinstance(layer, AttentionConv2d) and not (again or layer.start.filled):
                layer.reset_attention()

    def _before_load(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        self._given = {name: tuple(getattr(value, "shape", ())) for name, value in given.items()}
        for name, layer in self.layers.items():
            if not isinstance(layer, AttentionConv2d):  # which know by themselves
                found = matching(layer, state_dict, f"{prefix}{name}.")
                layer.start = Start(getattr(layer, "start", Start()).filled | found)

    def _after_load(self, module: nn.Module, incompatible: Any) -> None:
        given, self._given = self._given, {}
        if not (given and self.layers):
            return
        report = StartReport.of(module, self.layers.values(), given)
        print_log(str(report), logger="current")
        allowed = self.strict_start if isinstance(self.strict_start, str) else r"(?!)"
        skipped = [key for key in report.skipped if not re.fullmatch(allowed, key)]
        if self.strict_start and skipped:
            raise WarmStartError(
                f"strict_start={self.strict_start!r}: {len(skipped)} keys of the checkpoint go "
                f"nowhere in {type(module).__name__}: {', '.join(skipped)}. A pattern, as in "
                "strict_start=r'fc\\..*', names keys that may"
            )
