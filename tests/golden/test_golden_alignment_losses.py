"""Losses that align two encoders, and the score of threshold consistency, against their golden files."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.contrastive import clip_loss, siglip_loss
from mmalign.errors import InputError
from mmalign.metrics import opis
from mmalign.structure import structure_loss, structure_objective, structure_weight, walk_probabilities
from mmalign.threshold_consistency import tcm_loss

DTYPES = ("float64", "float32")
UNSTATED = {"float64": 1e-9, "float32": 1e-5}  # tolerances where the json gives none


def tensor(array: np.ndarray, dtype: str, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype)).requires_grad_(grad)


# -- align_structure_reg ---------------------------------------------------------------------------

OPTION_OF = {"distance": "similarity"}  # the file's word -> ours


def structure_cases(golden: Any) -> dict[str, tuple[str, dict]]:
    """Array of the value -> array of the gradient, options: the released code's cases, then the paper's equation."""
    found = {
        f"value_{case}": (f"grad_{case}", {OPTION_OF.get(name, name): value for name, value in options.items()})
        for case, options in golden.meta["cases"].items()
    }
    paper = golden.meta["paper_cases"]
    for name in golden.names:
        if match := re.fullmatch(r"paper_value_L(\d+)", name):
            options = {key: paper[key].split()[0] for key in ("weighting", "centering")}
            options |= {"temperature": paper["temperature"], "levels": int(match.group(1)), "divergence": "js"}
            found[name] = (name.replace("value", "grad"), options)
    return found


@pytest.mark.golden("align_structure_reg")
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_regulariser(golden: Any, dtype: str) -> None:
    original = tensor(golden["original"], dtype)
    for value, (gradient, options) in structure_cases(golden).items():
        aligned = tensor(golden["aligned"], dtype, grad=True)
        if options.get("similarity") == "spearman":
            assert not golden[gradient].any(), "the file has a gradient for spearman; refusing it would be wrong"
            with pytest.raises(InputError, match="no gradient"):
                structure_loss(original, aligned, **options)
            golden.ignore(value)  # a constant to the heads, so no loss of ours
            continue
        loss = structure_loss(original, aligned, **options)
        loss.backward()
        golden.assert_close(value, loss, dtype)
        golden.assert_close(gradient, aligned.grad, dtype)
    step = walk_probabilities(original, temperature=golden.meta["paper_cases"]["temperature"])
    for name in golden.names:
        if match := re.fullmatch(r"P_original_L(\d+)", name):
            golden.assert_close(name, torch.linalg.matrix_power(step, int(match.group(1))), dtype)


# -- align_structure_objective ---------------------------------------------------------------------


def step_of(description: str, hyper: dict) -> int:
    if "paired_step_index" in description:
        return hyper["paired_step_index"]
    if match := re.search(r"step (\d+)", description):
        return int(match.group(1))
    assert "after warm-up" in description, description
    return hyper["warmup_steps"]


@pytest.mark.golden("align_structure_objective")
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_objective(golden: Any, dtype: str) -> None:
    hyper = golden.hyper
    assert hyper["normalize_latents"]
    assert re.search(r"lambda \* \(.*\)\s*/\s*2", hyper["combination"])
    schedule = {"weight": hyper["lambda_base"], "warmup_steps": hyper["warmup_steps"]}
    sides = ("image", "text")
    for case, description in golden.meta["case_names"].items():
        frozen = {side: tensor(golden[f"{side}_original"], dtype) for side in sides}
        heads = {side: tensor(golden[f"{side}_aligned"], dtype, grad=True) for side in sides}
        extra = {side: tensor(golden[f"add_{side}_aligned"], dtype, grad=True) for side in sides}
        unpaired: dict[str, Any] = {}
        if "unpaired" in description:
            for side in sides:
                unpaired[f"unpaired_{side}"] = (tensor(golden[f"add_{side}_original"], dtype), extra[side])
            unpaired["unpaired_only"] = "concatenated" not in description
            assert [len(rows) for rows in extra.values()] == hyper["unpaired_rows"]
        terms = structure_objective(
            frozen["image"],
            heads["image"],
            frozen["text"],
            heads["text"],
            step=step_of(description, hyper),
            temperature=hyper["temperature"],
            levels=hyper["levels"],
            weighting=hyper["weighting"],
            **schedule,
            **unpaired,
        )
        terms.loss.backward()
        values = {"overall": terms.loss, "clip": terms.clip, "structure": terms.structure, "lambda": terms.weight}
        for name, value in values.items():
            golden.assert_close(f"{case}_{name}", value, dtype)
        for side in sides:
            golden.assert_close(f"{case}_grad_{side}", heads[side].grad, dtype)
            if unpaired:
                golden.assert_close(f"{case}_grad_add_{side}", extra[side].grad, dtype)
    weights = [structure_weight(int(step), **schedule) for step in golden["lambda_schedule_steps"]]
    golden.assert_close("lambda_schedule_values", weights, dtype)


# -- align_contrastive -----------------------------------------------------------------------------


@pytest.mark.golden("align_contrastive")
@pytest.mark.parametrize("dtype", DTYPES)
def test_contrastive(golden: Any, dtype: str) -> None:
    hyper, n = golden.hyper, len(golden["image"])
    assert hyper["clip_temperature"] == pytest.approx(1 / hyper["clip_logit_scale"])
    for value in [name for name in golden.names if name.endswith("_value")]:
        case = value.removesuffix("_value")
        image, text, more = (tensor(golden[name], dtype, grad=True) for name in ("image", "text", "extra_text"))
        if case == "clip":
            scale, bias = hyper["clip_logit_scale"], 0.0
        else:
            scale, bias = hyper.get(case, (hyper["siglip_logit_scale"], hyper["siglip_logit_bias"]))
        scale = torch.tensor(scale, dtype=image.dtype, requires_grad=True)
        bias = torch.tensor(0.0 if case.endswith("nobias") else bias, dtype=image.dtype, requires_grad=True)
        if case == "clip":
            loss = clip_loss(image, text, scale)
        elif case == "siglip_multipos":
            positives = torch.eye(n, dtype=torch.bool).repeat(1, 2)
            loss = siglip_loss(image, torch.cat([text, more]), scale, bias, positives=positives, average="pairs")
        else:
            loss = siglip_loss(image, text, scale, bias, average="pairs" if case == "siglip_meanpair" else "rows")
        loss.backward()
        golden.assert_close(value, loss, dtype)
        for name, leaf in {"image": image, "text": text, "scale": scale, "bias": bias}.items():
            if f"{case}_grad_{name}" in golden:
                golden.assert_close(f"{case}_grad_{name}", leaf.grad, dtype)


# -- rm_tcm_loss -----------------------------------------------------------------------------------


@pytest.mark.golden("rm_tcm_loss")
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_consistent_margins(golden: Any, dtype: str) -> None:
    labels = torch.from_numpy(golden["labels"])
    for i, case in enumerate(golden["cases"].tolist()):
        names = ("positive_weight", "negative_weight", "positive_margin", "negative_margin")
        embeddings = tensor(golden["embeddings"], dtype, grad=True)
        terms = tcm_loss(embeddings, labels, **dict(zip(names, case, strict=True)))
        terms.loss.backward()
        golden.assert_close("results", [x.item() for x in terms], dtype, UNSTATED[dtype], where=i)
        golden.assert_close(f"grad_case{i}", embeddings.grad, dtype, UNSTATED[dtype])


# -- rm_opis ---------------------------------------------------------------------------------------


@pytest.mark.golden("rm_opis")
@pytest.mark.parametrize("dtype", DTYPES)
def test_operating_point_inconsistency(golden: Any, dtype: str) -> None:
    hyper = golden.hyper
    result = opis(
        golden["embeddings"].astype(dtype),
        golden["labels"],
        far=(hyper["far_low"], hyper["far_high"]),
        grid_points=hyper["grid_points"],
        c=hyper["c"],
    )
    thresholds = {"d_min_max": [result.d_min, result.d_max], "grid": result.grid}
    curves = {
        "sensitivity": result.sensitivity,
        "specificity": result.specificity,
        "utility": result.utility,
        "mean_utility": result.mean_utility,
        "class_contribution": result.class_contribution,
        "opis_grid_mean": result.grid_mean,
        "opis_trapezoid": result.opis,
    }
    for name, value in thresholds.items():
        golden.assert_close(name, value, dtype, {"float64": 1e-12, "float32": 1e-6}[dtype])
    if dtype == "float64":
        for name, value in curves.items():
            golden.assert_close(name, value)
    else:  # a distance beside a threshold may change sides: one pair of one class
        one_pair = 1 / min(n * (n - 1) // 2 for n in np.unique(golden["labels"], return_counts=True)[1] if n > 1)
        for name, value in curves.items():
            np.testing.assert_allclose(value, golden[name], rtol=0, atol=one_pair, err_msg=name)
