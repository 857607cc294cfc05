"""Stores and text of a stranger: refused in one line or read as they are, never obeyed.

Every store here is forged as an attacker could do it, with all checksums and the seal made anew.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kvpipe.data.corpus import parse_row, read_jsonl
from kvpipe.data.errors import DataError
from kvpipe.data.sample import Sample
from kvpipe.kvcache.integrity import metadata_checksums, seal
from kvpipe.kvcache.side_arrays import add_array

from .conftest import HOSTILE_DISTILL, HOSTILE_LENGTHS, Tally
from .hostile_reader import SECONDS, TOKEN, Marking, Reader, is_one_line

Points = Callable[[int, int], int]


# ---------------------------------------------------------------------- forged stores


class Forgery:
    """A copy of a store that can be changed anywhere; `finish` makes checksums and seal anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root: dict[str, Any] = json.loads((path / "zarr.json").read_text())
        self.attributes: dict[str, Any] = self.root["attributes"]["kvpipe"]

    def metadata(self, array: str, **changes: Any) -> None:
        """Change an array's metadata; `chunks` stands for the shape of its chunk grid."""
        file = self.path / array / "zarr.json"
        document = json.loads(file.read_text())
        if "chunks" in changes:
            document["chunk_grid"]["configuration"]["chunk_shape"] = changes.pop("chunks")
        file.write_text(json.dumps({**document, **changes}))

    def inner_chunks(self, shape: list[int]) -> None:
        """Change the chunks within a shard of the KV."""
        codecs = json.loads((self.path / "kv" / "zarr.json").read_text())["codecs"]
        codecs[0]["configuration"]["chunk_shape"] = shape
        self.metadata("kv", codecs=codecs)

    def write(self, name: str, data: Any) -> None:
        """Another array in place of one."""
        shutil.rmtree(self.path / name, ignore_errors=True)
        axes = {1: ("sample",), 2: ("sample", "token")}[np.ndim(data)]
        group = zarr.open_group(self.path, mode="r+")
        self.attributes["checksums"][name] = add_array(group, name, np.asarray(data), axes)

    def records(self, *lines: str) -> None:
        self.write("text", np.frombuffer("".join(f"{line}\n" for line in lines).encode(), np.uint8))

    def tokenizer(self, name: str, content: bytes = b"{}") -> None:
        """One more file of the tokenizer, or another in place of one."""
        if name not in self.attributes["tokenizer_files"]:
            self.attributes["tokenizer_files"].append(name)
        self.write(f"tokenizer/{name}", np.frombuffer(content, np.uint8))

    def tokenizer_name(self, name: str) -> None:
        """A name without a file, or with one wherever it leads."""
        self.attributes["tokenizer_files"].append(name)
        self.attributes["checksums"][f"tokenizer/{name}"] = 0

    def finish(self) -> None:
        self.attributes["metadata"] = metadata_checksums(self.path)
        self.root["attributes"]["kvpipe"] = seal(self.attributes)
        (self.path / "zarr.json").write_text(json.dumps(self.root))


def _codec(name: str, **configuration: Any) -> list[dict[str, Any]]:
    return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": name, "configuration": configuration}]


def _pickled_text(forgery: Forgery, codecs: list[dict[str, Any]], **changes: Any) -> None:
    chunk = forgery.path / "text" / "c" / "0"
    chunk.write_bytes(pickle.dumps(Marking(forgery.path.parent / "marker")))
    forgery.metadata("text", codecs=codecs, **changes)


def _version_two(forgery: Forgery) -> None:
    """The arrays of Zarr v2 could be of objects, pickled."""
    array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "fill_value": None, "order": "C"}
    array |= {"compressor": None, "filters": [{"id": "pickle"}]}
    (forgery.path / "text" / ".zarray").write_text(json.dumps(array))
    (forgery.path / "text" / "0").write_bytes(pickle.dumps([Marking(forgery.path.parent / "marker")]))
    (forgery.path / "text" / "zarr.json").unlink()
    (forgery.path / ".zgroup").write_text('{"zarr_format": 2}')


