"""How queries of a new encoder are put to vectors of an old one, for each kind of query, as it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import normalize

from mmalign.errors import IndexDamagedError
from mmalign.score_calibration import ScoreCalibration
from mmalign.spherical_interpolation import pad_columns, point_between

from ..storage import Writer

__all__ = ["HOWS", "KINDS", "Bridge", "Content", "KindBridge", "SupportQueries"]

KINDS = ("text", "image")
# An item and what was in its file, as `Item.id` and `Item.sha256` say.
Content: TypeAlias = tuple[int, str]
HOWS = {
    "old": "old model",
    "compatible": "trained for it",
    "procrustes": "Procrustes",
    "slerp": "Procrustes + SLERP",
    "lambda": "lambda map",
}


@dataclass(frozen=True)
class KindBridge:
    """From a query by both encoders to one that meets the old vectors.

    Attributes:
        how: one of `HOWS`.
        alpha: share of the new model, 0 the old query, 1 the mapped new one.
        matrix: from new rows to old ones, zero-padded to the wider of both; `None` with "old".
        offset: added after it; `None` for none.
        bridged: scores of such queries with old vectors, matched and not; `None` where they were too few.
        renewed: scores of new queries with new vectors, alike.
        levels: what chance gives such queries on the old vectors, rising (see `retrieval.calibration`).
    """

    how: str
    alpha: float
    matrix: Float[np.ndarray, "new_dim wide"] | None = None
    offset: Float[np.ndarray, " wide"] | None = None
    bridged: ScoreCalibration | None = None
    renewed: ScoreCalibration | None = None
    levels: Float[np.ndarray, " references"] = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def needs_old(self) -> bool:
        """Whether the old encoder has to embed the query, too."""
        return self.alpha < 1

    def queries(
        self, old: Float[np.ndarray, "q dim"] | None, new: Float[np.ndarray, "q new_dim"] | None, dim: int
    ) -> Float[np.ndarray, "q dim"]:
        """Unit rows for the old vectors, which have `dim` columns."""
        if self.matrix is None or self.alpha == 0:
            assert old is not None
            return old
        assert new is not None
        mapped = torch.from_numpy(new @ self.matrix)
        if self.offset is not None:
            mapped += torch.from_numpy(self.offset)
        elif self.alpha < 1:
            assert old is not None
            mapped = point_between(pad_columns(torch.from_numpy(old), mapped.shape[1]), mapped, self.alpha)
        # The old vectors have no further coordinates, as if they were zero there.
        found: np.ndarray = normalize(mapped[:, :dim], dim=1).numpy()
        return found

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: all but the tensors."""
        return {
            "how": self.how,
            "alpha": self.alpha,
            "bridged": self.bridged.to_dict() if self.bridged else None,
            "renewed": self.renewed.to_dict() if self.renewed else None,
            "levels": [round(float(level), 6) for level in self.levels],
        }


@dataclass(frozen=True)
class SupportQueries:
    """Queries whose right answer is known, by both encoders: what says whether a stage of an upgrade is good enough.

    Attributes:
        old: by the old encoder; `None` where it has no tower for them.
        new: by the new one.
        answers: what is right for each; another content under the same item is not.
    """

    old: Float[np.ndarray, "q dim"] | None
    new: Float[np.ndarray, "q new_dim"]
    answers: Sequence[Content]


@dataclass(frozen=True)
class Bridge:
    """All kinds of queries that were measured, and the queries that they were measured with.

    Attributes:
        kinds: by kind of query.
        support: alike.
        held: new vectors of what the support set asks for, kept back until their turn comes. Were they
            searched from the start, the support set would say nothing of images that have not been embedded again.
    """

    kinds: dict[str, KindBridge]
    support: dict[str, SupportQueries]
    held: dict[Content, Float[np.ndarray, " new_dim"]] = field(default_factory=dict)

    def with_levels(self, levels: dict[str, Float[np.ndarray, " references"]]) -> Bridge:
        """The same with chance levels by kind."""
        kinds = {kind: replace(one, levels=levels.get(kind, one.levels)) for kind, one in self.kinds.items()}
        return replace(self, kinds=kinds)

    def write(self, writer: Writer) -> dict[str, Any]:
        """Write the tensors; returns the manifest's entry `bridge`."""
        from safetensors.numpy import save

        tensors: dict[str, np.ndarray] = {}
        for kind, one in self.kinds.items():
            for name in ("matrix", "offset"):
                if (value := getattr(one, name)) is not None:
                    tensors[f"{kind}.{name}"] = np.ascontiguousarray(value, np.float32)
        for kind, queries in self.support.items():
            for name in ("old", "new"):
                if (value := getattr(queries, name)) is not None:
                    tensors[f"{kind}.support.{name}"] = np.ascontiguousarray(value)
            tensors |= _packed(f"{kind}.support", queries.answers)
        if self.held:
            tensors |= _packed("held", list(self.held))
            tensors["held.vectors"] = np.stack(list(self.held.values()))
        content = save(tensors)
        name = writer.add("bridge", lambda file: file.write(content))
        return {"file": name, "kinds": {kind: one.to_dict() for kind, one in self.kinds.items()}}

    @classmethod
    def read(cls, folder: Path, about: dict[str, Any]) -> Bridge:
        """What `write` left.

        Raises:
            IndexDamagedError: the file is gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        path = folder / about["file"]
        try:
            tensors = load(path.read_bytes())
        except (OSError, SafetensorError, ValueError) as error:
            raise IndexDamagedError(
                f"{str(path)!r} cannot be read ({error}); `mmalign upgrade INDEX --roll-back` gives the index back as "
                "it was before the upgrade"
            ) from None
        kinds, support = {}, {}
        for kind, stored in about["kinds"].items():
            calibrations = {
                name: ScoreCalibration.from_dict(stored[name]) if stored[name] else None
                for name in ("bridged", "renewed")
            }
            kinds[kind] = KindBridge(
                stored["how"],
                stored["alpha"],
                tensors.get(f"{kind}.matrix"),
                tensors.get(f"{kind}.offset"),
                **calibrations,
                levels=np.array(stored["levels"], np.float32),
            )
        for kind in KINDS:
            new = tensors.get(f"{kind}.support.new")
            if new is not None:
                answers = _unpacked(f"{kind}.support", tensors)
                support[kind] = SupportQueries(tensors.get(f"{kind}.support.old"), new, answers)
        held = dict(zip(_unpacked("held", tensors), tensors.get("held.vectors", ()), strict=True))
        return cls(kinds, support, held)


def _packed(name: str, contents: Sequence[Content]) -> dict[str, np.ndarray]:
    digests = [np.frombuffer(bytes.fromhex(digest), np.uint8) for _, digest in contents]
    return {
        f"{name}.items": np.array([number for number, _ in contents], np.int64),
        f"{name}.sha256": np.stack(digests) if digests else np.zeros((0, 32), np.uint8),
    }


def _unpacked(name: str, tensors: Mapping[str, np.ndarray]) -> list[Content]:
    if f"{name}.items" not in tensors:
        return []
    both = zip(tensors[f"{name}.items"].tolist(), tensors[f"{name}.sha256"], strict=True)
    return [(number, digest.tobytes().hex()) for number, digest in both]
