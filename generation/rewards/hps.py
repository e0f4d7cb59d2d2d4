"""Human Preference Score v2 and v2.1, arXiv 2306.09341: a CLIP ViT-H/14 fine-tuned on people's rankings."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from mmalign.checks import one_of
from mmalign.errors import InputError, ModelUnavailableError, reason_of

from .cosine import CosineReward

if TYPE_CHECKING:
    import torch

    from mmalign.encoders import Encoder

__all__ = ["HPS", "load_hps"]

Version: TypeAlias = Literal["v2", "v2.1"]
Geometry: TypeAlias = Literal["pad", "crop"]

WEIGHTS = "xswu/HPSv2"
FILES: dict[str, str] = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPS(CosineReward):
    """The cosine itself, about 0.2 to 0.4 with the published weights; `load_hps` loads them.

    v2 and v2.1 are not comparable, nor are scores of different prompts. The official score resizes a float image by its
    longer side, without clipping, and pads it with zeros to a square ("pad"); trainers crop the centre of the shorter
    side instead ("crop"), the same for square images. Scores published with torchvision below 0.17 were resized without
    antialiasing, which changes them.

    Attributes:
        version: "v2" or "v2.1": which weights the encoder has.
        geometry: "pad" or "crop".
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        version: Version = "v2.1",
        geometry: Geometry = "pad",
        antialias: bool = True,
    ) -> None:
        """Take a CLIP with the weights of a version.

        Raises:
            InputError: the encoder takes no images or no texts, or another version or geometry is named.
        """
        one_of("version", version, FILES)
        one_of("geometry", geometry, get_args(Geometry))
        encoder.require("image")
        assert encoder.preprocessing is not None
        preprocessing = replace(encoder.preprocessing, antialias=antialias)
        if geometry == "pad":
            preprocessing = replace(preprocessing, resize="longest", resize_to=None, fill=0, clip=False)
        super().__init__(encoder, preprocessing=preprocessing)
        self.version: Version = version
        self.geometry: Geometry = geometry
        self.name = f"hps-{version}"
        self.fingerprint = f"{self.name} of {self.view}"


def load_hps(
    file: str | Path | None = None,
    *,
    version: Version = "v2.1",
    geometry: Geometry = "pad",
    antialias: bool = True,
    model: str = "ViT-H-14",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
) -> HPS:
    """HPS from its checkpoint: a .pt file that holds tensors alone (others are refused), or .safetensors.

    Args:
        file: by default that of hub repository xswu/HPSv2, fetched once.
        version: which weights these are.
        geometry: see `HPS`.
        antialias: see `HPS`.
        model: of open_clip.
        device: see `mmalign.Encoder.to`.
        dtype: likewise.

    Raises:
        InputError: no such file, or one that does not fit the model or holds more than tensors.
        ModelUnavailableError: the file cannot be fetched.
    """
    from mmalign.encoders import load_encoder

    one_of("version", version, FILES)
    path = _fetch(version) if file is None else Path(file)
    remedy = f"give {FILES[version]} of hub repository {WEIGHTS}"
    if not path.is_file():
        raise InputError(
            f"hps-{version} checkpoint {str(path)!r} is no file; {remedy}, or name none to have it fetched"
        )
    try:
        encoder = load_encoder(f"open_clip:{model}/{path}", device=device, dtype=dtype)
    except InputError as error:
        cause = error.__context__
        if isinstance(cause, pickle.UnpicklingError):
            raise InputError(
                f"hps-{version} checkpoint {str(path)!r} is damaged, or holds more than tensors and is not read, as it "
                f"might run code; {remedy}"
            ) from None
        if cause is None:  # of the device, or the model's name
            raise
        raise InputError(
            f"hps-{version} checkpoint {str(path)!r} does not fit {model} ({reason_of(cause)}); {remedy}"
        ) from None
    return HPS(encoder, version=version, geometry=geometry, antialias=antialias)


def _fetch(version: Version) -> Path:
    from huggingface_hub import hf_hub_download

    from mmalign.encoders.hub import unavailable

    try:
        return Path(hf_hub_download(WEIGHTS, FILES[version]))
    except Exception as error:
        raise unavailable(
            f"{WEIGHTS}/{FILES[version]}",
            error,
            what=f"the hps-{version} checkpoint",
            remedy=f"give its file, hps-{version}:FILE",
            error_class=ModelUnavailableError,
        ) from None
