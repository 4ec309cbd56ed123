"""Prediction: a model over everything at a prefix."""

from __future__ import annotations

import time
from collections import Counter

from logonet import cluster, config, importers, infer, predict
from logonet.cluster import Resources
from logonet.errors import UserError
from logonet.stages.common import say, took
from logonet.stages.evaluation import choose


def predict_bucket(
    cfg: infer.Config, model_uri: str, source: str, output: str, resources: Resources, retry: bool = False
) -> list[predict.Row]:
    """Segment every scan at ``source`` into ``output``; run again, it goes on where it was.

    Args:
        retry: try cases again that an earlier run has quarantined.
    """
    started = time.monotonic()
    chosen = choose(model_uri)
    resources.fixed("a prediction")
    share = cluster.share(resources)
    items = predict.items_of(importers.sources(source), source)
    predict.check_apart(items, source, output)
    if retry:
        say("predict", f"{predict.forget_quarantined(output)} quarantined cases are tried again")
    before = predict.finished(output)
    say("predict", f"{len(items)} scans at {source}, {sum(i.name in before for i in items)} of them done")

    def note(row: predict.Row, done: int, total: int) -> None:
        text = ", ".join(f"{name} {ml:,.1f} ml" for name, ml in row.volumes_ml.items())
        say(f"{done}/{total}", f"{row.name}  {row.seconds:.1f} s  {text or row.reason}")

    rows = predict.run(
        items,
        chosen.folder,
        output,
        cfg,
        share,
        about={"model": chosen.id, "infer": config.to_dict(cfg)},
        attempt=f"{time.time_ns():x}",
        note=note,
    )
    uri = predict.write_table(rows, output)
    counts = Counter(row.status for row in rows)
    told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    say("predict", f"{told}  {took(started)}  {uri}")
    if counts[predict.UNREAD] == len(rows):
        raise UserError(f"none of the {len(rows)} scans at {source} can be read; the last: {rows[-1].reason}")
    return rows
