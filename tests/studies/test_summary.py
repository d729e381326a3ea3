"""Means, deviations and the paired test, compared with independent formulas."""

import csv
import io
import math
import re
import statistics

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from rfa_mmdet.studies.summary import holm, summarise
from rfa_mmdet.studies.tables import markdown
from tests.helpers.results_of import results_of

values = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=8)


def compared(ours, baseline):
    """Return the row of a method next to a baseline, with one value per seed."""
    return summarise(results_of(dict(plain=baseline, ours=ours))).iloc[1]


@given(values)
def test_p_matches_the_paired_t_test(pairs):
    differences = [a - b for a, b in pairs]
    n = len(pairs)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    found = compared(*map(list, zip(*pairs, strict=True)))
    assert found.difference == pytest.approx(mean, abs=1e-12)
    # Variance of a difference of two numbers with uniform rounding errors up to 0.0005.
    variance = max(variance, 2 * 0.001**2 / 12)
    expected = 2 * t.sf(abs(mean) / math.sqrt(variance / n), n - 1)
    assert found.p == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found.p_holm == found.p  # one comparison
    # The interval leaves out 0 where p is below 5 %.
    assert (abs(mean) > found.interval) == (expected < 0.05)
    # What the interval must be in one comparison, as there is here.
    assert found.needed == pytest.approx(max(found.interval, 0.001))
    unclear = expected >= 0.05 or round(abs(mean), 6) <= 0.001
    assert found.verdict == ("not significant" if unclear else "better" if mean > 0 else "worse")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_by_its_step_down_procedure(values):
    corrected = holm(pd.Series(values))
    order = sorted(range(len(values)), key=values.__getitem__)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(order):
            if values[i] * (len(values) - rank) > level:
                break
            rejected.add(i)
        assert {i for i in order if corrected[i] <= level} == rejected


def test_methods_of_a_stage_are_corrected_together():
    # Each alone passes at 5 %, with p = 0.038.
    values = {f"m{i}": [0.45, 0.50, 0.53] for i in range(3)}
    table = summarise(results_of(dict(plain=[0.4, 0.41, 0.42], **values)))
    ours = table.iloc[1:]
    assert (ours["p"] < 0.05).all()
    assert ours["p_holm"].tolist() == pytest.approx((3 * ours["p"]).tolist())
    assert set(ours["verdict"]) == {"not significant"}
    assert math.isnan(table["p_holm"].iloc[0])


@given(values, st.integers(1, 12))
def test_needed_is_the_smallest_significant_difference(pairs, methods):
    ours, plain = map(list, zip(*pairs, strict=True))

    def moved(shift):
        """Return the row of a method whose values are shifted, beside others equal to plain."""
        others = {f"m{i}": plain for i in range(1, methods)}
        table = summarise(results_of(dict(plain=plain, ours=[v + shift for v in ours], **others)))
        return table.iloc[1]

    first = moved(0)
    assert first.comparisons == methods
    for factor, verdict in ((1.01, "better"), (0.99, "not significant")):
        assert moved(factor * first.needed - first.difference).verdict == verdict


def test_unfinished_comparisons_count():
    values = dict(plain=[0.511, 0.505, 0.512], ours=[0.502, 0.490, 0.499])
    alone = summarise(results_of(values)).iloc[1]
    assert alone.verdict == "worse"
    waiting = {f"m{i}": [None] * 3 for i in range(11)}
    among = summarise(results_of({**values, **waiting})).iloc[1]
    assert among.p_holm == pytest.approx(12 * alone.p)
    assert among.verdict == "not significant"


@pytest.mark.parametrize("failing", ["plain", "ours"])
def test_nothing_is_tested_without_a_failed_run(failing):
    values = dict(plain=[0.4, 0.42, 0.41, 0.4], ours=[0.45, 0.46, 0.46, 0.45])
    values[failing][3] = None
    results = results_of(values)
    assert summarise(results).iloc[1].verdict == "better"
    run = results["runs"][3 if failing == "plain" else 7]
    run.update(state="failed", error="it found nothing")
    table = summarise(results).set_index("method")
    assert table.loc[failing, "failed"] == 1
    assert table.loc["ours", "verdict"] == "cannot be tested"


def test_many_seeds_do_not_make_a_step_of_the_metric_a_finding():
    plain = [0.5 + i / 1000 for i in range(10)]
    found = compared([value + 0.001 for value in plain], plain)
    assert found.p < 0.001
    assert found.verdict == "not significant"
    assert found.needed == 0.001


def test_memory_is_the_median_over_the_runs():
    results = results_of(dict(plain=[0.1, 0.2, 0.3]))
    for run, memory in zip(results["runs"], (824, 775, 774), strict=True):
        run["memory_mb"] = memory
    assert summarise(results).iloc[0].memory_mb == 775


