"""Seeded damage to everything a user can hand us, and a child process in which its readers meet it.

``TARGETS`` has an entry for each kind of input: how small valid files of it are made, how one seed damages a copy of
them, and the entry points that a user reaches with them. ``attempts`` runs mutations in a child process under a limit
of address space, with an alarm for each, and says what every one came to. What is allowed: success, one sentence
(`errors.UserError`) or a quarantine with a reason of one sentence. A mutation is a pure function of (target, number):

    python tests/fuzzing.py nifti 17      # does number 17 again, here, with its traceback

Folders are made afresh for every mutation; nothing outlives the process.
"""

from __future__ import annotations

import collections
import faulthandler
import gzip
import hashlib
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from logonet.core import errors, seeding
from logonet.core.errors import UserError

SECONDS = 10  # of processor time for one mutation; a reader of files this small takes milliseconds
LOADED = 30  # times as long by the clock, where other work runs beside
GRACE_S = 20  # more, before a child whose alarm did not help is killed
IMPORT_S = 600  # for making valid files and importing what reads them
PEAK_MB = 256  # that one mutation may add to the process's memory; the files have kilobytes
ADDRESS_MB = 3072  # that it may add to the address space: what is asked for and never touched counts too
SHAPE = (12, 10, 14)

Random = np.random.Generator


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        make: writes small valid files into a folder.
        damage: changes them, and says how.
        reach: what a user's command does with them; gives the sentences that a user reads, of quarantined scans too.
        names: a sentence must have one of these; () where it names a setting and no file.
    """

    make: Callable[[Path], None]
    damage: Callable[[Random, Path], str]
    reach: Callable[[Path], Iterable[str]]
    names: tuple[str, ...]


# --------------------------------------------------------------------------------------------- any bytes


def some(rng: Random, values: Sequence[Any]) -> Any:
    """One of ``values``, whatever their types."""
    return values[int(rng.integers(len(values)))]


def damaged(rng: Random, data: bytes) -> bytes:
    """``data`` after one to three blind changes."""
    for _ in range(int(rng.integers(1, 4))):
        data = some(rng, BLIND)(rng, data)
    return data


def _place(rng: Random, data: bytes) -> int:
    # half of them near the front, where headers are
    return int(rng.integers(0, (min(len(data), 400) if rng.random() < 0.5 else len(data)) + 1))


def _flip(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if out else 0):
        out[min(_place(rng, data), len(out) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _insert(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _remove(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 64)) :]


def _splice(rng: Random, data: bytes) -> bytes:
    return data[: _place(rng, data)] + data[_place(rng, data) :]


def _zeros(rng: Random, data: bytes) -> bytes:
    at, n = _place(rng, data), int(rng.integers(1, 512))
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def _number(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    word = some(rng, [b"\xff" * 8, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff\x7f", b"\0" * 8])
    return data[:at] + word + data[at + len(word) :]


def _swap(rng: Random, data: bytes) -> bytes:
    at, n, w = _place(rng, data), 4 * int(rng.integers(1, 88)), int(some(rng, [2, 4, 8]))
    words = data[at : at + n]
    return (
        data[:at]
        + b"".join(words[i : i + w][::-1] for i in range(0, len(words), w))
        + data[at + len(words) :]
    )


def _other(rng: Random, data: bytes) -> bytes:
    """Something else under this name."""
    return some(
        rng, [b"", b"\0", b"not this", b"\x1f\x8b", b"PK\x03\x04" + data, data + data, rng.bytes(200), b"{}"]
    )


BLIND = (_flip, _flip, _truncate, _insert, _remove, _splice, _zeros, _number, _swap, _other)


# ------------------------------------------------------------------------------------------ JSON and text

DEEP, LONG_NUMBER = "@deep@", "@long number@"  # no JSON value; put in as text
ODD = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    " ",
    "x",
    "\0",
    "a\nb",
    "\ud800",
    "é̂\u202e",
    "x" * 5000,
    "[/red]",
    "%s{0}",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "~nobody-here/x",
    "s3://",
    "http://127.0.0.1:9/x",
    "file://",
    ".",
    "..",
    "NaN",
    "0x10",
    "１２",
    "2026-11-25",
    [],
    [[]],
    {},
    {"": ""},
    {"name": {}},
    [None],
    ["x", 1],
    [0] * 100,
    DEEP,
    LONG_NUMBER,
)


def damaged_json(rng: Random, data: bytes, times: int | None = None) -> bytes:
    """A JSON document with one to three of its values, keys or items changed into something odd."""
    tree = json.loads(data)
    for _ in range(times or int(rng.integers(1, 4))):
        spots = list(_spots(tree))
        if not spots:
            break
        parent, key = some(rng, spots)
        tree = _change(rng, tree, parent, key)
    text = json.dumps(tree)
    deep = int(some(rng, [200, 3000, 100_000]))
    text = text.replace(json.dumps(DEEP), "[" * deep + "]" * deep, 1)
    return text.replace(json.dumps(LONG_NUMBER), "1" * 5000, 1).encode()


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every value; (None, None) of the whole."""
    yield None, None
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            yield node, key
            stack.append(value)


def _change(rng: Random, tree: Any, parent: Any, key: Any) -> Any:
    odd = json.loads(json.dumps(some(rng, ODD)))
    if parent is None:
        return odd if rng.random() < 0.3 else tree
    how = int(rng.integers(6))
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[str(odd) if not isinstance(odd, str) else odd] = parent.pop(key)
    elif how == 2:
        parent[key] = [parent[key]]
    elif how == 3 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = odd
    return tree


def damaged_text(rng: Random, data: bytes) -> bytes:
    """Lines and words of a table or YAML file changed."""
    text = data.decode()
    for _ in range(int(rng.integers(1, 4))):
        lines = text.split("\n")
        at = int(rng.integers(len(lines)))
        how = int(rng.integers(7))
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, lines[at])
        elif how == 2:
            lines.insert(at, some(rng, ODD_LINES))
        elif words := list(re.finditer(r"[^\s,:\[\]{}]+", lines[at])):
            word = some(rng, words)
            odd = some(rng, ODD_WORDS)
            lines[at] = lines[at][: word.start()] + odd + lines[at][word.end() :]
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


