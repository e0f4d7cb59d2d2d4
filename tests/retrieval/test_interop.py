"""clip-retrieval's layout, in and out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmalign import Encoder
from mmalign.errors import InputError
from retrieval import ImageIndex, export_clip_retrieval, import_clip_retrieval


def unit_rows(count: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def collection(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Two shards as clip-retrieval writes them: half precision, more columns than a path."""
    rows = unit_rows(30)
    folder = tmp_path / "collection"
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for number, part in enumerate([range(20), range(20, 30)]):
        np.save(folder / f"img_emb/img_emb_{number}.npy", rows[part].astype(np.float16))
        table = pa.table({"image_path": [f"/data/pics/{n}.jpg" for n in part], "caption": [f"thing {n}" for n in part]})
        pq.write_table(table, folder / f"metadata/metadata_{number}.parquet")
    return folder, rows


def test_import_finds_what_plain_numpy_finds(collection: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, rows = collection
    index = import_clip_retrieval(folder, tmp_path / "index")
    query = unit_rows(1, seed=9)[0]
    best = np.argsort(-(rows @ query))[:5]
    hits = index.search(query, 5)
    assert [hit.path for hit in hits] == [Path(f"/data/pics/{n}.jpg") for n in best]
    assert [hit.metadata["caption"] for hit in hits] == [f"thing {n}" for n in best]
    assert [hit.score for hit in hits] == pytest.approx(rows[best] @ query, abs=1e-3)
    assert [hit.metadata["caption"] for hit in index.search(query, 3, where="caption = 'thing 25'")] == ["thing 25"]


def test_export_and_import_again(collection: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, rows = collection
    index = import_clip_retrieval(folder, tmp_path / "index")
    out = export_clip_retrieval(index, tmp_path / "out", rows_a_shard=7)
    shards = [np.load(out / f"img_emb/img_emb_{n}.npy", allow_pickle=False) for n in range(5)]
    assert [len(shard) for shard in shards] == [7, 7, 7, 7, 2]
    assert np.concatenate(shards).dtype == np.float16
    np.testing.assert_allclose(np.concatenate(shards), rows, atol=2e-3)
    tables = pa.concat_tables([pq.read_table(out / f"metadata/metadata_{n}.parquet") for n in range(5)])
    assert tables.column("caption").to_pylist() == [f"thing {n}" for n in range(30)]
    again = import_clip_retrieval(out, tmp_path / "again")
    assert [item.path for item in again] == [item.path for item in index]


def test_an_imported_folder_is_adopted_without_encoding(bundled: Encoder, photos: Path, tmp_path: Path) -> None:
    names = [path.name for path in sorted(photos.glob("*.jpg"))[:6]]
    vectors = unit_rows(6, bundled.dim)
    folder = tmp_path / "pics"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((photos / name).read_bytes())
    index = ImageIndex.from_vectors(vectors, tmp_path / "index", encoder=bundled, paths=names, root=folder)
    report = index.update(folder)
    assert (report.added, report.changed, report.unchanged, report.encoded_per_second) == (0, 0, 6, 0)
    np.testing.assert_allclose(index.vectors.gather(np.arange(6)), vectors, atol=1e-6)
    (folder / names[0]).write_bytes((photos / "000000519208.jpg").read_bytes())
    assert index.update(folder).changed == 1


def test_shards_that_do_not_pair_up(collection: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = collection
    (folder / "metadata/metadata_1.parquet").unlink()
    with pytest.raises(InputError, match=r"shards \[1\]"):
        import_clip_retrieval(folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_rows_that_are_not_finite_are_named(collection: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, rows = collection
    broken = rows[20:30].astype(np.float16)
    broken[3] = np.nan
    np.save(folder / "img_emb/img_emb_1.npy", broken)
    with pytest.raises(InputError, match="not finite"):
        import_clip_retrieval(folder, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_a_pickled_array_is_refused(collection: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, _ = collection
    np.save(folder / "img_emb/img_emb_0.npy", np.array([{"evil": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="img_emb_0"):
        import_clip_retrieval(folder, tmp_path / "index")


def test_no_collection(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="img_emb"):
        import_clip_retrieval(tmp_path, tmp_path / "index")


def test_an_export_that_is_stopped_leaves_nothing(
    collection: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = import_clip_retrieval(collection[0], tmp_path / "index")
    real, calls = pq.write_table, []

    def stop(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(pq, "write_table", stop)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        export_clip_retrieval(index, tmp_path / "out", rows_a_shard=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_export_replaces_nothing(collection: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    index = import_clip_retrieval(collection[0], tmp_path / "index")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match=r"mine.*--out"):
        export_clip_retrieval(index, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    (tmp_path / "empty").mkdir()
    assert (export_clip_retrieval(index, tmp_path / "empty") / "img_emb" / "img_emb_0.npy").exists()
