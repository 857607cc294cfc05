"""Layer maps in files: what is written is read back, and what is no map of these models is refused."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.kvcache.align.layer_map import (
    MAX_FILE_BYTES,
    LayerMap,
    cka_map,
    layer_map,
    write_layer_map,
)
from kvpipe.kvcache.errors import ConfigError

SHALLOW = st.integers(1, 12)


@given(SHALLOW, SHALLOW, st.integers(0, 999))
def test_a_written_map_is_read_back_number_by_number(student: int, teacher: int, seed: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "map.json"
        similarity = torch.rand(student, teacher, generator=torch.Generator().manual_seed(seed))
        for written in (cka_map(similarity, top_k=3), layer_map("uniform", student, teacher)):
            write_layer_map(written, path)
            assert layer_map(str(path), student, teacher) == written


def test_a_file_may_name_one_layer_each(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"layers": [3, 1]}')
    assert layer_map(str(path), 2, 4) == LayerMap.one_hot([3, 1], 4)
    assert layer_map(str(path), 2, 4) == LayerMap.one_hot([3, 1], 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layers: [1]",
        "\x00\xff",
        "[" * 100_000,
        "[[1, 0], [0, 1]]",
        "null",
        "{}",
        '{"weights": [[1, 0], [0, 1]], "layers": [0, 1]}',
        '{"weights": [[1, 0], [0, 1]], "more": 1}',
        '{"weights": 1}',
        '{"weights": [[1, 0]]}',
        '{"weights": [[1, 0], [1]]}',
        '{"weights": [[1, 0, 0], [1, 0, 0]]}',
        '{"weights": [[1, 0], "10"]}',
        '{"weights": [[1, 0], [true, false]]}',
        '{"weights": [[1, 0], [1, null]]}',
        '{"weights": [[1, 0], [[1], 0]]}',
        '{"weights": [[1, 0], [NaN, 1]]}',
        '{"weights": [[1, 0], [Infinity, 0]]}',
        '{"weights": [[1, 0], [2, -1]]}',
        '{"weights": [[1, 0], [0.5, 0.4]]}',
        '{"weights": [[1, 0], [1' + "0" * 5000 + ", 0]]}",
        '{"layers": [0]}',
        '{"layers": [0, 1, 1]}',
        '{"layers": [0, 2]}',
        '{"layers": [0, -1]}',
        '{"layers": [0, 0.5]}',
        '{"layers": [0, NaN]}',
        '{"layers": [0, 1e400]}',
        '{"layers": [0, true]}',
        '{"layers": [0, "1"]}',
    ],
)
def test_a_file_that_is_no_map_of_these_models_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^[^\n]*: expected [^\n]{1,200}, found [^\n]{1,200}--layer-map$"):
        layer_map(str(path), 2, 2)


def test_a_file_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for path in (tmp_path / "none.json", folder):
        with pytest.raises(ConfigError, match="cannot be read: expected a file"):
            layer_map(str(path), 2, 2)
    large = tmp_path / "large.json"
    large.write_text(json.dumps({"layers": [0, 1]}) + " " * MAX_FILE_BYTES)
    with pytest.raises(ConfigError, match=f"expected at most {MAX_FILE_BYTES} bytes"):
        layer_map(str(large), 2, 2)
