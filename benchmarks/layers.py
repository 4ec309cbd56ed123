"""What each layer of a network costs, against the least it could: where the time goes above the floor.

    OMP_NUM_THREADS=2 python benchmarks/layers.py                      # LoGoNet, one forward pass at 96^3
    OMP_NUM_THREADS=2 python benchmarks/layers.py --backward           # in training, forward and backward
    OMP_NUM_THREADS=2 python benchmarks/layers.py --backbone swinunetr

A layer is a module without children, or an operation outside of one. Its seconds are those of every operation that
it sets off, each timed alone, on the CPU; the least of the repeats. Its floor is the longer of two times: its
multiply-accumulates at the machine's best measured rate (a large matrix product or a large dense convolution,
whichever is faster), and its bytes (input, output and weights, each once) at the measured rate of a large copy. Copies
that a convolution makes for its own sake are part of it and have no floor. A small map stays in cache and may beat
the copy's rate, so a layer can lie below its floor.

In the backward pass the floor has twice the multiply-accumulates (once for inputs that need no gradient); its bytes are
the gradients of output and input and, where the derivative needs it, the input.

Large layers far above a floor of bytes write to memory that is new to the process: the system clears each page at
first touch, which the large copy, between pages in use, does not pay.

On a machine that does other work too, --processor-time with OMP_NUM_THREADS=1 leaves out the waiting.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _measure import machine, markdown, sentence
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from logonet import networks
from logonet.inference.model import folded

CONVS = (nn.Conv3d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm3d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm)
# Of operations outside of a module without children, by the beginning of their name.
KINDS = {
    "convolution": "convolution",
    "leaky_relu": "activation",
    "gelu": "activation",
    "relu": "activation",
    "prelu": "activation",
    "softmax": "activation",
    "_softmax": "activation",
    "upsample": "upsample",
    "bmm": "matrix product",
    "mm": "matrix product",
    "addmm": "matrix product",
    "native_layer_norm": "norm",
    "native_batch_norm": "norm",
    "cat": "concatenate",
    "roll": "copy",
    "clone": "copy",
    "copy_": "copy",
    "constant_pad_nd": "copy",
    "_to_copy": "copy",
}
COPIES = ("copy", "concatenate")

Clock = Callable[[], float]


@dataclass
class Layer:
    path: str
    kind: str
    macs: int = 0
    bytes: int = 0
    backward_macs: int = 0
    backward_bytes: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0


class Recorder(TorchDispatchMode):
    """Times every operation and books it on the layer that set it off.

    Forward, that layer is the innermost module that runs. Backward, torch tells the node of the graph that runs;
    nodes are numbered as they are made, just before the operation they belong to.
    """

    def __init__(self, net: nn.Module, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.layers: list[Layer] = []
        self.stack: list[tuple[str, nn.Module]] = []
        self.open: Layer | None = None  # of the module without children that runs
        self.of_node: dict[int, Layer] = {}
        self.hooks: list[Any] = []
        for path, module in net.named_modules():
            self.hooks += [
                module.register_forward_pre_hook(self._enter(path)),
                module.register_forward_hook(self._leave),
            ]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _enter(self, path: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            self.stack.append((path, module))
            if not any(True for _ in module.children()):
                self.open = Layer(path, kind_of_module(module))
                self.layers.append(self.open)

        return enter

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        self.stack.pop()
        layer, self.open = self.open, None
        if layer is None:
            return
        if isinstance(module, CONVS):  # whatever route it took
            layer.macs = conv_macs(module, args[0], out)
            layer.backward_macs = layer.macs * (1 + args[0].requires_grad)
        inputs, outputs = size_bytes(args), size_bytes(out)
        weights = sum(p.nbytes for p in module.parameters())
        layer.bytes = inputs + outputs + weights
        layer.backward_bytes = backward_bytes(layer.kind, inputs, outputs) + 2 * weights

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        start_s = self.clock()
        out = func(*args, **kwargs)
        seconds = self.clock() - start_s
        node = torch._C._current_autograd_node()
        if node is not None:
            layer = self.of_node.get(node._sequence_nr())
            if layer is None:  # gradients that are added up
                layer = Layer("", "gradients of weights")
                self.of_node[node._sequence_nr()] = layer
                self.layers.append(layer)
            layer.backward_s += seconds
            return out
        layer = self.open or self._operation(func, args, out)
        layer.forward_s += seconds
        if not isinstance(self.stack[-1][1] if self.stack else None, CONVS):
            count = flop_registry.get(func._overloadpacket)
            macs = count(*args, **kwargs, out_val=out) // 2 if count else 0
            layer.macs += macs
            layer.backward_macs += 2 * macs
        # The first operation after a node was made is its own; later ones make none, or one of their own.
        self.of_node.setdefault(torch.autograd._get_sequence_nr() - 1, layer)
        return out

    def _operation(self, func: Any, args: Sequence[Any], out: Any) -> Layer:
        """A layer of its own for an operation outside of the modules without children."""
        name = func._schema.name.split("::")[1]
        kind = next((kind for start, kind in KINDS.items() if name.startswith(start)), "element-wise")
        path = self.stack[-1][0] if self.stack else ""
        layer = Layer(path, kind)
        if not is_view(func, args, out):
            inputs, outputs = size_bytes(args), size_bytes(out)
            layer.bytes = inputs + outputs
            layer.backward_bytes = backward_bytes(kind, inputs, outputs)
        self.layers.append(layer)
        return layer


def kind_of_module(module: nn.Module) -> str:
    if isinstance(module, CONVS):
        kernel = "x".join(map(str, module.kernel_size))
        if len(set(module.kernel_size)) == 1:
            kernel = f"{module.kernel_size[0]}^3"
        if isinstance(module, nn.ConvTranspose3d):
            return f"transposed conv {kernel}"
        name = "depthwise" if module.groups > 1 else "conv"
        strided = f", stride {module.stride[0]}" if module.stride[0] > 1 else ""
        dilated = f", dilation {module.dilation[0]}" if module.dilation[0] > 1 else ""
        if kernel == "1^3" and module.groups == 1:
            return f"pointwise{strided}"
        return f"{name} {kernel}{strided}{dilated}"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, nn.Linear):
        return "matrix product"
    if isinstance(module, nn.Upsample):
        return "upsample"
    if isinstance(module, nn.GELU | nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.Softmax):
        return "activation"
    return "element-wise"


def conv_macs(conv: nn.Conv3d | nn.ConvTranspose3d, x: Tensor, out: Tensor) -> int:
    places = x if isinstance(conv, nn.ConvTranspose3d) else out
    return places[:, 0].numel() * conv.weight.numel()


def size_bytes(tree: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor))


def backward_bytes(kind: str, inputs: int, outputs: int) -> int:
    if kind in COPIES:  # views of the gradient will do
        return 0
    return outputs + inputs * (1 if kind == "upsample" else 2)  # which is linear and does not need its input


def is_view(func: Any, args: Sequence[Any], out: Any) -> bool:
    """Whether nothing was moved: the output lies where an input does, and the operation is not in place."""
    if func._schema.is_mutable:
        return False
    places = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
    return any(t.untyped_storage().data_ptr() in places for t in tree_leaves(out) if isinstance(t, Tensor))


# ---- the machine ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Of this machine, at their best."""

    product_macs_per_s: float
    conv_macs_per_s: float
    copy_bytes_per_s: float  # read and written

    @property
    def macs_per_s(self) -> float:
        return max(self.product_macs_per_s, self.conv_macs_per_s)

    def floor_s(self, macs: int, num_bytes: int) -> float:
        return max(macs / self.macs_per_s, num_bytes / self.copy_bytes_per_s)


