"""Parquet tables that came from a store or a registry, read so that nothing in them can run.

Wherever ray.data is imported, Arrow knows a column type of Ray's whose values are pickles, loaded as soon as one
is looked at. None of our own tables has a column of any extension type, so all of these are refused.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from logonet.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


def read_parquet(data: bytes, name: str) -> pa.Table:
    """The table in ``data``, of plain columns only. Make frames of it with ``to_pandas(ignore_metadata=True)``.

    Raises:
        UserError: naming ``name``, for columns of an extension type, and for what is no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, ValueError) as err:  # ValueError: Ray's own, of a type that it cannot make out
        reason = (str(err).splitlines() or [type(err).__name__])[0][:200]
        raise UserError(f"{name} is not a Parquet table that can be read ({reason}); make it again") from None
    for field in table.schema:
        if _extends(field):
            raise UserError(
                f"{name}: its column '{field.name}' has an extension type, which could hold code; logonet writes "
                "no such column, so it was not made by logonet: do not trust it"
            )
    return table


def _extends(field: pa.Field) -> bool:
    import pyarrow as pa

    # Where Ray is not imported, its types are known by the field's metadata alone.
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(field.type):  # counts no fields, yet has values of some type
        return _extends(pa.field("", field.type.value_type))
    return any(_extends(field.type.field(i)) for i in range(field.type.num_fields))