ODD_WORDS = (
    *("", "-1", "0", "1e400", "-.inf", ".nan", "1" * 5000, "0x", "0b", "1_0", "_", "1:60:61", "2001-99-99"),
    *(
        "2026-11-25",
        "null",
        "true",
        "~",
        "&a [*a]",
        "*b",
        "&a {<<: *a}",
        "!!python/object/apply:os.system [x]",
    ),
    *(
        "!!python/name:os.system",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "!!bool x",
        "!!set {x}",
    ),
    *(
        "!!omap [x]",
        "!!null x",
        "!x y",
        "? [a]",
        "{? [a]: b}",
        "{[a]: b}",
        "'",
        '"',
        '"\\ud800"',
        "\ud800",
        "\0",
        "\x07",
    ),
    *(
        "a\tb",
        "%YAML 9.9",
        "---",
        "...",
        "[" * 1000,
        "{" * 1000,
        "[" * 50 + "]" * 50,
        "x" * 5000,
        "../../etc/passwd",
    ),
    *(
        "/dev/zero",
        "=",
        "<<",
        "<<: 1",
        "- - -",
        "|",
        ">",
        "@x",
        "`x`",
        "\u2028",
        "\ufeff",
        "１",
        "[1, [2, [3]]]",
    ),
    *("1e9", "100000000", "2147483648", "[1e9, 1e9]", "4", "[0]", "[-1, 2, 3]", "1.5", "[.nan, 1]"),
)
ODD_LINES = (
    "bomb: [&a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(f"&{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij"))
    + "]",
    "self: &self [*self]",
    "merged: &m {<<: *m}",
    "{" * 5000,
    "- " * 3000 + "x",
    "\t",
    "? ",
    "a: b: c",
    "%TAG ! tag:yaml.org,2002:python/",
    "--- !!python/object/new:type {}",
    ",,,,,,,,,,,,,,,,",
    '"open',
    "\0",
    "x" * 200_000,
)


# -------------------------------------------------------------------------------------- NIfTI and gzip


def _phantom(seed: int) -> tuple[bytes, bytes]:
    """A scan and its label map as .nii bytes."""
    from logonet.data import phantom, volume

    scan, labels_XYZ = phantom.phantom(seed, SHAPE, classes=3)
    image = volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    return gzip.decompress(image), gzip.decompress(volume.encode_nifti(labels_XYZ, scan.affine))


def _make_scans(folder: Path, seeds: Sequence[int] = (0,)) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir()
    for seed in seeds:
        for kind, raw in zip(("imagesTr", "labelsTr"), _phantom(seed)):
            (folder / kind / f"case_{seed}.nii.gz").write_bytes(gzip.compress(raw, 1, mtime=0))


def _damage_scan(rng: Random, folder: Path) -> str:
    kind = some(rng, ["imagesTr", "imagesTr", "labelsTr"])
    path = folder / kind / "case_0.nii.gz"
    raw = gzip.decompress(path.read_bytes())
    how = some(rng, ["header", "header", "header", "voxels", "bytes", "gzip", "gzip", "plain"])
    if how == "header":
        raw, what = _odd_header(rng, raw)
        how += f" {what}"
    elif how == "voxels":
        raw, what = _odd_voxels(rng, raw)
        how += f" {what}"
    elif how == "bytes":
        raw = damaged(rng, raw)
    if how == "gzip":
        data, what = _odd_gzip(rng, raw)
        how += f" {what}"
    elif how == "plain":
        data = damaged(rng, raw) if rng.random() < 0.5 else raw  # under a name that says .gz
    else:
        data = gzip.compress(raw, 1, mtime=0)
    if rng.random() < 0.1:
        data = damaged(rng, data)
        how += ", then bytes"
    path.write_bytes(data)
    return f"{kind}: {how}"


HEADER_FIELDS = {
    # name: (numpy type, offset, items)
    "sizeof_hdr": ("i4", 0, 1),
    "dim_info": ("u1", 39, 1),
    "dim": ("i2", 40, 8),
    "intent_code": ("i2", 68, 1),
    "datatype": ("i2", 70, 1),
    "bitpix": ("i2", 72, 1),
    "pixdim": ("f4", 76, 8),
    "vox_offset": ("f4", 108, 1),
    "scl_slope": ("f4", 112, 1),
    "scl_inter": ("f4", 116, 1),
    "xyzt_units": ("u1", 123, 1),
    "qform_code": ("i2", 252, 1),
    "sform_code": ("i2", 254, 1),
    "quatern": ("f4", 256, 6),
    "srow": ("f4", 280, 12),
    "magic": ("S4", 344, 1),
}
ODD_NUMBERS = {
    "f": (np.nan, np.inf, -np.inf, 0, -1, 1, 352, 353, 1e9, 2.2e9, 3e38, -3e38, 1e-40, 0.5, 1e30),
    "i": (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1792, 2304, 32767, -32768, 12345),
    "u": (0, 1, 2, 3, 8, 16, 24, 255),
    "S": (b"n+1\0", b"ni1\0", b"n+2\0", b"\0\0\0\0", b"n+1x"),
}


def _odd_header(rng: Random, raw: bytes) -> tuple[bytes, str]:
    header = bytearray(raw[:352])
    told = []
    for _ in range(int(rng.integers(1, 4))):
        name = some(rng, [*HEADER_FIELDS, "dim", "dim", "srow", "pixdim", "all dims", "other endian"])
        if name == "other endian":
            header[:348] = _swapped(bytes(header[:348]))
        elif name == "all dims":
            header[40:56] = np.array([some(rng, [3, 4, 5, 7]), *[32767] * 7], "<i2").tobytes()
        else:
            kind, offset, items = HEADER_FIELDS[name]
            dtype = np.dtype(f"<{kind}")
            at = offset + dtype.itemsize * int(rng.integers(items))
            header[at : at + dtype.itemsize] = (
                np.array(some(rng, ODD_NUMBERS[kind[0]])).astype(dtype).tobytes()
            )
        told.append(name)
    return bytes(header) + raw[352:], ", ".join(told)


def _swapped(header: bytes) -> bytes:
    import nibabel as nib

    return nib.Nifti1Header(header, check=False).as_byteswapped().binaryblock


def _odd_voxels(rng: Random, raw: bytes) -> tuple[bytes, str]:
    """The same grid in another type, with values that are odd for it."""
    import nibabel as nib

    name = some(rng, ["f4", "f8", "u1", "i4", "u8", "i2", "c8", "u2"])
    dtype = np.dtype(f"<{name}")
    header = nib.Nifti1Header(raw[:348], check=False)
    header.set_data_dtype(dtype)
    values = some(
        rng, [[0.0], [1.0], [np.nan], [np.inf, 1.0], [3e38, -3e38], [1e300, 0.0], [2.5, 300.0], [-1.0, 0.0]]
    )
    with np.errstate(all="ignore"):
        voxels = np.resize(np.array(values, np.float64), int(np.prod(SHAPE))).astype(dtype)
    return header.binaryblock + bytes(4) + voxels.tobytes(), f"{name} {values}"


def _odd_gzip(rng: Random, raw: bytes) -> tuple[bytes, str]:
    whole = gzip.compress(raw, 1, mtime=0)
    half = len(raw) // 2
    zeros = gzip.compress(bytes(1 << 20), 9, mtime=0)
    big = bytearray(raw[:352])
    big[40:56] = np.array([3, 1024, 1024, 1024, 1, 1, 1, 1], "<i2").tobytes()
    claim = gzip.compress(bytes(big), 1, mtime=0)
    ways = {
        "junk behind": lambda: whole + rng.bytes(100),
        "zeros behind": lambda: whole + bytes(100),
        "no trailer": lambda: whole[:-8],
        "half a trailer": lambda: whole[:-4],
        "wrong checksum": lambda: whole[:-8] + b"\1\2\3\4" + whole[-4:],
        "wrong length": lambda: whole[:-4] + b"\xff\xff\xff\xff",
        "two members": lambda: gzip.compress(raw[:half], 1) + gzip.compress(raw[half:], 1),
        "a member too many": lambda: whole + whole,
        "bomb behind": lambda: whole + zeros * 64,
        "bomb": lambda: claim + zeros * 2048,
        "torn bomb": lambda: claim + zeros,
        "gzip in gzip": lambda: gzip.compress(whole),
        "bad member behind": lambda: whole + whole[:20],
        "no method": lambda: whole[:2] + b"\7" + whole[3:],
        "flags": lambda: whole[:3] + bytes([int(rng.integers(256))]) + whole[4:],
        "magic alone": lambda: whole[:2],
    }
    name = some(rng, list(ways))
    return ways[name](), name


def _reach_scans(folder: Path) -> Iterator[str]:
    """data import and data check of a folder, and what comes after: the table, and crops of what is in it."""
    from logonet.data import cropping, importers, manifest, validate

    sources = importers.sources(str(folder))
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    problems = validate.problems([validate.check(s) for s in sources])
    validate.table(problems, len(sources))
    table.describe()
    again = manifest.Manifest.from_parquet(table.scans_parquet(), table.quarantine_parquet())
    assert again.id == table.id
    table.quarantine_csv()
    yield from (q.reason for q in table.quarantined)
    yield from (p.sentence for p in problems)
    own = ("duplicate", "subject")  # between cases, or what import has no part in
    wrong = {p.uri for p in problems if p.severity == validate.ERROR and p.check not in own}
    wrong = {uri.encode(errors="backslashreplace").decode() for uri in wrong}
    refused = {q.uri for q in table.quarantined if "duplicate of" not in q.reason}
    assert refused <= wrong, f"import refuses {refused - wrong}, which data check lets pass"
    for scan in table.scans:
        try:
            volume_ = manifest.load(scan)
            cropping.crops_of(
                volume_, scan.modality, cropping.Config(size_vox=(8, 8, 8), per_scan=1), scan.scan_id
            )
            if scan.label_uri:
                manifest.load_label(scan, volume_)
        except errors.BadScan as err:
            yield str(err)


# ----------------------------------------------------------------------------------------------- DICOM


def _make_series(folder: Path) -> None:
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    (folder / "series").mkdir()
    rng = seeding.rng(0, "series")
    for k in range(4):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, f"1.2.3.{k + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.3.{k + 1}"
        ds.PatientName, ds.PatientID = "Secret^Name", "secret-id"
        ds.Modality, ds.SeriesInstanceUID, ds.InstanceNumber = "CT", "1.2.3", k + 1
        ds.Rows, ds.Columns, ds.PixelSpacing, ds.SliceThickness = 6, 5, [0.8, 0.7], 2.5
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * k]
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = rng.integers(0, 4000, (6, 5)).astype(np.uint16).tobytes()
        ds.save_as(folder / "series" / f"{k}.dcm", enforce_file_format=True)


