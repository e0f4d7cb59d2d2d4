"""Which items a filter keeps: SQL over the item table and the user's own columns, run by DuckDB."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from mmalign.encoders.hub import closest
from mmalign.errors import InputError

__all__ = ["kept_ids"]

_KEY_VALUE = re.compile(r"\s*([^\W\d]\w*)\s*=\s*([^=<>'\"();]*?)\s*")
# Words of SQL in capitals: `width=1000 AND city IS NULL` is no value.
_SQL = re.compile(r"\s(AND|OR|IS|IN|LIKE|BETWEEN|NOT)\s")

_MODIFIED = "make_timestamp(items.mtime_ns // 1000)"
# Names that people expect; a column of the user's comes first.
_ALIASES = {"path": "items.name", "time": _MODIFIED}
# How DuckDB speaks of a column that is not there.
_UNKNOWN = re.compile(r'Referenced column "([^"]+)" not found')


def kept_ids(items: pa.Table, metadata: pa.Table | None, where: str | Sequence[str]) -> Int[np.ndarray, " kept"]:
    """Ids of the items for which every condition holds.

    Args:
        items: columns of `retrieval.items.SCHEMA`; columns `modified` (timestamp, UTC), `path` (= name) and
            `time` (= modified) are added.
        metadata: the user's columns and `id`; ours win where names are equal, but for `path` and `time`.
        where: conditions joined by AND. Each is SQL (`width > 1000 AND city = 'Rome'`) or `key=value`, where the value
            is compared as the column's type: text as it is, numbers by what they are.

    Raises:
        InputError: DuckDB cannot understand a condition; the columns are named.
    """
    import duckdb

    conditions = [where] if isinstance(where, str) else list(where)
    kinds = {"modified": pa.timestamp("us"), **{field.name.lower(): field.type for field in items.schema}}
    extra = []
    for field in metadata.schema if metadata is not None else []:
        if field.name.lower() not in kinds:
            kinds[field.name.lower()] = field.type
            extra.append('meta."' + field.name.replace('"', '""') + '"')
    aliases = {name: column for name, column in _ALIASES.items() if name not in kinds}
    clauses, values = [], []
    for condition in conditions:
        pair = _KEY_VALUE.fullmatch(condition)
        if pair and not _SQL.search(condition):
            clauses.append(_equals(pair[1], kinds.get(pair[1].lower())))
            values.append(pair[2])
        elif not condition.strip():
            raise InputError('a filter is empty; give for example "width > 1000" or city=Rome')
        else:
            clauses.append(f"({condition})")
    computed = {"modified": _MODIFIED, **aliases}
    columns = ", ".join(["items.*", *(f'{column} AS "{name}"' for name, column in computed.items()), *extra])
    source = "items" if metadata is None else "items LEFT JOIN meta ON items.id = meta.id"
    statement = f"SELECT id FROM (SELECT {columns} FROM {source}) WHERE {' AND '.join(clauses) or 'true'}"
    # A condition comes from a person or, in a service, from a stranger: it sees two tables and nothing else.
    connection = duckdb.connect(":memory:", config={"python_enable_replacements": "false"})
    try:
        connection.register("items", items)
        if metadata is not None:
            connection.register("meta", metadata)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        if len(connection.extract_statements(statement)) != 1:
            raise duckdb.ParserException("one condition, without semicolons")
        found = connection.execute(statement, values).fetchnumpy()["id"]
    except (duckdb.Error, TypeError) as error:  # TypeError: text that is no Unicode
        reason = str(error).splitlines()[0]
        shown = " AND ".join(conditions)
        names = [name for name in items.column_names if name not in ("name_bytes", "sha256", "mtime_ns", "row")]
        names += [*computed, *(metadata.column_names if metadata is not None else [])]
        known = f"columns: {', '.join(dict.fromkeys(names))}"
        if unknown := _UNKNOWN.search(reason):
            raise InputError(
                f"filter {shown!r}: {unknown[1]!r} is not a column{closest(unknown[1].lower(), names)}; {known}"
            ) from None
        raise InputError(f"filter {shown!r} is not understood ({reason}); {known}") from None
    finally:
        connection.close()
    return np.asarray(found, np.int64)


def _equals(name: str, kind: pa.DataType | None) -> str:
    """A comparison of a column with one parameter, in the column's type."""
    column = f'"{name}"'
    if kind is None or not (
        pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_decimal(kind)
    ):
        return f"CAST({column} AS VARCHAR) = ?"
    if pa.types.is_boolean(kind):
        return f"{column} = TRY_CAST(? AS BOOLEAN)"
    if pa.types.is_floating(kind):
        return f"{column} = TRY_CAST(? AS {'FLOAT' if kind.bit_width <= 32 else 'DOUBLE'})"
    return f"{column} = TRY_CAST(? AS DECIMAL(38, 9))"  # exact for all 64-bit integers, and 3.5 equals none
