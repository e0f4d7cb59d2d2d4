"""What an update did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["UpdateReport"]


@dataclass
class UpdateReport:
    """What an update did, in numbers of files.

    Attributes:
        added: new content, encoded.
        changed: known path, new content, encoded.
        moved: known content at a new path whose old path is gone; not encoded.
        aliases: known content at a further path; not encoded.
        removed: gone from the folder.
        withheld_removals: gone, but kept because they are so many that the disk may be missing.
        unchanged: as before.
        skipped: files that could not be read: path, reason, message.
        newly_skipped: those of them that are not skipped for the same reason since an earlier update.
        metadata_unmatched: metadata rows that name no indexed file.
        seconds: for the whole update, FAISS included; 0 until it is done.
        encoded: images that went through the model.
        encoding_seconds: for reading, decoding and encoding.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    aliases: int = 0
    removed: int = 0
    withheld_removals: int = 0
    unchanged: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    newly_skipped: list[dict[str, Any]] = field(default_factory=list)
    metadata_unmatched: int = 0
    seconds: float = 0.0
    encoded: int = 0
    encoding_seconds: float = 0.0

    @property
    def encoded_per_second(self) -> float:
        """Images through the model, over the time that reading, decoding and encoding took."""
        return self.encoded / self.encoding_seconds if self.encoded else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, with `encoded_per_second`."""
        return {**asdict(self), "encoded_per_second": round(self.encoded_per_second, 3)}

    def __add__(self, other: UpdateReport) -> UpdateReport:
        return UpdateReport(**{name: value + getattr(other, name) for name, value in vars(self).items()})