ODD_TAGS: dict[str, tuple[Any, ...]] = {
    "InstanceNumber": (1, -1),
    "SeriesInstanceUID": ("9.9.9", "", "not a uid"),
    "Modality": ("MR", "", "PT", "SEG", "x" * 16),
    "Rows": (0, 1, 7, 65535),
    "Columns": (0, 1, 7, 65535),
    "PixelSpacing": ([0, 0], [-1, 1], [1e-9, 1], [1e30, 1e30], [1], [1, 1, 1], None, ""),
    "ImageOrientationPatient": ([0] * 6, [1, 0, 0, 1, 0, 0], [1e30] * 6, [1, 0, 0], [0, 1, 0, 1, 0, 0], None),
    "ImagePositionPatient": ([0, 0, 0], [0, 0, 1e30], [0, 0], [0, 0, 2.5], [9, 9, 9], None),
    "RescaleSlope": (0, 1e30, -1, None, ""),
    "RescaleIntercept": (1e38, -1e38, None),
    "NumberOfFrames": (0, 1, 2, 2**31 - 1, None),
    "SamplesPerPixel": (0, 3, 65535),
    "PhotometricInterpretation": ("RGB", "MONOCHROME1", "PALETTE COLOR", "YBR_FULL", "", None),
    "BitsAllocated": (0, 1, 8, 12, 32, 64, 65535),
    "BitsStored": (0, 1, 16, 17, 65535),
    "HighBit": (0, 15, 65535),
    "PixelRepresentation": (1, 2, 65535),
    "PlanarConfiguration": (1, 7),
    "PixelData": (b"", b"\0" * 59, b"\0" * 61, b"\0" * 600),
    "ExtendedOffsetTable": (b"\xff" * 8,),
    "FloatPixelData": (b"\0" * 120,),
    "SpecificCharacterSet": ("ISO_IR 999", "\\", "ISO 2022 IR 87"),
}
SYNTAXES = (
    "1.2.840.10008.1.2",  # implicit little endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.2",  # big endian
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.90",  # JPEG 2000
    "1.2.840.10008.1.2.4.80",  # JPEG-LS
    "1.2.840.10008.1.2.4.201",  # HTJ2K
    "1.2.840.10008.1.2.4.100",  # MPEG2
    "1.2.3",
    "",
)


def _damage_series(rng: Random, folder: Path) -> str:
    import pydicom

    paths = sorted((folder / "series").iterdir())
    how = some(rng, ["tags", "tags", "tags", "bytes", "bytes", "files", "syntax", "deflated"])
    path = some(rng, paths)
    if how == "bytes":
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif how == "files":
        way = int(rng.integers(5))
        if way == 0:
            path.unlink()
        elif way == 1:
            shutil.copy(path, path.with_name("again.dcm"))
        elif way == 2:
            path.write_bytes(some(rng, paths).read_bytes())
        elif way == 3:
            path.with_name("text.dcm").write_bytes(b"hello")
        else:
            path.with_name("empty.dcm").write_bytes(b"")
    elif how == "syntax":
        uid = some(rng, SYNTAXES)
        raw = path.read_bytes()
        at = raw.index(b"1.2.840.10008.1.2.1")
        text = uid.encode().ljust(len(uid) + len(uid) % 2, b"\0")
        raw = raw[: at - 2] + len(text).to_bytes(2, "little") + text + raw[at + 20 :]
        path.write_bytes(raw)
        how += f" {uid}"
    elif how == "deflated":
        _deflate(path, int(some(rng, [0, 1, 64, 600])) << 20)
    else:
        every = rng.random() < 0.5
        tags = [
            some(rng, [*ODD_TAGS, "Rows", "Columns", "BitsAllocated"]) for _ in range(int(rng.integers(1, 4)))
        ]
        values = [some(rng, [*ODD_TAGS[tag], KeyError]) for tag in tags]
        for changed in paths if every else [path]:
            ds = pydicom.dcmread(changed)
            for tag, value in zip(tags, values):
                if value is KeyError:
                    ds.pop(tag, None)
                else:
                    _set(ds, tag, value)
            out = io.BytesIO()
            try:
                ds.save_as(out)
            except Exception:  # pydicom writes no value of this kind; blind bytes instead
                out = io.BytesIO(damaged(rng, changed.read_bytes()))
            changed.write_bytes(out.getvalue())
        how += f" {tags} {values} in {'all' if every else 'one'}"
    return how


