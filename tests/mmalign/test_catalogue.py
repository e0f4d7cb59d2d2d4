"""What `mmalign encoders` lists: against the libraries' own lists, and a cache of our making."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import timm

from mmalign.encoders import DEFAULT_SPEC, catalogue, register_source, registry
from mmalign.errors import InputError


def test_everything_that_the_libraries_know() -> None:
    listed = [line.partition("  ")[0] for line in catalogue.entries("open_clip")]
    assert listed == [f"open_clip:{model}/{tag}" for model, tag in open_clip.list_pretrained()]
    assert DEFAULT_SPEC in listed
    assert len(list(catalogue.entries("timm"))) == len(timm.list_models(pretrained=True))


def test_what_is_cached_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tag = DEFAULT_SPEC.partition(":")[2].split("/")
    repository = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
    monkeypatch.setattr(catalogue, "cached_repositories", lambda: {repository, "org/other"})
    cached = list(catalogue.entries("open_clip", only_cached=True))
    assert f"{DEFAULT_SPEC}  [cached]" in cached
    assert all(line.endswith("[cached]") for line in cached)
    overview = list(catalogue.overview())
    assert f"the default is {DEFAULT_SPEC}  [cached]" in overview
    assert any("org/other" in line for line in overview)


def test_a_source_of_ones_own_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SOURCES", dict(registry.SOURCES))
    register_source(
        "mine", lambda rest: pytest.fail("nothing is loaded"), models=lambda: [("mine:a", ""), ("mine:b", "")]
    )
    assert list(catalogue.entries("mine")) == ["mine:a", "mine:b"]
    register_source("silent", lambda rest: pytest.fail("nothing is loaded"))
    for name in ("silent", "nonsense", "bundled"):
        with pytest.raises(InputError, match=r"no list for .*open_clip, transformers, timm, mine"):
            list(catalogue.entries(name))


def test_nothing_cached_is_said(command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "cached_repositories", set)
    result = command_line("encoders", "open_clip", "--cached")
    assert (result.code, result.out) == (3, "")
    assert "no model of open_clip is cached here" in result.err
