"""Encoders of the transformers library: CLIP, SigLIP and SigLIP 2 (images and texts), sentence encoders (texts)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import InputError, reason_of
from ..fingerprint import token_probe
from ..imaging import ImagePreprocessing
from .attention import AttendedTexts, attention_undefined, differentiable_from, kept_attention
from .encoder import Encoder
from .hub import cached_repositories, quiet_libraries, unavailable
from .states import TokenStates, block_list, tapped

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SentenceEncoder", "TransformersEncoder", "load_transformers", "model_and_tokenizer", "models"]

_PIL_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}


def load_transformers(name: str) -> Encoder:
    """Load `ORG/REPO` or a folder in transformers' layout: two towers if the model has them, else a sentence encoder.

    Raises:
        InputError: a model family that gives no image-text or sentence features.
        EncoderUnavailableError: the files are neither cached nor to be fetched.
    """
    import transformers

    spec = f"transformers:{name}"
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise _cannot_load(name, error) from None
    dual = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if dual and config.model_type not in TransformersEncoder.families:
        raise InputError(
            f"{spec!r} is a {config.model_type} model; supported two-tower families: "
            f"{', '.join(TransformersEncoder.families)}"
            + (
                " (take a fixed-resolution SigLIP 2 such as google/siglip2-base-patch16-224)"
                if config.model_type == "siglip2"
                else ""
            )
        )
    if not dual and (not hasattr(config, "vocab_size") or config.is_encoder_decoder):
        raise InputError(
            f"{spec!r} is a {config.model_type} model, neither an image-text model nor a sentence encoder; "
            "for image models alone give `timm:NAME`"
        )
    try:
        model, tokenizer = model_and_tokenizer(name)
        if dual:
            processor = transformers.AutoImageProcessor.from_pretrained(name)
            return TransformersEncoder(model, tokenizer, preprocessing_of(processor), spec)
        # transformers marks a length that it does not know by 1e30.
        lengths = tokenizer.model_max_length, getattr(config, "max_position_embeddings", 256)
        return SentenceEncoder(model, tokenizer, sentence_pooling(name, int(min(lengths))), spec)
    except InputError:
        raise
    except Exception as error:
        raise _cannot_load(name, error) from None


def _cannot_load(name: str, error: Exception) -> Exception:
    if Path(name).is_dir():
        return InputError(f"transformers cannot read the folder {name!r} ({reason_of(error)})")
    return unavailable(f"transformers:{name}", error)


class _WithTokenizer(Encoder):
    """What both kinds share: a transformers model beside its tokenizer, saved in transformers' own layout."""

    tokenizer: Any

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Model inputs on the encoder's device."""
        raise NotImplementedError

    def write(self, folder: Path) -> dict[str, Any]:
        """Write transformers' own layout, which transformers loads as well."""
        self.model.save_pretrained(folder / "transformers")
        self.tokenizer.save_pretrained(folder / "transformers")
        return {}


