"""From images and a vision-only teacher to an encoder whose image tower sees more alike, and whose texts still fit."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ...alignment.split import ImageSplits
from ...checks import at_least, in_range, one_of
from ...device import resolve_device
from ...encoders import Encoder, load_encoder
from ...encoders.encoder import unit_rows
from ...encoders.timm import TimmEncoder
from ...errors import InputError
from ...evaluation import compare_retrieval, compare_zero_shot, named_templates
from ...features import Features, extract_features
from ...features.items import hash_items
from ...imaging import DEFAULT_DECODING
from ...kernel_alignment import (
    CosineKernel,
    GaussianKernel,
    Kernel,
    PolynomialKernel,
    fit_kernel_offset,
    median_distance,
    teacher_kernel,
)
from ...pairs import CaptionedImage, read_images
from ..run_folder import check_same_run, check_target, data_digest, locked
from .recipe import Adaptation, KernelKind, Precision, Recipe
from .report import KernelReport, drift_of, kernel_errors, read_report, write_report
from .training import HeldOut, KernelAlignmentLoop

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TEACHER", "align_to_teacher"]

TEACHER = "timm:vit_large_patch14_reg4_dinov2.lvd142m"
# Other processes wait while one extracts the features of all images; the usual ten minutes would end the run.
_PATIENCE = timedelta(hours=48)
_SAMPLE = 1000  # rows that a kernel's parameter is fitted on
_LOOKED_AT = 128  # held-out images that are looked at while training


def align_to_teacher(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    student: str | os.PathLike[str] | Encoder,
    teacher: str | os.PathLike[str] | Encoder = TEACHER,
    teacher_size: int | None = 224,
    teacher_view: Literal["own", "student"] = "own",
    kernel: KernelKind = "polynomial",
    degree: int | None = None,
    offset: float | None = None,
    sigma: tuple[float, float] | None = None,
    train_kernel: bool = False,
    kernel_learning_rate: float | None = None,
    weight: float = 0.5,
    reg_weight: float = 1.0,
    adaptation: Adaptation = "full",
    rank: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    batch_size: int = 64,
    learning_rate: float | None = None,
    weight_decay: float = 1e-4,
    warmup: float = 0.07,
    precision: Precision = "float32",
    gradient_checkpointing: bool = False,
    check_every: int | None = None,
    texts: Sequence[str] | None = None,
    test: float = 0.1,
    cache: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    workers: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> KernelReport:
    """Fine-tune the image tower of a CLIP on images alone, towards a vision-only teacher: KUEA, arXiv 2506.02557.

    See `mmalign.kernel_alignment` for the loss. Not a bit of the text tower changes; image vectors do, so that
    indices are to be built anew (`mmalign upgrade`). What the paper found with 1.28 million images: zero-shot accuracy
    over 12 sets 65.3 -> 66.5 (ViT-L/14), Flickr30k R@1 +1.6 and +2.3 at 336 px; ImageNet by itself gains little.

    The result is an encoder of the student's kind with the original text tower. Features of the teacher and of the
    original tower are extracted once, as nothing is augmented. Batch norms and dropout stay as in evaluation.

    A stopped run goes on from its last checkpoint when it is called again with the same arguments, and on a CPU ends in
    the same bits as one that was not stopped. Until it is done, checkpoints and features are in `OUT.training` beside
    `out`. Called again after the end, it gives the report that there is. Under `accelerate launch` the processes share
    every batch, whose kernel is of all its images; features are extracted by the first.

    Args:
        data: a folder of images, at any depth; or captioned images, see `pairs.read_images`: captions and labels of
            held-out images serve the report alone. Lines may say `split` ("validation" is not used) and `group`.
        out: folder of the encoder that is made, which is replaced if it is one.
        student: spec, folder or encoder with both towers; an encoder is copied.
        teacher: spec, folder or encoder with an image tower; DINOv2 ViT-L/14 with registers by default. An encoder is
            left on the CPU.
        teacher_size: side that a timm teacher sees (DINOv2's own 518 takes 5 times as long); `None` for its own.
        teacher_view: "own", the teacher's preprocessing; or "student", the student's crop and colour statistics, as in
            the released code.
        kernel: of the student: "polynomial" (the teacher's is the authors': gamma 1/width, offset 1), "gaussian" or
            "cosine" (the teacher's likewise).
        degree: of polynomial kernels; 3 by default.
        offset: of the student's polynomial kernel at gamma 1, 59.88 for ViT-L-14 in the paper; fitted on 1,000 training
            images by default, see `fit_kernel_offset`.
        sigma: of Gaussian kernels, student and teacher; the median distances of 1,000 training images by default.
        train_kernel: also train the student kernel's offset or sigma (its logarithm). The paper says it does, its code
            does not.
        kernel_learning_rate: for that; 1e-3 by default.
        weight, reg_weight: see `kernel_alignment_loss`.
        adaptation: "full", all weights of the image tower, or "lora", which is merged in the end.
        rank: of the LoRA, 16 by default; alpha is the same.
        epochs: times that every training image is seen, on average; 2 by default.
        steps: optimiser steps, instead of `epochs`.
        batch_size: images whose kernel is compared, over all processes; all training images if they are fewer. The
            larger, the more of the pairs are unrelated and agree already: watch `nearest` in the history.
        learning_rate: of AdamW, highest; 1e-5, or 1e-4 for a LoRA (ours).
        weight_decay: of AdamW.
        warmup: share of the steps until the full learning rate; half a cosine to 0 afterwards.
        precision: "bfloat16" for autocast; losses stay in float32.
        gradient_checkpointing: less memory for a quarter more time.
        check_every: steps between looks at 128 held-out images; 40 looks a run by default.
        texts: looked at then; by default the captions of held-out images, or where there are none the names of
            ImageNet's classes.
        test: share of the images to measure on, where no line says which. Copies stay on one side.
        cache: folder for features of both models, which further runs find there; by default `OUT.training`, which goes.
        device: to train on; the fastest present by default.
        workers: decoding threads.
        seed: of split, order and LoRA.
        progress: show bars.

    Raises:
        InputError: data, options or a folder that cannot be used, or a stopped run of other settings in the way.
        EncoderUnavailableError: weights that are not to be had.
        NonFiniteLossError: training diverged; the step is named.
        LockedError: another process trains there.
    """
    recipe = Recipe(
        kernel, degree, offset, sigma, train_kernel, kernel_learning_rate, weight, reg_weight, adaptation, rank,
        epochs, steps, batch_size, learning_rate, weight_decay, warmup, precision, gradient_checkpointing, check_every,
        seed,
    )  # fmt: skip
    one_of("teacher_view", teacher_view, ("own", "student"))
    if isinstance(texts, str):
        raise InputError(f"texts are {texts!r}, one text; give a list")
    at_least("teacher_size", teacher_size, 8)
    at_least("workers", workers)
    in_range("test", test, 0, 1)
    target = Path(out).absolute()
    accelerator = _accelerator(device, recipe)
    where = accelerator.device if device is None or accelerator.num_processes > 1 else resolve_device(device)
    given = student if isinstance(student, Encoder) else load_encoder(student, device=where)
    _check_student(given)
    encoder = copy.deepcopy(given) if given is student else given
    check_target(target, encoder, "the student")
    guide = _teacher(teacher, teacher_size, where)
    if teacher_view == "student":
        guide = _seeing_as(guide, encoder)

    images, root = read_images(data)
    files = [root / image.file for image in images]
    shown = progress and accelerator.is_main_process
    splits = ImageSplits.of(images, files, test=test, duplicates="drop", seed=seed, workers=workers, progress=shown)
    settings = {
        **asdict(recipe),
        "sigma": None if sigma is None else list(sigma),
        "student": encoder.fingerprint,
        "teacher": guide.fingerprint,
        "texts": None if texts is None else list(texts),
        "data": _digest(images, files, splits, workers),
    }
    work = target.with_name(f"{target.name}.training")
    run = _Run(
        encoder.to(where), guide.to(where), recipe, images, files, splits, texts, settings, target, work,
        Path(cache) if cache is not None else work / "features", accelerator, workers, shown,
    )  # fmt: skip
    return run.result()


@dataclass(frozen=True)
class _Run:
    """Everything that has been checked, and what becomes of it."""

    encoder: Encoder
    teacher: Encoder
    recipe: Recipe
    images: list[CaptionedImage]
    files: list[Path]
    splits: ImageSplits
    texts: Sequence[str] | None
    settings: dict[str, Any]
    target: Path
    work: Path
    cache: Path
    accelerator: Accelerator
    workers: int | None
    progress: bool

    def result(self) -> KernelReport:
        """The report that there is, or that of a run from where the last one stopped."""
        main = self.accelerator.is_main_process
        finished = read_report(self.target)
        if finished.get("settings") != self.settings:
            with locked(self.work) if main else nullcontext():
                self._train()
            finished = read_report(self.target)
        if main:
            shutil.rmtree(self.work, ignore_errors=True)
        return KernelReport(**{**finished, "folder": str(self.target)})

    def _train(self) -> None:
        main = self.accelerator.is_main_process
        if main:
            check_same_run(self.work, self.settings)
        student, guide = self._features()
        usable = student.usable & guide.usable
        z0, t = (np.array(features["output"], np.float32) for features in (student, guide))
        training = np.flatnonzero(self.splits.training & ~self.splits.validation & usable)
        rows = np.flatnonzero(self.splits.test & usable)
        measured = _Measured.of(self.images, self.files, student.content, rows, self.encoder, z0, t)
        if len(training) < 2 or len(measured.files) < 2:
            raise InputError(
                f"{len(training)} images to train on and {len(measured.files)} to measure on can be read, and it takes "
                "2 of each; give more images"
            )
        kernels = _kernels(self.recipe, z0[training], t[training])
        loop = KernelAlignmentLoop(
            self.encoder, [self.files[row] for row in training], z0[training], t[training], kernels, self.recipe,
            measured.looked_at(self.texts), self.accelerator,
        )  # fmt: skip
        loop.run(
            self.work / "checkpoint.safetensors", f"kernel alignment for {str(self.target)!r}", workers=self.workers,
            progress=self.progress,
        )  # fmt: skip
        settled = loop.student_kernel()
        loop.tower.finish()
        self.encoder._fingerprint = None
        self.encoder.note_training(student.content[row] for row in training)
        if main:
            report = measured.report(kernels, loop, self.workers, self.progress)
            report.counts |= {"training": len(training), "left_out": len(student.skipped)}
            report.kernels = {"student": _told(kernels[0]), "teacher": _told(kernels[1]), "trained": _told(settled)}
            report.settings, report.skipped, report.warnings = self.settings, student.skipped, self.splits.warnings
            report.folder = str(self.encoder.save(self.target))
            write_report(report, self.target)
        self.accelerator.wait_for_everyone()

    def _features(self) -> tuple[Features, Features]:
        """Of the original student and of the teacher, which then makes room; others find in the cache what one did."""
        found = []
        with self.accelerator.main_process_first():
            for one in (self.encoder, self.teacher):
                found.append(
                    extract_features(one, self.files, modality="image", workers=self.workers, cache=self.cache,
                                     progress=self.progress)
                )  # fmt: skip
        self.teacher.to("cpu")
        return found[0], found[1]


@dataclass(frozen=True)
class _Measured:
    """Held-out images, each content once, with their captions and labels, and features before training."""

    encoder: Encoder
    files: list[Path]
    originals: Float[np.ndarray, "n dim"]
    teachers: Float[np.ndarray, "n teacher_dim"]
    captions: list[str]
    owner: Int[np.ndarray, " m"]
    caption_rows: Float[np.ndarray, "m dim"]
    labels: list[str | None]

    @classmethod
    def of(
        cls,
        images: Sequence[CaptionedImage],
        files: Sequence[Path],
        content: Sequence[str],
        rows: Int[np.ndarray, " n"],
        encoder: Encoder,
        z0: Float[np.ndarray, "all dim"],
        t: Float[np.ndarray, "all teacher_dim"],
    ) -> _Measured:
        first: dict[str, int] = {}
        kept = np.unique([first.setdefault(content[row], row) for row in rows.tolist()]).astype(np.int64)
        captions = [caption for row in kept for caption in images[row].captions]
        owner = np.repeat(np.arange(len(kept)), [len(images[row].captions) for row in kept])
        labels = [images[row].label for row in kept]
        encoded = encoder.encode_texts(captions)
        return cls(encoder, [files[row] for row in kept], z0[kept], t[kept], captions, owner, encoded, labels)

    def looked_at(self, texts: Sequence[str] | None) -> HeldOut:
        """The first of them, with the texts that are looked at."""
        count = min(_LOOKED_AT, len(self.files))
        chosen = self.owner < count
        owner = torch.from_numpy(self.owner[chosen]) if texts is None and chosen.any() else None
        if owner is not None:
            found = self.caption_rows[chosen]
        else:
            found = self.encoder.encode_texts(list(texts) if texts is not None else _class_names())
        pixels = torch.stack([self.encoder.load_image(file)[1] for file in self.files[:count]])
        z0, t = (torch.from_numpy(rows[:count]) for rows in (self.originals, self.teachers))
        return HeldOut(pixels, z0, t, torch.from_numpy(found), owner)

    def report(
        self, kernels: tuple[Kernel, Kernel], loop: KernelAlignmentLoop, workers: int | None, progress: bool
    ) -> KernelReport:
        """Everything before and after, by the kernels as they were before."""
        found = extract_features(self.encoder, self.files, modality="image", workers=workers, progress=progress)
        both = {"before": self.originals, "after": np.array(found["output"], np.float32)}
        unit = {name: unit_rows(torch.from_numpy(rows)) for name, rows in both.items()}
        retrieval = None
        described = np.unique(self.owner)
        if len(described) > 1:
            owner = np.searchsorted(described, self.owner)
            encoded = {name: (rows[described], self.caption_rows) for name, rows in unit.items()}
            retrieval = compare_retrieval(encoded, owner, seed=loop.seed).to_dict()
        texts = loop.held_out.texts.numpy()
        return KernelReport(
            kernel={name: kernel_errors(rows, self.teachers, kernels) for name, rows in both.items()},
            drift=drift_of(both["before"], both["after"], texts),
            retrieval=retrieval,
            zero_shot=self._zero_shot(unit),
            counts={"test": len(self.files), "captions": len(self.captions), "texts": len(texts)},
            kernels={},
            history=loop.history,
            settings={},
        )

    def _zero_shot(self, unit: dict[str, np.ndarray]) -> dict[str, dict[str, float]] | None:
        labelled: Bool[np.ndarray, " n"] = np.array([label is not None for label in self.labels])
        labels = [str(label) for label in self.labels if label is not None]
        if len(set(labels)) < 2:
            return None
        rows = {name: found[labelled] for name, found in unit.items()}
        encoders = dict.fromkeys(rows, self.encoder)
        return compare_zero_shot(encoders, rows, labels, templates=named_templates("simple")).figures


def _check_student(student: Encoder) -> None:
    for modality in ("image", "text"):
        student.require(modality)
    if student.source == "object_aware":
        raise InputError(
            f"encoder {student.spec!r} follows objects, which is no part of its weights; give the encoder inside it, "
            "and wrap the result"
        )
    if student._rounded:
        raise InputError(f"the weights of {student.spec!r} were rounded to half precision; load it as float32")


def _accelerator(device: str | torch.device | None, recipe: Recipe) -> Accelerator:
    if find_spec("accelerate") is None:
        raise InputError("accelerate is not installed; run: pip install 'mmalign[train]'")
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # accelerate keeps its first precision and device for the life of the process; a second run has its own.
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = {"float32": "no", "bfloat16": "bf16"}[recipe.precision]
    return Accelerator(
        cpu=resolve_device(device).type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def _teacher(teacher: str | os.PathLike[str] | Encoder, size: int | None, device: torch.device) -> Encoder:
    if isinstance(teacher, Encoder):
        found = teacher
    elif os.fspath(teacher).startswith("timm:"):
        found = TimmEncoder.from_spec(os.fspath(teacher).removeprefix("timm:"), image_size=size).to(device)
    else:
        found = load_encoder(teacher, device=device)
    found.require("image")
    return found


def _seeing_as(teacher: Encoder, student: Encoder) -> Encoder:
    """The teacher behind the student's preprocessing, for squares of its own side."""
    assert teacher.preprocessing is not None
    assert student.preprocessing is not None
    found = copy.deepcopy(teacher)
    found.preprocessing = student.preprocessing.resized(teacher.preprocessing.size[0])
    found._fingerprint = None
    return found


def _digest(images: Sequence[CaptionedImage], files: Sequence[Path], splits: ImageSplits, workers: int | None) -> str:
    content = hash_items(list(files), "image", DEFAULT_DECODING, workers=workers, progress=False)[0]
    captions = hashlib.sha256(json.dumps([image.captions for image in images]).encode()).hexdigest()
    return f"{data_digest(content, images, splits)} {captions}"


def _kernels(
    recipe: Recipe, z: Float[np.ndarray, "n dim"], t: Float[np.ndarray, "n teacher_dim"]
) -> tuple[Kernel, Kernel]:
    """Of student and teacher, with parameters fitted on a sample where they are left open."""
    rows = np.sort(np.random.default_rng((recipe.seed, 3)).permutation(len(z))[:_SAMPLE])
    x, y = torch.from_numpy(z[rows]), torch.from_numpy(t[rows])
    if recipe.kernel == "cosine":
        return CosineKernel(), CosineKernel()
    if recipe.kernel == "gaussian":
        widths = recipe.sigma or (median_distance(x), median_distance(y))
        return GaussianKernel(widths[0]), GaussianKernel(widths[1])
    degree = recipe.degree or 3
    guide = teacher_kernel(t.shape[1], degree)
    offset = recipe.offset
    if offset is None:
        offset = fit_kernel_offset(x, y, teacher_kernel=guide, degree=degree)
    return PolynomialKernel(offset, degree=degree), guide


def _told(kernel: Kernel) -> dict[str, Any]:
    """JSON-safe."""
    numbers = {name: float(torch.as_tensor(value).detach()) for name, value in vars(kernel).items()}
    return {"kind": type(kernel).__name__.removesuffix("Kernel").lower(), **numbers}


def _class_names() -> list[str]:
    """Every fifth of ImageNet's classes, from the list in timm."""
    from timm.data import ImageNetInfo

    names = ImageNetInfo("imagenet-1k").label_descriptions()
    return [f"a photo of a {name.partition(',')[0]}" for name in names[::5]]
