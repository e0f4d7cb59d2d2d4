"""When a run warns, and whom it names when it stops."""

from __future__ import annotations

import json
import math

import pytest
import torch

from generation.training.denoiser import Batch, Conditioning
from generation.training.monitor import Probe, check_finite, mean_of
from mmalign.errors import MMAlignError, NonFiniteLossError


def batch(names: list[str], times: list[int], members: int = 2, pretraining: Batch | None = None) -> Batch:
    size = len(names) * members
    empty = torch.zeros(size, 4, 8, 8)
    return Batch(names, empty, empty, torch.tensor(times).repeat(members), Conditioning(torch.zeros(size, 77, 8)),
                 pretraining=pretraining)  # fmt: skip


def test_drift_is_against_the_first_look() -> None:
    probe = Probe()
    named, warnings = probe.read({"mse_w": 0.5, "mse_l": 0.4})
    assert named == {"probe_mse_w": 0.5, "probe_mse_l": 0.4, "winner_drift": 0.0}
    assert warnings == []
    named, _ = probe.read({"mse_w": 0.55, "mse_l": 0.9})
    assert named["winner_drift"] == pytest.approx(0.1)
    named, _ = probe.read({"mse_w": 0.25, "mse_l": 0.9})
    assert named["winner_drift"] == pytest.approx(-0.5)


def test_a_winner_error_a_fifth_above_its_start_is_told_once() -> None:
    probe = Probe()
    probe.read({"mse_w": 1.0})
    assert probe.read({"mse_w": 1.19})[1] == []
    (warning,) = probe.read({"mse_w": 1.3})[1]
    assert "30%" in warning
    assert "lower learning rate" in warning
    assert "\n" not in warning
    assert probe.read({"mse_w": 1.5})[1] == []


def test_nothing_left_to_learn_is_told_once() -> None:
    probe = Probe()
    probe.read({"mse_w": 1.0, "margin_accuracy": 0.5})
    assert probe.read({"mse_w": 1.1, "margin_accuracy": 0.9})[1] == []
    assert probe.read({"mse_w": 0.9, "margin_accuracy": 1.0})[1] == []
    (warning,) = probe.read({"mse_w": 1.1, "margin_accuracy": 1.0})[1]
    assert "ranked right" in warning
    assert probe.read({"mse_w": 1.15, "margin_accuracy": 1.0})[1] == []
    assert len(probe.read({"mse_w": 1.4, "margin_accuracy": 1.0})[1]) == 1  # the other one is news


def test_a_restored_probe_remembers() -> None:
    probe = Probe()
    probe.read({"mse_w": 1.0})
    probe.read({"mse_w": 1.5})
    restored = Probe(**json.loads(json.dumps(probe.to_dict())))
    named, warnings = restored.read({"mse_w": 1.6})
    assert named["winner_drift"] == pytest.approx(0.6)
    assert warnings == []


def test_objectives_without_winners_are_only_named() -> None:
    probe = Probe()
    assert probe.read({"mse": 0.3}) == ({"probe_mse": 0.3}, [])
    assert Probe().read({"mse_w": 0.0}) == ({"probe_mse_w": 0.0}, [])


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
    assert message.startswith("step 17: loss, mse_l is not finite; rows: row 4 (timestep 40). ")


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
    first = batch([f"scored {n}" for n in range(size)], [9] * size, 1, second)
    bad = torch.ones(size)
    bad[-1] = math.nan
    parts = [{"loss": torch.tensor([math.nan]), "mse": torch.ones(size), "mse_pretrain": bad}]
    with pytest.raises(NonFiniteLossError) as caught:
        check_finite(1, {"loss": math.nan, "mse": 1.0, "mse_pretrain": math.nan}, parts, [first])
    assert f"rows: other {size - 1} (timestep 7). " in str(caught.value)
