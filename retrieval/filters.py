"""Which items a filter keeps: SQL over the item table and the user's own columns, run by DuckDB."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from mmalign.errors import InputError

__all__ = ["kept_ids"]

_KEY_VALUE = re.compile(r"\s*([^\W\d]\w*)\s*=\s*([^=<>'\"()]*?)\s*")


def kept_ids(items: pa.Table, metadata: pa.Table | None, where: str | Sequence[str]) -> Int[np.ndarray, " kept"]:
    """Ids of the items for which every condition holds.

    Args:
        items: columns of `retrieval.items.SCHEMA`; a column `modified` (timestamp, UTC) is added.
        metadata: the user's columns and `id`; ours win where names are equal.
        where: conditions joined by AND. Each is SQL (`width > 1000 AND city = 'Rome'`) or `key=value`.

    Raises:
        InputError: DuckDB cannot understand a condition; the columns are named.
    """
    import duckdb

    conditions = [where] if isinstance(where, str) else list(where)
    clauses, values = [], []
    for condition in conditions:
        pair = _KEY_VALUE.fullmatch(condition)
        if pair:
            column = '"' + pair[1] + '"'
            clauses.append(f"(CAST({column} AS VARCHAR) = ? OR TRY_CAST({column} AS DOUBLE) = TRY_CAST(? AS DOUBLE))")
            values += [pair[2], pair[2]]
        elif not condition.strip():
            raise InputError('a filter is empty; give for example "width > 1000" or city=Rome')
        else:
            clauses.append(f"({condition})")
    # A condition comes from a person or, in a service, from a stranger: it sees two tables and nothing else.
    connection = duckdb.connect(":memory:", config={"python_enable_replacements": "false"})
    try:
        connection.register("items", items)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        source, extra = "items", []
        if metadata is not None:
            connection.register("meta", metadata)
            source = "items LEFT JOIN meta ON items.id = meta.id"
            extra = [
                f'meta."{name}"' for name in metadata.column_names if name not in (*items.column_names, "modified")
            ]
        columns = ", ".join(["items.*", "make_timestamp(items.mtime_ns // 1000) AS modified", *extra])
        statement = f"SELECT id FROM (SELECT {columns} FROM {source}) WHERE {' AND '.join(clauses)}"
        found = connection.execute(statement, values).fetchnumpy()["id"]
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        names = [name for name in items.column_names if name not in ("path_bytes", "sha256", "mtime_ns", "row")]
        names += ["modified", *(metadata.column_names if metadata is not None else [])]
        raise InputError(
            f"filter {' AND '.join(conditions)!r} is not understood ({reason}); "
            f"columns: {', '.join(dict.fromkeys(names))}"
        ) from None
    finally:
        connection.close()
    return np.asarray(found, np.int64)
