"""Compare methods over several seeds.

Data flows one way: ``study`` reads the spec; ``local`` and ``slurm`` start the runs, each with
``execute`` in its own folder (``run``); ``taken`` fills folders with runs of another machine;
``costs`` and ``samples`` use the finished detectors; ``results`` collects everything in
results.json; ``summary`` turns that into one table for ``tables``, ``plots`` and ``report``.
"""

from rfa_mmdet.studies.execute import execute
from rfa_mmdet.studies.local import run_all
from rfa_mmdet.studies.report import write_report
from rfa_mmdet.studies.run import Run
from rfa_mmdet.studies.slurm import submit
from rfa_mmdet.studies.study import Study, load_study
from rfa_mmdet.studies.taken import take_runs

__all__ = [
    "Run",
    "Study",
    "execute",
    "load_study",
    "run_all",
    "submit",
    "take_runs",
    "write_report",
]
