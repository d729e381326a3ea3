"""Train and test methods over several seeds, and report whether their differences are significant.

Run it again with the same arguments to resume: finished runs are skipped, interrupted runs resume
from their last checkpoint. The spec is a config file; see configs/ablation/shapes.py.
"""

import signal
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.cli.command_line import user_errors, within
from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.studies import (
    Run,
    Study,
    execute,
    load_study,
    run_all,
    submit,
    take_runs,
    write_report,
)
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
    add("spec", help="config file that defines the study")
    add("--work-dir", help="output folder; default: work_dirs/ablation_<spec name>")
    add("--jobs", type=within(1), metavar="N", help="number of parallel runs, spread over the GPUs")
    add(
        "--take",
        metavar="JSON",
        help="first take the finished runs of a results.json that have a config of this study, "
        "e.g. from another machine; their checkpoints are not in it",
    )
    add("--slurm-args", nargs="+", default=[], metavar="ARG",
        help="sbatch options without leading dashes, e.g. gres=gpu:1 time=8:00:00")  # fmt: skip
    add = parser.add_mutually_exclusive_group().add_argument
    add("--list", action="store_true", help="list the runs and their state, then exit")
    add("--run", type=int, metavar="I", help="execute only run I of --list; write no report")
    add("--report-only", action="store_true", help="only write the report of the finished runs")
    add("--slurm", metavar="PARTITION",
        help="submit job arrays to Slurm; without sbatch, only write the scripts")  # fmt: skip
    args = parser.parse_args()
    if args.jobs is not None and (args.list or args.report_only or args.run is not None):
        parser.error("--jobs: has no effect with --list, --run or --report-only")
    if args.slurm_args and args.slurm is None:
        parser.error("--slurm-args: needs --slurm")
    return args


def main() -> None:
    """Run the command line."""
    args = parse_args()
    with user_errors():
        study = load_study(args.spec, args.work_dir)
        if args.take:
            taken = take_runs(study, args.take)
            print(f"finished runs taken from {printable(args.take)}: {len(taken)}")
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
    """Execute one run."""
    runs = study.runs()
    if not 0 <= number < len(runs):
        raise ConfigError(f"--run {number}: must be between 0 and {len(runs) - 1}; see --list")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the child process too
    try:
        execute(study, runs[number])
    except RunFailed as error:
        raise UserError(f"{runs[number]}: {error}") from error


def run_the_rest(study: Study, jobs: int) -> dict[Run, str]:
    """Execute the remaining runs and print their progress; return the errors of failed runs."""

    def tell(run: Run, state: str) -> None:
        console.print(
            Text(f"{run}: {printable(state)}"), style="red" if state.startswith("failed") else None
        )

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the child processes too
    try:
        return run_all(study, jobs, tell)
    except KeyboardInterrupt:
        print("run the same command again to resume", file=sys.stderr)
        raise


def submit_all(study: Study, args: Namespace) -> None:
    """Submit the remaining runs to Slurm."""
    arguments = [args.spec, "--work-dir", str(study.work_dir)]
    options = [f"--{argument.lstrip('-')}" for argument in args.slurm_args]
    scripts, numbers = submit(study, arguments, args.slurm, args.jobs, options)
    for script in scripts:
        print(f"wrote {printable(script)}")
    if numbers:
        where = printable(study.work_dir)
        print(f"submitted jobs {', '.join(numbers)}; the report will be in {where}")
    else:
        console.print(
            "sbatch not found; submit the scripts in this order, each one after the first with"
        )
        console.print("  sbatch --dependency=afterany:<job ID of the previous script> <script>")


def print_report(study: Study, summary: pd.DataFrame) -> None:
    """Print the columns that fit into a terminal, and the paths of the report."""
    columns = [column for column in COLUMNS if column.title in SHOWN]
    for stage, rows in summary.groupby("stage", sort=False):
        table = Table(title=Text(printable(f"{stage}: {study.metric}")))
        for column in columns:
            justify: Any = "left" if column.is_text else "right"
            is_method = column.title == "method"
            table.add_column(column.title, justify=justify, no_wrap=not is_method, overflow="fold")
        for row in records(rows):
            table.add_row(*(Text(column.text(row)) for column in columns))
        console.print(table)
    for name in ("report.html", "table.md", "table.csv", "results.json"):
        print(f"  {printable(study.work_dir / name)}")
