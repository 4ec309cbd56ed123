"""Imports go one way: a room may import from lower floors only, and some libraries stay in one room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"redaction"},
    {"errors"},
    {"config", "draws", "tables", "tensors"},
    {"store"},
    {
        "artifacts",
        "volume",
        "crops",
        "masks",
        "augment",
        "manifest",
        "importers",
        "fingerprints",
        "datacheck",
        "splits",
        "leaks",
        "seen",
        "cases",
        "phantom",
        "s3server",
        "cluster",
    },
    {"backbones", "clusterers", "labeller"},
    {"methods", "transfer"},
    {
        "model",
        "registry",
        "data",
        "infer",
        "probe",
        "checkpoints",
        "notices",
        "doctor",
        "report",
        "serving",
        "export",
        "evaluate",
    },
    {"rendezvous"},
    {"train", "predict", "clusters_report"},
    {"stages", "sweep", "plan"},
    {"chaos"},
    {"cli"},
]
# Within a floor, who may use whom.
NEIGHBOURS = {
    ("crops", "volume"),
    ("cases", "crops"),
    ("cases", "volume"),
    ("manifest", "fingerprints"),
    ("importers", "manifest"),
    ("datacheck", "fingerprints"),
    ("datacheck", "manifest"),
    ("datacheck", "volume"),
    ("splits", "manifest"),
    ("leaks", "manifest"),
    ("seen", "leaks"),
    ("seen", "manifest"),
    ("leaks", "fingerprints"),
    ("fingerprints", "volume"),
    ("infer", "model"),
    ("serving", "infer"),
    ("export", "infer"),
    ("export", "model"),
    ("manifest", "volume"),
    ("phantom", "volume"),
    ("labeller", "clusterers"),
    ("doctor", "cluster"),
    ("sweep", "stages"),
    ("plan", "stages"),
}
ONLY = {"boto3": {"store"}, "botocore": {"store"}, "mlflow": {"registry"}}
NO_RAY_BELOW = 7


def floor(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    pytest.fail(f"{room} stands on no floor; give it one in tests/test_layers.py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything the file imports, inside functions too."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            out += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return out


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "logonet").parts[0].removesuffix(".py")


FILES = sorted(
    p for p in (ROOT / "logonet").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "logonet"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    for line, name in imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        top, *rest = name.split(".")
        # A plan is made of what a job would run, so the command line may know the recipes, and nothing else of jobs.
        assert top != "jobs" or (room == "cli" and name == "jobs.recipes"), f"{where}; nothing imports jobs"
        if top in ONLY:
            assert room in ONLY[top], f"{where}; only {ONLY[top]} may"
        if top == "ray":
            # cluster.py is the one low room that speaks Ray: it connects.
            assert floor(room) >= NO_RAY_BELOW or room == "cluster", (
                f"{where}; Ray starts on floor {NO_RAY_BELOW}"
            )
        if top != "logonet" or not rest or rest[0] == "__version__":
            continue
        other = rest[0]
        if other == room:
            continue
        if room == "methods":
            assert other != "backbones", f"{where}; methods name no backbone"
        down = floor(other) < floor(room)
        beside = floor(other) == floor(room) and (room, other) in NEIGHBOURS
        assert down or beside, f"{where}; {other} is not below {room}"


def test_every_neighbour_exception_is_used() -> None:
    used = {
        (room_of(p), name.split(".")[1])
        for p in FILES
        for _, name in imports(p)
        if name.startswith("logonet.")
    }
    assert used >= NEIGHBOURS - {("doctor", "cluster")}


def test_reading_and_cutting_scans_imports_no_torch() -> None:
    """Ray's workers of the stages before training would each take seconds and 200 MB for what they do not use."""
    code = "import sys, logonet.distributed.data_tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