class TransformersEncoder(_WithTokenizer):
    """CLIP, SigLIP or fixed-resolution SigLIP 2 (`google/siglip2-*-patch*-*`, whose model type is siglip)."""

    source: ClassVar[str] = "transformers"
    families: ClassVar[tuple[str, ...]] = ("clip", "siglip")

    def __init__(self, model: Any, tokenizer: Any, preprocessing: ImagePreprocessing | None, spec: str) -> None:
        config = model.config
        self.is_siglip = config.model_type == "siglip"
        dim = int(config.vision_config.hidden_size if self.is_siglip else config.projection_dim)
        super().__init__(model, spec=spec, dim=dim, preprocessing=preprocessing)
        self.tokenizer = tokenizer
        self.context_length = int(config.text_config.max_position_embeddings)
        # SigLIP 2 (Gemma vocabulary of 256,000) was trained on lower-cased text; its published tokenizer
        # configurations do not all say so.
        self.lowercase = self.is_siglip and config.text_config.vocab_size >= 256_000

    @property
    def image_module(self) -> nn.Module:
        """The vision model; CLIP's projection beside it is cast by `to` through this list."""
        projection = getattr(self.model, "visual_projection", None)
        return nn.ModuleList([self.model.vision_model, *([projection] if projection is not None else [])])

    def image_features(self, pixel_values: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Projected (CLIP) or attention-pooled (SigLIP) features before normalisation."""
        return _tensor(self.model.get_image_features(pixel_values=pixel_values))

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Projected features before normalisation."""
        return _tensor(self.model.get_text_features(**self.tokenize(texts)))

    def layer_count(self, modality: str) -> int:
        """Blocks of the tower, for texts one more."""
        return len(self._blocks(modality)) + (modality == "text")

    def has_class_token(self, modality: str) -> bool:
        """CLIP's image tower has one."""
        return modality == "image" and not self.is_siglip

    def tap_images(
        self, pixel_values: Float[Tensor, "batch 3 height width"], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"], list[TokenStates]]:
        """States of the blocks."""
        with tapped(self._blocks("image"), [layer + 1 for layer in layers]) as found:
            pooled = self.image_features(pixel_values)
        prefix = 0 if self.is_siglip else 1
        return pooled, [
            TokenStates.with_prefix(states[:, :prefix], states[:, prefix:], class_token=not self.is_siglip)
            for states in (found[layer + 1] for layer in layers)
        ]

    def tap_texts(
        self, texts: Sequence[str], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"], list[TokenStates]]:
        """States of the blocks."""
        tokens = self._tokens(texts)
        with tapped(self._blocks("text"), layers) as found:
            pooled = _tensor(self.model.get_text_features(**self._inputs(tokens)))
        content = tokens["attention_mask"].to(self.device).bool()
        return pooled, [TokenStates(found[layer], content) for layer in layers]

    def attend_texts(self, texts: Sequence[str], layers: int | None = None) -> AttendedTexts:
        """Features of texts with the attention of the last `layers` layers, all by default; see `AttendedTexts`.

        Raises:
            InputError: SigLIP, whose text tower is not causal; or the attention gives no probabilities.
        """
        if self.is_siglip:
            raise attention_undefined(self, "SigLIP's is not causal, and pads with tokens that count")
        blocks, tower = self._blocks("text"), self.model.text_model
        first = 0 if layers is None else max(0, len(blocks) - layers)
        attention: list[Any] = [block.self_attn for block in blocks[first:]]
        usual = tower.config._attn_implementation
        tower.set_attn_implementation("eager")  # the others compute no probabilities
        try:
            with differentiable_from(blocks[first]), kept_attention(attention) as found:
                tokens = self.tokenize(texts)
                features = _tensor(self.model.get_text_features(**tokens))
        finally:
            tower.set_attn_implementation(usual)
        probabilities = [tensor for tensor in found if tensor is not None]
        if len(probabilities) < len(attention):
            raise attention_undefined(self, "transformers gave no probabilities though asked for attention 'eager'")
        ids, end_token = tokens["input_ids"], self.model.config.text_config.eos_token_id
        # 2 stands in old configurations, and means the highest number.
        end = ids.argmax(dim=1) if end_token == 2 else (ids == end_token).int().argmax(dim=1)
        return AttendedTexts(features, probabilities, end, (end == self.context_length - 1).tolist())

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has, without those that begin and end it."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _blocks(self, modality: str) -> Sequence[nn.Module]:
        tower = self.model.vision_model if modality == "image" else self.model.text_model
        return tower.encoder.layers

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """SigLIP was trained with every text padded to the full length and no mask; CLIP pads to the longest."""
        return self._inputs(self._tokens(texts))

    def _tokens(self, texts: Sequence[str]) -> Any:
        texts = [text.lower() for text in texts] if self.lowercase else list(texts)
        return self.tokenizer(
            texts,
            padding="max_length" if self.is_siglip else True,
            max_length=self.context_length,
            truncation=True,
            return_tensors="pt",
            return_attention_mask=True,
        )

    def _inputs(self, tokens: Any) -> dict[str, Tensor]:
        names = ("input_ids",) if self.is_siglip else ("input_ids", "attention_mask")
        return {name: tokens[name].to(self.device) for name in names}

    def describe(self) -> dict[str, Any]:
        """Family, activations and tokens."""
        config = self.model.config
        return {
            "family": config.model_type,
            "activations": [config.vision_config.hidden_act, config.text_config.hidden_act],
            "tokens": token_probe(lambda texts: [self.tokenize([text])["input_ids"][0].tolist() for text in texts]),
        }

    def write(self, folder: Path) -> dict[str, Any]:
        """As the base, with the preprocessing beside it, for transformers in its own words."""
        super().write(folder)
        assert self.preprocessing is not None
        about = processor_config(self.preprocessing, "SiglipImageProcessor" if self.is_siglip else "CLIPImageProcessor")
        path = folder / "transformers" / "preprocessor_config.json"
        path.write_text(json.dumps(about, indent=1), encoding="utf-8")
        return {}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from transformers' layout."""
        model, tokenizer = model_and_tokenizer(folder / "transformers")
        return cls(model, tokenizer, None, spec=str(folder))


class SentenceEncoder(_WithTokenizer):
    """A sentence encoder, texts only: token states pooled by mean, class token or maximum."""

    source: ClassVar[str] = "sentence"

    def __init__(self, model: Any, tokenizer: Any, pooling: dict[str, Any], spec: str) -> None:
        super().__init__(model, spec=spec, dim=int(model.config.hidden_size))
        self.tokenizer = tokenizer
        self.pooling = pooling

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Padded to the longest of the batch."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.pooling["max_length"],
            return_tensors="pt",
        )
        return {name: tensor.to(self.device) for name, tensor in tokens.items()}

    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Pooled token states."""
        return self._features(self.tokenize(texts))

    def _features(self, tokens: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        states = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
        if self.pooling["mode"] == "cls":
            return states[:, 0]
        if self.pooling["mode"] == "max":
            return states.masked_fill(mask == 0, -torch.inf).amax(dim=1)
        return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)

    def layer_count(self, modality: str) -> int:
        """Blocks and one more; 0 for a family whose blocks are no plain list (ALBERT)."""
        blocks = self._blocks()
        return len(blocks) + 1 if modality == "text" and blocks else 0

    def has_class_token(self, modality: str) -> bool:
        """Whether the tokenizer begins every text with one."""
        return modality == "text" and self.tokenizer.cls_token_id is not None

    def tap_texts(
        self, texts: Sequence[str], layers: Sequence[int], *, features: bool
    ) -> tuple[Float[Tensor, "batch dim"], list[TokenStates]]:
        """States of the blocks, before a final norm where the family has one."""
        tokens = self.tokenize(texts)
        with tapped(self._blocks(), layers) as found:
            pooled = self._features(tokens)
        content, class_token = tokens["attention_mask"].bool(), 0 if self.has_class_token("text") else None
        return pooled, [TokenStates(found[layer], content, class_token) for layer in layers]

    def _blocks(self) -> Sequence[nn.Module]:
        return block_list(self.model, self.model.config.num_hidden_layers)

    def describe(self) -> dict[str, Any]:
        """Family, pooling and tokens."""
        tokens = token_probe(lambda texts: [self.tokenize([text])["input_ids"][0].tolist() for text in texts])
        return {"family": self.model.config.model_type, "pooling": self.pooling, "tokens": tokens}

    def write(self, folder: Path) -> dict[str, Any]:
        """As the base, with the pooling beside it."""
        super().write(folder)
        return {"pooling": self.pooling}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> Self:
        """Rebuild from transformers' layout."""
        model, tokenizer = model_and_tokenizer(folder / "transformers")
        return cls(model, tokenizer, config["pooling"], spec=str(folder))


def models() -> list[tuple[str, str]]:
    """Spec and name of the hub repositories cached here; the hub itself has no list of what fits."""
    return [(f"transformers:{repository}", repository) for repository in sorted(cached_repositories())]


def model_and_tokenizer(name: str | Path) -> tuple[nn.Module, Any]:
    """Both in float32, whatever precision the checkpoint has."""
    import transformers

    with quiet_libraries():
        model = transformers.AutoModel.from_pretrained(name).float()
        return model, transformers.AutoTokenizer.from_pretrained(name)


def _tensor(output: Any) -> Tensor:
    # transformers 5 wraps the projected features in an output object; 4 returned them bare.
    return output if isinstance(output, Tensor) else output.pooler_output


def preprocessing_of(processor: Any) -> ImagePreprocessing:
    """A transformers image processor as our declarative preprocessing."""
    size = dict(processor.size)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    interpolation = _PIL_RESAMPLE.get(int(processor.resample))
    if interpolation is None:
        raise InputError(f"image processor resamples with Pillow filter {processor.resample}, which is not supported")
    common: dict[str, Any] = {
        "interpolation": interpolation,
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
    }
    if "shortest_edge" in size:
        edge = int(size["shortest_edge"])
        target = (int(crop["height"]), int(crop["width"])) if crop else (edge, edge)
        return ImagePreprocessing(size=target, resize="shortest", resize_to=edge, **common)
    whole = (int(size["height"]), int(size["width"]))
    if crop:
        return ImagePreprocessing(
            size=(int(crop["height"]), int(crop["width"])), resize="squash", resize_to=whole, **common
        )
    return ImagePreprocessing(size=whole, resize="squash", **common)


def processor_config(preprocessing: ImagePreprocessing, kind: str) -> dict[str, Any]:
    """The opposite of `preprocessing_of`: what transformers keeps in preprocessor_config.json."""
    height, width = preprocessing.size
    target = {"height": height, "width": width}
    whole = preprocessing.resize_to or preprocessing.size
    size: dict[str, Any] = {"shortest_edge": whole if isinstance(whole, int) else min(whole)}
    if preprocessing.resize == "squash":
        size = dict(zip(("height", "width"), (whole, whole) if isinstance(whole, int) else whole, strict=True))
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": next(n for n, name in _PIL_RESAMPLE.items() if name == preprocessing.interpolation),
        "do_center_crop": preprocessing.resize == "shortest" or whole != preprocessing.size,
        "crop_size": target,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def sentence_pooling(name: str, longest: int) -> dict[str, Any]:
    """Pooling mode and maximum length as sentence-transformers wrote them beside the model; else mean and `longest`.

    Raises:
        InputError: a pooling mode other than mean, cls or max, or layers after the pooling.
    """
    from transformers.utils import cached_file

    def side_file(path: str) -> Any:
        found = cached_file(
            name,
            path,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return json.loads(Path(found).read_text(encoding="utf-8")) if found else {}

    layers = [str(module["type"]).rpartition(".")[2] for module in side_file("modules.json") or []]
    if extra := set(layers) - {"Transformer", "Pooling", "Normalize"}:
        raise InputError(f"transformers:{name} has layers that are not supported: {', '.join(sorted(extra))}")
    flags = side_file("1_Pooling/config.json")
    mode = flags.get("pooling_mode")
    if mode is None:
        chosen = [key for key, on in flags.items() if key.startswith("pooling_mode_") and on is True]
        names = {
            "pooling_mode_cls_token": "cls",
            "pooling_mode_max_tokens": "max",
            "pooling_mode_mean_tokens": "mean",
        }
        mode = names.get(chosen[0], chosen[0]) if len(chosen) == 1 else "mean" if not chosen else "+".join(chosen)
    if mode not in ("mean", "cls", "max"):
        raise InputError(f"transformers:{name} pools by {mode!r}; supported are mean, cls and max")
    return {
        "mode": mode,
        "max_length": int(side_file("sentence_bert_config.json").get("max_seq_length") or longest),
    }
