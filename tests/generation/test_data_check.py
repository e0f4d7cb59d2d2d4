"""Training data looked through: what is wrong is said by name, what is good survives."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor

from generation.data import NothingUsableError, check_data
from generation.data.images import read_row_image
from generation.rewards import CosineReward
from mmalign import Encoder, cli
from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import read_file, read_image


def picture(seed: int, mode: str = "RGB", image_format: str = "PNG", size: tuple[int, int] = (80, 64)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, image_format)
    return buffer.getvalue()


def huge_png(width: int = 10_000, height: int = 10_000) -> bytes:
    """A header of 100 megapixels, and data that no decoder accepts: whoever decodes it reports it as corrupt."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"no data") + chunk(b"IEND", b"")


class Folder:
    """A set with `metadata.jsonl`, written line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []

    def file(self, name: str, content: bytes) -> str:
        (self.path / name).write_bytes(content)
        return name

    def add(self, **entry: Any) -> None:
        self.lines.append(json.dumps(entry))

    def write(self) -> Path:
        (self.path / "metadata.jsonl").write_text("\n".join(self.lines) + "\n")
        return self.path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "set")
    made.path.mkdir()
    for i in range(4):
        made.file(f"{i}.png", picture(i))
    return made


def check(data: Any, *, empty: bool = False, **options: Any) -> Any:
    try:
        return check_data(data, **options)
    except NothingUsableError as error:
        if not empty:
            raise
        return error.checked


def fatal(checked: Any) -> list[tuple[str, str]]:
    return [(problem.name, problem.reason) for problem in checked.problems if problem.fatal]


@pytest.fixture
def bad_set(folder: Folder) -> Path:
    """Everything that the issue lists, one a line, between good rows."""
    good = {"winner": "0.png", "loser": "1.png"}
    folder.add(caption="good", **good)  # line 1
    folder.add(caption="cut", winner=folder.file("cut.jpg", picture(9, image_format="JPEG")[:-200]), loser="1.png")
    folder.add(caption="missing", winner="0.png", loser="gone.png")
    folder.add(caption="  \t", **good)
    folder.add(caption="tie", jpg_0="0.png", jpg_1="1.png", label_0=0.5)
    folder.add(captoin="wrong column", **good)  # line 6
    folder.add(caption="ink", winner=folder.file("ink.jpg", picture(7, "CMYK", "JPEG")), loser="1.png")
    folder.add(caption="palette", winner=folder.file("few.png", picture(8, "P")), loser="1.png")
    folder.add(caption="huge", winner=folder.file("huge.png", huge_png()), loser="1.png")
    folder.add(caption="good", **good)  # line 10: a duplicate
    folder.add(caption="good too", winner="3.png", loser="2.png")
    folder.lines.append('{"caption": "broken", ')
    folder.add(caption="good", winner="1.png", loser="0.png")  # line 13: the opposite of line 1
    return folder.write()


BAD_LINES = [
    (2, "truncated"),
    (3, "missing"),
    (4, "empty_caption"),
    (5, "tie"),
    (6, "missing_column"),
    (9, "too_large"),
    (10, "duplicate"),
    (12, "bad_json"),
    (13, "contradiction"),
]


def test_everything_bad_is_reported_by_name_and_good_rows_survive(bad_set: Path) -> None:
    checked = check(bad_set)
    assert fatal(checked) == [(f"metadata.jsonl line {line}", reason) for line, reason in BAD_LINES]
    assert [example.caption for example in checked.examples] == ["good", "ink", "palette", "good too"]
    assert [example.row for example in checked.examples] == [0, 6, 7, 10]
    notes = [(problem.name, problem.message) for problem in checked.problems if not problem.fatal]
    assert [name for name, _ in notes] == ["metadata.jsonl line 7", "metadata.jsonl line 8"]
    assert "CMYK" in notes[0][1]
    assert "palette" in notes[1][1]
    messages = {problem.row + 1: problem.message for problem in checked.problems}
    assert "cut.jpg" in messages[2]
    assert "gone.png" in messages[3]
    assert "'captoin'" in messages[6]
    assert "10000x10000" in messages[9]
    assert "50000000" in messages[9]
    assert "metadata.jsonl line 1" in messages[10]
    assert "metadata.jsonl line 1" in messages[13]
    assert checked.left_out == 9
    assert checked.reasons(fatal=False) == {"converted": 2}
    assert all("\n" not in message for message in messages.values())


def test_huge_image_is_judged_by_its_header(folder: Folder) -> None:
    """Under a higher limit the same file is decoded, and found to be corrupt."""
    folder.add(caption="a", winner="0.png", loser="1.png")
    folder.add(caption="b", winner="0.png", loser=folder.file("huge.png", huge_png()))
    path = folder.write()
    assert fatal(check(path)) == [("metadata.jsonl line 2", "too_large")]
    assert fatal(check(path, max_pixels=100_000_000))[0][1] in ("corrupt", "truncated")
    assert fatal(check(path, max_pixels=100, empty=True))[0] == ("metadata.jsonl line 1", "too_large")


def test_parquet_with_everything_wrong(tmp_path: Path) -> None:
    """The same faults in tables, and a table with other columns beside good ones."""
    a, b = picture(1), picture(2)
    rows: list[tuple[Any, ...]] = [
        (a, b, 1.0, "good"),
        (a[:-30], b, 1.0, "cut"),
        (None, b, 1.0, "none"),
        (a, b"", 1.0, "empty"),
        (a, b, 1.0, None),
        (a[:40], b[:40], 0.5, "a tie is not decoded"),
        (a, b, 0.7, "label"),
        (a, b, float("nan"), "label"),
        (a, b, None, "label"),
        (a, a, 1.0, "same"),
        (b, a, 0.0, "good"),
        (b, a, 1.0, "good"),
        (a, b"GIF89a nothing", 1.0, "not an image"),
        (picture(3, size=(200, 63)), b, 1.0, "small"),
    ]
    columns = dict(zip(("jpg_0", "jpg_1", "label_0", "caption"), map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg_0": [a, a], "captions": ["x", "y"]}), tmp_path / "b.parquet")
    checked = check(tmp_path)
    reasons = (
        "truncated missing empty empty_caption tie bad_label bad_label bad_label same_image duplicate contradiction"
    )
    expected = [(f"a.parquet row {i}", reason) for i, reason in enumerate(reasons.split(), 1)]
    found = fatal(checked)
    assert found[:11] == expected
    assert found[11][0] == "a.parquet row 12"
    assert found[12:] == [
        ("a.parquet row 13", "too_small"),
        ("b.parquet row 0", "missing_column"),
        ("b.parquet row 1", "missing_column"),
    ]
    assert [example.caption for example in checked.examples] == ["good"]
    assert len(check(tmp_path, min_side=63).examples) == 2


def test_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    rows = 6
    table = pa.table(
        {
            "jpg_0": [picture(i) for i in range(rows)],
            "jpg_1": [picture(i + rows) for i in range(rows)],
            "label_0": [1.0] * rows,
            "caption": ["a"] * rows,
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, row_group_size=2, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    checked = check(path)
    assert fatal(checked) == [("a.parquet row 2", "unreadable"), ("a.parquet row 3", "unreadable")]
    assert [example.row for example in checked.examples] == [0, 1, 4, 5]
    assert checked.source.row(2).problem.reason == "unreadable"
    assert checked.source.row(4).images[0] == picture(4)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"caption": 5}, "empty_caption"),
        ({"caption": "half \ud800 pair"}, "empty_caption"),
        ({"caption": "x", "winner": 5}, "missing_column"),
        ({"caption": "x", "winner": ""}, "missing_column"),
        ({"caption": "x", "winner": "a\0b"}, "unreadable"),
        ({"caption": "x", "winner": "."}, "not_a_file"),
        ({"caption": "x", "winner": "metadata.jsonl"}, "not_an_image"),
        ({"caption": "x", "reward_0": 1}, "bad_reward"),
        ({"caption": "x", "reward_0": 1, "reward_1": "2"}, "bad_reward"),
        ({"caption": "x", "reward_0": 1, "reward_1": float("inf")}, "bad_reward"),
        ({"caption": "x", "reward_0": 1, "reward_1": 10**400}, "bad_reward"),
        ({"caption": "x", "winner": None, "jpg_0": "0.png", "jpg_1": "1.png"}, "missing_column"),
    ],
)
def test_odd_values(folder: Folder, entry: dict[str, Any], reason: str) -> None:
    folder.add(caption="good", winner="2.png", loser="3.png")
    folder.add(**{"winner": "0.png", "loser": "1.png", **entry})
    assert fatal(check(folder.write())) == [("metadata.jsonl line 2", reason)]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"captoin": "x", "winner": "0.png", "loser": "1.png"}, "caption is missing; did you mean 'captoin'?"),
        ({"prompt": "x", "winner": "0.png", "loser": "1.png"}, "caption is missing; did you mean 'prompt'?"),
        ({"caption": "x", "winner": "0.png"}, "loser is missing; has"),
        ({"caption": "x", "jpg_0": "0.png", "lable_0": 1}, "label_0 and jpg_1 are missing; did you mean 'lable_0'?"),
    ],
)
def test_a_missing_column_is_named_with_the_likely_one(folder: Folder, entry: dict[str, Any], said: str) -> None:
    folder.add(caption="good", winner="2.png", loser="3.png")
    folder.add(**entry)
    (problem,) = (problem for problem in check(folder.write()).problems if problem.fatal)
    assert problem.reason == "missing_column"
    assert problem.message.startswith(said)


def test_all_faults_of_a_row_are_told_at_once(folder: Folder) -> None:
    folder.add(caption="good", winner="2.png", loser="3.png")
    folder.add(caption="", jpg_0="gone.png", jpg_1="gone too.png", label_0=3)
    found = fatal(check(folder.write()))
    assert [reason for _, reason in found] == ["empty_caption", "bad_label", "missing", "missing"]


@pytest.mark.parametrize("line", [b"[1]", b'{"caption": "\xff"}', b"nonsense", b"[" * 100_000, b"\x00"])
def test_lines_that_are_no_objects(folder: Folder, line: bytes) -> None:
    folder.add(caption="good", winner="2.png", loser="3.png")
    path = folder.write()
    with (path / "metadata.jsonl").open("ab") as file:
        file.write(line)
    assert fatal(check(path)) == [("metadata.jsonl line 2", "bad_json")]


def test_twins_without_partner_caption_or_name_of_their_own(tmp_path: Path) -> None:
    names = {
        "winner": ["a.png", "b.png", "both.png", "both.webp", "mute.png"],
        "loser": ["a.png", "c.png", "both.png", "mute.png"],
    }
    for side, files in names.items():
        (tmp_path / side).mkdir()
        for i, file in enumerate(files):
            (tmp_path / side / file).write_bytes(picture(i + 100 * len(side)))
    (tmp_path / "winner" / "a.txt").write_text("a")
    (tmp_path / "captions.jsonl").write_text('{"file": "winner/both.png", "caption": "b"}\nnonsense\n')
    checked = check(tmp_path)
    assert fatal(checked) == [
        ("winner/b.png", "no_partner"),
        ("winner/both.png", "ambiguous"),
        ("loser/c.png", "no_partner"),
        ("winner/mute.png", "empty_caption"),
    ]
    assert "line 2" in checked.problems[-1].message
    assert [example.name for example in checked.examples] == ["winner/a.png"]


def test_notes(folder: Folder) -> None:
    folder.add(caption="a", winner="0.png", loser=folder.file("same shape.png", picture(20, size=(160, 128))))
    folder.add(caption="b", winner="0.png", loser=folder.file("wide.png", picture(21, size=(90, 64))))
    folder.add(caption=" ".join(["word"] * 60), winner="0.png", loser="1.png")
    folder.add(caption=" ".join(["word"] * 61), winner="0.png", loser="1.png")
    checked = check(folder.write())
    notes = [(problem.row, problem.reason, problem.fatal) for problem in checked.problems]
    assert notes == [(1, "different_size", False), (3, "long_caption", False)]
    assert "90x64" in checked.problems[0].message
    assert len(checked.examples) == 4


def test_upright_sizes_and_hashes(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(buffer, "JPEG", exif=exif)
    folder.add(caption="a", winner=folder.file("turned.jpg", buffer.getvalue()), loser="1.png")
    image = check(folder.write()).examples[0].images[0]
    assert (image.width, image.height) == (64, 96)
    assert image.sha256 == hashlib.sha256(buffer.getvalue()).hexdigest()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was decoded, as it is decoded."""
    from generation.data import images

    calls: list[object] = []

    def counting(source: Any, **options: Any) -> Any:
        calls.append(source)
        return read_image(source, **options)

    monkeypatch.setattr(images, "read_image", counting)
    return calls


