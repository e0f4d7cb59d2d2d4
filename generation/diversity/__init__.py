"""How diverse generated images are, and prompts to find out with: DivGenBench, arXiv 2512.24146, on any encoder."""

from mmalign.metrics import HIGHER_IS_MORE_DIVERSE, diversity_values

from .measuring import DiversityReport, PromptDifference, compare_prompts, measure_diversity
from .prompts import DIMENSIONS, PromptSpec, diversity_prompts

__all__ = [
    "DIMENSIONS",
    "HIGHER_IS_MORE_DIVERSE",
    "DiversityReport",
    "PromptDifference",
    "PromptSpec",
    "compare_prompts",
    "diversity_prompts",
    "diversity_values",
    "measure_diversity",
]
