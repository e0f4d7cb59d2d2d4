"""Retrieval metrics against a hand loop, scikit-learn and torchmetrics, and their properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, ndcg_score

from mmalign.errors import InputError
from mmalign.metrics import (
    cmc_curve,
    cmc_map_self_excluded,
    evaluate,
    evaluate_ranked,
    exclude_same_item,
    image_text_retrieval,
    mean_recall,
    median_rank,
    per_query_metrics,
    positives_from_labels,
    positives_from_relevance,
    recall_sum,
    zero_shot_accuracy,
    zero_shot_classifier,
    zero_shot_predict,
)

KS = (1, 3, 7)


def random_problem(seed: int, n: int = 12, g: int = 40, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores (rounded to `levels` values if given) and relevance with at least one positive a row."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, g))
    if levels:
        scores = np.round(scores * levels / 6)
    relevance = rng.random((n, g)) < 0.12
    relevance[np.arange(n), rng.integers(g, size=n)] = True
    return scores, relevance


def by_hand(scores: np.ndarray, relevance: np.ndarray, grades: np.ndarray, ties: str, ks: tuple[int, ...]) -> dict:
    """One query, by sorting a list and counting down it."""
    tie_key = {
        "index": lambda j: j,
        "optimistic": lambda j: (-int(relevance[j]), j),
        "pessimistic": lambda j: (int(relevance[j]), j),
    }[ties]
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], tie_key(j)))
    rel = [int(relevance[j]) for j in order]
    n_relevant, ranks = sum(rel), [i + 1 for i, r in enumerate(rel) if r]
    precision_at = [sum(rel[:i]) / i for i in ranks]
    out = {
        "first_rank": ranks[0],
        "rr": 1 / ranks[0],
        "ap": sum(precision_at) / n_relevant,
        "r_precision": sum(rel[:n_relevant]) / n_relevant,
        "ap@r": sum(p for p, i in zip(precision_at, ranks, strict=True) if i <= n_relevant) / n_relevant,
    }
    best_first = sorted(grades, reverse=True)
    for k in ks:
        top = [p for p, i in zip(precision_at, ranks, strict=True) if i <= k]
        out[f"hit@{k}"] = float(len(top) > 0)
        out[f"recall@{k}"] = len(top) / n_relevant
        out[f"precision@{k}"] = len(top) / k
        out[f"ap@{k}"] = sum(top) / min(n_relevant, k)
        dcg = sum(grades[j] / math.log2(i + 2) for i, j in enumerate(order[:k]))
        out[f"ndcg@{k}"] = dcg / sum(g / math.log2(i + 2) for i, g in enumerate(best_first[:k]))
    return out


@pytest.mark.parametrize("ties", ["index", "optimistic", "pessimistic"])
@pytest.mark.parametrize("levels", [None, 4])
@pytest.mark.parametrize("density", [0.12, 0.7])  # few positives are counted one by one, many by levels
def test_every_metric_equals_a_hand_loop(ties: Any, levels: int | None, density: float) -> None:
    scores, relevance = random_problem(1, levels=levels)
    relevance |= np.random.default_rng(2).random(relevance.shape) < density
    got = per_query_metrics(scores, positives=positives_from_relevance(relevance), ks=KS, ties=ties)
    for query in range(len(scores)):
        expected = by_hand(scores[query], relevance[query], relevance[query].astype(float), ties, KS)
        for name, value in expected.items():
            assert got[name][query] == pytest.approx(value, rel=1e-12, abs=1e-12), (name, query)
    assert set(got) == set(expected) | {f"tie@{k}" for k in KS}
    if levels and density < 0.5:
        index = per_query_metrics(scores, positives=positives_from_relevance(relevance), ks=KS)
        assert ties == "index" or (got["first_rank"] != index["first_rank"]).any()


def test_graded_ndcg_equals_scikit_learn_and_gain_choice() -> None:
    scores, relevance = random_problem(3)
    grades = np.random.default_rng(4).integers(0, 4, size=scores.shape) * relevance
    grades[:, 0] = 1
    positives = positives_from_relevance(relevance)
    for gain, gains in (("linear", grades), ("exponential", 2**grades - 1)):
        got = per_query_metrics(scores, positives=positives, ks=KS, grades=grades, gain=gain)  # type: ignore[arg-type]
        for k in KS:
            expected = [ndcg_score(g[None], s[None], k=k) for g, s in zip(gains, scores, strict=True)]
            np.testing.assert_allclose(got[f"ndcg@{k}"], expected, rtol=1e-12)
    sparse = [{int(j): float(row[j]) for j in np.flatnonzero(row)} for row in grades]
    dense, mapped = (per_query_metrics(scores, positives=positives, grades=g) for g in (grades, sparse))
    np.testing.assert_array_equal(dense["ndcg@5"], mapped["ndcg@5"])


def test_graded_ties_are_bounded_by_optimistic_and_pessimistic() -> None:
    scores = np.zeros((1, 3))
    grades = np.array([[1.0, 3.0, 2.0]])
    dcg = lambda order: sum(g / math.log2(i + 2) for i, g in enumerate(order))  # noqa: E731
    for ties, order in (("index", (1, 3, 2)), ("optimistic", (3, 2, 1)), ("pessimistic", (1, 2, 3))):
        got = evaluate(scores, positives=[[1]], ks=[3], grades=grades, ties=ties)["ndcg@3"]  # type: ignore[arg-type]
        assert got == pytest.approx(dcg(order) / dcg((3, 2, 1)), rel=1e-12)


def test_queries_without_positive_grade_are_left_out_of_ndcg_and_counted() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    result = evaluate(scores, positives=[[0], [1]], ks=[3], grades=np.array([[0, 0, 0], [0, 1, 0]]))
    assert result["ndcg@3"] == pytest.approx(1 / math.log2(3))
    assert result["n_ndcg_skipped"] == 1
    assert result["n_query"] == 2


def test_average_precision_equals_scikit_learn() -> None:
    scores, relevance = random_problem(5)
    got = per_query_metrics(scores, positives=positives_from_relevance(relevance))["ap"]
    expected = [average_precision_score(r, s) for r, s in zip(relevance, scores, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_equals_torchmetrics_on_positive_scores() -> None:
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    scores, relevance = random_problem(6)
    got = per_query_metrics(scores, positives=positives_from_relevance(relevance), ks=KS)
    shifted = torch.from_numpy(scores - scores.min() + 1)
    for query, (s, r) in enumerate(zip(shifted, torch.from_numpy(relevance), strict=True)):
        pairs = [
            ("ap", functional.retrieval_average_precision(s, r)),
            ("rr", functional.retrieval_reciprocal_rank(s, r)),
            ("r_precision", functional.retrieval_r_precision(s, r)),
        ]
        for k in KS:
            pairs += [
                (f"hit@{k}", functional.retrieval_hit_rate(s, r, top_k=k)),
                (f"recall@{k}", functional.retrieval_recall(s, r, top_k=k)),
                (f"precision@{k}", functional.retrieval_precision(s, r, top_k=k)),
                (f"ndcg@{k}", functional.retrieval_normalized_dcg(s, r, top_k=k)),
            ]
        for name, theirs in pairs:
            assert got[name][query] == pytest.approx(float(theirs), abs=1e-6), name


def test_ap_at_k_by_both_denominators() -> None:
    scores = -np.arange(5.0)[None]
    options = {"positives": [[0, 3, 4]], "ks": [2]}
    assert evaluate(scores, **options)["map@2"] == pytest.approx(1 / 2)
    assert evaluate(scores, map_denominator="R", **options)["map@2"] == pytest.approx(1 / 3)
    with pytest.raises(InputError, match="map_denominator"):
        evaluate(scores, map_denominator="k", **options)


def test_precision_divides_by_k_even_beyond_the_gallery() -> None:
    result = evaluate(np.array([[1.0, 2.0]]), positives=[[0, 1]], ks=[10])
    assert result["precision@10"] == pytest.approx(0.2)
    assert result["recall@10"] == 1


# -- ties -----------------------------------------------------------------------------------------


def test_expected_hit_is_the_average_over_random_orders_of_ties() -> None:
    scores, relevance = random_problem(7, n=6, g=24, levels=3)
    positives = positives_from_relevance(relevance)
    expected = per_query_metrics(scores, positives=positives, ks=KS, ties="expected")
    rng, draws = np.random.default_rng(8), 4000
    total = {k: np.zeros(len(scores)) for k in KS}
    for _ in range(draws):
        shuffle = rng.permutation(scores.shape[1])
        order = shuffle[np.argsort(-scores[:, shuffle], axis=1, kind="stable")]
        ranked = np.take_along_axis(relevance, order, axis=1)
        for k in KS:
            total[k] += ranked[:, :k].any(axis=1)
    fractional = 0
    for k in KS:
        np.testing.assert_allclose(expected[f"hit@{k}"], total[k] / draws, atol=4 * 0.5 / math.sqrt(draws))
        fractional += int(((expected[f"hit@{k}"] > 0) & (expected[f"hit@{k}"] < 1)).sum())
    assert fractional > 3
    assert set(expected) == {f"{name}@{k}" for k in KS for name in ("hit", "tie")}
    with pytest.raises(InputError, match="grades"):
        evaluate(scores, positives=positives, ties="expected", grades=relevance.astype(float))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.integers(1, 6))
def test_pessimistic_bounds_index_and_expected_from_below_optimistic_from_above(seed: int, levels: int) -> None:
    scores, relevance = random_problem(seed, n=4, g=15, levels=levels)
    options: dict[str, Any] = {"positives": positives_from_relevance(relevance), "ks": KS}
    low, index, high = (
        per_query_metrics(scores, ties=ties, **options)  # type: ignore[arg-type]
        for ties in ("pessimistic", "index", "optimistic")
    )
    expected = per_query_metrics(scores, ties="expected", **options)
    for name in ("ap", "rr", "r_precision", "ap@r", *(f"hit@{k}" for k in KS), *(f"ndcg@{k}" for k in KS)):
        assert (low[name] <= index[name] + 1e-12).all()
        assert (index[name] <= high[name] + 1e-12).all()
    for k in KS:
        assert (low[f"hit@{k}"] <= expected[f"hit@{k}"]).all()
        assert (expected[f"hit@{k}"] <= high[f"hit@{k}"]).all()
        np.testing.assert_array_equal(low[f"tie@{k}"], low[f"hit@{k}"] != high[f"hit@{k}"])
    summary = evaluate(scores, **options)
    assert summary["n_ties_at_3"] == (low["hit@3"] != high["hit@3"]).sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_collapsed_gallery_ties_to_the_last_bit(dtype: type) -> None:
    """A plain matrix product scores the copies differently at the edges of its tiles."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(16, 63)).astype(dtype)
    gallery = np.repeat(rng.normal(size=(1, 63)).astype(dtype), 1003, axis=0)
    result = evaluate(queries=queries, gallery=gallery, positives=[[j * 50] for j in range(16)])
    assert result["n_ties_at_1"] == result["n_ties_at_10"] == 16
    assert result["mnr"] == np.mean(np.arange(16) * 50 + 1)


