"""What may be asked of an index: names and numbers are checked before anything is locked, loaded or read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from drawing import clustered, draw
from PIL import Image
from tiny_encoder import DIM, TinyEncoder

import retrieval.finishing
from mmalign.errors import EncoderMismatchError, InputError, UnreadableImageError
from mmalign.imaging import DecodeSettings
from retrieval import ImageIndex, evaluate_captions
from retrieval.snapshot import Snapshot


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Seeds of the tiny encoders that are loaded by their spec."""
    import mmalign.encoders.registry as registry

    log: list[str] = []

    def load(rest: str) -> TinyEncoder:
        log.append(rest)
        return TinyEncoder(int(rest))

    monkeypatch.setitem(registry.SOURCES, "tiny", registry.Source(load))
    return log


# -- names and numbers -------------------------------------------------------------------------------------------------


def test_a_misspelt_option_is_found_first(index: ImageIndex, folder: Path, tmp_path: Path, loads: list[str]) -> None:
    for use in (
        lambda: ImageIndex.build(folder, tmp_path / "idx", encoder="tiny:0", recal=0.9),
        lambda: ImageIndex.open(folder).update(recal=0.9),
    ):
        with pytest.raises(InputError, match=r"'recal'.*recall"):
            use()
    with index.store.write(), pytest.raises(InputError, match="batchsize"):  # not IndexLockedError
        index.update(batchsize=3)
    assert loads == []
    assert not (tmp_path / "idx").exists()


BAD: list[tuple[str, Callable[[ImageIndex], Any]]] = [
    ("recall", lambda i: i.update(recall=7)),
    ("recall", lambda i: i.rebuild(recall=-0.1)),
    ("memory_bytes", lambda i: i.rebuild(memory_bytes=-1)),
    ("memory_bytes", lambda i: ImageIndex.from_vectors(np.eye(4), i.folder / "x", memory_bytes=-1)),
    ("workers", lambda i: i.update(workers=-1)),
    ("batch_size", lambda i: i.update(batch_size=0)),
    ("max_pixels", lambda i: i.update(max_pixels=0)),
    ("checkpoint_seconds", lambda i: i.update(checkpoint_seconds=-1)),
    ("shard", lambda i: i.update(shard=3)),
    ("shard", lambda i: i.update(shard=(3, 3))),
    ("min_match", lambda i: i.search("x", min_match=7)),
    ("min_score", lambda i: i.similar(0, min_score=2)),
    ("k is", lambda i: i.search("x", 2.5)),
    ("neighbours", lambda i: i.duplicates(0.9, neighbours=0)),
    ("id is", lambda i: i.remove(["one"])),
    ("bootstrap", lambda i: evaluate_captions(i, [("00.png", ["x"])], bootstrap=-1)),
    ("seed", lambda i: evaluate_captions(i, [("00.png", ["x"])], seed=-1)),
    ("different lengths", lambda i: i.add_vectors([[1.0], [1.0, 2.0]])),
    ("shape", lambda i: i.add_vectors([1.0, 2.0])),
    ("kind", lambda i: i.search(np.ones(DIM), kind="sound")),
    ("kind", lambda i: i.search("words", kind="text")),
]


@pytest.mark.parametrize(("name", "use"), BAD)
def test_numbers_out_of_range(index: ImageIndex, name: str, use: Callable[[ImageIndex], Any]) -> None:
    with pytest.raises(InputError, match=name):
        use(index)
    assert len(ImageIndex.open(index.folder)) == 12


def test_a_single_id_and_plain_lists_are_taken(index: ImageIndex, tmp_path: Path) -> None:
    index.remove(3)
    assert len(index) == 11
    made = ImageIndex.from_vectors([[3.0, 4.0], [0.0, 2.0]], tmp_path / "idx")
    np.testing.assert_allclose(made.vectors.gather(np.arange(2)), [[0.6, 0.8], [0, 1]], atol=1e-6)


# -- encoders ----------------------------------------------------------------------------------------------------------


def test_device_and_dtype_are_never_ignored(index: ImageIndex, folder: Path, tmp_path: Path) -> None:
    for use in (
        lambda: ImageIndex.build(folder, tmp_path / "a", encoder=TinyEncoder(), dtype="bfloat16"),
        lambda: ImageIndex.build(folder, tmp_path / "a", encoder=TinyEncoder(), device="cpu"),
        lambda: ImageIndex.build(folder, dtype="bfloat16"),
        lambda: ImageIndex.open(folder, encoder=TinyEncoder(), device="cpu"),
        lambda: ImageIndex.from_vectors(np.eye(4), tmp_path / "a", device="cpu"),
    ):
        with pytest.raises(InputError, match=r"device|dtype"):
            use()
    assert not (tmp_path / "a").exists()
    _, report = ImageIndex.build(folder, dtype=torch.float32)
    assert report.unchanged == 12, "what the index was made with may be said"


