"""Optimizer steps on CUDA without CUDA, in a process of their own: see test_cuda_steps.py.

The tensors hold no values and say that they are on a GPU; autocast, autograd and the optimizer treat them so. That
shows of what type and on which device everything is, and where the host would wait for the device.

    python tests/fake_cuda.py FAKE_CUDA.so METHOD/NETWORK...
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import traceback
from typing import Any

if __name__ == "__main__":  # before anything imports torch, which looks once for what it gives
    _torch = importlib.util.find_spec("torch")
    assert _torch is not None
    assert _torch.submodule_search_locations is not None
    ctypes.CDLL(f"{_torch.submodule_search_locations[0]}/lib/libtorch_cpu.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(sys.argv[1])

import torch
from test_methods import batch_for, config_for, module_on
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from logonet import training
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


def take_step(name: str, backbone: str) -> None:
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
            lr=1e-3,
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    errors = {}
    for pair in sys.argv[2:]:
        try:
            take_step(*pair.split("/"))
        except Exception:
            errors[pair] = traceback.format_exc()
    print(json.dumps(errors))
