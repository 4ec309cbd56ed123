"""Stage artifacts: ``<root>/<stage>/<fingerprint>/`` with a ``manifest.json`` that is written last.

The fingerprint covers the stage's config and its parents' fingerprints, so a different config never finds old
data. A manifest guarantees that everything it lists is there. A damaged manifest (torn, edited) counts as
absent: ``find`` logs it and the stage runs again; ``commit`` keeps the damaged file as
``manifest.json.torn-<digest>`` before it writes the good one, so nothing is lost silently.

``checksum`` in the manifest is the SHA-256 of the rest of it, as sorted compact JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from logonet import __version__
from logonet.core import config
from logonet.core.config import to_dict
from logonet.core.errors import UserError
from logonet.storage import object_store
from logonet.storage.object_store import Stored

SCHEMA = 1  # of the manifest; part of every fingerprint, so a change of format starts afresh
FORMATS = {"labels": 2, "cases": 2, "prepared": 2}  # of a stage's own files, where it is not the first
MANIFEST = "manifest.json"
STAT_THREADS = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Artifact:
    """The result of a stage at ``uri``.

    ``parents`` maps a role ("crops", "clusterers") to that artifact's fingerprint, ``files`` a name below
    ``uri`` to its size and digest, and ``facts`` holds the stage's own metadata, any JSON.
    """

    uri: str
    stage: str
    fingerprint: str
    config: dict[str, Any]
    parents: dict[str, str]
    files: dict[str, Stored]
    facts: dict[str, Any]
    logonet_version: str
    created_at: str  # UTC, ISO 8601

    def uri_of(self, name: str) -> str:
        return object_store.join(self.uri, name)

    def read(self, name: str) -> bytes:
        """One of its files, verified.

        Raises:
            UserError: when the artifact has no such file, or the file is missing or damaged.
        """
        if name not in self.files:
            raise UserError(config.unknown(f"file of {self.uri}", name, self.files))
        stored = self.files[name]
        try:
            return object_store.read(self.uri_of(name), size_bytes=stored.size_bytes, sha256=stored.sha256)
        except object_store.IntegrityError as err:
            raise object_store.IntegrityError(
                f"{err}; to have it made again delete {self.uri_of('manifest.json')} and run the same command"
            ) from None


def address(root: str, stage: str, cfg: Any, parents: Mapping[str, str]) -> tuple[str, str]:
    """URI and fingerprint of the result of ``stage`` for ``cfg`` (a dataclass or mapping) and ``parents``."""
    parts = {"stage": stage, "schema": SCHEMA, "config": to_dict(cfg), "parents": dict(parents)}
    if stage in FORMATS:
        parts["format"] = FORMATS[stage]
    fingerprint = config.fingerprint(parts)
    return object_store.join(root, stage, fingerprint), fingerprint


def find(uri: str) -> Artifact | None:
    """The finished artifact at ``uri``, or None when it is absent, unfinished or its manifest is damaged.

    Raises:
        UserError: when the store itself cannot be read, which does not mean absence.
    """
    manifest_uri = object_store.join(uri, MANIFEST)
    if not object_store.exists(manifest_uri):
        return None
    values, why = _parse(object_store.read(manifest_uri))
    if why:
        log.warning("%s %s; the stage will run again and keep it as %s.torn-*", manifest_uri, why, MANIFEST)
        return None
    try:
        return _artifact(uri, values)
    except UserError as err:
        raise UserError(f"{manifest_uri} is of another version of logonet: {err}") from None


def verify(artifact: Artifact, *, full: bool = False) -> list[str]:
    """Names of its files that are missing or damaged, judged by size, or with ``full`` by reading all bytes."""

    def damaged(name: str) -> bool:
        entry = object_store.stat(artifact.uri_of(name))
        if entry is None or entry.size_bytes != artifact.files[name].size_bytes:
            return True
        if full:
            try:
                artifact.read(name)
            except object_store.IntegrityError as err:
                log.warning("%s", err)
                return True
        return False

    # With ``full``, whole files are in memory while they are digested: one at a time.
    with ThreadPoolExecutor(1 if full else STAT_THREADS) as pool:
        return [name for name, bad in zip(artifact.files, pool.map(damaged, artifact.files)) if bad]


def commit(
    uri: str,
    stage: str,
    fingerprint: str,
    *,
    config: Any,
    parents: Mapping[str, str],
    files: Mapping[str, Stored],
    facts: Mapping[str, Any],
) -> Artifact:
    """Write the manifest, which declares the artifact finished. ``config`` is the resolved one.

    Raises:
        IntegrityError: when one of ``files`` is missing or not of its full size; then no manifest is written.
    """
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "stage": stage,
        "fingerprint": fingerprint,
        "config": to_dict(config),
        "parents": dict(parents),
        "files": {name: to_dict(stored) for name, stored in sorted(files.items())},
        "facts": to_dict(facts),
        "logonet_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    artifact = _artifact(uri, content)
    if missing := verify(artifact):
        raise object_store.IntegrityError(
            f"{uri} cannot be finished: {missing[0]} is missing or cut short; run the stage again"
        )
    manifest_uri = object_store.join(uri, MANIFEST)
    if object_store.exists(manifest_uri):
        raw = object_store.read(manifest_uri)
        if _parse(raw)[1]:  # damaged: keep a copy, named by its digest, so that equal copies are one
            object_store.write(f"{manifest_uri}.torn-{hashlib.sha256(raw).hexdigest()[:8]}", raw)
    object_store.write_json(manifest_uri, content | {"checksum": _checksum(content)})
    return artifact


def _parse(raw: bytes) -> tuple[dict[str, Any], str]:
    """A manifest's values and what is wrong with it; empty when it is sound."""
    try:
        values = config.parse_json(raw)
    except ValueError:  # UnicodeDecodeError too
        return {}, "is torn"
    if not isinstance(values, dict) or "checksum" not in values:
        return {}, "is not a manifest"
    content = {k: v for k, v in values.items() if k != "checksum"}
    if values["checksum"] != _checksum(content):
        return {}, "does not match its own checksum"
    files = values.get("files")
    names = files if isinstance(files, dict) else ()
    if strange := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
        return {}, f"lists the file '{strange[0]}', which is outside its folder"
    return values, ""


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _artifact(uri: str, manifest: Mapping[str, Any]) -> Artifact:
    values = {key: value for key, value in manifest.items() if key not in ("schema", "checksum")}
    return config.from_dict(Artifact, {"uri": uri, **values}, MANIFEST)
