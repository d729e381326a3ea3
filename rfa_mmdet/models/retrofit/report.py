"""Report how a checkpoint was loaded into a module with new layers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import Start, WarmStartable


@dataclass(frozen=True)
class StartReport:
    """How a checkpoint was loaded into a module with new layers.

    Attributes:
        module (str): Name of the module's class.
        loaded (int): Number of keys loaded unchanged.
        warm_started (dict[str, str]): Name -> class of layers started from a plain convolution.
        taken (int): Number of keys of these plain convolutions.
        identity (dict[str, str]): Name -> class of plug-ins that start as the identity.
        new (tuple[str, ...]): Keys of the module that are not in the checkpoint.
        skipped (dict[str, str]): Unused keys of the checkpoint -> reason; '' if the module has no
            such key.
        checkpoint (bool): Whether the values come from a checkpoint, or else from the module
            itself before it was edited.
    """

    module: str
    loaded: int
    warm_started: dict[str, str]
    taken: int
    identity: dict[str, str]
    new: tuple[str, ...]
    skipped: dict[str, str]
    checkpoint: bool

    @classmethod
    def of(
        cls,
        module: nn.Module,
        layers: Iterable[nn.Module],
        given: dict[str, tuple[int, ...]],
        identity: dict[str, str],
        checkpoint: bool,
    ) -> "StartReport":
        """Compare a module after loading with the checkpoint.

        Args:
            module (nn.Module): The module with new layers.
            layers (Iterable[nn.Module]): The new layers.
            given (dict[str, tuple[int, ...]]): Keys of the checkpoint for ``module`` -> shapes.
            identity (dict[str, str]): See the attribute.
            checkpoint (bool): See the attribute.
        """
        own = shapes(module.state_dict())
        loaded = {key for key in given if key in own}
        skipped = {
            key: f"shape {given[key]} instead of {own[key]}"
            for key in loaded
            if given[key] != own[key]
        }
        loaded -= skipped.keys()
        covered, warm, taken = set(loaded), {}, 0
        layers = set(layers)
        for name, layer in module.named_modules(remove_duplicate=False):
            known = isinstance(layer, WarmStartable) and layer in layers
            start = layer.start if known else Start()
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
        # Files from old PyTorch versions lack this count, which does not matter.
        new = [key for key in own if key not in covered and not key.endswith("num_batches_tracked")]
        kind = type(module).__name__
        return cls(kind, len(loaded), warm, taken, identity, tuple(new), skipped, checkpoint)

    def __str__(self) -> str:
        """Format the report: one line if everything was loaded, else one line per kind of key."""
        if self.checkpoint and not (self.warm_started or self.new or self.skipped):
            return f"{self.module}: loaded all {self.loaded} keys of the checkpoint"
        if self.checkpoint:
            origin, of_it = "loaded from a checkpoint", " of the checkpoint"
        else:
            origin, of_it = "retrofitted with its own weights", ""
        skipped = [f"{key} ({why})" if why else key for key, why in self.skipped.items()]
        lines = [
            f"{self.module}, {origin}:",
            f"  loaded        {self.loaded} keys unchanged",
            f"  warm-started  {len(self.warm_started)} layers from {self.taken} keys"
            f"{_named(self.warm_started)}",
            f"  new           {len(self.new)} keys{_listed(self.new)}",
            f"  skipped       {len(self.skipped)} keys{of_it}{_listed(skipped)}",
        ]
        if self.identity:
            lines[3:3] = [
                f"  identity      {len(self.identity)} plug-ins start as the identity"
                f"{_named(self.identity)}"
            ]
        return "\n".join(lines)


def shapes(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each value in a state dict; () if it has none, as in a lazy module.

    Example:
        >>> shapes(nn.Linear(3, 2).state_dict())
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {
        key: () if is_lazy(value) else tuple(getattr(value, "shape", ()))
        for key, value in state_dict.items()
    }


def _own_keys(layer: nn.Module, layers: set[nn.Module]) -> list[str]:
    """Return a layer's keys, without those of new layers inside it."""
    inner = [f"{name}." for name, child in layer.named_modules() if name and child in layers]
    return [key for key in layer.state_dict() if not key.startswith(tuple(inner))]


def _published(layer: nn.Module) -> Iterable[tuple[str, str]]:
    name = layer.published_name() if isinstance(layer, WarmStartable) else ""
    return PUBLISHED.get(name, {}).items()


def _named(layers: dict[str, str]) -> str:
    """List the classes of layers, then the layers."""
    return f" ({', '.join(sorted(set(layers.values())))}){_listed(layers)}" if layers else ""


def _listed(names: Iterable[str], limit: int = 100) -> str:
    names = list(names)
    if not names:
        return ""
    shown = names if len(names) <= limit else [*names[:limit], f"and {len(names) - limit} more"]
    return f": {', '.join(shown)}"
