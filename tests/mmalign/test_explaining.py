"""`explain`: what is marked is what the scores say; a calibration holds for what it was measured on, no more."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from mmalign import Encoder, load_encoder
from mmalign.errors import InputError, UnreadableImageError
from mmalign.explaining import (
    Explanation,
    WordCalibration,
    calibrate,
    evaluate_words,
    explain,
    explain_many,
)
from mmalign.features import extract_features
from mmalign.pairs import read_captioned
from mmalign.word_attribution import EPS, calibrate_eps, word_attribution
from tests.conftest import spread_weights

Run = Callable[..., tuple[int, str, str]]

CAPTION = "A family sits at a table, with a cake and a dog."


@pytest.fixture
def photo(photos: Path) -> Path:
    return photos / "000000000790.jpg"


def redrawn(model: Any) -> Any:
    """The same weights whatever was drawn before: of some, no word scores below 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim:
            parameter.data.fill_(float(parameter.ndim == 1 and name.endswith("weight")))  # 1 in norms
    return spread_weights(model)


@pytest.fixture(scope="module")
def tiny_open_clip(tiny_open_clip: Encoder) -> Encoder:
    encoder = copy.copy(tiny_open_clip)
    encoder.model, encoder._fingerprint = redrawn(copy.deepcopy(tiny_open_clip.model)), None
    return encoder


