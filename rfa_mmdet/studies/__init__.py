"""Methods compared over seeds: the runs, their record, and the report.

``spec`` reads what is to be compared, ``folders`` knows what each run has left, ``execute`` does
one run, ``local`` and ``slurm`` do all, ``costs`` measures the methods, ``results`` gathers
everything into one dict, and ``summary``, ``tables``, ``plots``, ``samples`` and ``page`` show it.
"""

from rfa_mmdet.studies.execute import execute
from rfa_mmdet.studies.local import run_all
from rfa_mmdet.studies.report import write_report
from rfa_mmdet.studies.slurm import submit
from rfa_mmdet.studies.spec import Run, Spec, load_spec

__all__ = ["Run", "Spec", "execute", "load_spec", "run_all", "submit", "write_report"]
