"""Filters, against plain Python over the same rows, and against everything a stranger might write into one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from drawing import clustered, draw, names
from tiny_encoder import TinyEncoder

from mmalign.errors import InputError
from retrieval import ImageIndex
from retrieval.filters import kept_ids
from retrieval.items import SCHEMA

ROWS = 300


@pytest.fixture(scope="module")
def tables() -> tuple[pa.Table, pa.Table, list[dict[str, Any]]]:
    """Items, metadata for two thirds of them, and both as plain rows."""
    random = np.random.default_rng(0)
    items, extra = [], []
    for number in range(ROWS):
        items.append(
            {
                "id": 1000 + 3 * number,
                "row": number,
                "root": 0,
                "name": f"folder{number % 7}/{number}.jpg",
                "name_bytes": None,
                "size": int(random.integers(1, 10**7)),
                "mtime_ns": int(1.7e18) + number * 86_400 * 10**9,
                "sha256": bytes(32),
                "width": int(random.integers(1, 40)) * 100,
                "height": 1000,
                "format": "JPEG" if number % 3 else "PNG",
                "flags": "alpha" if number % 11 == 0 else "",
            }
        )
        if number % 3:
            extra.append(
                {
                    "id": 1000 + 3 * number,
                    "City": ["Rome", "São Paulo", "007", "7", "", None, "nan"][number % 7],
                    "year": 1990 + number % 30 if number % 5 else None,
                    "tweet": 9_007_199_254_740_992 + number % 3,
                    "rating": [0.1, 2.5, float("nan"), 4.0, None][number % 5],
                    "half": [0.1, 0.5][number % 2],
                    "good": [True, False, None][number % 3],
                    "day": date(2024, 1, 1 + number % 28),
                    "width": 5,
                    'odd "name"': number % 4,
                    "Modified": "never",
                }
            )
    metadata = pa.Table.from_pylist(extra)
    metadata = metadata.set_column(
        metadata.column_names.index("half"), "half", metadata.column("half").cast(pa.float32())
    )
    about = {row["id"]: {name.lower(): value for name, value in row.items() if name != "width"} for row in extra}
    nothing = dict.fromkeys(name.lower() for name in extra[0])
    rows = [{**nothing, **about.get(row["id"], {}), **row} for row in items]
    return pa.Table.from_pylist(items, schema=SCHEMA), metadata, rows


Keep = Callable[[dict[str, Any]], bool]


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("width > 1000", lambda r: r["width"] > 1000),
        ("width > 1000 AND city = 'Rome'", lambda r: r["width"] > 1000 and r["city"] == "Rome"),
        ("city IS NULL", lambda r: r["city"] is None),
        ("name LIKE 'folder3/%' OR format = 'PNG'", lambda r: r["name"].startswith("folder3/") or r["format"] == "PNG"),
        (["width > 1000", "format=PNG"], lambda r: r["width"] > 1000 and r["format"] == "PNG"),
        (["width=500 OR width=600", "format=PNG"], lambda r: r["width"] in (500, 600) and r["format"] == "PNG"),
        ("width=500 AND city IS NULL", lambda r: r["width"] == 500 and r["city"] is None),
        ("rating BETWEEN 1 AND 3", lambda r: r["rating"] is not None and 1 <= r["rating"] <= 3),
        ("modified >= '2024-01-01'", lambda r: datetime.fromtimestamp(r["mtime_ns"] / 1e9, timezone.utc).year >= 2024),
        ("year(modified) = 2023", lambda r: datetime.fromtimestamp(r["mtime_ns"] / 1e9, timezone.utc).year == 2023),
        ("flags LIKE '%alpha%'", lambda r: "alpha" in r["flags"]),
        ("\"odd \"\"name\"\"\" = 3", lambda r: r['odd "name"'] == 3),
        ("id in (1003, 1006)", lambda r: r["id"] in (1003, 1006)),
        # key=value
        ("format=PNG", lambda r: r["format"] == "PNG"),
        ("City=Rome", lambda r: r["city"] == "Rome"),
        ("city=Rome", lambda r: r["city"] == "Rome"),
        (" city = São Paulo ", lambda r: r["city"] == "São Paulo"),
        ("city=7", lambda r: r["city"] == "7"),
        ("city=007", lambda r: r["city"] == "007"),
        ("city=7.0", lambda r: False),
        ("city=nan", lambda r: r["city"] == "nan"),
        ("city=", lambda r: r["city"] == ""),
        ("city=NULL", lambda r: False),
        ("width=500", lambda r: r["width"] == 500),
        ("width=500.0", lambda r: r["width"] == 500),
        ("width=500.4", lambda r: False),
        ("width=wide", lambda r: False),
        ("year=1995", lambda r: r["year"] == 1995),
        ("tweet=9007199254740993", lambda r: r["tweet"] == 9_007_199_254_740_993),
        ("rating=0.1", lambda r: r["rating"] == 0.1),
        ("rating=4", lambda r: r["rating"] == 4.0),
        ("half=0.1", lambda r: r["half"] == 0.1),
        ("good=True", lambda r: r["good"] is True),
        ("good=false", lambda r: r["good"] is False),
        ("day=2024-01-05", lambda r: r["day"] == date(2024, 1, 5)),
        ("name=folder3/3.jpg", lambda r: r["name"] == "folder3/3.jpg"),
    ],
)  # fmt: skip
def test_same_rows_as_python(tables: tuple[pa.Table, pa.Table, list[dict[str, Any]]], where: Any, keep: Keep) -> None:
    items, metadata, rows = tables
    expected = [row["id"] for row in rows if keep(row)]
    assert sorted(kept_ids(items, metadata, where)) == expected


def test_without_metadata(tables: tuple[pa.Table, pa.Table, list[dict[str, Any]]]) -> None:
    items, _, rows = tables
    assert sorted(kept_ids(items, None, "width=500")) == [row["id"] for row in rows if row["width"] == 500]
    assert len(kept_ids(items, None, [])) == ROWS
    with pytest.raises(InputError, match="columns: id, "):
        kept_ids(items, None, "city=Rome")


def test_names_that_people_expect(tables: tuple[pa.Table, pa.Table, list[dict[str, Any]]]) -> None:
    items, metadata, rows = tables
    first = rows[0]["name"]
    assert list(kept_ids(items, None, ["(path = name)", f"path = '{first}'"])) == [rows[0]["id"]]
    assert len(kept_ids(items, None, "(time = modified)")) == ROWS
    own = pa.table({"id": [rows[1]["id"]], "time": ["noon"]})
    assert list(kept_ids(items, own, "time=noon")) == [rows[1]["id"]], "a column of the user's comes first"
    with pytest.raises(InputError, match=r"'wdth' is not a column \(did you mean width.*columns: id, .*width") as told:
        kept_ids(items, metadata, "wdth > 3")
    assert "Binder" not in str(told.value)


@pytest.mark.parametrize(
    "where", ["town = 'Rome'", "town=Rome", "width >", "width > 'x'", "sum(width) > 3", "width > ?", ")"]
)
def test_bad_conditions_name_the_columns(tables: tuple[pa.Table, pa.Table, Any], where: str) -> None:
    items, metadata, _ = tables
    with pytest.raises(InputError) as caught:
        kept_ids(items, metadata, where)
    message = str(caught.value)
    assert where in message
    for column in ("width", "name", "modified", "City", "rating"):
        assert column in message
    assert "\n" not in message


@pytest.mark.parametrize("where", ["", "  ", ["width=500", ""]])
def test_empty_condition(tables: tuple[pa.Table, pa.Table, Any], where: Any) -> None:
    with pytest.raises(InputError, match="empty"):
        kept_ids(tables[0], tables[1], where)


SECRET = "the secret in this file"


@pytest.mark.parametrize(
    "where",
    [
        "(SELECT count(*) FROM read_csv('{file}', header=false)) > 0",
        "(SELECT count(*) FROM read_text('{file}')) > 0",
        "(SELECT count(*) FROM read_blob('{file}')) > 0",
        "(SELECT count(*) FROM read_json('{file}')) > 0",
        "(SELECT count(*) FROM read_parquet('{file}')) > 0",
        "(SELECT count(*) FROM '{file}') > 0",
        "(SELECT count(*) FROM glob('/*')) > 0",
        "(SELECT count(*) FROM sniff_csv('{file}')) > 0",
        "(SELECT count(*) FROM rows_of_python) > 0",
        "getenv('HOME') = 'x'",
        "1=1); COPY items TO '{out}'; --",
        "1=1); COPY (SELECT 1) TO '{out}' --",
        "1=1) UNION SELECT id FROM items; ATTACH '{out}' AS x; --",
        "1=1); ATTACH '{out}' AS x; SELECT id FROM items WHERE (1=1",
        "1=1); SET enable_external_access = true; SELECT id FROM items WHERE (1=1",
        "1=1); INSTALL httpfs; SELECT id FROM items WHERE (1=1",
        "1=1); EXPORT DATABASE '{out}'; --",
        "1=1); DROP VIEW items; SELECT 1 AS id --",
        "1=1;",
        "; SELECT 1",
        "COPY items TO '{out}'",
        "ATTACH '{out}'",
        "width=1; COPY items TO '{out}'",
        "\x00",
        "city = '\udcff'",
    ],
)
def test_a_stranger_sees_two_tables_and_nothing_else(
    tables: tuple[pa.Table, pa.Table, Any], tmp_path: Path, where: str
) -> None:
    rows_of_python = pa.table({"secret": [SECRET]})
    file, out = tmp_path / "secret.csv", tmp_path / "out"
    file.write_text(SECRET)
    with pytest.raises(InputError) as caught:
        kept_ids(tables[0], tables[1], where.format(file=file, out=out))
    assert SECRET not in str(caught.value)
    assert not out.exists()
    assert rows_of_python.num_rows == 1
    assert len(kept_ids(tables[0], tables[1], "true")) == ROWS


# -- in searches -------------------------------------------------------------------------------------------------------

N, DIM = 60_000, 32


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageIndex, np.ndarray]:
    """60,000 clustered vectors in lists of 8-bit rows; `u` is uniform in [0, 1), `cluster` the cluster."""
    vectors = clustered(N, DIM, clusters=300)
    table = pa.table({"u": np.random.default_rng(1).random(N), "cluster": np.arange(N) % 300})
    out = tmp_path_factory.mktemp("large") / "idx"
    index = ImageIndex.from_vectors(vectors, out, metadata=table, factory="IVF256,SQ8", recall=0.97)
    return index, vectors


def check_against_brute_force(
    index: ImageIndex, vectors: np.ndarray, where: str, mask: np.ndarray, queries: np.ndarray, k: int
) -> float:
    """Recall over the queries; asserts what holds without exception."""
    scores, rows = index.search_vectors(queries, k, mask=index.snapshot.rows_of(index.snapshot.passing(where)))
    if not mask.any():
        assert (rows == -1).all()
        return 1.0
    truth = queries @ vectors[mask].T
    kept = np.flatnonzero(mask)
    found = []
    for number, query in enumerate(queries):
        got = rows[number][rows[number] >= 0]
        assert len(got) == len(set(got)) == min(k, len(kept)), "never fewer than there are"
        assert mask[got].all()
        np.testing.assert_allclose(scores[number][: len(got)], vectors[got] @ query, atol=2e-6)
        assert (np.diff(scores[number][: len(got)]) <= 0).all()
        assert (rows[number][len(got) :] == -1).all()
        best = kept[np.argsort(-truth[number], kind="stable")[:k]]
        found.append(len(np.intersect1d(best, got)) / max(1, len(best)))
    return float(np.mean(found))


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.005, 0.05, 0.3, 0.34, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_any_share(large: tuple[ImageIndex, np.ndarray], share: float, k: int) -> None:
    index, vectors = large
    queries = clustered(40, DIM, clusters=300, seed=2)
    mask = index.metadata.column("u").to_numpy() < share  # type: ignore[union-attr]
    recall = check_against_brute_force(index, vectors, f"u < {share}", mask, queries, k)
    assert recall == 1 if mask.sum() <= 20_000 else recall > 0.93


def test_filter_that_asks_for_what_is_far_from_the_query(large: tuple[ImageIndex, np.ndarray]) -> None:
    index, vectors = large
    queries = vectors[:20]  # of clusters 0 to 19
    mask = np.arange(N) % 300 >= 100
    recall = check_against_brute_force(index, vectors, "cluster >= 100", mask, queries, 10)
    assert recall > 0.8


def test_aliases_pass_one_by_one(folder: Path, encoder: TinyEncoder) -> None:
    draw(folder / "a" / "copy.png", 3)
    index, _ = ImageIndex.build(folder, encoder=encoder)
    for where, first, aliases in [
        ("name LIKE 'a/%'", "a/copy.png", []),
        ("name NOT LIKE 'a/%'", "03.png", []),
        ("true", "03.png", ["copy.png"]),
    ]:
        hit = index.search(folder / "03.png", k=1, where=where)[0]
        assert hit.item.name == first
        assert [os.fspath(path.name) for path in hit.aliases] == aliases
    assert names(index.search("x", k=50, where="false")) == []
