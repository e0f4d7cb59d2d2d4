"""Index types that a user registers work wherever a FAISS factory string does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from drawing import clustered, draw
from tiny_encoder import DIM, TinyEncoder

from mmalign.errors import InputError
from retrieval import ImageIndex, index_types, merge_indexes, register_index_type


def halves(dim: int, rows: int) -> Any:
    """Inverted lists over half-precision rows, a list for every 20 vectors."""
    lists = max(1, rows // 20)
    quantizer = faiss.IndexFlatIP(dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    quantizer.this.disown()
    index.own_fields = True
    return index


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    known: dict[str, Any] = {}
    monkeypatch.setattr(index_types, "_REGISTERED", known)
    register_index_type("halves", halves, parameters={"nprobe": 1}, ceilings={"nprobe": 40})
    return known


def recall(index: ImageIndex, vectors: np.ndarray, queries: np.ndarray) -> float:
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    found = index.search_vectors(queries, 10)[1]
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(truth, found, strict=True)]))


def test_built_tuned_saved_reopened_and_grown(tmp_path: Path, registry: dict[str, Any]) -> None:
    vectors = clustered(2200, DIM)
    probes = {}
    for wanted in (0.5, 0.98):
        index = ImageIndex.from_vectors(vectors[:2000], tmp_path / str(wanted), factory="halves", recall=wanted)
        about = index.manifest["faiss"]
        assert (about["factory"], index.snapshot.partition.faiss.nlist) == ("halves", 100)
        assert index.manifest["measured"]["recall@10"] >= wanted
        probes[wanted] = about["parameters"]["nprobe"]
        assert 1 <= probes[wanted] <= 40
    assert probes[0.5] < probes[0.98]
    index.add_vectors(vectors[2000:])
    assert index.snapshot.partition.faiss.nlist == 100, "grown, not trained anew"
    assert index.manifest["faiss"]["rows"] == 2200
    registry.clear()
    reopened = ImageIndex.open(index.folder)
    assert reopened.snapshot.partition.faiss.nprobe == index.manifest["faiss"]["parameters"]["nprobe"]
    assert recall(reopened, vectors, clustered(100, DIM, seed=4)) > 0.9


def test_writing_needs_the_registration_and_reading_does_not(tmp_path: Path, registry: dict[str, Any]) -> None:
    encoder = TinyEncoder()
    for number in range(30):
        draw(tmp_path / "photos" / f"{number}.png", number)
    index, _ = ImageIndex.build(tmp_path / "photos", encoder=encoder, factory="halves")
    assert index.manifest["faiss"]["factory"] == "halves"
    registry.clear()
    draw(tmp_path / "photos" / "new.png", 99)
    encoder.encoded = 0
    for use in (index.update, index.rebuild, lambda: index.remove(0), lambda: index.add_vectors(clustered(2, DIM))):
        with pytest.raises(InputError, match=r"'halves'.*register_index_type.*factory=\"auto\""):
            use()
    assert not encoder.encoded, "said before any work"
    assert len(index.search("words")) == 10
    merged = merge_indexes([index.folder], tmp_path / "merged")
    assert merged.manifest["faiss"]["factory"] == "SQfp16"
    assert index.update(factory="auto").added == 1
    assert index.manifest["faiss"]["factory"] == "SQfp16"
    assert index.update().unchanged == 31


def test_parameters_of_the_family_by_default(tmp_path: Path) -> None:
    register_index_type("plain", halves)
    index = ImageIndex.from_vectors(clustered(1000, DIM), tmp_path / "idx", factory="plain")
    assert 1 <= index.manifest["faiss"]["parameters"]["nprobe"] <= 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda dim, rows: faiss.IndexFlatIP(dim + 1), "width 16"),
        (lambda dim, rows: faiss.IndexFlatL2(dim), "METRIC_INNER_PRODUCT"),
        (lambda dim, rows: None, "gave None"),
        (lambda dim, rows: halves(dim, 10**5), "5000 lists for 100 vectors"),
    ],
)
def test_what_make_must_not_return(tmp_path: Path, make: Any, message: str) -> None:
    register_index_type("wrong", make)
    with pytest.raises(InputError, match=message):
        ImageIndex.from_vectors(clustered(100, DIM), tmp_path / "idx", factory="wrong")
    assert not (tmp_path / "idx").exists()


def test_unknown_search_parameter(tmp_path: Path) -> None:
    register_index_type("odd", halves, parameters={"nonsense": 3})
    with pytest.raises(InputError, match="nonsense"):
        ImageIndex.from_vectors(clustered(100, DIM), tmp_path / "idx", factory="odd")


def test_names_and_numbers_that_cannot_be() -> None:
    for name in ("", " ", "auto", "Flat", "IVF16,SQ8", 3):
        with pytest.raises(InputError, match="index type"):
            register_index_type(name, halves)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="candidates"):
        register_index_type("fine", halves, candidates=0)
    with pytest.raises(InputError, match="nprobe"):
        register_index_type("fine", halves, parameters={"nprobe": 0})


def test_a_misspelt_name_is_set_right(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean halves"):
        ImageIndex.from_vectors(clustered(100, DIM), tmp_path / "idx", factory="halvs")
