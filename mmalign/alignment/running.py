"""From captioned images and two frozen encoders to an encoder that indexes folders, with an honest report inside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..checks import at_least, in_range, one_of
from ..encoders import Encoder, load_encoder
from ..encoders.states import POOLINGS, Layer, check_layer
from ..errors import InputError
from ..evaluation import class_prompts, compare_zero_shot, named_templates
from ..features import Features, extract_features
from ..layer_selection import SCORES, layer_scores
from ..pairs import CaptionedImage, read_captioned
from .baselines import encoded_by, fit_beside_baselines, report_of
from .measuring import seen_before
from .methods import METHODS, options_of
from .report import AlignmentRun
from .split import ImageSplits, PairSubset

__all__ = ["align_encoders"]

_Side = Literal["image", "text"]


def align_encoders(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    image_encoder: str | os.PathLike[str] | Encoder,
    text_encoder: str | os.PathLike[str] | Encoder,
    method: str = "structure",
    options: Mapping[str, Any] | None = None,
    layers: str | Sequence[int | str] = "select",
    layer_score: Literal["cka", "mutual-knn"] | None = None,
    pooling: Literal["cls", "mean"] | None = None,
    sample: int = 5000,
    validation: float = 0.1,
    test: float = 0.1,
    duplicates: Literal["refuse", "drop"] = "refuse",
    against: str | os.PathLike[str] | Encoder | None = None,
    templates: str | Sequence[str] = "simple",
    cache: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    batch_size: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> AlignmentRun:
    """Join an image encoder and a text encoder with captioned images, and measure what came of it.

    Both encoders stay as they are; their features are extracted once (and cached), and heads of a few hundred thousand
    numbers are fitted on them. Test images are seen by nothing before the end; layers are chosen on training images.
    Ridge regression and shrunk canonical correlation are fitted on the same pairs and stand beside the result.

    Args:
        data: captioned images; see `pairs.read_captioned`. Lines may say `split` (train, validation, test), `group`
            (stays on one side) and `label` (class, for zero-shot classification of the test images).
        out: folder of the encoder that is made, which is replaced if it is one; `None` saves nothing.
        image_encoder: spec, folder or encoder with an image tower.
        text_encoder: with a text tower.
        method: see `align`.
        options: of the method; see `FitOptions` and its neighbours.
        layers: "select" takes the pair of layers that are most alike by `layer_score`, "last"
            the last blocks, "output" the encoders' own features, or (image layer, text layer).
        layer_score: what "select" goes by: "cka" by default, or "mutual-knn", as STRUCTURE's authors do; see
            `layer_scores`. Mutual kNN prefers narrow layers of convolutional networks, which hold less (README).
        pooling: of image tokens, "cls" or "mean"; by default the class token where there is one.
        sample: training images that layers are chosen on, at most.
        validation: share of the training images held out while fitting, where the data name none.
        test: share of the images to measure on, where the data name none.
        duplicates: what to do with images of equal content (or group) in training and test, where the data name the
            splits: "refuse", or "drop" them from training. Splits made here keep them together.
        against: another encoder for the report, such as an off-the-shelf CLIP.
        templates: for zero-shot classification: "simple", "imagenet", or texts with `{}`.
        cache: folder for features; `mmalign-features` beside `out` by default, none without `out`.
        device: where encoders that are given by name are loaded, and heads fitted; the fastest present by default.
        dtype: of the image towers of encoders that are given by name.
        batch_size: items a forward pass.
        workers: decoding threads.
        seed: of splits and fit.
        progress: show bars.

    Raises:
        InputError: data that cannot be read or split, duplicates across the splits (named), layers that do not exist.
        EncoderUnavailableError: weights that are not to be had.
    """
    layers = layers if isinstance(layers, str) else tuple(layers)
    if dtype != "float32" and all(one is None or isinstance(one, Encoder) for one in (image_encoder, against)):
        raise InputError(
            f"dtype is {dtype!r}, and the image encoder is loaded already; call its `to`, or give its spec"
        )
    _check_arguments(out, method, options, layers, layer_score, pooling, sample, validation, test, duplicates, seed)
    template_list = named_templates(templates) if isinstance(templates, str) else list(templates)
    class_prompts(["any"], template_list)
    images, root = read_captioned(data)
    bare = sum(not image.captions for image in images)
    images = [image for image in images if image.captions]
    files = [root / image.file for image in images]
    splits = ImageSplits.of(images, files, test=test, duplicates=duplicates, seed=seed,
                            workers=workers, progress=progress)  # fmt: skip
    towers: dict[_Side, Encoder] = {
        "image": _loaded(image_encoder, ("image",), device, dtype),
        "text": _loaded(text_encoder, ("text",), device, "float32"),
    }
    rival = None if against is None else _loaded(against, ("image", "text"), device, dtype)
    if out is not None and towers["image"]._rounded:
        towers["image"]._in_full()  # what cannot be saved is to be known before the work
    if cache is None and out is not None:
        cache = Path(out).absolute().parent / "mmalign-features"
    extract = _Extraction(towers, pooling, cache, batch_size, workers, progress)

    chosen, scores = _choose(layers, layer_score or "cka", extract, images, files, splits, sample, seed)
    features = extract("image", files, [chosen[0]])
    captions = [caption for image in images for caption in image.captions]
    owner = np.repeat(np.arange(len(images)), [len(image.captions) for image in images])
    texts = extract("text", captions, [chosen[1]])

    training = PairSubset.of(features, texts, owner, splits.training & features.usable)
    named = splits.validation[training.rows]
    labels = [images[row].label for row in training.rows]
    fits = fit_beside_baselines(
        training,
        method,
        options or {},
        validation=named if named.any() else validation,
        groups=None if named.any() else splits.groups[training.rows].tolist(),
        labels=None if None in labels else labels,
        device=device,
        seed=seed,
        progress=progress,
    )
    encoder = fits[method].encoder(towers["image"], towers["text"])
    encoder.baselines = {name: dict(fit.heads) for name, fit in fits.items() if name != method}
    encoder.fitted_on = frozenset(training.images.content)

    measured = PairSubset.of(features, texts, owner, splits.test & features.usable)
    encoded = encoded_by(fits, measured)
    judges: dict[str, Encoder] = {name: encoder.variant(name) for name in fits}
    warnings = [*splits.warnings, *fits[method].warnings]
    if rival is not None:
        name = rival.spec if rival.spec not in encoded else f"{rival.spec} (given)"
        judges[name] = rival
        warnings += seen_before(name, rival, measured.images)
        encoded[name] = (
            rival.encode_images([files[row] for row in measured.rows], batch_size=batch_size, workers=workers,
                                progress=progress),
            rival.encode_texts([captions[text] for text in measured.text_rows], batch_size=batch_size,
                               progress=progress),
        )  # fmt: skip
    test_labels = [images[row].label for row in measured.rows]
    zero_shot = None
    if None not in test_labels and len(set(test_labels)) > 1:
        rows = {name: pair[0] for name, pair in encoded.items()}
        zero_shot = compare_zero_shot(judges, rows, [str(label) for label in test_labels], templates=template_list,
                                      batch_size=batch_size)  # fmt: skip
    if copies := training.copies + measured.copies:
        warnings.append(f"{copies} images are copies of others; each counts once, with the captions of all")
    if bare:
        warnings.append(f"{bare} images have no caption and are left out")
    if skipped := features.skipped:
        warnings.append(f"{len(skipped)} images could not be read and are left out (first: {skipped[0]['message']})")
    encoder.report = fits[method].report = report_of(
        fits,
        encoded,
        measured,
        seed,
        zero_shot=zero_shot and zero_shot.to_dict(),
        layers=scores,
        data=os.fspath(Path(data).absolute()),
        images=len(images),
        captions=len(captions),
        encoders={side: {"spec": tower.spec, "fingerprint": tower.fingerprint} for side, tower in towers.items()},
        warnings=warnings,
        skipped=features.skipped,
    )
    folder = None if out is None else encoder.save(out)
    return AlignmentRun(encoder, fits[method], encoder.report, folder, warnings)


def _check_arguments(
    out: str | os.PathLike[str] | None,
    method: str,
    options: Mapping[str, Any] | None,
    layers: str | tuple[int | str, ...],
    layer_score: str | None,
    pooling: str | None,
    sample: int,
    validation: float,
    test: float,
    duplicates: str,
    seed: int,
) -> None:
    """All that can be refused before anything is read."""
    options_of(method, options or {})
    if not METHODS[method].paired:
        raise InputError(f"method {method!r} is for sets that are not paired, and captions are; call `align` for it")
    if isinstance(layers, str):
        one_of("layers", layers, ("select", "last", "output"))
    elif len(layers) != 2:
        raise InputError(f"layers is {layers!r}; give (image layer, text layer)")
    if layer_score is not None:
        one_of("layer_score", layer_score, SCORES)
        if layers != "select":
            raise InputError(f"layer_score is {layer_score!r}, and layers are given; leave one of them out")
    if pooling is not None:
        one_of("pooling", pooling, POOLINGS)
        if layers == "output" or layers[0] == "output":
            raise InputError(
                f"pooling is {pooling!r}, and the image layer 'output' is pooled already; leave it out or give layers"
            )
    in_range("validation", validation, 0, 0.9)
    in_range("test", test, 0, 0.9)
    at_least("sample", sample, 10)
    at_least("seed", seed, 0)
    one_of("duplicates", duplicates, ("refuse", "drop"))
    if out is not None and Path(out).exists() and not (Path(out) / "encoder.json").is_file():
        raise InputError(f"{os.fspath(out)!r} exists and is not an encoder folder; choose another path")


def _loaded(encoder: Any, sides: Sequence[_Side], device: Any, dtype: Any) -> Encoder:
    found = encoder if isinstance(encoder, Encoder) else load_encoder(encoder, device=device, dtype=dtype)
    for side in sides:
        found.require(side)
    return found


@dataclass(frozen=True)
class _Extraction:
    """Features of either side, by one set of options."""

    towers: Mapping[_Side, Encoder]
    pooling: Literal["cls", "mean"] | None
    cache: str | os.PathLike[str] | None
    batch_size: int | None
    workers: int | None
    progress: bool

    def __call__(self, side: _Side, data: Sequence[Any], layers: Sequence[Layer]) -> Features:
        return extract_features(
            self.towers[side],
            data,
            modality=side,
            layers=layers,
            pooling=self.pooling if side == "image" and list(layers) != ["output"] else None,
            cache=self.cache,
            batch_size=self.batch_size,
            workers=self.workers if side == "image" else None,
            progress=self.progress,
        )


def _choose(
    layers: str | tuple[int | str, ...],
    layer_score: str,
    extract: _Extraction,
    images: Sequence[CaptionedImage],
    files: Sequence[Path],
    splits: ImageSplits,
    sample: int,
    seed: int,
) -> tuple[tuple[Layer, Layer], dict[str, Any] | None]:
    """The layer of each side; and the table of scores if they were chosen by it."""
    towers = extract.towers
    if isinstance(layers, tuple):
        return (check_layer(towers["image"], "image", layers[0]), check_layer(towers["text"], "text", layers[1])), None
    if layers == "output":
        return ("output", "output"), None
    if layers == "last":
        return (check_layer(towers["image"], "image", -1), check_layer(towers["text"], "text", -1)), None
    rows = np.flatnonzero(splits.training)
    # One image a group: copies are each other's neighbours in any layer.
    rows = rows[np.sort(np.unique(splits.groups[rows], return_index=True)[1])]
    rows = np.sort(np.random.default_rng((seed, 4)).permutation(rows)[:sample]).tolist()
    names: dict[_Side, list[Layer]] = {
        side: [*range(towers[side].layer_count(side)), "output"] for side in ("image", "text")
    }
    of_images = extract("image", [files[row] for row in rows], names["image"])
    of_texts = extract("text", [images[row].captions[0] for row in rows], names["text"])
    keep = of_images.usable
    table = layer_scores(
        [np.asarray(of_images[name])[keep] for name in names["image"]],
        [np.asarray(of_texts[name])[keep] for name in names["text"]],
        score=layer_score,
        seed=seed,
        progress=extract.progress,
    )
    best = names["image"][table.best[0]], names["text"][table.best[1]]
    scores = {
        "table": table.table.tolist(),
        "image_layers": names["image"],
        "text_layers": names["text"],
        "chosen": list(best),
        "score": float(table.table[table.best]),
        "own": float(table.table[-1, -1]),
        "score_name": layer_score,
        "k": table.k,
        "chance": table.chance,
        "rows": table.n,
    }
    return best, scores
