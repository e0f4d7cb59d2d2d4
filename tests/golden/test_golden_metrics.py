"""Retrieval and zero-shot metrics against their golden files. Card "retrieval metrics" section 8: 1e-12."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from mmalign.metrics import (
    cmc_map_self_excluded,
    evaluate,
    image_text_retrieval,
    mean_recall,
    median_rank,
    per_query_metrics,
    positives_from_labels,
    positives_from_relevance,
    truncated_cosine,
    zero_shot_accuracy,
    zero_shot_classifier,
    zero_shot_predict,
)

FLOAT32 = 1e-5  # where the json states no tolerance for float32 inputs


def approx(value: float, golden: Any, dtype: str = "float64", default: float = 1e-12) -> Any:
    tolerance = golden.tolerance(dtype, default)
    return pytest.approx(value, rel=tolerance["rtol"], abs=tolerance["atol"])


# -- rm_retrieval_metrics --------------------------------------------------------------------------

PER_QUERY_NAMES = {
    "first_rank": "first_rank",
    "AP": "ap",
    "RR": "rr",
    "r_precision": "r_precision",
    "MAP@R": "ap@r",
}


class Case:
    """One prefix of the file: which score matrix it ranks, under which tie policy.

    "notie" ranks sim_i2t; "<matrix>_<policy>" ranks sim_i2t_<matrix>; the policy "stable" is our "index".
    """

    def __init__(self, golden: Any, prefix: str, dtype: type = np.float64) -> None:
        matrix, _, policy = prefix.rpartition("_")
        self.scores = golden["sim_i2t_" + matrix if matrix else "sim_i2t"].astype(dtype)
        self.options: dict[str, Any] = {"ks": golden["ks"].tolist()}
        self.options["ties"] = policy.replace("stable", "index") if matrix else "index"
        self.golden = golden
        rows = np.arange(len(self.scores))
        self.positives = positives_from_relevance(golden["relevance"])
        for ours, from_owner in zip(self.positives, positives_from_labels(rows, golden["text_owner"]), strict=True):
            np.testing.assert_array_equal(ours, from_owner)
        self.image_of = positives_from_labels(golden["text_owner"], rows)
        self.i2t = cache(self._i2t)
        self.t2i = cache(self._t2i)

    def _i2t(self, graded: bool = False, **more: Any) -> dict[str, np.ndarray]:
        if graded:
            more["grades"] = self.golden["grade"]
        return per_query_metrics(self.scores, positives=self.positives, **self.options, **more)

    def _t2i(self) -> dict[str, np.ndarray]:
        return per_query_metrics(self.scores.T, positives=self.image_of, **self.options)

    def value(self, name: str) -> Any:
        """What we compute for the array `<prefix>/<name>`."""
        if name.startswith("t2i_"):
            return self.t2i()[name.removeprefix("t2i_")]
        if name.startswith("ndcg_"):
            kind, _, k = name.removeprefix("ndcg_").partition("@")
            return self.i2t(gain={"bin": "linear", "lin": "linear", "exp": "exponential"}[kind], graded=kind != "bin")[
                f"ndcg@{k}"
            ]
        if name.startswith("AP@"):
            k, _, denominator = name.removeprefix("AP@").partition("_div_")
            return self.i2t(map_denominator={"min": "min(R,k)", "R": "R"}[denominator])[f"ap@{k}"]
        if name == "mean_recall_mR":
            i2t = evaluate(self.scores, positives=self.positives, **self.options)
            return mean_recall(i2t, evaluate(self.scores.T, positives=self.image_of, **self.options))
        if name == "median_rank_i2t":
            plain = evaluate(self.scores, positives=self.positives, **self.options)["medr"]
            assert plain == median_rank(self.i2t()["first_rank"])
            return plain
        if name == "median_rank_i2t_openclip":
            return median_rank(self.i2t()["first_rank"], "open_clip")
        return self.i2t()[PER_QUERY_NAMES.get(name, name)]


def keeps_order(exact: np.ndarray, rounded: np.ndarray) -> np.ndarray:
    """Per row, whether rounding kept the order of the scores and every tie."""
    levels = [[np.unique(row, return_inverse=True)[1] for row in scores] for scores in (exact, rounded)]
    return (np.array(levels[0]) == np.array(levels[1])).all(axis=1)


def arrays_of_cases(golden: Any) -> list[tuple[str, str, str]]:
    found = [(name, *name.split("/", 1)) for name in golden.names if "/" in name]
    return [(name, prefix, rest) for name, prefix, rest in found if prefix != "trap"]


@pytest.mark.golden("rm_retrieval_metrics")
def test_retrieval_metrics(golden: Any) -> None:
    cases: dict[str, Case] = {}
    for name, prefix, rest in arrays_of_cases(golden):
        case = cases.setdefault(prefix, Case(golden, prefix))
        golden.assert_close(name, case.value(rest))
    assert cases
    golden.ignore(*(name for name in golden.names if name.startswith("trap/")))


@pytest.mark.golden("rm_retrieval_metrics")
def test_retrieval_metrics_float32(golden: Any) -> None:
    """Queries whose order survives the rounding of the scores keep their values."""
    compared = 0
    for name, prefix, rest in arrays_of_cases(golden):
        exact, rounded = Case(golden, prefix), Case(golden, prefix, np.float32)
        across, down = (
            keeps_order(exact.scores, rounded.scores),
            keeps_order(exact.scores.T, rounded.scores.T),
        )
        if golden[name].ndim == 0:
            if across.all() and down.all():
                golden.assert_close(name, rounded.value(rest), "float32", FLOAT32)
            continue
        same = down if rest.startswith("t2i_") else across
        golden.assert_close(name, rounded.value(rest)[same], "float32", FLOAT32, where=same)
        compared += int(same.sum())
    assert compared
    golden.ignore(*golden.names)


@pytest.mark.golden("rm_retrieval_metrics")
def test_torchmetrics_drops_positives_scored_zero_or_below(golden: Any) -> None:
    """The trap values are torchmetrics' own; ours differ from them exactly where a positive scores <= 0."""
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, relevance = golden["sim_i2t"], golden["relevance"]
    rows = [(torch.from_numpy(s), torch.from_numpy(r)) for s, r in zip(scores, relevance, strict=True)]
    theirs = {
        "trap/torchmetrics_recall_all": [functional.retrieval_recall(s, r).item() for s, r in rows],
        "trap/torchmetrics_AP": [functional.retrieval_average_precision(s, r).item() for s, r in rows],
    }
    options = {"ks": [scores.shape[1]]}
    positives = positives_from_relevance(relevance)
    ours = per_query_metrics(scores, positives=positives, **options)
    seen = [items[row[items] > 0] for row, items in zip(scores, positives, strict=True)]
    dropped = np.array([len(s) < len(p) for s, p in zip(seen, positives, strict=True)])
    assert (ours[f"recall@{scores.shape[1]}"] == 1).all()
    ap_of_seen = np.nan_to_num(per_query_metrics(scores, positives=seen, **options)["ap"])
    share_seen = np.array([len(s) / len(p) for s, p in zip(seen, positives, strict=True)])
    for name, mechanism, correct in (
        ("trap/torchmetrics_recall_all", share_seen, np.ones(len(scores))),
        ("trap/torchmetrics_AP", ap_of_seen, ours["ap"]),
    ):
        golden.assert_close(name, theirs[name], "float32", FLOAT32)
        golden.assert_close(name, mechanism, "float32", FLOAT32)
        np.testing.assert_allclose(correct[~dropped], golden[name][~dropped], rtol=FLOAT32)
        differs = np.abs(mechanism - correct) > FLOAT32
        assert (np.abs(correct - golden[name])[differs] > FLOAT32 / 2).all()
        assert not differs[~dropped].any()
    if dropped.any():
        assert (golden["trap/torchmetrics_recall_all"][dropped] < 1).all()
    golden.ignore(*golden.names)
    unknown = {name for name in golden.names if name.startswith("trap/")} - set(theirs)
    assert not unknown, f"trap arrays without a check: {unknown}"