def test_an_image_is_read_and_decoded_once(
    folder: Folder, decoded: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from generation.data import images

    read = []
    monkeypatch.setattr(images, "read_file", lambda path: (read.append(path.name), read_file(path))[1])
    folder.file("copy of 0.png", (folder.path / "0.png").read_bytes())
    for i in range(30):
        folder.add(caption=f"caption {i}", winner="0.png" if i % 2 else "copy of 0.png", loser="1.png")
    checked = check(folder.write(), workers=4)
    assert len(checked.examples) == 30
    assert len(decoded) == 2
    assert sorted(read) == ["0.png", "1.png", "copy of 0.png"]


def test_memory(bad_set: Path, tmp_path: Path, decoded: list[object]) -> None:
    memory = tmp_path / "deep" / "memory"
    first = check(bad_set, memory=memory)
    assert decoded
    decoded.clear()
    again = check(bad_set, memory=memory)
    assert not decoded
    assert (again.examples, again.problems, again.fingerprint) == (first.examples, first.problems, first.fingerprint)

    assert check(bad_set, memory=memory, min_side=65, empty=True).examples == []
    assert decoded, "other options are another check"
    decoded.clear()
    (bad_set / "0.png").write_bytes(picture(50))
    assert check(bad_set, memory=memory).fingerprint != first.fingerprint
    assert decoded, "a changed image is looked at"


def test_a_set_that_changes_during_the_check_is_not_remembered(
    folder: Folder, tmp_path: Path, decoded: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from generation.data import images

    folder.add(caption="a", winner="0.png", loser="1.png")
    path = folder.write()
    changing = images.read_image

    def change(source: Any, **options: Any) -> Any:
        (path / "0.png").write_bytes(picture(60))
        return changing(source, **options)

    monkeypatch.setattr(images, "read_image", change)
    check(path, memory=tmp_path / "memory")
    assert not list((tmp_path / "memory").iterdir())


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b""])
def test_damaged_memory_is_made_again(
    bad_set: Path, tmp_path: Path, decoded: list[object], spoil: Callable[[bytes], bytes]
) -> None:
    first = check(bad_set, memory=tmp_path / "memory")
    (file,) = (tmp_path / "memory").iterdir()
    whole = file.read_bytes()
    file.write_bytes(spoil(whole).rstrip(b"}\n"))
    decoded.clear()
    assert check(bad_set, memory=tmp_path / "memory").examples == first.examples
    assert decoded
    assert file.read_bytes() == whole
    assert list((tmp_path / "memory").iterdir()) == [file], "no temporary files stay"


