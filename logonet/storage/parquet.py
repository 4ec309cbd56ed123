"""Rows of a dataclass as an Arrow table and as Parquet: a table must have exactly that dataclass's columns.

Where ray.data is imported, Arrow knows a column type of Ray's whose values are pickles, which load as soon as a
value is read. Our own tables have no column of an extension type, so all extension types are refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from logonet.core.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")


class Rows(Generic[T]):
    """Rows of a dataclass in an Arrow table: a fraction of the objects' memory, and a few buffers where it travels."""

    def __init__(self, table: pa.Table, row_type: type[T]) -> None:
        self.table, self.row_type = table.combine_chunks(), row_type

    @classmethod
    def of(cls, rows: Iterable[T], row_type: type[T]) -> Rows[T]:
        import pyarrow as pa

        rows, schema = list(rows), _schema(row_type)
        columns = [pa.array([getattr(row, f.name) for row in rows], f.type) for f in schema]
        return cls(pa.Table.from_arrays(columns, schema=schema), row_type)

    @classmethod
    def joined(cls, parts: Sequence[Rows[T]]) -> Rows[T]:
        """The rows of several, of which there is at least one."""
        import pyarrow as pa

        return cls(pa.concat_tables([part.table for part in parts]), parts[0].row_type)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> T:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._row(self.table.slice(index, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[T]:
        return map(self._row, self.table.to_pylist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.row_type is other.row_type and self.table.equals(other.table)

    def _row(self, values: dict[str, Any]) -> T:
        return self.row_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def column(self, name: str) -> list[Any]:
        """One field of all rows."""
        return self.table.column(name).to_pylist()

    def take(self, indices: Sequence[int]) -> Rows[T]:
        """Some of the rows."""
        return Rows(self.table.take(list(indices)), self.row_type)

    def to_parquet(self) -> bytes:
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(self.table, sink)
        return sink.getvalue()


def from_parquet(data: bytes, row_type: type[T], where: str) -> Rows[T]:
    """The rows of such a table, lists as tuples.

    Raises:
        UserError: naming ``where``, for a file that is not Parquet or has other columns, types or empty cells,
            and for columns of an extension type.
    """
    import pyarrow as pa

    table = read_parquet(data, where)
    wanted, names = _schema(row_type), table.column_names
    try:
        table = table.cast(wanted) if names == wanted.names else None
    except pa.ArrowException:
        table = None
    if table is None or any(column.null_count for column in table.columns):
        raise UserError(
            f"{where} has the columns {', '.join(names)}; it must have {', '.join(wanted.names)}, with values of "
            "their types: it is of another version of logonet"
        )
    return Rows(table, row_type)


def read_parquet(data: bytes, where: str) -> pa.Table:
    """The table in ``data``, with plain columns only, so that reading it runs no code."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
        for field in table.schema:
            if _extends(field):
                raise UserError(
                    f"{where}: its column '{field.name}' has an extension type, which could hold code; logonet never "
                    "writes such a column: do not trust this file"
                )
        table.validate(full=True)  # lengths and UTF-8, which later steps rely on
    except (pa.ArrowException, OSError, ValueError) as err:  # ValueError: Ray's, for a type it cannot parse
        raise UserError(
            f"{where} is not a Parquet table that can be read ({' '.join(str(err).split())}); make it again"
        ) from None
    return table


def _extends(field: pa.Field) -> bool:
    import pyarrow as pa

    # Without Ray, only the field's metadata shows its types.
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(field.type):  # has no fields, but values of some type
        return _extends(pa.field("", field.type.value_type))
    return any(_extends(field.type.field(i)) for i in range(field.type.num_fields))


def _schema(row_type: type) -> Any:
    import pyarrow as pa

    types = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    types |= {f"tuple[{name}": pa.list_(of) for name, of in types.items()}
    # Of a tuple's type only the first entry's counts: "tuple[int, ...]" and "tuple[int, int, int]" are lists alike.
    return pa.schema([(f.name, types[str(f.type).partition(",")[0]]) for f in fields(row_type)])
