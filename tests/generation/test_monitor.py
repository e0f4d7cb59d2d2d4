"""When a run warns, and whom it names when it stops."""

from __future__ import annotations

import math

import pytest
import torch

from generation.methods.reward_weighted import ScoredBatch
from generation.training.denoiser import Batch, Conditioning
from generation.training.monitor import check_finite, collapse_warnings, mean_of, winner_drift
from mmalign.errors import MMAlignError, NonFiniteLossError


def batch(names: list[str], times: list[int], members: int = 2) -> Batch:
    size = len(names) * members
    empty = torch.zeros(size, 4, 8, 8)
    return Batch(names, empty, empty, torch.tensor(times).repeat(members), Conditioning(torch.zeros(size, 77, 8)))


def test_drift_is_against_the_first_look() -> None:
    start = {"probe_mse_w": 0.5, "probe_mse_l": 0.4}
    assert winner_drift(start, start) == 0
    assert winner_drift(start, {"probe_mse_w": 0.55, "probe_mse_l": 0.9}) == pytest.approx(0.1)
    assert winner_drift(start, {"probe_mse_w": 0.25}) == pytest.approx(-0.5)


def test_a_winner_error_a_fifth_above_its_start_is_told() -> None:
    start = {"probe_mse_w": 1.0}
    assert collapse_warnings(start, {"probe_mse_w": 1.19}) == {}
    ((kind, warning),) = collapse_warnings(start, {"probe_mse_w": 1.3}).items()
    assert "30%" in warning
    assert "lower learning rate" in warning
    assert "\n" not in warning
    assert list(collapse_warnings(start, {"probe_mse_w": 1.5})) == [kind]


def test_nothing_left_to_learn_is_told() -> None:
    start = {"probe_mse_w": 1.0, "probe_margin_accuracy": 0.5}
    for drift, accuracy in ((1.1, 0.9), (0.9, 1.0), (1.01, 1.0)):
        assert collapse_warnings(start, {"probe_mse_w": drift, "probe_margin_accuracy": accuracy}) == {}
    ((kind, warning),) = collapse_warnings(start, {"probe_mse_w": 1.1, "probe_margin_accuracy": 1.0}).items()
    assert "ranked right" in warning
    assert kind not in collapse_warnings(start, {"probe_mse_w": 1.4, "probe_margin_accuracy": 1.0})  # that is worse


def test_objectives_without_winners_do_not_drift() -> None:
    for start, values in (({"probe_mse": 0.3}, {"probe_mse": 0.9}), ({"probe_mse_w": 0.0}, {"probe_mse_w": 1.0})):
        assert winner_drift(start, values) is None
        assert collapse_warnings(start, values) == {}


def test_means_are_over_samples_not_batches() -> None:
    parts = [{"mse": torch.tensor([1.0, 2.0, 3.0])}, {"mse": torch.tensor([6.0], requires_grad=True)}]
    mean = mean_of(parts)["mse"]
    assert mean.item() == 3
    assert mean.ndim == 0
    assert not mean.requires_grad


def test_finite_values_pass() -> None:
    values = {"loss": 1.0, "grad_norm": math.inf}
    check_finite(1, values, [{"loss": torch.ones(1)}], [batch(["a"], [1])], but=("grad_norm",))
    with pytest.raises(NonFiniteLossError, match="grad_norm is not finite"):
        check_finite(1, values, [{"loss": torch.ones(1)}], [batch(["a"], [1])])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_the_rows_that_are_not_finite_are_named(bad: float) -> None:
    parts = [
        {"loss": torch.tensor([1.0]), "mse_w": torch.tensor([1.0, 2.0]), "mse_l": torch.tensor([1.0, 2.0])},
        {"loss": torch.tensor([bad]), "mse_w": torch.tensor([1.0, 2.0]), "mse_l": torch.tensor([1.0, bad])},
    ]
    batches = [batch(["row 1", "row 2"], [10, 20]), batch(["row 3", "row 4"], [30, 40])]
    with pytest.raises(NonFiniteLossError) as caught:
        check_finite(17, {"loss": bad, "mse_w": 1.5, "mse_l": bad}, parts, batches)
    message = str(caught.value)
    assert isinstance(caught.value, MMAlignError)
    assert "\n" not in message
    assert message.startswith("optimiser step 17: loss, mse_l is not finite; rows: row 4 (timestep 40). ")


def test_a_gradient_without_a_culprit_names_all_rows_but_not_too_many() -> None:
    parts = [{"loss": torch.ones(1), "mse_w": torch.ones(10)}]
    with pytest.raises(NonFiniteLossError) as caught:
        check_finite(1, {"loss": 1.0, "grad_norm": math.nan}, parts, [batch([f"row {n}" for n in range(10)], [5] * 10)])
    assert "row 0 (timestep 5)" in str(caught.value)
    assert "row 8" not in str(caught.value)
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_a_row_of_the_second_set_is_named_by_its_own_name(size: int) -> None:
    second = batch([f"other {n}" for n in range(size)], [7] * size, 1)
    first = ScoredBatch(batch([f"scored {n}" for n in range(size)], [9] * size, 1), second)
    bad = torch.ones(size)
    bad[-1] = math.nan
    parts = [{"loss": torch.tensor([math.nan]), "mse": torch.ones(size), "mse_pretrain": bad}]
    with pytest.raises(NonFiniteLossError) as caught:
        check_finite(1, {"loss": math.nan, "mse": 1.0, "mse_pretrain": math.nan}, parts, [first])
    assert f"rows: other {size - 1} (timestep 7). " in str(caught.value)