@pytest.fixture(scope="module")
def clip_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPModel

    folder = shutil.copytree(clip_folder, tmp_path_factory.mktemp("redrawn") / "clip")
    redrawn(CLIPModel.from_pretrained(clip_folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_clip(clip_folder: Path) -> Encoder:
    return load_encoder(f"transformers:{clip_folder}", device="cpu")


@pytest.fixture(params=["open_clip", "transformers"])
def clip(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue("tiny_open_clip" if request.param == "open_clip" else "tiny_clip")


@pytest.fixture(scope="module")
def with_wrong(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs with two right captions each, and one whose last long word is that of another photograph."""
    lines = []
    for number, row in enumerate(captions[:10]):
        other = re.findall(r"\w{4,}", captions[number + 20]["captions"][0])[-1]
        own = re.findall(r"\w{4,}", row["captions"][0])[-1]
        wrong = row["captions"][0].replace(own, other)
        lines.append(
            {
                "file": str(photos / row["file"]),
                "captions": row["captions"][:2],
                "wrong_captions": [wrong],
                "wrong_words": [other],
            }
        )
    file = tmp_path_factory.mktemp("wrong") / "captions.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return file


def between(found: Explanation, count: int) -> float:
    """An eps below which `count` of the words are, punctuation aside."""
    scores = sorted(word.score for word in found.words if not word.is_punctuation)
    return (scores[count - 1] + scores[count]) / 2


# -- one caption -------------------------------------------------------------------------------------------------------


def test_what_is_marked_is_what_scores_say(clip: Encoder, photo: Path) -> None:
    (scored,) = word_attribution(clip, [photo], CAPTION)
    eps = min(0.0, between(explain(photo, CAPTION, encoder=clip), 3))
    found = explain(photo, CAPTION, encoder=clip, eps=eps)
    assert [(word.word, word.start, word.end) for word in found.words] == [
        (word.word, word.start, word.end) for word in scored.words
    ]
    np.testing.assert_allclose([w.score for w in found.words], [w.score for w in scored.words], rtol=1e-3, atol=1e-8)
    low = [word for word in scored.words if word.score < eps and word.word not in ",."]
    assert 0 < len(low) <= 3
    assert [word.word for word in found.words if word.flagged] == [word.word for word in low]
    assert [word.score for word in found.flagged] == sorted(word.score for word in found.words if word.flagged)
    assert found.cosine == pytest.approx(scored.cosine, abs=1e-6)
    assert found.clip_score == pytest.approx(2.5 * max(scored.cosine, 0), abs=1e-5)
    assert found.f_clip_score == pytest.approx((1 - max(scored.cosine, 0)) * sum(w.score for w in low), rel=1e-3)
    marked = found.marked()
    assert re.sub(r"[\[\]]", "", marked) == CAPTION
    inside = re.findall(r"\[(.*?)\]", marked)
    assert [re.sub(r"\W+", " ", part).split() for part in inside] == [phrase.word.split() for phrase in found.phrases]
    assert " ".join(inside).replace(",", "").split() == [word.word for word in low]
    colored = found.marked(color=True)
    assert colored.count("\x1b[1;31m[") == colored.count("]\x1b[0m") == len(inside)
    assert re.sub("\x1b\\[[0-9;]*m", "", colored) == marked


def test_the_lowest_alone(clip: Encoder, photo: Path) -> None:
    found = explain(photo, CAPTION, encoder=clip, mode="most_negative")
    lowest = min(found.words, key=lambda word: word.score)
    assert [word for word in found.words if word.flagged] == [lowest]
    assert found.marked() == f"{CAPTION[: lowest.start]}[{lowest.word}]{CAPTION[lowest.end :]}"
    assert found.f_clip_score == pytest.approx((1 - max(found.cosine, 0)) * lowest.score, rel=1e-6)
    assert found.notes == ()  # eps does not matter


def test_several_texts_and_one_pass_of_the_image(
    tiny_open_clip: Encoder, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [CAPTION, "a dog on grass", "Two zebras"]
    alone = [explain(photo, text, encoder=tiny_open_clip, eps=0.0) for text in texts]
    passes = []
    usual = tiny_open_clip.image_features
    monkeypatch.setattr(tiny_open_clip, "image_features", lambda pixels: passes.append(len(pixels)) or usual(pixels))
    together = explain_many(photo, texts, encoder=tiny_open_clip, eps=0.0)
    assert passes == [1]
    for one, other in zip(alone, together, strict=True):
        assert one.marked() == other.marked()
        np.testing.assert_allclose([w.score for w in one.words], [w.score for w in other.words], rtol=1e-3, atol=1e-8)
    assert [one.marked() for one in explain_many(photo, CAPTION, encoder=tiny_open_clip, eps=0.0)] == [
        alone[0].marked()
    ]
    other_image = explain(photo.with_name("000000012280.jpg"), CAPTION, encoder=tiny_open_clip, eps=0.0)
    assert [word.score for word in other_image.words] != [word.score for word in alone[0].words]


def test_images_in_any_form_and_encoders_by_their_spec(tiny_clip: Encoder, clip_folder: Path, photo: Path) -> None:
    wanted = explain(photo, CAPTION, encoder=tiny_clip)
    with Image.open(photo) as image:
        for form in (image, photo.read_bytes(), np.asarray(image)):
            np.testing.assert_allclose(explain(form, CAPTION, encoder=tiny_clip).cosine, wanted.cosine, atol=1e-6)
    by_name = explain(photo, CAPTION, encoder=f"transformers:{clip_folder}")
    assert by_name.cosine == pytest.approx(wanted.cosine, abs=1e-5)
    about = wanted.to_dict()
    assert json.loads(json.dumps(about)) == about
    assert about["words"][1] == {"word": "family", "start": 2, "end": 8, "score": wanted.words[1].score,
                                 "flagged": wanted.words[1].flagged}  # fmt: skip


def test_one_line_that_steers_no_terminal(tiny_open_clip: Encoder, photo: Path) -> None:
    found = explain(photo, "a dog\n\ton\x07 gra\x1bss", encoder=tiny_open_clip, eps=0.0)
    everything = replace(found, phrases=())
    assert everything.marked() == "a dog  on  gra ss"
    assert found.marked().isprintable()


def test_pictures(tiny_open_clip: Encoder, photo: Path, tmp_path: Path) -> None:
    plain = explain(photo, CAPTION + " 猫 $x^2$ ", encoder=tiny_open_clip, eps=-1.0)
    path = plain.draw(tmp_path / "new" / "a.png")
    assert plain.draw(tmp_path / "b.png").read_bytes() == path.read_bytes()
    with Image.open(path) as drawn, Image.open(photo) as image:
        drawn.load()
        left = np.asarray(drawn.convert("RGB"), np.float64)[:, : drawn.width * 44 // 100]
        rows, columns = (np.flatnonzero((left < 250).any(axis=(1 - axis, 2))) for axis in (0, 1))
        shown = left[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert shown.shape[1] / shown.shape[0] == pytest.approx(image.width / image.height, rel=0.02)
        wanted = np.asarray(image.convert("RGB").resize((shown.shape[1], shown.shape[0])), np.float64)
        assert np.abs(shown - wanted).mean() < 8
    # What is suspect is marked by more than colour: seen in gray, with the very same scores.
    words = tuple(replace(word, flagged=True) for word in plain.words)
    replace(plain, words=words).draw(tmp_path / "suspect.png")
    with Image.open(path) as one, Image.open(tmp_path / "suspect.png") as other:
        dark = [np.mean(np.asarray(picture.convert("L").resize((500, 300))) < 60) for picture in (one, other)]
    assert dark[1] > dark[0] + 0.002
    # A long word is shortened, so that the margin stays white.
    short = explain(photo, "a dog", encoder=tiny_open_clip, eps=-1.0)
    for flagged in (False, True):
        words = (short.words[0], replace(short.words[1], word="dog" * 40, flagged=flagged))
        with Image.open(replace(short, words=words).draw(tmp_path / "long.png")) as one:
            seen = np.asarray(one.convert("L"))
        assert (seen[:, -16:] == 255).all()
        assert (seen[:60, seen.shape[1] // 2 :] < 60).any()
    with pytest.raises(InputError, match=r"picture '.*a.jpg' does not end in .png"):
        plain.draw(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="cannot be written"):
        plain.draw(path / "a.png")


def test_what_to_know_before_relying_on_it(
    tiny_open_clip: Encoder, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = explain(photo, CAPTION, encoder=tiny_open_clip)
    assert (found.eps, found.eps_from) == (EPS, "default")
    (note,) = found.notes
    assert re.match(r"eps -5e-05 was measured for open_clip:ViT-H-14/laion2b_s32b_b79k, not for 'open_clip:tiny", note)
    given = explain(photo, CAPTION, encoder=tiny_open_clip, eps=-1e-3)
    assert (given.eps, given.eps_from, given.notes) == (-1e-3, "given", ())
    monkeypatch.setattr(tiny_open_clip, "dtype", torch.bfloat16)
    monkeypatch.setattr(tiny_open_clip, "image_features", lambda pixels: torch.ones(len(pixels), tiny_open_clip.dim))
    for mode in ("threshold", "most_negative"):
        (note,) = explain(photo, CAPTION, encoder=tiny_open_clip, eps=-1e-3, mode=mode).notes
        assert note == "the encoder is in bfloat16, which may move scores by some percent; load it with dtype='float32'"
    monkeypatch.undo()
    long = explain(photo, "dog grass " * 60, encoder=tiny_open_clip, eps=-1e-3)
    assert len(long.words) == 72
    (note,) = long.notes
    assert re.fullmatch("the text is cut after '.*dog grass'; 48 words more are not read", note)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_a_calibration_marks_the_share_it_says(
    clip: Encoder, photos: Path, captions: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = captions[:12]
    lines = [{"file": str(photos / row["file"]), "captions": row["captions"]} for row in rows]
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    found = calibrate(clip, tmp_path / "c.jsonl", 0.1)
    assert found.eps < 0
    assert (found.images, found.captions) == (12, 60)
    pairs = [(photos / row["file"], row["captions"]) for row in rows]
    scores = [
        word.score
        for image, texts in pairs
        for one in word_attribution(clip, [image], texts)
        for word in one.words
        if not word.is_punctuation
    ]
    assert found.words == len(scores) > 400
    assert np.mean(np.array(scores) < found.eps) == pytest.approx(0.1, abs=2 / len(scores))
    given = calibrate(clip, [*pairs[:3], (pairs[3][0], "a dog")], 0.1)
    assert (given.images, given.captions) == (4, 16)
    assert calibrate(clip, pairs, 0.1).eps == pytest.approx(found.eps, rel=1e-3)
    assert calibrate(clip, tmp_path / "c.jsonl", 0.1, batch_size=7).eps == pytest.approx(found.eps, rel=1e-3)
    assert calibrate(clip, tmp_path / "c.jsonl", 0.5).eps > found.eps


@pytest.fixture(scope="module")
def calibration(tiny_open_clip: Encoder, photos: Path, captions: list[dict[str, Any]]) -> WordCalibration:
    return calibrate(tiny_open_clip, [(photos / row["file"], row["captions"]) for row in captions[:6]], 0.3)


def test_a_calibration_is_used_and_kept(
    tiny_open_clip: Encoder, calibration: WordCalibration, photo: Path, tmp_path: Path
) -> None:
    path = calibration.save(tmp_path / "new" / "words.json")
    assert WordCalibration.load(path) == calibration
    for form in (calibration, path, str(path)):
        found = explain(photo, CAPTION, encoder=tiny_open_clip, calibration=form)
        assert (found.eps, found.eps_from, found.notes) == (calibration.eps, "calibration", ())
        assert [w.flagged for w in found.words] == [
            w.score < calibration.eps and not w.is_punctuation for w in found.words
        ]
    few = calibrate(tiny_open_clip, [(photo, "a dog"), (photo, "a cake")])
    found = explain(photo, CAPTION, encoder=tiny_open_clip, calibration=few)
    assert re.match("eps .* was measured on no more than 4 words", found.notes[0])


def test_a_calibration_of_something_else(
    tiny_open_clip: Encoder, tiny_clip: Encoder, calibration: WordCalibration, photo: Path
) -> None:
    with pytest.raises(
        InputError, match=r"is of the encoder 'open_clip:tiny.*' \(.*\), and 'transformers:.*is another"
    ):
        explain(photo, CAPTION, encoder=tiny_clip, calibration=calibration)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"template": ""}, "template is '' and that of the calibration 'A photo depicts '; give that, or calibrate"),
        ({"layers": 1}, "layers is 1 and that of the calibration 3"),
        ({"layers": None}, "layers is None"),
        ({"eps": -0.1}, "eps is -0.1 and a calibration is given, which has its own"),
    )
    for changes, message in wrong:
        with pytest.raises(InputError, match=message):
            explain(photo, CAPTION, encoder=tiny_open_clip, calibration=calibration, **changes)


def test_what_is_no_calibration(calibration: WordCalibration, tmp_path: Path) -> None:
    path = calibration.save(tmp_path / "words.json")
    about = json.loads(path.read_text())
    texts = {
        "not json": "is not JSON; make one with `mmalign eval words`",
        "[" * 100_000: "is not JSON",
        "[]": "is no calibration of words",
        "{}": "is no calibration of words",
        json.dumps({**about, "format": "mmalign word calibration 2"}): "is no calibration of words",
        json.dumps({**about, "eps": "low"}): "has eps 'low'",
        json.dumps({**about, "eps": float("nan")}): "has eps nan",
        json.dumps({**about, "eps": 0.5}): "has eps 0.5",
        json.dumps({**about, "layers": True}): "has layers True",
        json.dumps({name: value for name, value in about.items() if name != "template"}): "has template None",
    }
    for text, message in texts.items():
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            WordCalibration.load(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="is not JSON"):
        WordCalibration.load(path)
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        WordCalibration.load(tmp_path / "gone.json")


# -- wrong captions ----------------------------------------------------------------------------------------------------


def test_how_wrong_captions_are_found(clip: Encoder, with_wrong: Path) -> None:
    report = evaluate_words(clip, with_wrong, 0.2)
    images, _ = read_captioned(with_wrong)
    cosines, sums, lowest, flags, hits, shares = [], [], [], [], [], []
    for row in images:
        texts = [*row.captions, *row.wrong_captions]
        for text, one in zip(texts, word_attribution(clip, [row.file], texts), strict=True):
            flags.append(text in row.wrong_captions)
            cosines.append(one.cosine)
            plain = [word.score for word in one.words if word.word not in ".,"]
            keep = 1 - max(one.cosine, 0)
            sums.append(keep * sum(score for score in plain if score < report.calibration.eps))
            worst = min(one.words, key=lambda word: word.score)
            lowest.append(keep * worst.score)
            if flags[-1]:
                named = [word.word.strip(".!").lower() == row.wrong_words[0].lower() for word in one.words]
                hits.append(worst.word.strip(".!").lower() == row.wrong_words[0].lower())
                shares.append(np.mean(named))
    assert (report.wrong, report.calibration.captions, report.named) == (10, 20, 10)
    for name, scores in (("cosine", cosines), ("f_clip_score", sums), ("most_negative", lowest)):
        found = report.figures[name]
        assert found["auroc"] == pytest.approx(roc_auc_score(flags, np.negative(scores)), abs=0.011)
        wanted = average_precision_score(flags, np.negative(scores))
        assert found["average_precision"] == pytest.approx(wanted, abs=0.03)
    assert report.figures["chance"] == {"auroc": 0.5, "average_precision": pytest.approx(1 / 3)}
    assert report.word_accuracy == pytest.approx(np.mean(hits))
    assert report.word_chance == pytest.approx(np.mean(shares))
    assert json.loads(json.dumps(report.to_dict()))["wrong"] == 10
    lines = report.table()
    assert lines[0] == "20 captions that fit, 10 that do not"
    assert re.fullmatch(r"cosine +0\.\d{3} +0\.\d{3}", lines[2])
    assert "eps was fitted to the captions that fit here, which may flatter f_clip_score" in lines
    assert re.match(rf"the lowest word is the wrong one in {report.word_accuracy:.3f} of 10", lines[-1])
    everything = evaluate_words(clip, with_wrong, 1.0)
    assert everything.calibration.eps <= 0
    assert report.marked_share < everything.marked_share < 1  # the highest words are above 0, or at eps itself
    bare = evaluate_words(clip, with_wrong, 0.2, template="", layers=1)
    assert (bare.calibration.template, bare.calibration.layers) == ("", 1)
    alone = [one for row in images for one in word_attribution(clip, [row.file], row.captions, template="", layers=1)]
    assert bare.calibration.eps == pytest.approx(calibrate_eps(alone, flagged_share=0.2), rel=1e-3)


def test_lines_with_wrong_captions(tmp_path: Path) -> None:
    def read(*lines: dict[str, Any]) -> list[Any]:
        (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps({'file': 'a.jpg', **line})}\n" for line in lines))
        return read_captioned(tmp_path / "c.jsonl")[0]

    (row,) = read(
        {"caption": "a dog", "wrong_caption": "a cat", "wrong_word": "cat"},
        {"captions": ["the dog"], "wrong_captions": ["a red dog", "a pig"]},
        {"captions": ["it"], "wrong_captions": []},
        {"captions": ["he"], "wrong_caption": None},
    )
    assert row.captions == ["a dog", "the dog", "it", "he"]
    assert (row.wrong_captions, row.wrong_words) == (["a cat", "a red dog", "a pig"], ["cat", "", ""])
    (tmp_path / "c.csv").write_text("file,caption,wrong_caption,wrong_word\na.jpg,a dog,a cat,cat\nb.jpg,a pig,,\n")
    rows = read_captioned(tmp_path / "c.csv")[0]
    assert [(one.wrong_captions, one.wrong_words) for one in rows] == [(["a cat"], ["cat"]), ([], [])]
    for line, message in (
        ({"wrong_captions": ["a", "b"], "wrong_words": ["a"]}, "line 1 of .* has 2 wrong captions and 1 wrong words"),
        ({"wrong_words": ["a"]}, "has 0 wrong captions and 1 wrong words"),
        ({"wrong_captions": ["a", " "]}, "none blank"),
        ({"wrong_captions": 3}, "line 1 of .* has 3 among its wrong captions and wrong words; give texts"),
        ({"wrong_captions": [3]}, "line 1 of .* has 3 among"),
        ({"wrong_captions": ["a"], "wrong_words": [5]}, "line 1 of .* has 5 among"),
        ({"wrong_caption": "a", "wrong_word": False}, "line 1 of .* has False among"),
        ({"wrong_captions": ["\ud83d"]}, "half a character"),
    ):
        with pytest.raises(InputError, match=message):
            read({"caption": "a dog", **line})


def test_words_of_several_parts_and_words_that_are_not_there(
    tiny_open_clip: Encoder, photo: Path, tmp_path: Path
) -> None:
    def data(caption: str, word: str) -> Path:
        line = {"file": str(photo), "captions": ["a dog"], "wrong_captions": [caption], "wrong_words": [word]}
        (tmp_path / "c.jsonl").write_text(json.dumps(line))
        return tmp_path / "c.jsonl"

    report = evaluate_words(tiny_open_clip, data("A Hot  Dog.", "hot dog"))
    assert report.named == 1
    assert report.word_chance == pytest.approx(2 / 4)
    assert evaluate_words(tiny_open_clip, data("a hot dog", " ")).word_accuracy is None
    beyond = evaluate_words(tiny_open_clip, data("dog " * 90 + "cat", "cat"))
    assert (beyond.named, beyond.word_accuracy) == (0, None)
    for word in ("cat", "do"):
        with pytest.raises(
            InputError, match=f"the wrong word '{word}' of .* does not stand in its caption 'a hot dog'"
        ):
            evaluate_words(tiny_open_clip, data("a hot dog", word))


def test_images_that_cannot_be_read(tiny_open_clip: Encoder, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    lines = [{"file": name, "caption": "a dog"} for name in ("broken.jpg", "gone.jpg")]
    good = {"file": str(photo), "captions": ["a cake"]}
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, good]))
    report = evaluate_words(tiny_open_clip, tmp_path / "c.jsonl")
    assert [one["reason"] for one in report.left_out] == ["not_an_image", "missing"]
    assert (report.calibration.captions, report.figures, report.table()) == (1, {}, [])
    (tmp_path / "c.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(InputError, match=r"no image of .* with a caption can be read \(first: .*broken.jpg"):
        evaluate_words(tiny_open_clip, tmp_path / "c.jsonl")
    # What is wrong with the options is said before any image is read.
    with pytest.raises(InputError, match="end it in a space"):
        evaluate_words(tiny_open_clip, tmp_path / "c.jsonl", template="A photo of")
    with pytest.raises(InputError, match="layers is 0"):
        evaluate_words(tiny_open_clip, tmp_path / "c.jsonl", layers=0)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_siglip", "tiny_sentence", "tiny_timm", "bundled"])
def test_other_encoders(request: pytest.FixtureRequest, name: str, photo: Path, with_wrong: Path) -> None:
    encoder = request.getfixturevalue(name)
    for call in (
        lambda: explain(photo, "a dog", encoder=encoder),
        lambda: calibrate(encoder, [(photo, "a dog")]),
        lambda: evaluate_words(encoder, with_wrong),
    ):
        with pytest.raises(InputError, match=r"cannot be read word by word: .*; supported are CLIPs"):
            call()


def test_bad_input(tiny_open_clip: Encoder, photo: Path, tmp_path: Path) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"eps": 0.1}, "eps is 0.1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"mode": "lowest"}, "mode is 'lowest'; give one of threshold, most_negative"),
        ({"text": " "}, "caption is ' '"),
        ({"layers": 0}, "layers is 0"),
        ({"template": "A photo of"}, "end it in a space"),
        ({"encoder": "nothing"}, "encoder 'nothing' is neither a folder"),
    )
    for changes, message in wrong:
        with pytest.raises(InputError, match=message):
            explain(**{"image": photo, "text": "a dog", "encoder": tiny_open_clip, **changes})
    with pytest.raises(UnreadableImageError, match="does not exist"):
        explain(tmp_path / "gone.jpg", "a dog", encoder=tiny_open_clip)
    with pytest.raises(InputError, match="no words to calibrate by"):
        calibrate(tiny_open_clip, [])
    pairs: tuple[tuple[Any, str], ...] = (
        (5, r"pairs are 5; give \(image, caption\) or \(image, captions\) for each image, or a file"),
        ([photo], "pair 0 is PosixPath"),
        ([(photo, "a dog"), (photo, None)], r"pair 1 is \(PosixPath, NoneType\); give"),
        ([(photo, "a dog", "a cat")], r"pair 0 is \(PosixPath, str, str\); give"),
        ([(photo, [3])], "caption is 3; give a string"),
    )
    for given, message in pairs:
        with pytest.raises(InputError, match=message):
            calibrate(tiny_open_clip, given)
    with pytest.raises(InputError, match="flagged_share is 2"):
        calibrate(tiny_open_clip, [(photo, "a dog")], 2)


def test_texts_that_are_not_unicode(clip: Encoder, tiny_sentence: Encoder, photo: Path) -> None:
    """Python makes such of bytes that are not UTF-8, as in a command line in Latin-1; tokenizers fail on them."""
    text = os.fsdecode("café dog".encode("latin-1"))
    with pytest.raises(InputError, match=r"caption is 'caf\\udce9 dog', which is not valid Unicode; give it as UTF-8"):
        explain(photo, text, encoder=clip)
    for encoder in (clip, tiny_sentence):
        with pytest.raises(InputError, match=r"text 1 is 'caf\\udce9 dog', which is not valid Unicode"):
            encoder.encode_texts(["a dog", text])
    with pytest.raises(InputError, match=r"text 1 is .*, which is not valid Unicode"):
        extract_features(clip, ["a dog", text], modality="text")
    assert clip.encode_texts("café 🐕").shape == (1, clip.dim)


def test_attention_of_transformers_is_empty_unless_asked_for_eagerly(tiny_clip: Any) -> None:
    """Why `attend_texts` switches the attention: with the default one, transformers returns nothing and goes on."""
    tower, tokens = tiny_clip.model.text_model, tiny_clip.tokenize(["a dog on grass"])
    assert tower.config._attn_implementation == "sdpa"
    with torch.no_grad():
        silent = tower(**tokens, output_attentions=True).attentions
    assert not [one for one in silent or () if one is not None]
    attended = tiny_clip.attend_texts(["a dog on grass"])
    assert len(attended.attention) == 2
    assert all(torch.isfinite(one).all() and one.requires_grad for one in attended.attention)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, command_line: Run, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return command_line


def test_mmalign_explain(run: Run, tiny_clip: Encoder, clip_folder: Path, photo: Path, tmp_path: Path) -> None:
    spec = f"transformers:{clip_folder}"
    eps = between(explain(photo, CAPTION, encoder=tiny_clip), 2)
    found = explain(photo, CAPTION, encoder=tiny_clip, eps=min(eps, 0))
    common = ("explain", photo, CAPTION, "a dog", "-e", spec, "--device", "cpu")
    code, out, err = run(*common, "--eps", str(min(eps, 0)), "--picture", "p.png")
    assert code == 0, err
    assert out.splitlines()[0] == found.marked()
    assert "\x1b" not in out
    assert f"cosine {found.cosine:.3f}, CLIPScore {found.clip_score:.3f}" in out.splitlines()[1]
    assert out.splitlines()[2].split() == [f"{found.flagged[0].score:.2e}", found.flagged[0].word]
    assert "picture: p.png" in err
    assert "picture: p-2.png" in err
    with Image.open("p.png") as one, Image.open("p-2.png") as two:
        assert one.width == two.width
        assert one.height > two.height  # of fewer words
    code, out, err = run(*common, "--json", "--lowest")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["caption"] for line in lines] == [CAPTION, "a dog"]
    assert [sum(word["flagged"] for word in line["words"]) for line in lines] == [1, 1]
    code, out, err = run(*common)
    assert code == 0
    assert err.count("eps -5e-05 was measured for open_clip:ViT-H-14/laion2b_s32b_b79k, not for") == 1


def test_mmalign_eval_words(run: Run, clip_folder: Path, with_wrong: Path, photo: Path, tmp_path: Path) -> None:
    spec = f"transformers:{clip_folder}"
    common = ("eval", "words", with_wrong, "-e", spec, "--device", "cpu", "--quiet")
    code, out, err = run(*common, "--out", "words.json", "--flagged-share", "0.2")
    assert code == 0, err
    found = WordCalibration.load("words.json")
    assert out.startswith(
        f"eps {found.eps:.4g} marks 20.0% of {found.words:,} words of 20 captions that fit, of 10 images"
    )
    assert "AUROC" in out
    assert "the lowest word is the wrong one in" in out
    assert "calibration: words.json" in err
    code, out, err = run("explain", photo, CAPTION, "-e", spec, "--device", "cpu", "--calibration", "words.json")
    assert code == 0, err
    assert f"suspect below {found.eps:.3g}" in out
    assert "was measured for" not in err
    code, out, err = run(*common, "--json")
    assert code == 0
    assert json.loads(out)["calibration"]["words"] == found.words
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(photo, folder / "a.jpg")
    (folder / "captions.csv").write_text("file,caption\na.jpg,a dog\ngone.jpg,a cat\n")
    code, out, err = run("eval", "words", folder, "-e", spec, "--device", "cpu", "-q")
    assert code == 4
    assert "left out (missing): " in err
    assert "1 images could not be read" in err
    assert "AUROC" not in out
    code, out, err = run("explain", photo, CAPTION, "--calibration", "words.json", "-e", spec, "--layers", "1")
    assert (code, out) == (1, "")
    assert "layers is 1 and that of the calibration 3" in err


def test_command_lines_that_cannot_be_obeyed(run: Run, clip_folder: Path, photo: Path, with_wrong: Path) -> None:
    spec = ("-e", f"transformers:{clip_folder}", "--device", "cpu")
    shutil.copy(photo, "a.png")
    before = Path("a.png").read_bytes()
    shutil.copy(with_wrong, "data.json")
    for arguments, message in (
        (("explain", "gone.jpg", "a dog", *spec), "'gone.jpg': does not exist"),
        (("explain", photo, " ", *spec), "caption is ' '"),
        (("explain", photo, "a dog", "-e", "bundled"), "cannot be read word by word"),
        (("explain", photo, "a dog", *spec, "--eps", "1"), "eps is 1"),
        (("explain", photo, "a dog", *spec, "--eps", "-1", "--calibration", "no.json"), "give one of them"),
        (("explain", photo, "a dog", *spec, "--calibration", "no.json"), "calibration 'no.json' cannot be read"),
        (("explain", photo, "a dog", *spec, "--picture", "a.bmp"), "does not end in .png"),
        (("explain", "a.png", "a dog", *spec, "--picture", "a.png"), "--picture a.png is one of the inputs"),
        (("eval", "words", "gone.jsonl", *spec), "captions 'gone.jsonl' cannot be read"),
        (("explain", photo, "caf\udce9", *spec), r"caption is 'caf\udce9', which is not valid Unicode"),
        (("eval", "words", "data.json", *spec, "--out", "data.json"), "is one of the inputs, which would be lost"),
        (("eval", "words", with_wrong, *spec, "--out", "a.png"), "--out 'a.png' does not end in .json; give a name"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (1, ""), arguments
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert Path("a.png").read_bytes() == before
    assert run("explain", photo)[0] == 2
    assert run("eval", "words", with_wrong, "--flagged-share", "2")[0] == 2


def test_stopping_what_keeps_nothing(
    run: Run, clip_folder: Path, with_wrong: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmalign.encoders.stream.encode_stream", stop)
    code, _, err = run("eval", "words", with_wrong, "-e", f"transformers:{clip_folder}", "--device", "cpu", "--quiet")
    assert (code, err) == (130, "stopped\n")
