"""Long runs keep their memory, their file handles and their threads; a thread that fails says what happened to it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.data.word_problems import generate
from kvpipe.kvcache.errors import StoreError
from kvpipe.kvcache.reader import KVReader
from kvpipe.kvcache.store import KVStore
from kvpipe.kvcache.verify import verify_shards
from kvpipe.kvcache.writer import ShardWriter
from kvpipe.pipeline.distill import EVAL_EVERY
from kvpipe.pipeline.read_ahead import ReadAhead
from kvpipe.pipeline.teacher_pass import MAX_OPEN_SHARDS
from kvpipe.pipeline.teacher_recipes import train_tokenizer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from .conftest import EXTRACT, Commands, Tally, contents

MakeStore = Callable[..., tuple[KVStore, Tensor]]
FLAT = 1.02
EVALUATIONS = round(1 / EVAL_EVERY)
PASSING = 3
"""Handles and threads that are there for a moment; a leak has one for every shard, epoch or evaluation."""

# What every driver below begins with. Threads of libraries (Zarr's, torch's) are theirs to keep: they are there after
# the first use, so what is compared is a second use with it.
SAMPLING = """
import gc, json, os, sys, threading, time
from pathlib import Path
PAGE = os.sysconf("SC_PAGESIZE")

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE

def held():
    for _ in range(500):
        gc.collect()
        handles = sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if is_open(n))
        # asyncio's pool belongs to Zarr: it grows to its limit as it is needed.
        threads = sorted(t.name for t in threading.enumerate() if not t.name.startswith("asyncio_"))
        if not any(name.startswith("kvpipe") for name in threads):
            break
        time.sleep(0.01)
    return [handles, threads]

def is_open(number):
    try:
        return bool(os.readlink(f"/proc/self/fd/{number}")) and "/proc/" not in os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False

class Sampler(threading.Thread):
    def __init__(self, progress):
        super().__init__(name="sampler", daemon=True)
        self.progress, self.samples, self.over = progress, [], False

    def run(self):
        while not self.over:
            counts = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
            self.samples.append([self.progress(), rss(), *counts])
            time.sleep(0.002)

    def stop(self):
        self.over = True
        self.join()
        return self.samples
"""

EXTRACT_TWICE = f"""
{SAMPLING}
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
small, large, teacher, batch, shard = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])

def run(data):
    store = Path(data).with_suffix(".zarr")
    report = extract(ExtractConfig(teacher, store, data, batch_size=batch, max_shard_bytes=shard))
    assert report.store.complete

def shards():
    ledger = Path(large).with_suffix(".zarr") / "ledger" / "c"
    return len(os.listdir(ledger)) if ledger.is_dir() else 0

run(small)
before = held()
sampler = Sampler(shards)
sampler.start()
run(large)
samples = sampler.stop()
print(json.dumps([samples, before, held()]))
"""

DISTILL_TWICE = f"""
{SAMPLING}
from kvpipe.kvcache.errors import StoreError
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distill import distill
store, folder, epochs, victim = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def run(name, epochs):
    config = DistillConfig(mode="structured", epochs=epochs, batch_size=8, max_new_tokens=4)
    distill(config, [store], folder / name)

def evaluations():
    metrics = folder / "long" / "metrics.jsonl"
    return metrics.read_text().count("eval_ce") if metrics.exists() else 0

run("short", 1)
before, error, frames = held(), None, []
if victim:
    def damage():
        while evaluations() < 2:
            time.sleep(0.01)
        with Path(victim).open("r+b") as file:
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 1]))
    threading.Thread(target=damage, name="damage").start()
sampler = Sampler(evaluations)
sampler.start()
try:
    run("long", epochs)
except StoreError as caught:
    error, trace = str(caught), caught.__traceback__
    while trace:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
samples = sampler.stop()
print(json.dumps([samples, before, held(), error, frames]))
"""


def drive(script: str, *arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def quarters(samples: list[list[int]], column: int) -> tuple[list[int], list[int]]:
    """The second and the last quarter of the samples."""
    values = [sample[column] for sample in samples]
    quarter = len(values) // 4
    assert quarter >= 5, "too short a run"
    return values[quarter : 2 * quarter], values[-quarter:]


def open_files() -> list[str]:
    """What this process holds open, the folder that is being read for it left out."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(descriptor.readlink()))
        except OSError:
            continue
    return sorted(name for name in found if "/proc/" not in name)


def other_threads() -> list[str]:
    """Names of all threads; asyncio's pool belongs to Zarr and grows to its limit as it is needed."""
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith("asyncio_"))


def threads() -> list[str]:
    """Names of our own threads that live, once those that are ending had the time."""
    for _ in range(500):
        found = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvpipe")]
        if not found:
            return []
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, one head of 8 channels: what takes time and memory is kvpipe."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = train_tokenizer(list(generate("train", 200, 0)))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_samples(path: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(1, 10**6, count)
    path.write_text("".join(f'{{"text": "{i} and {number}"}}\n' for i, number in enumerate(numbers)))
    return path


