"""What an extraction needs before it can write: the teacher, and the samples as it reads them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.corpus import Corpus, load_corpus
from ..data.packed_tokens import PackedTokens
from ..data.sample import select_segments
from ..data.tokenize import TokenizedSample, tokenize
from ..kvcache.create import SampleTable, json_lines
from ..kvcache.errors import ConfigError, ModelError
from ..kvcache.evict import NONE, kept_lengths, require_reachable
from ..kvcache.layout import LOGICAL_DTYPES, KVGeometry, dtype_name
from ..kvcache.manifest import (
    SCHEMA_VERSION,
    DatasetIdentity,
    Manifest,
    TeacherIdentity,
    hash_config,
    hash_samples,
    hash_tokenizer,
    hash_weights,
)
from ..kvcache.queries import recorded_queries
from ..kvcache.rope_parameters import rope_parameters
from .extract_config import ExtractConfig
from .models import (
    builtin_teachers,
    in_fast_arithmetic,
    load_teacher,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from .progress import progress_bar
from .ranks import is_main_process
from .teacher_pass import capture_kv, eligible_tokens, needs_queries

DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True)
class Prepared:
    """`tokens` are the samples of all splits of `corpus`, in order. `every_layer` is the geometry of the KV of all the
    teacher's layers, `geometry` that of those that are kept, with the queries that are kept. `wrong_answers` counts the
    teacher's, where it wrote the reasoning, which took it `reasoning_seconds`."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    teacher: PreTrainedModel
    tokens: PackedTokens
    manifest: Manifest
    every_layer: KVGeometry
    num_query_heads: int
    wrong_answers: int = 0
    reasoning_seconds: float = 0.0

    @property
    def geometry(self) -> KVGeometry:
        query_heads = self.num_query_heads if self.manifest.queries else 0
        return replace(self.every_layer, num_layers=len(self.manifest.layers), num_query_heads=query_heads)

    def first(self, max_tokens: int) -> Prepared:
        """A part of it: of every split samples in turn, at least one, up to about `max_tokens` in all."""
        splits = self.corpus.splits
        share = max(1, int(max_tokens / self.tokens.length.mean()) // len(splits))
        corpus = replace(self.corpus, splits={name: members[:share] for name, members in splits.items()})
        tokens = PackedTokens.of(tokenize(corpus.samples(), self.tokenizer, self.manifest.max_tokens))
        return replace(self, corpus=corpus, tokens=tokens)

    @property
    def evicts(self) -> bool:
        """Whether the KV of some tokens is not kept."""
        return self.manifest.eviction != NONE or self.manifest.segments != select_segments("all")

    @property
    def truncated(self) -> int:
        """Samples that were cut at the manifest's `max_tokens`."""
        return int(self.tokens.truncated.sum())


def prepare(config: ExtractConfig, progress: Progress | None = None) -> Prepared:
    """Load the teacher and the samples. Raises ConfigError, DataError or ModelError for what the user can mend."""
    device, dtype = resolve_device(config.device), resolve_dtype(config.dtype)
    source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    with progress or progress_bar(visible=is_main_process(), transient=True) as bar:
        task = bar.add_task("prepare", total=None, status="reading the data set")
        corpus = load_corpus(config.dataset, config.samples, config.eval_samples, config.seed)
        bar.update(task, status="loading the teacher")
        tokenizer = load_tokenizer(config.model, **source)
        teacher = load_teacher(config.model, dtype=dtype, device=device, **source)
        max_tokens = _max_tokens(config.max_tokens, teacher)
        bar.update(task, status="tokenizing")
        samples = tokenize(corpus.samples(), tokenizer, max_tokens)
        # One more than there are: a task that is complete says what it took, and this one goes on.
        tokens = PackedTokens.of(bar.track(samples, corpus.num_samples + 1, task_id=task))
        _require_vocabulary(teacher, tokens)
        bar.update(task, status="hashing data set and weights")
        manifest = _manifest(config, teacher, tokenizer, corpus, max_tokens)
    if config.reasoning == "dataset":
        require_kept(tokens, manifest)
    # Weights and dtype are in the manifest as they came.
    teacher = in_fast_arithmetic(teacher)
    return Prepared(corpus, tokenizer, teacher, tokens, manifest, *_probe(teacher, tokens[0], manifest))


def require_kept(tokens: PackedTokens, manifest: Manifest) -> None:
    """Raise ConfigError where no sample has a token that may be kept, or none reaches the budget."""
    require_reachable(manifest.budget, int(_eligible_lengths(tokens, manifest).max()))


def _eligible_lengths(tokens: PackedTokens, manifest: Manifest) -> NDArray[np.int32]:
    """Tokens of every sample whose KV may be kept."""
    eligible = eligible_tokens(tokens.segment_ids, manifest.segments)
    return np.add.reduceat(eligible, tokens.starts, dtype=np.int32)


def sample_table(prepared: Prepared) -> SampleTable:
    """What a store keeps of the samples beside their KV."""
    splits, tokens, manifest = prepared.corpus.splits, prepared.tokens, prepared.manifest
    return SampleTable(
        text=json_lines(map(asdict, prepared.corpus.samples())),
        split_names=tuple(splits),
        split=np.repeat(np.arange(len(splits), dtype=np.int8), [len(members) for members in splits.values()]),
        length=tokens.length,
        input_ids=tokens.input_ids,
        segment_ids=tokens.segment_ids,
        spans=tokens.spans,
        kv_length=kept_lengths(_eligible_lengths(tokens, manifest), manifest.budget) if prepared.evicts else None,
    )


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


def _require_vocabulary(teacher: PreTrainedModel, tokens: PackedTokens) -> None:
    """Raise ModelError for a tokenizer that is not the teacher's own."""
    size, largest = teacher.get_input_embeddings().num_embeddings, int(tokens.input_ids.max())
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
    samples = ({"split": split, **asdict(s)} for split, members in corpus.splits.items() for s in members)
    rope = rope_parameters(teacher)
    num_layers = teacher.config.get_text_config(decoder=True).num_hidden_layers
    return Manifest(
        schema_version=SCHEMA_VERSION,
        teacher=TeacherIdentity(
            name=config.model if config.model in builtin_teachers() else Path(config.model).name,
            revision=getattr(teacher.config, "_commit_hash", None) or config.revision or "",
            num_layers=num_layers,
            config_hash=hash_config(teacher.config),
            weights_hash=hash_weights(teacher.state_dict().items()),
        ),
        tokenizer_hash=hash_tokenizer(tokenizer),
        dataset=DatasetIdentity(corpus.name, corpus.num_samples, hash_samples(samples)),
        dtype=dtype_name(teacher.dtype),
        key_position="post-rope" if rope else "none",
        rope=rope,
        max_tokens=max_tokens,
        **config.declared(num_layers),
    )


@torch.inference_mode()
def _probe(teacher: PreTrainedModel, sample: TokenizedSample, manifest: Manifest) -> tuple[KVGeometry, int]:
    """Heads and channels of the KV as they are, not as the config says: head_dim is often its own. And the heads of the
    queries, if any are needed; raises ModelError where they cannot be seen."""
    ids = torch.from_numpy(sample.input_ids[:2].astype(np.int64))[None].to(teacher.device)
    with recorded_queries(teacher, layers=manifest.layers) if needs_queries(manifest) else nullcontext() as queries:
        pairs = capture_kv(teacher, ids, torch.ones_like(ids))
    _, num_kv_heads, _, head_dim = pairs[0][0].shape
    query_heads = max((query.shape[1] for query in (queries or {}).values()), default=0)
    return KVGeometry(len(pairs), num_kv_heads, head_dim, LOGICAL_DTYPES[manifest.dtype]), query_heads
