"""Detectors of torchvision and transformers behind one call, and files of boxes in their place."""

from __future__ import annotations

import math
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import at_least, in_range
from ..device import resolve_device
from ..encoders.hub import closest, quiet_libraries, unavailable
from ..errors import InputError, MMAlignError, ModelUnavailableError, reason_of
from ..fingerprint import digest_of, token_probe
from ..imaging import read_image
from .boxes import Detections, Detector, read_boxes

__all__ = ["Detector", "ModelDetector", "TorchvisionDetector", "TransformersDetector", "load_detector"]

_FORMS = (
    "torchvision:fasterrcnn_resnet50_fpn_v2, torchvision:NAME/FILE.safetensors, transformers:ORG/REPO, a folder in "
    "transformers' layout, or a file of boxes (.json, .jsonl)"
)
_REMEDY = "give a folder in transformers' layout, or a file of boxes (.json, .jsonl)"
_OVERLAP = 0.7  # of two boxes (intersection over union) above which the surer one of an open-set detector stays
_NO_PHRASE = "an object"


def load_detector(
    spec: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    threshold: float | None = None,
    max_boxes: int = 100,
) -> Detector:
    """Load a detector, ready to use.

    Args:
        spec: `torchvision:NAME` of `torchvision.models.detection` with its COCO weights, `torchvision:NAME/FILE` with
            your own (.safetensors or .pth); `transformers:ORG/REPO` or a folder in transformers' layout: of a closed
            set of classes (DETR, RT-DETR, YOLOS and others), or an open one, which looks for phrases (OWL-ViT,
            Grounding DINO and others; OWLv2 finds objects without phrases, too); or a file for `read_boxes`.
        device: the fastest present by default.
        threshold: score from which on a box counts, in [0, 1]. By default 0.5 for closed sets, 0.1 for OWL-ViT and
            OWLv2, 0.25 for other open sets. Files of boxes are taken as they are.
        max_boxes: the surest that are kept.

    Raises:
        InputError: the spec cannot be understood, names no detector, or an option is out of range.
        ModelUnavailableError: the weights are not on this machine and cannot be fetched.
    """
    in_range("threshold", threshold, 0, 1)
    at_least("max_boxes", max_boxes)
    name = os.fspath(spec)
    prefix, _, rest = name.partition(":")
    if prefix in ("torchvision", "transformers") and not rest:
        raise InputError(f"detector {name!r} names no model; give {_FORMS}")
    if prefix == "torchvision":
        return TorchvisionDetector.from_spec(rest, threshold=threshold, max_boxes=max_boxes).to(device)
    if prefix == "transformers" or Path(name).is_dir():
        place = rest if prefix == "transformers" else name
        return TransformersDetector.from_spec(place, threshold=threshold, max_boxes=max_boxes).to(device)
    if Path(name).suffix.lower() in (".json", ".jsonl"):
        if threshold is not None:
            raise InputError(f"threshold is {threshold:g}, and boxes of the file {name!r} are taken as they are")
        return read_boxes(name)
    raise InputError(f"detector {name!r} is none of these; give {_FORMS}")


