"""Train and test methods over several seeds, and report what their differences are worth.

Run it again with the same arguments to resume: finished runs are skipped, interrupted ones continue
from their last checkpoint. The spec is a config file, see configs/ablation/shapes.py.
"""

import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.studies import Run, Study, execute, load_study, run_all, submit, write_report
from rfa_mmdet.studies.execute import RunFailed
from rfa_mmdet.studies.results import read_run
from rfa_mmdet.studies.tables import COLUMNS, records
from rfa_mmdet.texts import printable

SHOWN = ("method", "test", "difference (95 %)", "p (Holm)", "verdict")
console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example, after make demo:\n  python tools/ablate.py configs/ablation/shapes.py",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("spec", help="config file that says what to compare")
    add("--work-dir", help="where to write; default: work_dirs/ablation_<spec name>")
    add("--jobs", type=int, metavar="N", help="runs at a time, on the GPUs in turn")
    add("--slurm-args", nargs="+", default=[], metavar="ARG",
        help="options for sbatch, without dashes, such as gres=gpu:1 time=8:00:00")  # fmt: skip
    add = parser.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="only list the runs and their state")
    add("--run", type=int, metavar="I", help="only do run I of --list, without a report")
    add("--report-only", action="store_true", help="only write the report of what is finished")
    add("--slurm", metavar="PARTITION", help="submit job arrays to Slurm, or write their scripts")
    args = parser.parse_args()
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def main() -> None:
    """Do what the arguments say."""
    args = parse_args()
    with user_errors():
        study = load_study(args.spec, args.work_dir)
        if args.list:
            for i, run in enumerate(study.runs()):
                print(f"{i:4d}  {run}  {read_run(study, run)['state']}")
        elif args.run is not None:
            run_one(study, args.run)
        elif args.slurm is not None:
            submit_all(study, args)
        else:
            failed = {} if args.report_only else run_the_rest(study, args.jobs or 1)
            print_report(study, write_report(study))
            if failed:
                console.print(f"{len(failed)} of {len(study.runs())} runs failed:", style="red")
                for run, error in failed.items():
                    print(f"  {run}: {printable(error)}")
                sys.exit(1)


def run_one(study: Study, number: int) -> None:
    """Do one run."""
    runs = study.runs()
    if not 0 <= number < len(runs):
        raise ConfigError(f"--run {number}: must be one of 0 to {len(runs) - 1}, see --list")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the process too
    try:
        execute(study, runs[number])
    except RunFailed as error:
        raise UserError(f"{runs[number]}: {error}") from error


def run_the_rest(study: Study, jobs: int) -> dict[Run, str]:
    """Do all that is left, printing what becomes of it; return why runs failed."""

    def tell(run: Run, state: str) -> None:
        console.print(
            Text(f"{run}: {printable(state)}"), style="red" if state.startswith("failed") else None
        )

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the processes too
    try:
        return run_all(study, jobs, tell)
    except KeyboardInterrupt:
        print("run the same command again to resume", file=sys.stderr)
        raise


def submit_all(study: Study, args: Namespace) -> None:
    """Hand all that is left to Slurm."""
    arguments = [args.spec, "--work-dir", str(study.work_dir)]
    options = [f"--{argument.lstrip('-')}" for argument in args.slurm_args]
    scripts, numbers = submit(study, arguments, args.slurm, args.jobs, options)
    for script in scripts:
        print(f"wrote {printable(script)}")
    if numbers:
        where = printable(study.work_dir)
        print(f"submitted as {', '.join(numbers)}; the report will be in {where}")
    else:
        console.print(
            "there is no sbatch here; submit them in this order, each after the first with"
        )
        console.print("  sbatch --dependency=afterany:<job ID of the one before> <script>")


def print_report(study: Study, summary: pd.DataFrame) -> None:
    """Print what of the summary fits into a terminal, and where the report is."""
    columns = [column for column in COLUMNS if column.title in SHOWN]
    for stage, rows in summary.groupby("stage", sort=False):
        table = Table(title=Text(printable(f"{stage}: {study.metric}")))
        for column in columns:
            justify: Any = "left" if column.is_text else "right"
            table.add_column(column.title, justify=justify, no_wrap=column.title != "method")
        for row in records(rows):
            table.add_row(*(Text(column.text(row)) for column in columns))
        console.print(table)
    for name in ("report.html", "table.md", "table.csv", "results.json"):
        print(f"  {printable(study.work_dir / name)}")
