"""A trained model over many scans: Ray Data actors that load it once each and commit every case by itself.

A case is committed by its row, ``<output>/.cases/<name>.json``, written after the label map it names; so whatever
is killed, the same command goes on with the cases that have no row. A case that cannot be used gets a row
that says why; one that takes its process down is tried once more and then gets such a row too.

Shapes: X Y Z voxel axes of the scan's own grid.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pandas as pd

from logonet.core.errors import BadScan, UserError
from logonet.core.execution import Executor
from logonet.data import manifest, volume
from logonet.data.classes import LabelMap
from logonet.data.manifest import Scan, Source
from logonet.data.volume import Volume
from logonet.inference import metrics, model, postprocessing, sliding_window
from logonet.storage import object_store

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # of a case whose process dies; a healthy one dies with its machine, hardly so often
READS_AT_ONCE = 16
CASES, ATTEMPTS, ABOUT, TABLE = ".cases", ".attempts", ".cases/about.json", "predictions"
DONE, QUARANTINED, UNREAD = "done", "quarantined", "unread"


@dataclass(frozen=True)
class Row:
    """What became of one case.

    Attributes:
        name: its path below the input, without the suffix.
        version: of the scan, as its store tells it; a scan replaced under its name is segmented anew.
        status: "done", or "quarantined" or "unread", and then ``reason`` says why. What the store did not give is
            unread: such a row is not committed, and the same command tries the case again.
        output, sha256: the label map and its digest.
        seconds: reading, segmenting and writing.
        volumes_ml: class -> ml in the label map.
        metrics: against the truth, one mapping per class (`evaluate.case_rows`); [] without truth.
    """

    name: str
    uri: str
    status: str
    version: str = ""
    reason: str = ""
    output: str = ""
    sha256: str = ""
    seconds: float = 0.0
    volumes_ml: dict[str, float] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Item:
    """One case to segment: a scan as found, or a row of a manifest, verified against it."""

    name: str
    scan: Source | Scan
    labels: LabelMap | None = None  # how to read the truth that the case is scored against

    @property
    def uri(self) -> str:
        return self.scan.uri

    @property
    def version(self) -> str:
        return self.scan.sha256 if isinstance(self.scan, Scan) else self.scan.version


def items_of(sources: Sequence[Source], root: str) -> list[Item]:
    """The sources at ``root`` by their paths below it. UserError when two would be written to one place."""
    found: dict[str, Item] = {}
    for source in sources:
        folder, uri = root.rstrip("/"), source.uri
        name = object_store.relative(uri, folder) if uri.startswith(f"{folder}/") else ""
        name = name or uri.rstrip("/").rpartition("/")[2]
        name = name[: len(name) - len(volume.suffix_of(name))]
        if source.channels:  # the file's own name is that of one of them
            name = "/".join([*name.split("/")[:-1], source.case])
        # A bucket's keys may have "..", "." or nothing between slashes, and the output may be a folder.
        name = "/".join("_" if part in ("", ".", "..") else part for part in name.split("/"))
        if name in found:
            raise UserError(
                f"{source.uri} and {found[name].uri} would both be written to {name}.nii.gz; rename one of them"
            )
        found[name] = Item(name, source)
    return [found[name] for name in sorted(found)]


def check_apart(items: Sequence[Item], source: str, output: str) -> None:
    """UserError where a label map would replace a scan, or be taken for one when the command is run again."""
    if f"{output.rstrip('/')}/".startswith(f"{source.rstrip('/')}/"):
        raise UserError(f"the output {output} lies in the input {source}; write the label maps elsewhere")
    written = {_label_uri(output, item.name) for item in items}
    for item in items:
        if item.uri in written:
            raise UserError(f"{item.uri} is a scan, which a label map would replace; use another output")


def run(
    items: Sequence[Item],
    folder: Mapping[str, bytes],
    output: str,
    cfg: sliding_window.Config,
    executor: Executor,
    *,
    about: Mapping[str, Any],
    score: bool = False,
    largest: bool = False,
    note: Callable[[Row, int, int], None] = lambda row, done, total: None,
) -> list[Row]:
    """Segment ``items`` into ``output``; those that have a row already are not touched again.

    Args:
        folder: the model's files (`model.files`), held once on each machine.
        about: names the model and the settings; an output folder never mixes two of them.
        score: compare with the scans' labels.
        largest: with ``score``, also by how much each class would gain from `postprocessing`.
        note: called for every case as it ends, with how many of how many are done.

    Returns:
        A row for each item, in their order.

    Raises:
        UserError: ``output`` belongs to another model.
    """
    _claim(output, about)
    attempt = f"{time.time_ns():x}"  # names this run, so that a case's deaths in earlier ones do not count
    rows = finished(output)
    waiting = [i for i in items if i.name not in rows or rows[i.name].version != i.version]
    done = len(items) - len(waiting)
    if waiting:
        segment = _Segment(output, cfg, attempt, score, executor.device, largest=largest)
        for _, row in executor.stream(segment, waiting, shared=(dict(folder),), workers="model actors"):
            rows[row.name] = row
            done += 1
            note(row, done, len(items))
        object_store.delete_prefix(object_store.join(output, ATTEMPTS, attempt))
    executor.quarantined("predict", sum(rows[item.name].status == QUARANTINED for item in items))
    return [rows[item.name] for item in items]


def finished(output: str) -> dict[str, Row]:
    """The rows already committed under ``output``, by name; a torn one counts as absent."""
    there = object_store.listing(object_store.join(output, CASES))
    uris = [entry.uri for entry in there if entry.uri.endswith("/row.json")]
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        return {row.name: row for row in pool.map(_read_row, uris) if row is not None}


def _read_row(uri: str) -> Row | None:
    """A committed row, or None for one that is torn."""
    try:
        return Row(**object_store.read_json(uri))
    except (object_store.IntegrityError, TypeError):  # no JSON, or not a row's
        log.warning("%s is torn; its case is segmented again", uri)
        return None


def forget_quarantined(output: str) -> int:
    """Drop the rows of cases that could not be used, so that the next run tries them again; how many."""
    bad = [row for row in finished(output).values() if row.status == QUARANTINED]
    for row in bad:
        object_store.delete(_row_uri(output, row.name))
    return len(bad)


def write_table(rows: Sequence[Row], output: str) -> str:
    """``predictions.csv`` and ``.parquet`` under ``output``, unless they say this already; returns the CSV's URI.

    One line per case: what became of it, seconds, and ml of each class.
    """
    lines = []
    for row in rows:
        line = {k: v for k, v in asdict(row).items() if k not in ("volumes_ml", "metrics")}
        lines.append(line | {f"{name}_ml": ml for name, ml in row.volumes_ml.items()})
    frame = pd.DataFrame(lines)
    files = {"parquet": frame.to_parquet(index=False), "csv": frame.to_csv(index=False).encode()}
    for suffix, blob in files.items():
        uri = object_store.join(output, f"{TABLE}.{suffix}")
        if not object_store.exists(uri) or object_store.read(uri) != blob:
            object_store.write(uri, blob)
    return uri


def _claim(output: str, about: Mapping[str, Any]) -> None:
    """Write down whose predictions these are, or refuse where another model's lie."""
    uri = object_store.join(output, ABOUT)
    own = json.loads(json.dumps(dict(about)))
    if not object_store.exists(uri):
        object_store.write_json(uri, own)
        return
    there = object_store.read_json(uri)
    if there != own:
        differing = sorted(k for k in {*there, *own} if there.get(k) != own.get(k))
        raise UserError(
            f"{output} holds predictions made otherwise ({', '.join(f'{k}={there.get(k)}' for k in differing)}); "
            "use another output, or delete it"
        )


