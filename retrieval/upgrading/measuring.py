"""The compatibility report: which bridge is worth its while, on images of the index that both encoders have seen.

Queries whose answer is known are split by image: bridges are chosen on one half, figures are taken on the other, and
maps are fitted on images that are no query's answer, on their captions, and on other texts. Intervals count images, not
queries: captions of one image succeed and fail together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from mmalign.closed_forms import fit_ridge
from mmalign.compatible_maps import fit_compatible_maps
from mmalign.errors import InputError
from mmalign.metrics import per_query_metrics
from mmalign.metrics.compatibility import flip_rates, update_gain
from mmalign.score_calibration import ScoreCalibration
from mmalign.spherical_interpolation import padded_procrustes

from .bridge import HOWS, KindBridge
from .live import MODES
from .report import KindReport, UpgradeReport, duration

__all__ = ["Gallery", "Pairs", "Task", "advise", "choose_mode", "forward_map", "least_pairs", "measure_kinds"]

ALPHAS = tuple(round(0.1 * step, 1) for step in range(11))
SHARES = tuple(round(0.1 * step, 1) for step in range(11))
# Below that nothing is worth a bridge.
QUICK_HOURS = 0.25
_BACKGROUND = 20  # unrelated images each query is scored with, for the calibration of scores

Pairs = tuple[Float[np.ndarray, "n old_dim"], Float[np.ndarray, "n new_dim"]]


@dataclass(frozen=True)
class Gallery:
    """Images of the index that both encoders have embedded.

    Attributes:
        old: unit rows.
        new: unit rows of the same images.
        order: the order in which they would be embedded anew.
    """

    old: Float[np.ndarray, "n old_dim"]
    new: Float[np.ndarray, "n new_dim"]
    order: Int[np.ndarray, " n"]


@dataclass(frozen=True)
class Task:
    """Queries of one kind.

    Attributes:
        kind: "text" or "image".
        what: where they come from.
        old: by the old encoder; `None` where it has no tower for them.
        new: by the new one.
        target: place in the gallery of the right answer.
        part: what each query is for: 0 to fit, 1 to choose, 2 to measure.
    """

    kind: str
    what: str
    old: Float[np.ndarray, "q old_dim"] | None
    new: Float[np.ndarray, "q new_dim"]
    target: Int[np.ndarray, " q"]
    part: Int[np.ndarray, " q"]

    def take(self, chosen: Bool[np.ndarray, " q"]) -> Task:
        """Some of the queries."""
        old = None if self.old is None else self.old[chosen]
        return Task(self.kind, self.what, old, self.new[chosen], self.target[chosen], self.part[chosen])

    def positives(self) -> list[list[int]]:
        """The right answers as metrics take them."""
        return [[int(place)] for place in self.target]


def least_pairs(old_dim: int, new_dim: int) -> int:
    """How many pairs determine a map between the two spaces."""
    return min(old_dim, new_dim)


def measure_kinds(
    gallery: Gallery,
    tasks: Mapping[str, Task],
    sources: Mapping[str, Pairs],
    *,
    compatible: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> tuple[dict[str, KindReport], dict[str, KindBridge], list[str]]:
    """Fit, choose, measure.

    Args:
        gallery: what queries are answered from.
        tasks: queries by kind.
        sources: pairs to fit on, by name; too few of them are left out.
        compatible: the new encoder was trained so that its first coordinates meet the old vectors.
        seed: of the lambda map.
        progress: show bars.

    Returns:
        What was measured, what was chosen, and notes.
    """
    old_dim, new_dim = gallery.old.shape[1], gallery.new.shape[1]
    wide, least, notes = max(old_dim, new_dim), least_pairs(old_dim, new_dim), []
    usable = {name: pairs for name, pairs in sources.items() if len(pairs[0]) >= least}
    if not usable:
        most = max((len(pairs[0]) for pairs in sources.values()), default=0)
        notes.append(
            f"no bridge was fitted: {most:,} pairs for spaces of {old_dim} and {new_dim} dimensions; give {least:,} or "
            f"more, better {5 * wide:,} (--sample, --support)"
        )
    elif max(len(pairs[0]) for pairs in usable.values()) < 5 * wide:
        notes.append(
            f"the bridges were fitted on fewer than 5 pairs a dimension ({wide:,}): more may make them better "
            "(--sample, --support)"
        )
    maps: dict[str, list[tuple[str, KindBridge]]] = {"procrustes": [], "lambda": [], "compatible": []}
    for name, (old, new) in usable.items():
        rotation = padded_procrustes(torch.from_numpy(new), torch.from_numpy(old)).numpy()
        maps["procrustes"].append((name, KindBridge("procrustes", 1.0, rotation)))
    most_pairs = max(usable.items(), key=lambda item: len(item[1][0]), default=None)
    if most_pairs is not None and len(most_pairs[1][0]) >= wide:
        both = [torch.from_numpy(rows) for rows in most_pairs[1]]
        fitted = fit_compatible_maps(*both, kind="lambda", seed=seed, progress=progress)
        weight, bias = fitted.backward_weight, fitted.backward_bias
        offset = None if bias is None else bias.numpy()
        maps["lambda"].append((most_pairs[0], KindBridge("lambda", 1.0, weight.T.contiguous().numpy(), offset)))
    if compatible:
        maps["compatible"].append(("", KindBridge("compatible", 1.0, np.eye(new_dim, wide, dtype=np.float32))))
    forward = forward_map(*usable["images"]) if "images" in usable else None  # as `finish` fits it
    reports, chosen = {}, {}
    for kind, task in tasks.items():
        reports[kind], one = _measure(gallery, task, maps, forward)
        if one is not None:
            chosen[kind] = one
    return reports, chosen, notes


def forward_map(
    old: Float[np.ndarray, "n old_dim"], new: Float[np.ndarray, "n new_dim"]
) -> Callable[[Float[np.ndarray, "m old_dim"]], Float[np.ndarray, "m new_dim"]]:
    """Ridge regression from old vectors to new ones, for images that cannot be embedded again; gives unit rows."""
    fitted = fit_ridge(torch.from_numpy(old), torch.from_numpy(new))
    mean_old, mean_new, matrix = (part.numpy() for part in fitted)

    def apply(rows: np.ndarray) -> np.ndarray:
        mapped = (rows - mean_old) @ matrix + mean_new
        unit: np.ndarray = (mapped / np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)).astype(
            np.float32
        )
        return unit

    return apply


def _measure(
    gallery: Gallery,
    task: Task,
    maps: Mapping[str, list[tuple[str, KindBridge]]],
    forward: Callable[[np.ndarray], np.ndarray] | None,
) -> tuple[KindReport, KindBridge | None]:
    dim = gallery.old.shape[1]
    choosing, measured = task.take(task.part == 1), task.take(task.part == 2)
    best: dict[str, tuple[str, KindBridge]] = {}
    for how, candidates in maps.items():
        if candidates:
            best[how] = max(candidates, key=lambda one: _quality(gallery, choosing, one[1]))
    if task.old is not None and maps["procrustes"]:
        mixed = [
            (name, KindBridge("slerp" if alpha else "old", alpha, one.matrix))
            for name, one in maps["procrustes"]
            for alpha in ALPHAS
        ]
        best["slerp"] = max(mixed, key=lambda one: _quality(gallery, choosing, one[1]))
    if task.old is not None:
        best["old"] = ("", KindBridge("old", 0.0))
    # The first of equals, so that nothing is changed without a reason.
    order = [how for how in ("old", "slerp", "compatible", "lambda", "procrustes") if how in best]
    chosen: KindBridge | None = None
    fitted_on = ""
    if order:
        fitted_on, chosen = max((best[how] for how in order), key=lambda one: _quality(gallery, choosing, one[1]))
        chosen = _calibrated(gallery, choosing, chosen)

    queries: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if measured.old is not None:
        queries["old/old"] = (measured.old, gallery.old)
    for how, (_, one) in best.items():
        if how != "old":
            queries[how] = (one.queries(measured.old, measured.new, dim), gallery.old)
    if forward is not None:
        queries["forward"] = (measured.new, forward(gallery.old))
    queries["new/new"] = (measured.new, gallery.new)
    found = {name: _hits_of(rows, answers, measured) for name, (rows, answers) in queries.items()}
    figures = {name: _figures(values, measured.target) for name, values in found.items()}
    hits = {name: values["hit@1"] for name, values in found.items()}
    report = KindReport(task.kind, len(measured.target), task.what, figures, fitted_on=fitted_on)
    if "old/old" in hits:
        base, top = figures["old/old"]["hit@1"], figures["new/new"]["hit@1"]
        for name in list(hits)[1:]:
            rates = flip_rates(hits["old/old"] > 0, hits[name] > 0)
            report.flips[name] = {"positive": float(rates.positive), "negative": float(rates.negative)}
            report.update_gain[name] = float(update_gain(base, figures[name]["hit@1"], top)) if top > base else None
            report.compatible[name] = figures[name]["hit@1"] > base
        report.gain = mean_and_half(hits["new/new"] - hits["old/old"], measured.target)
    if chosen is not None:
        report.chosen, report.alpha = chosen.how, chosen.alpha
        if "old/old" in hits and chosen.how in hits:
            report.bridge_gain = mean_and_half(hits[chosen.how] - hits["old/old"], measured.target)
        report.curve = _curve(gallery, choosing, measured, chosen)
    return report, chosen


def _quality(gallery: Gallery, task: Task, one: KindBridge) -> tuple[float, float]:
    found = per_query_metrics(
        queries=one.queries(task.old, task.new, gallery.old.shape[1]),
        gallery=gallery.old,
        positives=task.positives(),
        ks=(1,),
    )
    return float(found["hit@1"].mean()), float(found["rr"].mean())


def _hits_of(rows: np.ndarray, answers: np.ndarray, task: Task) -> Mapping[str, np.ndarray]:
    return per_query_metrics(queries=rows, gallery=answers, positives=task.positives(), ks=(1, 5, 10))


def _figures(found: Mapping[str, np.ndarray], image: Int[np.ndarray, " q"]) -> dict[str, float]:
    figures = {"mrr": float(found["rr"].mean())}
    for name in ("hit@1", "hit@5", "hit@10"):
        mean, half = mean_and_half(found[name], image)
        figures |= {name: mean, f"{name}_low": max(0.0, mean - half), f"{name}_high": min(1.0, mean + half)}
    return figures


def mean_and_half(values: Float[np.ndarray, " q"], image: Int[np.ndarray, " q"]) -> tuple[float, float]:
    """Mean over queries, and half of its 95 % interval where queries for one image are not independent.

    From the variance of the sums of each image's deviations; three in the number of images where none deviates.
    """
    mean, images = float(values.mean()), np.unique(image, return_inverse=True)[1]
    count = int(images.max()) + 1
    sums = np.bincount(images, values - mean)
    if count < 2 or not sums.any():
        return mean, 3 / count
    return mean, float(1.96 * np.sqrt((sums**2).sum() * count / (count - 1)) / len(values))


def _calibrated(gallery: Gallery, task: Task, one: KindBridge) -> KindBridge:
    """With scores of matched and of unrelated pairs, on old and on new vectors; without, where they tell nothing."""
    random = np.random.default_rng(0)
    others = random.integers(1, len(gallery.old), (len(task.target), _BACKGROUND)) if len(gallery.old) > 1 else None
    scales = {}
    for name, rows, answers in (
        ("bridged", one.queries(task.old, task.new, gallery.old.shape[1]), gallery.old),
        ("renewed", task.new, gallery.new),
    ):
        if others is None:
            return one
        unrelated = answers[(task.target[:, None] + others) % len(answers)]
        matched = np.einsum("qd,qd->q", rows, answers[task.target])
        background = np.einsum("qd,qbd->qb", rows, unrelated)
        try:
            scales[name] = ScoreCalibration.fit(matched, background.ravel())
        except InputError:  # too few, or no better than chance: then nothing is merged by them
            return one
    return replace(one, bridged=scales["bridged"], renewed=scales["renewed"])


def _curve(gallery: Gallery, choosing: Task, measured: Task, one: KindBridge) -> dict[str, list[Any]]:
    """hit@k while more and more of the sample is embedded anew, by the mode that other queries choose there."""
    curve: dict[str, list[Any]] = {"share": [], "hit@1": [], "hit@10": [], "mode": []}
    chosen_by, measured_by = _scores(gallery, choosing, one), _scores(gallery, measured, one)
    moved = np.zeros(len(gallery.old), bool)
    for share in SHARES:
        moved[gallery.order[: int(share * len(moved) + 1e-9)]] = True
        tried = {mode: _hits(_merged(chosen_by, mode, moved), choosing) for mode in MODES}
        mode = choose_mode({name: (float(a.mean()), float(b.mean())) for name, (a, b) in tried.items() if len(a)})
        first, tenth = _hits(_merged(measured_by, mode, moved), measured)
        curve["share"].append(share)
        curve["hit@1"].append(float(first.mean()))
        curve["hit@10"].append(float(tenth.mean()))
        curve["mode"].append(mode)
    return curve


def choose_mode(figures: Mapping[str, tuple[float, float]]) -> str:
    """The best at hit@1, then at hit@10, of the modes that lose nothing against "old" at either; later ones of equals.

    Args:
        figures: mode -> (hit@1, hit@10), as far as they can be had.
    """
    base = figures.get("old", (-1.0, -1.0))
    able = {mode: found for mode, found in figures.items() if found[0] >= base[0] and found[1] >= base[1]}
    return max(able, key=lambda mode: (*able[mode], MODES.index(mode)))


def advise(report: UpgradeReport) -> tuple[str, list[str]]:
    """What to do, and why; by the kind of query that people type, words, where it was measured."""
    if not report.kinds:
        return "re-embed", ["nothing could be measured: no query with a known answer"]
    one = report.kinds.get("text") or next(iter(report.kinds.values()))
    gain, half = one.gain
    reasons = []
    for other in report.kinds.values():
        if other.gain[0] + other.gain[1] < 0:
            reasons.append(
                f"{other.kind} queries would get worse: R@1 {other.gain[0]:+.3f} (95 %: +-{other.gain[1]:.3f})"
            )
    if reasons:
        return "none", reasons
    if "old/old" in one.figures and gain - half <= 0:
        return "none", [
            f"the new encoder is not clearly better: R@1 of {one.kind} queries {gain:+.3f} (95 %: +-{half:.3f})"
        ]
    if "old/old" in one.figures:
        reasons.append(f"R@1 of {one.kind} queries {gain:+.3f} (95 %: +-{half:.3f}) once all is embedded")
    else:
        reached = one.figures["new/new"]["hit@1"]
        reasons.append(f"{one.kind} queries, which the old encoder does not answer: R@1 {reached:.3f}")
    time = duration(report.hours * 3600)
    if report.hours < QUICK_HOURS:
        return "re-embed", [*reasons, f"embedding the rest takes {time}"]
    bridges = [kind for kind, found in report.kinds.items() if found.compatible.get(found.chosen)]
    if not bridges:
        return "re-embed", [*reasons, "no bridge is above the old encoder on the old vectors"]
    for kind in bridges:
        won, about = report.kinds[kind].bridge_gain
        how = HOWS[report.kinds[kind].chosen]
        reasons.append(f"{kind} queries on the old vectors by {how}: R@1 {won:+.3f} (95 %: +-{about:.3f})")
    return "bridge", [*reasons, f"the rest takes {time}"]


def _scores(gallery: Gallery, task: Task, one: KindBridge) -> dict[str, np.ndarray | None]:
    bridged = one.queries(task.old, task.new, gallery.old.shape[1]) @ gallery.old.T
    can_merge = one.bridged is not None and one.renewed is not None
    return {
        "old": None if task.old is None else task.old @ gallery.old.T,
        "bridged": bridged,
        "kept": one.bridged.log_likelihood_ratio(bridged) if can_merge and one.bridged else None,
        "renewed": one.renewed.log_likelihood_ratio(task.new @ gallery.new.T) if can_merge and one.renewed else None,
    }


def _merged(scores: Mapping[str, np.ndarray | None], mode: str, moved: np.ndarray) -> np.ndarray | None:
    if mode != "merged":
        return scores[mode]
    if scores["kept"] is None or scores["renewed"] is None:
        return None
    return np.where(moved, scores["renewed"], scores["kept"])


def _hits(scores: np.ndarray | None, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """hit@1 and hit@10 of each query; nothing where there are no scores."""
    if scores is None:
        return np.zeros(0), np.zeros(0)
    found = per_query_metrics(scores, positives=task.positives(), ks=(1, 10))
    return found["hit@1"], found["hit@10"]