# -- the two ways in ------------------------------------------------------------------------------


def embeddings(seed: int = 9, n: int = 37, g: int = 101, dim: int = 8) -> tuple[np.ndarray, np.ndarray, list]:
    rng = np.random.default_rng(seed)
    labels, gallery_labels = rng.integers(20, size=n), rng.integers(20, size=g)
    centres = rng.normal(size=(20, dim))
    queries = centres[labels] + rng.normal(size=(n, dim))
    gallery = centres[gallery_labels] + rng.normal(size=(g, dim))
    return queries, gallery, positives_from_labels(labels, gallery_labels)


@pytest.mark.parametrize("chunk_size", [1, 5, 36, 1000])
def test_chunks_equal_the_whole_matrix(chunk_size: int) -> None:
    queries, gallery, positives = embeddings()
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    whole = evaluate(unit(queries) @ unit(gallery).T, positives=positives)
    assert evaluate(queries=queries, gallery=gallery, positives=positives, chunk_size=chunk_size) == whole
    inner = evaluate(queries @ gallery.T, positives=positives)
    assert inner != whole
    assert (
        evaluate(queries=queries, gallery=gallery, positives=positives, chunk_size=chunk_size, normalize=False) == inner
    )


def test_default_chunks_cover_every_query(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, gallery, positives = embeddings()
    whole = evaluate(queries=queries, gallery=gallery, positives=positives)
    monkeypatch.setattr("mmalign.metrics.ranking.BLOCK_ELEMENTS", 10 * len(gallery))
    assert evaluate(queries=queries, gallery=gallery, positives=positives) == whole


def test_torch_tensors_are_accepted() -> None:
    queries, gallery, positives = embeddings()
    expected = evaluate(queries=queries, gallery=gallery, positives=positives)
    q, g = torch.from_numpy(queries).requires_grad_(), torch.from_numpy(gallery)
    assert evaluate(queries=q, gallery=g, positives=positives) == expected  # type: ignore[arg-type]
    rounded = torch.from_numpy(queries @ gallery.T).bfloat16()
    assert evaluate(rounded, positives=positives) == evaluate(rounded.double().numpy(), positives=positives)  # type: ignore[arg-type]


def test_the_order_of_the_gallery_does_not_matter_without_ties() -> None:
    scores, relevance = random_problem(10)
    shuffle = np.random.default_rng(11).permutation(scores.shape[1])
    grades = relevance * 2.0
    before = evaluate(scores, positives=positives_from_relevance(relevance), grades=grades)
    after = evaluate(
        scores[:, shuffle],
        positives=positives_from_relevance(relevance[:, shuffle]),
        grades=grades[:, shuffle],
    )
    assert before == pytest.approx(after, rel=1e-12)


# -- exclusion and skipping -----------------------------------------------------------------------


def test_exclusion_is_by_id_not_by_rank() -> None:
    """The query's copy stands above its own row: taking out rank 0 would take the copy and leave the item."""
    scores = np.array([[5.0, 6.0, 1.0, 4.0]])  # item 0 is the query itself, 1 a better scored copy, 2 its class
    positives = [[0, 2]]
    exclude = exclude_same_item(np.array(["a"]), np.array(["a", "copy of a", "c", "d"]))
    got = per_query_metrics(scores, positives=positives, exclude=exclude, ks=[1, 3])
    assert got["first_rank"][0] == 3  # after the copy and d; item 0 is neither positive nor in the way
    assert got["recall@3"][0] == 1
    assert got["ap"][0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("ties", ["index", "optimistic", "pessimistic", "expected"])
def test_exclusion_equals_deleting_the_items(ties: Any) -> None:
    scores, relevance = random_problem(12, levels=4)
    rng = np.random.default_rng(13)
    grades = None if ties == "expected" else relevance * rng.integers(1, 4, size=relevance.shape)
    exclude = [rng.choice(40, size=size, replace=False) for size in range(len(scores))]
    got = per_query_metrics(
        scores, positives=positives_from_relevance(relevance), exclude=exclude, grades=grades, ties=ties
    )
    for query, gone in enumerate(exclude):
        keep = np.setdiff1d(np.arange(40), gone)
        alone = per_query_metrics(
            scores[query : query + 1, keep],
            positives=[np.flatnonzero(relevance[query, keep])],
            grades=None if grades is None else grades[query : query + 1, keep],
            ties=ties,
        )
        for name, values in alone.items():
            np.testing.assert_array_equal(got[name][query], values[0], err_msg=name)


def test_queries_without_positives_are_skipped_and_counted() -> None:
    scores, relevance = random_problem(14)
    relevance[[0, 3]] = False
    positives = positives_from_relevance(relevance)
    result = evaluate(scores, positives=positives)
    rest = [q for q in range(len(scores)) if q not in (0, 3)]
    without = evaluate(scores[rest], positives=[positives[q] for q in rest])
    assert (result.pop("n_skipped"), without.pop("n_skipped")) == (2, 0)
    assert (result.pop("n_ndcg_skipped"), without.pop("n_ndcg_skipped")) == (2, 0)
    assert result == without
    per_query = per_query_metrics(scores, positives=positives)
    assert all(np.isnan(values[[0, 3]]).all() for values in per_query.values())
    excluded = evaluate(scores, positives=positives, exclude=[*positives[:5], *[[]] * 7])
    assert excluded["n_skipped"] == 5  # a query whose positives are all excluded has none
    with pytest.raises(InputError, match="none of the 2 queries has a positive"):
        evaluate(scores[:2], positives=[[], []])


# -- what is refused ------------------------------------------------------------------------------


def test_nan_scores_name_row_and_column() -> None:
    scores, relevance = random_problem(15)
    scores[7, 23] = np.nan
    positives = positives_from_relevance(relevance)
    for chunk_size in (None, 3):
        with pytest.raises(InputError, match=r"query 7 \(row\) and gallery item 23 \(column\)"):
            evaluate(scores, positives=positives, chunk_size=chunk_size)
    queries, gallery, positives = embeddings()
    gallery[4, 2] = np.nan
    with pytest.raises(InputError, match="gallery row 4"):
        evaluate(queries=queries, gallery=gallery, positives=positives)
    gallery[4] = 0
    with pytest.raises(InputError, match="gallery row 4 is all zero"):
        evaluate(queries=queries, gallery=gallery, positives=positives)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": [0]}, "ks"),
        ({"ties": "random"}, "ties='random'"),
        ({"gain": "square"}, "gain='square'"),
        ({"positives": [[0]]}, "1 entries for 2 queries"),
        ({"positives": [0, 1]}, "positives_from_labels"),
        ({"positives": [[0], [3]]}, r"positives\[1\] names item 3"),
        ({"exclude": [[-1], []]}, r"exclude\[0\] names item -1"),
        ({"grades": np.ones((2, 2))}, "grades have shape"),
        ({"grades": -np.ones((2, 3))}, "at least 0"),
        ({"grades": [{5: 1.0}, {}]}, "outside the gallery"),
        ({"queries": np.ones((2, 3))}, "either scores, or both"),
        ({"scores": None}, "either scores, or both"),
        ({"scores": np.ones(3)}, "must be a matrix"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"scores": np.eye(2, 3), "positives": [[0], [1]]}
    evaluate(**good)
    with pytest.raises(InputError, match=message):
        evaluate(**(good | change))


# -- ranked lists ---------------------------------------------------------------------------------


def test_ranked_lists_equal_the_full_ranking_and_missing_results_are_misses() -> None:
    scores, relevance = random_problem(16)
    positives = positives_from_relevance(relevance)
    top = np.argsort(-scores, axis=1)[:, :7]
    full, listed = evaluate(scores, positives=positives, ks=KS), evaluate_ranked(top, positives, ks=KS)
    shared = [f"{name}@{k}" for name in ("hit", "recall", "precision", "map", "ndcg") for k in KS]
    assert {name: listed[name] for name in shared} == pytest.approx({name: full[name] for name in shared})
    assert set(listed) == {*shared, "mrr@depth", "n_query", "n_skipped", "n_ndcg_skipped"}

    short = top.copy()
    short[:, 2:] = -1
    cut = scores.copy()
    np.put_along_axis(cut, top[:, 2:], -np.inf, axis=1)
    found = [np.intersect1d(row[:2], p) for row, p in zip(top, positives, strict=True)]
    result = evaluate_ranked(short, positives, ks=KS)
    assert result["recall@7"] == pytest.approx(
        np.mean([len(f) / len(p) for f, p in zip(found, positives, strict=True)])
    )
    assert result["hit@7"] == np.mean([len(f) > 0 for f in found])
    assert result["hit@7"] < listed["hit@7"]
    nothing = evaluate_ranked(np.full((12, 7), -1), positives, ks=KS)
    assert nothing["hit@7"] == nothing["mrr@depth"] == nothing["ndcg@7"] == 0


def test_ranked_lists_close_up_over_excluded_ids() -> None:
    ids, positives = np.array([[8, 5, 2, 3]]), [[2, 5]]
    got = evaluate_ranked(ids, positives, ks=[1, 2], exclude=[[5]])
    assert (got["hit@1"], got["hit@2"], got["recall@2"]) == (0, 1, 1)
    with pytest.raises(InputError, match="longer list"):
        evaluate_ranked(ids, positives, ks=[4], exclude=[[5]])
    assert evaluate_ranked(np.array([[8, 5, 2, -1]]), positives, ks=[4], exclude=[[5]])["recall@4"] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 1, 2]], "an id twice"),
        ([[1, -2, 3]], "only -1"),
        ([[1, 2]], "longer list"),
        ([[0.5, 1, 2]], "integer"),
    ],
)
def test_bad_ranked_lists_are_refused(ids: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_ranked(np.array(ids), [[1]], ks=[3])


# -- summaries ------------------------------------------------------------------------------------


def test_median_rank_conventions_differ_for_an_even_number_of_queries() -> None:
    assert median_rank(np.array([1, 2, 3, 8])) == 2.5
    assert median_rank(np.array([1, 2, 3, 8]), "open_clip") == 2  # floor(1.5) + 1
    assert median_rank(np.array([1, 2, np.nan, 8])) == median_rank(np.array([1, 2, 8]), "open_clip") == 2
    with pytest.raises(InputError, match="convention"):
        median_rank(np.array([1]), "mode")  # type: ignore[arg-type]


def test_mean_recall_and_sum_use_hits_of_both_directions() -> None:
    i2t = {"hit@1": 0.5, "hit@5": 0.7, "recall@1": 0.1, "hit@1_low": 0.4}
    t2i = {"hit@1": 0.3, "hit@5": 0.9, "recall@1": 0.2}
    assert mean_recall(i2t, t2i) == pytest.approx(0.6)
    assert recall_sum(i2t, t2i) == pytest.approx(2.4)
    assert mean_recall(i2t, t2i, ks=[1]) == pytest.approx(0.4)


def test_image_text_retrieval_counts_any_caption_and_normalises() -> None:
    images = np.eye(3)
    texts = np.array([[0, 1.0, 0.9], [10, 0, 0], [0, 0.1, 9], [0, 7.0, 0]])  # long vectors must not win
    owner = np.array([0, 0, 2, 2])
    result = image_text_retrieval(images, texts, owner, ks=[1, 2])
    to_text, to_image = result["image_to_text"], result["text_to_image"]
    assert to_text["hit@1"] == 1  # text 1 for image 0, text 2 for image 2
    assert to_text["recall@1"] == 0.5
    assert (to_text["n_query"], to_text["n_skipped"], to_text["n_gallery"]) == (2, 1, 4)
    assert to_image["hit@1"] == 0.5
    assert to_image["n_gallery"] == 3
    with pytest.raises(InputError, match="owner"):
        image_text_retrieval(images, texts, owner + 1)


def test_bootstrap_intervals_are_seeded_and_have_the_width_of_the_standard_error() -> None:
    scores, relevance = random_problem(17, n=400)
    positives = positives_from_relevance(relevance)
    plain = evaluate(scores, positives=positives)
    result = evaluate(scores, positives=positives, bootstrap="auto", seed=1)
    assert result == evaluate(scores, positives=positives, bootstrap=1000, seed=1)
    assert result != evaluate(scores, positives=positives, bootstrap=1000, seed=2)
    assert {name: value for name, value in result.items() if name in plain} == plain
    per_query = per_query_metrics(scores, positives=positives)
    for name, values in (
        ("hit@5", per_query["hit@5"]),
        ("map", per_query["ap"]),
        ("ndcg@5", per_query["ndcg@5"]),
    ):
        low, high = result[f"{name}_low"], result[f"{name}_high"]
        assert low < result[name] < high
        assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(len(values)), rel=0.15)
    assert result["medr_low"] <= result["medr"] <= result["medr_high"]
    assert "n_query_low" not in result


