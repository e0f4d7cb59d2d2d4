"""Right captions from wrong ones: against scikit-learn, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from mmalign.errors import InputError
from mmalign.metrics import sentence_auroc, sentence_average_precision, word_accuracy


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40), st.booleans())
def test_against_scikit_learn(pairs: list[tuple[int, bool]], tied: bool) -> None:
    flags = np.array([wrong for _, wrong in pairs])
    assume(flags.any() and not flags.all())
    scores = np.array([score for score, _ in pairs], np.float64)
    if not tied:
        scores += np.random.default_rng(0).normal(size=len(scores))
    assert sentence_auroc(scores, flags) == pytest.approx(roc_auc_score(flags, -scores), abs=1e-12)
    assert sentence_average_precision(scores, flags) == pytest.approx(
        average_precision_score(flags, -scores), abs=1e-12
    )


def test_by_hand() -> None:
    #         wrong  right  wrong  right
    scores = [-0.5, -0.2, -0.1, 0.0]
    wrong = [True, False, True, False]
    assert sentence_auroc(scores, wrong) == 3 / 4
    assert sentence_average_precision(scores, wrong) == pytest.approx((1 + 2 / 3) / 2)
    # F-CLIPScore is exactly 0 wherever no word is flagged: a coin there.
    assert sentence_auroc([0.0, 0.0, 0.0], [True, False, False]) == 0.5
    assert sentence_average_precision([0.0, 0.0, 0.0], [True, False, False]) == pytest.approx(1 / 3)
    assert sentence_auroc([-1.0, 0.0, 0.0], [True, True, False]) == 0.75
    assert sentence_auroc(torch.tensor([0.1, 0.2]), torch.tensor([True, False])) == 1.0
    assert sentence_auroc([-np.inf, 0.2], [1, 0]) == 1.0


def test_the_lowest_word() -> None:
    scores = [[-0.3, 0.1, 0.2], [0.3, 0.1, 0.2], [0.0, 0.0, 0.5]]
    wrong = [[True, False, False], [True, False, True], [False, True, False]]
    assert word_accuracy(scores[:1], wrong[:1]) == 1.0
    assert word_accuracy(scores[1:2], wrong[1:2]) == 0.0
    assert word_accuracy(scores[2:], wrong[2:]) == 0.5
    assert word_accuracy(scores, wrong) == 0.5


def test_what_cannot_be_measured() -> None:
    for measure in (sentence_auroc, sentence_average_precision):
        with pytest.raises(InputError, match="none of 2 captions are wrong; give right and wrong ones"):
            measure([0.1, 0.2], [False, False])
        with pytest.raises(InputError, match="all of 2 captions are wrong"):
            measure([0.1, 0.2], [True, True])
        with pytest.raises(InputError, match="none of 0 captions"):
            measure([], [])
        with pytest.raises(InputError, match=r"shape \(2,\) and flags \(3,\)"):
            measure([0.1, 0.2], [True, False, True])
        with pytest.raises(InputError, match="a score one true or false"):
            measure([0.1, 0.2], [2, 0])
        with pytest.raises(InputError, match="score 1 is NaN"):
            measure([0.1, np.nan], [True, False])
    with pytest.raises(InputError, match="0 captions with scores and 0 with flags"):
        word_accuracy([], [])
    with pytest.raises(InputError, match="1 captions with scores and 2 with flags"):
        word_accuracy([[0.1]], [[True], [True]])
    with pytest.raises(InputError, match="caption 1 has no wrong word"):
        word_accuracy([[0.1], [0.2]], [[True], [False]])
    with pytest.raises(InputError, match=r"caption 0: scores have shape \(1,\) and flags \(2,\)"):
        word_accuracy([[0.1]], [[True, False]])
