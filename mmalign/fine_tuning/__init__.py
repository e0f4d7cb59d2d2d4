"""Fine-tuning an image encoder on labelled images so that it goes on searching what an older one has indexed."""

from .recipe import Recipe
from .report import CompatibilityReport
from .running import fine_tune_compatible

__all__ = ["CompatibilityReport", "Recipe", "fine_tune_compatible"]