def _set(ds: Any, tag: str, value: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            setattr(ds, tag, value)
        except (ValueError, TypeError, OverflowError):
            ds.pop(tag, None)


def _deflate(path: Path, zeros: int) -> None:
    """The slice in the deflated transfer syntax, with ``zeros`` bytes of padding that compress away."""
    import zlib

    raw = path.read_bytes()
    old = b"1.2.840.10008.1.2.1\0"
    at = raw.index(old)
    # group length at byte 140 counts what lies behind it
    length = int.from_bytes(raw[140:144], "little")
    body = raw[144 + length :]
    meta = raw[144 : 144 + length].replace(
        len(old).to_bytes(2, "little") + old, (22).to_bytes(2, "little") + b"1.2.840.10008.1.2.1.99"
    )
    assert at
    pack = zlib.compressobj(1, zlib.DEFLATED, -15)
    padding = b"\xfc\xff\xfc\xffOB\0\0" + zeros.to_bytes(4, "little")
    body = pack.compress(body + (padding if zeros else b"")) + pack.flush(zlib.Z_FULL_FLUSH)
    # after a full flush nothing refers back, so one MiB of zeros may be written many times
    body += (pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)) * (zeros >> 20)
    path.write_bytes(raw[:140] + len(meta).to_bytes(4, "little") + meta + body + pack.flush())


# ------------------------------------------------------------------------------------------- data sets


def _make_decathlon(folder: Path) -> None:
    _make_scans(folder, (0, 1))
    items = [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in (0, 1)]
    items[1]["fold"] = 1  # type: ignore[assignment]
    description = {
        "name": "Fuzz",
        "licence": "CC0",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "spleen"},
        "numTraining": 2,
        "training": items,
        "validation": [],
        "test": ["./imagesTr/case_1.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def _make_nnunet(folder: Path) -> None:
    _make_scans(folder, (0, 1))
    for i in (0, 1):
        (folder / "imagesTr" / f"case_{i}.nii.gz").rename(folder / "imagesTr" / f"case_{i}_0000.nii.gz")
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    splits = [{"train": ["case_0"], "val": ["case_1"]}, {"train": ["case_1"], "val": ["case_0"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))


def _damage_json_in(*names: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        path = folder / some(rng, names)
        change = damaged if rng.random() < 0.25 else damaged_json
        path.write_bytes(change(rng, path.read_bytes()))
        return f"{path.name} by {change.__name__}"

    return damage


def _reach_list(folder: Path) -> Iterator[str]:
    """data import of the dataset.json itself, and split it."""
    from logonet.data import importers, manifest, splits
    from logonet.pipelines import preparation

    sources = importers.sources(f"{folder}/dataset.json")
    yield from _inspected(sources, manifest)
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    if table.scans:
        preparation.label_classes([s for s in table.scans if s.label_uri])
        splits.make(table.scans, splits.Config(folds=2, fold=None))


def _inspected(sources: Sequence[Any], manifest: Any) -> Iterator[str]:
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    table.describe()
    manifest.Manifest.from_parquet(table.scans_parquet(), table.quarantine_parquet())
    table.quarantine_csv()
    yield from (q.reason for q in table.quarantined)


def _make_table(folder: Path) -> None:
    _make_scans(folder, (0, 1))
    lines = ["image,label,subject,dataset,licence,modality,split,fold,sha256"]
    for i, split in enumerate(("train", "test")):
        path = f"imagesTr/case_{i}.nii.gz"
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        lines.append(f"{path},labelsTr/case_{i}.nii.gz,s{i},Fuzz,CC0,CT,{split},{i},{digest}")
    (folder / "scans.csv").write_text("\n".join([*lines, ""]))


def _damage_text_in(*names: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        path = folder / some(rng, names)
        change = damaged if rng.random() < 0.25 else damaged_text
        path.write_bytes(change(rng, path.read_bytes()))
        return f"{path.name} by {change.__name__}"

    return damage


def _reach_table(folder: Path) -> Iterator[str]:
    from logonet.data import importers, manifest

    yield from _inspected(importers.sources(f"{folder}/scans.csv"), manifest)


def _make_bids(folder: Path) -> None:
    image, label = (gzip.compress(raw, 1, mtime=0) for raw in _phantom(0))
    for subject in ("sub-01", "sub-02"):
        (folder / subject / "anat").mkdir(parents=True)
        (folder / "derivatives" / subject / "anat").mkdir(parents=True)
        (folder / subject / "anat" / f"{subject}_T1w.nii.gz").write_bytes(image)
        (folder / "derivatives" / subject / "anat" / f"{subject}_dseg.nii.gz").write_bytes(label)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "Fuzz", "License": "CC0"}))
    (folder / "participants.tsv").write_text(
        "participant_id\tsplit\tfold\nsub-01\ttrain\t0\nsub-02\ttest\tn/a\n"
    )
    (folder / "dseg.tsv").write_text("index\tname\n0\tbackground\n1\tliver\n2\tspleen\n")


def _damage_bids(rng: Random, folder: Path) -> str:
    name = some(rng, ["dataset_description.json", "participants.tsv", "dseg.tsv"])
    if name.endswith(".json"):
        return _damage_json_in(name)(rng, folder)
    return _damage_text_in(name)(rng, folder)


def _damage_places(rng: Random, folder: Path) -> str:
    """What lies in a folder of scans: odd names, odd kinds of files, odd dataset.json files."""
    raw = (folder / "imagesTr" / "case_0.nii.gz").read_bytes()
    told = []
    for _ in range(int(rng.integers(1, 4))):
        way = some(rng, list(_PLACES))
        told.append(way)
        _PLACES[way](rng, folder, raw)
    return ", ".join(told)


def _named(name: bytes) -> Callable[[Random, Path, bytes], None]:
    def put(rng: Random, folder: Path, raw: bytes) -> None:
        with open(os.path.join(os.fsencode(folder), name), "wb") as out:
            out.write(raw + b"\0" * int(rng.integers(1, 9)))

    return put


def _linked(name: str, target: str) -> Callable[[Random, Path, bytes], None]:
    def put(rng: Random, folder: Path, raw: bytes) -> None:
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)

    return put


def _fifo(name: str) -> Callable[[Random, Path, bytes], None]:
    return lambda rng, folder, raw: None if (folder / name).exists() else os.mkfifo(folder / name)


def _described(rng: Random, folder: Path, raw: bytes) -> None:
    (folder / "deep").mkdir(exist_ok=True)
    (folder / "deep" / "dataset.json").write_bytes(
        some(
            rng,
            [b"{}", b"[]", b"", b"\xff\xfe", b'{"training": 3}', b'{"training": [{"image": ["a", "b"]}]}'],
        )
    )


_PLACES: dict[str, Callable[[Random, Path, bytes], None]] = {
    "latin-1": _named(b"caf\xe9.nii.gz"),
    "newline": _named(b"a\nb.nii.gz"),
    "markup": _named(b"[red]x[bold].nii.gz"),
    "suffix alone": _named(b".nii.gz"),
    "suffix with a letter": _named(b"x.NII.GZ"),
    "long": _named(b"x" * 240 + b".nii.gz"),
    "escape": _named(b"\x1b[31mx.nii"),
    "spaces": _named(b"  a  b  .nii.gz"),
    "dicom": _named(b"x.dcm"),
    "label of none": _named(b"y_seg.nii.gz"),
    "fifo": _fifo("pipe.nii.gz"),
    "fifo dataset.json": _fifo("dataset.json"),
    "loop": _linked("loop", "."),
    "second loop": _linked("loop2", "."),
    "dangling": _linked("gone.nii.gz", "nowhere.nii.gz"),
    "device": _linked("zero.nii", "/dev/zero"),
    "own link": _linked("self.nii", "self.nii"),
    "folder": lambda rng, folder, raw: (folder / "folder.nii.gz").mkdir(exist_ok=True),
    "dataset.json": _described,
    "empty": lambda rng, folder, raw: (folder / "empty.nii").write_bytes(b""),
}


