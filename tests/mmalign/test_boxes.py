"""Boxes: what files of several forms say, what of it lies in the image, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmalign.errors import InputError
from mmalign.imaging import read_file, read_image
from mmalign.object_aware.boxes import Detections, checked_boxes, choose_boxes, read_boxes


def corners(row: dict[str, Any]) -> np.ndarray:
    boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in row["objects"])]
    return np.array(boxes, np.float32).reshape(-1, 4)


def detections(*boxes: tuple[float, ...], scores: list[float] | None = None) -> Detections:
    given = [1.0] * len(boxes) if scores is None else scores
    return Detections(np.array(boxes, np.float32), np.array(given, np.float32), tuple(map(str, range(len(boxes)))))


def test_boxes_of_the_photographs(photos: Path, captions: list[dict[str, Any]]) -> None:
    file = read_boxes(photos / "captions.jsonl")
    assert len(file) == len(captions) == 76
    for row in captions[::7]:
        path = photos / row["file"]
        found = file.detect(path)
        wanted = corners(row)
        np.testing.assert_allclose(found.boxes, wanted, atol=0.5)  # COCO's may end a little beyond the image
        assert found.boxes.dtype == np.float32
        assert (found.boxes[:, 2:] <= [row["width"], row["height"]]).all()
        assert found.labels == tuple(one["category"] for one in row["objects"])
        assert found.scores.tolist() == [1.0] * len(found)


def test_all_forms_say_the_same(photos: Path, captions: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = captions[:6]
    numbers = {name: n for n, name in enumerate(sorted({one["category"] for row in rows for one in row["objects"]}))}
    coco = {
        "images": [{"id": 100 + n, "file_name": row["file"]} for n, row in enumerate(rows)],
        "categories": [{"id": n, "name": name} for name, n in numbers.items()],
        "annotations": [
            {"image_id": 100 + n, "category_id": numbers[one["category"]], "bbox": one["bbox"], "iscrowd": 0}
            for n, row in enumerate(rows)
            for one in row["objects"]
        ],
    }
    coco["annotations"].append({"image_id": 100, "category_id": 0, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    with_labels = [
        {"file_name": row["file"], "boxes": corners(row).tolist(), "labels": [o["category"] for o in row["objects"]]}
        for row in rows
    ]
    forms = {
        "coco.json": json.dumps(coco),
        "list.json": json.dumps(with_labels),
        "lines.jsonl": "".join(f"{json.dumps(line)}\n" for line in with_labels),
        "split.jsonl": "".join(
            f"{json.dumps({**line, 'boxes': [box], 'labels': [label]})}\n"
            for line in with_labels
            for box, label in zip(line["boxes"], line["labels"], strict=True)
        ),
        "names.json": json.dumps({row["file"]: corners(row).tolist() for row in rows}),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        file = read_boxes(tmp_path / name, photos)
        assert len(file) == 6
        for row in rows:
            found, wanted = (
                file.detect(photos / row["file"]),
                read_boxes(photos / "captions.jsonl").detect(photos / row["file"]),
            )
            np.testing.assert_allclose(found.boxes, wanted.boxes, rtol=1e-6)
            assert found.labels == (("",) * len(wanted) if name == "names.json" else wanted.labels)


def test_images_are_known_by_their_content(photos: Path, captions: list[dict[str, Any]], tmp_path: Path) -> None:
    file, path = read_boxes(photos / "captions.jsonl"), photos / captions[3]["file"]
    moved = Path(shutil.copy(path, tmp_path / "another name.jpg"))
    wanted = file.detect(path)
    content = moved.read_bytes()
    pixels = read_image(path).pixels
    for image, given_content in (
        (moved, None), (str(moved), None), (read_file(moved), None), (content, None), (pixels, content),
        (Image.open(path), content),
    ):  # fmt: skip
        found = file.detect(image, content=given_content)
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
        assert len(found)
    assert len(file.detect(pixels, content=content + b" ")) == 0
    assert file.detect(photos / captions[3]["file"], phrases=["nothing like it"]).labels == wanted.labels
    with pytest.raises(InputError, match=r"found by the content of image files, and this image is a Tensor without"):
        file.detect(pixels)


def test_images_without_boxes_and_two_names_of_one(photos: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in photos.glob("*.jpg"))[:2]
    for name in names:
        shutil.copy(photos / name, tmp_path / name)
    shutil.copy(photos / names[0], tmp_path / "copy.jpg")
    lines = [
        {"file": names[0], "boxes": [[0, 0, 9, 9], [1, 1, 5, 5]], "scores": [0.2, 0.9]},
        {"file": "copy.jpg", "boxes": [[1, 1, 5, 5], [2, 2, 8, 8]], "scores": [0.4, 0.5]},
        {"file": names[1], "boxes": []},
    ]
    (tmp_path / "b.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    file = read_boxes(tmp_path / "b.jsonl")
    found = file.detect(tmp_path / "copy.jpg")
    assert found.boxes.tolist() == [[1, 1, 5, 5], [2, 2, 8, 8], [0, 0, 9, 9]]  # the surest first
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.2])
    assert file.detect(tmp_path / names[1]).boxes.shape == (0, 4)
    assert choose_boxes(file.detect(tmp_path / names[1]), (40, 30)).shape == (0, 4)


def test_boxes_are_input_as_the_image_is(photos: Path, captions: list[dict[str, Any]], tmp_path: Path) -> None:
    name = captions[0]["file"]
    (tmp_path / "b.json").write_text(json.dumps({name: [[0, 0, 5, 5]]}))
    few, many = read_boxes(tmp_path / "b.json", photos), read_boxes(photos / "captions.jsonl")
    assert few.digest == many.digest
    assert len(few.detect(photos / name)) != len(many.detect(photos / name))
    assert not few.open_vocabulary
    assert not few.needs_phrases


numbers = st.floats(-50, 150, width=32)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=6))
def test_what_is_left_lies_in_the_image(corner_pairs: list[tuple[float, ...]]) -> None:
    boxes = [[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in corner_pairs]
    found = checked_boxes(boxes, (100, 60))
    assert found.dtype == np.float32
    wanted = [
        [max(a, 0), max(b, 0), min(c, 100), min(d, 60)]
        for a, b, c, d in boxes
        if min(c, 100) > max(a, 0) and min(d, 60) > max(b, 0)
    ]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32).reshape(-1, 4))
    np.testing.assert_array_equal(checked_boxes(torch.tensor(boxes), (100, 60)), found)


def test_small_ones_first_then_by_score() -> None:
    found = detections(
        (0, 0, 100, 100), (0, 0, 20, 20), (5, 5, 15, 15), (0, 0, 50, 50), (200, 0, 300, 9), (90, 90, 130, 130),
        scores=[0.99, 0.3, 0.6, 0.9, 1.0, 0.4],
    )  # fmt: skip
    chosen = choose_boxes(found, (100, 100), 4)
    # The last is 40 x 40, and 10 x 10 of it are in the image.
    assert chosen.tolist() == [[5, 5, 15, 15], [90, 90, 100, 100], [0, 0, 20, 20], [0, 0, 100, 100]]
    assert len(choose_boxes(found, (100, 100))) == 5
    np.testing.assert_array_equal(choose_boxes(found, (100, 100), 1), chosen[:1])
    exactly_a_tenth = detections((0, 0, 10, 100), (0, 0, 20, 49), scores=[0.9, 0.1])
    assert choose_boxes(exactly_a_tenth, (100, 100), 1).tolist() == [[0, 0, 20, 49]]
    with pytest.raises(InputError, match="max_objects is 0"):
        choose_boxes(found, (100, 100), 0)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, math.nan, 5]], r"here: box 0 is \[0.0, 0.0, nan, 5.0\]; give finite numbers"),
        ([[0, 0, 1, 1], [0, 0, math.inf, 5]], "box 1 is .*inf"),
        ([[5, 0, 2, 5]], r"box 0 is \[5.0, 0.0, 2.0, 5.0\], its right or lower side before the other; give x0, y0"),
        ([[0, 5, 5, 2]], "right or lower side"),
        ([[0, 0, 5]], r"shape \(1, 3\); give rows of x0, y0, x1, y1"),
        ([0, 0, 5, 5], r"shape \(4,\)"),
        ([[0, 0, 5, 5], [1]], "no table of numbers"),
        ([["a", 0, 5, 5]], "no table of numbers"),
        ({"a": 1}, "no table of numbers"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
    ],
)
def test_what_are_no_boxes(boxes: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked_boxes(boxes, (100, 100), "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no image; give lines of"),
        ("{}", "names no image"),
        ("[]", "names no image"),
        ("not json", "line 1 of .* is not JSON"),
        ('{"file": "NAME", "boxes": []}\n{"file": ', "line 2 of .* is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "has no `file` with `boxes` or `objects`"),
        ("[3]", "entry 1 of .* has no `file`"),
        ('{"file": "NAME"}', "has no `file` with `boxes`"),
        ('{"file": "NAME", "boxes": [[0, 0, 5]]}', "shape"),
        ('{"file": "NAME", "boxes": [[0, 0, 5, NaN]]}', "give finite numbers"),
        ('{"file": "NAME", "boxes": [[0, 0, 5, 1e999]]}', "give finite numbers"),
        ('{"file": "NAME", "boxes": 7}', "shape"),
        ('{"file": "NAME", "boxes": [[0, 0, 5, 5]], "scores": [1, 2]}', "1 boxes and 2 scores"),
        ('{"file": "NAME", "boxes": [[0, 0, 5, 5]], "labels": "dog"}', "1 boxes and 'dog' labels"),
        ('{"file": "NAME", "boxes": [[0, 0, 5, 5]], "scores": ["high"]}', "a score is 'high'"),
        ('{"file": "NAME", "objects": [{"category": "dog"}]}', "no list of objects with `bbox`"),
        ('{"file": "NAME", "objects": [{"bbox": [1, 2, -3, 4]}]}', "no side below 0"),
        ('{"file": "NAME", "objects": [{"bbox": [1, 2, 3]}]}', r"`bbox` has shape \(3,\)"),
        ('{"file": "NAME", "objects": [{"bbox": [1, 2, 3, "x"]}]}', "no list of numbers"),
        ('{"NAME": [[5, 0, 1, 1]]}', "'NAME' in .*right or lower side"),
        ('{"gone.jpg": []}', "none of the 1 images .* are in .*first: 'gone.jpg'"),
        ('{"..": []}', "names an image that cannot be read"),
        ('{"images": [{"id": 1}], "annotations": []}', "is not COCO's JSON: 'file_name' is missing"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [1, 1, 1, 1]}]}', "not COCO's JSON: 3 is missing"),
        ('{"images": 3, "annotations": []}', "not COCO's JSON, though it has"),
        ('{"images": [{"id": 1, "file_name": 3}], "annotations": []}', "has the file name 3"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}', "of the id 1"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}], "annotations": []}', "two images"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_boxes(text: str, message: str, photos: Path, tmp_path: Path) -> None:
    image = min(photos.glob("*.jpg"))
    shutil.copy(image, tmp_path / "NAME")
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_boxes(tmp_path / "boxes.json")
    assert "\n" not in str(caught.value)


def test_files_and_folders_that_are_not_there(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read .*No such file"):
        read_boxes(tmp_path / "no.json")
    with pytest.raises(InputError, match=r"images .*nowhere' is not a folder"):
        read_boxes(photos / "captions.jsonl", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"none of the 76 images .*give the folder of the images"):
        read_boxes(photos / "captions.jsonl", tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9.jpg": []}')
    with pytest.raises(InputError, match="are not UTF-8"):
        read_boxes(tmp_path / "latin.json")


def test_images_that_were_deleted_take_no_boxes_from_the_others(photos: Path, tmp_path: Path) -> None:
    image = min(photos.glob("*.jpg"))
    shutil.copy(image, tmp_path / "here.jpg")
    (tmp_path / "boxes.json").write_text('{"gone.jpg": [[1, 1, 9, 9]], "here.jpg": [[0, 0, 40, 30]]}')
    found = read_boxes(tmp_path / "boxes.json")
    assert found.missing == ("gone.jpg",)
    assert "1 of 2 images that" in str(found.note_of_missing())
    assert str(found.note_of_missing()).endswith("boxes.json' names are not there (first: 'gone.jpg')")
    (tmp_path / "all.json").write_text('{"here.jpg": [[0, 0, 40, 30]]}')
    assert read_boxes(tmp_path / "all.json").note_of_missing() is None
    assert found.detect(tmp_path / "here.jpg").boxes.tolist() == [[0, 0, 40, 30]]
