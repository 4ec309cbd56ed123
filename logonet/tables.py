"""Rows of a dataclass as Parquet, and back: a table is believed only if its columns are that dataclass's."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from logonet.errors import UserError

T = TypeVar("T")


def to_parquet(rows: Sequence[Mapping[str, Any]], row_type: type) -> bytes:
    """``rows`` (as ``dataclasses.asdict`` gives them) with the columns and types of ``row_type``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema(row_type)), sink)
    return sink.getvalue()


def from_parquet(data: bytes, row_type: type[T], where: str) -> list[T]:
    """The rows of such a table, lists as tuples.

    Raises:
        UserError: naming ``where``, for what is no Parquet file or has other columns, types or empty cells.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
        table.validate(full=True)  # lengths and UTF-8: what it is read into takes them as said
    except (pa.ArrowException, OSError) as err:
        raise UserError(
            f"{where} is no whole Parquet file ({' '.join(str(err).split())}); make it again"
        ) from None
    wanted, names = _schema(row_type), table.column_names
    try:
        table = table.cast(wanted) if names == wanted.names else None
    except pa.ArrowException:
        table = None
    if table is None or any(column.null_count for column in table.columns):
        raise UserError(
            f"{where} has the columns {', '.join(names)}; it must have {', '.join(wanted.names)}, every cell of their "
            "types: it is of another version of logonet"
        )
    return [
        row_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in table.to_pylist()
    ]


def _schema(row_type: type) -> Any:
    import pyarrow as pa

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "tuple[int, int, int]": pa.list_(pa.int64()),
        "tuple[int, ...]": pa.list_(pa.int64()),
        "tuple[float, float, float]": pa.list_(pa.float64()),
        "tuple[str, ...]": pa.list_(pa.string()),
    }
    return pa.schema([(f.name, types[str(f.type)]) for f in fields(row_type)])
