"""Detectors: boxes come out where the object is, whatever a processor does to the image before the model sees it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mmalign.errors import InputError, ModelUnavailableError
from mmalign.imaging import read_image
from mmalign.object_aware.detectors import TorchvisionDetector, TransformersDetector, load_detector
from tests.conftest import TINY_TOWER, spread_weights, word_tokenizer

SMALL = "ssdlite320_mobilenet_v3_large"


def rtdetr() -> tuple[Any, Any]:
    import transformers as t

    backbone = t.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = t.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], encoder_ffn_dim=16,
        encoder_attention_heads=2, d_model=16, num_queries=6, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, num_denoising=0, id2label={0: "cat", 1: "dog", 2: "bird"},
    )  # fmt: skip
    return t.RTDetrForObjectDetection(config), t.RTDetrImageProcessor(size={"height": 64, "width": 64})


def yolos() -> tuple[Any, Any]:
    import transformers as t

    config = t.YolosConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[64, 64],
        num_detection_tokens=5, use_mid_position_embeddings=False, id2label={0: "cat", 1: "dog", 2: "bird"},
    )  # fmt: skip
    return t.YolosForObjectDetection(config), t.YolosImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


def owl(version: str) -> tuple[Any, Any]:
    import transformers as t

    kind = "Owlv2" if version == "owlv2" else "OwlViT"
    tokenizer = word_tokenizer(("<s>", "</s>", "<pad>", "<unk>"), 16)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TINY_TOWER, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**TINY_TOWER, "image_size": 64, "patch_size": 16}
    config = getattr(t, f"{kind}Config")(text_config=text, vision_config=vision, projection_dim=32)
    images = getattr(t, f"{kind}ImageProcessor")(size={"height": 64, "width": 64})
    return getattr(t, f"{kind}ForObjectDetection")(config), getattr(t, f"{kind}Processor")(images, tokenizer)


def grounding_dino() -> tuple[Any, Any]:
    import transformers as t

    tokenizer = word_tokenizer(("[CLS]", "[SEP]", "[PAD]", "[UNK]"), 64)
    backbone = t.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    text = t.BertConfig(**TINY_TOWER, vocab_size=len(tokenizer), max_position_embeddings=64)
    config = t.GroundingDinoConfig(
        backbone_config=backbone, text_config=text.to_dict(), d_model=32, num_queries=6, encoder_layers=1,
        decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2, max_text_len=32,
        decoder_attention_heads=2,
    )  # fmt: skip
    images = t.GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    return t.GroundingDinoForObjectDetection(config), t.GroundingDinoProcessor(images, tokenizer)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "rtdetr": rtdetr,
    "yolos": yolos,
    "owlv2": lambda: owl("owlv2"),
    "owlvit": lambda: owl("owlvit"),
    "grounding_dino": grounding_dino,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny detector of random weights, made when first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model, processor = MODELS[name]()
            spread_weights(model).save_pretrained(made[name])
            processor.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torchvision detector of three classes and the background."""
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("torchvision") / "own.safetensors"
    save_file(random_torchvision(4).state_dict(), file)
    return file


def random_torchvision(classes: int) -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(SMALL, weights=None, weights_backbone=None, num_classes=classes)
    return spread_weights(model)  # as they are, features are 1e-14 and every class has the same score


@pytest.fixture
def photo(photos: Path) -> Path:
    return photos / "000000000790.jpg"  # 400 x 265


# -- boxes come out where the object is --------------------------------------------------------------------------------


