"""Where a caption and an image disagree, for people: words with scores, marked, drawn, and calibrated by an encoder.

`mmalign.word_attribution` has the mathematics and what it is good for: objects far more than attributes, relations and
counts. That no word is marked does not say that the caption fits.
"""

from .calibrating import WordCalibration
from .drawing import check_picture
from .evaluating import WordReport, calibrate, evaluate_words
from .explanation import ExplainedWord, Explanation, explain, explain_many

__all__ = [
    "ExplainedWord",
    "Explanation",
    "WordCalibration",
    "WordReport",
    "calibrate",
    "check_picture",
    "evaluate_words",
    "explain",
    "explain_many",
]
