"""From labelled images and an old encoder to a new one that searches the old index, measured on held-out images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from ...alignment.split import ImageSplits
from ...checks import at_least, in_range
from ...device import resolve_device
from ...encoders import Encoder, load_encoder
from ...encoders.compatible import CompatibleEncoder
from ...encoders.encoder import unit_rows
from ...encoders.hub import closest
from ...encoders.timm import TimmEncoder, preprocessing_of
from ...errors import InputError, reason_of
from ...features import extract_features
from ...features.items import hash_items
from ...imaging import DEFAULT_DECODING
from ...orthogonal import OrthogonalMap
from ...orthogonal_compatibility import class_prototypes
from ...pairs import read_labelled
from ..run_folder import check_same_run, check_target, data_digest, locked
from .recipe import Recipe
from .report import CompatibilityReport, measure, read_report
from .training import FineTuning

__all__ = ["fine_tune_compatible"]


def fine_tune_compatible(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    old_encoder: str | os.PathLike[str] | Encoder,
    backbone: str,
    pretrained: bool = True,
    extra_dim: int = 32,
    epochs: int = 100,
    warmup_epochs: int = 5,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 2**-15,
    label_smoothing: float = 0.1,
    weights: tuple[float, float, float] = (5.0, 10.0, 5.0),
    orthogonal_map: OrthogonalMap = "cayley",
    image_size: int = 224,
    flip: bool = True,
    test: float = 0.1,
    device: str | torch.device | None = None,
    workers: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CompatibilityReport:
    """Fine-tune a timm backbone on labelled images so that it searches what an old encoder has indexed: OCA.

    arXiv 2408.08793; see `mmalign.orthogonal_compatibility`. The result is a `CompatibleEncoder` of the old encoder's
    dimensions and `extra_dim` more. Whether it is compatible is measured, on images that nothing was trained on, and
    said in the report: it takes a backbone that can be better than the old encoder on these classes, and labels enough.
    The old space is taught by class means, so that mAP gains first; that the nearest image, too, is more often of the
    class (cmc@1) takes longer training.

    A stopped run goes on from its last checkpoint (at most a minute or an epoch old) when it is called again with the
    same arguments, and on a CPU ends in the same bits as one that was not stopped. Until it is done, checkpoints and
    old features are in `OUT.training` beside `out`. Called again after the end, it gives the report that there is.

    Args:
        data: a folder with one subfolder of images a class, or a file of lines with `file` and `label`, and, where they
            are to decide, `split` and `group`; see `pairs.read_labelled`. Images of a split "validation" are not used.
        out: folder of the encoder that is made, which is replaced if it is one.
        old_encoder: spec, folder or encoder whose index is to be searched; encodes images.
        backbone: a timm model, "resnet50", "resnet18.a1_in1k" or with "timm:" before it.
        pretrained: begin with its published weights; else at random.
        extra_dim: dimensions beside the old encoder's; 0 leaves no room for what the old space cannot tell apart.
        epochs: times that every training image is seen, on average.
        warmup_epochs: epochs until the full learning rate, fewer than `epochs`; half a cosine afterwards.
        batch_size: images a step, all training images if they are fewer.
        learning_rate: of Adam, highest.
        weight_decay: of Adam (added to the gradient), for all but the rotation.
        label_smoothing: see `oca_loss`.
        weights: see `oca_loss`.
        orthogonal_map: see `OrthogonalLinear`.
        image_size: side of the square that the network sees: the shorter side is resized to it and the centre cut out.
        flip: mirror every other training image, by chance.
        test: share of the images to measure on, where no line says which. Copies stay on one side.
        device: to train on; the fastest present by default. Also of an old encoder that is given by name.
        workers: decoding threads.
        seed: of split, initial weights, order and flips.
        progress: show bars.

    Raises:
        InputError: data, options or a folder that cannot be used, or a stopped run of other settings in the way.
        EncoderUnavailableError: weights that are not to be had.
        NonFiniteLossError: training diverged; the step is named.
    """
    recipe = Recipe(extra_dim, epochs, warmup_epochs, batch_size, learning_rate, weight_decay, label_smoothing,
                    tuple(weights), orthogonal_map, image_size, flip, seed)  # type: ignore[arg-type]  # fmt: skip
    in_range("test", test, 0, 0.9)
    at_least("workers", workers)
    target = Path(out).absolute()
    name = backbone.removeprefix("timm:")
    _check_backbone(name)
    where = resolve_device(device)
    old = old_encoder if isinstance(old_encoder, Encoder) else load_encoder(old_encoder, device=where)
    old.require("image")
    check_target(target, old, "the old encoder")
    images, root = read_labelled(data)
    files = [root / image.file for image in images]
    splits = ImageSplits.of(images, files, test=test, duplicates="drop", seed=seed, workers=workers, progress=progress)
    content = hash_items(files, "image", DEFAULT_DECODING, workers=workers, progress=False)[0]
    settings = {
        **asdict(recipe),
        "weights": list(recipe.weights),
        "backbone": name,
        "pretrained": pretrained,
        "old_encoder": old.fingerprint,
        "data": data_digest(content, images, splits),
    }
    finished = read_report(target)
    if finished.get("settings") == settings:
        return CompatibilityReport(**{**finished, "folder": str(target)})

    encoder = _fresh_encoder(name, pretrained, recipe, old)
    encoder.to(where)
    work = target.with_name(f"{target.name}.training")
    with locked(work):
        features = extract_features(old, files, modality="image", workers=workers, cache=work / "features",
                                    progress=progress)  # fmt: skip
        training = np.flatnonzero(splits.training & ~splits.validation & features.usable)
        test_rows = _first_of_each(features.content, np.flatnonzero(splits.test & features.usable))
        names = sorted({str(images[row].label) for row in training})
        if len(names) < 2:
            raise InputError(f"the training images are of {len(names)} classes; give images of two classes or more")
        numbers = {label: number for number, label in enumerate(names)}
        test_labels = _numbered([str(images[row].label) for row in test_rows], numbers)
        if not (np.bincount(test_labels) > 1).any():
            raise InputError(
                f"no class has two of the {len(test_rows)} images to measure on, and one is to find the other; give a "
                f"larger share `test` (it is {test:g}), or more images"
            )
        old_rows = unit_rows(torch.from_numpy(np.array(features["output"], np.float32)))
        labels = _numbered([str(images[row].label) for row in training], numbers)
        check_same_run(work, settings)

        prototypes = class_prototypes(torch.from_numpy(old_rows[training]), torch.from_numpy(labels), len(names))
        loop = FineTuning(encoder, [files[row] for row in training], labels, prototypes, recipe)
        loop.run(
            work / "checkpoint.safetensors", f"fine-tuning for {str(target)!r}", workers=workers, progress=progress
        )

        new_rows = encoder.encode_images([files[row] for row in test_rows], workers=workers, progress=progress)
        figures, compatible, gain, queries = measure(
            old_rows[test_rows], new_rows, encoder.compatible_rows(new_rows), test_labels
        )
        report = CompatibilityReport(
            figures,
            compatible,
            gain,
            {
                "training": len(training),
                "test": len(test_rows),
                "queries": queries,
                "classes": len(names),
                "left_out": len(features.skipped),
            },
            loop.history,
            settings,
            features.skipped,
            splits.warnings,
        )
        encoder.report = report.to_dict()
        encoder.save(target)
    shutil.rmtree(work, ignore_errors=True)
    return replace(report, folder=str(target))


def _check_backbone(name: str) -> None:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise InputError(
            f"timm has no model {architecture!r}{closest(architecture, timm.list_models())}; "
            "`mmalign encoders timm` lists them"
        )


def _fresh_encoder(name: str, pretrained: bool, recipe: Recipe, old: Encoder) -> CompatibleEncoder:
    """The backbone with an output layer of the old dimensions and the extra ones; drawn by the seed."""
    import timm

    architecture = name.partition(".")[0]
    options: dict[str, Any] = {"num_classes": old.dim + recipe.extra_dim}
    if getattr(timm.get_pretrained_cfg(architecture), "fixed_input_size", False):
        options["img_size"] = recipe.image_size
    if pretrained:
        TimmEncoder.from_spec(name)  # says what is wrong with the name, or with the weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            model = timm.create_model(name if pretrained else architecture, pretrained=pretrained, **options)
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, recipe.image_size, recipe.image_size))
        except Exception as error:
            raise InputError(
                f"backbone {name!r} cannot be made for image_size {recipe.image_size} and {options['num_classes']} "
                f"dimensions ({reason_of(error)}); give another"
            ) from None
    side = (recipe.image_size, recipe.image_size)
    return CompatibleEncoder(
        model,
        architecture,
        f"fine-tuned {architecture}",
        compatible_with=old.fingerprint,
        compatible_dim=old.dim,
        options=options,
        preprocessing=replace(preprocessing_of(model), size=side, resize="shortest", resize_to=None),
    )


def _numbered(labels: Sequence[str], numbers: dict[str, int]) -> Int[np.ndarray, " n"]:
    """Numbers of labels; those that nothing was trained on come after the others."""
    known = dict(numbers)
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)


def _first_of_each(content: Sequence[str], rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " kept"]:
    """A copy would find its original, whatever the encoder."""
    first: dict[str, int] = {}
    return np.unique([first.setdefault(content[row], row) for row in rows.tolist()]).astype(np.int64)
