"""Calibrated scores against scipy's normal densities, the order of scores, and a toy of two partitions."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from scipy.stats import norm

from mmalign.errors import InputError
from mmalign.score_calibration import ScoreCalibration

SPREADS = pytest.mark.parametrize(("matched_std", "background_std"), [(0.05, 0.05), (0.03, 0.1), (0.1, 0.03)])


@SPREADS
def test_ratio_is_that_of_two_normal_densities(matched_std: float, background_std: float) -> None:
    calibration = ScoreCalibration(0.6, matched_std, 0.2, background_std)
    scores = np.linspace(0.2, 0.6, 30).reshape(5, 6)  # between the means the parabola does not turn
    expected = norm.logpdf(scores, 0.6, matched_std) - norm.logpdf(scores, 0.2, background_std)
    np.testing.assert_allclose(calibration.log_likelihood_ratio(scores), expected, rtol=1e-9, atol=1e-9)


@SPREADS
def test_order_is_kept_far_beyond_the_vertex(matched_std: float, background_std: float) -> None:
    calibration = ScoreCalibration(0.6, matched_std, 0.2, background_std)
    scores = np.concatenate([[-np.inf, -1e6], np.linspace(-3, 3, 100_001), [1e6, np.inf]])
    found = calibration.log_likelihood_ratio(scores)
    assert (np.diff(found) > 0).all()
    assert found[0] == -np.inf
    assert found[-1] == np.inf
    turned = norm.logpdf(scores[1:-1], 0.6, matched_std) - norm.logpdf(scores[1:-1], 0.2, background_std)
    assert (np.diff(turned) > 0).all() == (matched_std == background_std)  # the plain ratio does not do this


@SPREADS
def test_continuation_has_no_step_and_no_kink(matched_std: float, background_std: float) -> None:
    calibration = ScoreCalibration(0.6, matched_std, 0.2, background_std)
    scores = np.linspace(-1, 2, 30_001)
    slope = np.diff(calibration.log_likelihood_ratio(scores)) / np.diff(scores)
    steepest = max(matched_std**-2, background_std**-2)
    assert np.abs(np.diff(slope)).max() <= 2 * steepest * (scores[1] - scores[0])


def test_fit_gives_means_and_deviations() -> None:
    rng = np.random.default_rng(0)
    matched, background = rng.normal(0.5, 0.1, 300).astype(np.float32), rng.normal(0.1, 0.05, 4000)
    fitted = ScoreCalibration.fit(matched, background)
    by_hand = [sum(map(float, side)) / len(side) for side in (matched, background)]
    spread = [
        (sum((float(s) - mean) ** 2 for s in side) / (len(side) - 1)) ** 0.5
        for side, mean in zip((matched, background), by_hand, strict=True)
    ]
    found = (fitted.matched_mean, fitted.matched_std, fitted.background_mean, fitted.background_std)
    np.testing.assert_allclose(found, (by_hand[0], spread[0], by_hand[1], spread[1]), rtol=1e-9)


def test_scores_all_the_same_can_be_fitted() -> None:
    fitted = ScoreCalibration.fit(np.ones(3), np.zeros(3))
    found = fitted.log_likelihood_ratio(np.linspace(-2, 2, 1001))
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()


def test_json_and_back() -> None:
    fitted = ScoreCalibration.fit(np.array([0.5, 0.7]), np.array([0.1, 0.2]))
    assert ScoreCalibration.from_dict(json.loads(json.dumps(fitted.to_dict())) | {"note": "x"}) == fitted
    with pytest.raises(InputError, match="lacks matched_std, background_std"):
        ScoreCalibration.from_dict({"matched_mean": 1.0, "background_mean": 0.0})


def test_calibration_keeps_one_partition_from_crowding_out_the_other() -> None:
    """Queries find an item in partition A (high scores for everything) or B (low ones); merged by score or by ratio."""
    rng = np.random.default_rng(1)

    def scores(kind: str, matched: bool, n: int) -> np.ndarray:
        shift, spread = {"a": (0.5, 0.1), "b": (0.0, 0.05)}[kind]
        return rng.normal(shift + 4 * spread * matched, spread, n)

    calibrations = {k: ScoreCalibration.fit(scores(k, True, 500), scores(k, False, 5000)) for k in "ab"}
    hits = {}
    for home, merged in product("ab", ("raw", "ratio")):
        found = 0
        for _ in range(300):
            own = scores(home, True, 1)
            others = {k: scores(k, False, 100) for k in "ab"}
            rest = np.concatenate([others[k] if merged == "raw" else calibrations[k].log_likelihood_ratio(others[k])
                                   for k in "ab"])  # fmt: skip
            best = own if merged == "raw" else calibrations[home].log_likelihood_ratio(own)
            found += bool(best[0] > rest.max())
        hits[home, merged] = found / 300
    assert hits["b", "raw"] < 0.1
    assert min(hits["a", "ratio"], hits["b", "ratio"]) > 0.8


def test_wrong_arguments_are_named() -> None:
    good = np.array([0.5, 0.7])
    with pytest.raises(InputError, match="matched holds 1 scores; give 2 or more"):
        ScoreCalibration.fit(good[:1], good)
    with pytest.raises(InputError, match="background score 1 is nan"):
        ScoreCalibration.fit(good, np.array([0.1, np.nan]))
    with pytest.raises(InputError, match=r"matched pairs score 0.5 on average, others 0.6"):
        ScoreCalibration.fit(good - 0.1, good)
    with pytest.raises(InputError, match="do not tell them apart"):
        ScoreCalibration.fit(good, good)
    with pytest.raises(InputError, match="matched_std is 0; give a finite number above 0"):
        ScoreCalibration(1, 0, 0, 1)
    with pytest.raises(InputError, match="scores hold NaN"):
        ScoreCalibration(1, 1, 0, 1).log_likelihood_ratio(np.array([np.nan]))