class ModelDetector(Detector):
    """A detector that is a network; images go through it one at a time, whatever thread they come from.

    Attributes:
        model: in float32.
        threshold: score from which on a box counts.
        max_boxes: the surest that are kept.
        categories: names by class number; `None` where the detector has none.
    """

    def __init__(
        self, model: nn.Module, spec: str, categories: Mapping[int, str] | None, threshold: float, max_boxes: int
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.spec, self.categories = spec, categories
        self.threshold, self.max_boxes = float(threshold), max_boxes
        self.device = torch.device("cpu")
        self._digest: str | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that changes the boxes besides weights and what every detector has, JSON-safe and free of paths."""

    @abstractmethod
    def found(self, pixels: Tensor, phrases: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
        """Boxes, scores and labels of a uint8 image 3 height width, in any order."""

    @property
    def digest(self) -> str:
        """Of weights, class names and settings; not of names, paths or the device."""
        if self._digest is None:
            names = None if self.categories is None else sorted(self.categories.items())
            about = {"categories": names, "threshold": self.threshold, "max_boxes": self.max_boxes, **self.describe()}
            with self._lock:
                self._digest = digest_of(about, self.model)
        return self._digest

    def to(self, device: str | torch.device | None) -> ModelDetector:
        """Move to a device, the fastest present by default, in place."""
        self.device = resolve_device(device)
        self.model.to(self.device)
        return self

    def detect(self, image: Any, *, content: bytes | None = None, phrases: Sequence[str] = ()) -> Detections:
        """See `Detector.detect`; `content` is not looked at."""
        if isinstance(phrases, str):
            phrases = [phrases]
        phrases = list(dict.fromkeys(" ".join(phrase.split()) for phrase in phrases if phrase.strip()))
        if self.needs_phrases and not phrases:
            raise InputError(
                f"detector {self.spec!r} looks for phrases and was given none; give some, or a detector of fixed "
                "classes such as torchvision:fasterrcnn_resnet50_fpn_v2"
            )
        pixels = read_image(image).pixels
        with self._lock, torch.inference_mode():
            boxes, scores, labels = self.found(pixels, phrases)
        boxes, scores = boxes.float().cpu(), scores.float().cpu()
        usable = (torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores) & (scores >= self.threshold)).numpy()
        order = [place for place in np.argsort(-scores.numpy(), kind="stable") if usable[place]]
        # A network may put one side before the other by a rounding error.
        corners = torch.stack([boxes.view(-1, 2, 2).amin(dim=1), boxes.view(-1, 2, 2).amax(dim=1)], dim=1).view(-1, 4)
        everything = Detections(
            corners.numpy()[order], scores.numpy()[order], tuple(labels[place] for place in order)
        ).within((pixels.shape[2], pixels.shape[1]), self.spec)
        keep = slice(self.max_boxes)
        return Detections(everything.boxes[keep], everything.scores[keep], everything.labels[keep])


# -- torchvision -------------------------------------------------------------------------------------------------------


class TorchvisionDetector(ModelDetector):
    """One of `torchvision.models.detection`: images in [0, 1] in, boxes in their pixels out; it resizes by itself."""

    def __init__(
        self,
        model: nn.Module,
        architecture: str,
        spec: str,
        categories: Sequence[str],
        *,
        threshold: float | None = None,
        max_boxes: int = 100,
    ) -> None:
        super().__init__(model, spec, dict(enumerate(categories)), 0.5 if threshold is None else threshold, max_boxes)
        self.architecture = architecture

    @classmethod
    def from_spec(cls, name: str, *, threshold: float | None = None, max_boxes: int = 100) -> TorchvisionDetector:
        """Load `NAME`, or `NAME/FILE`.

        Raises:
            InputError: no such detector, or the file does not hold its weights.
            ModelUnavailableError: torchvision's weights are neither in its cache nor to be fetched.
        """
        import torchvision
        from torchvision.models import get_model, get_model_weights, list_models

        known, (architecture, _, file) = list_models(torchvision.models.detection), name.partition("/")
        spec = f"torchvision:{name}"
        if architecture not in known:
            raise InputError(
                f"torchvision has no detector {architecture!r}{closest(architecture, known)}; give one of "
                f"{', '.join(known)}"
            )
        weights = get_model_weights(architecture).DEFAULT
        categories = list(weights.meta["categories"])
        if file:
            model, categories = _with_own_weights(architecture, Path(file), categories)
            return cls(model, architecture, spec, categories, threshold=threshold, max_boxes=max_boxes)
        _fetch(weights, spec)
        try:
            model = get_model(architecture, weights=weights, progress=False)
        except (OSError, RuntimeError) as error:
            raise ModelUnavailableError(f"the weights of {spec!r} cannot be read ({reason_of(error)})") from None
        return cls(model, architecture, spec, categories, threshold=threshold, max_boxes=max_boxes)

    def describe(self) -> dict[str, Any]:
        """Architecture, and what its own transform does."""
        transform: Any = self.model.transform
        sizes = [list(transform.min_size), transform.max_size, transform.fixed_size]
        return {
            "detector": "torchvision",
            "architecture": self.architecture,
            "transform": [*sizes, list(transform.image_mean), list(transform.image_std)],
        }

    def found(self, pixels: Tensor, phrases: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
        """As the model gives them."""
        (output,) = self.model([pixels.to(self.device).float() / 255])
        assert self.categories is not None
        labels = [self.categories.get(int(number), str(int(number))) for number in output["labels"]]
        return output["boxes"], output["scores"], labels


def _fetch(weights: Any, spec: str) -> None:
    """Have torchvision's weights in its cache, and see that they are tensors and no other pickled objects."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / weights.url.rpartition("/")[2]
    if HF_HUB_OFFLINE and not file.is_file():
        why = "HF_HUB_OFFLINE is set"
    else:
        try:
            weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            return
        except Exception as error:
            why = reason_of(error)
    if file.is_file():
        raise ModelUnavailableError(
            f"the weights of {spec!r} cannot be read ({why}); delete {str(file)!r} and run again"
        )
    raise ModelUnavailableError(
        f"the weights of {spec!r} are not in {str(folder)!r}, nor to be fetched ({why}); put {weights.url} there, give "
        f"torchvision:NAME/FILE with weights of your own, or {_REMEDY}"
    )


def _with_own_weights(architecture: str, file: Path, coco: list[str]) -> tuple[nn.Module, list[str]]:
    """A detector with as many classes as the weights in a file have; classes are named by number unless COCO's 91."""
    from torchvision.models import get_model

    own = _state_dict(file)

    def build(classes: int) -> nn.Module:
        return get_model(architecture, weights=None, weights_backbone=None, num_classes=classes)

    model, classes = build(len(coco)), len(coco)
    built = model.state_dict()
    # Class heads have a multiple of the number of classes as their outputs: by anchor, and by side of a box.
    wanted = {
        classes * len(own[name]) / len(tensor)
        for name, tensor in built.items()
        if name in own and tensor.ndim and own[name].ndim and len(own[name]) != len(tensor)
    }
    if len(wanted) == 1 and (number := wanted.pop()) == int(number) > 1:
        model, classes = build(int(number)), int(number)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise InputError(f"{str(file)!r} does not fit torchvision's {architecture} ({reason_of(error)})") from None
    names = coco if classes == len(coco) else ["__background__", *(f"class {n}" for n in range(1, classes))]
    return model, names


def _state_dict(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"detector weights {str(file)!r} cannot be read ({reason_of(error)}); check the path"
        ) from None
    except Exception:  # of the unpickler, of many kinds
        raise InputError(
            f"detector weights {str(file)!r} hold more than tensors, or are damaged; save the model's state_dict() as "
            ".safetensors or .pth"
        ) from None
    for key in ("model", "state_dict"):  # what training scripts wrap it in
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"detector weights {str(file)!r} are no state dict; save the model's state_dict()")
    return content