def _replace(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


def _link(forgery: Forgery, name: str, target: str) -> None:
    _replace(forgery.path / name, lambda file: file.symlink_to(target))


def _outside(forgery: Forgery, name: str) -> None:
    """A link to a file outside that is just what it should be."""
    copy = forgery.path.parent / "outside"
    shutil.copy(forgery.path / name, copy)
    _link(forgery, name, str(copy))


def _consolidated(forgery: Forgery) -> None:
    """Zarr takes metadata from the root's, where it is there: then the checksums are of other files."""
    document = json.loads((forgery.path / "kv" / "zarr.json").read_text())
    document["shape"][2] = 10**12
    forgery.root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": {"kv": document}}


SHARD, LEDGER = "kv/c/0/0/0/0/0/0", "ledger/c/0/0"
RECORD = '{"id": "0", "prompt": "p", "reasoning": "r", "answer": "a"}'
AUTO_MAP = b'{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'

TOKENIZERS: dict[str, Callable[[Forgery], object]] = {
    "above": lambda f: f.tokenizer_name("../../evil"),
    "parent": lambda f: f.tokenizer_name(".."),
    "itself": lambda f: f.tokenizer_name("."),
    "absolute": lambda f: f.tokenizer_name("/etc/x"),
    "below": lambda f: f.tokenizer("a/b"),
    "no name": lambda f: f.tokenizer_name(""),
    "NUL": lambda f: f.tokenizer_name("a\0b"),
    "long": lambda f: f.tokenizer_name("x" * 300),
    "Python": lambda f: f.tokenizer("x.py", b"import os\nos.mkdir('marker')\n"),
    "module of its own": lambda f: (f.tokenizer("tokenizer_config.json", AUTO_MAP), f.tokenizer("evil.py")),
    "code elsewhere": lambda f: f.tokenizer("tokenizer_config.json", AUTO_MAP),
    "class of a library": lambda f: f.tokenizer("tokenizer_config.json", b'{"tokenizer_class": "os.system"}'),
    "config of a model": lambda f: f.tokenizer(
        "config.json", b'{"model_type": "evil", "auto_map": {"AutoConfig": "e.E"}}'
    ),
    "not JSON": lambda f: f.tokenizer("tokenizer.json", b"\xff\x00"),
    "empty": lambda f: f.tokenizer("tokenizer.json", b""),
    "empty object": lambda f: f.tokenizer("tokenizer.json", b"{}"),
    "list": lambda f: f.tokenizer("tokenizer_config.json", b"[]"),
    "deep": lambda f: f.tokenizer("tokenizer_config.json", b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "pickle": lambda f: f.tokenizer("vocab.pkl", pickle.dumps(Marking(f.path.parent / "marker"))),
}
SHAPES: dict[str, Callable[[Forgery], object]] = {
    "10**12 samples": lambda f: f.metadata("kv", shape=[2, 2, 10**12, 2, 64, 4]),
    "10**12 samples, consolidated": _consolidated,
    "10**12 samples everywhere": lambda f: [
        f.metadata("kv", shape=[2, 2, 10**12, 2, 64, 4]),
        *(f.metadata(name, shape=[10**12], chunks=[10**12]) for name in ("length", "split")),
    ],
    "10**9 tokens": lambda f: f.metadata("kv", shape=[2, 2, 4, 2, 10**9, 4], chunks=[2, 2, 2, 2, 10**9, 4]),
    "10**9 layers": lambda f: f.metadata("kv", shape=[10**9, 2, 4, 2, 64, 4], chunks=[10**9, 2, 2, 2, 64, 4]),
    "shards of 10**12 samples": lambda f: f.metadata("kv", chunks=[2, 2, 10**12, 2, 64, 4]),
    "chunks of 10**9 tokens": lambda f: f.inner_chunks([2, 2, 1, 2, 10**9, 4]),
    "chunks of no tokens": lambda f: f.inner_chunks([2, 2, 1, 2, 0, 4]),
    "chunks of minus one": lambda f: f.inner_chunks([2, 2, 1, 2, -32, 4]),
    "chunks of one token": lambda f: f.inner_chunks([2, 2, 1, 2, 1, 4]),
    "no samples": lambda f: f.metadata("kv", shape=[2, 2, 0, 2, 64, 4]),
    "no layers": lambda f: f.metadata("kv", shape=[0, 2, 4, 2, 64, 4]),
    "no channels": lambda f: f.metadata("kv", shape=[2, 2, 4, 2, 64, 0]),
    "minus one sample": lambda f: f.metadata("kv", shape=[2, 2, -1, 2, 64, 4]),
    "five axes": lambda f: f.metadata("kv", shape=[2, 2, 4, 2, 64], chunks=[2, 2, 2, 2, 64]),
    "three of key and value": lambda f: f.metadata("kv", shape=[2, 3, 4, 2, 64, 4]),
    "no shards": lambda f: f.metadata("kv", chunks=[2, 2, 0, 2, 64, 4]),
    "length of 10**12": lambda f: f.metadata("length", shape=[10**12]),
    "text of 10**12": lambda f: f.metadata("text", shape=[10**12]),
    "text of 10**9": lambda f: f.metadata("text", shape=[10**9], chunks=[10**9]),
    "text in chunks of 10**12": lambda f: f.metadata("text", shape=[10**12], chunks=[10**12]),
    "text of minus one": lambda f: f.metadata("text", shape=[-1]),
    "text of nothing": lambda f: f.metadata("text", shape=[0]),
    "text in chunks of 0": lambda f: f.metadata("text", chunks=[0]),
    "spans of 10**12": lambda f: f.metadata("spans", shape=[4, 10**12, 2], chunks=[4, 10**12, 2]),
    "tokens of 10**9": lambda f: f.metadata("input_ids", shape=[4, 10**9], chunks=[4, 10**9]),
}
TYPES: dict[str, Callable[[Forgery], object]] = {
    "KV of objects": lambda f: f.metadata("kv", data_type="object"),
    "KV of strings": lambda f: f.metadata("kv", data_type="string", fill_value=""),
    "KV of float64": lambda f: f.metadata("kv", data_type="float64", fill_value=0.0),
    "unknown logical dtype": lambda f: f.metadata("kv", attributes={"logical_dtype": "complex128"}),
    "text of objects": lambda f: _pickled_text(f, _codec("crc32c"), data_type="object"),
    "text of bytes objects": lambda f: f.metadata("text", data_type="variable_length_bytes", fill_value=""),
    "text of strings": lambda f: f.metadata("text", data_type="string", fill_value=""),
    "text of floats": lambda f: f.metadata("text", data_type="float64", fill_value=0.0),
    "unknown codec": lambda f: f.metadata("text", codecs=_codec("evil")),
    "codec of pickles": lambda f: _pickled_text(f, _codec("numcodecs.pickle", id="pickle")),
    "serializer of pickles": lambda f: _pickled_text(f, [{"name": "numcodecs.pickle", "configuration": {}}]),
    "codec by its module": lambda f: f.metadata("text", codecs=_codec("os.system", command="mkdir marker")),
    "no codecs": lambda f: f.metadata("text", codecs=[]),
    "Zarr v2": _version_two,
    "length of floats": lambda f: f.write("length", np.array([40, 5, np.nan, 64])),
    "length of int64": lambda f: f.write("length", np.array([40, 5, 33, 2**40])),
    "token ids of int64": lambda f: f.write("input_ids", np.full((4, 64), 2**40)),
}
VALUES: dict[str, Callable[[Forgery], object]] = {
    "fewer lengths": lambda f: f.write("length", np.array(HOSTILE_LENGTHS[:3], np.int32)),
    "more splits": lambda f: f.write("split", np.zeros(5, np.int8)),
    "more token ids": lambda f: f.write("input_ids", np.ones((9, 64), np.int32)),
    "narrow token ids": lambda f: f.write("input_ids", np.ones((4, 8), np.int32)),
    "narrow segments": lambda f: f.write("segment_ids", np.ones((4, 8), np.int8)),
    "flat token ids": lambda f: f.write("input_ids", np.ones(4, np.int32)),
    "length 65": lambda f: f.write("length", np.array([65, 5, 33, 64], np.int32)),
    "length 97": lambda f: f.write("length", np.array([97, 5, 33, 64], np.int32)),
    "length 2**31 - 1": lambda f: f.write("length", np.array([40, 5, 33, 2**31 - 1], np.int32)),
    "length 0": lambda f: f.write("length", np.array([40, 0, 33, 64], np.int32)),
    "length -5": lambda f: f.write("length", np.array([40, -5, 33, 64], np.int32)),
    "length -2**31": lambda f: f.write("length", np.array([40, 5, -(2**31), 64], np.int32)),
    "no lengths at all": lambda f: f.write("length", np.zeros(4, np.int32)),
    "split 7": lambda f: f.write("split", np.array([0, 1, 7, 1], np.int8)),
    "split -1": lambda f: f.write("split", np.array([0, 1, -1, 1], np.int8)),
    "splits by number": lambda f: f.attributes.update(split_names=[0, 1]),
    "splits of one name": lambda f: f.attributes.update(split_names=["train", "train"]),
    "splits that are a word": lambda f: f.attributes.update(split_names="train"),
    "truncated none": lambda f: f.attributes.update(truncated_samples="; rm -rf"),
    "extraction is a list": lambda f: f.attributes.update(extraction=[1]),
    "records are numbers": lambda f: f.records("0", "1", "2", "3"),
    "records are lists": lambda f: f.records("[]", "[]", "[]", "[]"),
    "records without names": lambda f: f.records("{}", "{}", "{}", "{}"),
    "records of other types": lambda f: f.records(*['{"id": [], "prompt": 1, "reasoning": null, "answer": {}}'] * 4),
    "records too few": lambda f: f.records(RECORD),
    "records too many": lambda f: f.records(*[RECORD] * 9),
    "records none": lambda f: f.write("text", np.zeros(0, np.uint8)),
    "records not JSON": lambda f: f.records("{", RECORD, RECORD, RECORD),
    "records not UTF-8": lambda f: f.write("text", np.full(9, 255, np.uint8)),
    "records deep": lambda f: f.records(RECORD, RECORD, RECORD, "[" * 100_000 + "]" * 100_000),
    "checksum of a file above": lambda f: f.attributes["checksums"].update({"../../evil": 1}),
    "checksum of a file elsewhere": lambda f: f.attributes["checksums"].update({"/etc/passwd": 1}),
    "checksums of words": lambda f: f.attributes["checksums"].update(text="x"),
    "manifest deep": lambda f: f.attributes["manifest"].update(rope=json.loads('{"a":' * 400 + "1" + "}" * 400)),
    "manifest of other types": lambda f: f.attributes["manifest"].update(layers="x", max_tokens=[], dataset=3),
    "layers is a number": lambda f: f.attributes["manifest"].update(layers=3),
}
FILES: dict[str, Callable[[Forgery], object]] = {
    "shard is a link to its like": lambda f: _outside(f, SHARD),
    "ledger is a link to its like": lambda f: _outside(f, LEDGER),
    "metadata is a link to its like": lambda f: _outside(f, "kv/zarr.json"),
    "shard is a link to a secret": lambda f: _link(f, SHARD, "/etc/passwd"),
    "shard is a link to nothing": lambda f: _link(f, SHARD, "/nonexistent"),
    "shard is a link to itself": lambda f: _link(f, SHARD, "0"),
    "shard is a link to zeros": lambda f: _link(f, SHARD, "/dev/zero"),
    "ledger is a link to zeros": lambda f: _link(f, LEDGER, "/dev/zero"),
    "text is a link to a secret": lambda f: _link(f, "text/c/0", "/etc/passwd"),
    "text is a link to zeros": lambda f: _link(f, "text/c/0", "/dev/zero"),
    "shard is a pipe": lambda f: _replace(f.path / SHARD, os.mkfifo),
    "ledger is a pipe": lambda f: _replace(f.path / LEDGER, os.mkfifo),
    "shard is a folder": lambda f: _replace(f.path / SHARD, Path.mkdir),
    "ledger is a folder": lambda f: _replace(f.path / LEDGER, Path.mkdir),
    "shard is huge and empty": lambda f: os.truncate(f.path / SHARD, 2**40),
    "ledger is huge and empty": lambda f: os.truncate(f.path / LEDGER, 2**40),
    "text is huge and empty": lambda f: os.truncate(f.path / "text" / "c" / "0", 2**40),
}
FORGERIES = {
    f"{group}: {name}": edit
    for group, edits in {
        "tokenizer": TOKENIZERS,
        "shape": SHAPES,
        "type": TYPES,
        "value": VALUES,
        "file": FILES,
    }.items()
    for name, edit in edits.items()
}
LATE = {
    "metadata is a link to zeros": lambda f: _link(f, "kv/zarr.json", "/dev/zero"),
    "metadata is a pipe": lambda f: _replace(f.path / "kv/zarr.json", os.mkfifo),
    "metadata is huge and empty": lambda f: os.truncate(f.path / "kv" / "zarr.json", 2**40),
    "attributes are a link to zeros": lambda f: _link(f, "zarr.json", "/dev/zero"),
    "attributes are huge and empty": lambda f: os.truncate(f.path / "zarr.json", 2**40),
    "attributes are deep": lambda f: (f.path / "zarr.json").write_text("[" * 100_000),
}
"""Done once the seal is made, which no file like these could have."""


def forge(sound_store: Path, folder: Path, name: str) -> Path:
    shutil.copytree(sound_store, folder / "x.zarr")
    forgery = Forgery(folder / "x.zarr")
    FORGERIES.get(name, lambda _: None)(forgery)
    forgery.finish()
    LATE.get(name, lambda _: None)(forgery)
    return forgery.path


COMMANDS = (["verify", "x.zarr"], [*HOSTILE_DISTILL, "--max-steps", 1])


def test_the_sound_store_passes_all_of_it(reader: Reader, sound_store: Path, tmp_path: Path) -> None:
    """Also once it went through the forger's hands: the faults below are what they seem."""
    forge(sound_store, tmp_path, "nothing")
    assert set(reader.read(tmp_path / "x.zarr").values()) == {"ok"}
    for argv in (*COMMANDS, ["inspect", "x.zarr"]):
        answer = reader.command(*argv, cwd=tmp_path)
        assert answer["code"] == 0, answer["output"]


def test_a_forged_store_is_refused_or_harmless(
    reader: Reader, sound_store: Path, tmp_path: Path, points: Points, tally: Tally, forgery: str
) -> None:
    path = forge(sound_store, tmp_path, forgery)
    there = {*tmp_path.iterdir(), tmp_path / "run", tmp_path / ".run.lock"}
    steps = reader.read(path)
    # A tokenizer's files are only looked at; a name that leads out of the store would be written.
    assert set(tmp_path.iterdir()) <= there
    assert not Path("/etc/x").exists()
    others = {step: outcome for step, outcome in steps.items() if outcome != "ok" and not outcome.startswith("refused")}
    assert others == {}
    for argv in COMMANDS[: points(0, len(COMMANDS))]:
        answer = reader.command(*argv, cwd=tmp_path, seconds=SECONDS if argv[0] == "verify" else 60)
        assert is_one_line(answer), f"{argv[0]} ended with {answer['code']}: {answer['output'][-600:]}"
        assert set(tmp_path.iterdir()) <= there
    refused = any(outcome != "ok" for outcome in steps.values())
    tally.add(
        f"forged store: {forgery.split(':')[0] if ':' in forgery else 'file'}", tried=1, injected=1, detected=refused
    )


def test_names_that_lead_out_of_a_store_are_refused(reader: Reader, sound_store: Path, tmp_path: Path) -> None:
    for number, name in enumerate(["above", "parent", "itself", "absolute", "below", "no name", "NUL", "Python"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        steps = reader.read(forge(sound_store, folder, f"tokenizer: {name}"))
        assert steps.get("tokenizer", steps["open"]).startswith("refused"), (name, steps)


@pytest.mark.parametrize("length", [65, 97, 2**31 - 1, 0, -5, -(2**31)])
def test_the_kv_of_a_length_that_no_sample_can_have_is_not_read(
    reader: Reader, sound_store: Path, tmp_path: Path, length: int
) -> None:
    """There is nothing to give for tokens that are not in the store, and what memory happens to hold is not it."""
    shutil.copytree(sound_store, tmp_path / "x.zarr")
    forgery = Forgery(tmp_path / "x.zarr")
    forgery.write("length", np.array([length, *HOSTILE_LENGTHS[1:]], np.int32))
    forgery.finish()
    steps = reader.read(forgery.path)
    assert steps.get("KV of 0", "refused").startswith("refused"), steps
    assert steps.get("batch", "refused").startswith("refused"), steps


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All forgeries in a full run, a few of every kind in a quick one."""
    step = 1 if metafunc.config.getoption("--faults") == "full" else 4
    if "forgery" in metafunc.fixturenames:
        metafunc.parametrize("forgery", [*FORGERIES, *LATE][::step])


# ---------------------------------------------------------------------- text

ROW = st.dictionaries(
    st.sampled_from(["id", "prompt", "reasoning", "answer", "question", "text", "other"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("1 #### 2"),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
)
GOOD_ROW = st.fixed_dictionaries(
    {"prompt": st.text(), "answer": st.sampled_from(["", "2"])}, optional={"id": st.text()}
)
LINE = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ROW.map(lambda row: json.dumps(row).encode()),
    GOOD_ROW.map(lambda row: json.dumps(row).encode()),
    ROW.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    ROW.map(lambda row: json.dumps(row).encode() + b"}"),
    st.sampled_from([b'{"text": "\\ud800"}', b'{"text": "a\\u0000"}', b'{"text": "a", "text": "b"}', b"NaN", b"\0"]),
)
DOCUMENT = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]),
    st.lists(LINE, max_size=5),
    st.sampled_from([b"\n", b"\r\n", b"\r", b"\0\n", b"\xe2\x80\xa8"]),
).map(lambda parts: parts[0] + parts[2].join(parts[1]))


def outcome_of(path: Path, data: bytes) -> list[Sample] | DataError:
    path.write_bytes(data)
    samples: list[Sample] | DataError
    try:
        samples = read_jsonl(path)
    except DataError as error:
        samples = error
    if isinstance(samples, DataError):
        assert str(path) in str(samples)
        return samples
    for sample in samples:
        assert all(isinstance(part, str) for part in asdict(sample).values())
        assert sample.text.encode()
    return samples


def test_any_bytes_are_samples_or_a_data_error(tmp_path: Path, points: Points, tally: Tally) -> None:
    outcomes = {True: 0, False: 0}

    @settings(max_examples=points(200, 3000), suppress_health_check=list(HealthCheck))
    @given(DOCUMENT)
    def check(data: bytes) -> None:
        outcomes[isinstance(outcome_of(tmp_path / "x.jsonl", data), DataError)] += 1

    check()
    assert min(outcomes.values()) > 10
    tried = sum(outcomes.values())
    tally.add("fuzzed .jsonl", tried=tried, injected=tried, detected=outcomes[True], lost=0)


def test_any_row_is_a_sample_or_a_data_error(points: Points, tally: Tally) -> None:
    outcomes = {True: 0, False: 0}

    @settings(max_examples=points(200, 3000), suppress_health_check=list(HealthCheck))
    @given(st.none() | st.integers() | st.text() | st.lists(st.integers()) | ROW | GOOD_ROW)
    def check(row: Any) -> None:
        outcome: Sample | DataError
        try:
            outcome = parse_row(row, "here", "0")
        except DataError as error:
            outcome = error
        refused = isinstance(outcome, DataError)
        assert str(outcome).startswith("here: expected" if refused else "Sample(")
        outcomes[refused] += 1

    check()
    assert min(outcomes.values()) > 10
    tried = sum(outcomes.values())
    tally.add("fuzzed rows", tried=tried, injected=tried, detected=outcomes[True], lost=0)


GOOD = b'{"text": "good"}\n'
LINES: dict[str, bytes] = {
    "nesting": b'{"text": "a", "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "open nesting": b'{"x": ' * 10_000,
    "key twice": b'{"text": "a", "text": "b"}',
    "key twice, escaped": b'{"text": "a", "te\\u0078t": "b"}',
    "key twice, inside": b'{"text": "a", "x": [{"y": 1, "y": 2}]}',
    "trailing garbage": b'{"text": "a"} x',
    "two objects": b'{"text": "a"}{"text": "b"}',
    "NUL": b'{"text": "a\0"}',
    "NULs": b"\0" * 100,
    "half a pair": b'{"text": "\\ud83e"}',
    "half a pair as a prompt": b'{"prompt": "\\udd8a", "answer": "b"}',
    "a number": b"1" * 5000,
    "a long number": b'{"text": "a", "id": ' + b"9" * 10_000 + b"}",
    "mark within": b'\xef\xbb\xbf{"text": "a"}',
    "1 MB of nothing": b'{"text": ' + b" " * 2**20,
    "lists in lists": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
}


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_is_refused_by_its_number(tmp_path: Path, tally: Tally, name: str) -> None:
    error = outcome_of(tmp_path / "x.jsonl", GOOD + LINES[name] + b"\n" + GOOD)
    assert isinstance(error, DataError)
    assert f"{tmp_path / 'x.jsonl'}, line 2: expected" in str(error)
    assert len(str(error)) < 1000
    tally.add("hostile lines", tried=1, injected=1, detected=1, lost=0)


def test_an_id_may_be_nested_as_deep_as_json_can_be(tmp_path: Path) -> None:
    """Or the line is refused, as `outcome_of` wants it."""
    for depth in [*range(1, 100, 20), *range(700, 1000, 3)]:
        found = outcome_of(tmp_path / "x.jsonl", b'{"text": "a", "id": ' + b"[" * depth + b"]" * depth + b"}")
        if depth < 100:
            assert found == [Sample("[" * depth + "]" * depth, "", "a", "")]
        else:
            assert isinstance(found, DataError) or len(found) == 1


def test_odd_but_sound_text_is_read_as_it_is(tmp_path: Path) -> None:
    huge = "x" * 2**20
    data = b"\xef\xbb\xbf" + b"\r\n".join(
        [GOOD.strip(), b"", b'{"text": "line\\u2028\\u0000"}', json.dumps({"text": huge}).encode(), GOOD.strip()]
    )
    samples = outcome_of(tmp_path / "x.jsonl", data)
    assert isinstance(samples, list)
    assert [sample.reasoning for sample in samples] == ["good", "line\u2028\0", huge, "good"]


# ---------------------------------------------------------------------- tokens


def test_no_token_of_the_hub_is_stored(tmp_path: Path) -> None:
    extract = ["extract", "--model", "qwen", "--samples", "24", "--eval-samples", "4", "--store", "x.zarr"]
    distill = ["distill", "--store", "x.zarr", "--max-steps", "2", "--max-new-tokens", "4", "--output-dir", "run"]
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    for argv in (extract, distill):
        process = subprocess.run(
            [sys.executable, "-m", "kvpipe.cli.app", *argv],
            cwd=tmp_path,
            env={**os.environ, **dict.fromkeys(names, TOKEN)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert process.returncode == 0, process.stderr
        assert TOKEN not in process.stdout + process.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
