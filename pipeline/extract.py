"""Stage one: the teacher reads every sample once, and its KV cache goes to the store."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.corpus import BUILTIN_DATASET, Corpus, load_corpus
from ..data.sample import Segment
from ..data.tokenize import TokenizedSample, tokenize
from ..kvcache.align.layer_map import select_layers
from ..kvcache.codec import require_codec
from ..kvcache.create import TOKEN_BLOCK, SampleTable, create_store, stored_bytes
from ..kvcache.errors import ConfigError, ModelError, StoreError
from ..kvcache.files import PARTIAL
from ..kvcache.layout import KVGeometry, dtype_name
from ..kvcache.lock import only_writer
from ..kvcache.manifest import (
    SCHEMA_VERSION,
    DatasetIdentity,
    Manifest,
    TeacherIdentity,
    hash_config,
    hash_samples,
    hash_tokenizer,
    hash_weights,
    rope_parameters,
)
from ..kvcache.store import KVStore
from ..kvcache.writer import OnNonfinite
from .models import builtin_teachers, load_teacher, load_tokenizer, resolve_device, resolve_dtype, tokenizer_files
from .progress import progress_bar
from .ranks import Ranks, joined_ranks
from .teacher_pass import ExtractReport, capture_kv, run_teacher

DEFAULT_MAX_TOKENS = 1024
SHARDS_OF_SMALL_STORE = 16
MIN_SHARD_BYTES = 16_000_000
"""A small store is cut into several shards as well: an interruption costs a shard, not half of the store."""


@dataclass(frozen=True)
class ExtractConfig:
    """The options of `kvpipe extract`."""

    model: str
    store: Path
    dataset: str = BUILTIN_DATASET
    samples: int | None = None
    eval_samples: int = 256
    max_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int | None = None
    max_shard_bytes: int = 64_000_000
    revision: str | None = None
    trust_remote_code: bool = False
    seed: int = 0
    on_nonfinite: OnNonfinite = "exclude"
    codec: str = "raw"
    layers: str = "all"


def default_store(model: str) -> Path:
    """`stores/<model>.zarr`: the last part of a Hub id or folder."""
    return Path("stores") / f"{Path(model).name}.zarr"


def extract(config: ExtractConfig, progress: Progress | None = None) -> ExtractReport:
    """Write the teacher's KV for a whole data set, or the part of it that an interrupted run left.

    The processes of one job (`torchrun`, `accelerate launch`) share the work, and end with the same store.
    Raises ConfigError, DataError, ModelError or StoreError for what the user can mend.
    """
    if config.batch_size is not None and config.batch_size < 1:
        raise ConfigError("no such batch", expected="at least 1", found=config.batch_size, remedy="Mend --batch-size")
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    require_codec(config.codec)
    corpus = load_corpus(config.dataset, config.samples, config.eval_samples, config.seed)
    _require_folder(config.store)
    with joined_ranks() as ranks, only_writer(config.store) if ranks.is_main else nullcontext():
        return _extract(config, corpus, device, dtype, ranks, progress)


def _extract(
    config: ExtractConfig,
    corpus: Corpus,
    device: torch.device,
    dtype: torch.dtype | str,
    ranks: Ranks,
    progress: Progress | None,
) -> ExtractReport:
    source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model, **source)
    teacher = load_teacher(config.model, dtype=dtype, device=device, **source)
    max_tokens = _max_tokens(config.max_tokens, teacher)
    tokens = list(tokenize(chain.from_iterable(corpus.splits.values()), tokenizer, max_tokens))
    _require_vocabulary(teacher, tokens)
    manifest = _manifest(config, teacher, tokenizer, corpus, max_tokens)
    if not ranks.is_main:
        ranks.wait()
    store = _open_or_create(config, manifest, teacher, tokenizer, corpus, tokens)
    if ranks.is_main:
        ranks.wait()
    with progress or progress_bar(visible=ranks.is_main) as bar:
        return run_teacher(store, teacher, config.batch_size, bar, on_nonfinite=config.on_nonfinite, ranks=ranks)


def _max_tokens(requested: int | None, teacher: PreTrainedModel) -> int:
    positions = getattr(teacher.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if requested is None:
        return min(DEFAULT_MAX_TOKENS, positions or DEFAULT_MAX_TOKENS)
    if requested < 2 or (positions and requested > positions):
        raise ConfigError(
            "the teacher cannot read samples of this length",
            expected=f"2 to {positions or 'any number of'} tokens",
            found=requested,
            remedy="Mend --max-tokens",
        )
    return requested


def _require_vocabulary(teacher: PreTrainedModel, tokens: list[TokenizedSample]) -> None:
    """Raise ModelError for a tokenizer that is not the teacher's own."""
    size, largest = teacher.get_input_embeddings().num_embeddings, max(int(t.input_ids.max()) for t in tokens)
    if largest >= size:
        raise ModelError(
            "the teacher's vocabulary is smaller than its tokenizer's",
            expected=f"token ids below {size}",
            found=largest,
            remedy="Put the model's own tokenizer beside it",
        )


