"""A store's text in the student's own tokens, and which of the teacher's tokens these learn from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from kvpipe.data.sample import Sample, Segment
from kvpipe.data.word_problems import generate
from kvpipe.kvcache.align.time_warp import Coverage, TimeMap, equal_spans, segment_map, span_map
from kvpipe.kvcache.errors import ConfigError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import tokenizer_from_files
from kvpipe.pipeline.student_text import StudentText, own_tokens, resolve_time_map, teachers_tokens
from kvpipe.pipeline.token_alignment import TokenAlignment
from kvpipe.pipeline.training_data import KVDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CUT = 30
TIME_MAPS = ["span-last", "span-mean", "segment"]

SAMPLES = [
    *({"prompt": s.prompt, "reasoning": s.reasoning, "answer": s.answer} for s in generate("train", 8, 0)),
    {"text": "Zwölf 🎈 kosten 1234567 €, also 🎈🎈 doppelt so viel, mehr, als hier auf einer Zeile zu lesen ist."},
    {"prompt": "ü", "reasoning": "ö\n\n  ä", "answer": "12"},
]
"""Word problems, text of many bytes a character, and a short one."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and their commonest sequences, numbers whole, a token before the text and one after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((sample.text for sample in generate("train", 50, 1)), trainer)
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def make_text_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., KVStore]:
    """A store of SAMPLES, read by the built-in teacher; keywords are options of its extraction."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.jsonl").write_text("".join(f"{json.dumps(sample)}\n" for sample in SAMPLES))

    def make(**options: Any) -> KVStore:
        config = ExtractConfig("qwen", folder / f"{len(list(folder.iterdir()))}.zarr", eval_samples=2, **options)
        return extract(replace(config, dataset=str(folder / "text.jsonl"))).store

    return make


@pytest.fixture(scope="module")
def whole(make_text_store: Callable[..., KVStore]) -> KVStore:
    return make_text_store()


@pytest.fixture(scope="module")
def cut(make_text_store: Callable[..., KVStore]) -> KVStore:
    """Most samples are longer than what the teacher read of them."""
    return make_text_store(max_tokens=CUT)


# ---------------------------------------------------------------------- the student's tokens


def test_text_that_the_teacher_read_whole_is_the_students_from_first_to_last(
    whole: KVStore, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = own_tokens(whole, tokenizer)
    assert text.spans is not None
    for row, record in enumerate(whole.records):
        sample, length = Sample(**record), text.length[row]
        assert text.input_ids[row, :length].tolist() == [*tokenizer(sample.text)["input_ids"], tokenizer.eos_token_id]
        starts, ends = text.spans[row, :length].T
        assert ends[-1] == starts[-1] == len(sample.text)
        assert (starts[1:] <= ends[:-1]).all(), "no character is left out"
        assert (text.segment_ids[row, :length] >= Segment.PROMPT).all()
        assert (text.segment_ids[row, length:] == Segment.PADDING).all()
        assert not text.input_ids[row, length:].any()
        edge = 0
        for segment, part in sample.parts():
            edge += len(part)
            own = text.segment_ids[row, :length] == segment
            assert starts[own].min() >= edge - len(part)
            assert starts[own].max() < edge or segment == sample.parts()[-1][0]


def test_a_student_reads_no_further_than_the_teacher(cut: KVStore, tokenizer: PreTrainedTokenizerFast) -> None:
    text = own_tokens(cut, tokenizer)
    assert text.spans is not None
    assert cut.truncated > 5
    for row, record in enumerate(cut.records):
        sample, length, read = Sample(**record), text.length[row], cut.spans[row].max()
        assert length > 0
        assert text.spans[row].max() <= read
        everything = tokenizer(sample.text, return_offsets_mapping=True)["offset_mapping"]
        assert length == len(everything) + 1 or everything[length][1] > read, "nor less far"
        ended = tokenizer.eos_token_id in text.input_ids[row, :length]
        assert ended == (read == len(sample.text)), "only who has read all of a text has seen it end"


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_in_the_teachers_own_tokenizer_it_is_the_teachers_text(name: str, request: pytest.FixtureRequest) -> None:
    store: KVStore = request.getfixturevalue(name)
    text, kept = own_tokens(store, tokenizer_from_files(store.tokenizer_files())), teachers_tokens(store)
    width = int(store.length.max())
    assert text.spans is not None
    assert np.array_equal(text.length, kept.length)
    assert np.array_equal(text.input_ids, kept.input_ids[:, :width])
    assert np.array_equal(text.segment_ids, kept.segment_ids[:, :width])
    assert np.array_equal(text.spans, store.spans[:, :width])
    assert kept.spans is None


# ---------------------------------------------------------------------- which map


def text_of(spans: bool) -> StudentText:
    ids = np.ones((1, 2), np.int32)
    return StudentText(ids, np.zeros((1, 2), np.int8), np.array([2], np.int32), np.zeros((1, 2, 2), np.int32) * spans)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("auto", "span-last"), ("span-last", "span-last"), ("span-mean", "span-mean"), ("segment", "segment")],
)
def test_auto_is_the_last_token_that_a_student_shares_characters_with(
    whole: KVStore, tokenizer: PreTrainedTokenizerFast, asked: str, meant: str
) -> None:
    assert resolve_time_map(asked, own_tokens(whole, tokenizer)) == meant


@pytest.mark.parametrize("asked", ["auto", "identity", *TIME_MAPS])
def test_the_teachers_tokens_stay_where_they_are(whole: KVStore, asked: str) -> None:
    assert resolve_time_map(asked, teachers_tokens(whole)) == "identity"


def test_different_tokens_have_no_identity(whole: KVStore, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"different tokens: expected span-last, .* found identity. Mend --time-map"):
        resolve_time_map("identity", own_tokens(whole, tokenizer))


@pytest.mark.parametrize("time_map", TIME_MAPS)
def test_every_other_map_of_the_teachers_tokens_is_the_identity_too(whole: KVStore, time_map: str) -> None:
    found = TokenAlignment(whole, teachers_tokens(whole), time_map).of([0, 9], None)
    kv = torch.randn(1, 2, 2, 1, found.index.shape[1], 3)
    real = torch.arange(kv.shape[4]) < torch.from_numpy(whole.length[[0, 9]])[:, None]
    assert torch.equal(found.mask.bool(), real)
    torch.testing.assert_close(found.warp(kv), kv * real[:, None, :, None])


# ---------------------------------------------------------------------- token by token


@pytest.mark.parametrize("time_map", TIME_MAPS)
@pytest.mark.parametrize("name", ["whole", "cut"])
def test_the_map_of_a_batch_is_that_of_its_samples(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, time_map: str, name: str
) -> None:
    store: KVStore = request.getfixturevalue(name)
    text = own_tokens(store, tokenizer)
    assert text.spans is not None
    indices, bos = [3, 9, 0], tokenizer.bos_token_id
    found = TokenAlignment(store, text, time_map).of(indices, None)
    for row, index in enumerate(indices):
        own, other = text.length[index], store.length[index]
        if time_map == "segment":
            expected = segment_map(text.segment_ids[index, :own], store.segment_ids[index, :other])
        else:
            reduce = "mean" if time_map == "span-mean" else "last"
            expected = span_map(text.spans[index, :own], store.spans[index, :other], reduce)
        # The teacher's text begins without a token of its own; segments have no need of one.
        covered = (text.segment_ids[index] >= 0) & ((time_map == "segment") | (text.input_ids[index] != bos))
        assert found.mask[row].tolist() == covered[: found.mask.shape[1]].astype(int).tolist()
        assert int(found.index[row].max()) < other
        alone = TimeMap.from_samples([expected])
        kv = torch.randn(1, 2, 1, 1, int(other), 3, dtype=torch.float64)
        warped = TimeMap(found.index[row][None], found.weight[row][None]).warp(kv)
        torch.testing.assert_close(warped[..., :own, :], alone.warp(kv))


def test_a_segment_may_be_stretched_otherwise(whole: KVStore, tokenizer: PreTrainedTokenizerFast) -> None:
    """Half of the reasoning means no token of the other half, and the nearest only one token for each."""
    stretch = partial(segment_map, ratio={int(Segment.REASONING): 0.5}, interpolation="nearest")
    text = own_tokens(whole, tokenizer)
    found = TokenAlignment(whole, text, "segment", stretch).of([3], None)
    own, theirs = text.segment_ids[3], np.flatnonzero(whole.segment_ids[3] == Segment.REASONING)
    used = found.index[0][torch.from_numpy(own[: found.index.shape[1]] == Segment.REASONING)]
    assert used.max() == theirs[round(len(theirs) / 2) - 1]
    assert set(found.weight.unique().tolist()) <= {0.0, 1.0}


def test_of_a_store_that_evicts_only_what_is_kept_is_looked_at(whole: KVStore, tokenizer: Any) -> None:
    alignment = TokenAlignment(whole, own_tokens(whole, tokenizer), "span-last")
    positions = torch.tensor([[0, 2, 5, 6], [1, 3, -1, -1]])
    kept, everything = alignment.of([0, 9], positions), alignment.of([0, 9], None)
    for row in range(2):
        places = positions[row].tolist()
        for token in range(everything.index.shape[1]):
            wanted = int(everything.index[row, token, 0])
            is_kept = bool(everything.mask[row, token]) and wanted in places
            assert bool(kept.mask[row, token]) == is_kept
            assert not is_kept or places[int(kept.index[row, token, 0])] == wanted


def test_coverage_adds_up_over_samples(cut: KVStore, tokenizer: PreTrainedTokenizerFast) -> None:
    text = own_tokens(cut, tokenizer)
    assert text.spans is not None
    found = KVDataset(cut, text, with_kv=True, time_map="span-mean").coverage([1, 8, 9])
    expected = Coverage()
    for index in (1, 8, 9):
        spans = text.spans[index, : text.length[index]], cut.spans[index, : cut.length[index]]
        covered = (span_map(*spans, "mean").weight != 0).any(axis=1)
        pairs = covered & equal_spans(*spans)
        expected += Coverage(len(covered), int(covered.sum()), int(pairs.sum()))
    assert found == expected
    assert found.tokens == text.length[[1, 8, 9]].sum()
    assert found.tokens - found.covered == 3, "the tokens before each text, which the teacher has none of"
    assert 0 < found.one_to_one_share < 1


@pytest.mark.parametrize("time_map", ["span-last", "span-mean", "segment"])
def test_what_is_evicted_covers_nothing(whole: KVStore, tokenizer: Any, time_map: str) -> None:
    alignment, positions = TokenAlignment(whole, own_tokens(whole, tokenizer), time_map), torch.tensor([[0, 2, 5, 6]])
    everything, kept = alignment.coverage(0, None), alignment.coverage(0, positions)
    assert kept.tokens == everything.tokens
    assert kept.covered == int(alignment.of([0], positions).mask.sum()) < everything.covered
    assert kept.one_to_one <= min(kept.covered, everything.one_to_one)


def test_what_is_stretched_pairs_with_nothing_one_to_one(whole: KVStore, tokenizer: Any) -> None:
    text, other = own_tokens(whole, tokenizer), np.zeros(whole.num_samples, bool)
    other[3] = True
    assert TokenAlignment(whole, text, "segment").coverage(0, None).one_to_one == 0
    alignment = TokenAlignment(whole, replace(text, other_text=other), "auto")
    assert alignment.coverage(0, None).one_to_one > 0
    assert alignment.coverage(3, None).one_to_one == 0 < alignment.coverage(3, None).covered


def test_a_batch_is_in_the_students_tokens_and_the_teachers_kv(whole: KVStore, tokenizer: Any) -> None:
    text = own_tokens(whole, tokenizer)
    dataset = KVDataset(whole, text, with_kv=True, time_map="span-mean", segments=[Segment.ANSWER])
    batch, indices = dataset.__getitems__([2, 9]), [2, 9]
    width = int(text.length[indices].max())
    assert batch["input_ids"].tolist() == text.input_ids[indices, :width].tolist()
    assert batch["attention_mask"].sum(1).tolist() == text.length[indices].tolist()
    assert batch["kv_mask"].tolist() == (text.segment_ids[indices, :width] == Segment.ANSWER).astype(int).tolist()
    assert batch["teacher_kv"].shape[4] == whole.length[indices].max()
    assert batch["time_index"].shape == batch["time_weight"].shape == (2, width, batch["time_index"].shape[2])
    assert "teacher_positions" not in batch
