"""CITATION.cff, CHANGELOG.md, SECURITY.md and .github/ agree with the package."""

import re
from datetime import date

import pytest
import yaml

from rfa_mmdet.version import __version__
from tests.helpers.paths import ROOT
from tools.setup_env import STACKS

FORMS = sorted(
    path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config"
)
PARTS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def citation() -> dict:
    return yaml.safe_load(text_of("CITATION.cff"))


@pytest.fixture(scope="module")
def workflow() -> dict:
    # YAML 1.1 reads the key `on` as true.
    return yaml.safe_load(text_of(".github/workflows/ci.yml"))


# --- what is cited, and what has changed ---------------------------------------------------------


def test_citation_is_of_this_version(citation):
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "abstract"} <= set(citation)
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert text_of("LICENSE").split()[:2] == ["Apache", "License"]


def test_papers_are_cited_as_the_methods_name_them(citation):
    papers = {paper["url"]: paper for paper in citation["references"]}
    assert {url.rsplit("/", 1)[1] for url in papers} == {"2304.03198", "2305.13563", "2110.14369"}
    for method in ("rfaconv", "rfcbamconv", "rfcaconv", "ema", "conam"):
        (collection,) = yaml.safe_load(text_of(f"configs/{method}/metafile.yml"))["Collections"]
        named = collection["Paper"]
        assert papers[named["URL"]]["title"] == named["Title"]
        assert collection["Name"] in papers[named["URL"]]["notes"]
    for paper in papers.values():
        assert paper["type"] in ("article", "conference-paper")
        assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])


def test_changelog_ends_with_this_version(citation):
    headings = re.findall(r"(?m)^## (.*)$", text_of("CHANGELOG.md"))
    if headings[0] == "[Unreleased]":
        del headings[0]
    versions = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", line) for line in headings]
    assert all(versions)
    assert versions[0][1] == __version__
    assert versions[0][2] == str(citation["date-released"])
    numbers = [tuple(map(int, version[1].split("."))) for version in versions]
    days = [date.fromisoformat(version[2]) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert days == sorted(days, reverse=True)
    kinds = set(re.findall(r"(?m)^### (.*)$", text_of("CHANGELOG.md")))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_this_version_gets_security_fixes():
    minor = __version__.rpartition(".")[0]
    assert re.search(rf"(?m)^\| {re.escape(minor)} \| yes \|$", text_of("SECURITY.md"))


# --- forms and continuous integration ------------------------------------------------------------


def test_there_are_forms():
    assert {path.stem for path in FORMS} == {"bug", "question", "new_method"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_as_github_reads_them(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in form["body"]} <= PARTS
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_bug_template_asks_for_the_doctors_output():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text(encoding="utf-8"))
    (field,) = [part for part in form["body"] if part.get("id") == "doctor"]
    assert "python -m rfa_mmdet doctor" in field["attributes"]["description"]
    assert field["validations"]["required"]


def test_workflow_runs_targets_of_the_makefile(workflow):
    targets = set(re.findall(r"(?m)^([a-z-]+):", text_of("Makefile")))
    values = workflow["jobs"]["test"]["strategy"]["matrix"]
    used = {*values["target"], *(case["target"] for case in values["include"])}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "run" in step and "matrix.target" not in step["run"]:
                used.add(re.match(r"make ([a-z-]+)", step["run"])[1])
    assert {"env", "test", "test-slow", "test-triton", "docs"} <= used <= targets


def test_workflow_pins_actions_by_major_version(workflow):
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)


def test_workflow_covers_every_stack_and_python(workflow):
    values = workflow["jobs"]["test"]["strategy"]["matrix"]
    cases = {(stack, python) for stack in values["stack"] for python in values["python"]}
    cases |= {(case["stack"], case["python"]) for case in values["include"]}
    assert {stack for stack, _ in cases} == set(STACKS)
    assert {python for _, python in cases} == {"3.10", "3.11", "3.12"}
    for stack, python in cases:
        assert python in STACKS[stack]
