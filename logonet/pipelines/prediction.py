"""Prediction: a model over everything at a prefix."""

from __future__ import annotations

import time
from collections import Counter

from logonet.core.errors import UserError
from logonet.core.execution import Executor
from logonet.data import importers
from logonet.distributed import bucket_inference
from logonet.inference import sliding_window
from logonet.inference.load import load_model
from logonet.pipelines.stage import say, took


def predict_bucket(
    cfg: sliding_window.Config,
    model_uri: str,
    source: str,
    output: str,
    executor: Executor,
    retry: bool = False,
) -> list[bucket_inference.Row]:
    """Segment every scan at ``source`` into ``output``; run again, it goes on where it was.

    Args:
        retry: try cases again that an earlier run has quarantined.
    """
    started = time.monotonic()
    chosen = load_model(model_uri)
    items = bucket_inference.items_of(importers.sources(source, chosen.spec.channels), source)
    bucket_inference.check_apart(items, source, output)
    if retry:
        say("predict", f"{bucket_inference.forget_quarantined(output)} quarantined cases are tried again")
    before = bucket_inference.finished(output)
    say("predict", f"{len(items)} scans at {source}, {sum(i.name in before for i in items)} of them done")

    def note(row: bucket_inference.Row, done: int, total: int) -> None:
        text = ", ".join(f"{name} {ml:,.1f} ml" for name, ml in row.volumes_ml.items())
        say(f"{done}/{total}", f"{row.name}  {row.seconds:.1f} s  {text or row.reason}")

    about = {"model": chosen.id, "infer": cfg.identity()}
    rows = bucket_inference.run(items, chosen.folder, output, cfg, executor, about=about, note=note)
    uri = bucket_inference.write_table(rows, output)
    counts = Counter(row.status for row in rows)
    told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    say("predict", f"{told}  {took(started)}  {uri}")
    if counts[bucket_inference.UNREAD] == len(rows):
        raise UserError(f"none of the {len(rows)} scans at {source} can be read; the last: {rows[-1].reason}")
    return rows
