"""Write damaged shards anew: exactly those, by the very teacher that wrote the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.progress import Progress

from ..kvcache.errors import ConfigError, StoreError
from ..kvcache.layout import LOGICAL_DTYPES
from ..kvcache.lock import only_writer
from ..kvcache.manifest import hash_config, hash_weights
from ..kvcache.store import KVStore
from ..kvcache.verify import Damage, require_side_arrays, verify_shards
from .models import builtin_teachers, in_fast_arithmetic, load_teacher, resolve_device
from .progress import progress_bar
from .ranks import require_one_process
from .teacher_pass import run_teacher


def repair(
    store_path: Path,
    *,
    model: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Damage]:
    """Find the damaged shards, run the teacher over their samples, and return what was mended.

    `model` is needed for a teacher that is not built in; `batch_size` is the extraction's own by default, so that the
    same device gives the same bytes. Nothing but KV can be mended: the samples are taken from the store.
    Raises StoreError for damage beside the KV, and for another teacher than the store's.
    """
    require_one_process("repair")
    resolved = resolve_device(device)
    with only_writer(store_path), progress or progress_bar() as bar:
        store = KVStore.open(store_path)
        require_side_arrays(store)
        damages = find_damages(store, bar)
        if not damages:
            return []
        teacher = load_teacher(
            model or _builtin_name(store),
            dtype=LOGICAL_DTYPES[store.manifest.dtype],
            device=resolved,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        _require_same_teacher(store, hash_config(teacher.config), hash_weights(teacher.state_dict().items()))
        teacher = in_fast_arithmetic(teacher)
        for damage in damages:
            _make_way(store, damage.shard)
        run_teacher(store, teacher, batch_size or store.extraction["batch_size"], bar)
    return damages


def _make_way(store: KVStore, shard: int) -> None:
    """What is not in the ledger is not there, whatever its files hold; a folder in a file's place would stay."""
    for path in (store.ledger.path(shard), *store.shard_paths(shard)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    store.ledger.path(shard).unlink(missing_ok=True)


def find_damages(store: KVStore, progress: Progress) -> list[Damage]:
    """All damaged shards of a store, with a bar while it is read."""
    task = progress.add_task("verify", total=store.num_shards, status="")
    damages = []
    for done, damage in enumerate(verify_shards(store), 1):
        progress.update(task, completed=done, status=f"{done}/{store.num_shards} shards")
        if damage is not None:
            damages.append(damage)
    return damages


def _builtin_name(store: KVStore) -> str:
    name = store.manifest.teacher.name
    if name not in builtin_teachers():
        raise ConfigError(
            f"{store.path} was written by a teacher that is not built in",
            expected=f"the folder or Hub id of {name}",
            found="none",
            remedy="Name it with --model",
        )
    return name


def _require_same_teacher(store: KVStore, config_hash: str, weights_hash: str) -> None:
    stored = store.manifest.teacher
    for field, expected, found in (
        ("config_hash", stored.config_hash, config_hash),
        ("weights_hash", stored.weights_hash, weights_hash),
    ):
        if expected != found:
            raise StoreError(
                f"{store.path} was written by another teacher (teacher.{field} differs)",
                expected=expected,
                found=found,
                remedy=f"Name {stored.name} as it was with --model and --revision",
            )
