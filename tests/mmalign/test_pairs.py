"""Captioned and labelled images read from files that people have, and the lines that are refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from mmalign.errors import InputError
from mmalign.pairs import CaptionedImage, read_captioned, read_labelled


def written(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[CaptionedImage]:
    return read_captioned(path)[0]


def test_json_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path / "mine.jsonl",
        [
            {"file": "a.jpg", "captions": ["a dog", "one dog"], "split": "test", "group": 7, "label": "dog"},
            {"file_name": "b.jpg", "caption": "a cat"},
            {"image": "c.jpg", "captions": "a bird"},
            {
                "path": "/elsewhere/d.jpg",
                "caption": "a line\u2028separator and a \u0085 too",
                "group": None,
                "label": 0,
            },
        ],
    )
    images, root = read_captioned(path)
    assert root == tmp_path
    assert images == [
        CaptionedImage("a.jpg", ["a dog", "one dog"], "test", "7", "dog"),
        CaptionedImage("b.jpg", ["a cat"]),
        CaptionedImage("c.jpg", ["a bird"]),
        CaptionedImage("/elsewhere/d.jpg", ["a line\u2028separator and a \u0085 too"], label="0"),
    ]


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.TSV", "\t")])
def test_tables(tmp_path: Path, name: str, delimiter: str) -> None:
    rows = [["a.jpg", "a dog, running", "train", ""], ["b.jpg", 'two\nlines "here"', "", "cat"], ["c.jpg", " ", "", ""]]
    with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([["file", "caption", "split", "label"], *rows])
    assert read(tmp_path / name) == [
        CaptionedImage("a.jpg", ["a dog, running"], "train"),
        CaptionedImage("b.jpg", ['two\nlines "here"'], label="cat"),
        CaptionedImage("c.jpg", []),
    ]


def test_folder_with_its_usual_file(tmp_path: Path) -> None:
    written(tmp_path / "metadata.jsonl", [{"file": "a.jpg", "caption": "x"}])
    assert read_captioned(str(tmp_path)) == ([CaptionedImage("a.jpg", ["x"])], tmp_path)
    with pytest.raises(InputError, match=r"holds none of captions\.jsonl, .*give the file"):
        read_captioned(tmp_path.parent / tmp_path.name / "..")


def test_lines_of_one_file_are_put_together_and_must_agree(tmp_path: Path) -> None:
    lines: list[object] = [
        {"file": "a.jpg", "caption": "one", "split": "test"},
        {"file": "b.jpg", "caption": "other"},
        {"file": "a.jpg", "captions": ["two", " "], "split": "test"},
    ]
    images = read(written(tmp_path / "a.jsonl", lines))
    assert [(image.file, image.captions) for image in images] == [("a.jpg", ["one", "two"]), ("b.jpg", ["other"])]
    lines.append({"file": "a.jpg", "caption": "three", "split": "train"})
    with pytest.raises(InputError, match=r"line 4 of .* gives 'a\.jpg' another split"):
        read(written(tmp_path / "b.jsonl", lines))


def test_blank_captions_do_not_count(tmp_path: Path) -> None:
    lines: list[object] = [{"file": "a.jpg", "captions": ["", "x", "\t"]}, {"file": "b.jpg", "caption": "  "}]
    assert [image.captions for image in read(written(tmp_path / "a.jsonl", lines))] == [["x"], []]
    with pytest.raises(InputError, match="holds no caption"):
        read(written(tmp_path / "b.jsonl", lines[1:]))


def test_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"file": "a.jpg", "caption": "x"}\r\n\r\n{"file": "b.jpg", "caption": "y"}\r\n')
    assert [image.file for image in read(path)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "line",
    [
        '{"file": "b.jpg"}',
        '{"caption": "x"}',
        '{"file": "b.jpg", "caption": null}',
        '{"file": "b.jpg", "captions": [1]}',
        '{"file": "b.jpg", "captions": {"en": "x"}}',
        '{"file": null, "caption": "x"}',
        '{"image": {"bytes": ""}, "caption": "x"}',
        '{"file": "b.jpg", ',
        "[]",
        '"file"',
        "3",
    ],
)
def test_bad_line_is_numbered(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"file": "a.jpg", "caption": "x"}}\n\n{line}\n')
    with pytest.raises(InputError, match=r"line 3 of .*a\.jsonl"):
        read(path)


@pytest.mark.parametrize("row", ["b.jpg,a dog, running", "b.jpg", ",a dog"])
def test_bad_row_of_a_table_is_numbered(tmp_path: Path, row: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"file,caption\na.jpg,x\n{row}\n")
    with pytest.raises(InputError, match="line 3 of"):
        read(path)


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"file": "a.jpg", "caption": "a \\ud83d\\ude00"}\n{"file": "b.jpg", "caption": "a \\ud800"}\n')
    with pytest.raises(InputError, match=r"line 2 of .* half a character"):
        read(path)


def test_what_is_no_list_of_captions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.jsonl' cannot be read .*check the path"):
        read(tmp_path / "gone.jsonl")
    huge = tmp_path / "huge.csv"
    huge.write_text(f"file,caption\na.jpg,{'x' * 200_000}\n")
    with pytest.raises(InputError, match=r"line 2 of .* cannot be read"):
        read(huge)
    picture = tmp_path / "a.jpg"
    picture.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"line 2 of .* is not UTF-8"):
        read(picture)


@pytest.mark.parametrize(
    "text",
    [
        "file;caption\na.jpg;a dog, running\n",
        'File, Caption \na.jpg, "a dog, running"\n',
        "file\tcaption\na.jpg\ta dog, running\n",
        'file,caption,,\na.jpg,"a dog, running",,\n,,,\n',
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert read(path) == [CaptionedImage("a.jpg", ["a dog, running"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,text\na.jpg,x\n", r"has the columns 'filename', 'text'; name one file"),
        ("a.jpg,x\nb.jpg,y\n", r"has the columns 'a\.jpg', 'x'; name one file"),
        ("file,caption,caption\na.jpg,x,y\n", r"has two columns 'caption'"),
        ("file,caption\na.jpg,a dog, running\n", r"line 2 of .* more cells .*double quotes"),
        ('file,captions\na.jpg,"[""x"", ""y""]"\n', r"line 2 of .* list of captions in one cell"),
        ('file,caption\na.jpg,x\nb.jpg,"a dog\nc.jpg,y\n', r"line 3 of .* cannot be read"),
    ],
)
def test_tables_that_would_be_misread(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_refused_rather_than_garbled(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("file,caption\na.jpg,un caf\xe9\n".encode(encoding))
    with pytest.raises(InputError, match=r"line [12] of .* is not UTF-8; .*saved as UTF-8"):
        read(path)


# -- labelled images ---------------------------------------------------------------------------------------------------


def test_labelled_lines_and_folders_are_the_same_images(tmp_path: Path) -> None:
    names = ["dog/x.png", "red_fox/a.jpg", "red_fox/deep/er/b.JPG"]
    for name in [*names, ".hidden/c.jpg", "between.jpg", "empty/notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images, root = read_labelled(tmp_path)
    assert root == tmp_path
    assert images == [CaptionedImage(name, label=name.split("/")[0]) for name in names]
    rows = [(image.file, str(image.label)) for image in images]
    for name, mark in (("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")):
        text = "".join(f"{mark.join(row)}\n" for row in [("File_Name", "Label"), *rows])
        (tmp_path / name).write_text(f"\ufeff{text}", encoding="utf-8")
        assert read_labelled(str(tmp_path / name)) == (images, tmp_path)


def test_captions_of_labelled_lines_are_not_looked_at(tmp_path: Path) -> None:
    lines: list[object] = [
        {"image": "x", "label": 0, "captions": [1], "group": 7},
        {"path": "y", "label": "two", "caption": None, "split": "test"},
        {"path": "y", "label": "two", "caption": "again", "split": "test"},
    ]
    images = [CaptionedImage("x", group="7", label="0"), CaptionedImage("y", split="test", label="two")]
    assert read_labelled(written(tmp_path / "a.jsonl", lines))[0] == images
    table = tmp_path / "a.csv"
    table.write_text('file,captions,captions,label\nx,"[""a""]",,one\n,,,\ny,,b,two\n')
    assert [(image.file, image.label) for image in read_labelled(table)[0]] == [("x", "one"), ("y", "two")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "a", "label": "x"}\n{"file": "b"}\n', "line 2 of .* has no `file` with `label`; mend it"),
        ('{"label": "x"}\n', "line 1 of .* has no `file`"),
        ("[]\n", "line 1 of .* has no `file`"),
        ('{"file": "a", "label": "x"}\n{"file": "a", "label": "y"}\n', "line 2 of .* gives 'a' another label"),
        ('{"file": "a", "label": "\\ud800"}\n', "line 1 of .* half a character"),
        ("file,label\n", "line 1 of .* is not JSON"),
        ('{"file": "a", "label": "x"}\n', "has 1 classes of images; give a folder with"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_labelled_lines_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_labelled(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption\na.jpg,x\n", r"has the columns 'file', 'caption'; name one file .* and one label"),
        ("file,label,label\na.jpg,x,y\n", "has two columns 'label'"),
        ("file,label\na.jpg,x,y\n", "line 2 of .* more cells .*double quotes"),
        ("file,label\na.jpg,x\nb.jpg,\n", "line 3 of .* has no `file` with `label`"),
    ],
)
def test_labelled_tables_that_would_be_misread(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_labelled(path)


def test_places_without_labelled_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels .* cannot be read \(No such file or directory\); check the path"):
        read_labelled(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has 0 classes of images"):
        read_labelled(tmp_path)