# -------------------------------------------------------------------------------------------- settings


def _make_config(folder: Path) -> None:
    from logonet import recipes
    from logonet.core import config

    (folder / "mine.yaml").write_text(config.to_yaml(recipes.demo()))


def _damage_config(rng: Random, folder: Path) -> str:
    """Half of them well-formed: one value is another, so that what checks values is reached and not the parser."""
    if rng.random() < 0.5:
        return _damage_text_in("mine.yaml")(rng, folder)
    from logonet.core import config

    path = folder / "mine.yaml"
    values = config.read_yaml(path.read_text(), "mine.yaml")
    path.write_bytes(damaged_json(rng, json.dumps(values).encode(), times=1))
    return "mine.yaml by one value"


def _reach_config(folder: Path) -> Iterator[str]:
    from logonet import cli, pipelines, recipes
    from logonet.core import config

    cfg = cli.job_config(cli.JobArgs(recipe="demo", config=f"{folder}/mine.yaml"), recipes.PRETRAINING)
    config.fingerprint(pipelines.resolve(cfg))
    yield from ()


def _make_settings(folder: Path) -> None:
    settings = ["train.lr=1e-3", "method.phi1=0.2", "crops.size_vox=[32, 32, 32]", "backbone.full_width=8"]
    (folder / "settings").write_text("\n".join(settings))


def _reach_settings(folder: Path) -> Iterator[str]:
    from logonet import cli, pipelines, recipes
    from logonet.core import config

    text = (folder / "settings").read_bytes().decode("utf-8", "surrogateescape")
    settings = text.split("\n")
    for each in settings:
        try:
            cfg = cli.job_config(cli.JobArgs(recipe="demo", set=(each,)), recipes.PRETRAINING)
            config.fingerprint(pipelines.resolve(cfg))
        except UserError as err:
            yield str(err)
    cli.job_config(cli.JobArgs(recipe="demo", set=tuple(settings)), recipes.PRETRAINING)


def _make_space(folder: Path) -> None:
    lines = ["search:", "  method.chain_length: {grid: [3, 5, 7]}", "  method.phi1: {uniform: [0.1, 0.3]}"]
    lines += ["  train.lr: {loguniform: [3.0e-5, 1.0e-3]}", "  clusterers.n: {int: [2, 4]}", "first:"]
    lines += ["  - {method.chain_length: 5, method.phi1: 0.1}", ""]
    (folder / "space.yaml").write_text("\n".join(lines))


def _reach_space(folder: Path) -> Iterator[str]:
    from logonet.core import config
    from logonet.storage import object_store
    from logonet.sweep import space

    uri = f"{folder}/space.yaml"
    config.fingerprint(space.read(object_store.read(uri).decode("utf-8", "replace"), uri).to_dict())
    yield from ()


# ----------------------------------------------------------------------------------------- safetensors


def damaged_tensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header, or blind damage."""
    way = int(rng.integers(5))
    if way == 0:
        return damaged(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if way == 1:
        length = int(some(rng, [0, 1, 7, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1]))
        return length.to_bytes(8, "little") + header + body
    if way == 2:
        header = damaged_json(rng, header)
    elif way == 3:
        header = _odd_entries(rng, header, len(body))
    else:
        body = some(rng, [body[:-1], body + b"\0", b"", body * 2, _flip(rng, body)])
    return len(header).to_bytes(8, "little") + header + body


def _odd_entries(rng: Random, header: bytes, size: int) -> bytes:
    fields = json.loads(header)
    names = [n for n in fields if n != "__metadata__"]
    name, other = some(rng, names), some(rng, names)
    entry = fields[name]
    way = int(rng.integers(7))
    if way == 0:
        entry["data_offsets"] = fields[other]["data_offsets"]
    elif way == 1:
        entry["data_offsets"] = some(
            rng, [[0, size], [size, 0], [-1, 4], [0, 2**63], [0, 0], [0], [0, 1, 2], None]
        )
    elif way == 2:
        entry["shape"] = some(
            rng,
            [
                [],
                [0],
                [2**31, 2**31],
                [-1],
                [10**6, 10**6],
                entry["shape"][::-1],
                [1, *entry["shape"]],
                [10**30],
            ],
        )
    elif way == 3:
        entry["dtype"] = some(
            rng, ["F32", "F64", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "C64", "U16", "F4", "?", None]
        )
    elif way == 4:
        fields["x" * 100] = entry
    elif way == 5:
        del fields[name]
    else:
        fields[name] = some(rng, [None, [], {}, 3, "x"])
    return json.dumps(fields).encode()


def _damage_tensors_in(*names: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        path = folder / some(rng, names)
        path.write_bytes(damaged_tensors(rng, path.read_bytes()))
        return path.name

    return damage


def _net() -> Any:
    from logonet import networks
    from logonet.networks import unet

    return networks.build("unet", 1, 3, **unet.TINY)


def _make_weights(folder: Path) -> None:
    from safetensors.torch import save

    (folder / "given.safetensors").write_bytes(
        save({n: t.contiguous() for n, t in _net().state_dict().items()})
    )


def _reach_weights(folder: Path) -> Iterator[str]:
    """finetune --init x.safetensors: as found, copied, loaded and laid into a network."""
    from logonet import training
    from logonet.pipelines import finetuning
    from logonet.training import weight_transfer

    source = f"{folder}/given.safetensors"
    found = finetuning.find_weights(source, f"{folder}/root")
    assert found is not None
    weight_transfer.transfer(
        _net(), training.load_weights(training.Init(found.uri, found.sha256)), source=source
    )
    yield from ()


def _make_model(folder: Path) -> None:
    from logonet.inference import model
    from logonet.networks import unet

    spec = model.Spec(
        backbone={"name": "unet", **unet.TINY},
        in_channels=1,
        classes=("background", "liver", "spleen"),
        label_values=(0, 1, 2),
        size_vox=(16, 16, 16),
        spacing_mm=(1.5, 1.5, 2.0),
        window_hu=(-1000.0, 1000.0),
        mr_percentiles=(0.5, 99.5),
        modality="CT",
    )
    for name, blob in model.files(spec, _net().state_dict()).items():
        (folder / name).write_bytes(blob)


def _damage_model(rng: Random, folder: Path) -> str:
    if rng.random() < 0.6:
        return _damage_json_in("config.json")(rng, folder)
    return _damage_tensors_in("weights.safetensors")(rng, folder)


def _reach_model(folder: Path) -> Iterator[str]:
    from logonet.inference import model

    spec, weights = model.read(str(folder))
    model.build(spec, weights)
    yield from ()


# ------------------------------------------------------------------------------------------- artifacts


def sealed(folder: Path) -> None:
    """Make manifest.json true again of whatever the files now are: damage that no checksum shows."""
    from logonet.storage import artifacts

    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    content.pop("checksum", None)
    if isinstance(content.get("files"), dict):
        for name in content["files"]:
            file = folder / name if name.isprintable() and len(name) < 200 else folder / "none"
            if file.is_file() and isinstance(content["files"][name], dict):
                data = file.read_bytes()
                content["files"][name] |= {
                    "size_bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
    try:
        content["checksum"] = artifacts._checksum(content)
    except (ValueError, RecursionError):
        return
    path.write_text(json.dumps(content))


def _commit(folder: Path, stage: str, config: Any, files: dict[str, bytes], facts: Any) -> None:
    from logonet.storage import artifacts, object_store

    stored = {name: object_store.write(f"{folder}/{name}", blob) for name, blob in files.items()}
    artifacts.commit(str(folder), stage, "0" * 16, config=config, parents={}, files=stored, facts=facts)


def _damage_manifest(rng: Random, folder: Path) -> str:
    path = folder / "manifest.json"
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return "bytes"
    path.write_bytes(damaged_json(rng, path.read_bytes()))
    if rng.random() < 0.8:
        sealed(folder)
        return "values, sealed"
    return "values"


def _damage_artifact(*names: str) -> Callable[[Random, Path], str]:
    """Damage to one of an artifact's files or its manifest; sealed or not."""

    def damage(rng: Random, folder: Path) -> str:
        name = some(rng, ["manifest.json", *names])
        if name == "manifest.json":
            return f"manifest.json: {_damage_manifest(rng, folder)}"
        path = folder / name
        if name.endswith(".safetensors"):
            path.write_bytes(damaged_tensors(rng, path.read_bytes()))
        elif name.endswith(".json"):
            path.write_bytes(damaged_json(rng, path.read_bytes()))
        else:
            path.write_bytes(damaged(rng, path.read_bytes()))
        if rng.random() < 0.5:
            sealed(folder)
            name += ", sealed"
        return name

    return damage


