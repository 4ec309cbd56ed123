"""Scans and data sets for the fuzz tests: small valid ones, damage to them, and the commands that read them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_damage import SHAPE, Random, damaged, damaged_json, damaged_text, some

from logonet.core import errors, seeding

# -------------------------------------------------------------------------------------- NIfTI and gzip


def phantom_files(seed: int) -> tuple[bytes, bytes]:
    """A scan and its label map as .nii bytes."""
    from logonet.data import phantom, volume

    scan, labels_XYZ = phantom.phantom(seed, SHAPE, classes=3)
    image = volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    return gzip.decompress(image), gzip.decompress(volume.encode_nifti(labels_XYZ, scan.affine))


def make_scans(folder: Path, seeds: Sequence[int] = (0,)) -> None:
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir()
    for seed in seeds:
        for kind, raw in zip(("imagesTr", "labelsTr"), phantom_files(seed)):
            (folder / kind / f"case_{seed}.nii.gz").write_bytes(gzip.compress(raw, 1, mtime=0))


def damage_scan(rng: Random, folder: Path) -> str:
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


def reach_scans(folder: Path) -> Iterator[str]:
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


def make_series(folder: Path) -> None:
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


def damage_series(rng: Random, folder: Path) -> str:
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
        deflate(path, int(some(rng, [0, 1, 64, 600])) << 20)
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


def deflate(path: Path, zeros: int) -> None:
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


def make_decathlon(folder: Path) -> None:
    make_scans(folder, (0, 1))
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


def make_nnunet(folder: Path) -> None:
    make_scans(folder, (0, 1))
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


def damage_json_in(*names: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        path = folder / some(rng, names)
        change = damaged if rng.random() < 0.25 else damaged_json
        path.write_bytes(change(rng, path.read_bytes()))
        return f"{path.name} by {change.__name__}"

    return damage


def reach_list(folder: Path) -> Iterator[str]:
    """data import of the dataset.json itself, and split it."""
    from logonet.data import classes, importers, manifest, splits

    sources = importers.sources(f"{folder}/dataset.json")
    yield from _inspected(sources, manifest)
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    if table.scans:
        classes.union([s for s in table.scans if s.label_uri], classes.Config())
        splits.make(table.scans, splits.Config(folds=2, fold=None))


def _inspected(sources: Sequence[Any], manifest: Any) -> Iterator[str]:
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    table.describe()
    manifest.Manifest.from_parquet(table.scans_parquet(), table.quarantine_parquet())
    table.quarantine_csv()
    yield from (q.reason for q in table.quarantined)


def make_table(folder: Path) -> None:
    make_scans(folder, (0, 1))
    lines = ["image,label,subject,dataset,licence,modality,split,fold,sha256"]
    for i, split in enumerate(("train", "test")):
        path = f"imagesTr/case_{i}.nii.gz"
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        lines.append(f"{path},labelsTr/case_{i}.nii.gz,s{i},Fuzz,CC0,CT,{split},{i},{digest}")
    (folder / "scans.csv").write_text("\n".join([*lines, ""]))


def damage_text_in(*names: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        path = folder / some(rng, names)
        change = damaged if rng.random() < 0.25 else damaged_text
        path.write_bytes(change(rng, path.read_bytes()))
        return f"{path.name} by {change.__name__}"

    return damage


def reach_table(folder: Path) -> Iterator[str]:
    from logonet.data import importers, manifest

    yield from _inspected(importers.sources(f"{folder}/scans.csv"), manifest)


def make_bids(folder: Path) -> None:
    image, label = (gzip.compress(raw, 1, mtime=0) for raw in phantom_files(0))
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


def damage_bids(rng: Random, folder: Path) -> str:
    name = some(rng, ["dataset_description.json", "participants.tsv", "dseg.tsv"])
    if name.endswith(".json"):
        return damage_json_in(name)(rng, folder)
    return damage_text_in(name)(rng, folder)


def damage_places(rng: Random, folder: Path) -> str:
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
