"""From a recipe to an alignment: layers, tokens, key spaces and fitted projections, on the KV of a real teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from kvpipe.data.sample import Segment
from kvpipe.kvcache.align.aligner import Aligner
from kvpipe.kvcache.align.closed_form import RIDGE_ALPHA
from kvpipe.kvcache.align.head_projection import BottleneckProjection, LinearProjection
from kvpipe.kvcache.align.layer_map import cka_map, layer_map
from kvpipe.kvcache.align.teacher_view import KeySpace
from kvpipe.kvcache.errors import ConfigError, StoreError
from kvpipe.kvcache.store import KVStore
from kvpipe.pipeline.aligned_teacher import AlignedTeacher
from kvpipe.pipeline.alignment import build_distiller, build_view, kv_dataset, layer_similarity, training_dataset
from kvpipe.pipeline.config import DistillConfig
from kvpipe.pipeline.distiller import KVDistiller
from kvpipe.pipeline.extract import extract
from kvpipe.pipeline.extract_config import ExtractConfig
from kvpipe.pipeline.models import builtin_teachers, tokenizer_from_files
from kvpipe.pipeline.paired_kv import paired_kv
from kvpipe.pipeline.student_text import StudentText, own_tokens, teachers_tokens
from kvpipe.pipeline.training_data import KVDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

KEY_SPACES: tuple[KeySpace, ...] = ("post-rope", "pre-rope")
TEACHER_LAYERS, TEACHER_FEATURES = 4, 128
LAYERS, FEATURES = 2, 12
"""Of the student that `make_model` makes: two heads of six channels."""

MakeModel = Callable[..., PreTrainedModel]
ROWS = list(range(6))


@pytest.fixture(scope="module")
def make_real_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., KVStore]:
    """The KV of the built-in teacher in float32, of a few word problems; keywords are options of the extraction."""
    folder = tmp_path_factory.mktemp("real")

    def make(**options: Any) -> KVStore:
        place = folder / f"{len(list(folder.iterdir()))}.zarr"
        return extract(ExtractConfig("qwen", place, samples=24, eval_samples=2, dtype="float32", **options)).store

    return make


@pytest.fixture(scope="module")
def store(make_real_store: Callable[..., KVStore]) -> KVStore:
    return make_real_store()


@pytest.fixture(scope="module")
def evicted(make_real_store: Callable[..., KVStore]) -> KVStore:
    """Half of every sample's tokens, chosen at random."""
    return make_real_store(evict="random", budget=0.5)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """The built-in teacher, as a student."""
    return AutoModelForCausalLM.from_pretrained(builtin_teachers()["qwen"], dtype=torch.float32)


@pytest.fixture
def student(make_model: MakeModel) -> PreTrainedModel:
    return make_model(vocab_size=512)


def same_tokens(store: KVStore) -> StudentText:
    """The teacher's tokens, as a student has them whose tokenizer happens to read the same ones."""
    return own_tokens(store, tokenizer_from_files(store.tokenizer_files()))


def build(
    store: KVStore, student: PreTrainedModel, text: StudentText | None = None, **recipe: Any
) -> tuple[KVDistiller, KVDataset]:
    """A recipe's distiller and the batches that it trains on."""
    config, text = DistillConfig(**recipe), text or teachers_tokens(store)
    train = store.indices("train").tolist()
    return build_distiller(config, store, student, text, train), training_dataset(
        config, store, text, train, config.kv_control
    )


def teachers_side(store: KVStore, student: PreTrainedModel, **recipe: Any) -> tuple[Tensor, Tensor]:
    distiller, dataset = build(store, student, **recipe)
    return distiller.teacher.teacher_side(dataset.__getitems__(ROWS))


# ---------------------------------------------------------------------- key spaces