def _make_imported(folder: Path) -> None:
    from logonet.data import importers, manifest

    (folder / "data").mkdir()
    _make_decathlon(folder / "data")
    sources = importers.sources(f"{folder}/data/dataset.json")
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    files = {"scans.parquet": table.scans_parquet(), "quarantine.parquet": table.quarantine_parquet()}
    _commit(folder, "manifest", {"source": "x"}, files, {"id": table.id})


def _reach_imported(folder: Path) -> Iterator[str]:
    """data leakcheck of a manifest."""
    from logonet import pipelines
    from logonet.data import leakage

    table = pipelines.open_manifest(str(folder))
    leakage.table(leakage.find(table.scans, table.scans))
    table.describe()
    yield from ()


def _make_crops(folder: Path) -> None:
    from logonet.data import crop_shards

    rng = seeding.rng(0, "crops")
    crops_RCXYZ = rng.integers(0, 65535, (3, 1, 4, 4, 4)).astype(np.uint16)
    blob = crop_shards.shard_bytes("scan-1", crops_RCXYZ)
    (folder / "shards").mkdir()
    (folder / "shards" / "scan-1.safetensors").write_bytes(blob)
    refs = crop_shards.shard_index(
        f"{folder}/shards/scan-1.safetensors", "shards/scan-1.safetensors", len(blob)
    )
    table = crop_shards.CropTable(str(folder), (4, 4, 4), 1, tuple(refs))
    _commit(
        folder,
        "crops",
        {"size_vox": [4, 4, 4]},
        {"crops.parquet": table.to_parquet()},
        {"crops": 3, "in_channels": 1},
    )


def _damage_crops(rng: Random, folder: Path) -> str:
    if rng.random() < 0.5:
        return _damage_tensors_in("shards/scan-1.safetensors")(rng, folder)
    return _damage_artifact("crops.parquet")(rng, folder)


def _reach_crops(folder: Path) -> Iterator[str]:
    """What a run does with the crops that it finds: those of a killed run's shard, and those of a finished artifact."""
    from logonet.data import crop_shards
    from logonet.storage import artifacts

    path = folder / "shards" / "scan-1.safetensors"
    crop_shards.shard_index(str(path), "shards/scan-1.safetensors", path.stat().st_size)
    found = artifacts.find(str(folder))
    if found is None:
        return
    table = crop_shards.CropTable.open(found)
    for i in range(len(table)):
        try:
            table.read(i)
        except UserError as err:
            yield str(err)


def _make_case(folder: Path) -> None:
    from logonet.data import prepared_scans

    image, label = _phantom(0)
    from logonet.data import manifest, volume

    scan = volume.decode_nifti(image, "x.nii")
    labels_XYZ = manifest._decode_label(label, "y.nii", scan)
    prepared = prepared_scans.prepare(scan, labels_XYZ, "CT", (0, 1, 2), prepared_scans.Config(), "scan-1")
    blob = prepared_scans.to_bytes("scan-1", *prepared, 0)
    (folder / "cases").mkdir()
    (folder / "cases" / "scan-1.safetensors").write_bytes(blob)
    ref = prepared_scans.ref_of("cases/scan-1.safetensors", blob)
    table = prepared_scans.Table((ref,), ("background", "liver", "spleen"), (0, 1, 2))
    _commit(folder, "cases", {}, {"cases.json": json.dumps(table.to_json()).encode()}, {"cases": 1})


def _damage_case(rng: Random, folder: Path) -> str:
    if rng.random() < 0.5:
        return _damage_tensors_in("cases/scan-1.safetensors")(rng, folder)
    return _damage_artifact("cases.json")(rng, folder)


def _reach_case(folder: Path) -> Iterator[str]:
    from logonet.core import config
    from logonet.data import prepared_scans
    from logonet.storage import artifacts

    path = folder / "cases" / "scan-1.safetensors"
    prepared_scans._header.cache_clear()
    prepared_scans._tensor.cache_clear()
    cfg = prepared_scans.CropSampling(size_vox=(8, 8, 8))
    refs = []
    if (stored := prepared_scans.stored(str(path), path.stat().st_size)) is not None:
        refs.append(stored)
    if (found := artifacts.find(str(folder))) is not None:
        table = prepared_scans.Table.from_json(config.parse_json(found.read("cases.json")))
        refs += [replace(ref, uri=str(path)) for ref in table.refs]
    for ref in refs:
        try:
            for start in prepared_scans.draw_corners(ref, cfg, seeding.rng(0, "starts")):
                prepared_scans.read_crop(ref, start, cfg.size_vox)
            prepared_scans.read_case(ref)
        except UserError as err:
            yield str(err)


def _make_fits(folder: Path) -> None:
    from logonet.clustering import kmeans

    rng = seeding.rng(0, "fits")
    fits = [kmeans.Fitted(i, rng.random((3 + i, 16), np.float32), 0.5) for i in range(2)]
    (folder / "fit.safetensors").write_bytes(fits[0].to_bytes())
    whole = kmeans.ClustererSet.from_fitted(fits, {"config": {}})
    (folder / "set.safetensors").write_bytes(whole.to_bytes())


def _reach_fits(folder: Path) -> Iterator[str]:
    from logonet.clustering import fitting, kmeans
    from logonet.clustering.pseudo_labels import Labeller
    from logonet.storage import object_store

    fitting._stored_fit(f"{folder}/fit.safetensors")
    uri = f"{folder}/set.safetensors"
    fitted = kmeans.ClustererSet.from_bytes(object_store.read(uri), uri)
    Labeller(fitted)(seeding.rng(0, "slices").random((4, 16), np.float32))
    fitted.summary()
    yield from ()


