"""`kvpipe profile`: what it prints, the page, the layer map that distill takes, and what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NoReturn

HEAT_MAPS = 3 + 2 * 5
"""CKA of both kinds and of their mean; R2 of key and value for five kinds of map."""


class Page(HTMLParser):
    """The tags of a page, what it refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attributes if k in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def refuse_constant(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def test_a_profile_says_the_same_as_text_as_json_and_as_a_page(kvpipe: Any, store: Path, tmp_path: Path) -> None:
    outputs = ["--html", "page/profile.html", "--save-layer-map", "map.json"]
    outcome = kvpipe("profile", store, "--json", *outputs, cwd=tmp_path)
    found = json.loads(outcome.stdout, parse_constant=refuse_constant)
    assert (found["samples"], found["random_student"], found["token_coverage"]) == (24, True, 1.0)
    assert [len(found[side]["layers"]) for side in ("teacher", "student")] == [4, 2]
    assert json.loads((tmp_path / "map.json").read_text()) == found["similarity"]["layer_map"]
    text = (tmp_path / "page" / "profile.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == HEAT_MAPS
    assert not {"script", "link", "img", "image", "iframe", "object", "embed"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "prefers-color-scheme: dark" in text
    lines = kvpipe("profile", store, cwd=tmp_path).stdout.splitlines()
    for quality in found["maps"]:
        key, value = quality["mean_r2"]
        row = f"R2, {quality['name']}"
        assert f"{row:30} keys {key:.3f}, values {value:.3f} ({quality['parameters']:,} parameters)" in lines
        assert {f"{key:.3f}", f"{value:.3f}"} <= set(page.text.split())
    for layer, row in enumerate(found["similarity"]["mean"]):
        assert f"{layer} from {found['similarity']['most_similar'][layer]} ({max(row):.2f})" in page.text
    assert [line for line in lines if line.startswith("Held-out R2: ") and line in page.text]


def test_distill_takes_the_suggested_layer_map(kvpipe: Any, store: Path, tmp_path: Path) -> None:
    kvpipe("profile", store, "--samples", 8, "--save-layer-map", "map.json", cwd=tmp_path)
    options = ["--layer-map", "map.json", "--max-steps", 1, "--max-new-tokens", 1, "--output-dir", "run"]
    kvpipe("distill", "--store", store, *options, cwd=tmp_path)
    weights = [json.loads(path.read_text()) for path in (tmp_path / "map.json", tmp_path / "run" / "layer_map.json")]
    assert weights[0] == weights[1]


def test_a_student_with_its_own_tokens_is_profiled(
    kvpipe: Any, store: Path, other_teacher: Path, tmp_path: Path
) -> None:
    outcome = kvpipe("profile", store, "--student", other_teacher, "--json", cwd=tmp_path)
    found = json.loads(outcome.stdout)
    assert found["random_student"] is False
    assert 0 < found["one_to_one_share"] <= found["token_coverage"] <= 1


REFUSED: dict[str, list[str]] = {
    "no KV store at nosuch.zarr": ["nosuch.zarr"],
    "cannot load the student 'nosuch'": ["--student", "nosuch"],
    "expected at least 2": ["--samples", "1"],
    "no such layer map": ["--layer-map", "nosuch"],
    "time_map: expected auto or identity": ["--time-map", "nosuch"],
    "unknown device": ["--device", "nosuch"],
}


def test_what_cannot_be_profiled_is_said_on_one_line(kvpipe: Any, store: Path, tmp_path: Path) -> None:
    commands = [
        ["profile", *([] if options[0].endswith(".zarr") else [store]), *options, "--html", "page.html"]
        for options in REFUSED.values()
    ]
    for words, refused in zip(REFUSED, kvpipe.many(commands, tmp_path), strict=True):
        assert refused.code == 2, words
        assert len(refused.error_lines) == 1, refused.stderr
        assert words in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_looked_at(
    kvpipe: Any, store: Path, tmp_path: Path
) -> None:
    cases = {
        "one file for two outputs": ["--html", "x.json", "--save-layer-map", "./x.json"],
        "--html cannot be written: expected a file, found the folder .": ["--html", "."],
        "no such layer map file": ["--save-layer-map", "map.txt"],
    }
    outcomes = kvpipe.many([["profile", store, *options] for options in cases.values()], tmp_path)
    for words, refused in zip(cases, outcomes, strict=True):
        assert refused.code == 2, words
        assert len(refused.error_lines) == 1, refused.stderr
        assert words in refused.stderr
    assert list(tmp_path.iterdir()) == []
