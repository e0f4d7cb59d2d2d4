"""Encoders measured side by side, on captioned images and on labelled ones, with chance in the same table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int

from .errors import InputError
from .metrics import image_text_retrieval, zero_shot_accuracy, zero_shot_classifier
from .metrics.chance import chance_retrieval

if TYPE_CHECKING:
    from .encoders import Encoder

__all__ = ["Comparison", "ZeroShot", "class_prompts", "compare_retrieval", "compare_zero_shot", "named_templates"]

Rows = Float[np.ndarray, "n dim"]
_DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}


@dataclass(frozen=True)
class Comparison:
    """Image-text retrieval of several encoders over one set of captioned images.

    Attributes:
        figures: name -> direction -> hit@k, medr, and 95 % intervals `hit@k_low`, `hit@k_high`; "chance" first.
        images: in the gallery, each once.
        captions: in all.
        ks: depths.
        notes: what a person should know of the numbers.
    """

    figures: dict[str, dict[str, dict[str, float]]]
    images: int
    captions: int
    ks: tuple[int, ...] = (1, 5, 10)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "figures": self.figures,
            "images": self.images,
            "captions": self.captions,
            "ks": list(self.ks),
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> Comparison:
        """What `to_dict` gave."""
        return cls(**{**about, "ks": tuple(about["ks"])})

    def table(self) -> list[str]:
        """Lines for a terminal: R@k (the hit rate of CLIP papers) and median rank, both directions."""
        width = max(12, *(len(name) for name in self.figures))
        column = 7 * len(self.ks) + 9
        head = "".join(f"{f'R@{k}':>7}" for k in self.ks) + f"{'median':>9}"
        lines = [
            f"{'':<{width}}" + "".join(f"  {title:>{column}}" for title in _DIRECTIONS.values()),
            f"{'':<{width}}" + f"  {head}" * len(_DIRECTIONS),
        ]
        for name, directions in self.figures.items():
            cells = ""
            for direction in _DIRECTIONS:
                found = directions[direction]
                cells += "  " + "".join(f"{found[f'hit@{k}']:>7.3f}" for k in self.ks) + f"{found['medr']:>9g}"
            lines.append(f"{name:<{width}}{cells}")
        return lines


def compare_retrieval(
    encoded: Mapping[str, tuple[Rows, Rows]],
    owner: Int[np.ndarray, " m"],
    *,
    ks: tuple[int, ...] = (1, 5, 10),
    bootstrap: int | Literal["auto"] = "auto",
    seed: int = 0,
) -> Comparison:
    """Measure several (image rows, text rows) over the same images and captions, and chance beside them.

    Args:
        encoded: by name; [n, dim] and [m, dim], each name with a width of its own.
        owner: the image row that each text describes. Every image is in the gallery once.
        ks: depths.
        bootstrap: resamples for the 95 % intervals over queries; see `metrics.evaluate`.
        seed: of the resampling.
    """
    images = len(next(iter(encoded.values()))[0])
    figures = {"chance": chance_retrieval(owner, images, ks)}
    for name, (image_rows, text_rows) in encoded.items():
        figures[name] = image_text_retrieval(image_rows, text_rows, owner, ks=ks, bootstrap=bootstrap, seed=seed)
    notes = []
    if images < 100:
        notes.append(f"{images} images are few: the 95 % intervals are wide")
    return Comparison(figures, images, len(owner), tuple(ks), notes)


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification of several encoders.

    Attributes:
        figures: name -> top1_micro, top5_micro, top1_macro, top5_macro; "chance" first.
        images: classified.
        classes: names, in order.
        templates: texts made of each name.
        notes: what a person should know of the numbers.
    """

    figures: dict[str, dict[str, float]]
    images: int
    classes: list[str]
    templates: list[str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "figures": self.figures,
            "images": self.images,
            "classes": self.classes,
            "templates": self.templates,
            "notes": self.notes,
        }

    def table(self) -> list[str]:
        """Lines for a terminal."""
        columns = ("top1_micro", "top1_macro", "top5_micro", "top5_macro")
        width = max(12, *(len(name) for name in self.figures))
        lines = [f"{'':<{width}}" + "".join(f"{name:>12}" for name in columns)]
        for name, found in self.figures.items():
            lines.append(f"{name:<{width}}" + "".join(f"{found[column]:>12.3f}" for column in columns))
        return lines


def compare_zero_shot(
    encoders: Mapping[str, Encoder],
    images: Sequence[Any] | Mapping[str, Rows],
    labels: Sequence[str],
    *,
    templates: Sequence[str],
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> ZeroShot:
    """Classify images by the texts of their class names: every template encoded, averaged, normalised.

    Args:
        encoders: by name.
        images: paths or images, or unit rows by encoder name where they have been encoded.
        labels: class name of each image; the classes are those that occur.
        templates: texts with `{}` for the name.
        batch_size, workers, progress: see `Encoder.encode_images`.

    Raises:
        InputError: fewer than two classes, or a template without `{}`.
    """
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise InputError(f"labels name {len(classes)} class ({', '.join(classes)}); give images of at least two")
    true = np.array([classes.index(label) for label in labels])
    prompts = class_prompts(classes, templates)
    share = {k: min(1.0, k / len(classes)) for k in (1, 5)}
    figures = {"chance": {f"top{k}_{kind}": share[k] for k in share for kind in ("micro", "macro")}}
    for name, encoder in encoders.items():
        if isinstance(images, Mapping):
            rows = images[name]
        else:
            rows = encoder.encode_images(images, batch_size=batch_size, workers=workers, progress=progress)
        texts = encoder.encode_texts([text for of_class in prompts for text in of_class], batch_size=batch_size)
        weights = zero_shot_classifier(texts.reshape(len(classes), len(templates), -1))
        figures[name] = zero_shot_accuracy(rows, weights, true, ks=[1, min(5, len(classes))])
        for kind in ("micro", "macro"):
            figures[name].setdefault(f"top5_{kind}", 1.0)
    return ZeroShot(figures, len(labels), classes, list(templates))


def class_prompts(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """One text a class and template.

    Raises:
        InputError: a template without `{}`, or none.
    """
    wrong = next((template for template in templates if "{}" not in template), None)
    if wrong is not None or not templates:
        raise InputError(f"template {wrong!r} has no {{}} for the class name; give texts such as 'a photo of a {{}}'")
    return [[template.replace("{}", name) for template in templates] for name in classes]


def named_templates(name: str) -> list[str]:
    """Template lists that open_clip carries: "simple" (7) or "imagenet" (80).

    Raises:
        InputError: another name.
    """
    import open_clip

    lists = {"simple": open_clip.SIMPLE_IMAGENET_TEMPLATES, "imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES}
    if name not in lists:
        raise InputError(f"templates are {name!r}; give {' or '.join(lists)}, or a file with one text a line")
    return [make("{}") for make in lists[name]]
