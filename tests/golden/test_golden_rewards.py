"""Reward scores and their preprocessing against released code and published heads; values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from generation.rewards.scores import (
    clip_score,
    cosine_score,
    fold_linear_stack,
    hps_score,
    image_reward_score,
    linear_stack,
    linear_stack_score,
    mean_clip_score,
    pick_probabilities,
    pick_score,
    relative_score,
    vqa_score,
)
from mmalign.imaging import ImagePreprocessing

DTYPES = ("float64", "float32")
# None is stated for float32. Cosines, and what they are times 100, have its rounding of sums of some ten products;
# small ones and their gradients are differences of larger numbers, hence relative to the array's largest.
FLOAT32 = 2e-5


def tensor(array: np.ndarray, dtype: str, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.array(array)).to(getattr(torch, dtype)).requires_grad_(grad)


def compare(golden, name: str, actual: Tensor, dtype: str) -> None:
    assert actual.dtype == getattr(torch, dtype), name
    if dtype == "float64":
        golden.assert_close(name, actual)
    else:
        expected = golden[name]
        limit = FLOAT32 * np.abs(expected).max()
        np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=limit, err_msg=name)


@pytest.mark.golden("rw_scores")
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(golden, dtype):
    hyper = golden.hyper
    text, negative = (tensor(golden[name], dtype) for name in ("text_emb", "neg_text_emb"))
    logit_scale = tensor(golden["logit_scale_log"], dtype)
    k, threshold = hyper["srp_k"], hyper["srp_threshold"]
    of_image = {
        "cosine": lambda i: cosine_score(i, text),
        "clipscore_w25": lambda i: clip_score(i, text, convention="hessel"),
        "clipscore_100": lambda i: clip_score(i, text, convention="percent"),
        "pickscore": lambda i: pick_score(i, text, logit_scale),
        "hps": lambda i: hps_score(i, text),
        "srp_score": lambda i: relative_score(i, text, negative, k=k),
    }
    gradients = {"grad_srp" if name == "srp_score" else f"grad_{name}" for name in of_image}
    assert {name for name in golden.names if name.startswith("grad_")} <= gradients
    scores = {}
    for name, score in of_image.items():
        image = tensor(golden["image_emb"], dtype, grad=True)
        scores[name] = score(image)
        compare(golden, name, scores[name], dtype)
        gradient = "grad_srp" if name == "srp_score" else f"grad_{name}"
        if gradient in golden:
            compare(golden, gradient, torch.autograd.grad(scores[name].sum(), image)[0], dtype)
    compare(golden, "clipscore_w25_mean", mean_clip_score(scores["clipscore_w25"]), dtype)
    compare(golden, "clipscore_100_metric", mean_clip_score(scores["clipscore_100"]), dtype)
    compare(golden, "pickscore_over26", scores["pickscore"] / 26, dtype)
    compare(golden, "hps_alignprop_loss", 1 - scores["hps"], dtype)
    compare(golden, "srp_loss", (threshold - scores["srp_score"]).relu(), dtype)

    candidates = tensor(golden["candidates_emb"], dtype)
    compare(golden, "pick_candidate_scores", pick_score(candidates, text[0], logit_scale), dtype)
    compare(golden, "pick_candidate_probs", pick_probabilities(candidates, text[0], logit_scale), dtype)

    layers = [
        (tensor(golden[f"mlp_w{n}"], dtype), tensor(golden[f"mlp_b{n}"], dtype))
        for n in range(len(hyper["mlp_dims"]) - 1)
    ]
    features = tensor(golden["mlp_input"], dtype)
    score = linear_stack_score(features, layers)
    compare(golden, "mlp_score", score, dtype)
    compare(golden, "mlp_score", linear_stack_score(features, [fold_linear_stack(layers)]), dtype)
    compare(golden, "mlp_l1_target_loss", (score - hyper["l1_target"]).abs(), dtype)
    compare(golden, "imagereward_score", image_reward_score(score), dtype)

    sac = tensor(golden["folded_sac_weight"], dtype)[None], tensor(golden["folded_sac_bias"], dtype)[None]
    unit = tensor(golden["unit768"], dtype)
    for found in (linear_stack_score(unit, [sac]), linear_stack(unit, [sac])):  # of norm 1 as they are
        np.testing.assert_allclose(found.numpy(), golden["real_sac_logos_ava1_linear"], rtol=1e-6)

    logits, labels = tensor(golden["vqa_logits"], dtype), torch.from_numpy(golden["vqa_labels"])
    compare(golden, "vqa_score", vqa_score(logits, labels), dtype)
    # Published heads that are not in the file (nor to be had offline), and the features that only they take.
    golden.ignore("real_ava_logos_linear", "real_ava_logos_relu", "real_v1_vit_l_14", "real_v1_vit_b_32", "unit512")


@pytest.mark.golden("rw_preprocess")
def test_preprocessing(golden):
    hyper = golden.hyper
    side, std = hyper["target"], np.array(hyper["std"])
    normalise = {"mean": tuple(hyper["mean"]), "std": tuple(hyper["std"])}
    whole = torch.from_numpy(golden["image_u8"]).permute(2, 0, 1)
    assert whole.shape == (3, hyper["H"], hyper["W"])
    tensor_paths = {
        "tensor_bicubic_aa": {"resize": "shortest"},
        "tensor_bicubic_noaa": {"resize": "shortest", "antialias": False},
        "tensor_bilinear_aa": {"resize": "shortest", "interpolation": "bilinear"},
        "hps_longest_pad_aa1": {"resize": "longest"},
        "hps_longest_pad_aa0": {"resize": "longest", "antialias": False},
    }
    for name, settings in tensor_paths.items():
        preprocess = ImagePreprocessing((side, side), clip=False, **settings, **normalise)
        for dtype in DTYPES:
            golden.assert_close(name, preprocess(whole.to(getattr(torch, dtype)) / 255))
        if preprocess.antialias and preprocess.interpolation == "bicubic":  # clipped, as Pillow does: elsewhere equal
            clipped = ImagePreprocessing((side, side), **settings, **normalise)(whole.double() / 255).numpy()
            low, high = ((bound - np.array(hyper["mean"])) / std for bound in (0, 1))
            inside = np.clip(golden[name], low[:, None, None], high[:, None, None])
            np.testing.assert_allclose(clipped, inside, atol=1.5 / 255 / std.min())

    # Against Pillow's own path, one and a half levels: it rounds after each pass.
    clip = ImagePreprocessing((side, side), "shortest", **normalise)
    unit = ImagePreprocessing((side, side), "shortest", mean=(0, 0, 0), std=(1, 1, 1))
    for pixels in (whole, whole.double() / 255, whole.float() / 255):
        off = np.abs(clip(pixels).numpy() - golden["clip_pil_norm"])
        assert (off <= 1.5 / 255 / std[:, None, None]).all()
        off = np.abs(unit(pixels).numpy() * 255 - golden["clip_pil_u8"].transpose(2, 0, 1))
        assert off.max() <= 1.5 + 1e-4
