"""Work on one scan that data tasks do: cutting crops, preparing labelled scans. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logonet.core import config
from logonet.core.errors import BadScan
from logonet.core.execution import Executor, run_all
from logonet.data import crop_shards, cropping, manifest, prepared_scans
from logonet.data.classes import Classes, check_present
from logonet.data.crop_shards import CropRef
from logonet.data.manifest import Quarantined, Scan
from logonet.data.preprocessing import Preprocessing
from logonet.data.volume import Volume
from logonet.storage import object_store


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
    """Prepares one scan, and with ``classes`` its labels, and stores a file of chunks for each.

    Files are named by what decides their bytes. So all runs below a root share them, and one that is there is kept.

    Args:
        store: the folder of all scans that are prepared with ``cfg``.
    """

    classes: Classes | None
    cfg: prepared_scans.Config
    store: str

    def __call__(self, scan: Scan) -> prepared_scans.Ref | Quarantined:
        try:
            return self._prepared(scan)
        except BadScan as err:
            return Quarantined(scan.uri, str(err))

    def _prepared(self, scan: Scan) -> prepared_scans.Ref:
        of_image = {"sha256": scan.sha256, "modality": scan.modality, "channels": scan.channels}
        image_uri = self._uri("images", scan, of_image)
        image = prepared_scans.stored(image_uri)
        if self.classes is None:
            image = image or self._image(image_uri, scan, manifest.load(scan))
            return prepared_scans.ref_of(scan.scan_id, image)
        label_map = self.classes.of(scan)
        # With what decides whether an unknown value is refused, which a file that is there already must not hide.
        strict = bool(label_map.unknown) and not self.classes.chosen
        of_labels = {"sha256": scan.label_sha256, "map": label_map, "strict": strict, "seed": self.cfg.seed}
        labels_uri = self._uri("labels", scan, {"image": of_image, **of_labels})
        labels = prepared_scans.stored(labels_uri)
        if image is None or labels is None:
            volume = manifest.load(scan)
            values_XYZ = manifest.load_label(scan, volume)
            check_present(values_XYZ, label_map, scan.scan_id, self.classes)
            image = image or self._image(image_uri, scan, volume)
            prepared_XYZ = prepared_scans.prepare_labels(
                label_map.indices(values_XYZ), volume.affine, self.cfg
            )
            blob = prepared_scans.labels_file(scan.scan_id, prepared_XYZ, self.cfg.seed)
            labels = prepared_scans.write(labels_uri, blob)
        return prepared_scans.ref_of(scan.scan_id, image, labels)

    def _uri(self, kind: str, scan: Scan, decides: Mapping[str, Any]) -> str:
        name = f"{scan.scan_id}-{config.fingerprint(decides)[:10]}.safetensors"
        return object_store.join(self.store, kind, name)

    def _image(self, uri: str, scan: Scan, volume: Volume) -> prepared_scans.File:
        image_CXYZ = prepared_scans.prepare_image(volume, scan.modality, self.cfg, scan.scan_id)
        return prepared_scans.write(uri, prepared_scans.image_file(scan.scan_id, image_CXYZ))


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
    root: str,
    executor: Executor,
) -> tuple[list[prepared_scans.Ref], list[Quarantined]]:
    """Prepare every scan, with labels unless ``classes`` is None; what is below ``root`` already is kept."""
    store = object_store.join(root, "scans", config.fingerprint(config.to_dict(Preprocessing.of(cfg))))
    answers = run_all(executor, PrepareScan(classes, cfg, store), scans)
    bad = [a for a in answers if isinstance(a, Quarantined)]
    return [a for a in answers if not isinstance(a, Quarantined)], bad
