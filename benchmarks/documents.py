"""Update the numbers in README.md, README_zh-CN.md and docs/performance.md from committed results.

Only changes the parts of a page between two comments:

    <!-- numbers: speed -->
    <!-- /numbers -->

Copy the output of `time` in a fresh clone to benchmarks/durations.json manually;
`python tools/analysis/complexity.py --systems` writes benchmarks/systems.md.
"""

# ruff: noqa: RUF001 (Chinese has its own punctuation)

import json
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import report
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.summary import summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "README_zh-CN.md", "docs/performance.md")
BLOCK = re.compile(r"(?ms)^(<!-- numbers: (\w+) -->\n).*?^(?=<!-- /numbers -->$)")

GATED = ("RFCBAMConv", "RFCAConv")
BASELINES = ("CAMConv", "CBAMConv", "CAConv")  # of the RFAConv paper
# Study and stage -> title of a row in the READMEs; docs/results.md has all studies.
EVIDENCE = {
    ("shapes", "all"): "drawn shapes, from scratch, ten seeds",
    ("bccd_small", "scratch"): "BCCD blood cells, from scratch",
    ("bccd_small", "warm_start"): "BCCD blood cells, fine-tuned from plain",
    (
        "bccd_small_why",
        "augmented_twice",
    ): "BCCD blood cells, from scratch, more augmentation, 24 epochs",
    ("cards_small", "scratch"): "photographs of playing cards, from scratch",
}
MEASURED = (
    "Geometric means over {shapes} inputs: those of an R50-FPN, and small maps. Measured by "
    "`make bench` with {threads} threads on an {cpu}, torch {torch}, in float32 unless noted."
)
ON_GPU = (
    "On the H100 (`python -m benchmarks.run --device cuda`): {shapes} inputs of an R50-FPN for two "
    "images of 800 x 1333, torch {torch}, with TF32 in float32."
)
CHINESE = {
    ON_GPU: (
        "H100（`python -m benchmarks.run --device cuda`）：{shapes} 种输入（R50-FPN，两张 "
        "800 x 1333 的图像），torch {torch}，float32 使用 TF32。"
    ),
    MEASURED: (
        "取 {shapes} 种输入（R50-FPN 各层的尺寸以及小特征图）的几何平均；{cpu}，{threads} 线程，"
        "torch {torch}，除注明外均为 float32；由 `make bench` 测得。"
    ),
    "name": "名称",
    "paper": "论文",
    "baseline": "基线",
    "parameters": "参数量",
    "time, inference": "推理耗时",
    "time, forward + backward": "前向 + 反向耗时",
    "memory kept for backward": "为反向传播保留的内存",
    "in bfloat16": "bfloat16",
    "RetinaNet R50-FPN, one training iteration": "RetinaNet R50-FPN，一次训练迭代",
    "peak memory": "峰值内存",
    "on an H100, in float32": "H100，float32",
    "on an H100, in bfloat16, channels_last": "H100，bfloat16，channels_last",
    "the same on an H100, in float32": "同上（H100，float32）",
    "the same on an H100, in float16": "同上（H100，float16）",
    "training data": "训练数据",
    "plain": "普通卷积",
    "difference": "差值",
    "better": "更好",
    "worse": "更差",
    "not significant": "不显著",
    "cannot be tested": "无法检验",
    "drawn shapes, from scratch, ten seeds": "生成的几何图形，从头训练，十个随机种子",
    "BCCD blood cells, from scratch": "BCCD 血细胞，从头训练",
    "BCCD blood cells, from scratch, more augmentation, 24 epochs": (
        "BCCD 血细胞，从头训练，更多数据增强，24 轮"
    ),
    "BCCD blood cells, fine-tuned from plain": "BCCD 血细胞，由普通检测器微调",
    "photographs of playing cards, from scratch": "扑克牌照片，从头训练",
    "command": "命令",
    "takes on 2 CPU cores": "2 核 CPU 耗时",
    "in a fresh clone": "全新克隆",
    "with the environment in place": "环境已就绪",
    "{} min": "{} 分钟",
    "{mmcv} min of it to build mmcv's operators, {training} min to train": (
        "其中编译 mmcv 算子 {mmcv} 分钟，训练 {training} 分钟"
    ),
    "{tests} tests": "共 {tests} 项测试",
    ", ": "，",
}
Words = Callable[[str], str]