def test_auto_bootstrap_stops_at_5000_queries() -> None:
    scores = np.random.default_rng(0).normal(size=(5000, 2))
    at, below = (evaluate(scores[:n], positives=[[0]] * n, ks=[1], bootstrap="auto") for n in (5000, 4999))
    assert "hit@1_low" in below
    assert "hit@1_low" not in at


# -- CMC and zero-shot ----------------------------------------------------------------------------


def test_cmc_and_map_leave_out_the_own_item_and_truncate() -> None:
    queries, labels = np.random.default_rng(18).normal(size=(30, 6)), np.arange(30) // 3
    labels[-1] = 99  # alone in its class
    gallery = np.concatenate([queries[:, :4] + 0.5 * np.random.default_rng(19).normal(size=(30, 4))], axis=1)
    result = cmc_map_self_excluded(queries, gallery, labels, topk=4, chunk_size=7)
    cosine = (queries[:, :4] @ gallery.T) / np.outer(
        np.linalg.norm(queries[:, :4], axis=1), np.linalg.norm(gallery, axis=1)
    )
    aps, first = [], []
    for i in range(29):
        others = np.arange(30) != i
        same = labels[others] == labels[i]
        aps.append(average_precision_score(same, cosine[i, others]))
        first.append(np.flatnonzero(same[np.argsort(-cosine[i, others])])[0] + 1)
    assert result.n_valid == 29
    assert result.map == pytest.approx(np.mean(aps), rel=1e-12)
    np.testing.assert_allclose(result.cmc, [np.mean(np.array(first) <= k) for k in (1, 2, 3, 4)], rtol=1e-12)
    np.testing.assert_array_equal(cmc_curve(np.array([1, 3, np.nan, 3]), 3), [1 / 3, 1 / 3, 1])


def test_zero_shot_classifier_normalises_each_template_before_averaging() -> None:
    weights = zero_shot_classifier(np.array([[[100.0, 0], [0, 1]], [[0, -2], [0, -3]]]))
    np.testing.assert_allclose(weights, [[math.sqrt(0.5), math.sqrt(0.5)], [0, -1]], atol=1e-15)


def test_zero_shot_accuracy_micro_and_macro_over_present_classes() -> None:
    weights = np.eye(4)
    images = np.array([[9.0, 1, 0, 0], [9, 2, 1, 0], [9, 3, 1, 0], [0, 0, 5, 6]])
    labels = np.array([0, 0, 1, 2])
    np.testing.assert_array_equal(zero_shot_predict(images, weights, chunk_size=3), [0, 0, 0, 3])
    got = zero_shot_accuracy(images, weights, labels, ks=(1, 2), chunk_size=3)
    assert got["top1_micro"] == 0.5
    assert got["top1_macro"] == pytest.approx(1 / 3)
    assert got["top2_micro"] == got["top2_macro"] == 1
    assert (got["n_image"], got["n_class"], got["n_class_present"]) == (4, 4, 3)
    with pytest.raises(InputError, match="4 classes"):
        zero_shot_accuracy(images, weights, labels + 2)