def _make_run(folder: Path) -> None:
    import torch

    from logonet.training import checkpoints

    for step in (1, 2):
        weight = torch.full((2, 3), float(step))
        state = checkpoints.State(
            step,
            {"backbone.w": weight},
            {"exp_avg/w": weight},
            [{"loss": torch.ones(2)}],
            [{"step": step}],
            1,
        )
        checkpoints.save_state(f"{folder}/checkpoints/step-{step:08d}", "f" * 16, state)


def _damage_run(rng: Random, folder: Path) -> str:
    told = []
    for step in (2, 1):
        own = folder / "checkpoints" / f"step-{step:08d}"
        names = [f"{group}.safetensors" for group in ("model", "optimizer", "partial")]
        told.append(f"step {step}: {_damage_artifact(*names)(rng, own)}")
        if rng.random() < 0.7:
            break
    return "; ".join(told)


def _reach_run(folder: Path) -> Iterator[str]:
    from logonet.training import checkpoints

    found = checkpoints.newest(str(folder), "f" * 16)
    if found is not None:
        found.describe()
        sum(float(t.sum()) for t in found.tensors() if t.is_floating_point())
    yield from ()


def _make_split(folder: Path) -> None:
    from logonet.data import splits

    cases = {f"scan-{i}": splits.Case(f"d/s{i}", f"{i}" * 64, f"{i}" * 64) for i in range(4)}
    split = splits.Split(("scan-0", "scan-1"), ("scan-2",), ("scan-3",), cases=cases)
    (folder / "split.json").write_text(split.to_json())


def _damage_split(rng: Random, folder: Path) -> str:
    told = _damage_json_in("split.json")(rng, folder)
    path = folder / "split.json"
    if rng.random() < 0.5:  # with the id that what is now there would have
        from logonet.data import splits

        try:
            values = json.loads(path.read_bytes())
            cases = {i: splits.Case(**row) for i, row in values["cases"].items()}
            own = splits.Split(
                **{k: tuple(v) for k, v in values.items() if k not in ("id", "cases")}, cases=cases
            )
            values["id"] = own.id
            path.write_text(json.dumps(values))
            told += ", sealed"
        except Exception:  # beyond sealing: stays as it is
            pass
    return told


def _reach_split(folder: Path) -> Iterator[str]:
    from logonet.data import splits
    from logonet.storage import object_store

    uri = f"{folder}/split.json"
    splits.Split.from_json(object_store.read(uri), uri).describe()
    yield from ()


def _make_trials(folder: Path) -> None:
    from logonet.sweep import records

    for i in range(2):
        history = [{"epoch": 1, "objective": 0.5, "loss": 1.0}]
        records.write(
            str(folder), records.Trial(i, {"train.lr": 0.1}, "done", history=history, final={"dice": 0.5})
        )
    (folder / "state.json").write_text(json.dumps({"spent_s": 1.0, "shared": {}}))


def _damage_trials(rng: Random, folder: Path) -> str:
    from logonet.core import config

    name = some(rng, ["trials/0000.json", "trials/0001.json", "state.json"])
    told = _damage_json_in(name)(rng, folder)
    if rng.random() < 0.6:
        try:
            values = json.loads((folder / name).read_bytes())
            values.pop("checksum", None)
            (folder / name).write_text(json.dumps(values | {"checksum": config.fingerprint(values)}))
            told += ", sealed"
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    return told


def _reach_trials(folder: Path) -> Iterator[str]:
    from logonet.sweep import records

    trials = records.read_all(str(folder))
    records.table(trials, ["train.lr"]).to_csv()
    float(records.state(str(folder)).get("spent_s", 0.0))
    yield from ()


def _make_tables(folder: Path) -> None:
    import pandas as pd

    from logonet.data import importers, manifest, provenance
    from logonet.inference import metrics

    _make_decathlon(folder)
    sources = importers.sources(f"{folder}/dataset.json")
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    (folder / "seen.parquet").write_bytes(provenance.to_bytes(table.scans, "training"))
    rows = []
    for i in range(4):
        truth_XYZ = np.zeros((6, 6, 6), np.uint8)
        truth_XYZ[1:3, 1:4, 1:4], truth_XYZ[4:, 4:, 3:] = 1, 2
        pred_XYZ = np.roll(truth_XYZ, i % 2, axis=0)
        rows += metrics.case_rows(
            pred_XYZ, truth_XYZ, (1.0, 1.0, 2.0), {1: "liver", 2: "spleen"}, f"scan-{i}"
        )
    (folder / "cases.csv").write_text(pd.DataFrame(rows).to_csv(index=False))


