"""PickScore, arXiv 2305.01569: a CLIP fine-tuned on the choices of Pick-a-Pic's users."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from mmalign.checks import in_range
from mmalign.errors import InputError, ModelUnavailableError, reason_of

from .cosine import CosineReward

if TYPE_CHECKING:
    import torch

    from mmalign.encoders import Encoder
    from mmalign.imaging import ImagePreprocessing

__all__ = ["PickScore", "load_pick_score"]

WEIGHTS = "yuvalkirstain/PickScore_v1"
_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # tokenizer and preprocessing that the weights were trained with


class PickScore(CosineReward):
    """exp(logit_scale) cos, about 18 to 24 with the published weights; `load_pick_score` loads them.

    Papers divide it by 20, 26 or 100; here it is as the authors compute it. `scores.pick_probabilities` says which of
    several images for one prompt is preferred.

    Attributes:
        logit_scale: logarithm of the factor, from the encoder's weights.
    """

    name = "pickscore"

    def __init__(
        self,
        encoder: Encoder,
        *,
        logit_scale: float | None = None,
        preprocessing: ImagePreprocessing | None = None,
    ) -> None:
        """Take a CLIP; `logit_scale` replaces the logarithm that its weights hold.

        Raises:
            InputError: the encoder takes no images or no texts, or holds no logit scale.
        """
        super().__init__(encoder, preprocessing=preprocessing)
        held: Any = getattr(encoder.model, "logit_scale", None)
        if held is None and logit_scale is None:
            raise InputError(f"encoder {encoder.spec!r} has no logit scale; give logit_scale, its logarithm")
        in_range("logit_scale", logit_scale, high=20.0)
        self.logit_scale = float(held if logit_scale is None else logit_scale)
        factor = math.exp(self.logit_scale)
        self.range = (-factor, factor)
        self.fingerprint = f"pickscore, logit scale {self.logit_scale:.6g}, of {self.view}"

    def score_embeds(
        self, image_embeds: Float[Tensor, "n dim"], text_embeds: Float[Tensor, "n dim"] | None
    ) -> Float[Tensor, " n"]:
        """`scores.pick_score`."""
        return math.exp(self.logit_scale) * super().score_embeds(image_embeds, text_embeds)


def load_pick_score(
    name: str = WEIGHTS, *, device: str | torch.device | None = None, dtype: str | torch.dtype = "auto"
) -> PickScore:
    """PickScore from a CLIP folder in transformers' layout, or from ORG/REPO.

    Tokenizer and image processor are those beside the weights; where there are none, as with the published weights,
    those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.

    Raises:
        InputError: the folder holds no CLIP, or weights are missing in it.
        ModelUnavailableError: it is on the hub and cannot be fetched.
    """
    import transformers

    from mmalign.encoders.hub import quiet_libraries, unavailable
    from mmalign.encoders.transformers import TransformersEncoder, preprocessing_of

    try:
        with quiet_libraries():
            kind = transformers.AutoConfig.from_pretrained(name).model_type
            if kind != "clip":  # transformers would fill a CLIP with random numbers
                raise InputError(f"pickscore {name!r} is a {kind} model, no CLIP; give weights of PickScore")
            model, info = transformers.CLIPModel.from_pretrained(name, output_loading_info=True)
            tokens = _where(name, "tokenizer.json", "vocab.json", "tokenizer_config.json")
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
            processor = transformers.AutoImageProcessor.from_pretrained(_where(name, "preprocessor_config.json"))
    except InputError:
        raise
    except Exception as error:
        if Path(name).is_dir():
            raise InputError(
                f"pickscore {name!r} cannot be read as a CLIP folder of transformers ({reason_of(error)}); download "
                f"{WEIGHTS} again"
            ) from None
        raise unavailable(
            name, error, what="pickscore", remedy="give pickscore:FOLDER", error_class=ModelUnavailableError
        ) from None
    if info["missing_keys"]:
        absent = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"pickscore {name!r} lacks weights ({absent} ...); download {WEIGHTS} again")
    encoder = TransformersEncoder(model.float(), tokenizer, preprocessing_of(processor), f"transformers:{name}")
    return PickScore(encoder.to(device, dtype))


def _where(name: str, *files: str) -> str:
    """`name`, if any of the files lies there, or else where the published weights' own lie."""
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    return name if any(cached_file(name, file, **quiet) for file in files) else _PROCESSOR