def test_an_update_without_news_loads_no_encoder(folder: Path, loads: list[str]) -> None:
    ImageIndex.build(folder, encoder="tiny:0")
    loads.clear()
    for use in (lambda: ImageIndex.open(folder).update(), lambda: ImageIndex.build(folder, encoder="tiny:0")):
        use()
    index = ImageIndex.open(folder)
    index.remove(0)
    index.add_vectors(clustered(3, DIM))
    index.rebuild()
    assert loads == [], "nothing was to be encoded, and the reference queries are there"
    (folder / "01.png").unlink()
    index.update()
    assert loads == ["0"], "the file that was removed by id is found again, and encoded"


def test_a_moved_encoder_can_be_named(folder: Path, tmp_path: Path) -> None:
    TinyEncoder().save(tmp_path / "old")
    index, _ = ImageIndex.build(folder, tmp_path / "idx", encoder=tmp_path / "old")
    expected = [hit.item.name for hit in index.search("words")]
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(InputError, match="old"):
        ImageIndex.open(tmp_path / "idx").search("words")
    moved = ImageIndex.open(tmp_path / "idx", encoder=tmp_path / "new")
    assert [hit.item.name for hit in moved.search("words")] == expected
    with pytest.raises(EncoderMismatchError):
        ImageIndex.open(tmp_path / "idx", encoder="tiny:1")


def test_the_encoder_is_checked_under_the_lock(index: ImageIndex, folder: Path) -> None:
    """Somebody else has made another index in the same place since this one was opened."""
    import shutil

    shutil.rmtree(index.folder)
    ImageIndex.build(folder, encoder=TinyEncoder(1))
    draw(folder / "new.png", 50)
    with pytest.raises(EncoderMismatchError, match=r"'tiny:1'.*'tiny:0'"):
        index.update()
    assert len(ImageIndex.open(folder)) == 12


def test_the_manifest_says_as_much_of_vectors_as_of_an_encoder(index: ImageIndex, tmp_path: Path) -> None:
    bare = ImageIndex.from_vectors(clustered(20, DIM), tmp_path / "idx")
    assert bare.manifest["encoder"].keys() == index.manifest["encoder"].keys()
    assert (bare.manifest["encoder"]["fingerprint"], bare.manifest["encoder"]["dim"]) == (None, DIM)
    draw(tmp_path / "photos" / "a.png", 1)
    known = ImageIndex.open(bare.folder, encoder=TinyEncoder())
    known.update(tmp_path / "photos")
    assert ImageIndex.open(bare.folder).manifest["encoder"]["fingerprint"] == TinyEncoder().fingerprint
    assert known.manifest["queries"] is not None, "from here on there are text queries to tune with"


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_shard_that_is_up_to_date_publishes_nothing(folder: Path, tmp_path: Path) -> None:
    index, _ = ImageIndex.build(folder, tmp_path / "idx", encoder=TinyEncoder(), shard=(0, 2))
    generation = index.manifest["generation"]
    for _ in range(2):
        index.update()
        index.update(shard=(0, 2))
    assert index.manifest["generation"] == generation


def test_factory_auto_goes_back_to_the_choice_by_size(index: ImageIndex) -> None:
    index.rebuild(factory="HNSW32,SQfp16")
    assert index.manifest["faiss"]["factory"] == "HNSW32,SQfp16"
    index.update()
    assert index.manifest["faiss"]["factory"] == "HNSW32,SQfp16"
    index.update(factory="auto")
    assert index.manifest["faiss"]["factory"] == "SQfp16"


def test_only_a_chosen_number_of_lists_may_lag_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retrieval.faiss_index as faiss_index

    vectors = clustered(700, DIM)
    monkeypatch.setattr(
        faiss_index, "_by_size", lambda rows, dim, memory, collection: f"IVF{8 if rows <= 600 else 16},SQ8"
    )
    index = ImageIndex.from_vectors(vectors[:600], tmp_path / "idx")
    index.add_vectors(vectors[600:])
    assert (index.manifest["faiss"]["factory"], index.manifest["faiss"]["rows"]) == ("IVF8,SQ8", 700)


def test_a_number_of_lists_that_was_asked_for_is_kept_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import retrieval.faiss_index as faiss_index

    monkeypatch.setattr(faiss_index, "_by_size", lambda rows, dim, memory, collection: "IVF4,SQ8")
    index, _ = ImageIndex.build(folder, encoder=TinyEncoder(), factory="IVF2,SQ8")
    for factory, expected in (("IVF3,SQ8", "IVF3,SQ8"), ("auto", "IVF4,SQ8"), ("IVF2,SQ8", "IVF2,SQ8")):
        index.update(factory=factory)
        assert index.manifest["faiss"]["factory"] == expected


def test_faiss_is_brought_up_to_date_once_for_several_folders(
    index: ImageIndex, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "second" / "a.png", 200)
    index.update(tmp_path / "second")
    for number in range(5):
        draw(folder / f"n{number}.png", 300 + number)
        draw(tmp_path / "second" / f"n{number}.png", 400 + number)
    built = []
    real = retrieval.finishing.build_faiss
    monkeypatch.setattr(
        retrieval.finishing, "build_faiss", lambda *given, **named: (built.append(1), real(*given, **named))
    )
    assert index.update().added == 10
    assert len(built) == 1