def _damage_bytes_in(name: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        (folder / name).write_bytes(damaged(rng, (folder / name).read_bytes()))
        return name

    return damage


def _reach_seen(folder: Path) -> Iterator[str]:
    """The leak check of an evaluation against what a registered model has seen."""
    from logonet.data import leakage, provenance
    from logonet.storage import object_store

    table = object_store.read(f"{folder}/seen.parquet")
    leakage.table(leakage.find(provenance.from_bytes(table), provenance.from_bytes(provenance.join(table))))
    yield from ()


def _reach_scores(folder: Path) -> Iterator[str]:
    """logonet compare of two cases.csv."""
    from logonet import pipelines
    from logonet.inference import statistics

    uri = f"{folder}/cases.csv"
    statistics.compare(pipelines.scores_of(uri), pipelines.scores_of(uri))
    yield from ()


TARGETS: dict[str, Target] = {
    "nifti": Target(_make_scans, _damage_scan, _reach_scans, ("case_0", "imagesTr")),
    "dicom": Target(_make_series, _damage_series, _reach_scans, (".dcm", "series")),
    "decathlon": Target(
        _make_decathlon,
        _damage_json_in("dataset.json"),
        _reach_list,
        (".json", "decathlon", "label", "/etc/passwd"),
    ),
    "nnunet": Target(
        _make_nnunet,
        _damage_json_in("dataset.json", "splits_final.json"),
        _reach_list,
        (".json", "nnunet", "label"),
    ),
    "csv": Target(_make_table, _damage_text_in("scans.csv"), _reach_table, ("scans.csv", "csv")),
    "bids": Target(_make_bids, _damage_bids, _reach_scans, ("sub-0", ".tsv", ".json")),
    "places": Target(_make_scans, _damage_places, _reach_scans, ("places",)),
    "config": Target(_make_config, _damage_config, _reach_config, ()),
    "settings": Target(_make_settings, _damage_text_in("settings"), _reach_settings, ()),
    "space": Target(_make_space, _damage_text_in("space.yaml"), _reach_space, ("space.yaml",)),
    "weights": Target(
        _make_weights, _damage_tensors_in("given.safetensors"), _reach_weights, (".safetensors",)
    ),
    "model": Target(_make_model, _damage_model, _reach_model, ()),
    "manifest": Target(
        _make_imported,
        _damage_artifact("scans.parquet", "quarantine.parquet"),
        _reach_imported,
        ("manifest",),
    ),
    "crops": Target(_make_crops, _damage_crops, _reach_crops, ("crops", "shards")),
    "cases": Target(_make_case, _damage_case, _reach_case, ("cases",)),
    "clusterers": Target(
        _make_fits,
        _damage_tensors_in("fit.safetensors", "set.safetensors"),
        _reach_fits,
        (".safetensors", "clusterer"),
    ),
    "checkpoint": Target(_make_run, _damage_run, _reach_run, ("step-", "checkpoint")),
    "split": Target(_make_split, _damage_split, _reach_split, ("split.json",)),
    "seen": Target(_make_tables, _damage_bytes_in("seen.parquet"), _reach_seen, ("seen",)),
    "scores": Target(_make_tables, _damage_text_in("cases.csv"), _reach_scores, ("cases.csv", "scan")),
    "trials": Target(_make_trials, _damage_trials, _reach_trials, ("trials", "state.json")),
}


# -------------------------------------------------------------------------------------------- the child


class Hang(BaseException):
    """The alarm: nothing that catches Exception may swallow it."""


def attempt(name: str, number: int, template: Path, folder: Path) -> dict[str, Any]:
    """One mutation: what was done, and what it came to. ``fault`` is "" where that is allowed."""
    target = TARGETS[name]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    done = target.damage(seeding.rng(number, "fuzz", name), folder) if number >= 0 else "nothing"
    _forget_peak()
    before_mb = _memory_mb("VmRSS")
    said: list[str] = []
    fault, end = "", "success"
    _set_alarm()
    try:
        for sentence in target.reach(folder):
            said.append(sentence)
        end = "quarantine" if said else end
    except UserError as err:
        said.append(str(err))
        end = "sentence"
    except Hang:
        fault = f"took more than {SECONDS} s of processor time, or {SECONDS * LOADED} s"
    except BaseException:
        fault = traceback.format_exc(limit=-12)[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown_mb = _memory_mb("VmHWM") - before_mb
    if not fault and grown_mb > PEAK_MB:
        fault = f"took {grown_mb} MB more than before"
    fault = fault or next(filter(None, (_not_a_sentence(s, target.names) for s in said)), "")
    return {"target": name, "number": number, "done": done, "end": end, "fault": fault, "grown_mb": grown_mb}


def _set_alarm() -> None:
    """Hang is raised after SECONDS of this process's own time; on a loaded machine these take longer."""
    started_s, spent_s = time.monotonic(), time.process_time()

    def alarm(*_: Any) -> None:
        if time.process_time() - spent_s > SECONDS or time.monotonic() - started_s > SECONDS * LOADED:
            raise Hang

    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)


def _not_a_sentence(said: str, names: tuple[str, ...]) -> str:
    """What is wrong with something that a user reads, or ""."""
    if len(said) > errors.LONGEST or not said.isprintable() or "Traceback" in said:
        return f"is not one short printable line: {said[:700]!r}"
    if names and not any(name in said for name in names):
        return f"names none of {names}: {said}"
    return ""


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory_mb(line: str) -> int:
    found = re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) >> 10


def _serve() -> None:
    """The child: lines of ``target number`` come in, a line of JSON goes out for each."""
    import logging
    import warnings

    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        for line in sys.stdin:
            name, number = line.split()
            template = Path(root, "valid", name)
            if not template.exists():
                _prepare(name, template, Path(root, "case", name))
                print("{}", file=answers, flush=True)
            answer = attempt(name, int(number), template, Path(root, "case", name))
            print(json.dumps(answer), file=answers, flush=True)


def _prepare(name: str, template: Path, folder: Path) -> None:
    """Valid files, which must pass: or nothing would be reached. Imports are paid for here, before the limit."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    template.mkdir(parents=True)
    folder.parent.mkdir(exist_ok=True)
    TARGETS[name].make(template)
    # At the place where mutations will be read, since manifests of real scans know where these lie.
    shutil.copytree(template, folder)
    for _ in TARGETS[name].reach(folder):  # imports what it needs: no time and memory of any file's
        pass
    valid = attempt(name, -1, template, folder)
    assert not valid["fault"] and valid["end"] != "sentence", f"valid {name}: {valid}"
    limit = (_memory_mb("VmSize") + ADDRESS_MB) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def attempts(wanted: Iterable[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """What every (target, number) came to. A child that dies or hangs is a fault of its mutation; the rest go on."""
    child, prepared = None, set[str]()
    try:
        for name, number in wanted:
            if child is None:
                child, prepared = _start(), set()
            assert child.stdin and child.stdout
            child.stdin.write(f"{name} {number}\n".encode())
            child.stdin.flush()
            line: bytes | None = b"{}"
            if name not in prepared:
                line = _line(child.stdout, IMPORT_S)
                prepared.add(name)
            line = line and _line(child.stdout, SECONDS * LOADED + GRACE_S)
            if line:
                yield json.loads(line)
                continue
            child.kill()
            why = "did not answer its alarm" if line is None else f"died, status {child.wait()}"
            child.wait()
            child = None
            yield {
                "target": name,
                "number": number,
                "done": "?",
                "end": "",
                "fault": f"the process {why}",
                "grown_mb": 0,
            }
    finally:
        if child is not None:
            child.kill()
            child.wait()


def _line(pipe: IO[bytes], seconds: float) -> bytes | None:
    """The next line; b"" at the end, None where none comes in time."""
    return pipe.readline() if select.select([pipe], [], [], seconds)[0] else None


def _start() -> subprocess.Popen[bytes]:
    here = Path(__file__).resolve()
    env = {
        **os.environ,
        "PYTHONPATH": str(here.parents[1]),
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "default",
    }
    return subprocess.Popen(
        [sys.executable, str(here), "--serve"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=env,
    )


def replay(fault: dict[str, Any]) -> str:
    """How to see a fault again."""
    return f"python tests/fuzzing.py {fault['target']} {fault['number']}  # {fault['done']}\n{fault['fault'].strip()}"


def same_faults(found: Sequence[dict[str, Any]]) -> list[str]:
    """The first of every kind of fault, with how many there are like it."""
    alike: dict[str, list[str]] = {}
    for answer in found:
        if answer["fault"]:
            last = answer["fault"].strip().splitlines()
            alike.setdefault(re.sub(r"\d+", "N", "".join(last[-3:])), []).append(replay(answer))
    return [f"--- {len(same)} times\n{same[0]}" for same in alike.values()]


def summary(found: Sequence[dict[str, Any]]) -> str:
    """One line for each target."""
    lines = []
    for name in dict.fromkeys(a["target"] for a in found):
        own = [a for a in found if a["target"] == name]
        ends = collections.Counter("FAULT" if a["fault"] else a["end"] for a in own)
        told = ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
        lines.append(
            f"{name:<11} {len(own):>5} mutations: {told}; at most {max(a['grown_mb'] for a in own)} MB more"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    elif len(sys.argv) == 4:  # targets first last: many, with what they came to
        for name in sys.argv[1].split(","):
            found = list(attempts((name, n) for n in range(int(sys.argv[2]), int(sys.argv[3]))))
            print(*same_faults(found), summary(found), sep="\n", flush=True)
    else:
        (fault,) = attempts([(sys.argv[1], int(sys.argv[2]))])
        print(json.dumps({k: v for k, v in fault.items() if k != "fault"}), fault["fault"], sep="\n")
