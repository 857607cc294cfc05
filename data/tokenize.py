"""Text to token ids that still know their segment and their characters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .sample import Sample, Segment


@dataclass(frozen=True)
class TokenizedSample:
    """The tokens of one sample.

    `input_ids` int32 [T], `segment_ids` int8 [T] (see `Segment`), `spans` int32 [T, 2]: the half-open
    character range of each token in `Sample.text`. Special tokens have an empty range.
    """

    input_ids: NDArray[np.int32]
    segment_ids: NDArray[np.int8]
    spans: NDArray[np.int32]
    truncated: bool

    def __len__(self) -> int:
        return len(self.input_ids)


def tokenize(
    samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, max_tokens: int, chunk: int = 1024
) -> Iterator[TokenizedSample]:
    """Tokenize samples with the tokenizer's own special tokens and one EOS; cut at `max_tokens`.

    Raises DataError for a tokenizer without character offsets, whose spans could not be recorded, and for a
    sample without a single token.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "tokenizer",
            expected="one with character offsets (a fast one)",
            found=type(tokenizer).__name__,
            remedy="Put a tokenizer.json beside the model",
        )
    samples = iter(samples)
    while block := list(islice(samples, chunk)):
        encoded = tokenizer([s.text for s in block], return_offsets_mapping=True, verbose=False)
        for sample, ids, spans in zip(block, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield _with_segments(sample, ids, spans, tokenizer.eos_token_id, max_tokens)


def _with_segments(
    sample: Sample, ids: list[int], spans: list[tuple[int, int]], eos_token_id: int | None, max_tokens: int
) -> TokenizedSample:
    if eos_token_id is not None and (not ids or ids[-1] != eos_token_id):
        ids, spans = [*ids, eos_token_id], [*spans, (0, 0)]
    if not ids:
        raise DataError(
            sample.id,
            expected="text with at least one token",
            found=repr(sample.text[:40]),
            remedy="Leave the sample out, or mend the tokenizer",
        )
    spans = _place_special_tokens(spans)
    segments = [segment for segment, _ in sample.parts()]
    ends = list(accumulate(len(part) for _, part in sample.parts()))
    # A token belongs to the segment of its first character; a closing special token to the last segment.
    segment_ids = [segments[min(bisect_right(ends, start), len(segments) - 1)] for start, _ in spans]
    return TokenizedSample(
        input_ids=np.asarray(ids[:max_tokens], dtype=np.int32),
        segment_ids=np.asarray(segment_ids[:max_tokens], dtype=np.int8),
        spans=np.asarray(spans[:max_tokens], dtype=np.int32).reshape(-1, 2),
        truncated=len(ids) > max_tokens,
    )


def _place_special_tokens(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Special tokens come with the span (0, 0), also at the end: give them the place where they stand."""
    placed: list[tuple[int, int]] = []
    reached = 0
    for start, end in spans:
        reached = max(reached, end)
        placed.append((start, end) if start < end else (reached, reached))
    return placed


def prompt_ids(sample: TokenizedSample) -> NDArray[np.int32]:
    """The prompt's tokens, exactly as they stand in the whole text: where generation starts."""
    return sample.input_ids[sample.segment_ids == Segment.PROMPT]