# -- transformers ------------------------------------------------------------------------------------------------------


class TransformersDetector(ModelDetector):
    """A detector of transformers, of a closed set of classes or an open one, with its own processor."""

    def __init__(
        self, model: Any, processor: Any, spec: str, *, threshold: float | None = None, max_boxes: int = 100
    ) -> None:
        self.open_vocabulary = hasattr(processor, "post_process_grounded_object_detection")
        family = str(model.config.model_type)
        # OWLv2 says of every patch how much it looks like any object.
        self.needs_phrases = self.open_vocabulary and not hasattr(model, "objectness_predictor")
        usual = 0.1 if family in ("owlvit", "owlv2") else 0.25 if self.open_vocabulary else 0.5
        names = None if self.open_vocabulary else {int(k): str(v) for k, v in model.config.id2label.items()}
        super().__init__(model, spec, names, usual if threshold is None else threshold, max_boxes)
        self.processor, self.family = processor, family

    @classmethod
    def from_spec(cls, name: str, *, threshold: float | None = None, max_boxes: int = 100) -> TransformersDetector:
        """Load `ORG/REPO` or a folder in transformers' layout.

        Raises:
            InputError: a model of another kind, or a folder that cannot be read.
            ModelUnavailableError: the files are neither cached nor to be fetched.
        """
        import transformers
        from transformers.models.auto import modeling_auto

        spec = f"transformers:{name}"
        try:
            config = transformers.AutoConfig.from_pretrained(name)
            closed = config.model_type in modeling_auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
            opened = config.model_type in modeling_auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES
            if not closed and not opened:
                raise InputError(
                    f"{spec!r} is a {config.model_type} model and no detector; give one such as "
                    "transformers:PekingU/rtdetr_r50vd or transformers:google/owlv2-base-patch16-ensemble"
                )
            kind = "AutoModelForObjectDetection" if closed else "AutoModelForZeroShotObjectDetection"
            with quiet_libraries():
                model = getattr(transformers, kind).from_pretrained(name).float()
                loader = transformers.AutoImageProcessor if closed else transformers.AutoProcessor
                processor = loader.from_pretrained(name)
        except MMAlignError:
            raise
        except Exception as error:
            if Path(name).is_dir():
                raise InputError(f"transformers cannot read the folder {name!r} ({reason_of(error)})") from None
            raise unavailable(spec, error, remedy=_REMEDY, error_class=ModelUnavailableError) from None
        return cls(model, processor, spec, threshold=threshold, max_boxes=max_boxes)

    def describe(self) -> dict[str, Any]:
        """Family, preprocessing and tokens."""
        images = getattr(self.processor, "image_processor", self.processor)
        about: dict[str, Any] = {"detector": "transformers", "family": self.family, "images": dict(_plain(images))}
        if self.open_vocabulary:
            tokenizer = self.processor.tokenizer
            about["tokens"] = token_probe(lambda texts: [tokenizer(text)["input_ids"] for text in texts])
        return about

    def found(self, pixels: Tensor, phrases: Sequence[str]) -> tuple[Tensor, Tensor, list[str]]:
        """As the processor reads the model's output."""
        size = [(int(pixels.shape[1]), int(pixels.shape[2]))]
        if self.open_vocabulary:
            return self._grounded(pixels, phrases, size)
        inputs = self.processor(images=[pixels], input_data_format="channels_first", return_tensors="pt")
        output = self.model(**inputs.to(self.device))
        (result,) = self.processor.post_process_object_detection(output, threshold=self.threshold, target_sizes=size)
        assert self.categories is not None
        labels = [self.categories.get(int(number), str(int(number))) for number in result["labels"]]
        return result["boxes"], result["scores"], labels

    def _grounded(
        self, pixels: Tensor, phrases: Sequence[str], size: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[str]]:
        from inspect import signature

        from torchvision.ops import nms

        asked, texts = list(phrases) or [_NO_PHRASE], {"truncation": True}
        longest = getattr(self.model.config, "max_text_len", None)  # Grounding DINO fails beyond
        if longest is not None:
            texts["max_length"] = min(longest, self.processor.tokenizer.model_max_length)
        inputs = self.processor(
            images=[pixels], text=[asked], input_data_format="channels_first", return_tensors="pt", **texts
        ).to(self.device)
        output = self.model(**inputs)
        if not phrases:
            output.logits = output.objectness_logits[..., None]
        read = self.processor.post_process_grounded_object_detection
        options: dict[str, Any] = {"threshold": self.threshold, "target_sizes": size, "text_labels": [asked]}
        if "input_ids" in signature(read).parameters:
            options["input_ids"] = inputs["input_ids"]
        (result,) = read(output, **options)
        kept = nms(result["boxes"].float(), result["scores"].float(), _OVERLAP)
        named = result["text_labels"] if phrases else [""] * len(result["scores"])
        return result["boxes"][kept], result["scores"][kept], [str(named[place]) for place in kept.tolist()]


def _plain(processor: Any) -> Iterator[tuple[str, Any]]:
    """What an image processor does, without names, versions and what is not set."""
    for name, value in sorted(processor.to_dict().items()):
        counts = name.startswith(("do_", "size", "crop", "pad", "image_mean", "image_std", "rescale", "resample"))
        if counts and value is not None:
            if isinstance(value, float) and not math.isfinite(value):
                value = str(value)
            yield name, dict(value) if isinstance(value, Mapping) else value
