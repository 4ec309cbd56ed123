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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fuzz_artifacts import (
    damage_artifact,
    damage_bytes_in,
    damage_case,
    damage_crops,
    damage_run,
    damage_split,
    damage_trials,
    make_case,
    make_crops,
    make_fits,
    make_imported,
    make_run,
    make_split,
    make_tables,
    make_trials,
    reach_case,
    reach_crops,
    reach_fits,
    reach_imported,
    reach_run,
    reach_scores,
    reach_seen,
    reach_split,
    reach_trials,
)
from fuzz_damage import Random
from fuzz_scans import (
    damage_bids,
    damage_json_in,
    damage_places,
    damage_scan,
    damage_series,
    damage_text_in,
    make_bids,
    make_decathlon,
    make_nnunet,
    make_scans,
    make_series,
    make_table,
    reach_list,
    reach_scans,
    reach_table,
)
from fuzz_settings import (
    damage_config,
    damage_model,
    damage_tensors_in,
    make_config,
    make_model,
    make_settings,
    make_space,
    make_weights,
    reach_config,
    reach_model,
    reach_settings,
    reach_space,
    reach_weights,
)

from logonet.core import errors, seeding
from logonet.core.errors import UserError

SECONDS = 10  # of processor time for one mutation; a reader of files this small takes milliseconds
LOADED = 30  # times as long by the clock, where other work runs beside
GRACE_S = 20  # more, before a child whose alarm did not help is killed
IMPORT_S = 600  # for making valid files and importing what reads them
PEAK_MB = 256  # that one mutation may add to the process's memory; the files have kilobytes
ADDRESS_MB = 3072  # that it may add to the address space: what is asked for and never touched counts too


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


TARGETS: dict[str, Target] = {
    "nifti": Target(make_scans, damage_scan, reach_scans, ("case_0", "imagesTr")),
    "dicom": Target(make_series, damage_series, reach_scans, (".dcm", "series")),
    "decathlon": Target(
        make_decathlon,
        damage_json_in("dataset.json"),
        reach_list,
        (".json", "decathlon", "label", "/etc/passwd"),
    ),
    "nnunet": Target(
        make_nnunet,
        damage_json_in("dataset.json", "splits_final.json"),
        reach_list,
        (".json", "nnunet", "label"),
    ),
    "csv": Target(make_table, damage_text_in("scans.csv"), reach_table, ("scans.csv", "csv")),
    "bids": Target(make_bids, damage_bids, reach_scans, ("sub-0", ".tsv", ".json")),
    "places": Target(make_scans, damage_places, reach_scans, ("places",)),
    "config": Target(make_config, damage_config, reach_config, ()),
    "settings": Target(make_settings, damage_text_in("settings"), reach_settings, ()),
    "space": Target(make_space, damage_text_in("space.yaml"), reach_space, ("space.yaml",)),
    "weights": Target(make_weights, damage_tensors_in("given.safetensors"), reach_weights, (".safetensors",)),
    "model": Target(make_model, damage_model, reach_model, ()),
    "manifest": Target(
        make_imported,
        damage_artifact("scans.parquet", "quarantine.parquet"),
        reach_imported,
        ("manifest",),
    ),
    "crops": Target(make_crops, damage_crops, reach_crops, ("crops", "shards")),
    "cases": Target(make_case, damage_case, reach_case, ("cases",)),
    "clusterers": Target(
        make_fits,
        damage_tensors_in("fit.safetensors", "set.safetensors"),
        reach_fits,
        (".safetensors", "clusterer"),
    ),
    "checkpoint": Target(make_run, damage_run, reach_run, ("step-", "checkpoint")),
    "split": Target(make_split, damage_split, reach_split, ("split.json",)),
    "seen": Target(make_tables, damage_bytes_in("seen.parquet"), reach_seen, ("seen",)),
    "scores": Target(make_tables, damage_text_in("cases.csv"), reach_scores, ("cases.csv", "scan")),
    "trials": Target(make_trials, damage_trials, reach_trials, ("trials", "state.json")),
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
