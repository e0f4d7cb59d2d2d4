"""Scores of two partitions of one index on one scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from .errors import InputError
from .metrics._arrays import as_numpy

__all__ = ["ScoreCalibration"]

LEAST_SLOPE = 1e-3  # of the slope that the larger of both spreads gives
LEAST_SPREAD = 1e-3  # of the distance between the means


@dataclass(frozen=True)
class ScoreCalibration:
    """Gaussian fits to scores of matched and of unrelated pairs, and what they make of a score.

    For merging the results of partitions whose vectors come from different models. Cosines of two new rows are larger
    than those of a new and an old one, so on the raw scores the items embedded anew crowd out the others. Instead:
    search each partition by itself, map its scores by its own calibration, fitted on held-out pairs, and sort all
    results by what comes out. Methods card "backward-compatible representations", section 4, trap 1; ours, in no paper.

    Attributes:
        matched_mean: of the scores of pairs that belong together; above `background_mean`.
        matched_std: their standard deviation, above 0.
        background_mean: of the scores of pairs that do not.
        background_std: their standard deviation, above 0.

    Raises:
        InputError: a number is not finite, a deviation not above 0, or matched pairs do not score above the others.
    """

    matched_mean: float
    matched_std: float
    background_mean: float
    background_std: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, str) or not math.isfinite(value) or (name.endswith("_std") and value <= 0):
                wanted = "a finite number" + (" above 0" if name.endswith("_std") else "")
                raise InputError(f"{name} is {value!r}; give {wanted}")
        if self.matched_mean <= self.background_mean:
            raise InputError(
                f"matched pairs score {self.matched_mean:.4g} on average, others {self.background_mean:.4g}: these "
                "scores do not tell them apart; check that the rows are paired, and that higher means more alike"
            )

    @classmethod
    def fit(cls, matched: Float[np.ndarray, " m"], background: Float[np.ndarray, " b"]) -> ScoreCalibration:
        """Means and standard deviations (over n - 1) of both kinds of scores.

        Deviations are at least a thousandth of the distance between the means: scores that are all the same would
        leave nothing to divide by.

        Args:
            matched: scores of queries with what belongs to them.
            background: scores of the same queries with other items, drawn as a search meets them.

        Raises:
            InputError: fewer than 2 scores of a kind, one not finite, or matched pairs do not score above the others.
        """
        scores = {}
        for name, given in (("matched", matched), ("background", background)):
            values = as_numpy(given).astype(np.float64).ravel()
            if values.size < 2:
                raise InputError(f"{name} holds {values.size} scores; give 2 or more, better some hundred")
            if not np.isfinite(values).all():
                bad = int((~np.isfinite(values)).argmax())
                raise InputError(f"{name} score {bad} is {values[bad]}; leave pairs without a score out")
            scores[name] = values
        means = {name: float(values.mean()) for name, values in scores.items()}
        least = LEAST_SPREAD * abs(means["matched"] - means["background"]) or 1.0
        stds = {name: max(float(values.std(ddof=1)), least) for name, values in scores.items()}
        return cls(means["matched"], stds["matched"], means["background"], stds["background"])

    def log_likelihood_ratio(self, scores: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
        """log N(s; matched) - log N(s; background) in float64, continued so that it rises with s everywhere.

        With unequal deviations the ratio is a parabola: beyond its vertex a better score would count for less, by the
        tails of two Gaussians that are not to be trusted there. Where its slope has fallen to a thousandth of
        (matched_mean - background_mean) / max(std)^2, which is always outside the two means, it goes on as a line of
        that slope. So a partition keeps its own order, whatever it is merged with.

        Args:
            scores: of any shape; -inf (no result) gives -inf.

        Raises:
            InputError: a score is NaN.
        """
        values = as_numpy(scores).astype(np.float64)
        if np.isnan(values).any():
            raise InputError("scores hold NaN; give -inf where there is no result")
        matched, background = self.matched_std**-2, self.background_std**-2
        least = LEAST_SLOPE * (self.matched_mean - self.background_mean) * min(matched, background)
        # The slope at s is bend * s + (matched_mean * matched - background_mean * background).
        bend = background - matched
        finite = np.where(np.isinf(values), self.matched_mean, values)
        within = finite
        if bend:
            turn = (least - self.matched_mean * matched + self.background_mean * background) / bend
            within = np.minimum(finite, turn) if bend < 0 else np.maximum(finite, turn)
        a = (within - self.matched_mean) / self.matched_std
        b = (within - self.background_mean) / self.background_std
        ratio = (b - a) * (b + a) / 2 + math.log(self.background_std / self.matched_std)
        return np.where(np.isinf(values), values, ratio + least * (finite - within))

    def to_dict(self) -> dict[str, float]:
        """The four numbers by name, fit for JSON."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> ScoreCalibration:
        """What `to_dict` gave.

        Raises:
            InputError: a number is missing, or cannot be one of a calibration. Further names are left alone.
        """
        names = list(cls.__dataclass_fields__)
        missing = [name for name in names if name not in values]
        if missing:
            raise InputError(f"the calibration lacks {', '.join(missing)}; fit it again")
        return cls(**{name: values[name] for name in names})
