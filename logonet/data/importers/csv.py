"""Tables of scans: CSV and TSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from logonet.core import config
from logonet.core.errors import UserError
from logonet.data.importers import common
from logonet.data.manifest import Source
from logonet.storage import object_store

CSV_COLUMNS = ("image", "label", "subject", "dataset", "licence", "modality", "split", "fold", "sha256")


def csv_sources(uri: str) -> list[Source]:
    """One scan per row: an image, and where given its label, subject, split, ..."""
    found: dict[str, Source] = {}
    for where, row in read_rows(uri, ",;\t", set(CSV_COLUMNS)):
        for column in row:
            if column not in CSV_COLUMNS:
                raise UserError(f"{uri}: {config.unknown('column', column, CSV_COLUMNS)}")
        if not row.get("image"):
            raise UserError(f"{where}: names no image; fill in the column 'image'")
        folder = common.folder_of(uri)
        image, label = (common.resolve(folder, row[c]) if row.get(c) else "" for c in ("image", "label"))
        if object_store.is_s3(uri):
            for named in (image, label):
                if named and not object_store.is_s3(named):
                    common.inside(uri, named, where)
        if image in found:
            raise UserError(f"{where}: lists {image} a second time; keep one of the rows")
        source = Source(
            uri=image,
            subject=row.get("subject", ""),
            dataset=row.get("dataset") or common.name_of(uri)[: -len(".csv")],
            licence=row.get("licence", ""),
            modality=row.get("modality", ""),
            split=common.parse_split(row.get("split", ""), where),
            fold=common.parse_fold(row.get("fold", ""), where),
            label_uri=label,
            sha256=common.parse_digest(row.get("sha256", ""), where),
        )
        found[image] = common.with_slices(source)
    return list(found.values())


def read_rows(uri: str, delimiters: str, wanted: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of each line below the header of a table, if it has one of the ``wanted`` columns.

    ``where`` names file and line in errors. Of the ``delimiters`` the one that is most frequent in the header counts:
    spreadsheets write semicolons in some languages.
    """
    text = object_store.read_text(uri)
    delimiter = max(delimiters, key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] = []
    try:
        for cells in lines:
            where = f"{uri}, line {lines.line_num}"
            if not header:
                header = [cell.strip() for cell in cells]
                if not wanted & set(header):
                    return
            elif any(cells):
                if len(cells) != len(header):
                    raise UserError(f"{where}: has {len(cells)} cells, its header {len(header)}; correct it")
                yield where, {name: cell.strip() for name, cell in zip(header, cells)}
    except csv.Error as err:
        raise UserError(f"{uri}, line {lines.line_num}: is no line of a table ({err}); correct it") from None
