"""Objects in images: boxes, detectors, and encoders whose attention follows them."""

from .blip2 import Blip2Matcher
from .boxes import BoxesFile, Detections, Detector, checked_boxes, choose_boxes, read_boxes
from .detectors import load_detector
from .encoder import ObjectAwareEncoder
from .perturbing import PerturbationSettings, attention_masses, grid_of, perturb_queries, perturbed
from .reranking import CosineReranker, MatchReranker, Reranker, load_reranker

__all__ = [
    "Blip2Matcher",
    "BoxesFile",
    "CosineReranker",
    "Detections",
    "Detector",
    "MatchReranker",
    "ObjectAwareEncoder",
    "PerturbationSettings",
    "Reranker",
    "attention_masses",
    "checked_boxes",
    "choose_boxes",
    "grid_of",
    "load_detector",
    "load_reranker",
    "perturb_queries",
    "perturbed",
    "read_boxes",
]
