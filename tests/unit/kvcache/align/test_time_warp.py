"""Every student token learns from the teacher's tokens of its own text, or from none."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kvpipe.data.sample import Sample
from kvpipe.data.tokenize import tokenize
from kvpipe.kvcache.align.time_warp import Coverage, SampleMap, TimeMap, equal_spans, segment_map, span_map
from kvpipe.kvcache.layout import take_tokens
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Reduce = Literal["last", "mean"]
Spans = NDArray[np.int32]

BOS, EOS = "<s>", "</s>"
REDUCES: tuple[Reduce, ...] = ("last", "mean")
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1, max_size=20)


# ---------------------------------------------------------------------- tokenizers


def byte_level(*merges: str, bos: bool = False, trim: bool = False) -> PreTrainedTokenizerFast:
    """Bytes, and what some merges make of them: `byte_level("2 0", "20 1")` reads 201 as one token."""
    pieces = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    offsets = processors.ByteLevel(trim_offsets=trim)
    first = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    bpe.post_processor = processors.Sequence([offsets, first]) if bos else offsets
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def byte_fallback(*characters: str) -> PreTrainedTokenizerFast:
    """Some characters, and the bytes of all others."""
    pieces = [BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    bpe = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


def whole_words(*words: str) -> PreTrainedTokenizerFast:
    """Words and the spaces before them, as SentencePiece marks them."""
    level = models.WordLevel(vocab={piece: i for i, piece in enumerate([EOS, "?", *words])}, unk_token="?")
    tokenizer = Tokenizer(level)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def spans_of(text: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int = 1000) -> Spans:
    (tokens,) = tokenize([Sample("0", "", text, "")], tokenizer, max_tokens)
    return tokens.spans


def counterparts(student: Spans, teacher: Spans, reduce: Reduce = "last") -> list[list[int]]:
    """The places that carry weight, token by token."""
    found = span_map(student, teacher, reduce)
    return [places[weights > 0].tolist() for places, weights in zip(found.index, found.weight, strict=True)]


DIGITS = byte_level()
NUMBERS = byte_level("2 0", "20 1")


# ---------------------------------------------------------------------- spans


def test_a_number_in_one_token_learns_from_its_last_digit_or_from_all() -> None:
    student, teacher = spans_of("a201b", NUMBERS), spans_of("a201b", DIGITS)
    assert counterparts(student, teacher) == [[0], [3], [4], [5]]
    assert counterparts(student, teacher, "mean") == [[0], [1, 2, 3], [4], [5]]
    weight = span_map(student, teacher, "mean").weight
    assert weight[1].tolist() == pytest.approx([1 / 3] * 3)
    assert weight[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("reduce", REDUCES)
def test_digits_learn_from_the_number_that_holds_them(reduce: Reduce) -> None:
    student, teacher = spans_of("a201b", DIGITS), spans_of("a201b", NUMBERS)
    assert counterparts(student, teacher, reduce) == [[0], [1], [1], [1], [2], [3]]


def test_the_last_counterpart_has_read_no_further_where_one_has() -> None:
    """`abc|d` against `ab|cd`: the first token takes `ab`, for `cd` has read on."""
    student = np.array([[0, 3], [3, 4]], np.int32)
    teacher = np.array([[0, 2], [2, 4]], np.int32)
    assert counterparts(student, teacher) == [[0], [1]]
    assert counterparts(student, teacher, "mean") == [[0, 1], [1]]


def test_the_bytes_of_a_character_pair_one_to_one_or_share() -> None:
    whole, parts = byte_fallback("a", "🦊"), byte_fallback("a")
    student, teacher = spans_of("a🦊a", whole), spans_of("a🦊a", parts)
    assert counterparts(teacher, teacher) == [[i] for i in range(7)]
    assert counterparts(student, teacher) == [[0], [4], [5], [6]]
    assert counterparts(student, teacher, "mean") == [[0], [1, 2, 3, 4], [5], [6]]
    assert counterparts(teacher, student) == [[0], [1], [1], [1], [1], [2], [3]]


def test_half_an_emoji_learns_from_its_half() -> None:
    first, second, third, fourth = spell("🦊")
    halves = byte_level(f"{first} {second}", f"{third} {fourth}")
    student, teacher = spans_of("🦊", halves), spans_of("🦊", DIGITS)
    assert len(student) == 3
    assert counterparts(student, teacher) == [[1], [3], [4]]
    assert counterparts(student, teacher, "mean") == [[0, 1], [2, 3], [4]]
    assert counterparts(teacher, student) == [[0], [0], [1], [1], [2]]


def spell(text: str) -> str:
    """A text in the letters that stand for its bytes."""
    ((letters, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return letters


def test_line_ends_and_leading_spaces_go_with_their_token() -> None:
    carriage, line, space = spell("\r"), spell("\n"), spell(" ")
    joined = byte_level(f"{carriage} {line}", f"{space} b")
    student, teacher = spans_of("a\r\n b", joined), spans_of("a\r\n b", DIGITS)
    assert counterparts(student, teacher) == [[0], [2], [4], [5]]
    assert counterparts(teacher, student) == [[0], [1], [1], [2], [2], [3]]
    words = spans_of("one two", whole_words("one", "▁two"))
    assert counterparts(words, spans_of("one two", DIGITS)) == [[2], [6], [7]]


def test_a_space_that_the_teacher_leaves_out_of_its_spans_has_no_counterpart() -> None:
    trims = byte_level(f"{spell(' ')} b", trim=True)
    assert counterparts(spans_of("a b", DIGITS), spans_of("a b", trims)) == [[0], [], [1], [2]]


@pytest.mark.parametrize("reduce", REDUCES)
def test_special_tokens_pair_with_those_at_the_same_place(reduce: Reduce) -> None:
    with_bos = byte_level(bos=True)
    student, teacher = spans_of("ab", with_bos), spans_of("ab", DIGITS)
    assert counterparts(student, teacher, reduce) == [[], [0], [1], [2]]
    assert counterparts(teacher, student, reduce) == [[1], [2], [3]]
    assert counterparts(student, student, reduce) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("reduce", REDUCES)
def test_what_is_cut_off_has_no_counterpart(reduce: Reduce) -> None:
    whole, cut = spans_of("a201b", DIGITS), spans_of("a201b", DIGITS, max_tokens=3)
    assert counterparts(whole, cut, reduce) == [[0], [1], [2], [], [], []]
    assert counterparts(cut, whole, reduce) == [[0], [1], [2]]
    assert counterparts(spans_of("a201b", NUMBERS), cut)[1:] == [[2], [], []]
    nothing = np.zeros((0, 2), np.int32)
    assert counterparts(whole, nothing, reduce) == [[]] * len(whole)
    assert counterparts(nothing, whole, reduce) == []


@st.composite
def cut_text(draw: st.DrawFn, length: int) -> Spans:
    """A text of so many characters in tokens: most follow each other, some share one character, some are empty."""
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=8))})
    spans: list[tuple[int, int]] = []
    for start, end in pairwise(cuts):
        spans += [(start, start)] * draw(st.sampled_from([0, 0, 0, 1, 2]))
        spans += [(start, end)] * (draw(st.integers(1, 3)) if end == start + 1 else 1)
    spans += [(length, length)] * draw(st.integers(0, 2))
    return np.array(spans[: draw(st.integers(0, len(spans)))], np.int32).reshape(-1, 2)


PAIRS = st.integers(0, 12).flatmap(lambda length: st.tuples(cut_text(length), cut_text(length)))


def expected_counterparts(student: Spans, teacher: Spans, reduce: Reduce) -> list[list[int]]:
    """By the definition, token by token."""
    own, other = [tuple(span) for span in student.tolist()], [tuple(span) for span in teacher.tolist()]
    rows = []
    for place, (start, end) in enumerate(own):
        if same := [j for j, span in enumerate(other) if span == (start, end)]:
            rank, twins = own[:place].count((start, end)), own.count((start, end))
            first = rank * len(same) // twins
            row = same[first : max(first + 1, (rank + 1) * len(same) // twins)]
        else:
            row = [j for j, (a, b) in enumerate(other) if max(a, start) < min(b, end)]
            row = list(range(row[0], row[-1] + 1)) if reduce == "mean" and row else row
        if reduce == "last" and row:
            row = [max([j for j in row if other[j][1] <= end], default=row[0])]
        rows.append(row)
    return rows


@pytest.mark.parametrize("reduce", REDUCES)
@given(pair=PAIRS)
def test_counterparts_are_what_the_definition_says(reduce: Reduce, pair: tuple[Spans, Spans]) -> None:
    assert counterparts(*pair, reduce) == expected_counterparts(*pair, reduce)


def require_map(sample: SampleMap, num_teacher_tokens: int) -> None:
    """Rows sum to 1 or 0, places are there, and later tokens never look further back."""
    index, weight = sample.index, sample.weight
    sums = weight.sum(axis=1)
    assert np.all((sums == 0) | (np.abs(sums - 1) < 1e-6))
    assert np.all(weight >= 0)
    found = sums > 0
    assert np.all((index[found] >= 0) & (index[found] < num_teacher_tokens))
    for edge in (index[found].min(axis=1), index[found].max(axis=1)):
        assert np.all(np.diff(edge) >= 0)


def test_bytes_that_reach_across_characters_keep_the_order() -> None:
    """A token of the end of one character and the beginning of the next overlaps the other bytes of both."""
    student, teacher = np.array([[2, 4], [3, 4], [3, 4]], np.int32), np.array([[2, 3], [3, 4], [3, 4]], np.int32)
    assert counterparts(student, teacher) == [[1], [1], [2]]
    assert counterparts(student, teacher, "mean") == [[0, 1], [1], [2]]
    student, teacher = np.array([[3, 4], [3, 4], [3, 5]], np.int32), np.array([[3, 4], [3, 4], [4, 5]], np.int32)
    assert counterparts(student, teacher) == [[0], [1], [2]]
    assert counterparts(student, teacher, "mean") == [[0], [1], [1, 2]]


MERGES = [f"{a} {b}" for a, b in pairwise(spell("é漢🦊字 2 0 1"))]
"""Some of them join the last byte of a character to the first of the next."""


@pytest.mark.parametrize("reduce", REDUCES)
@given(
    text=st.one_of(TEXT, st.text("é漢🦊字 201a", min_size=1, max_size=20)),
    merges=st.lists(st.sampled_from(MERGES), max_size=6, unique=True),
    student_tokens=st.integers(1, 60),
    teacher_tokens=st.integers(1, 60),
)
def test_maps_of_real_tokenizers_are_monotone(
    reduce: Reduce, text: str, merges: list[str], student_tokens: int, teacher_tokens: int
) -> None:
    student = spans_of(text, byte_level(*merges), student_tokens)
    for tokenizer in (DIGITS, byte_level(*MERGES, bos=True), byte_fallback("a", "漢")):
        teacher = spans_of(text, tokenizer, teacher_tokens)
        require_map(span_map(student, teacher, reduce), len(teacher))
        require_map(span_map(teacher, student, reduce), len(student))


@pytest.mark.parametrize("reduce", REDUCES)
@given(text=TEXT, merges=st.lists(st.sampled_from(MERGES), max_size=6, unique=True))
def test_equal_tokens_map_onto_themselves(reduce: Reduce, text: str, merges: list[str]) -> None:
    for tokenizer in (byte_level(*merges, bos=True), byte_fallback("a")):
        spans = spans_of(text, tokenizer)
        found = span_map(spans, spans, reduce)
        assert found.index.tolist() == [[i] for i in range(len(spans))]
        assert found.weight.tolist() == [[1.0]] * len(spans)


# ---------------------------------------------------------------------- segments


SEGMENTS = st.lists(st.integers(0, 4), min_size=3, max_size=3).map(
    lambda sizes: np.repeat([0, 1, 2], sizes).astype(np.int8)
)


@given(SEGMENTS, SEGMENTS)
def test_segments_are_stretched_ends_on_ends(student: NDArray[np.int8], teacher: NDArray[np.int8]) -> None:
    sample = segment_map(student, teacher)
    require_map(sample, len(teacher))
    for segment in range(3):
        own, other = np.flatnonzero(student == segment), np.flatnonzero(teacher == segment)
        place = (sample.index[own] * sample.weight[own]).sum(axis=1)
        if len(other) == 0:
            assert not sample.weight[own].any()
        elif len(own) > 1:
            assert place == pytest.approx(np.linspace(other[0], other[-1], len(own)))
        else:
            assert place == pytest.approx(other[-1:].repeat(len(own)))


@given(SEGMENTS, SEGMENTS)
def test_the_nearest_is_within_half_a_token(student: NDArray[np.int8], teacher: NDArray[np.int8]) -> None:
    linear, nearest = segment_map(student, teacher), segment_map(student, teacher, interpolation="nearest")
    require_map(nearest, len(teacher))
    place = (linear.index * linear.weight).sum(axis=1, keepdims=True)
    assert nearest.index.shape == (len(student), 1)
    assert np.array_equal(nearest.weight[:, 0] > 0, linear.weight.any(axis=1))
    assert np.all(np.abs(place - nearest.index) <= 0.5 + 1e-6)


@given(SEGMENTS)
def test_equal_segments_map_onto_themselves(segments: NDArray[np.int8]) -> None:
    for interpolation in ("linear", "nearest"):
        found = segment_map(segments, segments, interpolation=interpolation)
        assert found.index[:, 0].tolist() == list(range(len(segments)))
        assert np.all(found.weight[:, 0] == 1)
        assert not found.weight[:, 1:].any()


def test_padding_and_missing_segments_have_no_counterpart() -> None:
    student, teacher = np.array([0, 1, 1, 2, -1, -1], np.int8), np.array([1, 1, 2, -1], np.int8)
    found = segment_map(student, teacher)
    assert found.weight.sum(axis=1).tolist() == [0, 1, 1, 1, 0, 0]
    assert found.index[1:4, 0].tolist() == [0, 1, 2]


def test_a_ratio_leaves_the_rest_of_a_segment_out() -> None:
    student, teacher = np.array([0, 0, 1, 1], np.int8), np.array([0] * 10 + [1] * 10, np.int8)
    found = segment_map(student, teacher, ratio={1: 0.4}, interpolation="nearest")
    assert found.index[:, 0].tolist() == [0, 9, 10, 13]
    found = segment_map(student, teacher, ratio={0: 0.01}, interpolation="nearest")
    assert found.index[:, 0].tolist() == [0, 0, 10, 19]


# ---------------------------------------------------------------------- batches and KV


def make_kv(num_samples: int, num_tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, num_samples, 3, num_tokens, 4, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def sample_maps(draw: st.DrawFn, num_teacher_tokens: int = 6) -> SampleMap:
    """Any places with any weights, normalised."""
    tokens, width = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    size = tokens * width
    places = draw(st.lists(st.integers(0, num_teacher_tokens - 1), min_size=size, max_size=size))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=size, max_size=size))
    weight = np.array(weights).reshape(tokens, width)
    total = weight.sum(axis=1, keepdims=True)
    weight = (weight / np.where(total > 0, total, 1)).astype(np.float32)
    return SampleMap(np.array(places, np.int64).reshape(tokens, width), weight)


BATCHES = st.lists(sample_maps(), min_size=1, max_size=4)


def warp_reference(kv: Tensor, samples: list[SampleMap]) -> Tensor:
    """Token by token, in float64."""
    tokens = max(len(sample.index) for sample in samples)
    out = torch.zeros(*kv.shape[:4], tokens, kv.shape[-1], dtype=torch.float64)
    for row, sample in enumerate(samples):
        for token in range(len(sample.index)):
            for place, share in zip(sample.index[token].tolist(), sample.weight[token].tolist(), strict=True):
                out[:, :, row, :, token] += share * kv[:, :, row, :, place].double()
    return out


@given(BATCHES)
def test_warped_kv_is_what_a_loop_over_tokens_gives(samples: list[SampleMap]) -> None:
    kv = make_kv(len(samples), 6)
    torch.testing.assert_close(TimeMap.from_samples(samples).warp(kv), warp_reference(kv, samples), atol=1e-12, rtol=0)


@given(BATCHES, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_the_dtype_changes_the_rounding_alone(samples: list[SampleMap], dtype: torch.dtype) -> None:
    kv = make_kv(len(samples), 6, dtype)
    warped = TimeMap.from_samples(samples).warp(kv)
    assert warped.dtype == dtype
    torch.testing.assert_close(warped, warp_reference(kv, samples).to(dtype), atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_places_are_taken_to_the_bit(dtype: torch.dtype) -> None:
    kv, index = make_kv(2, 6, dtype), torch.tensor([[0, 0, 5, 3], [2, 1, 1, 4]])
    warped = TimeMap(index[..., None], torch.ones(2, 4, 1)).warp(kv)
    assert torch.equal(warped, take_tokens(kv, index))


def test_tokens_without_counterpart_are_zero_whatever_stands_there() -> None:
    kv = make_kv(1, 3)
    kv[:, :, :, :, 0] = torch.inf
    time_map = TimeMap.from_samples(
        [span_map(np.array([[0, 1], [1, 2]], np.int32), np.array([[9, 9], [1, 2]], np.int32))]
    )
    warped = time_map.warp(kv)
    assert time_map.mask.tolist() == [[0, 1]]
    assert not warped[:, :, :, :, 0].any()
    assert torch.equal(warped[:, :, :, :, 1], kv[:, :, :, :, 1])


def test_what_was_evicted_leaves_no_trace_of_what_stands_in_its_place() -> None:
    kv = make_kv(1, 3)
    kv[:, :, :, :, 0] = torch.inf
    half = TimeMap(torch.tensor([[[4, 7]]]), torch.tensor([[[0.5, 0.5]]])).restrict(torch.tensor([[1, 4, 9]]))
    assert torch.equal(half.warp(kv)[:, :, :, :, 0], kv[:, :, :, :, 1])


@given(BATCHES, st.randoms())
def test_permuting_the_batch_permutes_what_comes_out(samples: list[SampleMap], random: Any) -> None:
    order = list(range(len(samples)))
    random.shuffle(order)
    kv = make_kv(len(samples), 6)
    warped = TimeMap.from_samples(samples).warp(kv)
    permuted = TimeMap.from_samples([samples[row] for row in order]).warp(kv[:, :, order])
    assert torch.equal(permuted, warped[:, :, order])


@given(BATCHES, sample_maps())
def test_more_padding_changes_nothing(samples: list[SampleMap], longer: SampleMap) -> None:
    """Neither the student's, nor another sample's counterparts, nor the teacher's."""
    alone, together = TimeMap.from_samples(samples), TimeMap.from_samples([*samples, longer])
    kv = torch.cat([make_kv(len(samples) + 1, 6), torch.full((2, 2, len(samples) + 1, 3, 2, 4), torch.nan)], dim=4)
    warped, tokens = together.warp(kv)[:, :, :-1], alone.index.shape[1]
    assert torch.equal(warped[..., :tokens, :], alone.warp(kv[:, :, :-1, :, :6]))
    assert not warped[..., tokens:, :].any()
    assert torch.equal(together.mask[:-1, :tokens], alone.mask)
    assert not together.mask[:-1, tokens:].any()


