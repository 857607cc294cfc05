"""The samples of a store as the student reads them: in the teacher's tokens, or in its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..data.packed_tokens import PackedTokens
from ..data.sample import Sample, Segment
from ..data.tokenize import tokenize
from ..kvcache.errors import ConfigError
from ..kvcache.store import KVStore

NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class StudentText:
    """Tokens of all samples of a store: `input_ids` int32 and `segment_ids` int8 `[B, T]`, `length` int32 `[B]`, and
    `spans` int32 `[B, T, 2]` (characters), None where they are the very tokens that the teacher read. `other_text` bool
    `[B]` is where the teacher read another text after the same prompt."""

    input_ids: NDArray[np.int32]
    segment_ids: NDArray[np.int8]
    length: NDArray[np.int32]
    spans: NDArray[np.int32] | None = None
    other_text: NDArray[np.bool_] | None = None


def teachers_tokens(store: KVStore) -> StudentText:
    """As the store keeps them."""
    return StudentText(store.input_ids, store.segment_ids, store.length)


def own_tokens(store: KVStore, tokenizer: PreTrainedTokenizerBase) -> StudentText:
    """The store's text in another tokenizer, as far as the teacher read it."""
    samples = (Sample(**record) for record in store.records)
    tokens = PackedTokens.of(tokenize(samples, tokenizer, NO_LIMIT))
    last = store.spans[np.arange(len(tokens)), store.length - 1]
    # A special token closes what was read whole, characters that no token holds included.
    read = np.where(last[:, 0] == last[:, 1], NO_LIMIT, store.spans[..., 1].max(1))
    length = np.array([int((t.spans[:, 1] <= end).sum()) for t, end in zip(tokens, read, strict=True)], np.int32)
    shape = (len(tokens), int(length.max()))
    input_ids, spans = np.zeros(shape, np.int32), np.zeros((*shape, 2), np.int32)
    segment_ids = np.full(shape, Segment.PADDING, np.int8)
    for row, (sample, count) in enumerate(zip(tokens, length, strict=True)):
        input_ids[row, :count] = sample.input_ids[:count]
        segment_ids[row, :count] = sample.segment_ids[:count]
        spans[row, :count] = sample.spans[:count]
    return StudentText(input_ids, segment_ids, length, spans)


def resolve_time_map(time_map: str, text: StudentText) -> str:
    """What `auto` stands for: identity for the teacher's own tokens, which every other map would find too, else
    span-last; where some texts differ it stays auto, each sample's own. Raises ConfigError for maps that need the same
    tokens, or the same text, where they are not."""
    if text.spans is None:
        return "identity"
    differ = text.other_text is not None and bool(text.other_text.any())
    if time_map == "identity" or (differ and time_map in ("span-last", "span-mean")):
        raise ConfigError(
            "student and teacher read different " + ("text" if differ else "tokens"),
            expected="auto or segment" if differ else "span-last, span-mean or segment",
            found=time_map,
            remedy="Mend --time-map"
            + ("" if differ else ", or choose a student with the teacher's tokenizer and stores of all tokens"),
        )
    return ("auto" if differ else "span-last") if time_map == "auto" else time_map
