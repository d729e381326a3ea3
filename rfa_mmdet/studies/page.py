"""The report as one HTML file that needs nothing beside it: no network, no other file."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rfa_mmdet.studies.summary import LEVEL, Row
from rfa_mmdet.studies.tables import cells, with_deviation

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --shade: #f4f6f8; --accent: #0b5cad; }
body { margin: 0 auto; max-width: 1240px; padding: 2rem 1.5rem 4rem; color: var(--ink);
  background: #fff; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.6rem 0 .6rem; font-size: 1.25rem; }
p { max-width: 75ch; } p.soft, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .35rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; font-size: .85rem; }
th { font-weight: 600; background: var(--shade); vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; white-space: normal; }
th button { all: unset; cursor: pointer; } th button:hover { color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th button::after { content: "\\a0\\2195"; color: #aab3bf; }
th[aria-sort=ascending] button::after { content: "\\a0\\2191"; color: var(--accent); }
th[aria-sort=descending] button::after { content: "\\a0\\2193"; color: var(--accent); }
tr.baseline td { background: #fbf7ea; }
.better { color: #146c2e; font-weight: 600; } .worse { color: #a4262c; font-weight: 600; }
img { max-width: 100%; height: auto; display: block; } figure { margin: 1rem 0; }
table.samples { width: auto; table-layout: fixed; }
table.samples td { padding: .2rem; border: 0; } table.samples th { text-align: center; }
table.samples img { width: 300px; max-width: none; }
pre { background: var(--shade); padding: .8rem; overflow-x: auto; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("table.sortable th button"))
  button.addEventListener("click", () => {
    const header = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = header.cellIndex;
    const down = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value;
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");  // unknown ones last, both ways
      const by = header.classList.contains("text") ? x.localeCompare(y) : Number(x) - Number(y);
      return down ? -by : by;
    };
    body.append(...Array.from(body.rows).sort(order));
  });
"""

# What a column is sorted by; words where it is not a number.
_KEYS = {
    "seeds": lambda row: row.finished,
    "test": lambda row: row.mean,
    "difference": lambda row: row.compared.difference,
    "p": lambda row: row.compared.p,
    "validation": lambda row: row.val_mean,
    "parameters": lambda row: row.parameters,
    "GFLOPs": lambda row: row.flops,
    "ms an image": lambda row: row.image_seconds,
    "ms an iteration": lambda row: row.iteration_seconds,
    "MB in training": lambda row: row.memory_mb,
}
_WORDS = {"method": lambda row: row.method, "verdict": lambda row: row.compared.verdict}


def page(
    results: dict[str, Any],
    rows: Sequence[Row],
    pictures: Mapping[str, Sequence[Path]],
    columns: Sequence[str],
    samples: Sequence[Sequence[Path]],
    caption: str,
) -> str:
    """Return the report as HTML.

    Args:
        results (dict): Of the comparison.
        rows (Sequence[Row]): Its summary.
        pictures (Mapping[str, Sequence[Path]]): Plots of each stage, PNG.
        columns (Sequence[str]): Titles of the samples.
        samples (Sequence[Sequence[Path]]): JPEGs of each sampled image, one a column.
        caption (str): Of the samples.
    """
    title = f"Ablation: {results['name']}"
    parts = [f"<h1>{escape(title)}</h1>", *_introduction(results)]
    for stage in results["stages"]:
        name = stage["name"]
        mine = [row for row in rows if row.stage == name]
        parts.append(f"<h2>{escape(_heading(stage, results))}</h2>")
        parts += [f"<p>{escape(_sentence(mine))}</p>", _table(mine)]
        parts += [_figure(path, f"{path.stem} of {name}") for path in pictures.get(name, ())]
    if samples:
        parts += ["<h2>Detections</h2>", f"<p class=soft>{escape(caption)}</p>"]
        head = "".join(f"<th>{escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td>{_image(path, f'{column}, image {i}')}</td>"
                for column, path in zip(columns, paths, strict=True)
            )
            + "</tr>"
            for i, paths in enumerate(samples, 1)
        )
        parts.append(
            f"<div class=scroll><table class=samples><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div>"
        )
    parts += _runs(results)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An icon of its own, or a browser asks a server for one.
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _introduction(results: dict[str, Any]) -> list[str]:
    runs = results["runs"]
    done = sum(run["state"] == "finished" for run in runs)
    costs = results["costs"]
    measured = ""
    if costs.get("methods"):
        height, width = costs["image_size"]
        where = costs["machine"]["gpu"]
        if where is None:
            threads = f"{costs['threads']} thread{'s' if costs['threads'] > 1 else ''}"
            where = f"{costs['machine']['cpu']}, {costs['machine']['cores']} cores, {threads}"
        versions = ", ".join(f"{name} {version}" for name, version in costs["versions"].items())
        measured = (
            f" GFLOPs (a multiply-add counted once) and the time an image are of {height} x "
            f"{width} pixels, one image at a time with post-processing; an iteration trains with "
            f"{costs['train_batch']} images. The times are medians without loading, of all methods "
            f"in turns on {where} ({versions})."
        )
    return [
        f"<p>{done} of {len(runs)} runs finished. Compared is <b>{escape(results['metric'])}</b> "
        f"of the test with the {results['checkpoint']} checkpoint: mean and standard deviation "
        f"over the seeds, and the mean difference from <b>{escape(results['baseline'])}</b>, seed "
        "by seed. Under one seed all methods see the same images in the same order.</p>",
        f"<p class=soft>“better” and “worse”: a paired t-test over the seeds gives p &lt; {LEVEL}; "
        "else the difference is within the spread. Of twenty methods that change nothing, one is "
        f"expected to pass by chance.{escape(measured)} Memory in training is the most that "
        f"a run of the method has taken.</p>",
    ]


