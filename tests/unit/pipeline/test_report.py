"""The report: strict JSON, one page that needs nothing else, tables that are tables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import pytest
from kvpipe.kvcache.align.fusion import FusionName
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.questions import Question
from kvpipe.pipeline.report import number, p_value, sentence, write_report
from kvpipe.pipeline.results import Results, collect

ARMS = {"none": 0.9, "flat": 0.4, "structured": 0.4}
TEN_ARMS = {f"arm{i}": 0.5 + i / 20 for i in range(10)}
FAILURE = "RuntimeError: <b>out</b> of & memory"
CASES: dict[str, dict[str, Any]] = {
    "whole": {"arms": ARMS},
    "one seed": {"arms": ARMS, "seeds": 1},
    "no curve": {"arms": ARMS, "curve": False},
    "a failed run": {"arms": ARMS, "without": {"flat-seed2": FAILURE}},
    "a failed arm": {"arms": ARMS, "without": {f"flat-seed{seed}": "killed" for seed in range(6)}},
    "ten arms": {"arms": TEN_ARMS, "seeds": 2},
}
FIGURES = ("learning_curves", "paired_differences", "time_by_part")
VOID = {"meta", "br", "hr", "img", "link"}

MakeExperiment = Callable[..., Any]


class Page(HTMLParser):
    """Checks nesting, and keeps what a page refers to and what its table cells and list items say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def refuse_constant(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def results_of(finished: Any) -> Results:
    return collect(finished.config, finished.outcome, finished.runs_dir)


def of_case(case: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("report", [case], indirect=True)


@pytest.fixture(scope="module", params=CASES)
def report(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, make_experiment: MakeExperiment
) -> Path:
    """The folder of the report on a synthetic experiment of every kind."""
    folder = tmp_path_factory.mktemp("report") / "new"
    assert write_report(results_of(make_experiment(**CASES[request.param])), folder) == folder / "report.html"
    return folder


def test_the_results_are_strict_json(report: Path) -> None:
    document = json.loads((report / "results.json").read_text(), parse_constant=refuse_constant)
    assert document["name"] == "synthetic"
    assert document["comparisons"]["exact_match"][0]["p_value"] is None
    assert {"runs", "failures", "comparisons", "savings", "stores"} <= set(document)


def test_the_page_is_whole_and_refers_to_nothing_outside(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert page.tags.count("svg") == len(FIGURES)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)\)", text))
    # What is left of http are the names of XML vocabularies, which nobody fetches.
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"|(rdf:resource|rdf:about)="[^"]*"', "", text)
    assert "http" not in outside
    assert "nan" not in [cell.strip() for row in page.rows for cell in row]


@of_case("whole")
def test_the_page_shows_every_run_and_comparison(report: Path) -> None:
    page = Page((report / "report.html").read_text())
    first_cells = [row[0] for row in page.rows]
    assert {f"{arm}-seed{seed}" for arm in ARMS for seed in range(6)} <= set(first_cells)
    assert first_cells.count("flat \N{MINUS SIGN} none") == 4  # one table a metric
    assert "flat is better than none" in page.text
    assert "1,234" in page.text
    assert "The teacher ran once: 12.5 s" in page.text
    assert all(len({len(row) for row in table}) == 1 for table in tables_of(page))


def tables_of(page: Page) -> list[list[list[str]]]:
    """Rows cut at each header."""
    tables: list[list[list[str]]] = []
    for row in page.rows:
        if row[0] in ("arm", "comparison", "run", "pair"):
            tables.append([])
        tables[-1].append(row)
    return tables


@of_case("a failed run")
def test_failed_runs_are_shown_and_cannot_write_html(report: Path) -> None:
    text = (report / "report.html").read_text()
    assert "<b>out</b>" not in text
    assert f"flat-seed2: {FAILURE}" in Page(text).text
    markdown = (report / "report.md").read_text()
    assert "Failed, and missing from every number here (1):" in markdown
    assert "- flat-seed2: RuntimeError" in markdown


def test_the_tables_of_the_markdown_are_tables(report: Path) -> None:
    lines = (report / "report.md").read_text().splitlines()
    assert lines[0] == "# synthetic"
    tables: list[list[list[str]]] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("|"):
            if not before.startswith("|"):
                assert before == ""
                tables.append([])
            assert line.endswith("|")
            tables[-1].append([cell.strip() for cell in line[1:-1].split("|")])
    assert len(tables) == 6  # arms, the comparisons of four metrics, and training
    for header, rule, *rows in tables:
        assert set(rule) == {"---"}
        assert rows
        assert {len(row) for row in rows} == {len(header)} == {len(rule)}
        assert all(cell for row in rows for cell in row)


def test_the_figures_are_svg_files_that_the_markdown_names(report: Path) -> None:
    named = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (report / "report.md").read_text())
    assert sorted(named) == sorted(f"{name}.svg" for name in FIGURES)
    for name in named:
        assert ElementTree.parse(report / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@of_case("ten arms")
def test_every_arm_has_its_curve_however_many_there_are(report: Path) -> None:
    figure = (report / "learning_curves.svg").read_text()
    assert [arm for arm in TEN_ARMS if f">{arm}<" not in figure] == []


@of_case("whole")
def test_the_same_numbers_give_the_same_figures(report: Path, tmp_path: Path, make_experiment: MakeExperiment) -> None:
    finished = make_experiment(**CASES["whole"])
    write_report(results_of(finished), tmp_path)
    figures = {f"{name}.svg" for name in FIGURES}
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md", "results.json", *figures}
    for name in figures:
        assert (tmp_path / name).read_bytes() == (report / name).read_bytes()


def test_a_sentence_says_the_verdict_and_its_numbers(make_experiment: MakeExperiment) -> None:
    flat, structured = results_of(make_experiment(ARMS)).comparisons["ce"]
    assert re.fullmatch(
        r"flat is better than none \(difference in ce -0\.\d{4}, 95% CI over seeds and samples -0\.\d{4} to -0\.\d{4}, "
        r"Holm-adjusted p 0\.000\d, 6 paired seeds\)\.",
        sentence(flat),
    )
    assert sentence(replace(structured, verdict="inconclusive")).startswith("structured against none: inconclusive (")
    assert "structured against none: no verdict" in sentence(replace(structured, verdict=None))


def test_numbers_that_are_not_there_are_dashes() -> None:
    assert (number(None), number(math.nan), number(0.12345), number(-0.0)) == ("—", "—", "0.1235", "-0.0000")
    assert (p_value(math.nan), p_value(1e-5), p_value(0.0321)) == ("—", "< 0.0001", "0.0321")


def test_several_stores_have_a_frontier(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    pairs = [Question("none", "flat", 0.1), Question("structured", "flat", 0.1)]
    results = results_of(make_experiment(ARMS, comparisons=pairs))
    arm_stores = {arm: ["small.zarr" if arm == "structured" else "large.zarr"] for arm in ARMS}
    sizes = {"large.zarr": 2000.0, "small.zarr": 250.0}
    stores = [{**results.stores[0], "path": path, "bytes_per_token": size} for path, size in sizes.items()]
    splits = dict.fromkeys(sizes, next(iter(results.splits.values())))
    results = replace(results, stores=stores, splits=splits, arm_stores=arm_stores)
    assert [results.bytes_per_token(arm) for arm in ARMS] == [2000, 2000, 250]
    page = write_report(results, tmp_path)
    svg = ElementTree.fromstring((tmp_path / "frontier.svg").read_text())
    words = {text.text for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"none (no KV)", "structured", "bytes a token on disk", "difference in ce"} <= words
    assert "flat" not in words, "it is what the others are compared with"
    assert "<h2>Frontier</h2>" in page.read_text()
    assert "![bytes a token against quality](frontier.svg)" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("fusion", ["fixed", "learned"])
def test_arms_of_several_teachers_show_how_much_each_counted(
    make_experiment: MakeExperiment, tmp_path: Path, fusion: FusionName
) -> None:
    def fuse(name: str, record: dict[str, Any]) -> None:
        if name.startswith("fused"):
            record["metrics"] |= {"fusion_weight_0": 0.97, "fusion_weight_1": 0.03}
            record["router_collapsed"] = name == "fused-seed1"

    recipes = {"none": DistillConfig(mode="none"), "fused": DistillConfig(fusion=fusion)}
    results = results_of(make_experiment({"none": 1.0, "fused": 0.9}, recipes=recipes, edit=fuse, curve=False))
    results = replace(results, arm_stores={"none": ["a.zarr"], "fused": ["a.zarr", "b.zarr"]})
    page, text = write_report(results, tmp_path).read_text(), (tmp_path / "report.md").read_text()
    assert "<td>fused</td><td>b</td><td>0.0300</td>" in page
    assert "| fused | a | 0.9700 | 0.9700 … 0.9700 | the same | 1 |" in text
    drawn = fusion != "fixed"
    assert ("by step: every seed" in page) == ("teacher_weights.svg" in text) == drawn
    assert (tmp_path / "teacher_weights.svg").exists() == drawn, "weights that are declared are not worth a plot"


def test_arms_of_several_teachers_of_which_no_run_is_finished_are_left_out(
    make_experiment: MakeExperiment, tmp_path: Path
) -> None:
    failed = {f"fused-seed{seed}": "out of memory" for seed in range(6)}
    results = results_of(make_experiment({"none": 1.0, "flat": 0.9, "fused": 0.9}, without=failed))
    results = replace(results, arm_stores={arm: ["a.zarr", "b.zarr"] for arm in ("none", "flat", "fused")})
    assert "<h2>Teachers</h2>" not in write_report(results, tmp_path).read_text()
