"""Crops cut and read through a store of which one request in twenty fails, against the same through a sound one.

    python benchmarks/faults.py [--rate 0.05] [--turns 3] [--scans 8] [--passes 3]

The embedded S3 server behind the tests' proxy (tests/faultproxy.py), a local Ray, phantoms of 112^3. A turn cuts
every scan into crops of 96^3 (`preparing.cut_scans`) and reads every crop ``passes`` times as
training does (`feed.batches`) and once as clusterers do (`fitting.sample_slices`). Sound and faulty turns take turns
in one run, through the same proxy, in the order that alternates: a busy machine slows both alike. Faults are
those of `faultproxy.KINDS`, each as likely as another: 503, 403, resets before and within replies, lost replies, stalls
of 5 s before and within them, truncated bodies with the whole or the cut length, inverted bytes, wrong ETags, error
pages with status 200, uploads cut or damaged.

Every crop of every turn is compared with the first turn's. MB are of uint16 crops.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _measure import machine, markdown, sentence

from logonet import methods
from logonet.clustering import fitting
from logonet.data import crop_shards, cropping, manifest, phantom, preparing
from logonet.distributed import cluster, feed
from logonet.distributed.executor import RayExecutor
from logonet.storage import object_store
from logonet.storage.parquet import Rows
from logonet.training import dataset, schedule
from logonet.training.communicator import Communicator
from tools.s3server import S3Server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from faultproxy import FaultProxy

SIDE = 96
SCAN_VOX = (112, 112, 112)
METHOD = "simmim"
BUCKET = "s3://faults"
MB = 1e6


def turn(
    scans: list[manifest.Scan], cfg: cropping.Config, uri: str, passes: int, executor: RayExecutor
) -> dict[str, Any]:
    """Seconds and MB of cutting and reading, and a digest of every crop."""
    import ray

    began = time.perf_counter()
    refs, bad = preparing.cut_scans(scans, cfg, uri, executor)
    cut_s = time.perf_counter() - began
    assert not bad, bad
    table = crop_shards.CropTable(uri, Rows.of(refs, crop_shards.CropRef), cfg.size_vox, 1)
    order = schedule.SampleSchedule(len(table), global_batch=4, seed=0)
    config = methods.config(METHOD, {})
    ref = [ray.put(dataset.TrainingDataset(METHOD, config, order, table))]
    positions = schedule.MicroBatches(order, 4, 0, passes * order.steps_per_pass)
    began = time.perf_counter()
    seen = 0
    for batch in feed.batches(ref, positions, executor.allocation, Communicator()):
        seen += len(next(iter(batch.values())))
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    slices_ST = fitting.sample_slices(table, len(table) * SIDE, 0, executor)
    sample_s = time.perf_counter() - began
    crop_mb = 2 * SIDE**3 / MB
    return {
        "cut_mb": len(table) * crop_mb,
        "cut_s": cut_s,
        "read_mb": seen * crop_mb,
        "read_s": read_s,
        "sample_mb": slices_ST.nbytes / MB,
        "sample_s": sample_s,
        "crops": [ref.sha256 for ref in refs],
        "slices": hashlib.sha256(slices_ST).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=0.05, help="share of requests that meet a fault")
    parser.add_argument("--turns", type=int, default=3, help="of each kind")
    parser.add_argument("--scans", type=int, default=8)
    parser.add_argument("--per-scan", type=int, default=8, help="crops of a scan")
    parser.add_argument("--passes", type=int, default=3, help="over all crops, as training reads them")
    args = parser.parse_args()

    about = machine()
    cfg = cropping.Config(size_vox=(SIDE,) * 3, per_scan=args.per_scan)
    done: dict[str, list[dict[str, Any]]] = {"sound": [], "faulty": []}
    faults: collections.Counter[str] = collections.Counter()
    requests = 0
    with tempfile.TemporaryDirectory() as folder, S3Server(os.path.join(folder, "s3")) as server:
        os.environ |= {**server.env(), "NO_PROXY": "127.0.0.1"}
        with FaultProxy(server.endpoint) as proxy:
            os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
            object_store.create_bucket(BUCKET)
            phantom.write_dataset(f"{BUCKET}/scans", args.scans, size_vox=SCAN_VOX)
            images = [e.uri for e in object_store.listing(f"{BUCKET}/scans/imagesTr")]
            answers = [manifest.inspect(manifest.Source(uri)) for uri in images]
            scans = [a for a in answers if isinstance(a, manifest.Scan)]
            assert len(scans) == args.scans, answers
            resources = cluster.Resources(workers=1, object_store_mb=300)
            with cluster.connected(resources, logs=False):
                executor = RayExecutor(resources)
                turn(scans[:2], cfg, f"{BUCKET}/warm", 1, executor)  # starts Ray's workers
                for n in range(args.turns):
                    for kind in ("sound", "faulty")[:: 1 if n % 2 == 0 else -1]:
                        proxy.rate, proxy.seed = (args.rate if kind == "faulty" else 0.0), n
                        before = len(proxy.requests)
                        done[kind].append(turn(scans, cfg, f"{BUCKET}/{kind}-{n}", args.passes, executor))
                        proxy.rate = 0.0
                        if kind == "faulty":
                            met = proxy.requests[before:]
                            requests += len(met)
                            faults.update(r.fault for r in met if r.fault)
                        object_store.delete_prefix(f"{BUCKET}/{kind}-{n}")
                        print(
                            kind,
                            n,
                            {k: round(v, 2) for k, v in done[kind][-1].items() if k.endswith("_s")},
                            flush=True,
                        )

    every = done["sound"] + done["faulty"]
    corrupt = sum(a != b for t in every for a, b in zip(t["crops"], every[0]["crops"], strict=True))
    corrupt += sum(t["slices"] != every[0]["slices"] for t in every)

    def rate(kind: str, *works: str) -> float:
        turns = done[kind]
        return sum(t[f"{w}_mb"] for t in turns for w in works) / sum(
            t[f"{w}_s"] for t in turns for w in works
        )

    works = {"cut": ["cut"], "read to train": ["read"], "read to sample": ["sample"]}
    works["all"] = ["cut", "read", "sample"]
    rows = [
        [name, f"{rate('sound', *w):.1f}", f"{rate('faulty', *w):.1f}", f"{rate('faulty', *w) / rate('sound', *w):.2f}"]
        for name, w in works.items()
    ]  # fmt: skip
    print(f"{sentence(about)}; {len(every[0]['crops'])} crops, {args.turns} turns of each kind")
    print(markdown(["MB/s", "sound", "faulty", "ratio"], rows))
    print(f"{sum(faults.values())} faults in {requests} requests: {dict(faults.most_common())}")
    result = {
        name.replace(" ", "_"): round(rate("faulty", *w) / rate("sound", *w), 3) for name, w in works.items()
    }
    result |= {
        "rate": args.rate,
        "requests": requests,
        "faults": sum(faults.values()),
        "corrupt_crops": corrupt,
    }
    print(json.dumps({**result, "sound_mb_per_s": round(rate("sound", *works["all"]), 1), **about}))


if __name__ == "__main__":
    main()