def brightness(images: list[Tensor], captions: list[str]) -> Sequence[float]:
    assert all(image.shape[0] == 3 and image.min() >= 0 and image.max() <= 1 for image in images)
    assert len(images) == len(captions)
    return [float(image.mean()) for image in images]


@pytest.fixture
def gray_pairs(folder: Folder) -> Path:
    """Flat winners of brightness 51 i / 255 beside losers of 102 / 255, which are image 0 in every second row."""
    loser = io.BytesIO()
    Image.new("RGB", (64, 64), (102, 102, 102)).save(loser, "PNG")
    folder.file("loser.png", loser.getvalue())
    for i in range(5):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), (51 * i + 1,) * 3).save(buffer, "PNG")
        name = folder.file(f"flat{i}.png", buffer.getvalue())
        pair = (name, "loser.png") if i % 2 else ("loser.png", name)
        folder.add(caption="gray", jpg_0=pair[0], jpg_1=pair[1], label_0=i % 2)
    return folder.write()


def test_filter_by_score_and_by_margin(gray_pairs: Path) -> None:
    """Winners score (51 i + 1) / 255, the loser 0.4."""
    assert [e.row for e in check(gray_pairs, reward=brightness, min_score=0.4).examples] == [2, 3, 4]
    checked = check(gray_pairs, reward=brightness, min_margin=0.2)
    assert [e.row for e in checked.examples] == [3, 4]
    low = [(p.row, p.reason, p.fatal) for p in checked.problems]
    assert low == [(0, "low_score", True), (1, "low_score", True), (2, "low_score", True)]
    assert f"{1 / 255 - 0.4:.4g}" in checked.problems[0].message
    assert [e.row for e in check(gray_pairs, reward=brightness, min_score=0.7, min_margin=0.2).examples] == [4]
    with pytest.raises(InputError, match=r"no row of .*: 5 low_score"):
        check(gray_pairs, reward=lambda images, _: [float("nan")] * len(images), min_score=0.0)


