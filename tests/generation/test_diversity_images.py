"""Diversity of real photographs by real encoders, and prompts to measure it with."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generation import GeneratedImage
from generation.diversity import (
    DIMENSIONS,
    HIGHER_IS_MORE_DIVERSE,
    DiversityReport,
    PromptSpec,
    compare_prompts,
    diversity_prompts,
    diversity_values,
    measure_diversity,
)
from generation.diversity.keywords import KEYWORDS, pluralise
from generation.diversity.reading import find_images, read_boxes, read_faces
from mmalign import Encoder
from mmalign.errors import EncoderMismatchError, InputError
from mmalign.imaging import read_image
from mmalign.metrics import artistic_coverage, identity_similarity, layout_similarity

# -- prompts -----------------------------------------------------------------------------------------------------------


def counts_of(prompts: list[PromptSpec]) -> dict[str, Counter[str]]:
    """Axis -> how often each keyword comes; the three axes of tones are one."""
    found: dict[str, Counter[str]] = {}
    for prompt in prompts:
        for axis, word in prompt.keywords.items():
            name = "tone" if prompt.dimension == "tonal" and axis != "scene" else axis
            found.setdefault(name, Counter())[word] += 1
    return found


def most_and_least(counts: Counter[str], words: int) -> int:
    return max(counts.values()) - (min(counts.values()) if len(counts) == words else 0)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 41, 320, 500, 800, 1500])
def test_every_keyword_comes_equally_often(dimension: str, n: int) -> None:
    axes = {axis: len(words) for axis, words in KEYWORDS[dimension].items()}
    if dimension == "tonal":
        axes = {"tone": sum(axes.values())}
    if dimension in ("style", "tonal"):
        axes["scene"] = 48
    prompts = diversity_prompts(dimension, n, seed=n)
    assert len(prompts) == n
    for axis, counts in counts_of(prompts).items():
        assert most_and_least(counts, axes[axis]) <= 1, axis
    combinations = np.prod(list(axes.values()))
    repeated = Counter(prompt.text for prompt in prompts)
    if dimension == "identity":  # beards and grey hair have fewer combinations, yet come as often
        assert max(repeated.values()) <= -(-n // 1344) + 1
        assert len(repeated) >= min(n, 800) * 0.98
    else:
        assert max(repeated.values()) <= -(-n // combinations)
    for prompt in prompts:
        assert (prompt.dimension, len(prompt.keywords)) == (dimension, len(axes))


def test_counts_are_those_of_the_paper() -> None:
    sizes = {dimension: [len(words) for words in axes.values()] for dimension, axes in KEYWORDS.items()}
    assert sizes == {"identity": [3, 6, 2, 40], "style": [27], "layout": [80, 4], "tonal": [6, 6, 6]}
    assert all(len(set(words)) == len(words) for axes in KEYWORDS.values() for words in axes.values())


def test_texts_read_as_sentences() -> None:
    for prompt in diversity_prompts("identity", 200):
        words = prompt.keywords
        article = "an" if words["age"] == "elderly" else "a"
        who = f"{article} {words['age']} {words['ethnicity']} {words['gender']}"
        assert prompt.text == f"a high quality portrait photo of {who} with {words['feature']}"
        if words["feature"] in ("a goatee", "a mustache", "sideburns", "a full beard"):
            assert words["gender"] == "man"
        if words["feature"] in ("gray hair", "deep wrinkles"):
            assert words["age"] != "young"
    (prompt,) = diversity_prompts("style", 1, keywords={"style": ["Op Art"]}, base_prompts=["a hen"])
    assert prompt.text == "a painting in the style of Op Art, depicting a hen"
    (prompt,) = diversity_prompts("layout", 1, keywords={"object": ["cherry"], "count": ["four"]})
    assert (prompt.text, prompt.keywords["object"]) == ("four cherries on a plain background", "cherry")
    found = diversity_prompts("tonal", 3, base_prompts=["a hen"], keywords={a: [a] for a in KEYWORDS["tonal"]})
    assert sorted(p.text for p in found) == ["a hen, brightness", "a hen, contrast", "a hen, saturation"]
    assert all(prompt.keywords[axis] == axis for prompt in found for axis in prompt.keywords if axis != "scene")
    assert [pluralise(word) for word in ("bus", "bench", "sheep", "toy", "knife", "couch")] == [
        "buses", "benches", "sheep", "toys", "knives", "couches",
    ]  # fmt: skip


def test_prompts_are_a_function_of_the_seed() -> None:
    for dimension in DIMENSIONS:
        assert diversity_prompts(dimension, 90, seed=1) == diversity_prompts(dimension, 90, seed=1)
        assert diversity_prompts(dimension, 90, seed=1) != diversity_prompts(dimension, 90, seed=2)


def test_runs_from_the_start_are_balanced_too() -> None:
    prompts = diversity_prompts("style", 300)
    for n in range(1, 300, 7):
        counts = counts_of(prompts[:n])
        assert most_and_least(counts["style"], 27) <= 1
        assert most_and_least(counts["scene"], 48) <= 1


def test_keywords_that_contradict_the_words_given_are_left_out() -> None:
    prompts = diversity_prompts("identity", 72, keywords={"gender": ["woman"]})
    counts = counts_of(prompts)
    assert len(counts["feature"]) == 36
    assert set(counts["feature"].values()) == {2}
    beards = {"gender": ["woman", "man"], "feature": ["a goatee", "a mustache"]}
    assert {prompt.keywords["gender"] for prompt in diversity_prompts("identity", 10, keywords=beards)} == {"man"}
    with pytest.raises(InputError, match="in every combination"):
        diversity_prompts("identity", 10, keywords={**beards, "gender": ["woman"]})
    beards["feature"].append("freckles")  # a half should be women, a third may be
    with pytest.raises(InputError, match="too often to come equally often"):
        diversity_prompts("identity", 12, keywords=beards)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("faces", 3, {}), "dimension is 'faces'; give one of identity, style, layout, tonal"),
        (("style", 0, {}), "n is 0; give 1 or more"),
        (("style", 3, {"keywords": {"age": ["old"]}}), "name the axis 'age'; style has style"),
        (("style", 3, {"keywords": {"style": []}}), "keywords of style are an empty list"),
        (("style", 3, {"keywords": {"style": "Cubism"}}), "give a list of words"),
        (("style", 3, {"keywords": {"style": [" "]}}), "not blank"),
        (("style", 3, {"base_prompts": ["a", "a "]}), "base_prompts have 'a' twice"),
        (("layout", 3, {"base_prompts": ["a"]}), "no place in the layout template"),
    ],
)
def test_prompts_that_are_refused(arguments: tuple, message: str) -> None:
    dimension, n, options = arguments
    with pytest.raises(InputError, match=message):
        diversity_prompts(dimension, n, **options)


# -- measuring ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))


def test_the_same_photograph_again_and_again_is_less_diverse(bundled: Encoder, files: list[Path]) -> None:
    groups = [f"prompt {i // 4}" for i in range(16)]
    distinct = measure_diversity(files[:16], groups, encoder=bundled)
    repeated = measure_diversity([files[i // 4 * 4] for i in range(16)], groups, encoder=bundled)
    for name in ("within_prompt_similarity", "tonal_variation"):
        direction = 1 if HIGHER_IS_MORE_DIVERSE[name] else -1
        assert direction * (distinct.values[name] - repeated.values[name]) > 0.05
    assert repeated.values["within_prompt_similarity"] == pytest.approx(1, abs=1e-6)
    embeds = bundled.encode_images(files[:16])
    for report, rows in ((distinct, embeds), (repeated, np.repeat(embeds[::4], 4, axis=0))):
        pixels = [
            read_image(files[i]).pixels for i in (range(16) if report is distinct else np.repeat(range(0, 16, 4), 4))
        ]
        assert report.values == pytest.approx(diversity_values(pixels, rows, groups), abs=1e-5)
        low, high = report.intervals["between_prompt_similarity"]
        assert low < report.values["between_prompt_similarity"] < high
    assert "4 prompts are few" in " ".join(distinct.notes)

    difference = compare_prompts(repeated, distinct)
    assert difference is not None
    assert difference.interval is not None
    ours, theirs = (report.per_prompt["within_prompt_similarity"] for report in (repeated, distinct))
    assert difference.value == pytest.approx(statistics.fmean(ours[p] - theirs[p] for p in ours))
    assert 0.1 < difference.interval[0] <= difference.value <= difference.interval[1]
    assert difference.prompts == 4
    elsewhere = measure_diversity(files[:2], ["x", "x"], encoder=bundled)
    assert compare_prompts(repeated, elsewhere) is None
    with pytest.raises(EncoderMismatchError, match="by two encoders"):
        compare_prompts(repeated, replace(distinct, encoder={"spec": "other", "fingerprint": "other"}))


def test_every_kind_of_image_measures_the_same(tiny_open_clip: Encoder, files: list[Path]) -> None:
    pixels = [read_image(file).pixels for file in files[:4]]
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    prompts = ["a", "a", "b", "b"]
    kinds = [
        (files[:4], prompts),
        (pictures, prompts),
        ([p.float() / 255 for p in pixels], torch.tensor([0, 0, 1, 1])),
        ([GeneratedImage(picture, prompt, 0, {}) for picture, prompt in zip(pictures, prompts, strict=True)], None),
    ]
    reports = [measure_diversity(images, groups, encoder=tiny_open_clip) for images, groups in kinds]
    for report in reports:
        assert report.values == pytest.approx(reports[0].values, abs=1e-6)
        assert report.images == 4
    assert [list(report.prompts) for report in reports] == [["a", "b"], ["a", "b"], ["0", "1"], ["a", "b"]]
    without = measure_diversity(pictures)
    assert list(without.values) == [name for name in HIGHER_IS_MORE_DIVERSE if name.endswith("variation")]
    assert without.values["tonal_variation"] == reports[0].values["tonal_variation"]
    assert without.encoder is None


def test_unreadable_images_are_left_out_and_reported(
    tiny_open_clip: Encoder, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "torn.jpg").write_bytes(files[0].read_bytes()[:2000])
    images = [files[0], tmp_path / "torn.jpg", files[1], tmp_path / "none.png", files[2]]
    whole = measure_diversity(files[:3], ["a", "b", "b"], encoder=tiny_open_clip)
    for encoder in (tiny_open_clip, None):
        report = measure_diversity(images, ["a", "a", "b", "c", "b"], encoder=encoder)
        assert [(entry["row"], entry["reason"]) for entry in report.skipped] == [(1, "truncated"), (3, "missing")]
        assert report.prompts == {"a": 1, "b": 2}
        assert {name: whole.values[name] for name in report.values} == pytest.approx(report.values)
    with pytest.raises(InputError, match=r"none of 1 images can be read \(first: .*does not exist"):
        measure_diversity([tmp_path / "none.png"])


def test_coverage_counts_against_references(tiny_open_clip: Encoder, files: list[Path]) -> None:
    reference, test, drawn = files[:20], files[20:40], files[40:60]
    embeds = [tiny_open_clip.encode_images(part) for part in (reference, test, drawn)]
    wanted = artistic_coverage(*embeds)
    report = measure_diversity(drawn, encoder=tiny_open_clip, reference=reference, reference_test=test)
    assert report.values["coverage"] == pytest.approx(wanted.asc)
    assert report.coverage == wanted
    given = {"reference": embeds[0], "reference_test": torch.from_numpy(embeds[1])}
    assert measure_diversity(drawn, encoder=tiny_open_clip, **given).coverage == wanted

    fewer = measure_diversity(drawn, encoder=tiny_open_clip, queries=7, **given)
    assert "7 generated images reach" in " ".join(fewer.notes)
    held_out = measure_diversity(drawn, encoder=tiny_open_clip, reference=reference, seed=3)
    assert "10 generated images reach" in " ".join(held_out.notes)
    assert held_out.coverage == measure_diversity(drawn, encoder=tiny_open_clip, reference=embeds[0], seed=3).coverage
    one_look = measure_diversity(drawn[:1] * 20, encoder=tiny_open_clip, **given)
    assert one_look.coverage is not None
    assert one_look.coverage.generated.learned == 1
    assert one_look.values["coverage"] < report.values["coverage"]


def test_boxes_and_faces_of_photographs(files: list[Path], captions: list[dict], photos: Path) -> None:
    """The annotated boxes of photographs stand for detections."""
    chosen = captions[:6]
    boxes = [[[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in row["objects"])] for row in chosen]
    boxes[4], faces = [], np.random.default_rng(0).normal(size=(9, 4))
    given = [*boxes[:5], None]
    report = measure_diversity([photos / row["file"] for row in chosen], [0, 0, 0, 1, 1, 1], boxes=given, faces=faces)
    first = 1 - statistics.fmean(layout_similarity(a, b) for a, b in itertools.combinations(boxes[:3], 2))
    assert report.per_prompt["spatial_diversity"] == {"0": pytest.approx(first), "1": 1}
    assert report.values["spatial_diversity"] == pytest.approx((first + 1) / 2)
    assert report.empty_share == 1 / 5
    assert report.values["identity_similarity"] == pytest.approx(identity_similarity(faces))
    told = " ".join(report.notes)
    for part in ("1 of 6 images have no detections", "20% of the images have no box", "2 prompts are too few"):
        assert part in told
    alone = measure_diversity([photos / row["file"] for row in chosen[:2]], [0, 1], boxes=boxes[:2])
    assert "spatial_diversity" not in alone.values
    assert "no prompt has detections of two images" in " ".join(alone.notes)


def test_a_report_as_json(tiny_open_clip: Encoder, files: list[Path]) -> None:
    report = measure_diversity(files[:9], list("aaabbbccc"), encoder=tiny_open_clip, reference=files[:8], resamples=50)
    about = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert about["figures"]["within_prompt_similarity"] == {
        "value": report.values["within_prompt_similarity"],
        "low": report.intervals["within_prompt_similarity"][0],
        "high": report.intervals["within_prompt_similarity"][1],
        "higher_is_more_diverse": False,
    }
    assert about["figures"]["coverage"]["low"] is None
    assert about["coverage"]["test"]["learned"] > 0
    assert (about["images"], about["prompts"]) == (9, {"a": 3, "b": 3, "c": 3})
    assert about["encoder"]["fingerprint"] == tiny_open_clip.fingerprint
    again = measure_diversity(files[:9], list("aaabbbccc"), encoder=tiny_open_clip, reference=files[:8], resamples=50)
    assert again.to_dict() == report.to_dict()
    none = measure_diversity(files[:9], list("aaabbbccc"), encoder=tiny_open_clip, resamples=0)
    assert none.intervals == {}


def test_what_measuring_refuses(tiny_open_clip: Encoder, tiny_sentence: Encoder, files: list[Path]) -> None:
    two = files[:2]
    for message, call in {
        "images are one image": lambda: measure_diversity(files[0]),
        "none of 0 images can be read": lambda: measure_diversity([]),
        "groups are 1 for 2 images": lambda: measure_diversity(two, ["a"]),
        "boxes are 1 for 2 images": lambda: measure_diversity(two, boxes=[[]]),
        "without an encoder": lambda: measure_diversity(two, reference=two),
        "reference_test is given without": lambda: measure_diversity(two, encoder=tiny_open_clip, reference_test=two),
        "reference has 2 images; give 4": lambda: measure_diversity(two, encoder=tiny_open_clip, reference=two),
        "reference has 3 dimensions": lambda: measure_diversity(two, encoder=tiny_open_clip, reference=np.ones((9, 3))),
        "queries is 1; give 2 or more": lambda: measure_diversity(two, queries=1),
        "it has no image tower": lambda: measure_diversity(two, encoder=tiny_sentence),
    }.items():
        with pytest.raises(InputError, match=message):
            call()


# -- files -------------------------------------------------------------------------------------------------------------


def test_images_are_grouped_by_prompt_and_by_folder(files: list[Path], tmp_path: Path) -> None:
    picture = Image.open(files[0]).convert("RGB").resize((20, 20))
    for number, prompt in enumerate(["a cat", "a dog", "a cat"]):
        GeneratedImage(picture, prompt, number, {}).save(tmp_path / "drawn" / "x" / f"{number}.png")
    for name in ("owl/1.jpg", "owl/deep/2.jpg", "hen/3.png", "4.jpg", ".hidden/5.jpg", "notes.txt"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "plain" / name, "png")
    drawn = find_images(tmp_path / "drawn")
    assert (drawn.groups, drawn.notes) == (["a cat", "a dog", "a cat"], [])
    plain = find_images(tmp_path / "plain")
    named = {
        str(file.relative_to(tmp_path / "plain")): group for file, group in zip(plain.files, plain.groups, strict=True)
    }
    assert named == {"4.jpg": "", "hen/3.png": "hen", "owl/1.jpg": "owl", "owl/deep/2.jpg": "owl"}
    assert plain.notes == []
    mixed = find_images(tmp_path)
    assert sorted(set(mixed.groups)) == ["a cat", "a dog", "plain"]
    assert "4 of 7 images carry no prompt" in mixed.notes[0]
    assert find_images([drawn.files[1], files[0]]).groups == ["a dog", ""]


def test_folders_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        find_images(tmp_path / "empty")
    with pytest.raises(InputError, match="is not a folder"):
        find_images(tmp_path / "none")
    with pytest.raises(InputError, match="there are no images"):
        find_images([])


def test_detections_are_read_by_path(tmp_path: Path) -> None:
    lines = [
        {"file": "base/a.png", "boxes": [[0, 1, 2, 3], [4, 5, 6, 7.5]]},
        {"file": str(tmp_path / "b.png"), "boxes": [], "score": 1},
    ]
    path = tmp_path / "boxes.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n\n" for line in lines))
    found = read_boxes(path)
    assert list(found) == [str(tmp_path / "base/a.png"), str(tmp_path / "b.png")]
    np.testing.assert_array_equal(found[str(tmp_path / "base/a.png")], [[0, 1, 2, 3], [4, 5, 6, 7.5]])
    assert found[str(tmp_path / "b.png")].shape == (0, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 of .* is not JSON"),
        ("[1]", "is a JSON list, not an object"),
        ('{"file": "a.png"}', "has no file with boxes"),
        ('{"boxes": []}', "has no file with boxes"),
        ('{"file": "a.png", "boxes": [[1, 2, 3]]}', "has no file with boxes"),
        ('{"file": "a.png", "boxes": [[1, 2, 3, "x"]]}', "has no file with boxes"),
        ('{"file": "./seen.png", "boxes": []}', "names './seen.png' again"),
    ],
)
def test_detections_that_are_refused(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "boxes.jsonl").write_text(f'{{"file": "seen.png", "boxes": []}}\n{line}\n')
    with pytest.raises(InputError, match=message):
        read_boxes(tmp_path / "boxes.jsonl")


def test_faces_are_a_matrix(tmp_path: Path) -> None:
    np.save(tmp_path / "faces.npy", np.eye(3, dtype=np.float32))
    np.testing.assert_array_equal(read_faces(tmp_path / "faces.npy"), np.eye(3))
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name, message in {"flat": "no float matrix", "objects": "cannot be read", "none": "cannot be read"}.items():
        with pytest.raises(InputError, match=message):
            read_faces(tmp_path / f"{name}.npy")


def test_reports_know_their_images() -> None:
    assert DiversityReport({}, {}, {}, {"a": 2, "b": 5}).images == 7


def test_an_encoder_may_be_named(bundled: Encoder, photos: Path) -> None:
    files = sorted(photos.glob("*.jpg"))[:3]
    named, given = (measure_diversity(files, encoder=one).to_dict() for one in ("bundled", bundled))
    assert named == given
