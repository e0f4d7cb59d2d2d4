"""Trained compatible maps on synthetic models: rotated and noisy views, with and without classes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.compatible_maps import KINDS, CompatibleMaps, fit_compatible_maps
from mmalign.errors import InputError, NonFiniteLossError
from mmalign.lambda_orthogonality import compatibility_objective, relative_threshold

N, HELD = 400, 200
BOTH = pytest.mark.parametrize("kind", KINDS)
WIDTHS = pytest.mark.parametrize(("d_old", "d_new"), [(24, 24), (24, 32), (32, 24)])


class World(NamedTuple):
    """Items of classes seen by an old model, blurred, and by a new one."""

    old: Tensor
    new: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls, d_old: int, d_new: int, blur: float = 0.5, nuisance: int = 0, dtype: torch.dtype = torch.float32
    ) -> World:
        rng = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        labels = torch.arange(N + HELD) % 12
        told = 4 if nuisance else 16
        within = draw(12, told)[labels] + (0.3 if nuisance else 1) * draw(N + HELD, told)
        seen = torch.cat([within, draw(N + HELD, nuisance)], dim=1)
        views = [
            seen @ draw(seen.shape[1], d) / 4 + noise * draw(N + HELD, d) for d, noise in ((d_old, blur), (d_new, 0.1))
        ]
        return cls(*(normalize(view, dim=1).to(dtype) for view in views), labels)

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        return self.old[:N], self.new[:N]


def rotated(d: int = 20, noise: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """Old rows, the same rotated and blurred, and the rotation."""
    rng = torch.Generator().manual_seed(2)
    old = normalize(torch.randn(N, d, generator=rng, dtype=torch.float64), dim=1)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))[0]
    new = old @ rotation + noise * torch.randn(N, d, generator=rng, dtype=torch.float64)
    return old.float(), new.float(), rotation.float()


def found_first(queries: Tensor, gallery: Tensor) -> float:
    return float(((queries @ gallery.T).argmax(1) == torch.arange(len(queries))).double().mean())


def same_class_first(queries: Tensor, gallery: Tensor, labels: Tensor) -> float:
    scores = (queries @ gallery.T).fill_diagonal_(-2)
    return float((labels[scores.argmax(1)] == labels).double().mean())


@pytest.mark.parametrize("steps", [0, 100])
def test_strict_map_finds_a_rotation(steps: int) -> None:
    old, new, rotation = rotated()
    maps = fit_compatible_maps(old, new, steps=steps)
    assert maps.kind == "strict"
    np.testing.assert_allclose(maps.backward_weight, rotation, atol=0.02)
    np.testing.assert_allclose(maps.map_queries(old @ rotation), old, atol=0.03)
    assert found_first(maps.map_stored(old), maps.map_new(new)) == 1


def test_training_ends_where_it_no_longer_helps() -> None:
    """The rate ruins the maps at once; five of twenty looks see it."""
    maps = fit_compatible_maps(*World.of(24, 32).pairs, steps=100, learning_rate=3.0)
    assert [line["step"] for line in maps.history] == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("reflected", [False, True])
def test_training_finds_the_rotation_without_its_start(reflected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another start on the same side of the rotations, training gets near; the start is not all there is."""
    old, new, rotation = rotated(d=8)
    generator = torch.Generator().manual_seed(3)
    skew = torch.randn(8, 8, generator=generator)
    off = torch.matrix_exp(0.3 * (skew - skew.T))
    if reflected:
        off = off @ torch.diag(torch.tensor([-1.0] + [1.0] * 7))
    monkeypatch.setattr("mmalign.compatible_maps.padded_procrustes", lambda *_: rotation.T @ off)
    maps = fit_compatible_maps(old, new, steps=300, learning_rate=0.01)
    before, after = ((weight - rotation).norm() for weight in ((rotation.T @ off).T, maps.backward_weight))
    assert after > 1 if reflected else after < 0.1 < before


@WIDTHS
def test_strict_map_stays_orthogonal_and_keeps_new_geometry(d_old: int, d_new: int) -> None:
    world = World.of(d_old, d_new)
    maps = fit_compatible_maps(*world.pairs, steps=60)
    np.testing.assert_allclose(maps.backward_weight.T @ maps.backward_weight, np.eye(d_new), atol=2e-6)
    assert max(line["deviation"] for line in maps.history) < 1e-4
    mapped = maps.map_new(world.new)
    np.testing.assert_allclose(mapped @ mapped.T, world.new @ world.new.T, atol=1e-5)


