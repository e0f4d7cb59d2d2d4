"""Text search from a classifier and a sentence encoder, without a single image-text pair.

ConSE (Norouzi et al., "Zero-Shot Learning by Convex Combination of Semantic Embeddings", arXiv 1312.5650) places an
image at the probability-weighted mean of the text vectors of the classes. Here in centred form: sentence vectors share
a large common direction, which would otherwise dominate every cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .encoders.encoder import Encoder
from .encoders.folder import read_part, write_part
from .errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ClassBridgeEncoder", "bridge_images", "centred_class_vectors", "class_bridge"]


def class_bridge(
    classifier: Encoder,
    text_encoder: Encoder,
    class_names: Sequence[str | Sequence[str]],
    *,
    temperature: float = 2.0,
    spec: str = "class_bridge",
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
    bridge = ClassBridgeEncoder(classifier, text_encoder, vectors, centre, temperature=temperature, spec=spec)
    return bridge.to(classifier.device, classifier.dtype)


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


class ClassBridgeEncoder(Encoder):
    """The joined pair; made by `class_bridge`."""

    source: ClassVar[str] = "class_bridge"

    def __init__(
        self,
        classifier: Encoder,
        text_encoder: Encoder,
        class_vectors: Float[Tensor, "classes dim"],
        centre: Float[Tensor, " dim"],
        *,
        temperature: float,
        spec: str,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.classifier = classifier
        self.text_encoder = text_encoder
        self.temperature = temperature
        self.dim = int(class_vectors.shape[1])
        self.preprocessing = classifier.preprocessing
        self.model = nn.ModuleDict({"classifier": classifier.model, "text": text_encoder.model})
        self.model.register_buffer("class_vectors", class_vectors)
        self.model.register_buffer("centre", centre)

    @property
    def modalities(self) -> frozenset[str]:
        """Both."""
        return frozenset({"image", "text"})

    @property
    def image_module(self) -> nn.Module | None:
        """The classifier's; the class vectors stay in float32."""
        return self.classifier.image_module

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Expected class vector."""
        logits = self.classifier.image_features(pixel_values)
        return bridge_images(logits, self.model.get_buffer("class_vectors"), self.temperature)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Unit text vector minus the mean over classes."""
        self.text_encoder.device = self.device
        return nn.functional.normalize(self.text_encoder.text_features(texts), dim=-1) - self.model.get_buffer("centre")

    def describe(self) -> dict[str, Any]:
        """Both parts and the temperature."""
        return {
            "classifier": self.classifier.describe(),
            "text": self.text_encoder.describe(),
            "temperature": self.temperature,
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """Both parts in folders of their own, class vectors and mean as safetensors."""
        from safetensors.torch import save_file

        vectors = {name: self.model.get_buffer(name).cpu() for name in ("class_vectors", "centre")}
        save_file(vectors, folder / "classes.safetensors")
        return {
            "temperature": self.temperature,
            "classifier": write_part(self.classifier, folder / "classifier"),
            "text": write_part(self.text_encoder, folder / "text"),
        }

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from the parts."""
        from safetensors.torch import load_file

        vectors = load_file(folder / "classes.safetensors")
        return cls(
            read_part(folder / "classifier", config["classifier"]),
            read_part(folder / "text", config["text"]),
            vectors["class_vectors"],
            vectors["centre"],
            temperature=float(config["temperature"]),
            spec=str(folder),
        )