class FindsRed(nn.Module):
    """In place of a network: the box around what is red in the pixels it is given, for its family's postprocessing."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.config = classes, SimpleNamespace(model_type="given", id2label={0: "cat", 1: "dog"})
        self.seen: tuple[int, ...] = ()

    def forward(self, pixel_values: Tensor, **inputs: Any) -> SimpleNamespace:
        (image,) = pixel_values
        self.seen = tuple(image.shape)
        red = image[0] - image[1]  # whatever the normalisation is, far more there than on gray
        rows, columns = torch.nonzero(red > (red.max() + red.min()) / 2, as_tuple=True)
        height, width = image.shape[1:]
        left, right = columns.min() / width, (columns.max() + 1) / width
        upper, lower = rows.min() / height, (rows.max() + 1) / height
        box = torch.stack([(left + right) / 2, (upper + lower) / 2, right - left, lower - upper])
        logits = torch.full((1, 3, self.classes), -9.0)
        logits[0, 1, 1] = 3.0
        boxes = torch.full((1, 3, 4), 0.1)
        boxes[0, 1] = box
        return SimpleNamespace(logits=logits, pred_boxes=boxes, input_ids=inputs.get("input_ids"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [(300, 150), (120, 260)])
def test_the_box_is_where_the_object_is(name: str, size: tuple[int, int], folders: Callable[[str], Path]) -> None:
    whole = load_detector(folders(name), device="cpu")
    assert isinstance(whole, TransformersDetector)
    detector = TransformersDetector(FindsRed(3), whole.processor, "given")
    box = (size[0] * 0.55, size[1] * 0.2, size[0] * 0.8, size[1] * 0.45)
    image = Image.new("RGB", size, "gray")
    ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="red")
    found = detector.detect(image, phrases=["a cat", "a dog"])
    assert len(found) == 1
    model: Any = detector.model
    pixel = max(size[0] / model.seen[2], size[1] / model.seen[1], max(size) / max(model.seen[1:]))
    np.testing.assert_allclose(found.boxes[0], box, atol=pixel)
    assert found.scores[0] == pytest.approx(torch.tensor(3.0).sigmoid().item() if name != "yolos" else 1.0, abs=1e-2)
    if name in ("rtdetr", "yolos"):
        assert found.labels == ("dog",)
    elif name != "grounding_dino":  # which reads labels off the tokens
        assert found.labels == ("a dog",)


@pytest.mark.parametrize("name", ["rtdetr", "yolos"])
def test_closed_sets(name: str, folders: Callable[[str], Path], photo: Path) -> None:
    detector = load_detector(f"transformers:{folders(name)}", device="cpu", threshold=0.2)
    assert isinstance(detector, TransformersDetector)
    assert not detector.open_vocabulary
    assert not detector.needs_phrases
    found = detector.detect(photo)
    assert 0 < len(found) <= 6
    assert set(found.labels) <= {"cat", "dog", "bird"}
    # Read off the model by hand: centre and size in shares of the image.
    image = Image.open(photo).convert("RGB")
    with torch.inference_mode():
        output = detector.model(**detector.processor(images=[image], return_tensors="pt"))
    share = output.logits[0].softmax(-1)[:, :-1] if name == "yolos" else output.logits[0].sigmoid()
    best = share.max(dim=-1).values.argmax()
    x, y, width, height = output.pred_boxes[0, best].tolist()
    wanted = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2]) * [*image.size, *image.size]
    np.testing.assert_allclose(found.boxes[0], wanted, atol=0.5)
    assert found.scores[0] == pytest.approx(float(share[best].max()), abs=1e-3)
    assert (np.diff(found.scores) <= 0).all()
    few = load_detector(folders(name), device="cpu", threshold=0.2, max_boxes=2)
    np.testing.assert_array_equal(few.detect(photo).boxes, found.boxes[:2])
    assert len(load_detector(folders(name), device="cpu", threshold=1.0).detect(photo)) == 0


def test_open_sets_look_for_phrases(folders: Callable[[str], Path], photo: Path) -> None:
    for name in ("owlvit", "owlv2", "grounding_dino"):
        detector = load_detector(folders(name), device="cpu", threshold=0.05)
        assert detector.open_vocabulary
        found = detector.detect(photo, phrases=["a dog", "a table with a cake", " ", "a dog"])
        assert len(found) > 0
        if name != "grounding_dino":
            assert set(found.labels) <= {"a dog", "a table with a cake"}
        other = detector.detect(photo, phrases=["a man on a bicycle in the snow"])
        assert found.scores.tolist() != other.scores.tolist()
        long = detector.detect(photo, phrases=["a very long description of a dog " * 6])
        assert np.isfinite(long.boxes).all()
        if name == "owlv2":
            continue
        assert detector.needs_phrases
        for phrases in ([], ["  "]):
            with pytest.raises(InputError, match="looks for phrases and was given none; give some, or a detector of"):
                detector.detect(photo, phrases=phrases)


def test_objects_of_any_kind(folders: Callable[[str], Path], photo: Path) -> None:
    detector = load_detector(folders("owlv2"), device="cpu", threshold=0.0)
    assert isinstance(detector, TransformersDetector)
    assert not detector.needs_phrases
    found = detector.detect(photo)
    assert set(found.labels) == {""}
    inputs = detector.processor(images=[Image.open(photo)], text=[["dog"]], return_tensors="pt")
    with torch.inference_mode():
        objectness = detector.model(**inputs).objectness_logits[0].sigmoid()
    # Of patches whose boxes lie in the padding or within a surer one nothing is left.
    shown = objectness.numpy()[:, None]
    assert np.abs(shown - found.scores[None]).min(axis=0).max() < 1e-3
    assert found.scores[0] <= shown.max() + 1e-3
    assert 0 < len(found) < len(objectness)


def test_of_boxes_that_lie_on_each_other_the_surest_stays(folders: Callable[[str], Path]) -> None:
    whole = load_detector(folders("owlvit"), device="cpu")
    assert isinstance(whole, TransformersDetector)

    class Three(FindsRed):
        def forward(self, pixel_values: Tensor, **inputs: Any) -> SimpleNamespace:
            boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.42, 0.4], [0.8, 0.8, 0.2, 0.2]]])
            return SimpleNamespace(logits=torch.tensor([[[0.5], [1.0], [0.0]]]), pred_boxes=boxes)

    found = TransformersDetector(Three(1), whole.processor, "given").detect(Image.new("RGB", (100, 200)), phrases="cat")
    np.testing.assert_allclose(found.boxes, [[29, 60, 71, 140], [70, 140, 90, 180]], atol=1e-3)
    assert found.scores.tolist() == pytest.approx([0.7311, 0.5], abs=1e-3)


# -- torchvision -------------------------------------------------------------------------------------------------------


def test_own_weights(checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        (wanted,) = random_torchvision(4)([read_image(photo).pixels / 255])
    scores = wanted["scores"].sort(descending=True, stable=True)
    levels = scores.values.unique()
    threshold = float(levels[-20:-18].mean())
    kept = scores.indices[scores.values > threshold]
    assert 19 <= len(kept) <= 100
    detector = load_detector(f"torchvision:{SMALL}/{checkpoint}", device="cpu", threshold=threshold)
    assert isinstance(detector, TorchvisionDetector)
    assert detector.categories == {0: "__background__", 1: "class 1", 2: "class 2", 3: "class 3"}
    found = detector.detect(photo)
    np.testing.assert_allclose(found.scores, wanted["scores"][kept], rtol=1e-5)
    np.testing.assert_allclose(found.boxes, wanted["boxes"][kept], atol=1e-2)
    assert found.labels == tuple(f"class {number}" for number in wanted["labels"][kept].tolist())

    torch.save({"model": random_torchvision(4).state_dict(), "epoch": 3}, tmp_path / "own.pth")
    other = load_detector(f"torchvision:{SMALL}/{tmp_path / 'own.pth'}", device="cpu", threshold=threshold)
    assert other.digest == detector.digest
    state = random_torchvision(4).state_dict()
    state["head.classification_head.module_list.0.1.bias"][1] += 0.5
    torch.save(state, tmp_path / "else.pth")
    changed = [f"torchvision:{SMALL}/{tmp_path / 'else.pth'}", f"torchvision:{SMALL}/{checkpoint}"]
    digests = [
        load_detector(spec, device="cpu", threshold=t).digest for spec, t in zip(changed, (0.3, 0.4), strict=True)
    ]
    assert len({detector.digest, *digests}) == 3


def test_what_a_model_gives_is_put_right(checkpoint: Path) -> None:
    detector = load_detector(f"torchvision:{SMALL}/{checkpoint}", device="cpu")
    assert isinstance(detector, TorchvisionDetector)

    class Given(nn.Module):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            assert images[0].shape == (3, 40, 80)
            assert images[0].max() <= 1
            boxes = [
                [5, 5, 10, 10],
                [-9, 2, 70, 99],
                [0, 0, torch.nan, 5],
                [90, 2, 95, 9],
                [20, 30, 10, 20],
                [1, 1, 2, 2],
            ]
            scores, labels = [0.6, 0.9, 0.95, 0.9, 0.7, 0.4], [1, 2, 3, 1, 77, 1]
            return [{"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}]

    found = TorchvisionDetector(Given(), SMALL, "given", ["__background__", "cat", "dog"]).detect(
        torch.full((3, 40, 80), 200, dtype=torch.uint8)
    )
    assert found.boxes.tolist() == [[0, 2, 70, 40], [10, 20, 20, 30], [5, 5, 10, 10]]
    assert found.labels == ("dog", "77", "cat")
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])


def test_torchvisions_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    from torchvision.models import get_model_weights

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = get_model_weights(SMALL).DEFAULT
    with pytest.raises(ModelUnavailableError, match=r"are not in .*checkpoints', nor to be fetched \(HF_HUB_OFFLINE"):
        load_detector(f"torchvision:{SMALL}", device="cpu")
    file = tmp_path / "checkpoints" / weights.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.save(random_torchvision(91).state_dict(), file)
    detector = load_detector(f"torchvision:{SMALL}", device="cpu", threshold=0.0)
    found = detector.detect(photo)
    assert len(found) == 100
    assert set(found.labels) <= set(weights.meta["categories"])
    file.write_bytes(pickle.dumps(SimpleNamespace(a=1), protocol=2))
    with pytest.raises(ModelUnavailableError, match=r"cannot be read .*delete '.*\.pth' and run again"):
        load_detector(f"torchvision:{SMALL}", device="cpu")


# -- what all of them do -----------------------------------------------------------------------------------------------


def test_threads_do_not_meet(folders: Callable[[str], Path], photos: Path) -> None:
    files = sorted(photos.glob("*.jpg"))[:8]
    detector = load_detector(folders("owlv2"), device="cpu", threshold=0.0)
    phrases = [["a dog"], [], ["a cat", "snow"], []] * 2
    alone = [detector.detect(file, phrases=words) for file, words in zip(files, phrases, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda one: detector.detect(one[0], phrases=one[1]), zip(files, phrases, strict=True)))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert one.labels == other.labels
    assert len({tuple(one.scores.tolist()) for one in alone}) == 8


def test_digests_tell_content_and_settings(folders: Callable[[str], Path], tmp_path: Path) -> None:
    import shutil

    folder = folders("rtdetr")
    digest = load_detector(folder, device="cpu").digest
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert load_detector(f"transformers:{copy}", device="cpu").digest == digest
    others = {
        load_detector(folder, device="cpu", threshold=0.4).digest,
        load_detector(folder, device="cpu", max_boxes=7).digest,
    }
    about = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**about, "id2label": {"0": "cat", "1": "dog", "2": "fish"}}))
    others.add(load_detector(copy, device="cpu").digest)
    (copy / "config.json").write_text(json.dumps(about))
    size = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**size, "size": {"height": 96, "width": 96}}))
    others.add(load_detector(copy, device="cpu").digest)
    assert len(others | {digest}) == 5


def test_a_file_of_boxes_is_a_detector(photos: Path, photo: Path) -> None:
    file = load_detector(photos / "captions.jsonl")
    assert "dog" in file.detect(photo).labels
    with pytest.raises(InputError, match=r"threshold is 0.5, and boxes of the file .* are taken as they are"):
        load_detector(photos / "captions.jsonl", threshold=0.5)


def test_specs_that_name_no_detector(
    clip_folder: Path, photos: Path, photo: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.pth").write_bytes(pickle.dumps(SimpleNamespace(a=1), protocol=2))
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:500])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for spec, message in (
        ("yolo", r"detector 'yolo' is none of these; give torchvision:"),
        ("torchvision:", "names no model"),
        ("transformers:", "names no model"),
        (
            "torchvision:fasterrcnn_resnet50",
            r"no detector 'fasterrcnn_resnet50' \(did you mean fasterrcnn_resnet50_fpn",
        ),
        (f"torchvision:{SMALL}/{tmp_path}/no.pth", r"no.pth' cannot be read .*check the path"),
        (f"torchvision:{SMALL}/{tmp_path}/cut.safetensors", "cannot be read"),
        (f"torchvision:{SMALL}/{tmp_path}/model.pth", "hold more than tensors, or are damaged"),
        (f"torchvision:{SMALL}/{tmp_path}/list.pth", "are no state dict"),
        (f"torchvision:fcos_resnet50_fpn/{checkpoint}", "does not fit torchvision's fcos_resnet50_fpn"),
        (f"transformers:{clip_folder}", "is a clip model and no detector"),
        (f"transformers:{tmp_path}/broken", "cannot read the folder"),
        (str(tmp_path / "gone.json"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_detector(spec, device="cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelUnavailableError, match="cannot be found on this machine, nor fetched"):
        load_detector("transformers:PekingU/rtdetr_r50vd", device="cpu")
    with pytest.raises(InputError, match="threshold is 2"):
        load_detector("torchvision:fcos_resnet50_fpn", threshold=2)
    with pytest.raises(InputError, match="max_boxes is 0"):
        load_detector("torchvision:fcos_resnet50_fpn", max_boxes=0)
