"""Encoders of the open_clip library: any built-in model with any of its tags, a checkpoint file, a hub repository."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from ..errors import InputError, reason_of
from ..fingerprint import token_probe
from ..imaging import ImagePreprocessing
from .attention import AttendedTexts, attention_undefined, differentiable_from, explicit_attention
from .encoder import Encoder
from .folder import write_weights
from .hub import closest, quiet_libraries, unavailable
from .states import TokenStates, block_list, tapped
from .timm import tap_trunk, trunk_has_class_token, trunk_layer_count

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["OpenCLIPEncoder", "models"]


class OpenCLIPEncoder(Encoder):
    """Any open_clip model.

    Spec after `open_clip:`: `MODEL/TAG` as listed by `open_clip.list_pretrained()`, `MODEL/CHECKPOINT_FILE`,
    `hf-hub:ORG/REPO`, or `local-dir:FOLDER` in open_clip's own layout.

    The activation follows the tag: weights trained with QuickGELU (OpenAI, DFN, MetaCLIP) get QuickGELU also under the
    plain model name, where open_clip 3 itself only warns and computes something else.
    """

    source: ClassVar[str] = "open_clip"

    def __init__(self, model: nn.Module, tokenizer: Any, model_config: dict[str, Any], spec: str) -> None:
        import open_clip

        config = open_clip.get_model_preprocess_cfg(model)
        size = config["size"]
        preprocessing = ImagePreprocessing(
            size=(size, size) if isinstance(size, int) else tuple(size),
            resize=config["resize_mode"],
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            fill=config["fill_color"],
        )
        super().__init__(model, spec=spec, dim=int(model_config["embed_dim"]), preprocessing=preprocessing)
        self.tokenizer = tokenizer
        self.model_config = model_config

    @classmethod
    def from_spec(cls, name: str) -> Self:
        """Load `MODEL/TAG`, `MODEL/FILE`, `hf-hub:ORG/REPO` or `local-dir:FOLDER`.

        Raises:
            InputError: no such model or tag, or a file that does not fit.
            EncoderUnavailableError: the weights are neither cached nor to be fetched.
        """
        import open_clip

        spec = f"open_clip:{name}"
        if name.startswith(("hf-hub:", "local-dir:")):
            model_name, tag, options = name, None, {}
        else:
            model_name, _, tag = name.partition("/")
            options = _options_of_tag(model_name, tag)
        try:
            with quiet_libraries():
                model = open_clip.create_model(model_name, pretrained=tag, require_pretrained=True, **options)
                tokenizer = open_clip.get_tokenizer(model_name)
            config = open_clip.get_model_config(model_name)
        except Exception as error:
            if tag and Path(tag).is_file():
                raise InputError(
                    f"checkpoint {tag!r} does not fit open_clip model {model_name!r} ({reason_of(error)}); "
                    "name the model it was trained as, `mmalign encoders open_clip` lists them"
                ) from None
            if name.startswith("local-dir:"):
                raise InputError(f"open_clip cannot read the folder of {spec!r} ({reason_of(error)})") from None
            raise unavailable(spec, error) from None
        if options.get("force_quick_gelu"):
            config["quick_gelu"] = True
        return cls(model, tokenizer, config, spec)

    @property
    def image_module(self) -> nn.Module:
        """The visual tower."""
        return self.model.visual

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Projected features before normalisation."""
        return self.model.encode_image(pixel_values, normalize=False)

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Projected features before normalisation."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=False)

    def layer_count(self, modality: str) -> int:
        """Blocks of the tower, for texts one more; stages of a convolutional network."""
        if modality == "text":
            blocks = self._text_blocks()
            return len(blocks) + 1 if blocks else 0
        visual = self.model.visual
        if hasattr(visual, "trunk"):
            return trunk_layer_count(visual.trunk)
        if hasattr(visual, "transformer"):
            return len(visual.transformer.resblocks)
        return 5 if hasattr(visual, "attnpool") else 0  # OpenAI's ResNets: stem and four stages

    def has_class_token(self, modality: str) -> bool:
        """Image transformers have one; of text towers, CoCa's."""
        if modality == "text":
            return getattr(self._text_tower(), "cls_emb", None) is not None
        visual = self.model.visual
        return trunk_has_class_token(visual.trunk) if hasattr(visual, "trunk") else hasattr(visual, "transformer")

    def tap_images(
        self, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """States of blocks or stages, by open_clip's or timm's own means."""
        visual = self.model.visual
        if hasattr(visual, "trunk"):
            pooled, states = tap_trunk(visual.trunk, pixel_values, layers, features=features)
            return None if pooled is None else visual.head(pooled), states
        # Features need all blocks. (OpenAI's ResNets leave out the later ones unless told to stop early.)
        indices = sorted({*layers, self.layer_count("image") - 1}) if features else list(layers)
        found = visual.forward_intermediates(
            pixel_values,
            indices=indices,
            stop_early=True,
            intermediates_only=not features,
            output_extra_tokens=True,
        )
        maps = found["image_intermediates"]
        prefixes = found.get("image_intermediates_prefix", [None] * len(maps))
        states = [
            TokenStates.of_map(spatial)
            if prefix is None
            else TokenStates.with_prefix(prefix, spatial.flatten(2).transpose(1, 2))
            for index, spatial, prefix in zip(indices, maps, prefixes, strict=True)
            if index in layers
        ]
        return found.get("image_features"), states

    def tap_texts(
        self, texts: Sequence[str], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"] | None, list[TokenStates]]:
        """States of the blocks; the class token that CoCa appends is no content."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        with tapped(self._text_blocks(), layers) as found:
            pooled = self.model.encode_text(tokens, normalize=False)
        if not getattr(getattr(self._text_tower(), "transformer", None), "batch_first", True):
            found = {layer: states.transpose(0, 1) for layer, states in found.items()}
        pad = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", None) or 0
        # CLIP pads with 0, which is also the token of an exclamation mark: padding is what comes after all else.
        content = (tokens != pad).flip(1).cummax(dim=1).values.flip(1)
        class_token = tokens.shape[1] if self.has_class_token("text") else None
        if class_token is not None:
            content = nn.functional.pad(content, (0, 1))
        return pooled, [TokenStates(found[layer], content, class_token) for layer in layers]

    def attend_texts(self, texts: Sequence[str], layers: int | None = None) -> AttendedTexts:
        """Features of texts with the attention of the last `layers` layers, all by default; see `AttendedTexts`.

        Raises:
            InputError: the tower is not causal, or its features are not those of an end token.
        """
        tower, blocks = self._text_tower(), self._text_blocks()
        pooling = getattr(self.model, "text_pool_type", None) or getattr(tower, "pool_type", None)
        attention: list[Any] = [getattr(block, "attn", None) for block in blocks]
        if getattr(tower, "cls_emb", None) is not None:
            raise attention_undefined(self, "it appends a class token, as CoCa's does")
        if getattr(tower, "attn_mask", None) is None or pooling not in ("argmax", "eos"):
            raise attention_undefined(self, "it is not causal, or its features are of no end token")
        if not all(isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim for layer in attention):
            raise attention_undefined(self, "its attention is of another kind")
        end_token = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        first = 0 if layers is None else max(0, len(blocks) - layers)
        with differentiable_from(blocks[first]), explicit_attention(attention[first:]) as found:
            tokens = self.tokenizer(list(texts)).to(self.device)
            features = self.model.encode_text(tokens, normalize=False)
        end = tokens.argmax(dim=1) if pooling == "argmax" else (tokens == end_token).int().argmax(dim=1)
        return AttendedTexts(features, found, end, (end == tokens.shape[1] - 1).tolist())

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has, without those that begin and end it."""
        if hasattr(self.tokenizer, "encode"):
            return len(self.tokenizer.encode(text))
        return len(self.tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_tower(self) -> Any:
        return getattr(self.model, "text", self.model)

    def _text_blocks(self) -> Sequence[nn.Module]:
        transformer: Any = getattr(self._text_tower(), "transformer", None)
        if hasattr(transformer, "resblocks"):
            return list(transformer.resblocks)
        layers = getattr(getattr(transformer, "config", None), "num_hidden_layers", None)
        return block_list(transformer, layers) if layers else []

    def describe(self) -> dict[str, Any]:
        """Activation and tokens: the rest of the architecture shows in the shapes of the weights."""
        return {
            "quick_gelu": bool(self.model_config.get("quick_gelu", False)),
            "tokens": token_probe(lambda texts: self.tokenizer(texts).tolist()),
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """Write open_clip's own `local-dir:` layout, which open_clip loads as well."""
        import open_clip

        write_weights(self.model.state_dict(), folder / "open_clip_model.safetensors")
        preprocessing = open_clip.get_model_preprocess_cfg(self.model)
        about = {"model_cfg": self.model_config, "preprocess_cfg": preprocessing}
        (folder / "open_clip_config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        return {}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Read that layout."""
        import open_clip

        name = f"local-dir:{folder}"
        with quiet_libraries():
            model = open_clip.create_model(name, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
        return cls(model, tokenizer, open_clip.get_model_config(name), spec=str(folder))


def models() -> Iterator[tuple[str, str]]:
    """Spec and hub repository of all that open_clip lists."""
    import open_clip

    for model, tag in open_clip.list_pretrained():
        yield f"open_clip:{model}/{tag}", open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/")


def _options_of_tag(model_name: str, tag: str) -> dict[str, Any]:
    """Keyword arguments for `create_model` that the tag's weights ask for; checks both names."""
    import open_clip

    models = open_clip.list_models()
    if model_name not in models:
        raise InputError(
            f"open_clip has no model {model_name!r}{closest(model_name, models)}; "
            "`mmalign encoders open_clip` lists them"
        )
    if Path(tag).is_file():
        return {}
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if tag not in tags:
        raise InputError(
            f"open_clip model {model_name!r} has no tag {tag!r} and there is no such checkpoint file; "
            f"its tags are: {', '.join(tags) or 'none'}"
        )
    return {"force_quick_gelu": True} if open_clip.get_pretrained_cfg(model_name, tag).get("quick_gelu") else {}
