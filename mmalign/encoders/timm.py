"""Image encoders and classifiers of the timm library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import InputError
from ..imaging import ImagePreprocessing
from .encoder import Encoder
from .folder import write_weights
from .hub import closest, unavailable
from .states import TokenStates

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TimmEncoder", "models", "preprocessing_of", "tap_trunk", "trunk_has_class_token", "trunk_layer_count"]


class TimmEncoder(Encoder):
    """A timm model, images only.

    Spec after `timm:`: `MODEL[.TAG]` as listed by `timm.list_pretrained()`. With `classifier=True` the features are
    the logits of the model's own classes instead of its pooled features.
    """

    source: ClassVar[str] = "timm"

    def __init__(
        self,
        model: Any,
        architecture: str,
        spec: str,
        *,
        options: dict[str, Any] | None = None,
        preprocessing: ImagePreprocessing | None = None,
    ) -> None:
        classes = int(model.num_classes)
        pooled = getattr(model, "head_hidden_size", None) or model.num_features
        super().__init__(
            model, spec=spec, dim=classes or int(pooled), preprocessing=preprocessing or preprocessing_of(model)
        )
        self.architecture = architecture
        self.options = options or {}
        self.classes = classes

    @classmethod
    def from_spec(cls, name: str, *, classifier: bool = False, image_size: int | None = None) -> Self:
        """Load `MODEL[.TAG]` with its pretrained weights.

        With `image_size` it sees squares of that side, and position embeddings of a transformer are resampled for it.

        Raises:
            InputError: timm has no such model, or no such pretrained weights of it.
            EncoderUnavailableError: the weights are neither cached nor to be fetched.
        """
        import timm

        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise InputError(
                f"timm has no model {architecture!r}{closest(architecture, timm.list_models())}; "
                "`mmalign encoders timm` lists them"
            )
        # timm itself falls back to random weights where a model has none.
        full_names = (full.partition(".") for full in timm.list_pretrained(f"{architecture}*"))
        known = [known_tag for model_name, _, known_tag in full_names if model_name == architecture]
        if not known or (tag and tag not in known):
            raise InputError(
                f"timm model {architecture!r} has no pretrained weights"
                + (f" {tag!r}; its tags are: {', '.join(filter(None, known)) or 'none'}" if tag else "")
                + "; `mmalign encoders timm` lists the models that have"
            )
        options: dict[str, Any] = {} if classifier else {"num_classes": 0}
        if image_size is not None and getattr(timm.get_pretrained_cfg(architecture), "fixed_input_size", False):
            options["img_size"] = image_size
        try:
            model = timm.create_model(name, pretrained=True, **options)
        except Exception as error:
            raise unavailable(f"timm:{name}", error) from None
        preprocessing = preprocessing_of(model)
        if image_size is not None:
            preprocessing = preprocessing.resized(image_size)
        return cls(model, architecture, f"timm:{name}", options=options, preprocessing=preprocessing)

    @property
    def image_module(self) -> nn.Module:
        """The whole model."""
        return self.model

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Pooled features before any classifier, or logits."""
        return self.model(_channels_last(pixel_values))

    def layer_count(self, modality: str) -> int:
        """Blocks of a transformer, stages (EfficientNets: their stem before them) of a convolutional network."""
        return trunk_layer_count(self.model) if modality == "image" else 0

    def has_class_token(self, modality: str) -> bool:
        """Whether it is among the tokens that the blocks pass on."""
        return modality == "image" and trunk_has_class_token(self.model)

    def tap_images(
        self, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """States of blocks or stages; blocks that nothing is asked of are not run."""
        return tap_trunk(self.model, _channels_last(pixel_values), layers, features=features)

    def describe(self) -> dict[str, Any]:
        """The architecture by name, for timm's names are stable and some differ in activations alone; options."""
        options = {name: value for name, value in self.options.items() if name != "num_classes"}
        return {"architecture": self.architecture, "classifier": bool(self.classes), "options": options}

    def write(self, folder: Path) -> dict[str, Any]:
        """Weights as safetensors; the architecture by name."""
        write_weights(self.model.state_dict(), folder / "timm_model.safetensors")
        config = {k: v for k, v in dict(self.model.pretrained_cfg).items() if _is_json(v)}
        options = {"num_classes": self.classes, **self.options}
        return {"architecture": self.architecture, "options": options, "pretrained_cfg": config}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from name and weights."""
        import timm
        from safetensors.torch import load_file

        model = timm.create_model(
            config["architecture"], pretrained_cfg_overlay=config["pretrained_cfg"], **config["options"]
        )
        model.load_state_dict(load_file(folder / "timm_model.safetensors"))
        return cls(model, config["architecture"], spec=str(folder), options=config["options"])


def trunk_layer_count(model: Any) -> int:
    """Layers that timm's `forward_intermediates` offers of a model; 0 without it."""
    if not hasattr(model, "forward_intermediates"):
        return 0
    return len(model.blocks) + 1 if "extra_blocks" in _tap_options(model) else len(model.feature_info)


def trunk_has_class_token(model: Any) -> bool:
    """Whether the intermediate states have one; timm's CaiT, among others, adds it after the blocks."""
    if "return_prefix_tokens" not in _tap_options(model):
        return False
    return bool(getattr(model, "has_class_token", getattr(model, "cls_token", None) is not None))


def tap_trunk(
    model: Any, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int], *, features: bool
) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
    """What the model gives, if asked for, and the states of layers in rising order."""
    indices = sorted({*layers, trunk_layer_count(model) - 1}) if features else list(layers)
    found = model.forward_intermediates(
        pixel_values, indices=indices, intermediates_only=not features, stop_early=not features, **_tap_options(model)
    )
    final, maps = found if features else (None, found)
    class_token = trunk_has_class_token(model)
    states = [_states_of(item, class_token) for index, item in zip(indices, maps, strict=True) if index in layers]
    return model.forward_head(final) if features else None, states


def _tap_options(model: Any) -> dict[str, bool]:
    known = signature(model.forward_intermediates).parameters
    # Some of timm's models fail when asked for prefix tokens that they do not have.
    prefix = "return_prefix_tokens" in known and bool(getattr(model, "num_prefix_tokens", 0))
    wanted = {"return_prefix_tokens": prefix, "extra_blocks": "extra_blocks" in known}
    return {name: True for name, fits in wanted.items() if fits}


def _states_of(item: Any, class_token: bool) -> TokenStates:
    if isinstance(item, Tensor):
        return TokenStates.of_map(item)
    spatial, prefix = item
    return TokenStates.with_prefix(prefix, spatial.flatten(2).transpose(1, 2), class_token=class_token)


def preprocessing_of(model: nn.Module) -> ImagePreprocessing:
    """timm's evaluation transform for a model: resize to size / crop_pct, then centre crop or pad."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    height, width = config["input_size"][-2:]
    mode = config["crop_mode"]
    return ImagePreprocessing(
        size=(height, width),
        resize="squash" if mode == "squash" else "longest" if mode == "border" else "shortest",
        resize_to=(math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])),
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fill=tuple(round(255 * value) for value in config["mean"]) if mode == "border" else 0,
    )


def models() -> Iterator[tuple[str, str]]:
    """Spec and hub repository of all that timm has weights of."""
    import timm

    for name in timm.list_models(pretrained=True):
        yield f"timm:{name}", timm.get_pretrained_cfg(name).hf_hub_id or ""


def _channels_last(pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    # Depthwise convolutions are twice as fast on a CPU with this layout.
    return pixel_values.to(memory_format=torch.channels_last)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
