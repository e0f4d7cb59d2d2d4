"""Text search from a classifier and a sentence encoder, without a single image-text pair.

ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", arXiv 1312.5650) places an
image at the probability-weighted mean of the text vectors of the classes. Here in centred form: sentence vectors share
a large common direction, which would otherwise dominate every cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .encoders.encoder import Encoder
from .encoders.joined import JoinedEncoder
from .errors import InputError

__all__ = ["ClassBridgeEncoder", "bridge_images", "centred_class_vectors", "class_bridge"]


def class_bridge(
    classifier: Encoder,
    text_encoder: Encoder,
    class_names: Sequence[str | Sequence[str]],
    *,
    temperature: float = 2.0,
) -> ClassBridgeEncoder:
    """Join a classifier and a text encoder through the names of the classes: text search without captions.

    Best where the classes are those people search for; what no class names (for ImageNet: people, actions, relations)
    is found badly.

    Args:
        classifier: an encoder whose `image_features` are logits, e.g. `TimmEncoder.from_spec(name, classifier=True)`.
        text_encoder: encodes texts; its `dim` becomes the width of the space.
        class_names: one entry a class in the order of the logits: a name, or several texts that describe it, of which
            the mean vector is taken. A bare name is used as itself and as "a photo of a NAME".
        temperature: divides the logits before the softmax; above 1 spreads over more classes.

    Returns:
        An encoder made of the two, on the classifier's device; they are not copied.

    Raises:
        InputError: the number of names is not the number of logits, or a tower is missing.
    """
    if "image" not in classifier.modalities or "text" not in text_encoder.modalities:
        raise InputError(f"class_bridge needs an image classifier and a text encoder, got {classifier}, {text_encoder}")
    if len(class_names) != classifier.dim:
        raise InputError(
            f"{len(class_names)} class names for a classifier with {classifier.dim} logits; give one entry a class"
        )
    texts = [[name, f"a photo of a {name}"] if isinstance(name, str) else list(name) for name in class_names]
    flat = torch.from_numpy(text_encoder.encode_texts([text for group in texts for text in group]))
    means = torch.stack([group.mean(dim=0) for group in flat.split([len(group) for group in texts])])
    vectors, centre = centred_class_vectors(means)
    return bridge_of(classifier, text_encoder, vectors, centre, temperature=temperature)


def bridge_of(
    classifier: Encoder,
    text_encoder: Encoder,
    class_vectors: Float[Tensor, "classes dim"],
    centre: Float[Tensor, " dim"],
    *,
    temperature: float,
    spec: str = "",
) -> ClassBridgeEncoder:
    """`class_bridge` for class vectors worked out before."""
    weights = {"class_vectors": class_vectors, "centre": centre}
    settings = {"temperature": temperature}
    dim = class_vectors.shape[1]
    return ClassBridgeEncoder(classifier, text_encoder, weights, dim=dim, settings=settings, spec=spec)


def centred_class_vectors(
    class_text: Float[Tensor, "classes dim"],
) -> tuple[Float[Tensor, "classes dim"], Float[Tensor, " dim"]]:
    """Subtract the mean over classes and normalise each row; returns (vectors, mean)."""
    centre = class_text.mean(dim=0)
    return nn.functional.normalize(class_text - centre, dim=-1), centre


def bridge_images(
    logits: Float[Tensor, "batch classes"],
    class_vectors: Float[Tensor, "classes dim"],
    temperature: float = 2.0,
) -> Float[Tensor, "batch dim"]:
    """Expected class vector under softmax(logits / temperature); arXiv 1312.5650, eq. 5 over all classes."""
    return torch.softmax(logits.float() / temperature, dim=-1) @ class_vectors


class ClassBridgeEncoder(JoinedEncoder):
    """The joined pair; made by `class_bridge`. Weights `class_vectors` and `centre`, setting `temperature`."""

    source: ClassVar[str] = "class_bridge"

    def join_images(self, features: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch dim"]:
        """Expected class vector."""
        return bridge_images(features, self.weights["class_vectors"], self.settings["temperature"])

    def join_texts(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Unit text vector minus the mean over classes."""
        return nn.functional.normalize(features, dim=-1) - self.weights["centre"]