# -- rm_cmc_map_selfexcluded -----------------------------------------------------------------------


@pytest.mark.golden("rm_cmc_map_selfexcluded")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cmc_map_self_excluded(golden: Any, dtype: str) -> None:
    query, gallery = golden["query"].astype(dtype), golden["gallery"].astype(dtype)
    for side, rows in (("d_query", query), ("d_gallery", gallery)):
        assert golden.hyper.get(side, rows.shape[1]) == rows.shape[1]
    default = 1e-12 if dtype == "float64" else FLOAT32
    golden.assert_close("distance", 1 - truncated_cosine(query, gallery), dtype, default)
    order = np.argsort(golden["distance"], axis=1, kind="stable")
    if (order != np.argsort(-truncated_cosine(query, gallery), axis=1, kind="stable")).any():
        assert dtype == "float32"
        pytest.skip("rounding the embeddings to float32 changes the ranking")
    result = cmc_map_self_excluded(query, gallery, golden["labels"], topk=len(golden["cmc"]))
    golden.assert_close("cmc", result.cmc, dtype, default)
    golden.assert_close("mAP", result.map, dtype, default)
    assert result.n_valid == golden["n_valid"]


# -- align_eval ------------------------------------------------------------------------------------


def same_order(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether float32 embeddings rank alike in both directions. (`left` and `right` are float64.)"""
    exact = truncated_cosine(left.astype(np.float64), right.astype(np.float64))
    rounded = truncated_cosine(left.astype(np.float32), right.astype(np.float32))
    return all(
        (np.argsort(exact, axis=axis, kind="stable") == np.argsort(rounded, axis=axis, kind="stable")).all()
        for axis in (0, 1)
    )


@pytest.mark.golden("align_eval")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_align_eval(golden: Any, dtype: str) -> None:
    default = 1e-12 if dtype == "float64" else FLOAT32
    image, text, owner = golden["image"].astype(dtype), golden["text"].astype(dtype), golden["owner"]
    weights = zero_shot_classifier(golden["template_text"].astype(dtype))
    golden.assert_close("class_weights", weights, dtype, default)
    images, label = golden["zs_image"].astype(dtype), golden["zs_label"]
    alike = same_order(golden["image"], golden["text"]) and same_order(golden["zs_image"], weights)
    if dtype == "float32" and not alike:
        pytest.skip("rounding the embeddings to float32 changes a ranking")

    ks = sorted({int(name.partition("@")[2]) for name in golden.meta["standard"]})
    standard = image_text_retrieval(image, text, owner, ks=ks)
    named = {"I2T": "image_to_text", "T2I": "text_to_image"}
    for name, expected in golden.meta["standard"].items():
        direction, _, k = name.partition("-R@")
        assert standard[named[direction]][f"hit@{k}"] == approx(expected, golden, dtype, default), name

    # The official protocol repeats an image once per caption, as query and in the gallery.
    repeated = {"I2T": (image[owner], text), "T2I": (text, image[owner])}
    for direction, (queries, gallery) in repeated.items():
        wanted = golden.meta[f"row_duplicated_{direction}"]
        ks = sorted({int(name.partition("@")[2]) for name in wanted})
        result = evaluate(queries=queries, gallery=gallery, positives=positives_from_labels(owner, owner), ks=ks)
        for name, expected in wanted.items():
            measure, _, k = name.partition("@")
            ours = result[{"R": "hit", "P": "precision", "MAP": "map"}[measure] + f"@{k}"]
            assert ours == approx(expected, golden, dtype, default), f"row_duplicated_{direction} {name}"

    np.testing.assert_array_equal(zero_shot_predict(images, weights), golden["zs_pred"])
    ks = sorted({int(name.removeprefix("top").partition("_")[0]) for name in golden.meta["zero_shot"]})
    accuracy = zero_shot_accuracy(images, weights, label, ks=ks)
    for name, expected in golden.meta["zero_shot"].items():
        ours = accuracy[name.removesuffix("_over_present_classes")]
        assert ours == approx(expected, golden, dtype, default), name
