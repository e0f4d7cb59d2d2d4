"""Kernel alignment: the image tower of a CLIP towards a vision-only teacher, on images alone."""

from .report import KernelReport
from .running import TEACHER, align_to_teacher

__all__ = ["TEACHER", "KernelReport", "align_to_teacher"]
