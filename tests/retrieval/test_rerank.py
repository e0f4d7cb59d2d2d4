"""The second stage of a search: its order, what happens to files that are gone, and both re-rankers on photographs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny_encoder import DIM, TinyEncoder

from mmalign import load_encoder
from mmalign.errors import InputError
from mmalign.imaging import DEFAULT_DECODING, DecodeSettings
from mmalign.object_aware.blip2 import Blip2Matcher
from mmalign.object_aware.boxes import Detections, Detector, read_boxes
from mmalign.object_aware.perturbing import PerturbationSettings, perturb_queries
from mmalign.object_aware.reranking import CosineReranker, MatchReranker, Reranker, load_reranker
from retrieval import Hit, ImageIndex, Term

if TYPE_CHECKING:
    from mmalign import Encoder

SHOWN = 10


class ByName(Reranker):
    """The later a name in the alphabet, the better; keeps what it was asked."""

    def __init__(self, unreadable: tuple[str, ...] = ()) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.unreadable = unreadable

    def score(
        self, text: str, images: Any, *, decode: DecodeSettings = DEFAULT_DECODING, progress: bool = False
    ) -> np.ndarray:
        names = [Path(image).name for image in images]
        self.asked.append((text, names))
        return np.array([np.nan if name in self.unreadable else float(name[:2]) for name in names], np.float32)

    def describe(self) -> dict[str, Any]:
        return {"rerank": "name"}


def names(hits: list[Hit]) -> list[str]:
    return [hit.path.name for hit in hits]


# -- order -------------------------------------------------------------------------------------------------------------


def test_hits_are_those_of_the_first_stage_in_another_order(index: ImageIndex) -> None:
    plain = index.search("red", k=12)
    assert all(hit.rerank_score is None for hit in plain)
    reranker = ByName()
    found = index.search("red", k=4, rerank=reranker, rerank_depth=6)
    assert reranker.asked == [("red", names(plain[:6]))]
    assert names(found) == sorted(names(plain[:6]), reverse=True)[:4]
    assert [hit.rank for hit in found] == [1, 2, 3, 4]
    by_name = {hit.path.name: hit for hit in plain}
    for hit in found:
        assert hit.rerank_score == float(hit.path.name[:2])
        assert (hit.score, hit.match) == (by_name[hit.path.name].score, by_name[hit.path.name].match)
        assert json.loads(json.dumps(hit.to_dict()))["rerank_score"] == hit.rerank_score
    assert json.loads(json.dumps(plain[0].to_dict()))["rerank_score"] is None


def test_no_fewer_than_k_are_read_again_and_64_by_default(index: ImageIndex) -> None:
    reranker = ByName()
    assert names(index.search("red", k=12, rerank=reranker, rerank_depth=2)) == [
        f"{n:02}.png" for n in range(11, -1, -1)
    ]
    index.search("red", k=1, rerank=reranker)
    assert [len(asked) for _, asked in reranker.asked] == [12, 12]


def test_filters_hold_before(index: ImageIndex) -> None:
    plain = index.search("red", k=12)
    reranker = ByName()
    found = index.search("red", k=12, where="path LIKE 'sub/%'", rerank=reranker)
    assert names(found) == ["11.png", "10.png", "09.png", "08.png"]
    middle = plain[5].score
    found = index.search("red", k=12, min_score=middle, rerank=reranker)
    assert names(found) == sorted(names(plain[:6]), reverse=True)
    assert plain[3].match is not None
    found = index.search("red", k=12, min_match=plain[3].match, rerank=reranker)
    assert names(found) == sorted((hit.path.name for hit in plain if hit.match >= plain[3].match), reverse=True)
    assert index.search("red", min_score=1.0, rerank=reranker) == []
    assert len(reranker.asked) == 3, "nothing found is nothing to read"


def test_ties_keep_the_order_of_the_first_stage(index: ImageIndex) -> None:
    class Same(ByName):
        def score(self, text: str, images: Any, **options: Any) -> np.ndarray:
            return np.zeros(len(images), np.float32)

    assert names(index.search("red", k=12, rerank=Same())) == names(index.search("red", k=12))


def test_files_that_are_gone_or_cannot_be_read_come_last(index: ImageIndex, folder: Path) -> None:
    plain = names(index.search("red", k=12))
    gone, broken = plain[0], plain[3]
    next(folder.rglob(gone)).unlink()
    reranker = ByName(unreadable=(broken,))
    found = index.search("red", k=12, rerank=reranker)
    assert gone not in reranker.asked[0][1]
    assert names(found)[-2:] == [gone, broken]
    assert [hit.rerank_score for hit in found[-2:]] == [None, None]
    assert names(found)[:-2] == sorted(set(plain) - {gone, broken}, reverse=True)
    assert [hit.rank for hit in found] == list(range(1, 13))


def test_a_copy_stands_in_for_a_file_that_is_gone(folder: Path, encoder: TinyEncoder) -> None:
    shutil.copy(folder / "03.png", folder / "99.png")
    index, _ = ImageIndex.build(folder, encoder=encoder)
    hit = next(hit for hit in index.search("red", k=12) if hit.aliases)
    hit.path.unlink()
    found = index.search("red", k=12, rerank=ByName())
    assert found[0].path == hit.path
    assert found[0].aliases == hit.aliases
    assert found[0].rerank_score == float(hit.aliases[0].name[:2])


def test_only_what_was_indexed_is_read(folder: Path, encoder: TinyEncoder) -> None:
    """A file that holds something else now is as good as gone; one with another time may hold what it held."""
    shutil.copy(folder / "03.png", folder / "99.png")
    index, _ = ImageIndex.build(folder, encoder=encoder)
    pair = next(hit for hit in index.search("red", k=12) if hit.aliases)
    pair.path.write_bytes(pair.path.read_bytes()[:-20])  # damaged, and the copy is whole
    shutil.copy(folder / "05.png", folder / "01.png")
    same_size = bytearray((folder / "02.png").read_bytes())
    same_size[-20] ^= 1
    (folder / "02.png").write_bytes(same_size)
    os.utime(folder / "04.png", (1, 1))
    reranker = ByName()
    found = {hit.path.name: hit.rerank_score for hit in index.search("red", k=12, rerank=reranker)}
    asked = reranker.asked[0][1]
    assert pair.path.name not in asked
    assert found[pair.path.name] == float(pair.aliases[0].name[:2])
    assert found["01.png"] is found["02.png"] is None
    assert "04.png" in asked
    assert sum(score is None for score in found.values()) == 2
    (hit,) = index.search("red", where=f"path = '{pair.item.name}'", rerank=reranker)
    assert hit.rerank_score is None, "the copy is left out by the filter"


def test_files_are_decoded_as_those_of_the_index(photos: Path, tmp_path: Path, tiny_open_clip: Encoder) -> None:
    (tmp_path / "photos").mkdir()
    whole, other, *_ = sorted(photos.glob("*.jpg"))
    (tmp_path / "photos" / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    shutil.copy(other, tmp_path / "photos")
    index, _ = ImageIndex.build(tmp_path / "photos", encoder=tiny_open_clip, tolerate_truncation=True)
    found = index.search("a dog", rerank=CosineReranker(tiny_open_clip))
    assert len(found) == 2
    for hit in found:
        assert hit.rerank_score == pytest.approx(hit.score, abs=1e-4)


def test_vectors_without_files_stay_as_they_are(
    folder: Path, tmp_path: Path, encoder: TinyEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # which has files of the same names, that nobody said were meant
    vectors = np.random.default_rng(0).standard_normal((9, DIM)).astype(np.float32)
    index = ImageIndex.from_vectors(vectors, tmp_path / "i", paths=[f"{n:02}.png" for n in range(9)], encoder=encoder)
    reranker = ByName()
    assert names(index.search("red", rerank=reranker)) == names(index.search("red"))
    assert reranker.asked == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        (np.eye(DIM, dtype=np.float32)[0], "the query is a vector"),
        (Path("00.png"), "the query is an image"),
        (["red", Path("00.png")], "has 2 terms; say all of it in one string"),
        (["red", "blue"], "has 2 terms"),
        (Term("red", -1.0), "leads away"),
    ],
)
def test_only_one_text_is_re_ranked(index: ImageIndex, query: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        index.search(query, rerank=ByName())


def test_depth_below_one(index: ImageIndex) -> None:
    with pytest.raises(InputError, match="rerank_depth is 0"):
        index.search("red", rerank=ByName(), rerank_depth=0)


# -- on photographs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs with their boxes."""
    folder = tmp_path_factory.mktemp("few")
    for row in captions[:SHOWN]:
        shutil.copy(photos / row["file"], folder)
    (folder / "boxes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in captions[:SHOWN]))
    return folder


@pytest.fixture(scope="module")
def few_index(few: Path, tiny_open_clip: Encoder, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    return ImageIndex.build(few, tmp_path_factory.mktemp("few") / "index", encoder=tiny_open_clip)[0]


@pytest.fixture(scope="module")
def matcher(blip2_folder: Path) -> Blip2Matcher:
    return Blip2Matcher.from_spec(str(blip2_folder), device="cpu")


def by_hand(matcher: Blip2Matcher, text: str, file: Path) -> float:
    """One image alone."""
    with torch.inference_mode():
        pixels = matcher.load_image(file)[1][None]
        cosines = matcher.image_queries(pixels)[0] @ matcher.text_vectors([text])[0]
        return float(matcher.match_logits(pixels, [text])[0, 0] + cosines.max())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_blip2_adds_match_and_contrast(
    few_index: ImageIndex, matcher: Blip2Matcher, captions: list[dict[str, Any]], batch_size: int
) -> None:
    text = captions[0]["captions"][0]
    plain = few_index.search(text, k=SHOWN)
    found = few_index.search(text, k=SHOWN, rerank=MatchReranker(matcher, batch_size=batch_size))
    expected = {hit.path: by_hand(matcher, text, hit.path) for hit in plain}
    assert [hit.path for hit in found] == sorted(expected, key=lambda path: -expected[path])
    for hit in found:
        assert hit.rerank_score == pytest.approx(expected[hit.path], abs=1e-5)
    assert names(found) != names(plain)


def test_cosines_of_another_encoder(few_index: ImageIndex, tiny_clip: Encoder, captions: list[dict[str, Any]]) -> None:
    text = captions[1]["captions"][0]
    found = few_index.search(text, k=SHOWN, rerank=CosineReranker(tiny_clip, batch_size=3), progress=True)
    cosines = tiny_clip.encode_images([hit.path for hit in found]) @ tiny_clip.encode_texts([text])[0]
    np.testing.assert_allclose([hit.rerank_score for hit in found], cosines, atol=1e-5)
    assert (np.diff(cosines) <= 1e-5).all()


@pytest.mark.parametrize("kind", ["match", "cosine"])
def test_unreadable_photographs_have_no_score(
    few: Path, tmp_path: Path, matcher: Blip2Matcher, tiny_clip: Encoder, kind: str
) -> None:
    files = sorted(few.glob("*.jpg"))[:5]
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(files[0].read_bytes()[:2000])
    reranker = MatchReranker(matcher, batch_size=2) if kind == "match" else CosineReranker(tiny_clip, batch_size=2)
    whole = reranker.score("a dog", files)
    assert np.isfinite(whole).all()
    mixed = reranker.score("a dog", [cut, *files[:3], tmp_path / "none.jpg", *files[3:], cut])
    assert np.isnan(mixed[[0, 4, 7]]).all()
    np.testing.assert_allclose(np.delete(mixed, [0, 4, 7]), whole, atol=1e-5)
    assert np.isnan(reranker.score("a dog", [cut])).all()
    assert len(reranker.score("a dog", [])) == 0


@pytest.mark.parametrize("kind", ["match", "cosine"])
def test_objects_change_scores_of_images_that_have_some(
    few: Path, captions: list[dict[str, Any]], tmp_path: Path, matcher: Blip2Matcher, tiny_clip: Encoder, kind: str
) -> None:
    rows = [json.dumps(row) for row in captions[:SHOWN] if row["objects"]][:3]
    (tmp_path / "three.jsonl").write_text("\n".join(rows))
    with_boxes = {json.loads(row)["file"] for row in rows}
    boxes = read_boxes(tmp_path / "three.jsonl", few)
    files = sorted(few.glob("*.jpg"))
    make: Callable[..., Reranker] = MatchReranker if kind == "match" else CosineReranker
    model: Any = matcher if kind == "match" else tiny_clip
    plain, turned = make(model).score("a dog", files), make(model, boxes).score("a dog", files)
    off = make(model, boxes, PerturbationSettings(alpha=0.0)).score("a dog", files)
    np.testing.assert_array_equal(off, plain)
    changed = {file.name for file, one, other in zip(files, plain, turned, strict=True) if one != other}
    assert changed == with_boxes
    assert np.abs(turned - plain).max() > 1e-4
    corners = {
        row["file"]: [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in row["objects"])]
        for row in map(json.loads, rows)
    }
    for file, score in zip(files, turned, strict=True):
        image = model.load_image(file)[0]
        with perturb_queries(model, [corners.get(file.name, [])], [(image.width, image.height)]):
            if kind == "match":
                expected = by_hand(model, "a dog", file)
            else:
                expected = float(model.encode_images([file])[0] @ model.encode_texts(["a dog"])[0])
        assert score == pytest.approx(expected, abs=1e-5)


class Asked(Detector):
    """Of open vocabulary: sees the middle of an image where it is asked for dogs."""

    spec, digest = "asked", "asked"
    open_vocabulary = needs_phrases = True

    def __init__(self) -> None:
        self.phrases: list[Sequence[str]] = []

    def detect(self, image: Any, *, content: bytes | None = None, phrases: Sequence[str] = ()) -> Detections:
        self.phrases.append(phrases)
        height, width = image.shape[1:]
        boxes = np.array([[0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height]], np.float32)
        return Detections(boxes, np.ones(1, np.float32), ("dog",)) if "dogs" in phrases else Detections.none()


@pytest.mark.parametrize("kind", ["match", "cosine"])
def test_detectors_of_open_vocabulary_look_for_what_the_query_names(
    few: Path, matcher: Blip2Matcher, tiny_clip: Encoder, kind: str
) -> None:
    files, detector = sorted(few.glob("*.jpg"))[:3], Asked()
    make: Callable[..., Reranker] = MatchReranker if kind == "match" else CosineReranker
    model: Any = matcher if kind == "match" else tiny_clip
    dogs, cats = "dogs on the sofa", "cats on the sofa"
    assert (make(model, detector).score(dogs, files) != make(model).score(dogs, files)).all()
    assert detector.phrases == [["dogs", "sofa"]] * 3
    np.testing.assert_array_equal(make(model, detector).score(cats, files), make(model).score(cats, files))


def test_rerankers_share_a_model_with_other_threads(
    few: Path, few_index: ImageIndex, tiny_open_clip: Encoder, matcher: Blip2Matcher
) -> None:
    """Plain, weakly and strongly perturbed scores, and searches by image, of one model at a time."""
    files = sorted(few.glob("*.jpg"))[:5]
    weak, strong = PerturbationSettings(alpha=3), PerturbationSettings(alpha=8)
    rerankers: list[Reranker] = [
        CosineReranker(tiny_open_clip), CosineReranker(tiny_open_clip, Asked(), weak),
        CosineReranker(tiny_open_clip, Asked(), strong), MatchReranker(matcher), MatchReranker(matcher, Asked(), weak),
        MatchReranker(matcher, Asked(), strong),
    ]  # fmt: skip
    tasks: list[Callable[[], Any]] = [lambda one=one: one.score("dogs", files).tolist() for one in rerankers]  # type: ignore[misc]
    tasks.append(lambda: names(few_index.search(files[0], k=5)))
    expected = [task() for task in tasks]
    assert len({str(found) for found in expected}) == len(tasks)
    with ThreadPoolExecutor(len(tasks)) as pool:
        for number, result in enumerate(pool.map(lambda n: tasks[n % len(tasks)](), range(5 * len(tasks)))):
            assert result == expected[number % len(tasks)]


def test_one_reranker_serves_several_threads(few: Path, matcher: Blip2Matcher) -> None:
    files = sorted(few.glob("*.jpg"))
    reranker = MatchReranker(matcher, Asked(), batch_size=3)
    texts = ["dogs in snow", "cats in snow"]
    expected = [reranker.score(text, files) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(lambda n: reranker.score(texts[n % 2], files), range(8))):
            np.testing.assert_array_equal(found, expected[number % 2])


def test_rerankers_by_name(blip2_folder: Path, clip_folder: Path, few: Path) -> None:
    for spec in (f"blip2:{blip2_folder}", str(blip2_folder), f"transformers:{blip2_folder}"):
        assert isinstance(load_reranker(spec, device="cpu"), MatchReranker)
    cosine = load_reranker(f"transformers:{clip_folder}", objects=f"{few}/boxes.jsonl,alpha=3", device="cpu")
    assert isinstance(cosine, CosineReranker)
    assert cosine.describe()["encoder"] == f"objects:{few}/boxes.jsonl,alpha=3.0|transformers:{clip_folder}"
    match = load_reranker(str(blip2_folder), objects=f"{few}/boxes.jsonl,max_objects=2", device="cpu")
    assert match.describe()["settings"]["max_objects"] == 2
    with pytest.raises(InputError, match="neither a folder nor"):
        load_reranker("no-such-thing", device="cpu")
    matcher = Blip2Matcher.from_spec(str(blip2_folder), device="cpu")
    with pytest.raises(InputError, match="settings are for the objects of a detector"):
        MatchReranker(matcher, None, PerturbationSettings())


# -- on the command line -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_index(few: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip-index") / "photos"
    shutil.copytree(few, folder)
    ImageIndex.build(folder, encoder=f"transformers:{clip_folder}", device="cpu", dtype="float32")
    return folder


def test_command_shows_both_scores(
    command_line: Callable[..., Any], clip_index: Path, blip2_folder: Path, matcher: Blip2Matcher
) -> None:
    options = ("--device", "cpu", "--rerank", f"blip2:{blip2_folder}", "-k", "3", "--rerank-depth", "5")
    plain = ImageIndex.open(clip_index, device="cpu").search("a dog", k=5)
    expected = {hit.path.name: by_hand(matcher, "a dog", hit.path) for hit in plain}
    best = sorted(expected, key=lambda name: -expected[name])[:3]

    table = command_line("search", clip_index, "a dog", *options, "--quiet")
    assert (table.code, table.err) == (0, "")
    head, *lines = table.out.splitlines()
    assert head.split() == ["rank", "rerank", "match", "cosine", "image"]
    assert [line.split()[-1] for line in lines] == best
    assert [float(line.split()[1]) for line in lines] == pytest.approx([expected[name] for name in best], abs=2e-3)
    objects = command_line("search", clip_index, "a dog", *options, "--json")
    assert "re-ranking" in objects.err
    found = [json.loads(line) for line in objects.out.splitlines()]
    assert [Path(hit["path"]).name for hit in found] == best
    assert [hit["rerank_score"] for hit in found] == pytest.approx([expected[name] for name in best], abs=1e-4)

    turned = command_line(
        "search", clip_index, "a dog", *options, "--json", "-q", "--objects", clip_index / "boxes.jsonl"
    )
    scores = {Path(hit["path"]).name: hit["rerank_score"] for hit in map(json.loads, turned.out.splitlines())}
    assert turned.code == 0
    assert any(abs(scores[name] - expected[name]) > 1e-4 for name in scores)


def test_command_says_which_could_not_be_read(
    command_line: Callable[..., Any], clip_index: Path, clip_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_index, tmp_path / "photos")
    first = command_line("search", folder, "a dog", "-k", "1", "--paths", "--device", "cpu").out.strip()
    Path(first).unlink()
    found = command_line(
        "search", folder, "a dog", "-k", "10", "-q", "--device", "cpu", "--rerank", f"transformers:{clip_folder}"
    )
    assert "note: 1 of these 10 could not be read again and come last; their files are gone, changed" in found.err
    assert found.out.splitlines()[-1].split()[:2] == ["10", "-"]
    assert found.out.splitlines()[-1].endswith(f"{Path(first).name}  (missing)")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("a dog", "--objects", "boxes.json"), "--objects is for re-ranking; give --rerank too"),
        (("a dog", "--rerank-depth", "5"), "--rerank-depth is for re-ranking"),
        (("a dog", "a cat", "--rerank", "no-such-thing"), "re-ranking reads one text, and the query has 2 terms"),
        (("a dog", "--minus", "a cat", "--rerank", "no-such-thing"), "has 2 terms"),
        (("a dog", "--rerank", "no-such-thing"), "neither a folder nor"),
        (("a dog", "--rerank", ""), "rerank names no model; give blip2:"),
        (("a dog", "--rerank", "blip2:org/none"), "cannot be found on this machine"),
    ],
)
def test_command_refuses(
    command_line: Callable[..., Any], clip_index: Path, options: tuple[str, ...], problem: str
) -> None:
    result = command_line("search", clip_index, *options)
    assert result.code == 1
    assert problem in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_commands_say_which_boxes_have_no_image(
    command_line: Callable[..., Any], clip_index: Path, clip_folder: Path, few: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (few / "boxes.jsonl").read_text().splitlines()]
    mistyped = [{**row, "file": f"x{row['file']}"} for row in rows[1:]]
    (tmp_path / "boxes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (rows[0], *mistyped)))
    objects, said = (
        f"{tmp_path}/boxes.jsonl,images={few}",
        "note: 9 of 10 images that '{}' names are not there (first: '{}')",
    )
    said = said.format(f"{tmp_path}/boxes.jsonl", mistyped[0]["file"])
    usual, inner = ("--device", "cpu", "-q"), f"transformers:{clip_folder}"
    found = command_line("search", clip_index, "a dog", *usual, "--rerank", inner, "--objects", objects)
    assert (found.code, found.err.strip()) == (0, said)
    folder, out = few, tmp_path / "index"
    made = command_line("index", folder, "-o", out, "-e", inner, "--dtype", "float32", "--objects", objects, *usual)
    assert said in made.err
    assert "indexed before" not in made.err
    plain = command_line("index", folder, "-o", out, *usual)
    assert plain.err.count("note") == 0, "nothing was read"

    whole = f"{few}/boxes.jsonl"
    known = "note: 10 of the images that '{}' names were indexed before and keep the vectors of their old boxes"
    for objects, number in ((whole, 10), (whole, 10), (f"{tmp_path}/boxes.jsonl,images={few}", 1)):
        given = command_line("index", folder, "-o", out, "--objects", objects, *usual)
        assert given.code == 0, given.err
        file = objects.partition(",")[0]
        assert known.format(file).replace("10", str(number)) in given.err
        assert "into another --out" in given.err
        spec = json.loads(command_line("info", out, "--json").out)["encoder"]["spec"]
        assert spec == f"objects:{objects}|{inner}"
    lost = command_line("index", folder, "-o", out, "--objects", tmp_path / "none.json", *usual)
    assert (lost.code, "none.json' are not there; check the path" in lost.err) == (1, True)
    assert json.loads(command_line("info", out, "--json").out)["encoder"]["spec"] == spec


def test_index_command_with_objects(
    command_line: Callable[..., Any], few: Path, clip_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(few, tmp_path / "photos")
    shutil.move(folder / "boxes.jsonl", tmp_path / "boxes.jsonl")
    usual = ("--device", "cpu", "--dtype", "float32", "-q")
    inner = f"transformers:{clip_folder}"
    lost = command_line("index", folder, "-e", inner, "--objects", tmp_path / "boxes.jsonl", *usual)
    assert lost.code == 1
    assert "give the folder of the images" in lost.err
    objects = f"{tmp_path}/boxes.jsonl,alpha=4,images={folder}"
    made = command_line("index", folder, "-e", inner, "--objects", objects, *usual)
    assert made.code == 0, made.err
    index = ImageIndex.open(folder, device="cpu")
    assert len(index) == SHOWN
    assert index.manifest["encoder"]["spec"] == f"objects:{tmp_path}/boxes.jsonl,alpha=4.0,images={folder}|{inner}"
    plain = load_encoder(inner, device="cpu").encode_images([item.path for item in index])
    rows = index.vectors.gather(np.array([item.row for item in index]))
    assert np.abs(rows - plain).max() > 1e-2

    again = command_line("index", folder, "--objects", objects, *usual)
    assert again.code == 0, again.err
    assert "10 unchanged" in again.err
    other = command_line("index", folder, "--objects", f"{objects},max_objects=1", *usual)
    assert other.code == 1
    assert "was made with" in other.err
    assert command_line("search", folder, "a dog", "--device", "cpu").code == 0
