"""Training on CUDA without CUDA, in a process of its own: see test_on_fake_cuda.py.

The tensors hold no values and say that they are on a GPU; autocast, autograd and the optimizer treat them so. That
shows of what type and on which device everything is, and where the host would wait for the device.

    python tests/fake_cuda.py FAKE_CUDA.so step/METHOD/NETWORK... resume/NETWORK...
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before anything imports torch, which looks once for what it gives
    _torch = importlib.util.find_spec("torch")
    assert _torch is not None
    assert _torch.submodule_search_locations is not None
    ctypes.CDLL(f"{_torch.submodule_search_locations[0]}/lib/libtorch_cpu.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1])

import pytest
import torch
from loops import LARGER, LocalLoop, a_job_of, crops_dataset, killed_at
from test_methods import batch_for, config_for, module_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from logonet import training
from logonet.training.loop import Loop
from logonet.training.step import autocast_of

# How large their results are depends on values.
NEEDS_VALUES = {
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique_consecutive",
    "_unique2",
    "bincount",
}


class Waits(TorchDispatchMode):
    """Counts reads of single numbers, and raises at any other way to make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name == "_local_scalar_dense":
            self.reads += 1
            return args[0].dtype == torch.bool or 1.0
        assert name not in NEEDS_VALUES, f"{name} waits for the device"
        if name == "_to_copy":
            here, there = args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type
            assert here == there, f"a copy from {here} to {there} waits for the device"
        return func(*args, **kwargs)


def on_gpu(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def step(name: str, backbone: str) -> None:
    """A step of two micro-batches in bfloat16 reads one number from the device, at its end."""
    module, data_spec = module_on(name, backbone)
    batch = batch_for(name, config_for(name), data_spec, [0, 1])
    cfg = training.Config(grad_clip=1.0)
    with FakeTensorMode(), Waits() as waits:
        module._apply(on_gpu)
        batches = [{key: on_gpu(value) for key, value in batch.items()} for _ in range(2)]
        params = [p for p in module.parameters() if p.requires_grad]
        totals = training.step(
            module,
            torch.optim.AdamW(params, fused=True),
            iter(batches),
            count=2,
            progress=0.5,
            cfg=cfg,
            seeds=[0, 1],
            autocast=autocast_of(cfg, torch.device("cuda")),
            sync=lambda params: None,
        )
        assert waits.reads == 1, f"{waits.reads} numbers were read from the device"
        for key, value in totals.items():
            wanted = torch.float32 if key == "embeddings_BF" else torch.float64
            assert (value.device.type, value.dtype) == ("cuda", wanted), key
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in params)


def resume(backbone: str) -> None:
    """A run that began on a CPU goes on with everything where a GPU's optimizer and convolutions want it."""
    with tempfile.TemporaryDirectory() as folder:
        crops = crops_dataset(Path(folder), LARGER)
        job = a_job_of(backbone, folder, epochs=1, steps_per_epoch=2, checkpoint_every_steps=1)
        before = LocalLoop(crops, job)
        killed_at(pytest.MonkeyPatch(), before, at_step=1)
        with pytest.MonkeyPatch.context() as patched, FakeTensorMode(allow_non_fake_inputs=True):
            patched.setattr(torch.nn.Module, "to", moved)
            loop = Loop(job, crops.schedule, device="cuda")
            loop.restore()
    assert loop.step == 1
    assert loop.optimizer.defaults["fused"]
    for p in loop.params.values():
        moments = loop.optimizer.state[p]
        assert moments["step"].device.type == moments["exp_avg"].device.type == "cuda"
        assert strides(moments["exp_avg"]) == strides(moments["exp_avg_sq"]) == strides(p)
    assert {value.device.type for value in loop.partial.values()} == {"cuda"}
    last = {p.is_contiguous(memory_format=torch.channels_last_3d) for p in convolutions(loop.method.backbone)}
    assert last == {loop.method.backbone.channels_last}


def strides(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


def moved(module: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's own ``to`` cannot replace a parameter that is fake already."""
    for group in (group for part in module.modules() for group in (part._parameters, part._buffers)):
        for key, tensor in group.items():
            if tensor is None or ("memory_format" in kwargs and tensor.ndim != 5):
                continue
            group[key] = tensor.detach().to(*args, **kwargs)
            if isinstance(tensor, torch.nn.Parameter):
                group[key] = torch.nn.Parameter(group[key], tensor.requires_grad)
    return module


def convolutions(net: torch.nn.Module) -> list[Tensor]:
    """Weights that lie differently in the two layouts."""
    return [p for p in net.parameters() if p.ndim == 5 and p.shape[1] > 1 and p.shape[2:].numel() > 1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    errors = {}
    for task in sys.argv[2:]:
        what, *names = task.split("/")
        try:
            {"step": step, "resume": resume}[what](*names)
        except Exception:
            errors[task] = traceback.format_exc()
    print(json.dumps(errors))