def read(name: str) -> dict:
    """Return one of the committed results."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]], numbers_from: int = 1) -> Iterator[str]:
    """Yield the lines of a Markdown table with right-aligned numbers."""
    rules = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    for cells in (head, rules, *rows):
        yield f"| {' | '.join(cells)} |"


# --------------------------------------------------------------------------- README


def methods(words: Words) -> Iterator[str]:
    """Yield each method, its paper, and its cost in RetinaNet R50-FPN."""
    text = (ROOT / "benchmarks" / "systems.md").read_text(encoding="utf-8")
    rows = []
    for name, parameters, gflops in re.findall(r"(?m)^\| `(\w+)` \| (\S+) \| (\S+) \|$", text):
        folder = ROOT / "configs" / name.lower()
        metafile = (folder / "metafile.yml").read_text(encoding="utf-8")
        number = re.search(r"arxiv\.org/abs/([\d.]+)", metafile)[1]
        paper = f"[{number}](https://arxiv.org/abs/{number})"
        if name in BASELINES:
            paper += f" ({words('baseline')})"
        link = f"[`{name}`](configs/{name.lower()}/README.md)"
        rows.append([link, paper, parameters, gflops])
    yield from table([words("name"), words("paper"), words("parameters"), "GFLOPs"], rows, 2)


def speed(words: Words) -> Iterator[str]:
    """Yield time and memory of the receptive-field convolutions, relative to a plain 3x3."""
    float32, bfloat16 = read("cpu.json"), read("cpu_bfloat16.json")
    rows = [_ratios(float32, f"`{op}`", op) for op in ("RFAConv", *GATED)]
    rows.append(_ratios(bfloat16, f"`RFAConv`{words(', ')}{words('in bfloat16')}", "RFAConv"))
    gpu, half = read("h100_float32.json"), read("h100_bfloat16_channels_last.json")
    for run, title in (
        (gpu, "on an H100, in float32"),
        (half, "on an H100, in bfloat16, channels_last"),
    ):
        rows.append(_ratios(run, f"`RFAConv`{words(', ')}{words(title)}", "RFAConv"))
    for run, title in (
        (float32, "RetinaNet R50-FPN, one training iteration"),
        (gpu, "the same on an H100, in float32"),
        (read("h100_float16_detector.json"), "the same on an H100, in float16"),
    ):
        detector = run["detector"]
        peak = f"{detector['peak_ratio']:.2f}x ({words('peak memory')})"
        rows.append([words(title), "", f"{detector['time_ratio']['median']:.2f}x", peak])
    modes = ("time, inference", "time, forward + backward", "memory kept for backward")
    yield from table(["", *map(words, modes)], rows)
    yield ""
    yield words(MEASURED).format(**_machine(float32)) + " " + words(ON_GPU).format(**_machine(gpu))


def _machine(run: dict) -> dict[str, str]:
    shapes = {tuple(result["shape"].values()) for result in run["results"]}
    cpu = re.sub(r"\([RT]M?\)| Processor", "", run["machine"]["cpu"])
    return dict(
        cpu=f"{cpu} ({run['machine']['simd']})",
        threads=run["threads"],
        torch=run["versions"]["torch"].split("+")[0],
        shapes=str(len(shapes)),
    )


def _ratios(run: dict, title: str, op: str) -> list[str]:
    own = report.of_op(run, op)
    name = report.chosen_rfaconv(own) if op == "RFAConv" else op
    return [title, *(f"{ours:.2f}x ({theirs:.1f}x)" for ours, theirs in _pairs(own, str(name)))]


def _pairs(run: dict, name: str) -> Iterator[tuple[float, float]]:
    """Yield ratios of a candidate, and of its formula, to the plain convolution."""
    for mode in ("inference", "training"):
        yield tuple(report.mean_ratio(run, who, mode, "plain") for who in (name, "formula"))
    yield tuple(report.mean_bytes(run, who, report.saved, "plain") for who in (name, "formula"))


def evidence(words: Words) -> Iterator[str]:
    """Yield the test AP of RFAConv and plain in the studies in EVIDENCE."""
    rows = []
    for study in dict.fromkeys(name for name, _ in EVIDENCE):
        summary = summarise(read(f"ablation/{study}.json")).set_index(["stage", "method"])
        for stage in dict.fromkeys(summary.index.get_level_values("stage")):
            if (study, stage) not in EVIDENCE:
                continue
            plain, ours = summary.loc[stage, "plain"], summary.loc[stage, "RFAConv"]
            both = [f"{row['mean']:.3f} ± {row['deviation']:.3f}" for row in (plain, ours)]
            verdict = f"{words(ours['verdict'])} (p = {ours['p_holm']:.3f})"
            title = words(EVIDENCE[study, stage])
            rows.append([title, *both, f"{ours['difference']:+.3f}{words(', ')}{verdict}"])
    yield from table([words("training data"), words("plain"), "RFAConv", words("difference")], rows)


def durations(words: Words) -> Iterator[str]:
    """Yield the durations of make demo and make test."""
    known = json.loads((ROOT / "benchmarks" / "durations.json").read_text(encoding="utf-8"))
    demo, test = known["make demo"], known["make test"]
    minutes = {key: f"{seconds / 60:.0f}" for key, seconds in demo.items()}
    parts = words("{mmcv} min of it to build mmcv's operators, {training} min to train").format(
        mmcv=minutes["mmcv_seconds"], training=minutes["training_seconds"]
    )
    comma = words(", ")
    of_demo = words("{} min").format(minutes["seconds"])
    of_test = words("{} min").format(f"{test['seconds'] / 60:.0f}")
    tests = words("{tests} tests").format(tests=f"{test['tests']:,}")
    rows = [
        [f"`make demo`{comma}{words('in a fresh clone')}", f"{of_demo}{comma}{parts}"],
        [f"`make test`{comma}{words('with the environment in place')}", f"{of_test}{comma}{tests}"],
    ]
    yield from table([words("command"), words("takes on 2 CPU cores")], rows, numbers_from=2)


# --------------------------------------------------------------------------- docs/performance.md


def targets(_: Words) -> Iterator[str]:
    """Yield the targets for RFAConv, and the measurements."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in _benchmarks()]
    yield from report.targets_table([run for c in contents for run in report.runs_of(c)])