def rates(repeats: int, clock: Clock) -> Rates:
    side, width = 48, 64
    a, b = torch.rand(2048, 2048), torch.rand(2048, 2048)
    source, target = torch.rand(2**26), torch.rand(2**26)
    x = torch.rand(1, width, side, side, side).contiguous(memory_format=torch.channels_last_3d)
    conv = nn.Conv3d(width, width, 3, padding=1)
    with torch.no_grad():
        product_s = least_s(lambda: torch.mm(a, b), repeats, clock)
        conv_s = least_s(lambda: conv(x), repeats, clock)
        copy_s = least_s(lambda: target.copy_(source), repeats, clock)
    return Rates(2048**3 / product_s, 27 * width**2 * side**3 / conv_s, 2 * source.nbytes / copy_s)


def least_s(call: Callable[[], Any], repeats: int, clock: Clock) -> float:
    least = math.inf
    for _ in range(repeats + 1):
        start_s = clock()
        call()
        least = min(least, clock() - start_s)
    return least


# ---- the measurement -----------------------------------------------------------------------------


def loss_of(out: Any) -> Tensor:
    loss = torch.stack([logits.square().mean() for logits in (out.logits, *out.deep)]).sum()
    return loss if out.aux_loss is None else loss + out.aux_loss.square()


def run(net: Any, x: Tensor, backward: bool) -> None:
    net.train(backward)
    net.zero_grad()
    with torch.set_grad_enabled(backward):
        out = net(x)
        if backward:
            loss_of(out).backward()


def record(net: Any, x: Tensor, backward: bool, repeats: int, clock: Clock) -> list[Layer]:
    """Every layer in the order of the forward pass, with the least seconds of the repeats."""
    best: list[Layer] = []
    for _ in range(repeats):
        recorder = Recorder(net, clock)
        try:
            with recorder:
                run(net, x, backward)
        finally:
            recorder.close()
        best = best or recorder.layers
        assert [(a.path, a.kind) for a in best] == [(b.path, b.kind) for b in recorder.layers]
        for kept, new in zip(best, recorder.layers):
            kept.forward_s = min(kept.forward_s, new.forward_s)
            kept.backward_s = min(kept.backward_s, new.backward_s)
    return best


