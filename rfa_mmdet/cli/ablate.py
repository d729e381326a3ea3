"""Compare methods over several seeds: train and test each, and report what differences are worth.

Started again with the same arguments, it skips what is finished and goes on with what was broken
off. The spec is a config file: see configs/ablation/shapes.py.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.studies import Run, Spec, execute, load_spec, run_all, submit, write_report
from rfa_mmdet.studies.execute import RunFailed
from rfa_mmdet.studies.summary import Row
from rfa_mmdet.studies.tables import cells

TOOLS = Path(__file__).resolve().parent
SHOWN = ("method", "test", "difference", "p", "verdict")
console = Console(highlight=False, soft_wrap=True)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example, after make demo:\n  python tools/ablate.py configs/ablation/shapes.py",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("spec", help="config file that says what is compared")
    add("--work-dir", help="where to write; default: work_dirs/ablation_<spec name>")
    add("--jobs", type=int, metavar="N", help="runs at a time, each on the next GPU in turn")
    add("--list", action="store_true", help="list the runs, and what has become of them")
    add("--run", type=int, metavar="I", help="do only run I of --list, and write no report")
    add("--report-only", action="store_true", help="run nothing, write the report of what is there")
    add("--slurm", metavar="PARTITION", help="submit arrays to Slurm, or write their scripts")
    add(
        "--slurm-args",
        nargs="+",
        default=[],
        metavar="ARG",
        help="more for sbatch, without its dashes, such as gres=gpu:1 time=8:00:00",
    )
    args = parser.parse_args()
    if sum((args.run is not None, args.report_only, args.list, args.slurm is not None)) > 1:
        parser.error("give one of --run, --report-only, --list and --slurm")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    return args


def list_runs(spec: Spec, work_dir: Path) -> None:
    """Print all runs by number."""
    from rfa_mmdet.studies.results import read_run

    for i, run in enumerate(spec.runs()):
        console.print(f"{i:4d}  {run}  {read_run(spec, run, work_dir)['state']}")


def send(spec: Spec, work_dir: Path, args: Namespace) -> None:
    """Hand all that is left to Slurm."""
    command = [str(TOOLS / "ablate.py"), args.spec, "--work-dir", str(work_dir)]
    more = [f"--{argument.lstrip('-')}" for argument in args.slurm_args]
    scripts, numbers = submit(spec, work_dir, command, args.slurm, args.jobs, more)
    for script in scripts:
        console.print(f"wrote {script}")
    if numbers:
        console.print(f"submitted as {', '.join(numbers)}; the report will be {work_dir}")
    else:
        console.print(
            "there is no sbatch here; submit them one after another, each with "
            "--dependency=afterany:<the one before>"
        )


def print_rows(rows: list[Row], metric: str) -> None:
    """Print the summary, without what would not fit into a terminal's width."""
    for stage in dict.fromkeys(row.stage for row in rows):
        table = Table(title=f"{stage}: {metric}")
        for title in SHOWN:
            justify = "left" if title in ("method", "verdict") else "right"
            table.add_column(title, justify=justify, no_wrap=title != "method")
        for row in rows:
            if row.stage == stage:
                table.add_row(*(Text(cells(row)[title]) for title in SHOWN))
        console.print(table)


def report(spec: Spec, work_dir: Path) -> None:
    """Write the report, and print its table."""
    print_rows(write_report(spec, work_dir), spec.metric)
    for name in ("report.html", "table.md", "table.csv", "results.json"):
        console.print(f"  {work_dir / name}")


def say(run: Run, what: str) -> None:
    """Print what becomes of a run."""
    console.print(Text(f"{run}: {what}"), style="red" if what.startswith("failed") else None)


def main() -> None:
    """Do what the arguments say."""
    args = parse_args()
    with user_errors():
        spec = load_spec(args.spec)
        work_dir = Path(args.work_dir or Path("work_dirs", f"ablation_{spec.name}"))
        if args.list:
            return list_runs(spec, work_dir)
        if args.slurm is not None:
            return send(spec, work_dir, args)
        if args.report_only:
            return report(spec, work_dir)
        if args.run is not None:
            runs = spec.runs()
            if not 0 <= args.run < len(runs):
                raise ConfigError(f"--run {args.run}: there are runs 0 to {len(runs) - 1}")
            try:
                execute(spec, runs[args.run], work_dir, TOOLS)
            except RunFailed as error:
                raise ConfigError(f"{runs[args.run]}: {error}") from error
            return None
        try:
            failed = run_all(spec, work_dir, TOOLS, args.jobs or 1, say)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on from here")
        report(spec, work_dir)
    if failed:
        console.print(f"{len(failed)} of {len(spec.runs())} runs failed:", style="red")
        for run, error in failed.items():
            console.print(Text(f"  {run}: {error}"))
        sys.exit(1)
    return None