@BOTH
@WIDTHS
def test_training_lowers_the_held_out_loss_and_the_galleries_are_searchable(d_old: int, d_new: int, kind: str) -> None:
    world = World.of(d_old, d_new)
    maps = fit_compatible_maps(*world.pairs, kind=kind, steps=200)  # type: ignore[arg-type]
    totals = [line["total"] for line in maps.history]
    assert min(totals) < totals[0] - 0.01
    queries, new, stored = (
        maps.map_queries(world.new[N:]), maps.map_new(world.new[N:]), maps.map_stored(world.old[N:]),
    )  # fmt: skip
    assert queries.shape == (HELD, d_old)
    assert new.shape == stored.shape == (HELD, max(d_old, d_new))
    for rows in (queries, new, stored):
        np.testing.assert_allclose(rows.norm(dim=1), np.ones(HELD), atol=1e-5)
    np.testing.assert_allclose(queries, normalize(new[:, :d_old], dim=1), atol=1e-6)
    for query, gallery in ((queries, world.old[N:]), (new, stored)):
        assert found_first(query, gallery) > 20 / HELD  # 1 / HELD by chance
        assert same_class_first(query, gallery, world.labels[N:]) > 4 / 12


def test_deviation_of_the_lambda_map_is_held_by_the_threshold() -> None:
    world = World.of(24, 24, blur=1.0)

    def fit(lambda_rel: float) -> CompatibleMaps:
        options = {"steps": 150, "learning_rate": 3e-3, "validation": 0}
        return fit_compatible_maps(*world.pairs, kind="lambda", lambda_rel=lambda_rel, **options)  # type: ignore[arg-type]

    ends = []
    for lambda_rel in (0.2, 0.53):
        maps = fit(lambda_rel)
        deviation = torch.linalg.norm(maps.backward_weight @ maps.backward_weight.T - torch.eye(24))
        threshold = relative_threshold(lambda_rel, 24)
        assert 0.5 * threshold < float(deviation) < threshold + 0.3
        assert maps.history[-1]["deviation"] == pytest.approx(float(deviation), abs=1e-4)
        ends.append(float(deviation))
    assert ends[0] < ends[1]
    assert fit(100).history[-1]["deviation"] > ends[1] + 0.3  # so it is the threshold that holds it


def test_labels_bring_classes_together() -> None:
    """Where most of what the models see has nothing to do with the classes."""
    world = World.of(24, 32, blur=0.3, nuisance=12)
    hits = {}
    for name, labels in (("without", None), ("with", world.labels[:N])):
        maps = fit_compatible_maps(*world.pairs, labels=labels, kind="lambda", steps=200)
        new, stored = maps.map_new(world.new[N:]), maps.map_stored(world.old[N:])
        hits[name] = [same_class_first(new, gallery, world.labels[N:]) for gallery in (new, stored)]
    for without, with_labels in zip(hits["without"], hits["with"], strict=True):
        assert with_labels > without + 0.1


