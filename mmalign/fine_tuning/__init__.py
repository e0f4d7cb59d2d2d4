"""Fine-tuning image encoders: beside an older one (OCA), or towards a vision-only teacher (kernel alignment)."""

from .kernel import KernelReport, align_to_teacher
from .oca import CompatibilityReport, fine_tune_compatible

__all__ = ["CompatibilityReport", "KernelReport", "align_to_teacher", "fine_tune_compatible"]