def _benchmarks() -> list[Path]:
    return sorted(RESULTS.glob("*.json"))


def layers(_: Words) -> Iterator[str]:
    """Yield time and memory of every layer."""
    run = read("cpu.json")
    rows = []
    for name in report.candidates(run):
        own = report.of_op(run, name.split("[")[0])
        peak = report.mean_bytes(own, name, report.training_peak, "plain")
        pairs = [f"{ours:.2f}x ({theirs:.2f}x)" for ours, theirs in _pairs(own, name)]
        rows.append([f"`{name}`", *pairs, f"{peak:.2f}x"])
    head = ["", "inference", "forward + backward", "kept for backward", "peak, forward + backward"]
    yield from table(head, rows)


def on_gpu(_: Words) -> Iterator[str]:
    """Yield time and memory of the measured layers on a GPU."""
    rows = []
    for path in _benchmarks():
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["device"] != "cuda":
            continue
        for name in report.candidates(run):
            own = report.of_op(run, name.split("[")[0])
            peak, theirs = (
                report.mean_bytes(own, who, report.training_peak, "plain")
                for who in (name, "formula")
            )
            pairs = [f"{ours:.1f}x ({formula:.1f}x)" for ours, formula in _pairs(own, name)]
            title = f"`{name}`, {report.configuration(run)}"
            rows.append([title, *pairs, f"{peak:.1f}x ({theirs:.1f}x)"])
    head = ["", "inference", "forward + backward", "kept for backward", "peak, forward + backward"]
    yield from table(head, rows)