def test_gradients_reach_what_was_taken() -> None:
    time_map = TimeMap(torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[[0.25, 0.75], [0.0, 0.0]]]))
    kv = make_kv(1, 3).requires_grad_()
    assert torch.autograd.gradcheck(time_map.warp, kv)
    time_map.warp(kv).sum().backward()
    assert kv.grad is not None
    assert kv.grad[0, 0, 0, 0, :, 0].tolist() == [0.25, 0.75, 0.0]


@given(BATCHES, st.data())
def test_an_evicted_teacher_gives_its_weight_to_what_is_kept(samples: list[SampleMap], data: st.DataObject) -> None:
    kept = [sorted(data.draw(st.sets(st.integers(0, 5), max_size=6))) for _ in samples]
    kept[0] = kept[0] or [3]
    width = max(map(len, kept))
    positions = torch.tensor([places + [-1] * (width - len(places)) for places in kept])
    kv = make_kv(len(samples), 6)
    restricted = TimeMap.from_samples(samples).restrict(positions)
    reference = []
    for sample, places in zip(samples, kept, strict=True):
        left = np.where(np.isin(sample.index, places), sample.weight.astype(np.float64), 0)
        total = left.sum(axis=1, keepdims=True)
        reference.append(SampleMap(sample.index, (left / np.where(total > 0, total, 1)).astype(np.float32)))
    torch.testing.assert_close(
        restricted.warp(take_tokens(kv, positions)), warp_reference(kv, reference), atol=1e-6, rtol=0
    )
    assert torch.equal(restricted.mask, TimeMap.from_samples(reference).mask)
    sums = restricted.weight.sum(dim=-1)
    torch.testing.assert_close(sums, restricted.mask.float())


