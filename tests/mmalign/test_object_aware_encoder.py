"""Images encoded with their objects, on photographs with the boxes that people drew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign import Encoder, JoinedEncoder, extract_features, load_encoder
from mmalign.encoders.states import TokenStates
from mmalign.errors import InputError
from mmalign.imaging import DecodeSettings, read_file
from mmalign.object_aware.boxes import Detections, Detector, choose_boxes, read_boxes
from mmalign.object_aware.detectors import ModelDetector, load_detector
from mmalign.object_aware.encoder import ObjectAwareEncoder
from mmalign.object_aware.loading import from_planes, query_phrases, to_planes
from mmalign.object_aware.perturbing import PerturbationSettings, perturb_queries
from mmalign.object_aware.specs import ObjectsSpec
from mmalign.query_perturbation import PatchGrid
from retrieval import ImageIndex, IndexUpgrade

COUNT = 12


class Given(Detector):
    """Boxes by the size of the image; keeps what it was asked."""

    spec = "given"

    def __init__(self, boxes: Sequence[Sequence[float]], name: str = "given") -> None:
        self.boxes, self.name = np.array(boxes, np.float32).reshape(-1, 4), name
        self.asked: list[tuple[int, int]] = []

    @property
    def digest(self) -> str:
        return self.name

    def detect(self, image: Any, *, content: bytes | None = None, phrases: Sequence[str] = ()) -> Detections:
        self.asked.append((image.shape[2], image.shape[1]))
        return Detections(self.boxes, np.ones(len(self.boxes), np.float32), ("",) * len(self.boxes))


@pytest.fixture(scope="module")
def folder(photos: Path, captions: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs, and the boxes of every second one in `boxes.jsonl`."""
    root = tmp_path_factory.mktemp("objects") / "photos"
    root.mkdir()
    rows = [row for row in captions if row["objects"]][:COUNT]
    for row in rows:
        shutil.copy(photos / row["file"], root)
    (root / "boxes.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[::2]))
    return root


@pytest.fixture(scope="module")
def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jpg"))


@pytest.fixture(scope="module")
def boxes(folder: Path) -> dict[str, list[list[float]]]:
    """Corners by name, by hand from COCO's x y width height."""
    rows = [json.loads(line) for line in (folder / "boxes.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        corners = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in row["objects"])]
        found[row["file"]] = corners
    return found


@pytest.fixture(scope="module")
def aware(folder: Path, tiny_open_clip: Encoder) -> ObjectAwareEncoder:
    return ObjectAwareEncoder(tiny_open_clip, read_boxes(folder / "boxes.jsonl"))


def by_hand(encoder: Encoder, files: Sequence[Path], boxes: dict[str, Any], **options: Any) -> np.ndarray:
    """All images in one pass, with their boxes in original pixels."""
    loaded = [encoder.load_image(file) for file in files]
    sizes = [(image.width, image.height) for image, _ in loaded]
    with perturb_queries(encoder, [boxes.get(file.name, []) for file in files], sizes, **options):
        return encoder.encode_pixels(torch.stack([pixels for _, pixels in loaded]))


# -- vectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_vectors_are_those_of_boxes_given_by_hand(
    aware: ObjectAwareEncoder, tiny_open_clip: Encoder, files: list[Path], boxes: dict[str, Any], batch_size: int
) -> None:
    plain = tiny_open_clip.encode_images(files, batch_size=batch_size)
    found = aware.encode_images(files, batch_size=batch_size)
    np.testing.assert_allclose(found, by_hand(tiny_open_clip, files, boxes), atol=1e-5)
    for file, one, other in zip(files, plain, found, strict=True):
        if file.name in boxes:
            assert np.abs(one - other).max() > 1e-4, file.name
        else:
            assert np.array_equal(one, other), file.name


@pytest.mark.parametrize("options", [{"alpha": 2.0, "max_objects": 2}, {"keep_norm": True}, {"rank": 1}])
def test_settings_reach_the_attention(
    folder: Path, tiny_open_clip: Encoder, files: list[Path], boxes: dict[str, Any], options: dict[str, Any]
) -> None:
    aware = ObjectAwareEncoder(tiny_open_clip, read_boxes(folder / "boxes.jsonl"), PerturbationSettings(**options))
    found = aware.encode_images(files)
    np.testing.assert_allclose(found, by_hand(tiny_open_clip, files, boxes, **options), atol=1e-5)
    assert np.abs(found - by_hand(tiny_open_clip, files, boxes)).max() > 1e-4


def test_texts_are_untouched(aware: ObjectAwareEncoder, tiny_open_clip: Encoder) -> None:
    assert aware.modalities == {"image", "text"}
    np.testing.assert_array_equal(aware.encode_texts(["a dog"]), tiny_open_clip.encode_texts(["a dog"]))


def test_images_alone_of_an_encoder_without_texts(tiny_timm: Encoder, files: list[Path]) -> None:
    aware = ObjectAwareEncoder(tiny_timm, Given([[0, 0, 120, 120]]))
    assert aware.modalities == {"image"}
    assert np.abs(aware.encode_images(files[:2]) - tiny_timm.encode_images(files[:2])).max() > 1e-4
    with pytest.raises(InputError, match="encodes image only"):
        aware.encode_texts(["a dog"])


class Both(JoinedEncoder):
    source = "both_of_a_test"

    def join_images(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weights["image"]

    def join_texts(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weights["text"]


def test_the_images_of_a_joined_encoder(
    tiny_timm: Encoder, tiny_sentence: Encoder, folder: Path, files: list[Path], boxes: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "image": torch.randn(tiny_timm.dim, 16, generator=generator),
        "text": torch.randn(tiny_sentence.dim, 16, generator=generator),
    }
    joined = Both(tiny_timm, tiny_sentence, weights, dim=16)
    found = ObjectAwareEncoder(joined, read_boxes(folder / "boxes.jsonl")).encode_images(files)
    np.testing.assert_allclose(found, by_hand(joined, files, boxes), atol=1e-5)
    assert np.abs(found - joined.encode_images(files)).max() > 1e-4


def test_fast_decoding_does_not_move_boxes(tiny_open_clip: Encoder, files: list[Path]) -> None:
    """A JPEG decoded at a quarter of its size: the detector sees the whole one, whose pixels its boxes are in."""
    fast = DecodeSettings(fast_decode=True)
    image, pixels = tiny_open_clip.load_image(files[0], fast)
    assert "fast_decode" in image.flags
    size = Image.open(files[0]).size
    assert image.width < size[0]
    box = [size[0] * 0.4, size[1] * 0.4, size[0] * 0.6, size[1] * 0.6]
    detector = Given([box])
    found = ObjectAwareEncoder(tiny_open_clip, detector).encode_images(files[:1], decode=fast)
    assert detector.asked == [size]
    with perturb_queries(tiny_open_clip, [[box]], [size]):
        expected = tiny_open_clip.encode_pixels(pixels[None])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    plain = ObjectAwareEncoder(tiny_open_clip, Given([])).encode_images(files[:1], decode=fast)
    np.testing.assert_array_equal(plain, tiny_open_clip.encode_images(files[:1], decode=fast))


def test_a_picture_in_memory_has_no_boxes_of_a_file(
    aware: ObjectAwareEncoder, tiny_open_clip: Encoder, files: list[Path]
) -> None:
    picture = Image.open(files[0]).convert("RGB")
    np.testing.assert_array_equal(aware.encode_images([picture]), tiny_open_clip.encode_images([picture]))
    content = read_file(files[0])
    for same in (content, content.data, str(files[0])):
        np.testing.assert_array_equal(aware.encode_images([same]), aware.encode_images(files[:1]))


def test_many_threads(aware: ObjectAwareEncoder, files: list[Path]) -> None:
    expected = aware.encode_images(files, batch_size=4)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: aware.encode_images(files, batch_size=4, workers=2), range(8)):
            np.testing.assert_array_equal(found, expected)


def test_threads_with_and_without_objects(aware: ObjectAwareEncoder, files: list[Path]) -> None:
    """Pixels alone are encoded as by the plain model, whatever another thread does with it."""
    loaded = torch.stack([aware.load_image(file)[1] for file in files[:4]])
    batches = [loaded, loaded[:3, :3]]
    expected = [aware.encode_pixels(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for number, found in enumerate(pool.map(lambda n: aware.encode_pixels(batches[n % 2]), range(60))):
            np.testing.assert_array_equal(found, expected[number % 2])


def test_states_are_those_of_the_perturbed_pass(
    aware: ObjectAwareEncoder, tiny_open_clip: Encoder, files: list[Path]
) -> None:
    loaded = torch.stack([aware.load_image(file)[1] for file in files[:3]])
    with torch.inference_mode():
        states: list[TokenStates] = aware.image_states(loaded, [0, "output"])
        plain = tiny_open_clip.image_states(loaded[:, :3], [0, "output"])
    np.testing.assert_allclose(
        torch.nn.functional.normalize(states[1].states[:, 0], dim=-1), aware.encode_images(files[:3]), atol=1e-5
    )
    assert torch.equal(states[0].states, plain[0].states), "the last block alone is perturbed"
    assert not torch.equal(states[1].states, plain[1].states)
    with torch.inference_mode():
        assert torch.equal(aware.image_features(loaded[:, :3]), tiny_open_clip.image_features(loaded[:, :3]))


def test_half_precision_keeps_small_weights(folder: Path, open_clip_checkpoint: Path, files: list[Path]) -> None:
    spec = f"objects:{folder}/boxes.jsonl|open_clip:tiny-clip/{open_clip_checkpoint}"
    whole, half = (load_encoder(spec, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.bfloat16
    assert whole.fingerprint == half.fingerprint
    cosines = (whole.encode_images(files) * half.encode_images(files)).sum(axis=1)
    assert cosines.min() > 0.99
    assert half.encode_images(files).std() > 0.05


def test_features_can_be_extracted(aware: ObjectAwareEncoder, files: list[Path], tmp_path: Path) -> None:
    features = extract_features(aware, files, modality="image", cache=tmp_path / "features", batch_size=5)
    with torch.inference_mode():
        expected = aware.image_features(torch.stack([aware.load_image(file)[1] for file in files]))
    np.testing.assert_allclose(features["output"], expected, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 5),
    st.integers(0, 6), st.integers(0, 6), st.integers(1, 4),
)  # fmt: skip
def test_planes_carry_weights_there_and_back(
    rows: int, columns: int, high: int, wide: int, prefix: int, below: int, right: int, objects: int
) -> None:
    """Also where the input is no multiple of the patch, whose remainder belongs to no token."""
    grid = PatchGrid(rows, columns, high, wide, prefix)
    weights = torch.rand(objects, grid.tokens)
    weights[:, :prefix] = 0
    size = (rows * high + below, columns * wide + right)
    planes = to_planes(weights, grid, size)
    assert planes.shape == (objects, *size)
    assert planes.sum() == pytest.approx(float(weights.sum()) * high * wide, rel=1e-4)
    assert torch.equal(from_planes(planes[None], grid)[0], weights)


# -- what can be wrapped -----------------------------------------------------------------------------------------------


def test_encoders_without_attention_to_perturb_are_refused(bundled: Encoder, tiny_sentence: Encoder) -> None:
    with pytest.raises(InputError, match=r"(?s)CLIP.*SigLIP"):
        ObjectAwareEncoder(bundled, Given([]))
    with pytest.raises(InputError, match="encodes text only"):
        ObjectAwareEncoder(tiny_sentence, Given([]))


def test_wrapped_twice_is_refused(aware: ObjectAwareEncoder) -> None:
    with pytest.raises(InputError, match="follows objects already"):
        ObjectAwareEncoder(aware, Given([]))


def test_fingerprint_is_of_encoder_detector_and_settings(
    aware: ObjectAwareEncoder, tiny_open_clip: Encoder, tiny_clip: Encoder, folder: Path, files: list[Path]
) -> None:
    boxes = read_boxes(folder / "boxes.jsonl")
    fingerprints = [
        aware.fingerprint,
        tiny_open_clip.fingerprint,
        ObjectAwareEncoder(tiny_clip, boxes).fingerprint,
        ObjectAwareEncoder(tiny_open_clip, boxes, PerturbationSettings(alpha=4)).fingerprint,
        ObjectAwareEncoder(tiny_open_clip, Given([], "one")).fingerprint,
        ObjectAwareEncoder(tiny_open_clip, Given([], "two")).fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    (folder.parent / "one.json").write_text(json.dumps({files[0].name: [[0, 0, 5, 5]]}))
    other = ObjectAwareEncoder(tiny_open_clip, read_boxes(folder.parent / "one.json", folder))
    assert other.fingerprint == aware.fingerprint, "boxes are input, as pixels are"


# -- saved, and by name ------------------------------------------------------------------------------------------------


def test_saved_folder_round_trip(folder: Path, tiny_clip: Encoder, files: list[Path], tmp_path: Path) -> None:
    chosen = PerturbationSettings(alpha=5, keep_norm=True, max_objects=3)
    made = ObjectAwareEncoder(tiny_clip, read_boxes(folder / "boxes.jsonl"), chosen)
    saved = made.save(tmp_path / "encoder")
    again = load_encoder(saved, device="cpu")
    assert isinstance(again, ObjectAwareEncoder)
    assert (again.settings, again.fingerprint, again.spec) == (chosen, made.fingerprint, str(saved))
    np.testing.assert_allclose(again.encode_images(files), made.encode_images(files), atol=1e-6)
    twice = load_encoder(again.save(tmp_path / "twice"), device="cpu")
    assert twice.fingerprint == made.fingerprint


def test_images_of_a_file_are_saved(
    folder: Path, tiny_clip: Encoder, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of boxes in another folder than its images, named relative to the folder one is in."""
    shutil.copy(folder / "boxes.jsonl", tmp_path / "far.jsonl")
    monkeypatch.chdir(folder)
    made = ObjectAwareEncoder(tiny_clip, read_boxes(tmp_path / "far.jsonl", "."))
    assert str(made.objects) == f"{tmp_path}/far.jsonl,images={folder}"
    monkeypatch.chdir("/")
    again = load_encoder(made.save(tmp_path / "encoder"), device="cpu")
    np.testing.assert_allclose(again.encode_images(files), made.encode_images(files), atol=1e-6)


def test_a_saved_folder_wants_the_detector_it_was_made_with(folder: Path, tiny_clip: Encoder, tmp_path: Path) -> None:
    saved = ObjectAwareEncoder(tiny_clip, read_boxes(folder / "boxes.jsonl")).save(tmp_path / "encoder")
    about = json.loads((saved / "encoder.json").read_text())
    about["config"]["detector"] = "0" * 64
    (saved / "encoder.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="another one than when the encoder"):
        load_encoder(saved, device="cpu")


def test_spec_says_all_and_is_absolute(
    folder: Path, clip_folder: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    encoder = load_encoder(f"objects:boxes.jsonl,alpha=4,energy=0.9|transformers:{clip_folder}", device="cpu")
    assert isinstance(encoder, ObjectAwareEncoder)
    assert encoder.settings == PerturbationSettings(alpha=4, energy=0.9)
    assert encoder.spec == f"objects:{folder}/boxes.jsonl,alpha=4.0,energy=0.9|transformers:{clip_folder}"
    monkeypatch.chdir("/")
    again = load_encoder(encoder.spec, device="cpu")
    assert (again.spec, again.fingerprint) == (encoder.spec, encoder.fingerprint)
    np.testing.assert_array_equal(again.encode_images(files), encoder.encode_images(files))


def test_names_of_a_boxes_file_in_another_folder(
    folder: Path, clip_folder: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As COCO's annotations lie."""
    shutil.copy(folder / "boxes.jsonl", tmp_path / "instances.jsonl")
    inner = f"transformers:{clip_folder}"
    monkeypatch.chdir(folder.parent)
    there = load_encoder(f"objects:{tmp_path}/instances.jsonl,images={folder.name}|{inner}", device="cpu")
    monkeypatch.chdir("/")
    here = load_encoder(f"objects:{folder}/boxes.jsonl|{inner}", device="cpu")
    np.testing.assert_array_equal(there.encode_images(files), here.encode_images(files))
    lost = load_encoder(f"objects:{tmp_path}/instances.jsonl|{inner}", device="cpu")
    assert lost.encode_texts(["a dog"]).shape == (1, 24), "words need no boxes"
    with pytest.raises(InputError, match="give the folder of the images"):
        lost.encode_images(files)


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("boxes.json", r"is not objects:DETECTOR\|ENCODER"),
        ("|bundled", r"is not objects:DETECTOR\|ENCODER"),
        (",alpha=1|bundled", "names no detector"),
        ("b.json,alpha=much|bundled", "alpha=much .* give a number"),
        ("b.json,rank=1.5|bundled", "give a whole number"),
        ("b.json,keep_norm=perhaps|bundled", "give yes or no"),
        ("b.json,alpha=1,alpha=2|bundled", "stands twice"),
        ("b.json,strength=1|bundled", "'strength' .* is no setting; there are alpha"),
        ("b.json,alpha=-1|bundled", "alpha is -1"),
        ("torchvision:ssd300_vgg16,images=/tmp|bundled", "is for a file of boxes"),
        ("nothing|bundled", "is none of these"),
        ("b.json, Strength=1|bundled", "'Strength' .* is no setting"),
        ("b.json,max_boxes=3|bundled", "max_boxes=3 is for a detector"),
        ("torchvision:,alpha=1|bundled", "'torchvision:' names no model"),
        ("transformers:|bundled", "'transformers:' names no model"),
    ],
)
def test_specs_that_cannot_be_used(rest: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        load_encoder(f"objects:{rest}")


def test_a_detector_that_needs_phrases_is_for_re_ranking(
    clip_folder: Path, tiny_clip: Encoder, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Given([])
    detector.needs_phrases = True
    monkeypatch.setattr(ObjectsSpec, "load", lambda *_: detector)
    with pytest.raises(InputError, match="looks for phrases, which nobody knows when images are indexed"):
        load_encoder(f"objects:transformers:org/open|transformers:{clip_folder}", device="cpu")


@pytest.fixture
def yolos(tmp_path: Path) -> Path:
    """A detector of random weights, whose scores for two classes are about a half."""
    import transformers

    config = transformers.YolosConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=[32, 32],
        patch_size=8, num_detection_tokens=4, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.YolosForObjectDetection(config)
    model.save_pretrained(tmp_path / "yolos")
    transformers.YolosImageProcessor(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(tmp_path / "yolos")
    return tmp_path / "yolos"


def test_a_network_finds_the_objects(
    yolos: Path, clip_folder: Path, tiny_clip: Encoder, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(yolos.parent)
    encoder = load_encoder(f"objects:yolos,threshold=0.1|transformers:{clip_folder}", device="cpu")
    assert isinstance(encoder, ObjectAwareEncoder)
    detector = load_detector(yolos, device="cpu", threshold=0.1)
    found = {file.name: choose_boxes(detector.detect(file), Image.open(file).size) for file in files}
    assert all(len(boxes) for boxes in found.values())
    vectors = encoder.encode_images(files, batch_size=5)
    np.testing.assert_allclose(vectors, by_hand(tiny_clip, files, found), atol=1e-5)
    assert np.abs(vectors - tiny_clip.encode_images(files)).max() > 1e-4

    monkeypatch.chdir("/")
    for again in (
        load_encoder(encoder.spec, device="cpu"),
        load_encoder(encoder.save(yolos.parent / "saved"), device="cpu"),
    ):
        assert again.fingerprint == encoder.fingerprint
        np.testing.assert_array_equal(again.encode_images(files, batch_size=5), vectors)
    few = load_detector(yolos, device="cpu", threshold=0.1, max_boxes=1)
    made = ObjectAwareEncoder(tiny_clip, few)
    assert str(made.objects) == f"transformers:{yolos},threshold=0.1,max_boxes=1"
    again = load_encoder(made.save(yolos.parent / "few"), device="cpu")
    assert again.fingerprint == made.fingerprint != encoder.fingerprint
    surer = load_encoder(encoder.spec.replace("threshold=0.1", "threshold=0.99"), device="cpu")
    assert surer.fingerprint != encoder.fingerprint
    np.testing.assert_array_equal(surer.encode_images(files), tiny_clip.encode_images(files))


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0, 50),
    st.none() | st.integers(1, 9),
    st.booleans(),
    st.integers(1, 9),
    st.none() | st.floats(0, 1),
    st.sampled_from(["a,b.json", "torchvision:ssd300_vgg16", "transformers:org/x"]),
    st.none() | st.integers(1, 9),
    st.sampled_from([None, "/a folder"]),
)
def test_spec_of_objects_is_read_as_written(
    alpha: float,
    rank: int | None,
    keep: bool,
    most: int,
    threshold: float | None,
    detector: str,
    boxes: int | None,
    images: str | None,
) -> None:
    made = ObjectsSpec(detector, PerturbationSettings(alpha, 0.9, rank, keep, most), threshold, images, boxes)
    assert ObjectsSpec.parse(str(made)) == made
    loose = str(made).replace(",", " , ").replace("a , b.json ", "a,b.json").replace("alpha=", "Alpha =")
    if not detector.startswith("a"):  # blanks may be a path's own
        loose = loose.replace(f"{detector} ", detector)
        assert ObjectsSpec.parse(loose) == made


def test_specs_have_one_bar_and_folders_no_comma() -> None:
    assert ObjectsSpec.parse("b1.json, Alpha=4,\tMAX_OBJECTS=2") == ObjectsSpec(
        "b1.json", PerturbationSettings(alpha=4, max_objects=2)
    )
    with pytest.raises(InputError, match=r"'a\|b.json' has a \|"):
        ObjectsSpec.parse("a|b.json")
    with pytest.raises(InputError, match=r"'/x\|y' has a \|"):
        ObjectsSpec("b.json", images="/x|y")
    with pytest.raises(InputError, match="images=/x,y has a comma"):
        ObjectsSpec("b.json", images="/x,y")


class Still(ModelDetector):
    """A network that finds nothing."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(1, 1), "still", None, 0.5, 100)

    def describe(self) -> dict[str, Any]:
        return {}

    def found(self, pixels: torch.Tensor, phrases: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        return torch.zeros(0, 4), torch.zeros(0), []


def test_the_detector_moves_with_the_encoder(clip_folder: Path) -> None:
    detector = Still()
    aware = ObjectAwareEncoder(load_encoder(f"transformers:{clip_folder}", device="cpu"), detector)
    detector.device = torch.device("meta")  # anywhere else
    assert aware.to("cpu", "bfloat16").detector is detector
    assert detector.device == torch.device("cpu")
    assert detector.model.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("A small dog on a red sofa, next to a child.", ["small dog", "red sofa", "child"]),
        ("two people are riding horses", ["two people", "riding horses"]),
        ("Zwei Hunde im Schnee", ["Zwei Hunde im Schnee"]),
        ("the", ["the"]),
        ("dog and dog", ["dog"]),
    ],
)
def test_phrases_of_a_query(text: str, phrases: list[str]) -> None:
    assert query_phrases(text) == phrases


# -- in an index -------------------------------------------------------------------------------------------------------


def test_index_with_objects(
    folder: Path, open_clip_checkpoint: Path, tiny_open_clip: Encoder, boxes: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    files = sorted(folder.glob("*.jpg"))
    for file in (*files[:8], folder / "boxes.jsonl"):
        shutil.copy(file, root)
    # The file names images that are copied later.
    spec = f"objects:{root}/boxes.jsonl,images={folder}|open_clip:tiny-clip/{open_clip_checkpoint}"
    ImageIndex.build(root, encoder=spec, device="cpu", dtype="float32")

    index = ImageIndex.open(root, device="cpu")
    assert index.manifest["encoder"]["spec"] == spec
    _vectors_are(index, by_hand(tiny_open_clip, files[:8], boxes), files[:8])
    hits = index.search("a dog", k=8)
    cosines = by_hand(tiny_open_clip, files[:8], boxes) @ tiny_open_clip.encode_texts(["a dog"])[0]
    np.testing.assert_allclose([hit.score for hit in hits], np.sort(cosines)[::-1], atol=1e-5)
    assert index.search(root / files[0].name, k=1)[0].score == pytest.approx(1, abs=1e-5)

    for file in files[8:]:
        shutil.copy(file, root)
    report = ImageIndex.open(root, device="cpu").update()
    assert (report.added, report.unchanged) == (len(files) - 8, 8)
    index.refresh()
    _vectors_are(index, by_hand(tiny_open_clip, files, boxes), files)


def test_an_index_has_the_boxes_that_were_given_last(
    folder: Path, clip_folder: Path, tiny_clip: Encoder, boxes: dict[str, Any], tmp_path: Path
) -> None:
    files, inner = sorted(folder.glob("*.jpg"))[:6], f"transformers:{clip_folder}"
    root = tmp_path / "photos"
    root.mkdir()
    options = {"device": "cpu", "dtype": "float32"}
    rows = [{"file": name, "boxes": rows} for name, rows in boxes.items() if name in {file.name for file in files}]
    for name, some in (("one", rows[:1]), ("two", rows[1:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in some))
    specs = [f"objects:{tmp_path}/{name}.jsonl,images={folder}|{inner}" for name in ("one", "two")]
    first, rest = [file for file in files if file.name == rows[0]["file"]], files
    shutil.copy(first[0], root)
    ImageIndex.build(root, encoder=specs[0], **options)
    stale = ImageIndex.open(root, device="cpu")
    assert stale.encoder.spec == specs[0]
    generation = stale.manifest["generation"]

    # Recorded although there is nothing new, which is what is looked at next time.
    index, report = ImageIndex.build(root, encoder=specs[1], **options)
    assert (report.added, report.unchanged) == (0, 1)
    assert index.manifest["encoder"]["spec"] == specs[1]
    assert index.info()["encoder"]["spec"] == ImageIndex.open(root).manifest["encoder"]["spec"] == specs[1]
    assert index.manifest["generation"] == generation + 1
    again, _ = ImageIndex.build(root, encoder=specs[1], **options)
    assert again.manifest["generation"] == generation + 1, "nothing to write"

    (tmp_path / "one.jsonl").unlink()
    for file in rest:
        shutil.copy(file, root)
    assert stale.update().added == len(files) - 1  # which had loaded the encoder of the first boxes
    stale.refresh()
    _vectors_are(stale, by_hand(tiny_clip, files, boxes), files)

    before = stale.manifest["generation"]
    for bad, problem in (("none.jsonl", "are not there; check the path"), ("bad.json", "names no image")):
        (tmp_path / "bad.json").write_text("{}")
        with pytest.raises(InputError, match=problem):
            ImageIndex.build(root, encoder=f"objects:{tmp_path}/{bad},images={folder}|{inner}", **options)
    kept = ImageIndex.open(root).manifest
    assert (kept["generation"], kept["encoder"]["spec"]) == (before, specs[1])
    with pytest.raises(InputError, match="are not there"):
        ImageIndex.build(root, tmp_path / "new", encoder=f"objects:{tmp_path}/none.jsonl|{inner}", **options)
    with pytest.raises(InputError, match="are not there"):
        ImageIndex.open(root, encoder=f"objects:{tmp_path}/none.jsonl|{inner}")
    (tmp_path / "two.jsonl").unlink()
    with pytest.raises(InputError, match="are not there"):
        ImageIndex.build(root, encoder=specs[1], **options)
    index, report = ImageIndex.build(root, device="cpu")
    assert report.unchanged == len(files), "nobody asked for boxes"
    assert len(index.search("a dog")) == len(files), "words need none"


def test_an_upgrade_has_the_boxes_that_were_given_last(folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    root, inner = shutil.copytree(folder, tmp_path / "photos"), f"transformers:{clip_folder}"
    shutil.copy(root / "boxes.jsonl", root / "more.jsonl")
    ImageIndex.build(root, encoder=inner, device="cpu", dtype="float32")
    upgrade = IndexUpgrade(root, f"objects:{root}/boxes.jsonl|{inner}", device="cpu")
    upgrade.measure(sample=COUNT)
    upgrade.start(force=True)
    ImageIndex.open(root, encoder=f"objects:{root}/more.jsonl|{inner}", device="cpu").update()
    manifest = ImageIndex.open(root).manifest
    assert manifest["upgrade"]["encoder"]["spec"] == f"objects:{root}/more.jsonl|{inner}"
    assert manifest["encoder"]["spec"] == inner


def _vectors_are(index: ImageIndex, expected: np.ndarray, files: Sequence[Path]) -> None:
    found = {item.path.name: index.vectors.gather(np.array([item.row]))[0] for item in index}
    np.testing.assert_allclose(np.stack([found[file.name] for file in files]), expected, atol=2e-3)