def _label_uri(output: str, name: str) -> str:
    return object_store.join(output, *f"{name}.nii.gz".split("/"))


def _row_uri(output: str, name: str) -> str:
    return object_store.join(output, CASES, *name.split("/"), "row.json")


@dataclass
class _Segment:
    """Builds the predictor at the first case, then segments, writes and commits one case at a time."""

    output: str
    cfg: sliding_window.Config
    attempt: str
    score: bool
    device: str  # named, or without a GPU of its own each actor would take the machine's first
    predictor: sliding_window.Predictor | None = None
    largest: bool = False

    def __call__(self, item: Item, folder: Mapping[str, bytes]) -> Row:
        if self.predictor is None:
            spec, weights = model.parse(folder)
            self.predictor = sliding_window.Predictor(model.build(spec, weights), spec, self.cfg, self.device)
        row_uri = _row_uri(self.output, item.name)
        if object_store.exists(row_uri):
            there = _read_row(row_uri)
            # Its answer was lost with a node, and Ray gives the case again.
            if there is not None and there.version == item.version:
                return there
        started = time.monotonic()
        row = Row(item.name, item.uri, QUARANTINED, item.version)
        try:
            if self._deaths(item) >= MAX_ATTEMPTS:
                raise BadScan(
                    f"{item.uri}: took its process down {MAX_ATTEMPTS} times, probably for want of memory; segment it "
                    "on a larger machine"
                )
            row = self._segment(item, self.predictor)
        except BadScan as err:
            row = replace(row, reason=str(err))
        except UserError:  # the store is out of reach, or takes nothing: that concerns every case
            raise
        except Exception as err:  # one case must not stop a bucket; the reason is kept in its row
            if isinstance(item.scan, Scan):
                raise
            reason = f"{item.uri}: {type(err).__name__}: {' '.join(str(err).split())[:300]}"
            row = replace(row, reason=reason)
        row = replace(row, seconds=round(time.monotonic() - started, 3))
        if row.status != UNREAD:
            object_store.write_json(row_uri, asdict(row))
        return row

    def _deaths(self, item: Item) -> int:
        """How often this run began the case and did not come to its row; and a note of this beginning."""
        folder = object_store.join(self.output, ATTEMPTS, self.attempt, *item.name.split("/"))
        # Its own notes only: another case may be named like this one's folder.
        before = sum("/" not in object_store.relative(e.uri, folder) for e in object_store.listing(folder))
        if before < MAX_ATTEMPTS:
            object_store.write(object_store.join(folder, f"{before}"), b"begun")
        return before

    def _segment(self, item: Item, predictor: sliding_window.Predictor) -> Row:
        try:
            image, modality, original = _open(item, predictor.spec.one_modality)
        except object_store.NotGiven as err:
            if isinstance(item.scan, Scan):  # a mean over the others would pass for the whole
                raise
            return Row(item.name, item.uri, UNREAD, item.version, str(err))
        labels_XYZ = predictor.segment(image, modality, item.name)
        uri = _label_uri(self.output, item.name)
        written = object_store.write(uri, volume.encode_labels(labels_XYZ, original, image.affine))
        scores: list[dict[str, Any]] = []
        classes = predictor.spec.foreground
        if self.score:
            assert isinstance(item.scan, Scan)
            assert item.labels is not None
            values, present = predictor.spec.label_values, item.labels.present()
            truth_XYZ, found_XYZ = item.labels.as_values(
                manifest.load_label(item.scan, image), labels_XYZ, values
            )
            known = {values[i] for i in present}
            there = {name: own for name, own in predictor.spec.scored.items() if known & {*own}}
            scores = metrics.case_rows(found_XYZ, truth_XYZ, image.spacing_mm, there, item.scan.scan_id)
            for line in scores if self.largest else ():
                of_largest = postprocessing.dice_of_largest(found_XYZ, truth_XYZ, there[line["class"]])
                line[postprocessing.LARGEST] = of_largest
            scores = json.loads(json.dumps(scores, default=lambda value: value.item()))  # no NumPy types
        volumes_ml = metrics.volumes_ml(labels_XYZ, image.affine, classes, digits=4)
        found = (uri, written.sha256, 0.0, volumes_ml, scores)
        return Row(item.name, item.uri, DONE, item.version, "", *found)


def _open(item: Item, known: str) -> tuple[Volume, str, bytes | None]:
    """The scan, its modality, and the bytes whose NIfTI header the label map takes over (None for DICOM)."""
    scan = item.scan
    if isinstance(scan, Scan):
        blobs, modality = manifest.read_row(scan), scan.modality
        image = manifest.decode(scan, blobs)
    else:
        blobs, sha256 = manifest.read_scan(scan)
        if fault := manifest.checksum_fault(scan, sha256):
            raise BadScan(fault)
        image = manifest.decode(scan, blobs)
        # What is known of the scan, else what the model is for: a part of a CT may hold no air to tell it by.
        modality = volume.modality(image, scan.modality or image.modality or known, item.uri)
    return image, modality, None if scan.files else blobs[0]
