"""What was measured before an upgrade, and what it says to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["KindReport", "UpgradeReport", "duration"]

TITLES = {
    "old/old": "old queries on old vectors",
    "procrustes": "new queries, Procrustes, on old vectors",
    "slerp": "Procrustes + SLERP with the old query",
    "lambda": "lambda map",
    "compatible": "new queries, trained to be compatible",
    "forward": "new queries on old vectors mapped forward",
    "new/new": "new queries on new vectors",
}
ADVICE = {
    "bridge": "bridge and backfill: search with the new model at once, embed the rest by priority",
    "re-embed": "embed everything again; searches stay as they are until that is done",
    "none": "no upgrade",
}


@dataclass
class KindReport:
    """Queries of one kind, all on the same gallery: the sample.

    Attributes:
        kind: "text" or "image".
        queries: measured with; others chose among the bridges.
        what: where they come from.
        figures: by name (`TITLES`): hit@1, hit@5, hit@10 with 95 % intervals (`_low`, `_high`), mrr.
        flips: by name, share of queries whose hit@1 was gained (`positive`) and lost (`negative`) against old/old.
        update_gain: by name, share of the way from old/old to new/new in hit@1; `None` where that way is not uphill.
        compatible: by name, whether hit@1 is above that of old/old (as high is not enough).
        chosen: the bridge that was chosen on other queries.
        alpha: of it; 0 is the old query.
        fitted_on: what it was fitted on: images, texts or both.
        curve: `share` of the sample that is embedded anew, `hit@1`, `hit@10` and `mode` there (see
            `retrieval.upgrading.live`).
        gain: hit@1 of new/new above old/old, and the half width of its 95 % interval.
        bridge_gain: that of the chosen bridge.
    """

    kind: str
    queries: int
    what: str
    figures: dict[str, dict[str, float]]
    flips: dict[str, dict[str, float]] = field(default_factory=dict)
    update_gain: dict[str, float | None] = field(default_factory=dict)
    compatible: dict[str, bool] = field(default_factory=dict)
    chosen: str = "old"
    alpha: float = 0.0
    fitted_on: str = ""
    curve: dict[str, list[Any]] = field(default_factory=dict)
    gain: tuple[float, float] = (0.0, 0.0)
    bridge_gain: tuple[float, float] = (0.0, 0.0)


@dataclass
class UpgradeReport:
    """Compatibility of a new encoder with an index, measured on a sample of it.

    Attributes:
        old: spec of the index's encoder.
        new: of the other.
        images: in the index, each content once.
        sampled: of them, embedded by both: the gallery of all figures.
        remaining: that the new encoder has not seen.
        images_per_second: through the new encoder, here, reading included.
        hours: that the remaining would take at that rate.
        pairs: that maps were fitted on, by source.
        kinds: what was measured, by kind of query.
        advice: "bridge", "re-embed" or "none"; see `ADVICE`.
        reasons: for it.
        notes: what a person should know of the numbers.
    """

    old: str | None
    new: str
    images: int
    sampled: int
    remaining: int
    images_per_second: float
    hours: float
    pairs: dict[str, int]
    kinds: dict[str, KindReport]
    advice: str
    reasons: list[str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> UpgradeReport:
        """What `to_dict` gave, after JSON too."""
        kinds = {}
        for kind, one in about["kinds"].items():
            gains = {name: tuple(one[name]) for name in ("gain", "bridge_gain")}  # JSON knows lists only
            kinds[kind] = KindReport(**{**one, **gains})
        return cls(**{**about, "kinds": kinds})

    def lines(self) -> list[str]:
        """For a terminal."""
        out = [
            f"from {self.old or 'vectors of no recorded encoder'}",
            f"to   {self.new}",
            f"{self.images:,} images; figures are on {self.sampled:,} of them, embedded by both encoders"
            + (f" ({self.images_per_second:,.1f} images/s)" if self.images_per_second else ""),
            f"embedding the other {self.remaining:,} would take {duration(self.hours * 3600)} here",
        ]
        for one in self.kinds.values():
            out += ["", *self._kind_lines(one)]
        out += ["", f"advice: {ADVICE[self.advice]}", *(f"  {reason}" for reason in self.reasons)]
        return out + [f"note: {note}" for note in self.notes]

    def _kind_lines(self, one: KindReport) -> list[str]:
        lines = [
            f"{one.kind} queries ({one.queries:,}: {one.what})",
            f"  {'':<48}{'R@1':>7}{'95 %':>16}{'R@5':>7}{'R@10':>7}{'won':>7}{'lost':>7}",
        ]
        for name, title in TITLES.items():
            if name not in one.figures:
                continue
            found = one.figures[name]
            chosen = "*" if name == one.chosen or (name == "old/old" and one.chosen == "old") else " "
            title = f"{title}, {one.alpha:.1f} new" if name == "slerp" and chosen == "*" else title
            interval = f"[{found['hit@1_low']:.3f}, {found['hit@1_high']:.3f}]"
            cells = f"{found['hit@1']:>7.3f}{interval:>16}{found['hit@5']:>7.3f}{found['hit@10']:>7.3f}"
            if name in one.flips:
                cells += f"{one.flips[name]['positive']:>7.3f}{one.flips[name]['negative']:>7.3f}"
            lines.append(f"{chosen} {title:<48}{cells}")
        if one.curve:
            shares = "".join(f"{share:>7.0%}" for share in one.curve["share"])
            lines += [f"  {'embedded anew':<15}{shares}", f"  {'R@1':<15}" + _row(one.curve["hit@1"])]
        return lines

    def markdown(self) -> str:
        """The same figures as tables."""
        parts = []
        for one in self.kinds.values():
            rows = [
                f"| {one.kind} queries ({one.queries:,}) | R@1 | 95 % | R@5 | R@10 | won | lost |",
                "|---|---|---|---|---|---|---|",
            ]
            for name, title in TITLES.items():
                if name in one.figures:
                    found, flips = one.figures[name], one.flips.get(name)
                    mark = " (chosen)" if name == one.chosen else ""
                    gained = f"{flips['positive']:.3f} | {flips['negative']:.3f}" if flips else "- | -"
                    rows.append(
                        f"| {title}{mark} | {found['hit@1']:.3f} | [{found['hit@1_low']:.3f}, "
                        f"{found['hit@1_high']:.3f}] | {found['hit@5']:.3f} | {found['hit@10']:.3f} | {gained} |"
                    )
            parts.append("\n".join(rows))
        return "\n\n".join(parts) + "\n"

    def draw(self, path: Path) -> None:
        """The way of R@1 while more and more is embedded anew, and what it is measured against."""
        from mmalign.files import whole_file
        from mmalign.plotting import name_axes, new_figure, save_figure

        kinds = [one for one in self.kinds.values() if one.curve]
        figure, axes = new_figure(max(1, len(kinds)), 3.8, 5.2)
        for axis, one in zip(axes, kinds, strict=False):
            shares = [100 * share for share in one.curve["share"]]
            axis.plot(shares, one.curve["hit@1"], "o-", markersize=4, label="searches while it goes on")
            for name, style in (("new/new", "--"), ("old/old", ":")):
                if name in one.figures:
                    axis.axhline(one.figures[name]["hit@1"], linestyle=style, color="0.3", label=name)
            title = f"{one.kind} queries ({one.queries:,}) on {self.sampled:,} images"
            name_axes(axis, title, "images embedded anew, %", "R@1")
            axis.legend(fontsize=8, frameon=False)
            axis.set_ylim(bottom=0)
        with whole_file(path) as fresh:
            save_figure(figure, fresh)


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} hours" if seconds < 172_800 else f"{seconds / 86_400:,.1f} days"


def _row(values: list[float]) -> str:
    return "".join(f"{value:>7.3f}" for value in values)
