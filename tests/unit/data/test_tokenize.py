"""Every token knows its segment and its characters, whatever the tokenizer adds around them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.data.errors import DataError
from kvpipe.data.sample import Sample, Segment
from kvpipe.data.tokenize import TokenizedSample, prompt_ids, tokenize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"
CORPUS = ["Tom has 3 apples. How many does he have?\n3+4=7. 7*2=14.\n#### 14", "naïve 🦊 words\n#### yes"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=30)


def trained_tokenizer(*, adds_bos_and_eos: bool = False, trim_offsets: bool = False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 3, trainer)
    byte_level = processors.ByteLevel(trim_offsets=trim_offsets)
    template = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
    bpe.post_processor = processors.Sequence([byte_level, template]) if adds_bos_and_eos else byte_level
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


PLAIN = trained_tokenizer()
TRIMMING = trained_tokenizer(trim_offsets=True)
WITH_SPECIAL_TOKENS = trained_tokenizer(adds_bos_and_eos=True)
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer", [PLAIN, TRIMMING, WITH_SPECIAL_TOKENS], ids=["plain", "trims offsets", "adds BOS and EOS"]
)


def one(sample: Sample, tokenizer: PreTrainedTokenizerFast = PLAIN, max_tokens: int = 10_000) -> TokenizedSample:
    (tokenized,) = tokenize([sample], tokenizer, max_tokens)
    return tokenized


def segment_at(sample: Sample, character: int) -> Segment:
    """The segment that a character of the text is in, the slow way."""
    return [segment for segment, part in sample.parts() for _ in part][character]


@TOKENIZERS
@given(prompt=TEXT, reasoning=TEXT.filter(bool), answer=TEXT)
def test_tokens_know_their_segments_and_characters(
    tokenizer: PreTrainedTokenizerFast, prompt: str, reasoning: str, answer: str
) -> None:
    sample = Sample("0", prompt, reasoning, answer)
    tokens = one(sample, tokenizer)
    assert tokens.input_ids.dtype == tokens.spans.dtype == np.int32
    assert tokens.segment_ids.dtype == np.int8
    assert tokens.spans.shape == (len(tokens), 2)
    assert tokenizer.decode(tokens.input_ids, skip_special_tokens=True) == sample.text
    spans = tokens.spans.tolist()
    for segment, (start, stop) in zip(tokens.segment_ids.tolist(), spans, strict=True):
        assert 0 <= start <= stop <= len(sample.text)
        if start < stop:
            assert segment == segment_at(sample, start)
    assert all(left[0] <= right[0] for left, right in pairwise(spans))
    assert np.all(np.diff(tokens.segment_ids) >= 0)


@TOKENIZERS
@given(prompt=TEXT, answer=TEXT)
def test_one_eos_closes_the_last_segment(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> None:
    sample = Sample("0", prompt, "then", answer)
    tokens = one(sample, tokenizer)
    assert np.flatnonzero(tokens.input_ids == tokenizer.eos_token_id).tolist() == [len(tokens) - 1]
    assert tokens.segment_ids[-1] == sample.parts()[-1][0]
    start, stop = tokens.spans[-1]
    assert start == stop == tokens.spans[:-1].max()


def test_spans_cover_the_text_without_gaps() -> None:
    sample = Sample("0", "Tom has 3 apples.", "3+4=7. naïve 🦊", "14")
    covered = {character for start, stop in one(sample).spans.tolist() for character in range(start, stop)}
    assert covered == set(range(len(sample.text)))


def test_spans_count_characters_not_bytes() -> None:
    tokens = one(Sample("0", "🦊é", "x", ""))
    text = "🦊é\nx"
    start, stop = tokens.spans[-2]
    assert text[start:stop] == "x"
    assert tokens.segment_ids[-2] == Segment.REASONING


@TOKENIZERS
@given(prompt=TEXT.filter(bool), reasoning=TEXT)
def test_the_prompt_is_the_beginning_of_the_tokens(
    tokenizer: PreTrainedTokenizerFast, prompt: str, reasoning: str
) -> None:
    tokens = one(Sample("0", prompt, reasoning, "14"), tokenizer)
    ids = prompt_ids(tokens)
    assert 0 < len(ids) < len(tokens)
    assert np.array_equal(ids, tokens.input_ids[: len(ids)])
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith(prompt)


def test_a_bos_belongs_to_the_first_segment() -> None:
    tokens = one(Sample("0", "", "plain text", ""), WITH_SPECIAL_TOKENS)
    assert tokens.input_ids[0] == WITH_SPECIAL_TOKENS.bos_token_id
    assert tokens.spans[0].tolist() == [0, 0]
    assert set(tokens.segment_ids.tolist()) == {Segment.REASONING}


@TOKENIZERS
def test_truncation_is_cut_and_flagged(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = Sample("0", "Tom has 3 apples.", "3+4=7.", "14")
    whole = one(sample, tokenizer)
    assert not whole.truncated
    assert not one(sample, tokenizer, max_tokens=len(whole)).truncated
    for size in range(1, len(whole)):
        cut = one(sample, tokenizer, max_tokens=size)
        assert cut.truncated
        assert len(cut) == size
        for name in ("input_ids", "segment_ids", "spans"):
            assert np.array_equal(getattr(cut, name), getattr(whole, name)[:size])


def test_a_tokenizer_without_eos_adds_none() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer)
    sample = Sample("0", "Tom", "has", "3")
    assert np.array_equal(one(sample, tokenizer).input_ids, one(sample).input_ids[:-1])


def test_a_text_longer_than_the_model_takes_is_no_matter() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer, eos_token=EOS, model_max_length=4)
    sample = Sample("0", "Tom has 3 apples.", "3+4=7.", "14")
    assert np.array_equal(one(sample, tokenizer).input_ids, one(sample).input_ids)


def test_order_survives_any_chunk() -> None:
    samples = [Sample(f"s{i}", f"Tom has {i}.", "", str(i)) for i in range(7)]
    whole = list(tokenize(samples, PLAIN, 100))
    chunked = list(tokenize(iter(samples), PLAIN, 100, chunk=3))
    ids = [[*PLAIN(sample.text)["input_ids"], PLAIN.eos_token_id] for sample in samples]
    assert [tokens.input_ids.tolist() for tokens in chunked] == ids
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(whole, chunked, strict=True))
    assert list(tokenize([], PLAIN, 100)) == []


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(DataError, match=r"tokenizer: expected one with character offsets .*, found Slow"):
        next(tokenize([Sample("0", "a", "", "")], Slow(), 8))


def test_a_sample_without_a_token_is_refused() -> None:
    tokenizer = trained_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="empty: expected text with at least one token"):
        list(tokenize([Sample("empty", "", "", "")], tokenizer, max_tokens=8))