def _heading(stage: dict, results: dict[str, Any]) -> str:
    if stage["load_from"] is None:
        return f"Stage {stage['name']}"
    return f"Stage {stage['name']}: started from {results['baseline']} of {stage['load_from']}"


def _sentence(rows: Sequence[Row]) -> str:
    known = [row for row in rows if row.mean is not None]
    if not known:
        return "No run of this stage is finished."
    best = max(known, key=lambda row: row.mean)
    text = f"The highest mean has {best.method}, {with_deviation(best.mean, best.deviation)}"
    if best.is_baseline:
        return f"{text}: the baseline."
    verdict = best.compared.verdict
    if not verdict:
        return f"{text}; the baseline is not finished."
    about = {
        "better": "which exceeds the spread",
        "worse": "over the seeds that both have",
        "within the spread": "which is within the spread",
        "cannot be tested": "which cannot be tested with fewer than 3 seeds",
    }
    return f"{text}, {best.compared.difference:+.4f} from the baseline, {about[verdict]}."


def _table(rows: Sequence[Row]) -> str:
    head = body = ""
    for title in cells(rows[0]):
        kind = " class=text" if title in _WORDS else ""
        head += f'<th{kind} scope="col"><button type="button">{escape(title)}</button></th>'
    for row in rows:
        line = ""
        for title, text in cells(row).items():
            value = {**_KEYS, **_WORDS}[title](row)
            kind = " class=text" if title in _WORDS else ""
            if title == "verdict" and text in ("better", "worse"):
                kind = f' class="text {text}"'
            data = "" if value is None else escape(str(value), quote=True)
            line += f'<td{kind} data-value="{data}">{escape(text)}</td>'
        body += f"<tr{' class=baseline' if row.is_baseline else ''}>{line}</tr>\n"
    return (
        f"<div class=scroll><table class=sortable><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
    )


def _runs(results: dict[str, Any]) -> list[str]:
    parts = []
    failed = [run for run in results["runs"] if run["state"] == "failed"]
    if failed:
        lines = [f"{r['stage']}/{r['method']}/seed{r['seed']}: {r['error']}" for r in failed]
        parts += ["<h2>Failed runs</h2>", f"<pre>{escape(chr(10).join(lines))}</pre>"]
    seeds = sorted({run["seed"] for run in results["runs"]})
    head = "".join(f"<th>seed {seed}</th>" for seed in seeds)
    body = ""
    for stage in results["stages"]:
        for method in stage["methods"]:
            mine = {
                run["seed"]: run
                for run in results["runs"]
                if (run["stage"], run["method"]) == (stage["name"], method)
            }
            values = (_value(mine.get(seed)) for seed in seeds)
            line = "".join(f"<td>{value}</td>" for value in values)
            names = f"<td class=text>{escape(stage['name'])}</td><td class=text>{escape(method)}"
            body += f"<tr>{names}</td>{line}</tr>\n"
    return [
        *parts,
        "<h2>Every run</h2>",
        f"<div class=scroll><table><thead><tr><th class=text>stage</th><th class=text>method</th>"
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>",
    ]


def _value(run: dict | None) -> str:
    if run is None:
        return ""
    known = run["state"] == "finished" and run["test"] is not None
    return f"{run['test']:.4f}" if known else escape(run["state"])


def _figure(path: Path, alt: str) -> str:
    return f"<figure>{_image(path, alt)}</figure>"


def _image(path: Path, alt: str) -> str:
    kind = {".png": "png", ".jpg": "jpeg"}[path.suffix]
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/{kind};base64,{data}">'
