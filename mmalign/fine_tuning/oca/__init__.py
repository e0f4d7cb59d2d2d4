"""OCA: fine-tuning on labelled images so that new queries go on searching what an older encoder has indexed."""

from .recipe import Recipe
from .report import CompatibilityReport
from .running import fine_tune_compatible

__all__ = ["CompatibilityReport", "Recipe", "fine_tune_compatible"]