@pytest.mark.parametrize(("pixels", "most"), [(10**9, 16), (3 * 64 * 64, 4)])
def test_scoring_is_bounded_by_images_and_by_pixels(
    gray_pairs: Path, monkeypatch: pytest.MonkeyPatch, pixels: int, most: int
) -> None:
    from generation.data import filtering

    monkeypatch.setattr(filtering, "_BATCH_PIXELS", pixels)
    lines = (gray_pairs / "metadata.jsonl").read_text()
    with (gray_pairs / "metadata.jsonl").open("a") as file:
        file.writelines(lines.replace('"gray"', f'"gray {i}"') for i in range(4))
    sizes = []

    def score(images: list[Tensor], captions: list[str]) -> Sequence[float]:
        sizes.append(len(images))
        return brightness(images, captions)

    checked = check(gray_pairs, reward=score, min_margin=0.2)
    assert len(checked.examples) == 10
    assert sum(sizes) == 50
    assert max(sizes) == most


def test_a_wrong_row_does_not_bar_the_right_one(folder: Folder) -> None:
    """The earlier of two opposite rows is left out by its margin: the later is no contradiction then."""
    for name, gray in (("dark", 30), ("light", 200)):
        Image.new("RGB", (64, 64), (gray,) * 3).save(folder.path / f"{name}.png")
    folder.add(caption="light", winner="dark.png", loser="light.png")
    folder.add(caption="light", winner="light.png", loser="dark.png")
    path = folder.write()
    assert [e.row for e in check(path).examples] == [0]
    assert [e.row for e in check(path, reward=brightness, min_margin=0.0).examples] == [1]


