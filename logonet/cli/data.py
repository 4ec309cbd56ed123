"""Commands that look after scans: import, check and compare them, and write phantoms."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from logonet.cli.endings import shown
from logonet.cli.jobs import absolute
from logonet.core.errors import UserError
from logonet.core.execution import run_all
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.storage import object_store

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
Root = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")]
Manifests = Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MANIFEST...")]


def data_import(source: Source, /, root: str, channels: tuple[str, ...] = (), workers: int = 1) -> None:
    """Read and check every scan at SOURCE and store one table of them under ROOT/manifest.

    Args:
        source: a folder or s3:// prefix, an MSD dataset.json, or a DICOM series folder.
        root: where the artifact goes.
        channels: contrasts that make up a scan, by the last word of their files' names, such as flair t1ce.
        workers: parallelism hint where the command starts its own Ray.
    """
    from logonet import pipelines

    resources = Resources(workers=workers)
    with cluster.connected(resources):
        where = absolute(source, "SOURCE"), absolute(root, "--root")
        table, artifact = pipelines.import_scans(*where, RayExecutor(resources), channels)
    print(shown(table.describe()))
    if table.quarantined:
        print(f"{len(table.quarantined)} scans are left out: {artifact.uri_of('quarantine.csv')}")
    print(f"id {table.id}\n{artifact.uri}")


def data_check(source: Source, /, channels: tuple[str, ...] = (), workers: int = 1) -> None:
    """Verify every case at SOURCE and print every offender; exit status 1 when there is one.

    Args:
        source: as for data import.
        channels: as for data import.
        workers: parallelism hint where the command starts its own Ray.
    """
    from logonet.data import importers, validate

    resources = Resources(workers=workers)
    with cluster.connected(resources):
        survey = importers.survey(absolute(source, "SOURCE"), channels)
        checked = run_all(RayExecutor(resources), validate.check, survey.sources)
    problems = validate.problems(checked)
    print(shown(validate.table(problems, cases=len(checked))))
    labelled = sum(bool(case.label_uri) for case in survey.sources)
    print(f"{labelled} of {len(checked)} cases are labelled")
    if survey.unused:
        print(shown(survey.told()))
    if validate.failed(problems):
        sys.exit(1)


def data_leakcheck(manifests: Manifests, /, out: str = "") -> None:
    """Look for scans of the first manifest in the others; exit status 1 when there is one.

    Args:
        manifests: manifest artifacts (ROOT/manifest/<id>), that of the test scans first; one alone is searched for
            duplicates.
        out: also write the table as CSV here.
    """
    from logonet import pipelines
    from logonet.data import leakage

    tables = [pipelines.open_manifest(absolute(uri, "MANIFEST")) for uri in manifests]
    if not tables:
        raise UserError("no manifest is given; 'logonet data import' makes one")
    others = [s for t in tables[1:] or tables for s in t.scans]
    found = leakage.find(tables[0].scans, others)
    print(leakage.table(found))
    if out:
        object_store.write(absolute(out, "--out"), leakage.to_csv(found))
    if found:
        sys.exit(1)


def phantoms(root: Root, /, n: int = 8, size: int = 64, seed: int = 0, like: str = "") -> None:
    """Write N synthetic CT scans with labels to ROOT, in the MSD layout.

    Args:
        root: folder or s3:// prefix.
        n: number of scans.
        size: voxels along each side.
        seed: of everything drawn.
        like: a public dataset, such as synapse, acdc or msd_brain, whose layout and classes the scans then have.
    """
    from logonet.data import phantom, phantom_datasets

    if like:
        return phantom_datasets.write(like, root, (size, size, size))

    print(phantom.write_dataset(root, n, size_vox=(size, size, size), seed=seed))
