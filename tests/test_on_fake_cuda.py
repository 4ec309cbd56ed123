"""Steps of every method on every network as on a GPU: types, devices, and that nothing waits. See fake_cuda.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_methods import every_pair, wanting

from logonet import networks

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a torch without CUDA lacks, compiled in a second. In CI a missing compiler is a failure."""
    if torch.version.cuda:
        pytest.skip(
            "this torch has CUDA, for which fake_cuda.cpp would stand in; 'make test-cuda' uses the real one"
        )
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None and not os.environ.get("CI"):
        pytest.skip("there is no C++ compiler")
    assert compiler is not None
    out, torch_folder = tmp_path_factory.mktemp("fake") / "fake_cuda.so", Path(torch.__file__).parent
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    libraries = ["-lc10", "-ltorch_cpu"]
    subprocess.run([compiler, *options, str(HERE / "fake_cuda.cpp"), "-o", str(out), *libraries], check=True)
    return out


def errors(library: Path, *tasks: str) -> dict[str, str]:
    """The tracebacks of those that fail."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fake_cuda.py"), str(library), *tasks]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_is_right_and_waits_for_the_gpu_once(library: Path, slow: bool) -> None:
    pairs = [param.values for param in every_pair() if bool(param.marks) == slow]
    able = [(name, backbone) for name, backbone in pairs if wanting(name) <= networks.abilities(backbone)]
    found = errors(library, *(f"step/{name}/{backbone}" for name, backbone in able))
    assert not found, "\n".join(f"{pair}: {said}" for pair, said in found.items())


def test_a_resumed_run_has_everything_where_a_gpu_wants_it(library: Path) -> None:
    """logonet's maps lie channels last there, uxnet3d's do not."""
    found = errors(library, "resume/logonet", "resume/uxnet3d")
    assert not found, "\n".join(f"{pair}: {said}" for pair, said in found.items())