@pytest.mark.parametrize("own_text", [False, True])
@pytest.mark.parametrize("key_space", KEY_SPACES)
def test_a_student_that_is_the_teacher_has_nothing_left_to_learn(
    store: KVStore, teacher: PreTrainedModel, key_space: KeySpace, own_text: bool
) -> None:
    text = same_tokens(store) if own_text else None
    distiller, dataset = build(store, teacher, text, mode="identity", key_space=key_space)
    for pair in paired_kv(distiller, dataset, ROWS):
        real = pair.mask.bool()
        ours, theirs = (kv.movedim(4, 3)[:, :, real] for kv in (pair.student, pair.teacher))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert float(distiller(**dataset.__getitems__(ROWS))["kv"]) < 1e-6


def test_before_rope_are_the_keys_of_a_teacher_that_rotates_nothing(
    store: KVStore, teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first layer, whose input knows no positions yet."""
    found, mask = teachers_side(store, teacher, mode="identity", key_space="pre-rope")
    batch = KVDataset(store, with_kv=False).__getitems__(ROWS)
    rotary = teacher.model.rotary_emb
    turn = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: turn(x, torch.zeros_like(position_ids)))
    with torch.no_grad():
        output = teacher(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True)
    expected, real = output.past_key_values.layers[0].keys, mask.bool()
    torch.testing.assert_close(found[0, 0].movedim(2, 1)[real], expected.movedim(2, 1)[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key_space", KEY_SPACES)
def test_a_map_that_finds_the_very_same_tokens_leaves_them_where_they_are(
    store: KVStore, student: PreTrainedModel, key_space: KeySpace
) -> None:
    """The rotation is taken off and put on again on the way."""
    plain, mask = teachers_side(store, student, key_space=key_space)
    for time_map in ("span-last", "span-mean", "segment"):
        warped, its_mask = teachers_side(
            store, student, text=same_tokens(store), key_space=key_space, time_map=time_map
        )
        assert torch.equal(its_mask, mask)
        torch.testing.assert_close(warped, plain * mask[:, None, :, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_text", [False, True])
@pytest.mark.parametrize("kept", ["store", "evicted"])
def test_shuffled_keys_are_turned_back_from_where_they_really_were(
    student: PreTrainedModel, own_text: bool, kept: str, request: pytest.FixtureRequest
) -> None:
    """Without their rotation the same keys are there, each in another place."""
    store: KVStore = request.getfixturevalue(kept)
    recipe = {"key_space": "pre-rope", "text": same_tokens(store) if own_text else None}
    plain, mask = teachers_side(store, student, **recipe)
    shuffled, its_mask = teachers_side(store, student, **recipe, kv_control="shuffled", seed=3)
    assert torch.equal(its_mask, mask)
    for row in range(len(ROWS)):
        before, after = (kv[:, :, row, :, mask[row].bool()] for kv in (plain, shuffled))
        assert not torch.allclose(before, after, atol=1e-2)
        # Every token's nearest: which one it was, and that it is that one.
        distances = torch.cdist(*(kv.movedim(3, 0).flatten(1) for kv in (after, before)))
        order = distances.argmin(1)
        assert sorted(order.tolist()) == list(range(len(order)))
        torch.testing.assert_close(after, before[..., order, :], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- evicted tokens


@pytest.mark.parametrize("key_space", KEY_SPACES)
@pytest.mark.parametrize("time_map", ["span-last", "segment"])
def test_of_a_store_that_evicts_the_kept_tokens_are_compared_as_those_of_a_whole_one(
    store: KVStore, evicted: KVStore, student: PreTrainedModel, key_space: KeySpace, time_map: str
) -> None:
    recipe: dict[str, Any] = {"key_space": key_space, "time_map": time_map, "text": same_tokens(store)}
    whole, everything = teachers_side(store, student, **recipe)
    kept, mask = teachers_side(evicted, student, **recipe)
    assert mask.sum(1).tolist() == evicted.kv_length[ROWS].tolist()
    assert int(mask.sum()) < int(everything.sum())
    torch.testing.assert_close(kept, whole * mask[:, None, :, None], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own_text", [False, True])
def test_of_a_store_that_evicts_some_segments_are_compared(
    store: KVStore, evicted: KVStore, student: PreTrainedModel, own_text: bool
) -> None:
    text = same_tokens(store) if own_text else None
    distiller, dataset = build(evicted, student, text, kv_segments="prompt,answer")
    batch = dataset.__getitems__(ROWS)
    kept, mask = distiller.teacher.teacher_side(batch)
    whole, _ = teachers_side(store, student)
    segments = torch.from_numpy(store.segment_ids[ROWS])
    _, positions = dataset.reader.read_with_positions(ROWS) if dataset.reader else (None, None)
    assert positions is not None
    for row in range(len(ROWS)):
        places = [p for p in positions[row].tolist() if p >= 0 and segments[row, p] != Segment.REASONING]
        assert 0 < len(places) == int(mask[row].sum())
        found = kept[:, :, row, :, mask[row].bool()]
        torch.testing.assert_close(found, whole[:, :, row][..., places, :], rtol=1e-4, atol=1e-4)
    _, student_kv = distiller.student_forward(batch["input_ids"], batch["attention_mask"])
    ours = distiller.teacher.student_side(student_kv, batch)
    assert ours.shape[4] == kept.shape[4]


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", ["ratio", "skip", "uniform", "last", '{"layers":[0.0,2.0]}'])
def test_a_named_map_is_that_of_the_two_depths(store: KVStore, student: PreTrainedModel, name: str) -> None:
    distiller, dataset = build(store, student, layer_map=name)
    assert distiller.teacher.view.layer_map == layer_map(name, LAYERS, TEACHER_LAYERS)
    kv = dataset.__getitems__(ROWS)["teacher_kv"]
    assert torch.equal(distiller.teacher.view.teacher(kv), layer_map(name, LAYERS, TEACHER_LAYERS).apply(kv))


@pytest.mark.parametrize("recipe", [{}, {"key_space": "pre-rope"}, {"time_map": "span-mean"}])
def test_the_map_by_cka_follows_the_students_layers_as_they_are(
    store: KVStore, student: PreTrainedModel, recipe: dict[str, Any]
) -> None:
    text = same_tokens(store) if "time_map" in recipe else teachers_tokens(store)
    config, train = DistillConfig(layer_map="cka", **recipe), store.indices("train").tolist()
    view = build_view(config, store, student, text, train)
    plain = replace(view, layer_map=layer_map("ratio", TEACHER_LAYERS, TEACHER_LAYERS))
    ours, theirs = rows_of(KVDistiller(student, [AlignedTeacher(plain)]), kv_dataset(config, store, text), train)
    similarity = torch.tensor(
        [[sum(linear_cka(x[kind], y[kind]) for kind in range(2)) / 2 for y in theirs] for x in ours]
    )
    found = layer_similarity(KVDistiller(student, [AlignedTeacher(plain)]), kv_dataset(config, store, text), train)
    torch.testing.assert_close(found.float(), similarity, rtol=1e-4, atol=1e-5)
    weights, expected = (torch.tensor(m.weights) for m in (view.layer_map, cka_map(found)))
    torch.testing.assert_close(weights, expected)


def rows_of(distiller: KVDistiller, dataset: KVDataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Both sides' KV `[L, 2, N, F]` of all compared tokens, in float64."""
    pairs = [(pair, pair.mask.bool()) for pair in paired_kv(distiller, dataset, indices)]
    ours = [pair.student.detach().movedim(4, 3)[:, :, mask].flatten(3) for pair, mask in pairs]
    theirs = [pair.teacher.movedim(4, 3)[:, :, mask].flatten(3) for pair, mask in pairs]
    return torch.cat(ours, dim=2).double(), torch.cat(theirs, dim=2).double()


def linear_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_a_store_of_some_layers_serves_the_maps_that_use_no_other(
    make_real_store: Callable[..., KVStore], store: KVStore, student: PreTrainedModel
) -> None:
    some = make_real_store(layers="1,3")
    torch.testing.assert_close(teachers_side(some, student)[0], teachers_side(store, student)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(
        StoreError, match=r"expected 0, 1, 2, 3, found 1, 3\. .*--layers 0,1,2,3, or all.*missing: 0, 2"
    ):
        build(some, student, layer_map="uniform")
    used = build(some, student, layer_map="cka")[0].teacher.view.layer_map
    assert (used.num_student_layers, used.num_teacher_layers) == (LAYERS, 2)


# ---------------------------------------------------------------------- projections


def fitted_rows(distiller: KVDistiller, store: KVStore, dataset: KVDataset) -> tuple[Tensor, Tensor]:
    """Student and normalised teacher `[L, 2, N, F]` of all training tokens, in float64. A frozen map's student is
    normalised as well."""
    ours, theirs = rows_of(distiller, dataset, store.indices("train").tolist())
    assert distiller.teacher.aligner is not None
    if distiller.teacher.aligner.config.direction == "teacher-to-student-frozen":
        ours = standardised(ours)
    return ours, standardised(theirs)


def standardised(rows: Tensor) -> Tensor:
    return (rows - rows.mean(2, keepdim=True)) / rows.std(2, keepdim=True, correction=0)


def ridge_by_hand(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of the normal equations of `[N, F]` and `[N, G]`, and its bias."""
    centred, target = x - x.mean(0), y - y.mean(0)
    gram = centred.T @ centred / len(x)
    penalty = RIDGE_ALPHA * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram + penalty, centred.T @ target / len(x))
    return weight, y.mean(0) - x.mean(0) @ weight


@pytest.mark.parametrize(("mode", "layers"), [("flat", LAYERS), ("flat-global", 1)])
def test_a_closed_form_start_is_the_ridge_of_all_training_tokens(
    store: KVStore, student: PreTrainedModel, mode: str, layers: int
) -> None:
    distiller, dataset = build(store, student, mode=mode, start="closed-form")
    assert distiller.teacher.aligner is not None
    projection = distiller.teacher.aligner.projection
    assert isinstance(projection, LinearProjection)
    ours, theirs = fitted_rows(distiller, store, dataset)
    for layer in range(layers):
        for kind in range(2):
            x, y = ours[layer, kind], theirs[layer, kind]
            if mode == "flat-global":
                x, y = ours[:, kind].flatten(0, 1), theirs[:, kind].flatten(0, 1)
            weight, bias = ridge_by_hand(x, y)
            torch.testing.assert_close(projection.matrix()[layer, kind].double(), weight, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(projection.bias[layer, kind].double(), bias, rtol=1e-3, atol=1e-4)


def test_a_frozen_map_goes_from_the_teacher_to_the_student_and_stays(store: KVStore, student: PreTrainedModel) -> None:
    """Fitted, though nobody asked for a closed-form start."""
    distiller, dataset = build(store, student, mode="flat", direction="teacher-to-student-frozen")
    assert distiller.teacher.aligner is not None
    projection = distiller.teacher.aligner.projection
    assert isinstance(projection, LinearProjection)
    assert not any(parameter.requires_grad for parameter in distiller.teacher.aligner.parameters())
    ours, theirs = fitted_rows(distiller, store, dataset)
    for layer, kind in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight, bias = ridge_by_hand(theirs[layer, kind], ours[layer, kind])
        found = theirs[layer, kind] @ projection.matrix()[layer, kind].double() + projection.bias[layer, kind]
        torch.testing.assert_close(found, theirs[layer, kind] @ weight + bias, rtol=1e-2, atol=1e-3)


STRUCTURED = [{}, {"share_dim_proj": False}, {"share_layers": True}, {"match_params": "flat"}]
FITTED = [
    *({"mode": "structured", **options} for options in STRUCTURED),
    *({"mode": mode, "match_params": match} for mode in ("flat", "flat-global") for match in ("none", "structured")),
    {"mode": "flat", "closed_form": "procrustes"},
    {"mode": "flat", "direction": "teacher-to-student-frozen", "closed_form": "pca"},
]


@pytest.mark.parametrize("recipe", FITTED, ids=lambda recipe: " ".join(map(str, recipe.values())))
def test_a_closed_form_start_is_nearer_than_a_random_one(
    store: KVStore, student: PreTrainedModel, recipe: dict[str, Any]
) -> None:
    errors = {}
    for start in ("random", "closed-form"):
        distiller, dataset = build(store, student, **{**recipe, "start": "closed-form"})
        assert distiller.teacher.aligner is not None
        if start == "random":
            distiller.teacher.aligner.projection = Aligner(distiller.teacher.aligner.config).projection
        with torch.no_grad():
            errors[start] = float(distiller(**dataset.__getitems__(store.indices("test").tolist()))["kv"])
    assert errors["closed-form"] < errors["random"]


def weights_of(aligner: Aligner | None) -> int:
    """All parameters of one layer's keys but the biases of the output."""
    assert aligner is not None
    projection = aligner.projection
    assert isinstance(projection, LinearProjection | BottleneckProjection)
    layers = projection.bias.shape[0]
    return (sum(p.numel() for p in projection.parameters()) - projection.bias.numel()) // (2 * layers)


TERM = 6 * 32 + 2 * 4
FLAT = FEATURES * TEACHER_FEATURES


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"mode": "structured"}, TERM),
        ({"mode": "structured", "share_dim_proj": False}, TERM + 6 * 32),
        ({"mode": "structured", "match_params": "flat"}, FLAT // TERM * TERM),
        ({"mode": "flat"}, FLAT),
        ({"mode": "flat", "match_params": "structured"}, TERM // (FEATURES + TEACHER_FEATURES) * 140),
        ({"mode": "flat-global", "match_params": "flat"}, FLAT),
        ({"mode": "bottleneck"}, 2 * FEATURES + 6 + 6 * 140),
        ({"mode": "bottleneck", "match_params": "flat"}, 2 * FEATURES + (FLAT - 2 * FEATURES) // 141 * 141),
    ],
)
def test_the_aligner_is_as_large_as_the_recipe_says(
    store: KVStore, student: PreTrainedModel, recipe: dict[str, Any], expected: int
) -> None:
    assert weights_of(build(store, student, **recipe)[0].teacher.aligner) == expected


def test_modes_that_need_no_projection_have_none(store: KVStore, student: PreTrainedModel) -> None:
    assert build(store, student, mode="none")[0].teacher.aligner is None
    assert build(store, student, mode="identity", kv_loss="relation,cka")[0].teacher.aligner is None
    with pytest.raises(ConfigError, match=r"differ in shape.* expected 4 KV heads of 32 channels, found 2 of 6"):
        build(store, student, mode="identity")


# ---------------------------------------------------------------------- queries


@pytest.fixture(scope="module")
def with_queries(make_real_store: Callable[..., KVStore]) -> KVStore:
    return make_real_store(queries=True)


def test_a_loss_that_compares_attention_needs_queries(store: KVStore, student: PreTrainedModel) -> None:
    with pytest.raises(StoreError, match=r"has no queries: .*Extract again with --queries"):
        build(store, student, kv_loss="mse,structural:0.5")


def test_attention_cannot_be_compared_between_different_tokens(with_queries: KVStore, student: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"token by token: .*found --time-map span-last"):
        build(with_queries, student, same_tokens(with_queries), kv_loss="structural")


def test_a_student_that_is_the_teacher_attends_as_it_does(with_queries: KVStore, teacher: PreTrainedModel) -> None:
    distiller, dataset = build(with_queries, teacher, mode="identity", kv_loss="structural,attention-mse")
    with torch.no_grad():
        outputs = distiller(**dataset.__getitems__(ROWS))
    assert float(outputs["structural"]) < 1e-5
    assert float(outputs["attention-mse"]) < 1e-6


@pytest.mark.parametrize("kv_loss", ["mse", "relation"])
def test_a_recipe_that_compares_no_token_is_refused(
    make_real_store: Callable[..., KVStore], student: PreTrainedModel, kv_loss: str
) -> None:
    answers = make_real_store(segments="answer")
    mode = "identity" if kv_loss == "relation" else "flat"
    config = DistillConfig(mode=mode, kv_loss=kv_loss, kv_segments="reasoning")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no token of the first 24 samples is compared: expected .*, found .*answer"):
        build_distiller(config, answers, student, teachers_tokens(answers), list(range(24)))
