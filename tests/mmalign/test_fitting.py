"""The one loop of trained heads: its losses against the pure functions, its order, its choice, its seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.alignment import fitting
from mmalign.alignment.fitting import TEXT, FitOptions, Fitted, PairedRows, fit_heads, mean_reciprocal_rank
from mmalign.alignment.methods import options_of
from mmalign.contrastive import clip_loss, siglip_loss, softened_targets
from mmalign.dispersion import inter_dispersion, intra_dispersion
from mmalign.errors import InputError, NonFiniteLossError
from mmalign.metrics import image_text_retrieval
from mmalign.structure import structure_loss, structure_objective
from mmalign.threshold_consistency import tcm_pairs

pytestmark = pytest.mark.usefixtures("one_thread")

STILL = {"learning_rate": 1e-12, "weight_decay": 0.0, "dim": 6}  # the heads stay as they are initialised


def pairs(n: int = 40, *, texts_a_row: int = 1, noise: float = 0.5, seed: int = 0) -> PairedRows:
    """Rows of 12 and texts of 9 dimensions that share four; classes are the signs of the first two."""
    world = np.random.default_rng(7)
    to_row, to_text = world.normal(size=(4, 12)), world.normal(size=(4, 9))
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 4))
    owner = rng.permutation(np.repeat(np.arange(n), texts_a_row)) if texts_a_row > 1 else np.arange(n)
    rows = shared @ to_row + noise * rng.normal(size=(n, 12)) + 2
    texts = shared[owner] @ to_text + noise * rng.normal(size=(len(owner), 9)) - 1
    labels = (shared[:, 0] > 0) + 2 * (shared[:, 1] > 0)
    return PairedRows(torch.from_numpy(rows).float(), torch.from_numpy(texts).float(), owner, labels)


def fit(training: PairedRows, validation: PairedRows | None = None, **options: Any) -> Fitted:
    seed, unpaired = options.pop("seed", 0), options.pop("unpaired", None)
    held = None if validation is None else {"image": validation}
    return fit_heads({"image": training}, held, FitOptions(**options), unpaired=unpaired, seed=seed)


def weights(fitted: Fitted) -> list[Tensor]:
    return [value for head in fitted.heads.values() for value in head.state_dict().values()]


def test_equal_seeds_give_equal_heads_and_others_do_not() -> None:
    data = pairs(texts_a_row=2)
    options: dict[str, Any] = {"steps": 12, "batch_size": 16, "dim": 6, "head": "residual", "dropout": 0.3}
    torch.manual_seed(1)
    first = fit(data, **options)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second, other = fit(data, **options), fit(data, seed=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
    assert first.history == second.history
    assert not all(torch.equal(a, b) for a, b in zip(weights(first), weights(other), strict=True))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the random numbers of the caller are left alone"


def test_heads_of_the_best_look_are_kept() -> None:
    data, held = pairs(30, noise=1.5), pairs(60, noise=1.5, seed=1)
    options: dict[str, Any] = {"steps": 400, "structure": 0.0, "dim": 6, "learning_rate": 3e-2, "evaluate_every": 5}
    by_rank = fit(data, held, patience=4, **options)
    seen = [line["validation_mrr"] for line in by_rank.history]
    assert by_rank.step == by_rank.history[int(np.argmax(seen))]["step"]
    assert by_rank.stopped == by_rank.step + 4 * 5 < 400, "patience is over"
    found = image_text_retrieval(
        by_rank.heads["image"](held.rows), by_rank.heads[TEXT](held.texts), held.owner, ks=(1,)
    )
    recomputed = [direction["mrr"] for direction in found.values()]
    assert np.mean(recomputed) == pytest.approx(max(seen), abs=1e-6)
    assert np.mean(recomputed) > 1.5 * seen[-1] or seen[-1] < max(seen)

    by_loss = fit(data, held, patience=4, select_by="loss", **options)
    losses = [line["validation_loss"] for line in by_loss.history]
    assert by_loss.step == by_loss.history[int(np.argmin(losses))]["step"]
    z, z_text = by_loss.heads["image"](held.rows), by_loss.heads[TEXT](held.texts)
    assert float(clip_loss(z, z_text, 20.0)) == pytest.approx(min(losses), rel=1e-5)

    last = fit(data, held, select_by="last", **options)
    assert last.step == last.stopped == 400
    straight = fit(data, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(last), weights(straight), strict=True))


def test_equal_ranks_are_told_apart_by_the_loss() -> None:
    data, held = pairs(60, noise=0.05), pairs(4, noise=0.05, seed=1)
    fitted = fit(data, held, steps=60, dim=6, structure=0.0, learning_rate=1e-2, evaluate_every=5)
    perfect = [line for line in fitted.history if line["validation_mrr"] == 1]
    assert len(perfect) > 2
    assert fitted.step == min(perfect, key=lambda line: line["validation_loss"])["step"] > perfect[0]["step"]


def test_mean_reciprocal_rank_agrees_with_the_metrics() -> None:
    data = pairs(40, texts_a_row=3)
    z, z_text = data.rows[:, :9], data.texts
    found = image_text_retrieval(z, z_text, data.owner, ks=(1,))
    wanted = np.mean([direction["mrr"] for direction in found.values()])
    assert mean_reciprocal_rank(z, z_text, data.owner) == pytest.approx(wanted, abs=1e-6)
    same = torch.ones(10, 3)
    assert mean_reciprocal_rank(same, same, np.arange(10)) == pytest.approx(0.1), "equal heads are no good heads"
    assert mean_reciprocal_rank(same * math.nan, same, np.arange(10)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": 0.0},
        {"loss": "siglip", "bias": -3.0, "temperature": 0.1, "structure": 0.0},
        {"soften": 0.3, "soften_temperature": 0.2, "structure": 0.0},
        {"structure": 4.0, "structure_warmup": 0, "temperature": 0.3, "levels": 2, "divergence": "js"},
        {"structure": 0.0, "inter_dispersion": 2.0},
        {"structure": 0.0, "intra_dispersion": 3.0},
        {"structure": 0.0, "tcm": 0.7, "tcm_margins": (0.4, 0.1)},
        {"structure": 0.0, "tcm": 0.7},
    ],
)
def test_first_loss_is_that_of_the_functions(options: dict[str, Any]) -> None:
    # The validation pairs see to it that every option bears a look at them.
    data, held = pairs(), pairs(10, seed=1)
    fitted = fit(data, held, steps=1, **STILL, **options)
    chosen = FitOptions(**options)
    z, z_text = fitted.heads["image"](data.rows), fitted.heads[TEXT](data.texts)
    scale = 1 / chosen.temperature
    if chosen.loss == "siglip":
        wanted = {"contrastive": siglip_loss(z, z_text, scale, -3.0)}
    else:
        targets = softened_targets(data.texts, weight=0.3, temperature=0.2) if chosen.soften else None
        wanted = {"contrastive": clip_loss(z, z_text, scale, targets=targets)}
    if chosen.structure:
        sides = ((data.rows, z), (data.texts, z_text))
        both = [structure_loss(*side, temperature=0.3, levels=2, divergence="js") for side in sides]
        wanted["structure"] = 4.0 * (both[0] + both[1]) / 2
        # The whole that the golden file is about.
        whole = structure_objective(data.rows, z, data.texts, z_text, step=0, weight=4.0, warmup_steps=0,
                                    temperature=0.3, levels=2, divergence="js")  # fmt: skip
        assert fitted.history[0]["loss"] == pytest.approx(float(whole.loss), rel=1e-4)
    if chosen.inter_dispersion:
        wanted["inter_dispersion"] = 2.0 * inter_dispersion(z_text)
    if chosen.intra_dispersion:
        assert data.labels is not None
        wanted["intra_dispersion"] = 3.0 * intra_dispersion(z, torch.from_numpy(data.labels))
    if chosen.tcm:
        cosines, own = normalize(z, dim=1) @ normalize(z_text, dim=1).T, torch.eye(40, dtype=torch.bool)
        others = cosines[~own].numpy()
        positive, negative = chosen.tcm_margins or (
            float(cosines[own].median()),
            float(np.quantile(others, 0.99, method="inverted_cdf")),
        )
        wanted["tcm"] = 0.7 * tcm_pairs(cosines, own, positive_margin=positive, negative_margin=negative).loss
    line = fitted.history[0]
    assert set(line) == {"step", "loss", "validation_mrr", "validation_loss", *wanted}
    for name, value in wanted.items():
        assert line[name] == pytest.approx(float(value), rel=1e-4), name
    assert line["loss"] == pytest.approx(sum(map(float, wanted.values())), rel=1e-4)


def test_structure_warms_up_from_nothing() -> None:
    fitted = fit(pairs(), steps=7, structure_warmup=4, evaluate_every=1, schedule="constant", **STILL)
    terms = [line.get("structure") for line in fitted.history]
    assert terms[0] is None
    full = terms[4]
    assert full is not None
    assert full > 0
    assert terms[1:] == pytest.approx([full / 4, full / 2, full * 3 / 4, full, full, full], rel=1e-4)


def test_unpaired_rows_enter_structure_alone() -> None:
    data, more = pairs(), pairs(25, seed=3)
    options: dict[str, Any] = {"steps": 1, "structure_warmup": 0, "temperature": 0.3, **STILL}
    without = fit(data, **options).history[0]
    fitted = fit(data, unpaired={"image": more.rows, TEXT: more.texts[:7]}, **options)
    line = fitted.history[0]
    assert line["contrastive"] == pytest.approx(without["contrastive"], rel=1e-6)
    both = []
    for name, rows in (("image", [data.rows, more.rows]), (TEXT, [data.texts, more.texts[:7]])):
        together = torch.cat(rows)
        both.append(structure_loss(together, fitted.heads[name](together), temperature=0.3))
    assert line["structure"] == pytest.approx(float(10 * (both[0] + both[1]) / 2), rel=1e-4)
    assert line["structure"] != pytest.approx(without["structure"], rel=1e-2)


def test_structure_says_when_it_has_nothing_to_hold_on_to() -> None:
    # In many dimensions all rows of no structure are far apart.
    rows = torch.randn(30, 300, generator=torch.Generator().manual_seed(0))
    data = PairedRows(rows, rows[:, :200], np.arange(30))
    assert fit(data, steps=3, dim=6, structure_warmup=0, temperature=1.0).warnings == []
    warned = fit(data, steps=3, dim=6, structure_warmup=0, temperature=0.02).warnings
    assert [warning.split(" keeps")[0] for warning in warned] == ["a row of image", "a row of text"]
    assert "try a higher temperature" in warned[0]


def test_a_batch_holds_a_row_once_with_one_of_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pairs(20, texts_a_row=3)
    seen: list[tuple[Tensor, Tensor]] = []

    def spied(image: Tensor, text: Tensor, *given: Any, **options: Any) -> Tensor:
        seen.append((image.detach(), text.detach()))
        return clip_loss(image, text, *given, **options)

    monkeypatch.setattr(fitting, "clip_loss", spied)
    fitted = fit(data, steps=40, batch_size=8, structure=0.0, **STILL)
    z, z_text = fitted.heads["image"](data.rows), fitted.heads[TEXT](data.texts)
    drawn = set()
    for image, text in seen:
        rows, texts = torch.cdist(image, z).argmin(1).numpy(), torch.cdist(text, z_text).argmin(1).numpy()
        assert len(set(rows)) == 8
        np.testing.assert_array_equal(data.owner[texts], rows)
        drawn |= set(texts)
    assert drawn == set(range(60)), "every text has its turn"
    # 20 rows give two batches of 8 before they are shuffled again: no row comes twice in these either.
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert len(set(torch.cdist(torch.cat([first[0], second[0]]), z).argmin(1).tolist())) == 16


def test_each_tensor_s_gradient_is_cut_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[list[float]] = []
    step = torch.optim.AdamW.step

    def spied(self: torch.optim.AdamW, *given: Any) -> Any:
        norms.append([float(p.grad.norm()) for group in self.param_groups for p in group["params"]])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    fit(pairs(), steps=2, structure=0.0, **STILL, clip=1e-3)
    assert norms[0] == pytest.approx([1e-3] * 4, rel=1e-2)


def test_temperature_and_bias_move_only_when_asked() -> None:
    options: dict[str, Any] = {"steps": 20, "dim": 6, "learning_rate": 1e-2, "structure": 0.0}
    assert fit(pairs(), **options).learned == {"temperature": pytest.approx(0.05)}
    assert fit(pairs(), learn_temperature=True, **options).learned["temperature"] != pytest.approx(0.05, rel=1e-2)
    fixed = fit(pairs(), loss="siglip", **options).learned
    assert fixed["temperature"] == pytest.approx(0.05)
    assert fixed["bias"] != pytest.approx(-10, abs=1e-2)
    preset = options_of("siglip", {})
    assert (preset.loss, preset.temperature, preset.learn_temperature, preset.bias) == ("siglip", 0.1, True, -10.0)


def test_a_frame_stays_as_it_is_and_gives_the_width() -> None:
    data = pairs()
    fitted = fit(data, steps=3, head="linear", text_head="frame")
    assert {head.dim for head in fitted.heads.values()} == {9}
    framed = fitted.heads[TEXT](data.texts)
    torch.testing.assert_close(framed.mean(0), torch.zeros(9), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalize(framed, dim=1), normalize(data.texts - data.texts.mean(0), dim=1))


@pytest.mark.parametrize("validated", [False, True])
def test_a_loss_that_is_no_number_stops_the_fit(validated: bool) -> None:
    held = pairs(8, seed=1) if validated else None
    # Each step makes the weights some 1e10 times larger.
    options: dict[str, Any] = {"learning_rate": 1e6, "weight_decay": 1e4, "schedule": "constant", "dim": 6}
    with pytest.raises(NonFiniteLossError, match=r"loss of step \d+ is nan \(learning_rate 1e\+06\); lower"):
        fit(pairs(), held, steps=20, **options)
    # The last update is looked at too.
    with pytest.raises(NonFiniteLossError, match=r"after step 3"):
        fit(pairs(), held, steps=4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "frame"}, "head and text_head are both 'frame'"),
        ({"head": "frame", "loss": "siglip", "learn_temperature": True}, "nothing to train"),
        ({"head": "tree"}, "head is 'tree'; give one of linear, mlp, residual, frame"),
        ({"loss": "hinge"}, "loss is 'hinge'; give one of clip, siglip"),
        ({"loss": "siglip", "soften": 0.1}, "no soft targets"),
        ({"batch_size": 1}, "batch_size is 1; give 2 or more"),
        ({"temperature": 0}, "temperature is 0"),
        ({"tcm_margins": (0.5, 0.1)}, "tcm_margins are given and tcm is 0"),
        ({"tcm": 1.0, "tcm_margins": (2.0, 0.1)}, r"tcm_margins is 2; give a number in \[-1, 1\]"),
        ({"tcm": 1.0, "tcm_margins": (0.1,)}, "tcm_margins are .* give two numbers"),
        ({"betas": (0.9, 1.0)}, "betas is 1; give"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(pairs(), steps=1, **options)