def test_equal_results_are_within_the_spread():
    found = compared([0.5, 0.4, 0.3], [0.5, 0.4, 0.3])
    assert (found.difference, found.p, found.verdict) == (0, 1, "not significant")


def test_differences_of_one_rounding_step_are_within_the_spread():
    found = compared([0.501, 0.444, 0.496], [0.500, 0.443, 0.495])
    assert found.difference == pytest.approx(0.001)
    assert found.verdict == "not significant"


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_cannot_be_tested(n):
    found = compared([0.9] * n, [0.1] * n)
    assert found.difference == pytest.approx(0.8)
    assert math.isnan(found.p)
    assert found.verdict == "cannot be tested"


def test_only_seeds_that_both_have_are_compared():
    results = results_of(dict(plain=[0.2, 0.9, 0.4, 0.3], ours=[0.3, None, 0.52, 0.41]))
    plain, ours = summarise(results).itertuples()
    assert plain.is_baseline
    assert plain.verdict == ""
    assert plain.mean == pytest.approx(0.45)
    assert (ours.finished, ours.wanted) == (3, 4)
    assert ours.mean == pytest.approx(0.41)
    assert ours.deviation == pytest.approx(0.11)
    # Without the 0.9, for which ours has no value.
    assert ours.difference == pytest.approx(0.11)
    assert ours.verdict == "better"


def test_unfinished_study_has_no_numbers():
    (row,) = summarise(results_of(dict(plain=[None, None]))).itertuples()
    assert math.isnan(row.mean)
    assert math.isnan(row.deviation)
    assert (row.finished, row.wanted, row.verdict) == (0, 2, "")


def test_no_comparison_without_the_baseline():
    _, ours = summarise(results_of(dict(plain=[None] * 3, ours=[0.1, 0.2, 0.3]))).itertuples()
    assert (ours.finished, ours.verdict) == (3, "")
    assert math.isnan(ours.difference)


def test_each_stage_is_compared_with_its_own_baseline():
    results = results_of(dict(plain=[0.1, 0.2, 0.3], ours=[0.1, 0.2, 0.3]))
    more = results_of(dict(plain=[0.5, 0.5, 0.5], ours=[0.4, 0.4, 0.4]))
    results["stages"] += [{**more["stages"][0], "name": "a later one"}]
    results["runs"] += [{**run, "stage": "a later one"} for run in more["runs"]]
    table = summarise(results)
    assert list(table["stage"]) == ["all", "all", "a later one", "a later one"]
    assert list(table["verdict"]) == ["", "not significant", "", "worse"]
    assert table["difference"].iloc[3] == pytest.approx(-0.1)


def test_needed_differences_of_several_methods():
    values = dict(plain=[96.0, 97.0, 98.0], a=[98.1, 98.2, 98.2], b=[70.0, 99.0, 98.0])
    text = markdown(summarise(results_of(values)), "accuracy/top1")
    words = r"had to reach ([\d.]+) \(a\) to ([\d.]+) \(b\) to be significant as the clearest of 2"
    found = re.search(words, text)
    # 6.2053 = t(2 degrees of freedom) at 0.05 / 2 comparisons / 2 sides.
    for needed, method in zip(found.groups(), "ab", strict=True):
        gains = [x - y for x, y in zip(values[method], values["plain"], strict=True)]
        assert needed == f"{6.2053 * statistics.stdev(gains) / math.sqrt(3):.2f}"


def test_tables():
    cost = dict(parameters=1234567, flops=2_500_000, image_seconds=0.0123, iteration_seconds=0.4567)
    costs = dict(methods=dict(ours=cost))
    summary = summarise(results_of(dict(plain=[0.1, 0.2, 0.3], ours=[0.4, 0.5, 0.61]), costs))
    text = markdown(summary, "coco/bbox_mAP")
    assert text.endswith(
        "\nWith these seeds, a difference had to reach 0.014 (ours) to be significant.\n"
    )
    header, _, plain, ours = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    )
    by_title = dict(zip(header, ours, strict=True))
    assert plain[0] == "plain (baseline)"
    assert by_title["seeds"] == "3 of 3"
    assert by_title["test"] == "0.5033 ± 0.1050"
    assert by_title["difference (95 %)"] == "+0.303 ± 0.014"
    assert by_title["verdict"] == "better"
    assert by_title["parameters"] == "1,234,567"
    assert by_title["ms/iteration"] == "457"
    assert by_title["GFLOPs"] == "0.003"
    assert by_title["ms/image"] == "12.3"
    assert dict(zip(header, plain, strict=True))["ms/image"] == "-"
    read = list(csv.DictReader(io.StringIO(summary.to_csv(index=False))))
    assert float(read[1]["mean"]) == pytest.approx(1.51 / 3)
    assert float(read[1]["difference"]) == pytest.approx(0.91 / 3)
    assert read[1]["parameters"] == "1234567"
    assert read[0]["flops"] == ""
