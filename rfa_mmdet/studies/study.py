"""A study is defined by a config file, the spec.

    base = "../demo/some_config.py"  # config of every run: relative to the spec, or mmdet::...
    methods = dict(  # name -> changes to base; the first is the baseline
        plain={"model.backbone.rfa": None},
        rfaconv=dict(),
    )
    metric = "coco/bbox_mAP"  # of the test; higher is better

Optional: ``seeds`` (by default (0, 1, 2)), ``baseline`` (a method), ``options`` (changes for every
run), ``checkpoint`` (the one to test: 'last', the default, or 'best'), ``environment`` (defaults of
environment variables that the base reads), ``samples`` (number of test images in the report, by
default 4; 0 if the model is not a detector), and ``stages``, for example

    stages = dict(
        scratch=dict(),
        warm_start=dict(load_from="scratch", options={"train_cfg.max_epochs": 3}),
    )

``max_epochs`` does not change the base's schedule of the learning rate: shorten it as well. Each
run of ``warm_start`` starts from the baseline's run in ``scratch`` with the same seed, or else with
its first seed; with ``load_method="own"``, from the run of its own method there. A stage may have
its own ``methods`` and ``seeds``.
"""

import copy
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.hub import get_config

from rfa_mmdet.config.read import check_options
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.studies.run import Run

_NEEDED = ("base", "methods", "metric")
_KEYS = (*_NEEDED, "baseline", "checkpoint", "environment", "options", "samples", "seeds", "stages")
_STAGE_KEYS = ("methods", "seeds", "options", "load_from", "load_method")
_NAME = re.compile(r"(?!\.)[\w.+-]+")


@dataclass(frozen=True)
class Stage:
    """Runs that can be executed in any order."""

    name: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    options: dict  # changes for every run, applied before the method's
    load_from: str | None  # an earlier stage whose checkpoints the runs start from
    load_method: str = "baseline"  # or "own": of which method


@dataclass(frozen=True)
class Study:
    """A study as defined by its spec, and its work dir.

    Attributes:
        name (str): Stem of the spec's file name.
        work_dir (Path): Output folder.
        base (Config): Config of every run, with ``options`` applied.
        methods (dict[str, dict]): Method -> changes.
        baseline (str): Method that the others are compared with.
        metric (str): Key of the test's metrics, e.g. 'coco/bbox_mAP'.
        stages (dict[str, Stage]): Stages by name, in execution order.
        checkpoint (str): 'last' or 'best'.
        samples (int): Number of test images in the report.
    """

    name: str
    work_dir: Path
    base: Config
    methods: dict[str, dict]
    baseline: str
    metric: str
    stages: dict[str, Stage]
    checkpoint: str
    samples: int

    def runs(self, *stages: str) -> list[Run]:
        """Return the runs of some or all stages, seed by seed, to compare methods early."""
        own = [self.stages[name] for name in stages or self.stages]
        return [
            Run(self.work_dir, s.name, m, seed) for s in own for seed in s.seeds for m in s.methods
        ]

    def source(self, run: Run) -> Run | None:
        """Return the run whose checkpoint ``run`` starts from, if any."""
        stage = self.stages[run.stage]
        if stage.load_from is None:
            return None
        seeds = self.stages[stage.load_from].seeds
        seed = run.seed if run.seed in seeds else seeds[0]
        method = run.method if stage.load_method == "own" else self.baseline
        return Run(self.work_dir, stage.load_from, method, seed)

    def config(self, run: Run) -> Config:
        """Return the config of a run, without the checkpoint that it starts from.

        Raises:
            ConfigError: The changes do not fit the base.
        """
        cfg = Config(self.base.to_dict())
        _merge(cfg, f"stages.{run.stage}.options", self.stages[run.stage].options)
        _merge(cfg, f"methods.{run.method}", self.methods[run.method])
        cfg.merge_from_dict({"randomness.seed": run.seed})
        cfg.pop("work_dir", None)
        return cfg


