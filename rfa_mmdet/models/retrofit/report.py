"""What a checkpoint gave a module with new layers, key by key."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from rfa_mmdet.layers.warm_start.start import Start, WarmStartable


@dataclass(frozen=True)
class StartReport:
    """What a checkpoint gave a module with new layers.

    Attributes:
        module (str): Name of its class.
        loaded (int): Keys that were taken as they are.
        warm_started (dict[str, str]): Layer to the class of it, of those that were made from a
            plain convolution.
        taken (int): Keys of these plain convolutions.
        identity (dict[str, str]): Plug-in to the class of it, of those that change nothing until
            they are trained.
        new (tuple[str, ...]): The module's keys that the checkpoint does not fill.
        skipped (dict[str, str]): The checkpoint's keys that go nowhere, and why, if there is
            more to say than that the module has no such key.
    """

    module: str
    loaded: int
    warm_started: dict[str, str]
    taken: int
    identity: dict[str, str]
    new: tuple[str, ...]
    skipped: dict[str, str]

    @classmethod
    def of(
        cls,
        module: nn.Module,
        layers: Iterable[nn.Module],
        given: dict[str, tuple[int, ...]],
        identity: dict[str, str],
    ) -> "StartReport":
        """Compare a module, after the load, with what it was given.

        Args:
            module (nn.Module): That holds the layers.
            layers (Iterable[nn.Module]): What is new in it.
            given (dict[str, tuple[int, ...]]): Keys of the checkpoint for ``module``, with shapes.
            identity (dict[str, str]): As the attribute.
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
        # A file without this count, as of old PyTorch, is none the worse.
        new = [key for key in own if key not in covered and not key.endswith("num_batches_tracked")]
        kind = type(module).__name__
        return cls(kind, len(loaded), warm, taken, identity, tuple(new), skipped)

    def __str__(self) -> str:
        """Write the report: a line for each kind of key, or one where all is as it was."""
        if not (self.warm_started or self.new or self.skipped):
            return f"{self.module}, from its checkpoint: all {self.loaded} keys"
        skipped = [f"{key} ({why})" if why else key for key, why in self.skipped.items()]
        lines = [
            f"{self.module}, from its checkpoint:",
            f"  loaded        {self.loaded} keys as they are",
            f"  warm-started  {self.taken} keys, for {len(self.warm_started)} layers"
            f"{_named(self.warm_started)}",
            f"  new           {len(self.new)} keys{_listed(self.new)}",
            f"  skipped       {len(self.skipped)} keys of the checkpoint{_listed(skipped)}",
        ]
        if self.identity:
            lines[3:3] = [
                f"  identity      {len(self.identity)} plug-ins, until trained"
                f"{_named(self.identity)}"
            ]
        return "\n".join(lines)


def _own_keys(layer: nn.Module, layers: set[nn.Module]) -> list[str]:
    """Return a layer's keys, less those of another new layer in it."""
    inner = [f"{name}." for name, child in layer.named_modules() if name and child in layers]
    return [key for key in layer.state_dict() if not key.startswith(tuple(inner))]


def _published(layer: nn.Module) -> Iterable[tuple[str, str]]:
    name = layer.published_name() if isinstance(layer, WarmStartable) else ""
    return PUBLISHED.get(name, {}).items()


def _named(layers: dict[str, str]) -> str:
    """List layers behind their classes."""
    return f" ({', '.join(sorted(set(layers.values())))}){_listed(layers)}" if layers else ""


def _listed(names: Iterable[str], limit: int = 100) -> str:
    names = list(names)
    if not names:
        return ""
    shown = names if len(names) <= limit else [*names[:limit], f"and {len(names) - limit} more"]
    return f": {', '.join(shown)}"
