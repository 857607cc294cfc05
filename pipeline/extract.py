"""Stage one: the teacher reads every sample once, and its KV cache goes to the store."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

from rich.progress import Progress
from transformers import PreTrainedModel

from ..kvcache.create import SampleTable, create_store, kv_bytes
from ..kvcache.errors import StoreError
from ..kvcache.files import PARTIAL
from ..kvcache.lock import only_writer
from ..kvcache.store import KVStore
from .extract_config import ExtractConfig
from .models import tokenizer_files
from .own_reasoning import draft_path, with_own_reasoning
from .preparation import Prepared, prepare, sample_table
from .progress import progress_bar
from .ranks import Ranks, joined_ranks
from .teacher_pass import ExtractReport, run_teacher

SHARDS_OF_SMALL_STORE = 16
MIN_SHARD_BYTES = 16_000_000
"""A small store is cut into several shards as well: an interruption costs a shard, not half of the store."""


def extract(config: ExtractConfig, progress: Progress | None = None) -> ExtractReport:
    """Write the teacher's KV for a whole data set, or the part of it that an interrupted run left.

    The processes of one job (`torchrun`, `accelerate launch`) share the work, and end with the same store.
    Raises ConfigError, DataError, ModelError or StoreError for what the user can mend.
    """
    require_place(config.store)
    with joined_ranks() as ranks, only_writer(config.store) if ranks.is_main else nullcontext():
        store, teacher = _store_and_teacher(config, ranks, progress)
        with progress or progress_bar(visible=ranks.is_main) as bar:
            return run_teacher(store, teacher, config.batch_size, bar, on_nonfinite=config.on_nonfinite, ranks=ranks)


def _store_and_teacher(
    config: ExtractConfig, ranks: Ranks, progress: Progress | None
) -> tuple[KVStore, PreTrainedModel]:
    """A store with all that is not KV. The samples that it was made from are let go: the teacher reads the store's."""
    prepared = prepare(config, progress)
    if not ranks.is_main:
        ranks.wait()
        _require_common(config.store)
    elif not is_store(config.store):
        _create(config, prepared, progress)
    store = open_store(config, prepared)
    if ranks.is_main:
        require_space(config.store, store.missing_bytes)
        _sweep(config.store)
        ranks.wait()
    return store, prepared.teacher


def _create(config: ExtractConfig, prepared: Prepared, progress: Progress | None) -> None:
    if config.reasoning == "teacher":
        prepared = with_own_reasoning(prepared, config, progress)
    table = sample_table(prepared)
    needed = table.stored_bytes(prepared.geometry, config.codec, samples_per_shard(config, prepared, table))
    require_space(config.store, needed)
    store = new_store(config, prepared, table)
    if config.reasoning == "teacher":
        store.add_extraction(prepared.reasoning_seconds, 0, str(prepared.teacher.device), config.batch_size)


def _require_common(store: Path) -> None:
    """Raise StoreError where the main process has written its store into a folder that this one does not see."""
    if not is_store(store):
        raise StoreError(
            f"{store} is not there for all processes of this job",
            expected="a folder that they share",
            found=f"none at {store.absolute()}",
            remedy="Place it on a shared disk with --store",
        )


def open_store(config: ExtractConfig, prepared: Prepared) -> KVStore:
    """The store that is there. Raises StoreError for one of another extraction."""
    store = KVStore.open(config.store)
    prepared.manifest.require_same(store.manifest, str(config.store))
    return store


def _sweep(store: Path) -> None:
    """What is of no use any more: a process that was killed while Zarr wrote the attributes leaves its temporary file,
    and what the teacher wrote is in the store now."""
    for orphan in store.glob(f"zarr.*{PARTIAL}"):
        orphan.unlink()
    draft_path(store).unlink(missing_ok=True)


def new_store(config: ExtractConfig, prepared: Prepared, table: SampleTable) -> KVStore:
    """An empty store for the samples of a table, at the place that a config names."""
    return create_store(
        config.store,
        prepared.manifest,
        table,
        prepared.geometry,
        tokenizer_files=tokenizer_files(prepared.tokenizer),
        truncated=prepared.truncated,
        samples_per_shard=samples_per_shard(config, prepared, table),
        wrong_answers=prepared.wrong_answers,
    )


def samples_per_shard(config: ExtractConfig, prepared: Prepared, table: SampleTable) -> int:
    """Of a store that is made of a table, by raw KV of all layers: whatever is kept of them, batches come in the same
    order, and runs pair."""
    num_bytes = kv_bytes(table.length, prepared.every_layer, "raw")
    shard_bytes = min(config.max_shard_bytes, max(num_bytes // SHARDS_OF_SMALL_STORE, MIN_SHARD_BYTES))
    return int(max(shard_bytes // (num_bytes / len(table.length)), 1))


def require_place(path: Path) -> Path:
    """The deepest folder that is there on the way to a store. Raises StoreError where files are in the way, and where
    something else is at its place."""
    if (path.exists() or path.is_symlink()) and not (is_store(path) or _is_free_folder(path)):
        raise StoreError(
            f"{path} is taken",
            expected="a free place, or a store to go on with",
            found=_what_is_at(path),
            remedy="Choose another --store",
        )
    existing = next((parent for parent in path.resolve().parents if parent.exists()), path)
    if not existing.is_dir():
        raise StoreError(
            f"{path} cannot be a store",
            expected="folders on the way there",
            found=f"the file {existing}",
            remedy="Place it elsewhere with --store",
        )
    return existing


def is_store(path: Path) -> bool:
    """Whether there is a store, sound or not."""
    return (path / "zarr.json").is_file()


def _is_free_folder(path: Path) -> bool:
    """An empty folder, which a store can take the place of: a link or a disk cannot be replaced, and the folder that
    this process stands in would be gone beneath it."""
    if not path.is_dir() or path.is_symlink() or path.is_mount() or path.resolve() == Path.cwd():
        return False
    return not any(path.iterdir())


def _what_is_at(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {path.readlink()}"
    return "a folder that is no store" if path.is_dir() else "a file"


def require_space(path: Path, needed: int) -> None:
    """Raise StoreError where so many bytes of a store do not fit on the disk."""
    free = shutil.disk_usage(require_place(path)).free
    if free < needed:
        raise StoreError(
            f"not enough space for {path}",
            expected=f"{needed / 1e6:,.1f} MB",
            found=f"{free / 1e6:,.1f} MB free",
            remedy="Free some, place it elsewhere with --store, or extract fewer --samples",
        )
