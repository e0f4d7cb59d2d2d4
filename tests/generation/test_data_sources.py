"""Training data read from every kind of place: the same content is the same rows."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from generation.data import RowSource, check_data, open_source
from mmalign.errors import InputError


def encoded(seed: int, image_format: str = "PNG", size: tuple[int, int] = (80, 64)) -> bytes:
    """A picture of its own for every seed; size is width, height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


# Every second pair prefers image 1 where the layout can say so.
def pairs(count: int) -> list[tuple[str, bytes, bytes]]:
    return [(f"caption {i} – größer", encoded(2 * i), encoded(2 * i + 1, "JPEG")) for i in range(count)]


def write_pick_a_pic(path: Path, rows: list[tuple[str, bytes, bytes]], *, struct: bool = False, **options: Any) -> Path:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    columns = [[{"bytes": row[i], "path": None} if struct else row[i] for row in rows] for i in (1, 2)]
    table = pa.table(
        {
            "caption": [row[0] for row in rows],
            "jpg_0": pa.array(columns[0], image),
            "jpg_1": pa.array(columns[1], image),
            "label_0": [1.0] * len(rows),
            "model_0": ["some model"] * len(rows),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_metadata(folder: Path, rows: list[tuple[str, bytes, bytes]], names: tuple[str, str]) -> Path:
    folder.mkdir()
    lines = []
    for i, (caption, winner, loser) in enumerate(rows):
        (folder / f"{i}_w.img").write_bytes(winner)
        (folder / f"{i}_l.img").write_bytes(loser)
        lines.append(json.dumps({names[0]: f"{i}_w.img", names[1]: f"{i}_l.img", "caption": caption, "label_0": 1}))
    (folder / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8-sig")
    return folder


def write_twins(folder: Path, rows: list[tuple[str, bytes, bytes]]) -> Path:
    """Captions in all three places."""
    captions = []
    for name in ("winner", "loser", "captions"):
        (folder / name / "deep").mkdir(parents=True)
    for i, (caption, winner, loser) in enumerate(rows):
        (folder / "winner" / "deep" / f"{i}.png").write_bytes(winner)
        (folder / "loser" / "deep" / f"{i}.jpg").write_bytes(loser)
        if i % 4 == 0:
            (folder / "winner" / "deep" / f"{i}.txt").write_text(caption + "\n", encoding="utf-8")
        elif i % 4 == 1:
            (folder / "captions" / "deep" / f"{i}.txt").write_text(caption, encoding="utf-8-sig")
        else:
            captions.append(
                json.dumps({"file": f"deep/{i}" if i % 4 == 2 else f"winner/deep/{i}.png", "caption": caption})
            )
    (folder / "captions.jsonl").write_text("\n".join(captions))
    return folder


def check(data: Any, **options: Any) -> Any:
    return check_data(data, progress=False, **options)


@pytest.fixture
def layouts(tmp_path: Path) -> dict[str, str | Path]:
    """The same seven pairs, in every layout."""
    rows = pairs(7)
    return {
        "parquet": write_pick_a_pic(tmp_path / "one.parquet", rows),
        "parquet in row groups": write_pick_a_pic(tmp_path / "groups.parquet", rows, row_group_size=3),
        "parquet with image structs": write_pick_a_pic(tmp_path / "struct.parquet", rows, struct=True),
        "parquet files": write_pick_a_pic(tmp_path / "files" / "a.parquet", rows[:2]).parent
        if write_pick_a_pic(tmp_path / "files" / "deep" / "b.parquet", rows[2:], row_group_size=2)
        else "",
        "winner and loser": write_metadata(tmp_path / "named", rows, ("winner", "loser")),
        "winner_file_name": write_metadata(tmp_path / "hub-style", rows, ("winner_file_name", "loser_file_name")),
        "labelled": write_metadata(tmp_path / "labelled", rows, ("jpg_0", "jpg_1")),
        "metadata file": write_metadata(tmp_path / "by-file", rows, ("winner", "loser")) / "metadata.jsonl",
        "twins": write_twins(tmp_path / "twins", rows),
        "datasets": f"datasets:{write_pick_a_pic(tmp_path / 'hub' / 'train.parquet', rows, struct=True).parent}",
    }


def test_same_content_is_the_same_data_from_every_source(layouts: dict[str, str | Path]) -> None:
    checked = {name: check(data) for name, data in layouts.items()}
    assert all(len(found.examples) == 7 and not found.problems for found in checked.values())
    contents = {
        name: [(e.row, e.caption, e.images, e.winner, e.rewards) for e in found.examples]
        for name, found in checked.items()
    }
    assert all(content == contents["parquet"] for content in contents.values())
    assert len({found.fingerprint for found in checked.values()}) == 1
    assert contents["parquet"][3][1] == "caption 3 – größer"


def test_stream_and_random_access_agree(layouts: dict[str, str | Path]) -> None:
    for name, data in layouts.items():
        source = open_source(data)
        streamed = list(source.rows())
        assert [row.index for row in streamed] == list(range(len(source))) == list(range(7)), name
        for start in range(8):
            assert list(source.rows(start)) == streamed[start:], name
        order = [6, 0, 3, 3, 5, 1, 4, 2]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(source.row, order)) == [streamed[i] for i in order], name
        for index in (-1, 7):
            with pytest.raises(IndexError):
                source.row(index)


def test_random_access_over_many_batches(tmp_path: Path) -> None:
    """Row groups of several batches, read forwards, backwards and from threads."""
    rows = [(f"caption {i}", b"%d" % i, b"-%d" % i) for i in range(400)]
    source = open_source(write_pick_a_pic(tmp_path / "many.parquet", rows, row_group_size=300))
    order = [*range(400), *range(399, -1, -7), 17, 290, 16, 340, 15]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(source.row, order))
    assert [(row.caption, *row.images) for row in found] == [rows[i] for i in order]
    assert [row.name for row in found[:2]] == ["many.parquet row 0", "many.parquet row 1"]


def test_labels_and_rewards(tmp_path: Path) -> None:
    rows = pairs(2)
    table = pq.read_table(write_pick_a_pic(tmp_path / "a.parquet", rows)).drop_columns(["label_0"])
    table = table.append_column("label_0", pa.array([0.0, 1.0])).append_column("reward_0", pa.array([0.25, 2]))
    pq.write_table(table.append_column("reward_1", pa.array([1, 1])), tmp_path / "a.parquet")
    found = check(tmp_path / "a.parquet").examples
    assert [example.winner for example in found] == [1, 0]
    assert [example.rewards for example in found] == [(0.25, 1.0), (2.0, 1.0)]


def test_caption_that_is_no_text(tmp_path: Path) -> None:
    rows = pairs(2)
    table = pq.read_table(write_pick_a_pic(tmp_path / "a.parquet", rows)).drop_columns(["caption"])
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array(["größer".encode("latin-1"), b"fine"]).buffers())
    pq.write_table(table.append_column("caption", latin), tmp_path / "a.parquet")
    checked = check(tmp_path / "a.parquet")
    assert [example.caption for example in checked.examples] == ["fine"]
    assert [(problem.row, problem.reason) for problem in checked.problems] == [(0, "empty_caption")]


