"""Fine-tuning image encoders: beside an older one (OCA), or towards a vision-only teacher (kernel alignment)."""

from .oca import CompatibilityReport, fine_tune_compatible

__all__ = ["CompatibilityReport", "fine_tune_compatible"]