def rows_of(layers: Sequence[Layer], machine_rates: Rates, backward: bool, by: str) -> list[dict[str, Any]]:
    """Seconds and floors added up by a layer's ``kind`` or ``path``, the largest gap first."""
    rows: dict[str, dict[str, Any]] = {}
    for layer in layers:
        name = layer.kind if by == "kind" else f"{layer.path or '(the network)'}: {layer.kind}"
        row = rows.setdefault(
            name, {"name": name, "calls": 0, "seconds": 0.0, "macs": 0, "bytes": 0, "floor_s": 0.0}
        )
        macs, num_bytes = layer.macs, layer.bytes
        if backward:
            macs, num_bytes = layer.backward_macs, layer.backward_bytes
        row["calls"] += bool(macs or num_bytes)  # and neither views nor a convolution's own copies
        row["seconds"] += layer.backward_s if backward else layer.forward_s
        row["macs"] += macs
        row["bytes"] += num_bytes
        row["floor_s"] += machine_rates.floor_s(macs, num_bytes)
    return sorted(rows.values(), key=lambda row: row["floor_s"] - row["seconds"])


def table(rows: list[dict[str, Any]], top: int | None = None) -> str:
    """The first ``top`` rows and the total of all."""
    columns = ["layers", "calls", "ms", "share", "GMAC", "MB moved", "floor ms", "times", "gap ms"]
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in rows[0] if key != "name"}
    lines = []
    for row in [*rows[:top], {"name": "total", **total}]:
        ms, floor_ms = 1e3 * row["seconds"], 1e3 * row["floor_s"]
        lines.append(
            [
                row["name"],
                str(row["calls"]),
                f"{ms:.1f}",
                f"{row['seconds'] / total['seconds']:.1%}",
                f"{row['macs'] / 1e9:.2f}",
                f"{row['bytes'] / 1e6:.0f}",
                f"{floor_ms:.1f}",
                f"{ms / floor_ms:.1f}" if floor_ms else "-",
                f"{ms - floor_ms:.1f}",
            ]
        )
    return markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=networks.names(), default="logonet")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--backward", action="store_true", help="training mode, and the backward pass too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--top", type=int, default=15, help="single layers to list")
    parser.add_argument(
        "--processor-time", action="store_true", help="of all threads, in place of the wall's"
    )
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    about = machine()
    torch.manual_seed(0)
    options = {"img_size": (args.size,) * 3} if args.backbone in ("nnformer", "unetr", "segresnetvae") else {}
    net = networks.build(args.backbone, 1, 14, **options)
    net = net if args.backward else folded(net)  # as a Predictor runs it
    x = torch.rand(1, 1, *(args.size,) * 3)
    before = rates(2 * args.repeats, clock)
    layers = record(net, x, args.backward, args.repeats, clock)
    whole_s = least_s(lambda: run(net, x, args.backward), 1, clock)
    after = rates(2 * args.repeats, clock)
    best = Rates(*(max(a, b) for a, b in zip(vars(before).values(), vars(after).values())))

    print(f"{args.backbone}, {args.size}^3, 14 classes, batch 1, float32; {sentence(about)}.")
    print(
        f"The machine at its best: {best.product_macs_per_s / 1e9:.0f} G multiply-accumulates a second in a matrix "
        f"product, {best.conv_macs_per_s / 1e9:.0f} in a dense 3^3 convolution; "
        f"{best.copy_bytes_per_s / 1e9:.1f} GB/s read and written in a copy."
    )
    passes = {"forward": False, **({"backward": True} if args.backward else {})}
    kinds = {name: rows_of(layers, best, backward, "kind") for name, backward in passes.items()}
    singles = {name: rows_of(layers, best, backward, "path") for name, backward in passes.items()}
    mode = "training" if args.backward else "evaluation"
    for name in passes:
        print(f"\n{name} ({mode}), by kind:\n\n{table(kinds[name])}")
        print(f"\nThe {args.top} layers furthest above their floor:\n\n{table(singles[name], args.top)}")
    layers_s = sum(layer.forward_s + layer.backward_s for layer in layers)
    print(
        f"\nThe layers add up to {layers_s:.2f} s; the whole, run without timing them, takes {whole_s:.2f} s."
    )
    summary = {
        "backbone": args.backbone,
        "size": args.size,
        "mode": mode,
        "clock": clock.__name__,
        "rates": vars(best),
    }
    print(json.dumps({"benchmark": "layers", **about, **summary, "whole_s": whole_s, "kinds": kinds}))


if __name__ == "__main__":
    main()
