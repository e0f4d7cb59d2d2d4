"""Features of frozen encoders, layer by layer: extracted once, cached by content, resumed after a stop."""

from .extraction import extract_features
from .store import Features, FeatureSet, load_features

__all__ = ["FeatureSet", "Features", "extract_features", "load_features"]
