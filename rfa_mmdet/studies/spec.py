"""What is to be compared: a config file of its own kind.

    base = "../demo/some_config.py"      # below it, or mmdet::..., the config of every run
    methods = dict(                      # name: what it changes in base; the first is the baseline
        plain={"model.backbone.rfa": None},
        rfaconv=dict(),
    )
    seeds = (0, 1, 2)
    metric = "coco/bbox_mAP"

Optional are ``baseline`` (a method's name), ``options`` (changes of every run), ``checkpoint``
('last' or 'best': which one is tested), ``environment`` (variables that the base reads, where they
are not set), ``samples`` (images shown), and ``stages``, such as

    stages = dict(
        scratch=dict(),
        warm_start=dict(load_from="scratch", options={"train_cfg.max_epochs": 3}),
    )

where every run of ``warm_start`` begins with what the baseline's run of the same seed has ended
with in ``scratch`` (or its only run: ``methods`` and ``seeds`` of a stage limit it).
"""

import os
import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.hub import get_config

from rfa_mmdet.errors import ConfigError

_KEYS = {
    *("base", "methods", "baseline", "seeds", "metric", "options", "stages"),
    *("checkpoint", "environment", "samples"),
}
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Stage:
    """Runs that can be done in any order.

    Attributes:
        name (str): Of its folder.
        methods (tuple[str, ...]): Which are trained.
        seeds (tuple[int, ...]): With which seeds.
        options (dict): What every run of it changes, before the method does.
        load_from (str | None): An earlier stage whose runs of the baseline are started from.
    """

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict = field(default_factory=dict)
    load_from: str | None = None


@dataclass(frozen=True)
class Run:
    """One training and one test.

    Attributes:
        stage, method (str): Names.
        seed (int): Of all that is random.

    Example:
        >>> str(Run("scratch", "rfaconv", 1))
        'scratch/rfaconv/seed1'
    """

    stage: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.stage}/{self.method}/seed{self.seed}"


@dataclass(frozen=True)
class Spec:
    """What is compared; see the module.

    Attributes:
        name (str): The file's.
        base (Config): Of every run.
        methods (dict[str, dict]): Changes by name.
        baseline (str): A method.
        metric (str): Key of the metrics, such as 'coco/bbox_mAP'.
        stages (tuple[Stage, ...]): In the order in which they are done.
        checkpoint (str): 'last' or 'best'.
        samples (int): Images shown in the report.
    """

    name: str
    base: Config
    methods: dict[str, dict]
    baseline: str
    metric: str
    stages: tuple[Stage, ...]
    checkpoint: str = "last"
    samples: int = 4

    def stage(self, name: str) -> Stage:
        """Return a stage by name."""
        return next(stage for stage in self.stages if stage.name == name)

    def runs(self, stage: Stage | None = None) -> list[Run]:
        """Return the runs of a stage, or of all: seed by seed, to compare before all are done."""
        stages = self.stages if stage is None else (stage,)
        return [Run(s.name, m, seed) for s in stages for seed in s.seeds for m in s.methods]

    def source(self, run: Run) -> Run | None:
        """Return the run whose checkpoint a run starts from; None: from what the config says."""
        stage = self.stage(run.stage)
        if stage.load_from is None:
            return None
        seeds = self.stage(stage.load_from).seeds
        return Run(stage.load_from, self.baseline, run.seed if run.seed in seeds else seeds[0])

    def config(self, run: Run) -> Config:
        """Return the whole config of a run, but for its checkpoint to start from.

        Raises:
            ConfigError: The changes do not fit the base.
        """
        cfg = Config(self.base.to_dict())
        for who, options in (
            (f"stages.{run.stage}.options", self.stage(run.stage).options),
            (f"methods.{run.method}", self.methods[run.method]),
        ):
            try:
                cfg.merge_from_dict(_plain(options))
            except (KeyError, TypeError, AssertionError) as error:
                raise ConfigError(f"{who}: does not fit the base config: {error}") from error
        cfg.merge_from_dict({"randomness.seed": run.seed})
        cfg.pop("work_dir", None)
        return cfg


