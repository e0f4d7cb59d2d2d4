"""Metrics: numpy in and out, no model, no files, no printing."""

from .cmc import CMCResult, cmc_curve, cmc_map_self_excluded, truncated_cosine
from .compatibility import CompatibilityResult, FlipRates, compatibility, flip_rates, update_gain
from .opis import OPISResult, opis
from .retrieval import (
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
)
from .zero_shot import zero_shot_accuracy, zero_shot_classifier, zero_shot_predict

__all__ = [
    "CMCResult",
    "CompatibilityResult",
    "FlipRates",
    "OPISResult",
    "cmc_curve",
    "cmc_map_self_excluded",
    "compatibility",
    "evaluate",
    "evaluate_ranked",
    "exclude_same_item",
    "flip_rates",
    "image_text_retrieval",
    "mean_recall",
    "median_rank",
    "opis",
    "per_query_metrics",
    "positives_from_labels",
    "positives_from_relevance",
    "recall_sum",
    "truncated_cosine",
    "update_gain",
    "zero_shot_accuracy",
    "zero_shot_classifier",
    "zero_shot_predict",
]
