"""`mmalign search`, `similar` and `duplicates`: questions to an index."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    IndexOrHere,
    MinMatch,
    MinScore,
    Objects,
    Quiet,
    Where,
    index_here,
    one_output,
    print_paths,
    say,
    say_if_unfinished,
)

if TYPE_CHECKING:
    from mmalign.object_aware.reranking import Reranker
    from retrieval import Hit, ImageIndex, Item
    from retrieval.query import Term

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
    rerank: Annotated[
        str | None,
        typer.Option(
            help="Look at the best results again and order them anew, for one text: blip2:Salesforce/blip2-itm-vit-g, "
            "the folder of a BLIP-2, or another encoder.",
            show_default=False,
        ),
    ] = None,
    rerank_depth: Annotated[
        int | None, typer.Option(min=1, help="So many results are looked at, never fewer than --count. (default: 64)")
    ] = None,
    objects: Objects = None,
    encoder: Encoder = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Find images by words, by an image, or by several of both.

    [bold]mmalign search photos/ "red bicycle in snow"[/bold]
    [bold]mmalign search photos/ beach.jpg "at night" --minus people[/bold]
    [bold]mmalign search photos/ "2:a dog" "1:on the beach" --where "width > 1000" --grid hits.png[/bold]
    [bold]mmalign search photos/ "a cup on a piano" --rerank blip2:Salesforce/blip2-itm-vit-g[/bold]
    """
    one_output(paths, null, as_json)
    for name, value in (("--objects", objects), ("--rerank-depth", rerank_depth)):
        if rerank is None and value is not None:
            raise InputError(f"{name} is for re-ranking; give --rerank too, or leave it out")
    index, words = _index_and_terms(terms, encoder, device)
    query = [_term(word, 1.0, index) for word in words] + [_term(word, -1.0, index) for word in minus or []]
    say_if_unfinished(index)
    options: dict[str, Any] = {}
    if rerank is not None:
        from mmalign.object_aware.reranking import load_reranker
        from retrieval.reranked import words_of

        words_of(query)  # before anything is loaded
        options["rerank"] = load_reranker(rerank, objects=objects, device=device)
        options["progress"] = not quiet
        if rerank_depth is not None:
            options["rerank_depth"] = rerank_depth
    hits = index.search(query, count, where=where, min_match=min_match, min_score=min_score, exact=exact, **options)
    if rerank is not None and (unread := sum(hit.rerank_score is None for hit in hits)):
        say(
            f"note: {unread:,} of these {len(hits):,} could not be read again and come last; their files are gone, "
            "changed or damaged"
        )
    if rerank is not None and objects is not None:
        _say_missing(options["rerank"])
    title = " + ".join(words) + "".join(f" - {word}" for word in minus or [])
    _print_hits(title, hits, paths, null, as_json, grid)


def _say_missing(reranker: Reranker) -> None:
    from mmalign.object_aware.boxes import BoxesFile

    if isinstance(reranker.detector, BoxesFile) and (missing := reranker.detector.note_of_missing()):
        say(f"note: {missing}")


def _term(text: str, sign: float, index: ImageIndex) -> Term:
    from retrieval.query import names_image, parse_term

    term = parse_term(text, sign, index.roots)
    if term.kind == "image" and not text.endswith(f"image:{term.value}") and not names_image(str(term.value)):
        say(f"note: {str(term.value)!r} is a file here and taken as an image; text:{term.value} searches for the words")
    return term