@given(BATCHES)
def test_a_teacher_that_keeps_every_token_changes_nothing(samples: list[SampleMap]) -> None:
    time_map = TimeMap.from_samples(samples)
    restricted = time_map.restrict(torch.arange(6).repeat(len(samples), 1))
    assert torch.equal(restricted.mask, time_map.mask)
    torch.testing.assert_close(restricted.weight, time_map.weight)
    assert torch.equal(restricted.index[restricted.weight > 0], time_map.index[restricted.weight > 0])


# ---------------------------------------------------------------------- coverage


def test_tokens_that_are_cut_alike_pair_one_to_one() -> None:
    student, teacher = spans_of("a201b", byte_level("2 0", "20 1", bos=True)), spans_of("a201b", DIGITS, max_tokens=5)
    # BOS and EOS have no counterpart; of a, 201 and b the middle one is cut otherwise.
    covered = (span_map(student, teacher).weight != 0).any(axis=1)
    assert covered.tolist() == [False, True, True, True, False]
    assert (covered & equal_spans(student, teacher)).tolist() == [False, True, False, True, False]


def test_coverage_adds_up() -> None:
    found = Coverage(tokens=5, covered=3, one_to_one=2)
    assert (found.share, found.one_to_one_share) == (0.6, 0.4)
    assert found + Coverage(5, 5, 5) == Coverage(10, 8, 7)
    assert sum([found, found], Coverage()).share == 0.6
    assert Coverage().share == Coverage().one_to_one_share == 0


@given(TEXT)
def test_equal_tokens_are_covered_one_to_one(text: str) -> None:
    spans = spans_of(text, byte_fallback("a"))
    assert (span_map(spans, spans).weight != 0).any(axis=1).all()
    assert equal_spans(spans, spans).all()