def test_single_images_from_parquet_and_metadata(tmp_path: Path) -> None:
    data = [encoded(1), encoded(2)]
    pq.write_table(pa.table({"image": data, "caption": ["a", "b"], "reward": [0.5, -1.0]}), tmp_path / "images.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in zip("xy", data, strict=True):
        (folder / name).write_bytes(content)
    lines = [{"file_name": "x", "text": "a", "reward": 0.5}, {"file_name": "y", "text": "b", "reward": -1}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    by_table, by_folder = (check(where, kind="images") for where in (tmp_path / "images.parquet", folder))
    assert [(e.caption, e.winner, e.rewards) for e in by_table.examples] == [("a", 0, (0.5,)), ("b", 0, (-1.0,))]
    assert by_table.fingerprint == by_folder.fingerprint
    with pytest.raises(InputError, match=r"holds images, not pairs.*--kind images"):
        check(tmp_path / "images.parquet", kind="pairs")
    with pytest.raises(InputError, match=r"holds images, not pairs.*--kind images") as raised:
        check(folder, kind="pairs")
    assert {problem.reason for problem in raised.value.checked.problems} == {"not_a_pair"}  # type: ignore[attr-defined]
    assert [check(where).options.kind for where in (tmp_path / "images.parquet", folder)] == ["images"] * 2


def test_fingerprint_follows_content_and_order_only(tmp_path: Path) -> None:
    rows = pairs(3)
    before = check(write_pick_a_pic(tmp_path / "a.parquet", rows)).fingerprint
    assert check(write_pick_a_pic(tmp_path / "other name.parquet", rows)).fingerprint == before
    others = [rows[::-1], rows[:2], [("other", *rows[0][1:]), *rows[1:]], [(rows[0][0], *rows[0][:0:-1]), *rows[1:]]]
    found = {check(write_pick_a_pic(tmp_path / f"{i}.parquet", other)).fingerprint for i, other in enumerate(others)}
    assert len(found | {before}) == 5


@pytest.mark.parametrize("layout", ["parquet files", "winner and loser", "twins"])
def test_state_follows_every_file(layouts: dict[str, str | Path], layout: str, tmp_path: Path) -> None:
    folder = Path(layouts[layout])
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = open_source(folder).state()
    assert open_source(folder).state() == state
    shutil.copytree(folder, tmp_path / "moved")
    assert open_source(tmp_path / "moved").state() == state, "moving a set is not changing it"
    for file in files:
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert open_source(folder).state() != state, file
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_source(folder).state() == state


def test_state_of_a_dataset(tmp_path: Path) -> None:
    path = write_pick_a_pic(tmp_path / "hub" / "train.parquet", pairs(1))
    state = open_source(f"datasets:{path.parent}").state()
    assert open_source(f"datasets:{path.parent}").state() == state
    write_pick_a_pic(path, pairs(2))
    assert open_source(f"datasets:{path.parent}").state() != state


def test_split_of_parquet_files(tmp_path: Path) -> None:
    rows = pairs(3)
    write_pick_a_pic(tmp_path / "train-00000-of-00001.parquet", rows[:1])
    write_pick_a_pic(tmp_path / "validation" / "0.parquet", rows[1:])
    write_pick_a_pic(tmp_path / "validation_unique-0.parquet", rows[:1])
    assert len(open_source(tmp_path)) == 4
    assert len(open_source(tmp_path, split="train")) == 1
    assert len(open_source(tmp_path, split="validation")) == 2
    with pytest.raises(InputError, match="no Parquet file of split 'test'"):
        open_source(tmp_path, split="test")


def test_saved_dataset(tmp_path: Path) -> None:
    import datasets

    rows = pairs(2)
    table = pq.read_table(write_pick_a_pic(tmp_path / "a.parquet", rows))
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    wanted = check(tmp_path / "a.parquet").fingerprint
    assert check(f"datasets:{tmp_path / 'saved'}").fingerprint == check(tmp_path / "saved").fingerprint == wanted
    with pytest.raises(InputError, match="no splits"):
        open_source(tmp_path / "saved", split="test")

    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "splits")
    assert check(tmp_path / "splits").fingerprint == wanted
    with pytest.raises(InputError, match="has the splits train"):
        open_source(tmp_path / "splits", split="test")


def expected_errors() -> list[tuple[str, Callable[[Path], str | Path], str]]:
    def one_twin(path: Path) -> Path:
        (path / "winner").mkdir()
        return path

    def without_label(path: Path) -> Path:
        pq.write_table(pa.table({"jpg_0": [b""], "jpg_1": [b""], "text": ["a"]}), path / "a.parquet")
        return path

    def without_caption(path: Path) -> Path:
        pq.write_table(pa.table({"image": [b""], "prompt": ["a"]}), path / "a.parquet")
        return path

    def wrong_type(path: Path) -> Path:
        pq.write_table(pa.table({"image": [1], "caption": ["a"]}), path / "a.parquet")
        return path / "a.parquet"

    def cut(path: Path) -> Path:
        whole = write_pick_a_pic(path / "a.parquet", pairs(1)).read_bytes()
        (path / "a.parquet").write_bytes(whole[:-10])
        return path

    def other_file(path: Path) -> Path:
        (path / "a.csv").write_text("a,b")
        return path / "a.csv"

    return [
        ("nowhere", lambda path: path / "nowhere", "does not exist; give Parquet files"),
        ("empty folder", lambda path: path, "holds no training data; it needs Parquet"),
        ("one twin", one_twin, "has a folder winner/ but no loser/"),
        ("no label", without_label, "has no column label_0: .* found jpg_0, jpg_1, text"),
        ("no caption", without_caption, r"no column caption \(did you mean 'prompt'\?\)"),
        ("wrong type", wrong_type, "column image of .* holds int64, not images"),
        ("cut file", cut, "is not a complete Parquet file"),
        ("other file", other_file, "is not .parquet or .jsonl"),
        ("hub", lambda _: "nobody/nothing", "'nobody/nothing' .*is no path here.*connect once"),
        ("no name", lambda _: " ", "have no name; give Parquet"),
        ("no dataset", lambda path: f"datasets:{path}", "cannot be loaded"),
    ]


@pytest.mark.parametrize(("name", "make", "message"), expected_errors(), ids=lambda value: str(value)[:12])
def test_errors_name_the_remedy_in_one_line(
    name: str, make: Callable[[Path], str | Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        open_source(make(tmp_path))
    assert "\n" not in str(raised.value)


def test_split_is_refused_where_there_is_none(layouts: dict[str, str | Path]) -> None:
    for name in ("parquet", "metadata file", "labelled", "twins"):
        with pytest.raises(InputError, match="has no splits; leave out the split 'train'"):
            open_source(layouts[name], split="train")
    with pytest.raises(InputError, match="Unknown split"):
        open_source(layouts["datasets"], split="nope")


def test_datasets_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r'pip install "mmalign\[train\]"'):
        open_source("datasets:some/thing")


def test_source_passes_through(layouts: dict[str, str | Path]) -> None:
    source = open_source(layouts["twins"])
    assert isinstance(source, RowSource)
    assert open_source(source) is source


def test_importing_costs_nothing() -> None:
    heavy = ["torch", "pyarrow", "datasets", "diffusers", "transformers", "PIL"]
    code = f"import sys, generation, generation.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
