"""`mmalign search`, `similar` and `duplicates`: questions to an index."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.errors import InputError

from .options import (
    NO_RESULT,
    AsJson,
    AsNull,
    AsPaths,
    Count,
    Device,
    Encoder,
    Grid,
    IndexArgument,
    MinMatch,
    MinScore,
    Quiet,
    Where,
    print_paths,
    say,
)

if TYPE_CHECKING:
    from retrieval import Hit, ImageIndex

__all__ = ["duplicates", "search", "similar"]


def search(
    terms: Annotated[
        list[str],
        typer.Argument(
            help="The index (may be left out inside an indexed folder), then words or image files. Several terms are "
            "added up; a weight goes in front, as in 2:red. text: or image: in front says which is meant.",
            show_default=False,
        ),
    ],
    minus: Annotated[
        list[str] | None, typer.Option("--minus", "-m", help="Words or an image to move away from; may repeat.")
    ] = None,
    count: Count = 10,
    where: Where = None,
    min_match: MinMatch = None,
    min_score: MinScore = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every vector instead of asking FAISS.")] = False,
    paths: AsPaths = False,
    null: AsNull = False,
    as_json: AsJson = False,
    grid: Grid = None,
    encoder: Encoder = None,
    device: Device = None,
) -> None:
    """Find images by words, by an image, or by several of both.

    [bold]mmalign search photos/ "red bicycle in snow"[/bold]
    [bold]mmalign search photos/ beach.jpg "at night" --minus people[/bold]
    [bold]mmalign search photos/ "2:a dog" "1:on the beach" --where "width > 1000" --grid hits.png[/bold]
    """
    from retrieval.query import parse_term

    index, words = _index_and_terms(terms, encoder, device)
    query = [parse_term(word) for word in words] + [parse_term(word, -1.0) for word in minus or []]
    hits = index.search(query, count, where=where, min_match=min_match, min_score=min_score, exact=exact)
    title = " + ".join(words) + "".join(f" - {word}" for word in minus or [])
    _print_hits(title, hits, paths, null, as_json, grid)


def _index_and_terms(terms: list[str], encoder: str | None, device: str | None) -> tuple[ImageIndex, list[str]]:
    """The first term may name the index; otherwise it is looked for here."""
    from retrieval import ImageIndex
    from retrieval.storage import find_index

    try:
        folder, words = find_index(terms[0]), terms[1:]
    except InputError:
        if Path(terms[0]).is_dir() or (os.sep in terms[0] and not Path(terms[0]).is_file()):
            raise  # meant as a place, not as words
        try:
            folder, words = find_index("."), terms
        except InputError:
            raise InputError(
                f"{terms[0]!r} is not an index and there is none here; make one with `mmalign index FOLDER` and name "
                'it first: mmalign search FOLDER "words"'
            ) from None
    if not words:
        raise InputError('what to look for is missing; give words or an image: mmalign search INDEX "a red bicycle"')
    return ImageIndex.open(folder, encoder=encoder, device=device), words


def similar(
    index: IndexArgument,
    image: Annotated[
        str, typer.Argument(help="An image file, indexed or not, or the id of an item.", show_default=False)
    ],
    count: Count = 10,
    where: Where = None,
    min_match: MinMatch = None,
    min_score: MinScore = None,
    paths: AsPaths = False,
    null: AsNull = False,
    as_json: AsJson = False,
    grid: Grid = None,
    encoder: Encoder = None,
    device: Device = None,
) -> None:
    """Find the images most like one."""
    from retrieval import ImageIndex

    opened = ImageIndex.open(index, encoder=encoder, device=device)
    wanted = int(image) if image.isdigit() and not Path(image).exists() else image
    hits = opened.similar(wanted, count, where=where, min_match=min_match, min_score=min_score)
    _print_hits(f"like {image}", hits, paths, null, as_json, grid)


def duplicates(
    index: IndexArgument,
    near: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Also group different files from this cosine on, e.g. 0.98. (default: files of equal content only)",
        ),
    ] = None,
    paths: AsPaths = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List images that are the same: groups of equal files, and with --near of nearly equal pictures.

    With --paths all but the first of each group are printed.
    """
    from retrieval import ImageIndex

    groups = ImageIndex.open(index).duplicates(near, progress=not quiet)
    for number, group in enumerate(groups, 1):
        if as_json:
            print(json.dumps({"group": number, "paths": [os.fspath(item.path) for item in group]}))
        elif paths:
            print_paths((item.path for item in group[1:]), "\n")
        else:
            print(f"{number}  {len(group)} images")
            for item in group:
                print(f"   {item.name}  {item.width}x{item.height}  {item.size:,} bytes")
    if not groups:
        say("no duplicates")
        raise typer.Exit(NO_RESULT)


def _print_hits(title: str, hits: list[Hit], paths: bool, null: bool, as_json: bool, grid: Path | None) -> None:
    if grid is not None:
        from retrieval import draw_grid

        say(f"picture: {draw_grid([(title, hits)], grid)}")
    if as_json:
        for hit in hits:
            print(json.dumps(hit.to_dict()))
    elif paths or null:
        print_paths((hit.path for hit in hits), "\0" if null else "\n")
    elif hits:
        print("rank  match  cosine  image")
        for hit in hits:
            match = "  -  " if hit.match is None else f"{hit.match:5.2f}"
            copies = f"  (+{len(hit.aliases)} copies)" if hit.aliases else ""
            print(f"{hit.rank:>4}  {match}  {hit.score:6.3f}  {hit.item.name}{copies}")
    if not hits:
        say("nothing here matches")
        raise typer.Exit(NO_RESULT)
