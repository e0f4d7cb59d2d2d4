"""BLIP-2 as a matcher of images and texts: contrastive vectors, and the head that reads both together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checks import at_least, visible_text
from ..device import resolve_device, resolve_dtype
from ..encoders.hub import quiet_libraries, unavailable
from ..encoders.transformers import preprocessing_of
from ..errors import InputError, reason_of
from ..imaging import DEFAULT_DECODING, DecodedImage, DecodeSettings, ImagePreprocessing

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Blip2Matcher"]

_EXAMPLE = "Salesforce/blip2-itm-vit-g"


class Blip2Matcher:
    """BLIP-2 with its retrieval heads (Li et al. 2023, arXiv 2301.12597), of the transformers library.

    An image becomes tokens (`image_states`), which a few learnt queries attend to (Q-Former). Projected, the queries
    are compared with texts (`image_queries`, `text_vectors`); or they read image and text together, and a linear head
    says how well both match (`match_logits`), which costs a pass a pair. Everything is differentiable.

    Attributes:
        model: `Blip2ForImageTextRetrieval`; the image tower takes `dtype`, all else stays float32.
        tokenizer: of its texts.
        preprocessing: of its images.
        spec: what it was loaded from.
        device: where it is.
        dtype: of the image tower.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocessing: ImagePreprocessing, spec: str = "") -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing
        self.spec = spec
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        # A tokenizer that does not know its length says 1e30.
        self.max_tokens = int(min(tokenizer.model_max_length, model.config.qformer_config.max_position_embeddings))

    @classmethod
    def from_spec(
        cls, spec: str, *, device: str | torch.device | None = None, dtype: str | torch.dtype = "float32"
    ) -> Self:
        """Load `ORG/REPO` of the hub (`transformers:` or `blip2:` may go before it), or a folder in its layout.

        Args:
            spec: for example `Salesforce/blip2-itm-vit-g`, or the one tuned on COCO.
            device: see `to`.
            dtype: see `to`.

        Raises:
            InputError: another kind of model, or a BLIP-2 without the heads for retrieval; or the folder cannot be
                read.
            EncoderUnavailableError: the files are neither cached nor to be fetched.
        """
        prefix, colon, rest = spec.partition(":")
        name = rest if colon and prefix in ("transformers", "blip2") else spec
        if not name:
            raise InputError(f"{spec!r} names no model; for example {_EXAMPLE!r}")
        try:
            return cls(*_loaded(name), spec=spec).to(device, dtype)
        except InputError:
            raise
        except Exception as error:
            if Path(name).is_dir():
                raise InputError(f"transformers cannot read a BLIP-2 in {name!r} ({reason_of(error)})") from None
            raise unavailable(name, error, remedy="give the folder of a BLIP-2 in transformers' layout") from None

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Self:
        """Move to a device (the fastest present by default), and set the dtype of the image tower, in place."""
        self.device = resolve_device(device)
        self.model.to(self.device)
        if dtype is not None:
            self.dtype = resolve_dtype(dtype, self.device)
            self.model.vision_model.to(self.dtype)
        return self

    # -- images ----------------------------------------------------------------------------------------------------

    def load_image(
        self, image: Any, decode: DecodeSettings = DEFAULT_DECODING
    ) -> tuple[DecodedImage, Float[Tensor, "3 height width"]]:
        """An image as it was read, and preprocessed; as `Encoder.load_image`."""
        decoded = decode.read(image, self.preprocessing.size)
        return decoded, self.preprocessing(decoded.pixels)

    def image_states(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens image_width"]:
        """What the Q-Former attends to, class token first; the costly part, the same for any text."""
        return self.model.vision_model(pixel_values=pixel_values.to(self.device, self.dtype)).last_hidden_state

    def _states(self, images: Tensor) -> Tensor:
        return self.image_states(images) if images.ndim == 4 else images

    def image_queries(
        self, images: Float[Tensor, "batch 3 height width"] | Float[Tensor, "batch tokens image_width"]
    ) -> Float[Tensor, "batch queries dim"]:
        """Unit rows, one a learnt query, of pixels or of `image_states`."""
        states = self._states(images)
        queries = self.model.query_tokens.expand(len(states), -1, -1)
        found = self.model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
        return nn.functional.normalize(self.model.vision_projection(found), dim=-1)

    # -- texts -----------------------------------------------------------------------------------------------------

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` on the device, padded to the longest.

        Raises:
            InputError: no text, or one that is no string, is blank or not valid Unicode.
        """
        if isinstance(texts, str) or not len(texts):
            raise InputError(f"texts must be a list of at least one string, not {texts!r}")
        for position, text in enumerate(texts):
            visible_text(f"text {position}", text)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def text_vectors(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Unit rows of the class token, to compare with `image_queries`."""
        tokens = self.tokenize(texts)
        found = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=tokens["input_ids"]),
            query_length=0,
            attention_mask=tokens["attention_mask"],
        ).last_hidden_state
        return nn.functional.normalize(self.model.text_projection(found[:, 0]), dim=-1)

    # -- both ------------------------------------------------------------------------------------------------------

    def match_logits(
        self,
        images: Float[Tensor, "batch 3 height width"] | Float[Tensor, "batch tokens image_width"],
        texts: Sequence[str],
        *,
        pairs: int = 64,
    ) -> Float[Tensor, "batch texts"]:
        """The head's logit that image and text match (class 1), averaged over the queries; not bounded.

        Args:
            images: pixels, or `image_states`, which serve for all texts.
            texts: m of them; every image meets every text.
            pairs: so many at most in a pass, but never fewer than there are images.
        """
        at_least("pairs", pairs)
        states, tokens = self._states(images), self.tokenize(texts)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        together = max(1, pairs // max(len(states), 1))
        found = [
            self._match(states, ids[start : start + together], mask[start : start + together])
            for start in range(0, len(ids), together)
        ]
        return torch.cat(found, dim=1)

    def _match(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        batch, texts, count = len(states), len(ids), self.model.query_tokens.shape[1]
        found = self.model.qformer(
            query_embeds=self.model.embeddings(
                input_ids=ids.repeat(batch, 1), query_embeds=self.model.query_tokens.expand(batch * texts, -1, -1)
            ),
            query_length=count,
            attention_mask=torch.cat([mask.new_ones(batch * texts, count), mask.repeat(batch, 1)], dim=1),
            encoder_hidden_states=states.repeat_interleave(texts, dim=0),
        ).last_hidden_state
        return self.model.itm_head(found[:, :count])[..., 1].mean(dim=1).reshape(batch, texts)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {self.dtype}, {self.device})"


def _loaded(name: str) -> tuple[Any, Any, ImagePreprocessing]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    if config.model_type != "blip-2":
        raise InputError(f"{name!r} is a {config.model_type} model, not a BLIP-2; give for example {_EXAMPLE!r}")
    with quiet_libraries():
        model, report = transformers.Blip2ForImageTextRetrieval.from_pretrained(name, output_loading_info=True)
        # Of a BLIP-2 that generates text these would be random.
        missing = sorted({key.partition(".")[0] for key in report["missing_keys"]})
        if missing:
            raise InputError(
                f"{name!r} is a BLIP-2 without {', '.join(missing)}, so not one for retrieval; give for example "
                f"{_EXAMPLE!r}"
            )
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    return model.float(), tokenizer, preprocessing_of(processor)
