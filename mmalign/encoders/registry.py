"""From a spec string to an encoder."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import InputError
from .encoder import Encoder, encoder_classes
from .folder import load_folder

__all__ = ["DEFAULT_SPEC", "SOURCES", "Source", "encoder_class", "load_encoder", "register_source", "resolve"]

DEFAULT_SPEC = "open_clip:ViT-B-32-256/datacomp_s34b_b86k"


@dataclass(frozen=True)
class Source:
    """A way to name encoders.

    Attributes:
        load: takes what follows `PREFIX:` in a spec; or "module:callable", imported when first used.
        summary: one line for `mmalign encoders`.
        models: gives (spec, hub repository or "") of everything known by name; or `None` where there is no list.
    """

    load: Callable[[str], Encoder] | str
    summary: str = ""
    models: Callable[[], Iterable[tuple[str, str]]] | str | None = None


SOURCES: dict[str, Source] = {
    "open_clip": Source(
        "mmalign.encoders.open_clip:OpenCLIPEncoder.from_spec",
        "MODEL/TAG: images and texts; also MODEL/CHECKPOINT_FILE and hf-hub:ORG/REPO",
        "mmalign.encoders.open_clip:models",
    ),
    "transformers": Source(
        "mmalign.encoders.transformers:load_transformers",
        "ORG/REPO: CLIP, SigLIP, SigLIP 2 (images and texts); sentence encoders (texts only)",
        "mmalign.encoders.transformers:models",
    ),
    "timm": Source("mmalign.encoders.timm:TimmEncoder.from_spec", "MODEL: images only", "mmalign.encoders.timm:models"),
    "objects": Source(
        "mmalign.object_aware.encoder:ObjectAwareEncoder.from_spec",
        "DETECTOR|ENCODER: attention follows what a detector, or a file of boxes, sees in each image",
    ),
}
_BUILT_IN = frozenset({*SOURCES, "bundled"})
# `Encoder.source` as it stands in encoder.json -> module whose import defines the class.
_MODULES = {
    "open_clip": "mmalign.encoders.open_clip",
    "timm": "mmalign.encoders.timm",
    "compatible": "mmalign.encoders.compatible",
    "transformers": "mmalign.encoders.transformers",
    "sentence": "mmalign.encoders.transformers",
    "class_bridge": "mmalign.conse",
    "tower": "mmalign.alignment.encoder",
    "aligned": "mmalign.alignment.encoder",
    "object_aware": "mmalign.object_aware.encoder",
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
            sentence encoder, texts only), `bundled` (offline, see `mmalign.encoders.bundled`; `bundled:image` and
            `bundled:text` are its two towers, not joined), `objects:DETECTOR|ENCODER` (see
            `mmalign.object_aware.encoder`), a prefix made known with `register_source`, or the path of a folder written
            by `Encoder.save`.
        device: see `Encoder.to`; the fastest present by default.
        dtype: weights of the image tower: bfloat16, float16, auto (the faster on this machine), or float32, whose
            vectors are the same on every machine.

    Raises:
        InputError: the spec cannot be understood or names nothing known.
        EncoderUnavailableError: its weights are not on this machine and cannot be fetched.
    """
    name = os.fspath(spec)
    prefix, colon, rest = name.partition(":")
    if name == "bundled":
        from .bundled import load_bundled

        encoder = load_bundled()
    elif colon and prefix == "bundled":
        from .bundled import load_tower

        encoder = load_tower(rest)
    elif colon and prefix in SOURCES:
        if not rest:
            raise InputError(f"encoder {name!r} names no model; for example {DEFAULT_SPEC!r}")
        encoder = resolve(SOURCES[prefix].load)(rest)
    elif Path(name).is_dir():
        encoder = load_folder(Path(name))
    else:
        raise InputError(
            f"encoder {name!r} is neither a folder nor one of bundled, {', '.join(f'{p}:NAME' for p in SOURCES)}; "
            "`mmalign encoders` lists what can be loaded"
        )
    return encoder.to(device, dtype)


def register_source(
    prefix: str,
    load: Callable[[str], Encoder],
    *,
    summary: str = "",
    models: Callable[[], Iterable[tuple[str, str]]] | None = None,
) -> None:
    """Make `load_encoder("prefix:REST")` call `load(REST)`, and `mmalign encoders` list it; see `Source`.

    Saved folders need no registration: the class that wrote one has to be defined (its module imported), no more.

    Raises:
        InputError: the prefix is taken by the library, or no prefix.
    """
    if prefix in _BUILT_IN or not prefix.isidentifier():
        raise InputError(f"prefix {prefix!r} is taken or no name; give another")
    SOURCES[prefix] = Source(load, summary, models)


def encoder_class(source: str) -> type[Encoder]:
    """The class whose `source` this is.

    Raises:
        InputError: it has not been defined.
    """
    if source not in encoder_classes and source in _MODULES:
        import_module(_MODULES[source])
    if source not in encoder_classes:
        raise InputError(
            f"a saved encoder of kind {source!r} needs the code that made it; import it first, or "
            "`mmalign --plugin MODULE ...` on the command line"
        )
    return encoder_classes[source]


def resolve(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """A callable, imported if it is given as "module:name"."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    return cast("Callable[..., Any]", operator.attrgetter(name)(import_module(module)))