def test_more_phrases_once_the_index_is_large(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import retrieval.calibration as calibration

    monkeypatch.setattr(calibration, "EXACT_ROWS", 14)
    index, _ = ImageIndex.build(folder, encoder=TinyEncoder())
    few = index.manifest["queries"]["count"]
    index.add_vectors(clustered(4, DIM))
    assert index.manifest["queries"]["count"] == few, "adding vectors encodes nothing"
    index.update()
    assert index.manifest["queries"]["count"] == len(calibration.query_bank(16)) > 2 * few
    assert index.manifest["measured"]["queries"] == index.manifest["queries"]["count"]
    generation = index.manifest["generation"]
    index.update()
    assert index.manifest["generation"] == generation
    own = clustered(30, DIM, seed=8)
    index.rebuild(text_queries=own)
    index.update()
    np.testing.assert_array_equal(index.snapshot.partition.reference_queries(), own)


# -- queries are read as the index was ---------------------------------------------------------------------------------


def test_queries_go_the_way_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = Path(__file__).parents[1] / "data" / "photos" / "000000519208.jpg"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(photo.read_bytes())
    index, _ = ImageIndex.build(
        tmp_path / "photos", encoder=TinyEncoder(), fast_decode=True, tolerate_truncation=True, max_pixels=400_000
    )
    cut = photo.read_bytes()[:-4000]
    (tmp_path / "cut.jpg").write_bytes(cut)
    large = Image.new("RGB", (1000, 500))
    for query in (photo, photo.read_bytes()):
        assert index.search(query)[0].score == pytest.approx(1, abs=1e-6), "decoded at reduced size, as the index was"
    for query in (tmp_path / "cut.jpg", cut):
        assert index.search(query)[0].score > 0.5
    with pytest.raises(UnreadableImageError):
        index.search(large)
    seen: list[DecodeSettings] = []
    encoder = index.encoder
    monkeypatch.setattr(encoder, "encode_pixels", lambda pixels: np.eye(DIM, dtype=np.float32)[: len(pixels)])
    monkeypatch.setattr(encoder, "load_image", lambda image, decode: (None, seen.append(decode) or torch.zeros(1)))
    for query in (photo, cut, large):
        index.search(query)
    index.similar(tmp_path / "cut.jpg")
    assert seen == [DecodeSettings(True, True, 400_000)] * 4


def test_a_refresh_in_the_middle_mixes_nothing(
    index: ImageIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `similar` works, the index is written anew with other row numbers, and refreshed by another thread."""
    wanted = [(hit.item.name, hit.score) for hit in index.similar(5, 4)]
    find = Snapshot.position_of

    def disturbed(snapshot: Snapshot, image: int) -> int | None:
        found = find(snapshot, image)
        ImageIndex.open(folder).remove([0, 1, 2, 3, 9])
        index.refresh()
        return found

    monkeypatch.setattr(Snapshot, "position_of", disturbed)
    assert [(hit.item.name, hit.score) for hit in index.similar(5, 4)] == wanted
    assert len(index) == 7


def test_kind_of_a_vector_query(index: ImageIndex) -> None:
    vector = TinyEncoder().encode_texts(["red"])[0]
    as_text = [hit.match for hit in index.search("red", 12)]
    assert [hit.match for hit in index.search(vector, 12, kind="text")] == as_text
    as_image = [hit.match for hit in index.search(vector, 12, kind="image")]
    assert [hit.match for hit in index.search(vector, 12)] == as_image
    assert as_image != as_text


# -- reports -----------------------------------------------------------------------------------------------------------


def test_evaluation_says_what_was_measured(index: ImageIndex) -> None:
    pairs = [(f"{number:02}.png", [f"thing {number}", "red"]) for number in range(8)]
    one, again, other = (evaluate_captions(index, pairs, bootstrap=50, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one["text_to_image"]["hit@5_low"] != other["text_to_image"]["hit@5_low"] or one["seed"] != other["seed"]
    assert (one["index"], one["seed"]) == (str(index.folder), 0)
    assert one["encoder"] == {"spec": "tiny:0", "fingerprint": TinyEncoder().fingerprint}


def test_own_column_called_path(folder: Path) -> None:
    index, _ = ImageIndex.build(folder, encoder=TinyEncoder())
    index.add_vectors(clustered(1, DIM), metadata=pa.table({"path": ["mine"]}))
    assert [hit.metadata["path"] for hit in index.search("x", where="path = 'mine'")] == ["mine"]
    assert [hit.item.name for hit in index.search("x", where="name = 'sub/09.png'")] == ["sub/09.png"]


def test_the_indexed_folder_is_not_the_index(index: ImageIndex, folder: Path) -> None:
    with pytest.raises(InputError, match=r"ImageIndex\.open"):
        ImageIndex(folder)


def test_an_unknown_index_type_names_the_plugin_option(index: ImageIndex) -> None:
    with pytest.raises(InputError, match="mmalign --plugin MODULE index"):
        index.update(factory="nobody_registered_this")
