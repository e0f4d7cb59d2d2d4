"""The support set: queries whose right answer is known, and pairs of vectors to fit maps on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mmalign.encoders import Encoder
from mmalign.errors import InputError, UnreadableImageError, reason_of
from mmalign.imaging import DecodeSettings, FileContent
from mmalign.pairs import read_captioned
from mmalign.progress import progress_bar

from ..calibration import query_bank
from ..items import Items, positions_of_files
from ..scan import ScanSettings, scan

__all__ = ["Support", "altered_copies", "altered_copy", "read_support", "text_pairs"]

# What is left of each side of an image in an altered copy.
CROP = 0.6


@dataclass(frozen=True)
class Support:
    """What the user gives to measure and fit with.

    Attributes:
        captioned: (file, captions) of images of the index: queries in words with a known answer.
        texts: without an image, to fit on.
        images: files that need not be in the index, to fit on.
    """

    captioned: Sequence[tuple[str, Sequence[str]]] = ()
    texts: Sequence[str] = ()
    images: Sequence[Path] = field(default_factory=list)

    def captions_in(self, items: Items) -> dict[int, list[str]]:
        """Captions by vector row of those files that the index holds.

        Raises:
            InputError: captions were given, and none is of an image of the index.
        """
        found: dict[int, list[str]] = {}
        for position, captions in zip(
            positions_of_files(items, [file for file, _ in self.captioned]),
            [captions for _, captions in self.captioned],
            strict=True,
        ):
            if position is not None and captions:
                found.setdefault(int(items.value("row", position)), []).extend(captions)
        if self.captioned and not found:
            raise InputError(
                f"none of the {len(self.captioned)} captioned files of the support set is in the index (first: "
                f"{self.captioned[0][0]!r}); give paths below the indexed folder"
            )
        return found


def read_support(source: str | os.PathLike[str]) -> Support:
    """A support set from a file or folder.

    Args:
        source: captioned images of the index (`.jsonl`, `.csv` or `.tsv`, or a folder that holds captions or metadata
            by such a name; see `mmalign.pairs.read_captioned`); a `.txt` file of one text a line; or a folder of
            images.

    Raises:
        InputError: it is none of these, or empty.
    """
    path = Path(source)
    if path.suffix.lower() == ".txt" and not path.is_dir():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"support set {str(path)!r} cannot be read ({reason_of(error)}); give UTF-8") from None
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise InputError(f"support set {str(path)!r} holds no text; give one a line")
        return Support(texts=texts)
    try:
        captioned, _ = read_captioned(path)
    except InputError:
        if not path.is_dir():
            raise
        files = [path / os.fsdecode(found.path) for found in scan(path, ScanSettings()).files]
        if not files:
            raise InputError(
                f"support set {str(path)!r} holds neither captions nor images; give a .jsonl, .csv or .txt file, or a "
                "folder of images"
            ) from None
        return Support(images=files)
    return Support(captioned=[(image.file, image.captions) for image in captioned])


def altered_copy(pixels: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 height2 width2"]:
    """The middle of an image, 60 % of each side, mirrored: a query by image whose right answer is that image."""
    height, width = pixels.shape[-2:]
    high, wide = max(1, round(CROP * height)), max(1, round(CROP * width))
    top, left = (height - high) // 2, (width - wide) // 2
    return pixels[:, top : top + high, left : left + wide].flip(-1).contiguous()


def altered_copies(
    encoders: Sequence[Encoder | None],
    readers: Sequence[Callable[[], FileContent]],
    decode: DecodeSettings,
    *,
    progress: bool = False,
) -> tuple[list[Float[np.ndarray, "kept dim"] | None], Int[np.ndarray, " kept"]]:
    """Altered copies of images through several encoders, and which of the images could be read.

    Args:
        encoders: `None` gives nothing.
        readers: of the files; may raise UnreadableImageError.
        decode: how files become pixels.
        progress: show a bar.
    """
    rows: list[list[np.ndarray]] = [[] for _ in encoders]
    kept: list[int] = []
    able = next(encoder for encoder in encoders if encoder is not None)
    with progress_bar("altered copies", len(readers), enabled=progress) as advance:
        for start in range(0, len(readers), 32):
            copies = []
            for number, read in enumerate(readers[start : start + 32], start):
                try:
                    copies.append(altered_copy(able.load_image(read(), decode)[0].pixels))
                    kept.append(number)
                except UnreadableImageError:
                    continue
            for encoder, found in zip(encoders, rows, strict=True):
                if encoder is not None and copies:
                    found.append(encoder.encode_images(copies))
            advance(len(readers[start : start + 32]))
    both = [
        None if encoder is None else np.concatenate(found) if found else np.zeros((0, encoder.dim), np.float32)
        for encoder, found in zip(encoders, rows, strict=True)
    ]
    return both, np.array(kept, np.int64)


def text_pairs(
    old: Encoder | None, new: Encoder, texts: Sequence[str], *, progress: bool = False
) -> tuple[Float[np.ndarray, "n old_dim"], Float[np.ndarray, "n new_dim"]] | None:
    """Everyday phrases and the user's texts by both encoders; `None` where one takes no text."""
    if old is None or not all("text" in encoder.modalities for encoder in (old, new)):
        return None
    wanted = list(dict.fromkeys([*query_bank(10**9), *texts]))
    return old.encode_texts(wanted, progress=progress), new.encode_texts(wanted, progress=progress)
