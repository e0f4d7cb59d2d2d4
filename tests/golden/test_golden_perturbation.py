"""Object-aware query perturbation, and the two-stage scores that it is measured with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.imaging import ImagePreprocessing
from mmalign.query_perturbation import (
    PatchGrid,
    boxes_to_token_weights,
    contrastive_scores,
    mean_projector,
    object_projector,
    perturbed_keys,
    perturbed_queries,
    two_stage_scores,
)

DTYPES = ("float64", "float32")


def tensor(array: np.ndarray, dtype: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype))


def weights_of(golden, boxes: Tensor, preprocess: str) -> Tensor:
    """Token weights under a transform by the file's name of it: squash, shortest_center_crop or longest_pad."""
    hyper = golden.hyper
    size, patch, mode = hyper["input_size"], hyper["patch_size"], preprocess.partition("_")[0]
    preprocessing = ImagePreprocessing((size, size), mode, mean=(0, 0, 0), std=(1, 1, 1))
    grid = PatchGrid(hyper["grid"], hyper["grid"], patch, patch, hyper["prefix_tokens"])
    return boxes_to_token_weights(boxes, (hyper["image_width"], hyper["image_height"]), preprocessing, grid)


@pytest.mark.golden("query_perturbation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_query_perturbation(golden, dtype):
    hyper = golden.hyper
    heads, d = hyper["num_heads"], hyper["head_dim"]

    def projected(states: str, name: str) -> Tensor:
        weight, bias = (tensor(golden[kind + name], dtype) for kind in ("W", "b"))
        rows = torch.nn.functional.linear(tensor(golden[states], dtype), weight, bias)
        return rows.unflatten(-1, (heads, d)).transpose(0, 1)

    queries, keys, values = projected("q_in", "q"), projected("kv_in", "k"), projected("kv_in", "v")
    boxes = tensor(golden["boxes"], dtype)
    weights = weights_of(golden, boxes, hyper["preprocess"])
    golden.assert_close("token_weights", weights, dtype)
    golden.assert_close("token_weights_other_mode", weights_of(golden, boxes, hyper["preprocess_other"]), dtype)

    for case, about in golden.meta["cases"].items():
        select = about["select"]
        rule = {"rank": select} if isinstance(select, int) else {"energy": select}
        chosen = weights[about["objects"]]
        alpha = tensor(np.array(about["alpha"]), dtype)
        mean = mean_projector(keys, chosen, alpha, **rule)
        turned = perturbed_queries(queries, mean, keep_norm=about["keep_norm"])
        attention = (turned @ keys.mT / d**0.5).softmax(dim=-1)
        kept = [object_projector(keys, one, **rule) for one in chosen if one.any()]
        actual = {
            "P_mean": mean,
            "q_perturbed": turned,
            "attention": attention,
            "context": (attention @ values).transpose(0, 1).flatten(1),
        }
        if kept:
            projectors, ranks, eigenvalues = (torch.stack(part) for part in zip(*kept, strict=True))
            actual |= {"projectors": projectors, "ranks": ranks, "eigenvalues": eigenvalues}
        stored = [name.removeprefix(f"{case}__") for name in golden.names if name.startswith(f"{case}__")]
        assert stored, case
        for name in stored:
            golden.assert_close(f"{case}__{name}", actual[name], dtype)
        if not about["keep_norm"]:
            other = (queries @ perturbed_keys(keys, mean).mT / d**0.5).softmax(dim=-1)
            np.testing.assert_allclose(other, attention, **golden.tolerance(dtype))
        if not kept:
            assert torch.equal(turned, queries)


@pytest.mark.golden("itm_rerank")
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_stage_scores(golden, dtype):
    k = golden.hyper["k"]
    itc = contrastive_scores(tensor(golden["image_queries"], dtype), tensor(golden["text"], dtype))
    match = tensor(golden["itm_logits"], dtype)[..., 1]
    found = {"i2t": two_stage_scores(itc, match, k), "t2i": two_stage_scores(itc.T, match.T, k)}
    # No float32 tolerance is stated: sums of a few products of numbers below 10.
    limits = golden.tolerance() if dtype == "float64" else {"rtol": 1e-6, "atol": 1e-5}
    np.testing.assert_allclose(itc, golden["itc"], **limits)
    for side, scores in found.items():
        np.testing.assert_allclose(scores, golden[f"{side}_scores"], **limits)
        ranked = scores.argsort(dim=1, descending=True)[:, :k]
        np.testing.assert_array_equal(ranked, golden[f"{side}_rank"][:, :k])