def load_study(spec: str | os.PathLike, work_dir: str | os.PathLike | None = None) -> Study:
    """Read and check a spec.

    Args:
        spec (str | os.PathLike): The spec's file.
        work_dir (str | os.PathLike | None): Output folder. Defaults to None:
            work_dirs/ablation_<name of the spec>.

    Returns:
        Study: The study, checked as far as possible without building a model.

    Raises:
        ConfigError: An entry is missing or invalid.

    Example:
        >>> load_study("no/such.py")
        Traceback (most recent call last):
        rfa_mmdet.errors.ConfigError: spec='no/such.py': no such file
    """
    path = Path(spec)
    near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")])
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    _require(path.is_file(), f"spec={str(path)!r}: no such file{hint}")
    given = _read(path, f"spec={str(path)!r}").to_dict()
    for key in given.keys() - set(_KEYS):  # a variable of the file, unless misspelled
        near = get_close_matches(key, _KEYS, n=1, cutoff=0.8)
        _require(not near, f"spec: unknown key {key!r}; did you mean {''.join(near)}?")
    missing = [key for key in _NEEDED if key not in given]
    _require(not missing, f"spec={str(path)!r}: missing {', '.join(missing)}")
    methods = given["methods"]
    _check_named_dicts("methods", methods, "changes to the base")
    _require("truth" not in methods, "methods: 'truth' is reserved for the ground truth")
    baseline = given.get("baseline", next(iter(methods)))
    _require(baseline in methods, f"baseline={baseline!r}: must be one of {list(methods)}")
    which = given.get("checkpoint", "last")
    _require(which in ("last", "best"), f"checkpoint={which!r}: must be 'last' or 'best'")
    samples = given.get("samples", 4)
    _require(_is_count(samples), f"samples={samples!r}: must be an int, at least 0")
    stages = _stages(given, baseline)
    environment = given.get("environment", {})
    _require(isinstance(environment, dict), f"environment={environment!r}: must be a dict")
    for name, value in environment.items():
        os.environ.setdefault(name, str(value))
    base = _base(path, given["base"])
    _merge(base, "options", given.get("options", {}))
    work_dir = Path(work_dir or f"work_dirs/ablation_{path.stem}")
    metric = str(given["metric"])
    return Study(path.stem, work_dir, base, methods, baseline, metric, stages, which, samples)


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
    _require(file.is_file(), f"base={base!r}: no such file (relative to the spec: {file})")
    return _read(file, f"base={base!r}")


def _merge(cfg: Config, name: str, options: dict) -> None:
    dotted = isinstance(options, dict) and all(isinstance(key, str) for key in options)
    _require(dotted, f"{name}={options!r}: must be a dict of dotted keys")
    check_options(cfg, options, f"{name}:")
    try:
        cfg.merge_from_dict(copy.deepcopy(options))
    except (KeyError, TypeError, AssertionError) as error:
        raise ConfigError(f"{name}: does not fit the base config: {error}") from error


def _stages(spec: dict[str, Any], baseline: str) -> dict[str, Stage]:
    given = spec.get("stages", dict(all=dict()))
    _check_named_dicts("stages", given, "settings")
    _require("report" not in given, "stages: 'report' is reserved for the last job")
    known = list(spec["methods"])
    stages: dict[str, Stage] = {}
    for name, stage in given.items():
        where = f"stages.{name}"
        for key in stage:
            names = ", ".join(_STAGE_KEYS)
            _require(key in _STAGE_KEYS, f"{where}: unknown key {key!r}; choose from {names}")
        methods = tuple(stage.get("methods", known))
        for method in methods:
            _require(method in known, f"{where}.methods: {method!r} is not one of {known}")
        source, own = stage.get("load_from"), stage.get("load_method", "baseline")
        allowed = own in ("baseline", "own")
        _require(allowed, f"{where}.load_method={own!r}: must be 'baseline' or 'own'")
        if source is None:
            _require("load_method" not in stage, f"{where}.load_method={own!r}: needs load_from")
        else:
            what = f"{where}.load_from={source!r}:"
            _require(source in stages, f"{what} must be an earlier stage, one of {list(stages)}")
            for method in methods if own == "own" else (baseline,):
                trained = method in stages[source].methods
                _require(trained, f"{what} does not train {method!r}")
        given_as = f"{where}.seeds" if "seeds" in stage else "seeds"
        seeds = stage.get("seeds", spec.get("seeds", (0, 1, 2)))
        valid = isinstance(seeds, (list, tuple)) and bool(seeds) and all(map(_is_count, seeds))
        _require(valid, f"{given_as}={seeds!r}: must be a list of ints, e.g. (0, 1, 2)")
        _require(len(set(seeds)) == len(seeds), f"{given_as}={seeds!r}: seeds must be unique")
        options = stage.get("options", {})
        stages[name] = Stage(name, methods, tuple(seeds), options, source, own)
    return stages


def _check_named_dicts(what: str, value: Any, holds: str) -> None:
    valid = isinstance(value, dict) and bool(value)
    _require(valid, f"{what}={value!r}: must be a non-empty dict that maps names to {holds}")
    for name, one in value.items():
        valid = isinstance(name, str) and bool(_NAME.fullmatch(name))
        _require(valid, f"{what}: {name!r} names a folder; use only letters, digits and '_-+.'")
        _require(len(name.encode()) <= 200, f"{what}: {name!r} is too long to name a folder")
        _require(isinstance(one, dict), f"{what}.{name}={one!r}: must be a dict of {holds}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ConfigError(message)
