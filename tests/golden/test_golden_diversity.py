"""The four metrics of DivGenBench and all their intermediate values, against an independent implementation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.metrics import (
    artistic_coverage,
    identity_similarity,
    image_retrieval_score,
    layout_similarity,
    reachable_count,
    spatial_diversity,
    tonal_statistics,
    tonal_variation,
)

# Where the json states none. float32 rounds inputs alone, to 24 bits: all arithmetic is in float64.
DEFAULTS = {"float64": {"rtol": 1e-10, "atol": 1e-10}, "float32": {"rtol": 1e-6, "atol": 1e-6}}


@pytest.mark.golden("div_metrics")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_metrics(golden: Any, dtype: str, read_tolerance: Callable[..., dict[str, float] | None]) -> None:
    # In brackets the json says how features are stored, in words that read like a tolerance for that type.
    stated = golden.meta.get("tolerance", "")
    stated = re.sub(r"\(.*?\)", "", stated) if isinstance(stated, str) else stated
    tolerance = read_tolerance(stated, dtype) or DEFAULTS[dtype]

    def close(name: str, actual: Any, where: Any = ...) -> None:
        expected = golden[name][where]
        assert np.shape(actual) == np.shape(expected), name
        np.testing.assert_allclose(actual, expected, err_msg=name, **tolerance)

    close("ids", identity_similarity(golden["face_emb"].astype(dtype)))

    prompts = [
        [image[:count].astype(dtype) for image, count in zip(images, counts, strict=True)]
        for images, counts in zip(golden["boxes"], golden["box_counts"], strict=True)
    ]
    for number, images in enumerate(prompts):
        found = np.array([[layout_similarity(a, b) for b in images] for a in images])
        close("layout_similarity", found, where=number)
    spatial = spatial_diversity(prompts)
    close("sdi_per_prompt", spatial.per_prompt)
    close("sdi", spatial.sdi)
    assert spatial.empty_share == (golden["box_counts"] == 0).mean()

    images = golden["images_u8"]
    scaled = (images / 255).astype(dtype)
    tensors = torch.from_numpy(scaled).permute(0, 3, 1, 2)
    for form in (scaled, tensors) if dtype == "float32" else (scaled, tensors, images):
        tones = tonal_statistics(form)
        for name, values in zip(("saturation", "brightness", "contrast"), tones, strict=True):
            close(name, values)
        close("pvs", tonal_variation(tones).pvs)
        close("pvs_ddof1", tonal_variation(tones, ddof=1).pvs)

    train, test, synth = (golden[f"style_{name}"].astype(dtype) for name in ("train", "test", "synth"))
    coverage = artistic_coverage(train, test, synth)
    close("asc", coverage.asc)
    for name, score in {"test": coverage.test, "synth": coverage.generated}.items():
        assert score.learned == golden[f"learned_{name}"]
        assert score.reachable == golden[f"sstar_{name}"]
        close(f"irs_alpha_{name}", score.alpha)
        close(f"irs_inf_{name}", score.inf)
    assert image_retrieval_score(train, synth, chunk_size=7) == coverage.generated

    cases = golden["mle_cases"].tolist()
    assert [reachable_count(k, n, n_train) for n_train, n, k in cases] == golden["mle_sstar"].tolist()