def _manifest(
    config: ExtractConfig,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    max_tokens: int,
) -> Manifest:
    samples = [{"split": split, **asdict(s)} for split, members in corpus.splits.items() for s in members]
    rope = rope_parameters(teacher.config)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        teacher=TeacherIdentity(
            name=config.model if config.model in builtin_teachers() else Path(config.model).name,
            revision=getattr(teacher.config, "_commit_hash", None) or config.revision or "",
            config_hash=hash_config(teacher.config),
            weights_hash=hash_weights(teacher.state_dict().items()),
        ),
        tokenizer_hash=hash_tokenizer(tokenizer),
        dataset=DatasetIdentity(corpus.name, len(samples), hash_samples(samples)),
        dtype=dtype_name(teacher.dtype),
        codec=config.codec,
        layers=select_layers(config.layers, teacher.config.get_text_config(decoder=True).num_hidden_layers),
        eviction="none",
        key_position="post-rope" if rope else "none",
        rope=rope,
        max_tokens=max_tokens,
        seed=config.seed,
    )


def _open_or_create(
    config: ExtractConfig,
    manifest: Manifest,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    tokens: list[TokenizedSample],
) -> KVStore:
    if config.store.exists():
        if not (config.store / "zarr.json").is_file():
            raise StoreError(
                f"{config.store} is taken",
                expected="a free place, or a store to go on with",
                found="a folder that is no store" if config.store.is_dir() else "a file",
                remedy="Choose another --store",
            )
        store = KVStore.open(config.store)
        manifest.require_same(store.manifest, str(config.store))
        # A process that was killed while Zarr wrote the attributes leaves its temporary file.
        for orphan in config.store.glob(f"zarr.*{PARTIAL}"):
            orphan.unlink()
        return store
    every_layer = _probe(teacher, tokens[0])
    geometry = replace(every_layer, num_layers=len(manifest.layers))
    table = _sample_table(corpus, tokens)
    _require_space(config.store, stored_bytes(table.length, geometry, manifest.codec))
    return create_store(
        config.store,
        manifest,
        table,
        geometry,
        tokenizer_files=tokenizer_files(tokenizer),
        truncated=sum(sample.truncated for sample in tokens),
        shard_bytes=_shard_bytes(config, stored_bytes(table.length, every_layer, "raw"))
        * geometry.num_layers
        // every_layer.num_layers,
    )


def _shard_bytes(config: ExtractConfig, num_bytes: int) -> int:
    """Of a store whose raw KV of all layers takes `num_bytes`."""
    return min(config.max_shard_bytes, max(num_bytes // SHARDS_OF_SMALL_STORE, MIN_SHARD_BYTES))


@torch.inference_mode()
def _probe(teacher: PreTrainedModel, sample: TokenizedSample) -> KVGeometry:
    """Heads, channels and dtype of the KV as they are, not as the config says: head_dim is often its own."""
    ids = torch.from_numpy(sample.input_ids[:2].astype(np.int64))[None].to(teacher.device)
    pairs = capture_kv(teacher, ids, torch.ones_like(ids))
    _, num_kv_heads, _, head_dim = pairs[0][0].shape
    return KVGeometry(len(pairs), num_kv_heads, head_dim, pairs[0][0].dtype)


def _require_folder(path: Path) -> Path:
    """The deepest folder on the way to a store that is there. Raises StoreError where a file is in the way."""
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise StoreError(
            f"{path} cannot be a store",
            expected="folders on the way there",
            found=f"the file {existing}",
            remedy="Place it elsewhere with --store",
        )
    return existing


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(_require_folder(path)).free
    if free < needed:
        raise StoreError(
            f"not enough space for {path}",
            expected=f"{needed / 1e6:,.1f} MB",
            found=f"{free / 1e6:,.1f} MB free",
            remedy="Free some, place it elsewhere with --store, or extract fewer --samples",
        )


def _sample_table(corpus: Corpus, tokens: list[TokenizedSample]) -> SampleTable:
    names = tuple(corpus.splits)
    samples = [(names.index(split), sample) for split, members in corpus.splits.items() for sample in members]
    length = np.array([len(t) for t in tokens], dtype=np.int32)
    shape = (len(tokens), -(-int(length.max()) // TOKEN_BLOCK) * TOKEN_BLOCK)
    table = SampleTable(
        records=[asdict(sample) for _, sample in samples],
        split_names=names,
        split=np.array([split for split, _ in samples], dtype=np.int8),
        length=length,
        input_ids=np.zeros(shape, np.int32),
        segment_ids=np.full(shape, Segment.PADDING, np.int8),
        spans=np.zeros((*shape, 2), np.int32),
    )
    for row, sample in enumerate(tokens):
        table.input_ids[row, : len(sample)] = sample.input_ids
        table.segment_ids[row, : len(sample)] = sample.segment_ids
        table.spans[row, : len(sample)] = sample.spans
    return table