def test_scores_are_remembered_if_the_score_says_which_it_is(gray_pairs: Path, tmp_path: Path) -> None:
    calls = []

    class Named:
        def __init__(self, fingerprint: str | None) -> None:
            self.fingerprint = fingerprint

        def __call__(self, images: list[Tensor], captions: list[str]) -> Sequence[float]:
            calls.append(len(images))
            return brightness(images, captions)

    memory = tmp_path / "memory"
    first = check(gray_pairs, reward=Named("a"), min_score=0.4, memory=memory)
    assert sum(calls) == 5, "losers are scored for margins only"
    assert check(gray_pairs, reward=Named("a"), min_score=0.4, memory=memory).examples == first.examples
    assert [e.row for e in check(gray_pairs, reward=Named("a"), min_score=0.7, memory=memory).examples] == [4]
    assert sum(calls) == 5
    check(gray_pairs, reward=Named("b"), min_score=0.4, memory=memory)
    assert sum(calls) == 10
    check(gray_pairs, reward=Named(None), min_score=0.4, memory=memory)
    check(gray_pairs, reward=Named(None), min_score=0.4, memory=memory)
    assert sum(calls) == 20


def test_filter_by_cosine(tiny_open_clip: Encoder, folder: Folder) -> None:
    folder.add(caption="a cat", winner="0.png", loser="1.png")
    folder.add(caption="a dog", winner="2.png", loser="3.png")
    path = folder.write()
    images = tiny_open_clip.encode_images([path / f"{i}.png" for i in range(4)])
    texts = tiny_open_clip.encode_texts(["a cat", "a cat", "a dog", "a dog"])
    cosines = np.einsum("nd,nd->n", images, texts)
    between = float(cosines[[0, 2]].mean())
    checked = check(path, reward=CosineReward(tiny_open_clip), min_score=between)
    assert [e.row for e in checked.examples] == [int(cosines[2] > cosines[0])]
    between = float((cosines[[0, 2]] - cosines[[1, 3]]).mean())
    checked = check(path, reward=CosineReward(tiny_open_clip), min_margin=between)
    assert [e.row for e in checked.examples] == [int(cosines[2] - cosines[3] > cosines[0] - cosines[1])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "triples"}, "kind is 'triples'"),
        ({"max_pixels": 0}, "max_pixels is 0"),
        ({"min_side": 0}, "min_side is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"min_score": 0.1}, "need a reward"),
        ({"reward": brightness}, "min_score or min_margin"),
        ({"reward": brightness, "min_margin": 0.1, "kind": "images"}, "min_margin compares"),
        ({"reward": lambda images, captions: [1.0], "min_margin": 0.1}, "returned 1 numbers for 10 images"),
        ({"reward": lambda images, captions: None, "min_margin": 0.1}, "returned NoneType"),
        ({"reward": brightness, "min_score": float("nan")}, "min_score is nan"),
        ({"memory": "{set}/0.png"}, "cannot be made"),
    ],
)
def test_options_out_of_range(gray_pairs: Path, options: dict[str, Any], message: str) -> None:
    options = {k: v.format(set=gray_pairs) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(InputError, match=message) as raised:
        check(gray_pairs, **options)
    assert "\n" not in str(raised.value)


def test_the_kind_is_what_the_data_are(folder: Folder) -> None:
    folder.add(caption="a", file_name="0.png")
    folder.add(caption="b", file_name="1.png")
    path = folder.write()
    alone = check(path)
    assert (alone.options.kind, len(alone.examples)) == ("images", 2)
    with pytest.raises(InputError, match="min_margin compares"):
        check(path, reward=brightness, min_margin=0.1)
    folder.add(caption="c", winner="2.png", loser="3.png")
    mixed = check(folder.write())
    assert (mixed.options.kind, [example.row for example in mixed.examples]) == ("pairs", [2])
    assert [reason for _, reason in fatal(mixed)] == ["not_a_pair", "not_a_pair"]
    assert [reason for _, reason in fatal(check(path, kind="images"))] == ["not_one_image"]


def test_the_summary_says_what_was_checked(gray_pairs: Path) -> None:
    class Named:
        fingerprint = "brightness, first version"

        def __call__(self, images: list[Tensor], captions: list[str]) -> Sequence[float]:
            return brightness(images, captions)

    summary = check(gray_pairs, reward=Named(), min_margin=0.2, min_side=32).to_dict()
    wanted = {"kind": "pairs", "min_side": 32, "min_margin": 0.2, "reward": "brightness, first version"}
    assert {name: summary[name] for name in wanted} == wanted
    assert (summary["rows"], summary["usable"], summary["reasons"]) == (5, 2, {"low_score": 3})
    assert json.loads(json.dumps(summary)) == summary


def test_an_image_that_changes_between_check_and_scoring(gray_pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from generation.data import checking

    before = checking._check_rows

    def change(*given: Any) -> Any:
        found = before(*given)
        (gray_pairs / "flat3.png").write_bytes((gray_pairs / "flat4.png").read_bytes())
        (gray_pairs / "flat4.png").unlink()
        return found

    monkeypatch.setattr(checking, "_check_rows", change)
    checked = check(gray_pairs, reward=brightness, min_score=0.4)
    assert [example.row for example in checked.examples] == [2]
    assert [problem.reason for problem in checked.problems[-2:]] == ["changed", "missing"]
    assert "line 4 has changed since it was checked" in checked.problems[-2].message


def test_an_image_is_read_again(folder: Folder) -> None:
    data = picture(0)
    sha256 = hashlib.sha256(data).hexdigest()
    wanted = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    for source in (data, folder.path / "0.png"):
        np.testing.assert_array_equal(read_row_image(source, name="row", sha256=sha256), wanted)
    for source, options, reason in (
        (None, {}, "missing"),
        (data, {"sha256": "0" * 64}, "changed"),
        (data, {"max_pixels": 79 * 64}, "too_large"),
    ):
        with pytest.raises(UnreadableImageError) as raised:
            read_row_image(source, **{"name": "line 3", "sha256": sha256, **options})  # type: ignore[arg-type]
        assert raised.value.reason == reason
        assert "line 3" in str(raised.value)


def test_nothing_left(folder: Folder) -> None:
    folder.add(caption="", winner="0.png", loser="1.png")
    folder.add(caption="", winner="0.png", loser="gone.png")
    path = folder.write()
    with pytest.raises(InputError, match=r"no row of .*: 2 empty_caption, 1 missing .*line 1") as raised:
        check(path)
    assert "\n" not in str(raised.value)
    assert check(path, empty=True).left_out == 2
    (path / "metadata.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no rows"):
        check(path)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmalign", "data", "check", *map(os.fspath, arguments)])
        # `main` reconfigures the streams, which pytest's are not made for.
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        monkeypatch.setattr(sys.stderr, "reconfigure", lambda **_: None, raising=False)
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def test_command_lists_problems_by_name(bad_set: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    code, out, err = run(bad_set, "--out", tmp_path / "report.jsonl")
    assert code == 4
    assert "13: 4 usable, 9 left out" in out
    for line, reason in BAD_LINES:
        assert any(f"({reason}): metadata.jsonl line {line}: " in shown for shown in out.splitlines()), (line, reason)
    assert "checking" in err, "the bar is on standard error"
    report = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [(r["name"], r["reason"]) for r in report if r["fatal"]] == fatal(check(bad_set))
    assert len(report) == 11

    code, out, _ = run(bad_set, "--json", "-q")
    summary = json.loads(out)
    assert code == 4
    assert (summary["rows"], summary["usable"], summary["left_out"]) == (13, 4, 9)
    assert (summary["captions"], summary["images"], summary["sizes"]) == (4, 6, {"80x64": 4})
    assert summary["fingerprint"] == check(bad_set).fingerprint
    asked = {"kind": "pairs", "max_pixels": 50_000_000, "min_side": 64, "min_score": None, "reward": None}
    assert {name: summary[name] for name in asked} == asked
    assert run(bad_set, "--strict", "-q")[0] == 1


def test_command_on_good_data_and_on_none(folder: Folder, run: Callable[..., Any]) -> None:
    folder.add(caption="a", winner="0.png", loser="1.png")
    path = folder.write()
    code, out, err = run(path, "--strict", "-q")
    assert (code, err) == (0, "")
    assert "1 usable, 0 left out" in out
    for i in range(25):
        folder.add(caption=f"{i}", winner="0.png", loser="gone.png")
    path = folder.write()
    _, out, _ = run(path, "-q")
    assert out.count("left out (missing)") == 20
    assert "5 more" in out
    code, out, err = run(path, "--max-pixels", "10", "-q")
    assert code == 1
    assert "left out (too_large)" in out
    assert err.startswith("error: no row of")
    code, out, err = run(path, "--kind", "images", "-q")
    assert code == 1
    assert err.endswith("holds pairs, not images; use kind 'pairs' (--kind pairs) or other data\n")
    assert "(not_one_image)" in out
    code, _, err = run(path / "nowhere")
    assert (code, err.count("\n")) == (1, 1)


def test_a_name_with_a_line_break_keeps_to_its_line(tmp_path: Path, run: Callable[..., Any]) -> None:
    for twin in ("winner", "loser"):
        (tmp_path / twin).mkdir()
        (tmp_path / twin / "two\nlines.png").write_bytes(b"no image")
        (tmp_path / twin / "two\nlines.txt").write_text("a")
    code, out, err = run(tmp_path, "-q")
    assert (code, err.startswith("error: no row of")) == (1, True)
    assert sum("(not_an_image)" in line and "two\\nlines" in line for line in out.splitlines()) == 2
    assert "lines.png" not in [line[:9] for line in out.splitlines()]


def test_labels_of_another_type_are_told_apart(folder: Folder) -> None:
    for label in (2, "1", None):
        folder.add(caption="x", jpg_0="0.png", jpg_1="1.png", label_0=label)
    messages = [problem.message for problem in check(folder.write(), empty=True).problems]
    assert [message.split(";")[0] for message in messages] == [
        "label_0 is 2",
        "label_0 is the text '1'",
        "label_0 is missing",
    ]


def test_command_filters_by_encoder(
    folder: Folder, open_clip_checkpoint: Path, tiny_open_clip: Encoder, run: Callable[..., Any]
) -> None:
    folder.add(caption="a cat", winner="0.png", loser="1.png")
    path = folder.write()
    spec = f"open_clip:tiny-clip/{open_clip_checkpoint}"
    options = ("--filter-encoder", spec, "--device", "cpu", "-q")
    cosine = CosineReward(tiny_open_clip)([read_image(path / "0.png").pixels / 255], ["a cat"])[0]
    assert run(path, *options, "--min-score", str(cosine - 0.01))[0] == 0
    code, out, _ = run(path, *options, "--min-score", str(cosine + 0.01))
    assert code == 1
    assert f"scores {cosine:.4g}" in out