@BOTH
def test_history_is_the_objective_on_held_out_pairs(kind: str) -> None:
    """With a validation share of half and one look, the line can be had from outside, too."""
    world = World.of(24, 32)
    maps = fit_compatible_maps(*world.pairs, kind=kind, steps=0, validation=0.5, batch_size=1000)  # type: ignore[arg-type]
    assert [line["step"] for line in maps.history] == [0]
    held = torch.randperm(N, generator=torch.Generator().manual_seed(0))[: N // 2]
    old, new = (side[held] for side in world.pairs)
    found = compatibility_objective(
        torch.nn.functional.pad(old, (0, 8)), maps.map_new(new), old @ maps.forward_weight.T + maps.forward_bias
    )
    for part in ("forward", "backward", "contrastive", "total"):
        assert maps.history[0][part] == pytest.approx(float(getattr(found, part)), abs=1e-3)


@BOTH
def test_best_look_is_kept(kind: str) -> None:
    """At a rate that ruins the maps the start is kept, unless nothing is held out."""
    world = World.of(24, 32)
    start = fit_compatible_maps(*world.pairs, kind=kind, steps=0)  # type: ignore[arg-type]
    ruined = {"steps": 20, "learning_rate": 3.0, "kind": kind}
    kept = fit_compatible_maps(*world.pairs, **ruined)  # type: ignore[arg-type]
    np.testing.assert_allclose(kept.backward_weight, start.backward_weight, atol=1e-6)
    np.testing.assert_allclose(kept.forward_weight, start.forward_weight, atol=1e-6)
    last = fit_compatible_maps(*world.pairs, validation=0, **ruined)  # type: ignore[arg-type]
    assert (last.forward_weight - start.forward_weight).norm() > 1


@BOTH
def test_seed_decides_and_global_random_numbers_are_left_alone(kind: str) -> None:
    world = World.of(24, 32)
    runs = []
    for seed, around in ((0, 5), (0, 6), (1, 5)):
        torch.manual_seed(around)
        before = torch.get_rng_state()
        runs.append(fit_compatible_maps(*world.pairs, kind=kind, steps=30, batch_size=64, seed=seed).tensors())  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["forward.weight"], runs[2]["forward.weight"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_through_a_file_and_back(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    world = World.of(32, 24, dtype=dtype)
    maps = fit_compatible_maps(*world.pairs, kind=kind, steps=5)  # type: ignore[arg-type]
    save_file(maps.tensors(), tmp_path / "maps.safetensors")
    again = CompatibleMaps.from_tensors(load_file(tmp_path / "maps.safetensors"))
    assert again.kind == maps.kind == kind
    for name, rows in (("map_queries", world.new), ("map_new", world.new), ("map_stored", world.old)):
        mapped = getattr(maps, name)(rows)
        assert mapped.dtype == dtype
        assert torch.equal(mapped, getattr(again, name)(rows)), name


def test_rows_of_any_length_are_taken_as_directions() -> None:
    world = World.of(24, 24)
    lengths = torch.linspace(0.5, 3, N)[:, None]
    plain, scaled = (
        fit_compatible_maps(old, new, steps=3)
        for old, new in (world.pairs, (lengths * world.pairs[0], 2 * world.pairs[1]))
    )
    np.testing.assert_allclose(plain.forward_weight, scaled.forward_weight, atol=1e-4)
    np.testing.assert_allclose(plain.map_new(5 * world.new), plain.map_new(world.new), atol=1e-6)


def test_few_pairs_are_warned_of_or_refused() -> None:
    world = World.of(24, 32)
    assert fit_compatible_maps(*world.pairs, steps=0).warnings == ()
    few = fit_compatible_maps(world.old[:100], world.new[:100], steps=0)
    assert few.warnings == ("100 pairs in 32 dimensions are few; 160 or more make better maps",)
    with pytest.raises(InputError, match="31 pairs in 32 dimensions .* embed 32 items or more .* better 160"):  # noqa: RUF043
        fit_compatible_maps(world.old[:31], world.new[:31])


def test_a_loss_that_is_no_number_stops_the_training() -> None:
    with pytest.raises(NonFiniteLossError, match="the loss of step 2 .* lower the learning rate"):  # noqa: RUF043
        fit_compatible_maps(*World.of(24, 24).pairs, kind="lambda", learning_rate=1e30)


def test_wrong_arguments_are_named() -> None:
    world = World.of(24, 32)
    old, new = world.pairs
    with pytest.raises(InputError, match="old has 400 rows, new 399"):
        fit_compatible_maps(old, new[1:])
    with pytest.raises(InputError, match=r"labels have shape \(399,\)"):
        fit_compatible_maps(old, new, labels=world.labels[1:N])
    with pytest.raises(InputError, match="kind is 'loose'; give one of strict, lambda"):
        fit_compatible_maps(old, new, kind="loose")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch_size is 1"):
        fit_compatible_maps(old, new, batch_size=1)
    with pytest.raises(InputError, match=r"validation is 0\.9"):
        fit_compatible_maps(old, new, validation=0.9)
    with pytest.raises(InputError, match="new row 3 holds NaN"):
        fit_compatible_maps(old, torch.where(torch.arange(N)[:, None] == 3, torch.nan, new))
    maps = fit_compatible_maps(old, new, steps=0)
    with pytest.raises(InputError, match="new_rows have 24 columns; these maps take 32"):
        maps.map_queries(old)
    with pytest.raises(InputError, match="old_rows have 32 columns; these maps take 24"):
        maps.map_stored(new)
    tensors = maps.tensors()
    with pytest.raises(InputError, match=r"the maps lack forward\.bias"):
        CompatibleMaps.from_tensors({k: v for k, v in tensors.items() if k != "forward.bias"})
    with pytest.raises(InputError, match="the shapes of the maps do not fit"):
        CompatibleMaps.from_tensors(tensors | {"forward.bias": tensors["forward.bias"][1:]})
