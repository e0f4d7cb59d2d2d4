"""A detector and how much its objects count, as one text: what follows `objects:` in a spec, and `--objects`."""

from __future__ import annotations

import inspect
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .boxes import BoxesFile, Detections, Detector, read_boxes
from .detectors import load_detector
from .perturbing import PerturbationSettings

__all__ = ["ObjectsSpec"]

_KINDS: dict[str, type] = {
    "alpha": float,
    "energy": float,
    "rank": int,
    "keep_norm": bool,
    "max_objects": int,
    "threshold": float,
    "max_boxes": int,
    "images": str,
}
_SETTING = re.compile(rf"(.*),\s*({'|'.join(_KINDS)})\s*=([^,]*)", re.DOTALL | re.IGNORECASE)
_USUAL_BOXES = inspect.signature(load_detector).parameters["max_boxes"].default
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class ObjectsSpec:
    """`DETECTOR,alpha=4,threshold=0.3` in parts.

    Attributes:
        detector: what `load_detector` takes.
        settings: of the perturbation.
        threshold: of the detector; `None` for its own.
        max_boxes: of the detector; `None` for the usual number.
        images: of a file of boxes, the folder of the images it names; `None` for the folder it is in.
    """

    detector: str
    settings: PerturbationSettings = field(default_factory=PerturbationSettings)
    threshold: float | None = None
    images: str | None = None
    max_boxes: int | None = None

    def __post_init__(self) -> None:
        for name in (self.detector, self.images or ""):
            if "|" in name:
                raise InputError(f"{name!r} has a |, behind which a spec names the encoder; rename it")
        if "," in (self.images or ""):
            raise InputError(f"images={self.images} has a comma, behind which a spec has settings; rename the folder")

    @classmethod
    def parse(cls, text: str) -> ObjectsSpec:
        """Read a detector, and settings by name after it. Paths become absolute, as the text may be recorded.

        Raises:
            InputError: no detector, or a setting that is none or out of range.
        """
        given: dict[str, Any] = {}
        rest = text
        while match := _SETTING.fullmatch(rest):
            rest, name, value = match[1], match[2].lower(), match[3].strip()
            if name in given:
                raise InputError(f"{name} stands twice in {text!r}; give it once")
            given[name] = _value(name, value, text)
        if not rest.strip():
            raise InputError(
                f"{text!r} names no detector; give for example torchvision:fasterrcnn_resnet50_fpn_v2, or a file of "
                "boxes"
            )
        unknown = re.fullmatch(r"\s*([a-z_]+)\s*=.*", rest.rpartition(",")[2], re.DOTALL | re.IGNORECASE)
        if unknown:
            raise InputError(f"{unknown[1]!r} in {text!r} is no setting; there are {', '.join(_KINDS)}")
        threshold, images, most = (given.pop(name, None) for name in ("threshold", "images", "max_boxes"))
        if images is not None:
            images = os.path.abspath(images)
        return cls(_lasting(rest), PerturbationSettings(**given), threshold, images, most)

    @classmethod
    def of(cls, detector: Detector, settings: PerturbationSettings) -> ObjectsSpec:
        """Of a detector that is loaded."""
        threshold, most, images = (getattr(detector, name, None) for name in ("threshold", "max_boxes", "images"))
        return cls(_lasting(detector.spec), settings, threshold, images, None if most == _USUAL_BOXES else most)

    @property
    def of_file(self) -> bool:
        """Whether it is a file of boxes."""
        is_file = Path(self.detector).suffix.lower() in (".json", ".jsonl") and not Path(self.detector).is_dir()
        return is_file and not self.detector.startswith(("torchvision:", "transformers:"))

    def require_file(self) -> None:
        """Look for the file of boxes now, where it is one, which `load` leaves for later.

        Raises:
            InputError: it is not there.
        """
        if self.of_file and not Path(self.detector).is_file():
            raise InputError(f"boxes {self.detector!r} are not there; check the path")

    def load(self, device: str | torch.device | None = None) -> Detector:
        """The detector. A file of boxes is read when the first image is looked at.

        Raises:
            InputError: as `load_detector`.
            ModelUnavailableError: the weights are not on this machine and cannot be fetched.
        """
        if self.of_file and self.max_boxes is not None:
            raise InputError(
                f"max_boxes={self.max_boxes} is for a detector, and boxes of the file {self.detector!r} are taken as "
                "they are; leave it out, or give max_objects"
            )
        if self.of_file and self.threshold is None:
            return _ReadLater(self.detector, self.images)
        if self.images is not None:
            raise InputError(f"images={self.images} is for a file of boxes, not for {self.detector!r}; leave it out")
        most = _USUAL_BOXES if self.max_boxes is None else self.max_boxes
        return load_detector(self.detector, device=device, threshold=self.threshold, max_boxes=most)

    def __str__(self) -> str:
        usual = vars(PerturbationSettings())
        said = {name: value for name, value in vars(self.settings).items() if value != usual[name]}
        about = {name: getattr(self, name) for name in ("threshold", "max_boxes", "images")}
        said |= {name: value for name, value in about.items() if value is not None}
        return self.detector + "".join(f",{name}={value}" for name, value in said.items())


class _ReadLater(BoxesFile):
    """A file of boxes that a search in words never needs: all images it names are read for their contents' hashes."""

    def __init__(self, spec: str, images: str | None) -> None:
        super().__init__({}, spec, images=images)
        self._file: BoxesFile | None = None
        self._reading = threading.Lock()

    def _read(self) -> BoxesFile:
        with self._reading:
            if self._file is None:
                self._file = read_boxes(self.spec, self.images)
            return self._file

    def __len__(self) -> int:
        return len(self._read())

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._read()

    @property
    def missing(self) -> tuple[str, ...]:
        return self._read().missing

    @property
    def named(self) -> int:
        return self._read().named

    def detect(self, image: Any, *, content: bytes | None = None, phrases: Sequence[str] = ()) -> Detections:
        return self._read().detect(image, content=content, phrases=phrases)


def _value(name: str, value: str, text: str) -> Any:
    kind = _KINDS[name]
    try:
        return _FLAGS[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        wanted = "yes or no" if kind is bool else "a whole number" if kind is int else "a number"
        raise InputError(f"{name}={value} in {text!r} cannot be used; give {wanted}") from None


def _lasting(detector: str) -> str:
    """A detector's spec with paths made absolute."""
    prefix, colon, rest = detector.partition(":")
    if colon and not rest:
        return detector  # a name that is missing is not the folder one is in
    if colon and prefix == "torchvision":
        name, slash, file = rest.partition("/")
        return f"{prefix}:{name}/{os.path.abspath(file)}" if slash else detector
    if colon and prefix == "transformers":
        return f"{prefix}:{os.path.abspath(rest)}" if Path(rest).is_dir() else detector
    return os.path.abspath(detector) if Path(detector).exists() else detector
