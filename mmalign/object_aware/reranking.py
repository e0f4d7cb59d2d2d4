"""The second stage of a search: images that were found are looked at again, together with the words."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..encoders import Encoder, load_encoder
from ..encoders.stream import encode_stream
from ..errors import InputError, UnreadableImageError
from ..imaging import DEFAULT_DECODING, DecodeSettings
from ..prefetch import prefetch
from ..progress import progress_bar
from ..query_perturbation import contrastive_scores, two_stage_scores
from .blip2 import Blip2Matcher
from .boxes import Detector
from .encoder import ObjectAwareEncoder
from .loading import ObjectLoader, query_phrases
from .perturbing import PerturbationSettings, perturbed
from .specs import ObjectsSpec

__all__ = ["CosineReranker", "MatchReranker", "Reranker", "load_reranker"]

Paths = Sequence[str | os.PathLike[str]]


class Reranker(ABC):
    """Scores images for one text, a few dozen of them, at more cost than comparing vectors of an index.

    Attributes:
        detector: of the objects that scores attend to; `None` for none.
    """

    detector: Detector | None = None

    @abstractmethod
    def score(
        self, text: str, images: Paths, *, decode: DecodeSettings = DEFAULT_DECODING, progress: bool = False
    ) -> Float[np.ndarray, " images"]:
        """How well each image fits the text; only the order has a meaning.

        Args:
            text: what is looked for.
            images: files.
            decode: how they become pixels.
            progress: show a bar.

        Returns:
            float32; NaN for an image that cannot be read.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What gives the scores, JSON-safe."""


class CosineReranker(Reranker):
    """Cosine of text and image by another encoder than the index's, or by one whose attention follows objects."""

    def __init__(
        self,
        encoder: Encoder,
        detector: Detector | None = None,
        settings: PerturbationSettings | None = None,
        *,
        batch_size: int | None = None,
    ) -> None:
        """A detector of open vocabulary is given what the text names (`loading.query_phrases`).

        Args:
            encoder: of images and texts.
            detector: finds objects, for an `ObjectAwareEncoder` around the encoder; `None` leaves that as it is.
            settings: of the perturbation.
            batch_size: images a forward pass.

        Raises:
            InputError: the encoder lacks a tower, or attention to perturb; settings without a detector.
        """
        encoder.require("image")
        encoder.require("text")
        _check(detector, settings)
        self.encoder = encoder if detector is None else ObjectAwareEncoder(encoder, detector, settings)
        self.detector = detector
        self.batch_size = batch_size

    def score(
        self, text: str, images: Paths, *, decode: DecodeSettings = DEFAULT_DECODING, progress: bool = False
    ) -> Float[np.ndarray, " images"]:
        """Cosines, in [-1, 1]; see `Reranker.score`."""
        encoder = self.encoder
        vector = encoder.encode_texts([text])[0]
        phrases = query_phrases(text)

        def load(image: str | os.PathLike[str]) -> tuple[None, Tensor]:
            if isinstance(encoder, ObjectAwareEncoder):
                return None, encoder.load_image(image, decode, phrases=phrases)[1]
            return None, encoder.load_image(image, decode)[1]

        scores: list[float] = []
        with progress_bar("re-ranking", len(images), enabled=progress) as advance:
            for batch in encode_stream(encoder, images, load, batch_size=self.batch_size):
                cosines = batch.vectors @ vector
                scores += [
                    float("nan") if outcome.vector is None else float(cosines[outcome.vector])
                    for outcome in batch.outcomes
                ]
                advance(len(batch.outcomes))
        return np.array(scores, np.float32)

    def describe(self) -> dict[str, Any]:
        """Encoder and fingerprint, in which detector and settings are."""
        return {"rerank": "cosine", "encoder": self.encoder.spec, "fingerprint": self.encoder.fingerprint}


