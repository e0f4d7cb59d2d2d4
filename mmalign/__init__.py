"""Images and text in one space: encoders, and how to align them.

Names below are imported when first used, so that `import mmalign` costs nothing.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from . import metrics
    from .alignment import Alignment, Pairs, align, align_encoders, align_many, load_alignment
    from .compatible_maps import fit_compatible_maps
    from .conse import class_bridge
    from .contrastive import clip_loss, siglip_loss
    from .encoders import DEFAULT_SPEC, Encoder, JoinedEncoder, load_encoder, register_source
    from .encoders.compatible import CompatibleEncoder
    from .errors import InputError, MMAlignError
    from .explaining import explain, explain_many
    from .features import Features, extract_features, load_features
    from .fine_tuning import align_to_teacher, fine_tune_compatible
    from .imaging import ImagePreprocessing, read_image
    from .kernel_alignment import kernel_alignment_loss
    from .layer_selection import layer_scores
    from .object_aware import ObjectAwareEncoder, load_detector, perturb_queries
    from .spherical_interpolation import interpolate_queries, padded_procrustes
    from .structure import structure_loss
    from .word_attribution import calibrate_eps, f_clip_score, word_attribution

__getattr__, __dir__, _names = lazy_loader.attach(
    __name__,
    submodules=["metrics"],
    submod_attrs={
        "alignment": ["Alignment", "Pairs", "align", "align_encoders", "align_many", "load_alignment"],
        "compatible_maps": ["fit_compatible_maps"],
        "conse": ["class_bridge"],
        "contrastive": ["clip_loss", "siglip_loss"],
        "encoders": ["DEFAULT_SPEC", "Encoder", "JoinedEncoder", "load_encoder", "register_source"],
        "encoders.compatible": ["CompatibleEncoder"],
        "errors": ["InputError", "MMAlignError"],
        "features": ["Features", "extract_features", "load_features"],
        "explaining": ["explain", "explain_many"],
        "fine_tuning": ["align_to_teacher", "fine_tune_compatible"],
        "imaging": ["ImagePreprocessing", "read_image"],
        "kernel_alignment": ["kernel_alignment_loss"],
        "layer_selection": ["layer_scores"],
        "object_aware": ["ObjectAwareEncoder", "load_detector", "perturb_queries"],
        "spherical_interpolation": ["interpolate_queries", "padded_procrustes"],
        "structure": ["structure_loss"],
        "word_attribution": ["calibrate_eps", "f_clip_score", "word_attribution"],
    },
)

try:
    __version__ = version("mmalign")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [*_names, "__version__"]
