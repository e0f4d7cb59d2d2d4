"""From a spec string to an encoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from ..errors import InputError
from .encoder import Encoder
from .folder import load_folder

__all__ = ["DEFAULT_SPEC", "load_encoder", "register_source", "source_class", "sources"]

DEFAULT_SPEC = "open_clip:ViT-B-32-256/datacomp_s34b_b86k"

# Spec prefix -> "module:callable" that takes the rest of the spec; imported when first used.
_LOADERS: dict[str, str | Callable[[str], Encoder]] = {
    "open_clip": "mmalign.encoders.open_clip:OpenCLIPEncoder.from_spec",
    "timm": "mmalign.encoders.timm:TimmEncoder.from_spec",
    "transformers": "mmalign.encoders.transformers:load_transformers",
}
# `Encoder.source` as it stands in encoder.json -> class.
_CLASSES: dict[str, str | type[Encoder]] = {
    "open_clip": "mmalign.encoders.open_clip:OpenCLIPEncoder",
    "timm": "mmalign.encoders.timm:TimmEncoder",
    "transformers": "mmalign.encoders.transformers:TransformersEncoder",
    "sentence": "mmalign.encoders.transformers:SentenceEncoder",
    "class_bridge": "mmalign.conse:ClassBridgeEncoder",
}


def load_encoder(
    spec: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
) -> Encoder:
    """Load an encoder, ready to use on `device`.

    Args:
        spec: `open_clip:MODEL/TAG`, `timm:MODEL` (images only), `transformers:ORG/REPO` (CLIP, SigLIP, SigLIP 2, or a
            sentence encoder, texts only), `bundled` (offline, see `mmalign.encoders.bundled`), a prefix made known with
            `register_source`, or the path of a folder written by `Encoder.save`.
        device: see `Encoder.to`; the fastest present by default.
        dtype: weights of the image tower: float32, bfloat16, float16 or auto.

    Raises:
        InputError: the spec cannot be understood or names nothing known.
        EncoderUnavailableError: its weights are not on this machine and cannot be fetched.
    """
    name = os.fspath(spec)
    prefix, colon, rest = name.partition(":")
    if name == "bundled":
        from .bundled import load_bundled

        encoder = load_bundled()
    elif colon and prefix in _LOADERS:
        if not rest:
            raise InputError(f"encoder {name!r} names no model; for example {DEFAULT_SPEC!r}")
        loader = _LOADERS[prefix]
        encoder = (_resolve(loader) if isinstance(loader, str) else loader)(rest)
    elif Path(name).is_dir():
        encoder = load_folder(Path(name))
    else:
        raise InputError(
            f"encoder {name!r} is neither a folder nor one of bundled, {', '.join(f'{p}:NAME' for p in _LOADERS)}; "
            "`mmalign encoders` lists what can be loaded"
        )
    return encoder.to(device, dtype)


def register_source(prefix: str, loader: Callable[[str], Encoder], *classes: type[Encoder]) -> None:
    """Make `load_encoder("prefix:REST")` call `loader(REST)`, and let saved folders of `classes` be loaded again."""
    _LOADERS[prefix] = loader
    _CLASSES.update({cls.source: cls for cls in classes})


def source_class(source: str) -> type[Encoder]:
    """The class whose `source` this is.

    Raises:
        InputError: nobody registered it.
    """
    found = _CLASSES.get(source)
    if found is None:
        raise InputError(f"a saved encoder of kind {source!r} needs the code that made it; import it first")
    return _resolve(found) if isinstance(found, str) else found


def sources() -> list[str]:
    """Known spec prefixes."""
    return list(_LOADERS)


def _resolve(path: str):  # type: ignore[no-untyped-def]
    module, _, attributes = path.partition(":")
    found = import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found