class MatchReranker(Reranker):
    """BLIP-2 reads text and image together; its match logit and its contrastive score are added up.

    This is the second stage of the paper's protocol (Sogi et al., ECCV 2024); its first, BLIP-2's own contrastive
    scores, is here whatever the index holds. With a detector the Q-Former's queries are perturbed in both scores.
    """

    def __init__(
        self,
        matcher: Blip2Matcher,
        detector: Detector | None = None,
        settings: PerturbationSettings | None = None,
        *,
        batch_size: int = 8,
    ) -> None:
        """A detector of open vocabulary is given what the text names (`loading.query_phrases`).

        Args:
            matcher: BLIP-2.
            detector: finds objects; `None` leaves BLIP-2 as it is.
            settings: of the perturbation.
            batch_size: images a forward pass.

        Raises:
            InputError: settings without a detector.
        """
        _check(detector, settings)
        self.matcher, self.detector, self.batch_size = matcher, detector, batch_size
        self.settings = PerturbationSettings() if settings is None else settings
        self.loader = None if detector is None else ObjectLoader(matcher, detector, self.settings.max_objects)

    def score(
        self, text: str, images: Paths, *, decode: DecodeSettings = DEFAULT_DECODING, progress: bool = False
    ) -> Float[np.ndarray, " images"]:
        """Match logit + contrastive score, not bounded; see `Reranker.score`."""
        phrases = query_phrases(text)

        def load(image: str | os.PathLike[str]) -> tuple[Tensor, Tensor | None]:
            if self.loader is None:
                return self.matcher.load_image(image, decode)[1], None
            return self.loader.load(image, decode, phrases=phrases)[1:]

        read: list[int] = []
        found: list[tuple[Tensor, Tensor]] = []
        waiting: list[tuple[Tensor, Tensor | None]] = []
        with progress_bar("re-ranking", len(images), enabled=progress) as advance:
            for place, (_, loaded) in enumerate(prefetch(images, load, ahead=3 * self.batch_size)):
                if not isinstance(loaded, UnreadableImageError):
                    waiting.append(loaded)
                    read.append(place)
                if waiting and (len(waiting) == self.batch_size or place == len(images) - 1):
                    found.append(self._both(text, waiting))
                    waiting = []
                advance()
        scores = np.full(len(images), np.nan, np.float32)
        if read:
            contrastive, match = (torch.cat(parts).T.float() for parts in zip(*found, strict=True))
            scores[read] = two_stage_scores(contrastive, match, len(read))[0].cpu().numpy()
        return scores

    @torch.inference_mode()
    def _both(self, text: str, batch: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
        """Contrastive scores and match logits, [batch, 1] each."""
        matcher = self.matcher
        states = matcher.image_states(torch.stack([pixels for pixels, _ in batch]))
        weights = [weights for _, weights in batch if weights is not None]
        context = perturbed(matcher, torch.stack(weights), self.settings) if weights else contextlib.nullcontext()
        with context:
            queries = matcher.image_queries(states)
            return contrastive_scores(queries, matcher.text_vectors([text])), matcher.match_logits(states, [text])

    def describe(self) -> dict[str, Any]:
        """Model, detector and settings."""
        about: dict[str, Any] = {"rerank": "match", "model": self.matcher.spec, "dtype": str(self.matcher.dtype)}
        if self.detector is not None:
            about |= {"detector": self.detector.spec, "settings": asdict(self.settings)}
        return about


def load_reranker(
    spec: str | os.PathLike[str],
    *,
    objects: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
) -> Reranker:
    """A re-ranker by name.

    Args:
        spec: `blip2:ORG/REPO` or a BLIP-2's folder for a `MatchReranker`; or what `load_encoder` takes, for a
            `CosineReranker`.
        objects: a detector and settings for object-aware scores; see `ObjectsSpec`.
        device: of model and detector; the fastest present by default.
        dtype: of the image tower.

    Raises:
        InputError: a spec that is not understood.
        EncoderUnavailableError, ModelUnavailableError: weights are neither cached nor to be fetched.
    """
    name = os.fspath(spec)
    if not name:
        raise InputError("rerank names no model; give blip2:ORG/REPO, the folder of a BLIP-2, or an encoder")
    about = None if objects is None else ObjectsSpec.parse(objects)
    model = (
        Blip2Matcher.from_spec(name, device=device, dtype=dtype)
        if _is_blip2(name)
        else load_encoder(name, device=device, dtype=dtype)
    )
    detector, settings = (None, None) if about is None else (about.load(device), about.settings)
    if isinstance(model, Blip2Matcher):
        return MatchReranker(model, detector, settings)
    return CosineReranker(model, detector, settings)


def _is_blip2(name: str) -> bool:
    prefix, colon, rest = name.partition(":")
    if colon and prefix == "blip2":
        return True
    place = rest if colon and prefix == "transformers" else name
    if place == name and not (Path(name) / "config.json").is_file():
        return False
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(place).model_type == "blip-2"
    except Exception:  # what is wrong is said by who loads it
        return False


def _check(detector: Detector | None, settings: PerturbationSettings | None) -> None:
    if detector is None and settings is not None:
        raise InputError("settings are for the objects of a detector, and none is given; give one, or leave them out")