def load_spec(path: str | os.PathLike) -> Spec:
    """Read the file that says what is to be compared.

    Args:
        path (str | os.PathLike): See the module.

    Returns:
        Spec: Checked as far as can be without building a model.

    Raises:
        ConfigError: Something in it is missing or wrong.

    Example:
        >>> load_spec("no/such.py")
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: spec='no/such.py': no such file
    """
    path = Path(path)
    if not path.is_file():
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"spec={str(path)!r}: no such file{hint}")
    spec = _read(path, f"spec={str(path)!r}")
    for key in spec:
        near = get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        if key not in _KEYS and near:
            raise ConfigError(f"spec: {key!r} is read by nobody; nearest: {near[0]}")
    missing = [key for key in ("base", "methods", "metric") if key not in spec]
    if missing:
        raise ConfigError(f"spec={str(path)!r}: lacks {', '.join(missing)}")
    methods = _methods(spec)
    baseline = spec.get("baseline", next(iter(methods)))
    if baseline not in methods:
        raise ConfigError(f"baseline={baseline!r}: is none of methods={list(methods)}")
    seeds = _seeds("seeds", spec.get("seeds", (0, 1, 2)))
    checkpoint, samples = spec.get("checkpoint", "last"), spec.get("samples", 4)
    if checkpoint not in ("last", "best"):
        raise ConfigError(f"checkpoint={checkpoint!r}: must be 'last' or 'best'")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 0:
        raise ConfigError(f"samples={samples!r}: must be an int, at least 0")
    stages = _stages(spec, tuple(methods), baseline, seeds)
    for name, value in _plain(spec.get("environment", {})).items():
        os.environ.setdefault(name, str(value))
    base = _base(path, spec["base"])
    base.merge_from_dict(_plain(spec.get("options", {})))
    return Spec(
        path.stem, base, methods, baseline, str(spec["metric"]), stages, checkpoint, samples
    )


def _read(path: Path, name: str) -> Config:
    try:
        return Config.fromfile(path)
    except (ImportError, SyntaxError, ConfigParsingError, OSError, NameError) as error:
        raise ConfigError(f"{name}: {error}") from error


def _base(spec: Path, base: Any) -> Config:
    if "::" in str(base):
        try:
            return get_config(base)
        except (ValueError, OSError, KeyError) as error:
            raise ConfigError(f"base={base!r}: {error}") from error
    file = spec.parent / str(base)
    if not file.is_file():
        raise ConfigError(f"base={base!r}: no such file; it is looked for beside the spec: {file}")
    return _read(file, f"base={base!r}")


def _methods(spec: Config) -> dict[str, dict]:
    methods = spec.methods
    if not isinstance(methods, dict) or not methods:
        raise ConfigError(f"methods={methods!r}: must be a dict, name to changes, not empty")
    for name, changes in methods.items():
        _check_name("methods", name)
        if not isinstance(changes, dict):
            raise ConfigError(f"methods.{name}={changes!r}: must be a dict of changes to the base")
    return {name: _plain(changes) for name, changes in methods.items()}


def _stages(
    spec: Config, methods: tuple[str, ...], baseline: str, seeds: tuple[int, ...]
) -> tuple[Stage, ...]:
    given = spec.get("stages", dict(all=dict()))
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"stages={given!r}: must be a dict, name to what is special in it")
    stages: dict[str, Stage] = {}
    for name, stage in given.items():
        _check_name("stages", name)
        where = f"stages.{name}"
        wrong = set(stage) - {"methods", "seeds", "options", "load_from"}
        if wrong:
            raise ConfigError(
                f"{where}: {', '.join(sorted(wrong))}: a stage has methods, seeds, options and "
                "load_from"
            )
        own = tuple(stage.get("methods", methods))
        for method in own:
            if method not in methods:
                raise ConfigError(f"{where}.methods: {method!r} is none of {list(methods)}")
        source = stage.get("load_from")
        if source is not None and source not in stages:
            raise ConfigError(
                f"{where}.load_from={source!r}: is none of the earlier stages {list(stages)}"
            )
        if source is not None and baseline not in stages[source].methods:
            raise ConfigError(
                f"{where}.load_from={source!r}: does not train the baseline {baseline!r}"
            )
        stages[name] = Stage(
            name,
            own,
            _seeds(f"{where}.seeds", stage.get("seeds", seeds)),
            _plain(stage.get("options", {})),
            source,
        )
    return tuple(stages.values())


def _seeds(name: str, value: Any) -> tuple[int, ...]:
    whole = isinstance(value, (list, tuple)) and value
    if not whole or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
        raise ConfigError(f"{name}={value!r}: must be a list of ints, such as (0, 1, 2)")
    if len(set(value)) < len(value):
        raise ConfigError(f"{name}={value!r}: names a seed twice")
    return tuple(value)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{what}: {name!r} names folders: use letters, digits, '_', '-', '+' and '.' only"
        )


def _plain(value: Any) -> Any:
    """Return plain dicts, in place of MMEngine's, which read missing keys otherwise."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value
