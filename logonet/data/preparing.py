"""Work on one scan that data tasks do: cutting crops, preparing labelled scans. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from logonet.core.errors import BadScan
from logonet.core.execution import Executor, run_all
from logonet.data import crop_shards, cropping, manifest, prepared_scans
from logonet.data.classes import Classes, check_present
from logonet.data.crop_shards import CropRef
from logonet.data.manifest import Quarantined, Scan
from logonet.storage import object_store, safetensors_io


@dataclass(frozen=True)
class CutScan:
    """Cuts one scan into crops and stores them as one shard.

    It is called with the scan and the bytes of its shard that are stored: one listing of a thousand shards is less
    work for the store than a thousand questions.
    """

    cfg: cropping.Config
    uri: str

    def __call__(self, item: tuple[Scan, int]) -> list[CropRef] | Quarantined:
        scan, stored_bytes = item
        name = crop_shards.shard_name(scan.scan_id)
        if refs := crop_shards.shard_index(object_store.join(self.uri, name), name, stored_bytes):
            return refs
        try:
            crops_RCXYZ = cropping.crops_of(manifest.load(scan), scan.modality, self.cfg, scan.scan_id)
        except BadScan as err:
            return Quarantined(scan.uri, str(err))
        return crop_shards.write_shard(self.uri, scan.scan_id, crops_RCXYZ)


@dataclass(frozen=True)
class PrepareScan:
    """Prepares one scan and stores it as one file of chunks; with labels, unless ``classes`` is None."""

    classes: Classes | None
    cfg: prepared_scans.Config
    uri: str

    def __call__(self, scan: Scan) -> prepared_scans.Ref | Quarantined:
        uri = object_store.join(self.uri, "cases", f"{scan.scan_id}.safetensors")
        entry = object_store.stat(uri)
        if entry is not None and (ref := prepared_scans.stored(uri, entry.size_bytes)) is not None:
            return ref
        try:
            image = manifest.load(scan)
            if self.classes is None:
                array_CXYZ = prepared_scans.prepare_image(image, scan.modality, self.cfg, scan.scan_id)
                return self._stored(uri, prepared_scans.to_bytes(scan.scan_id, array_CXYZ, None))
            values_XYZ, label_map = manifest.load_label(scan, image), self.classes.of(scan)
            check_present(values_XYZ, label_map, scan.scan_id, self.classes)
            told = scan.modality, self.cfg, scan.scan_id
            prepared = prepared_scans.prepare(image, label_map.indices(values_XYZ), *told)
        except BadScan as err:
            return Quarantined(scan.uri, str(err))
        return self._stored(uri, prepared_scans.to_bytes(scan.scan_id, *prepared, self.cfg.seed))

    def _stored(self, uri: str, blob: bytes) -> prepared_scans.Ref:
        object_store.write(uri, blob)
        return prepared_scans.ref_of(uri, safetensors_io.header_of(blob))


def cut_scans(
    scans: Sequence[Scan], cfg: cropping.Config, uri: str, executor: Executor
) -> tuple[list[CropRef], list[Quarantined]]:
    """Cut every scan; shards already stored by an interrupted run are kept (they were written atomically)."""
    stored = crop_shards.stored_shards(uri)
    items = [(scan, stored.get(crop_shards.shard_name(scan.scan_id), 0)) for scan in scans]
    answers = run_all(executor, CutScan(cfg, uri), items)
    bad = [a for a in answers if isinstance(a, Quarantined)]
    return [ref for a in answers if not isinstance(a, Quarantined) for ref in a], bad


def prepare_scans(
    scans: Sequence[Scan],
    classes: Classes | None,
    cfg: prepared_scans.Config,
    uri: str,
    executor: Executor,
) -> tuple[list[prepared_scans.Ref], list[Quarantined]]:
    """Prepare every scan, with labels unless ``classes`` is None; files stored by an interrupted run are kept."""
    answers = run_all(executor, PrepareScan(classes, cfg, uri), scans)
    bad = [a for a in answers if isinstance(a, Quarantined)]
    return [a for a in answers if not isinstance(a, Quarantined)], bad