# ---------------------------------------------------------------------- long runs


def test_a_long_extraction_keeps_its_memory_its_handles_and_its_threads(
    tiny_teacher: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    """Memory is compared where the run is long enough to say something: in `make test-faults`."""
    samples = points(3_000, 50_000)
    small, large = (write_samples(tmp_path / f"{n}.jsonl", n, seed=30) for n in (600, samples))
    sampled, before, after = drive(EXTRACT_TWICE, small, large, tiny_teacher, 8, 128_000)
    store = KVStore.open(large.with_suffix(".zarr"))
    assert store.num_samples == samples
    assert store.num_shards >= samples // 150
    assert not any(verify_shards(store))
    assert after == before
    written = [sample for sample in sampled if 0 < sample[0] < store.num_shards]
    # How many shards wait for the disk differs from moment to moment; that they are few does not.
    assert max(sample[2] for sample in written) <= len(before[0]) + MAX_OPEN_SHARDS + PASSING
    early, late = quarters(written, 3)
    assert max(late) <= max(early) + PASSING, "threads"
    if points(0, 1):
        early, late = quarters(written, 1)
        assert np.median(late) <= FLAT * np.median(early)
    tally.add("long extraction", tried=samples, injected=0, detected=0, lost=0)


@pytest.fixture(scope="module")
def extracted(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extracted")
    commands.finish(EXTRACT, folder)
    return folder / "x.zarr"


def test_many_epochs_keep_their_memory_their_handles_and_their_threads(
    extracted: Path, tmp_path: Path, points: Callable[[int, int], int], tally: Tally
) -> None:
    epochs = points(5, 20)
    sampled, before, after, error, _ = drive(DISTILL_TWICE, extracted, tmp_path, epochs, "")
    assert error is None
    assert after == before
    # Between the second evaluation and the third, and before the last.
    training = [[s for s in sampled if s[0] == evaluations] for evaluations in (2, EVALUATIONS - 1)]
    for column in (2, 3):
        early, late = ([sample[column] for sample in samples] for samples in training)
        assert max(late) <= max(early) + PASSING, "handles" if column == 2 else "threads"
    if points(0, 1):
        early, late = ([sample[1] for sample in samples] for samples in training)
        assert np.median(late) <= FLAT * np.median(early)
    tally.add("long distillation", tried=epochs, injected=0, detected=0, lost=0)


# ---------------------------------------------------------------------- threads that fail


def test_what_a_reading_thread_meets_ends_the_run_as_the_error_it_was(
    extracted: Path, tmp_path: Path, tally: Tally
) -> None:
    """A shard is damaged while the student trains; the thread that reads ahead sees it."""
    store = tmp_path / "x.zarr"
    for name, data in contents(extracted, set()).items():
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(data)
    victim = KVStore.open(store).shard_path(0)
    _, before, after, error, frames = drive(DISTILL_TWICE, store, tmp_path, 30, victim)
    assert error is not None
    assert f"shard 0 of {store} is damaged at sample 0" in error
    assert "token block 0 fails its checksum" in error
    assert "_one" in frames, "it came to the main thread itself"
    assert after == before
    assert not (tmp_path / "long" / "run.json").exists()
    tally.add("failing reader thread", tried=1, injected=1, detected=1, lost=0)


def test_what_a_writing_thread_meets_reaches_the_user_on_one_line(
    commands: Commands, extracted: Path, tmp_path: Path, tally: Tally
) -> None:
    """Its part is to enter finished shards in the ledger; here a file lies where the ledger's folder belongs."""
    commands.run(EXTRACT, tmp_path, kill_at_event=1_000_000, limits={"RLIMIT_FSIZE": 300_000})
    store = KVStore.open(tmp_path / "x.zarr")
    assert not store.complete
    obstacle = store.ledger.path(0).parents[1]
    for path in sorted(obstacle.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if obstacle.exists():
        obstacle.rmdir()
    obstacle.write_bytes(b"")
    answer = commands.run(EXTRACT, tmp_path)
    assert answer["code"] == 2, answer["output"]
    errors = [line for line in answer["output"].splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, answer["output"]
    assert "/ledger/c" in errors[0]
    assert "Traceback" not in answer["output"]
    assert list(tmp_path.rglob("*.partial")) == []
    obstacle.unlink()
    commands.finish(EXTRACT, tmp_path)
    attributes = {"zarr.json"}
    assert contents(tmp_path / "x.zarr" / "kv", set()) == contents(extracted / "kv", set())
    assert contents(tmp_path / "x.zarr" / "ledger", attributes) == contents(extracted / "ledger", attributes)
    tally.add("failing writer thread", tried=1, injected=1, detected=1, lost=0)


# ---------------------------------------------------------------------- many times over


def test_stores_that_are_read_and_closed_leave_no_handle(
    make_store: MakeStore, points: Callable[[int, int], int], tally: Tally
) -> None:
    store, kv = make_store([5, 40, 33, 2, 64], samples_per_shard=1)
    KVReader(store).read([0])
    before = open_files(), other_threads()
    times = points(50, 200)
    for number in range(times):
        reader = KVReader(KVStore.open(store.path))
        assert torch.equal(reader.read(range(store.num_samples)), kv)
        assert len(open_files()) == len(before[0]) + store.num_shards
        if number % 2:
            reader.close()
        del reader
    gc.collect()
    assert (open_files(), other_threads()) == before
    tally.add("opened and closed", tried=times, injected=0, detected=0, lost=0)


def test_damage_met_while_reading_leaves_no_handle(make_store: MakeStore) -> None:
    store, _ = make_store([5, 40, 33], samples_per_shard=1)
    assert store.num_shards == 3
    store.shard_path(1).write_bytes(store.shard_path(1).read_bytes()[:-1])
    KVReader(store).read([0])
    before = open_files()
    for _ in range(50):
        reader = KVReader(store)
        with pytest.raises(StoreError, match="shard 1"):
            reader.read([1, 2])
        reader.close()
        assert list(verify_shards(store))[1] is not None
    assert open_files() == before


def test_reading_ahead_that_is_given_up_leaves_no_thread(points: Callable[[int, int], int], tally: Tally) -> None:
    rng = np.random.default_rng(31)
    times = points(50, 200)
    for _ in range(times):
        ahead = ReadAhead(iter(range(10)))
        taken = int(rng.integers(0, 10))
        assert [next(ahead) for _ in range(taken)] == list(range(taken))
        del ahead
    gc.collect()
    assert threads() == []
    tally.add("reading ahead given up", tried=times, injected=times, detected=times, lost=0)


def test_reading_ahead_that_fails_leaves_no_thread(points: Callable[[int, int], int], tally: Tally) -> None:
    """The error is the very object that was raised, and comes where its item would have come."""
    times, rng = points(50, 200), np.random.default_rng(32)

    def items(count: int, error: Exception) -> Iterator[int]:
        yield from range(count)
        raise error

    for number in range(times):
        error, count = OSError(5, "Input/output error", f"shard {number}"), int(rng.integers(0, 5))
        ahead = ReadAhead(items(count, error))
        assert [next(ahead) for _ in range(count)] == list(range(count))
        with pytest.raises(OSError, match="Input/output error") as caught:
            next(ahead)
        assert caught.value is error
        del ahead, caught, error
    gc.collect()
    assert threads() == []
    tally.add("failing reader thread", tried=times, injected=times, detected=times, lost=0)


def test_a_slow_disk_holds_the_teacher_back(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, points: Callable[[int, int], int], tally: Tally
) -> None:
    """Shards that wait to be flushed keep their handles: they must not pile up without end."""
    count = points(120, 400)
    store, kv = make_store([5] * count, samples_per_shard=1, fill=False)
    flush, before, most = os.fsync, len(open_files()), 0

    def flush_slowly(descriptor: int) -> None:
        time.sleep(0.005)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_slowly)
    with ShardWriter(store, range(store.num_shards)) as writer:
        for start in range(0, count, 4):
            writer.put(range(start, start + 4), [(k[start : start + 4], v[start : start + 4]) for k, v in kv])
            most = max(most, len(open_files()) - before)
    assert store.complete
    assert most <= MAX_OPEN_SHARDS + PASSING, f"{most} shards of {count} were open at once"
    tally.add("slow disk", tried=count, injected=count, detected=count, lost=0)


@pytest.mark.parametrize("failing", ["thread", "caller", "main"])
def test_writers_that_fail_leave_no_handle_and_no_thread(
    make_store: MakeStore, points: Callable[[int, int], int], tally: Tally, failing: str
) -> None:
    """In the ledger (the thread's part), in a shard (the caller's), or in what the caller does between."""
    lengths = [5, 40, 33, 2, 64]
    store, kv = make_store(lengths, samples_per_shard=2, fill=False)
    obstacle = {"thread": store.ledger.path(1).parent, "caller": store.path / "kv" / "c" / "0" / "0" / "1"}
    if failing in obstacle:
        obstacle[failing].parent.mkdir(parents=True)
        obstacle[failing].write_bytes(b"")
    before, times = open_files(), points(50, 200)

    def write() -> None:
        with ShardWriter(store, range(store.num_shards)) as writer:
            for start, stop in ((0, 1), (1, 3), (3, 5)):
                writer.put(range(start, stop), [(k[start:stop], v[start:stop]) for k, v in kv])
                if failing == "main" and start == 1:
                    raise ZeroDivisionError

    expected = {"thread": OSError, "caller": OSError, "main": ZeroDivisionError}[failing]
    for _ in range(times):
        with pytest.raises(expected) as caught:
            write()
        if isinstance(caught.value, OSError):
            assert str(obstacle[failing]) in str(caught.value.filename)
        assert threads() == []
        assert list(store.path.rglob("*.partial")) == []
        del caught
    assert open_files() == before
    assert 1 not in store.finished_shards()
    tally.add("failing writer thread", tried=times, injected=times, detected=times, lost=0)
