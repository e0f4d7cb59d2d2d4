"""Frozen encoders brought into one space: heads fitted on cached features, judged beside chance and closed forms."""

from .aligning import Pairs, align, align_many
from .encoder import AlignedEncoder, TowerEncoder
from .fitting import FitOptions
from .given import align_features
from .measuring import evaluate_on_captions, evaluate_zero_shot
from .methods import METHODS
from .report import AlignmentRun
from .result import Alignment, load_alignment
from .running import align_encoders

__all__ = [
    "METHODS",
    "AlignedEncoder",
    "Alignment",
    "AlignmentRun",
    "FitOptions",
    "Pairs",
    "TowerEncoder",
    "align",
    "align_encoders",
    "align_features",
    "align_many",
    "evaluate_on_captions",
    "evaluate_zero_shot",
    "load_alignment",
]