def gated(_: Words) -> Iterator[str]:
    """Yield the cost of the gates of RFCBAMConv and RFCAConv."""
    run = read("cpu.json")
    own = report.of_op(run, "RFAConv")
    base = [ours for ours, _ in _pairs(own, str(report.chosen_rfaconv(own)))][:2]
    rows = []
    for op in GATED:
        pairs = list(_pairs(report.of_op(run, op), op))[:2]
        over = [ours / of_rfa for (ours, _), of_rfa in zip(pairs, base, strict=True)]
        times = [report.mean_ratio(run, op, mode, "formula") for mode in ("inference", "training")]
        rows.append([f"`{op}`", *(f"{x:.2f}x" for x in (*over, *(1 / x for x in times if x)))])
    head = ["inference", "forward + backward"]
    yield from table(
        ["", *(f"{mode}, time / RFAConv's" for mode in head),
         *(f"{mode}, faster than its formula" for mode in head)], rows
    )  # fmt: skip


def slower(_: Words) -> Iterator[str]:
    """Yield the inputs on which a layer is significantly slower than its formula."""
    rows = []
    for result in read("cpu.json")["results"]:
        for mode, title in (("inference", "inference"), ("training", "forward + backward")):
            for name, ratios in result[mode]["ratios"].items():
                ratio = ratios.get("formula", {"median": 0, "q25": 0})
                if name.split("[")[0] == result["op"] and ratio["q25"] > 1:
                    shape = _shape(result["shape"])
                    rows.append([f"`{name}`", shape, title, f"{ratio['median']:.2f}x"])
    yield from table(["", "input", "", "time / its formula's"], rows, 3)


def _shape(shape: dict) -> str:
    sides = " x ".join(str(shape[key]) for key in ("batch", "channels", "height", "width"))
    return sides if shape["stride"] == 1 else f"{sides}, stride {shape['stride']}"


def modelled(_: Words) -> Iterator[str]:
    """Yield geometric means of the modelled times on an H100."""
    text = (ROOT / "benchmarks" / "modelled.md").read_text(encoding="utf-8")
    found = re.findall(r"(?ms)^## ([^\n]+)\n.*?^\| geometric mean \|(.*?)$", text)
    rows = [[title, *(f"{x}x" for x in re.findall(r"[\d.]+", means))] for title, means in found]
    yield from table(["modelled, not measured", "forward", "forward + backward"], rows)


# --------------------------------------------------------------------------- pages

BLOCKS: dict[str, Callable[[Words], Iterator[str]]] = {
    block.__name__: block
    for block in (
        *(methods, speed, evidence, durations),
        *(targets, layers, on_gpu, gated, slower, modelled),
    )
}


def filled(text: str, words: Words = str) -> str:
    """Return a page with the numbers of the results.

    Args:
        text (str): Text of the page.
        words (Callable): Translates the text in tables.

    Raises:
        KeyError: If a block's name is not in :data:`BLOCKS`.
    """
    return BLOCK.sub(lambda m: m[1] + "\n".join(BLOCKS[m[2]](words)) + "\n", text)


def words_of(page: str) -> Words:
    """Return the translation for a page."""
    return CHINESE.__getitem__ if page.endswith("_zh-CN.md") else str


def main() -> None:
    """Rewrite the pages."""
    epilog = "example:\n  python -m benchmarks.documents"
    ArgumentParser(
        description=__doc__, epilog=epilog, formatter_class=RawDescriptionHelpFormatter
    ).parse_args()
    for page in PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = filled(old, words_of(page))
        if new != old:
            with written_whole(path) as part:
                part.write_text(new, encoding="utf-8")
            print(f"wrote: {page}")


if __name__ == "__main__":
    main()
