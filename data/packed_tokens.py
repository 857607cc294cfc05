"""The tokens of many samples, end to end in memory: 13 bytes a token, whatever the lengths."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .tokenize import TokenizedSample


@dataclass(frozen=True)
class PackedTokens:
    """`input_ids` int32 `[N]`, `segment_ids` int8 `[N]` and `spans` int32 `[N, 2]` of samples of `length` int32 `[B]`
    tokens, N in all; `truncated` bool `[B]`. An item is a view of one sample."""

    length: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    input_ids: NDArray[np.int32]
    segment_ids: NDArray[np.int8]
    spans: NDArray[np.int32]

    @classmethod
    def of(cls, samples: Iterable[TokenizedSample]) -> PackedTokens:
        """Of samples that come one by one, none of which is kept."""
        length, truncated = array("i"), array("b")
        input_ids, segment_ids, spans = bytearray(), bytearray(), bytearray()
        for sample in samples:
            length.append(len(sample))
            truncated.append(sample.truncated)
            input_ids += sample.input_ids.tobytes()
            segment_ids += sample.segment_ids.tobytes()
            spans += sample.spans.tobytes()
        return cls(
            np.array(length, np.int32),
            np.array(truncated, np.bool_),
            np.frombuffer(input_ids, np.int32),
            np.frombuffer(segment_ids, np.int8),
            np.frombuffer(spans, np.int32).reshape(-1, 2),
        )

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Where the tokens of every sample begin `[B]`."""
        return np.cumsum(self.length, dtype=np.int64) - self.length

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, sample: int) -> TokenizedSample:
        start = int(self.starts[sample])
        tokens = slice(start, start + int(self.length[sample]))
        columns = self.input_ids[tokens], self.segment_ids[tokens], self.spans[tokens]
        return TokenizedSample(*columns, truncated=bool(self.truncated[sample]))

    def __iter__(self) -> Iterator[TokenizedSample]:
        return map(self.__getitem__, range(len(self)))