def _index_and_terms(terms: list[str], encoder: str | None, device: str | None) -> tuple[ImageIndex, list[str]]:
    """The first term may name the index; otherwise it is looked for here."""
    from retrieval import ImageIndex
    from retrieval.query import find_image, has_image_suffix, names_image
    from retrieval.storage import find_index, find_index_above

    first, folder, words = terms[0], None, terms
    if not first.startswith(("text:", "image:")):
        try:
            folder, words = find_index(first), terms[1:]
        except (OSError, ValueError) as error:  # InputError is a ValueError; OSError: too long for a name
            # A path is meant as a place; a bare name may be a word that happens to name a folder.
            as_place = names_image(first) and not has_image_suffix(first) and find_image(first, ()) is None
            here = find_index_above()
            if isinstance(error, InputError) and as_place and here is not None:
                raise InputError(f"{error}; text:{first} searches for the words") from None
            if isinstance(error, InputError) and (as_place or (here is None and Path(first).is_dir())):
                raise
            if isinstance(error, InputError) and Path(first).is_dir():
                say(f"note: the folder {first!r} holds no index, so {first!r} is taken as words")
    if folder is None:
        folder = index_here(f"{first!r} is not an index and there is none here")
    if not words:
        raise InputError(
            f'what to look for is missing; give words or an image: mmalign search {shlex.quote(first)} "a red bicycle"'
        )
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
    from retrieval.query import find_image

    one_output(paths, null, as_json)
    opened = ImageIndex.open(index, encoder=encoder, device=device)
    say_if_unfinished(opened)
    wanted: int | str | Path = find_image(image, opened.roots) or (int(image) if image.isdigit() else image)
    hits = opened.similar(wanted, count, where=where, min_match=min_match, min_score=min_score)
    _print_hits(f"like {image}", hits, paths, null, as_json, grid)


def duplicates(
    index: IndexOrHere = None,
    near: Annotated[
        float | None,
        typer.Option(
            min=-1,
            max=1,
            help="Also group different files from this cosine on, e.g. 0.98. (default: files of equal content only)",
        ),
    ] = None,
    paths: AsPaths = False,
    null: AsNull = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List images that are the same: groups of equal files, and with --near of nearly equal pictures.

    With --paths all but the first of each group are printed, except links to a file of the group (no copies) and files
    that are not what was indexed.
    """
    from retrieval import ImageIndex
    from retrieval.duplicates import links_of, spare_files

    one_output(paths, null, as_json)
    groups = ImageIndex.open(index or index_here()).duplicates(near, progress=not quiet)
    if paths or null:
        spare = [spare_files(group) for group in groups]
        print_paths((item.path for items in spare for item in items), "\0" if null else "\n")
        _say_withheld(groups, spare)
        groups = [group for group, items in zip(groups, spare, strict=True) if items]
    else:
        for number, group in enumerate(groups, 1):
            links = list(zip(group, links_of(group), strict=True))
            if as_json:
                link_of = {os.fspath(item.path): os.fspath(one.path) for item, one in links if one is not None}
                about = {"group": number, "paths": [os.fspath(item.path) for item in group], "link_of": link_of}
                print(json.dumps(about))
            else:
                print(f"{number}  {len(group)} images")
                for item, one in links:
                    note = "" if one is None else f"  (link to {one.name})"
                    print(f"   {item.name}  {item.width}x{item.height}  {item.size:,} bytes{note}")
    if not groups:
        say("no duplicates")
        raise typer.Exit(NO_RESULT)


def _say_withheld(groups: list[list[Item]], spare: list[list[Item]]) -> None:
    withheld = sum(len(group) - 1 for group in groups) - sum(map(len, spare))
    if withheld:
        say(f"{withheld:,} not listed: links to a file that is kept, or changed or gone since they were indexed")


def _print_hits(title: str, hits: list[Hit], paths: bool, null: bool, as_json: bool, grid: Path | None) -> None:
    if grid is not None:
        from retrieval import draw_grid

        say(f"picture: {draw_grid([(title, hits)], grid)}")
    if as_json:
        for hit in hits:
            print(json.dumps(hit.to_dict()))
    elif paths or null:
        there = [hit.path for hit in hits if hit.item.exists is not False]
        print_paths(there, "\0" if null else "\n")
        if len(there) < len(hits):
            say(f"{len(hits) - len(there):,} left out: the files are gone; `mmalign index` brings the index up to date")
    elif hits:
        again = any(hit.rerank_score is not None for hit in hits)
        print(f"rank  {'rerank  ' if again else ''}match  cosine  image")
        for hit in hits:
            match = "  -  " if hit.match is None else f"{hit.match:5.2f}"
            if again:
                match = f"{'  -   ' if hit.rerank_score is None else f'{hit.rerank_score:6.3f}'}  {match}"
            copies = f"  (+{len(hit.aliases)} copies)" if hit.aliases else ""
            missing = "  (missing)" if hit.item.exists is False else ""
            print(f"{hit.rank:>4}  {match}  {hit.score:6.3f}  {hit.item.name}{copies}{missing}")
    if not hits:
        say("nothing here matches")
        raise typer.Exit(NO_RESULT)
