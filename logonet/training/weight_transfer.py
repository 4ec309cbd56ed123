"""Pretrained weights into a network, with a report of what went where.

Loading what fits and passing over the rest hides a wrong prefix: everything is passed over and training
starts from scratch. So the report counts, and too little of the encoder is an error.

Shapes: O output channels, C input channels, XYZ the axes of a kernel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from logonet import networks
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.networks import Triple, under
from logonet.networks._shared import resized_positions

if TYPE_CHECKING:
    import pandas as pd

Action = Literal["matched", "adapted", "skipped", "new"]
ACTIONS: tuple[Action, ...] = get_args(Action)
SHOWN = 3  # names in a message
MISSING, CLASSIFIER, OUTSIDE = "not in the source", "the classifier", "outside the encoder"
EXPECTED = {MISSING, CLASSIFIER, OUTSIDE}  # why a tensor of the network is new, where shapes do not differ


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        action: "matched" (the network's tensor is now the source's), "adapted" (so it is, for another number of
            input channels or another grid of tokens), "skipped" (a tensor of the source found no place), "new" (a
            tensor of the network keeps its initial value).
        params: parameters in it; 0 for buffers.
        why: of what is adapted, skipped or new.
    """

    name: str
    module: str
    action: Action
    params: int
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `transfer` did.

    Attributes:
        source: where the weights are from.
        rows: every tensor of the network, then those of the source that found no place.
        encoder_params: parameters of the network's encoder.
        encoder_share: the share of these that is matched or adapted.
    """

    source: str
    rows: tuple[Row, ...]
    encoder_params: int
    encoder_share: float

    def totals(self) -> dict[str, dict[str, int]]:
        """Per action: the number of tensors and of parameters."""
        of = {action: [row for row in self.rows if row.action == action] for action in ACTIONS}
        return {a: {"tensors": len(rows), "params": sum(r.params for r in rows)} for a, rows in of.items()}

    def by_module(self) -> pd.DataFrame:
        """One row per module (the index): its number of tensors, and the parameters of each action."""
        import pandas as pd

        rows = pd.DataFrame([asdict(row) for row in self.rows])
        params = rows.pivot_table("params", "module", "action", aggfunc="sum", sort=False)
        params = params.reindex(columns=list(ACTIONS)).fillna(0).astype(int)
        params.insert(0, "tensors", rows.groupby("module").size())
        return params.rename_axis(columns=None)

    def summary(self) -> str:
        """Lines for a log. What could not be taken over as it is has a line of its own."""
        text = "{} {tensors} tensors ({params:,} parameters)"
        totals = ", ".join(text.format(action, **count) for action, count in self.totals().items())
        tellable = [row for row in self.rows if row.action in ("adapted", "new") and row.why not in EXPECTED]
        differing = [f"\n{row.action}: {row.name}, {row.why}" for row in tellable]
        return (
            f"{self.source}: {_percent(self.encoder_share)} of the encoder's {self.encoder_params:,} parameters\n"
            f"{totals}\n{self.by_module().to_string()}{''.join(differing)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "totals": self.totals()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """What `to_dict` gave."""
        rows = tuple(Row(**row) for row in values["rows"])
        return cls(**{**{k: v for k, v in values.items() if k != "totals"}, "rows": rows})


def transfer(
    net: Any,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    min_encoder_share: float = 0.95,
    parts: Literal["all", "encoder"] = "all",
    positions: Mapping[str, Triple] = MappingProxyType({}),
) -> Report:
    """Load ``weights`` into the backbone ``net``, in place: all of them that fit, or none when it fails.

    A tensor fits under its own name and with its own shape, and is then equal bit for bit (where types differ,
    converted). The first convolutions on the crop may differ in input channels, see `other_channels`. Vectors of
    positions (``net.positions``) are interpolated to the network's own grid of tokens. The classifier
    (``net.head_prefixes``) always stays fresh: its outputs mean something else.

    Args:
        source: names the weights in messages and in the report.
        min_encoder_share: refuse weights that cover less of the encoder's parameters.
        parts: "encoder" leaves everything else fresh.
        positions: of the network that the weights were trained with. Grids that it does not name are taken to be
            cubes, or the network's own where the number of tokens is the same.

    Raises:
        UserError: too little of the encoder is covered, or a weight is not finite.
    """
    own: dict[str, Tensor] = net.state_dict()
    params = {name: p.numel() for name, p in net.named_parameters()}
    encoder = [name for name in own if under(name, net.encoder_prefixes)]
    channels = _channels(net, weights)
    loaded: dict[str, Tensor] = {}
    rows: list[Row] = []

    def add(name: str, action: Action, size: int, why: str = "") -> None:
        module = _module(name, (*net.encoder_prefixes, *net.head_prefixes))
        rows.append(Row(name, module, action, size, why))

    unused: dict[str, str] = {}  # tensors of the source that find no place, and why not
    for name, tensor in own.items():
        size, given = params.get(name, 0), weights.get(name)
        if given is None:
            add(name, "new", size, MISSING)
        elif excuse := _excluded(name, net, parts):
            add(name, "new", size, excuse)
            unused[name] = excuse
        elif (placed := _other_positions(name, given, net, positions)) is not None:
            loaded[name], why = placed
            add(name, "adapted", size, why)
        elif given.shape == tensor.shape:
            add(name, "matched", size)
            loaded[name] = given
        elif _differ_in_channels(given, tensor, channels):
            why = f"{given.shape[1]} input channels in the source, {tensor.shape[1]} here"
            add(name, "adapted", size, why)
            loaded[name] = other_channels(given, tensor.shape[1])
        else:
            unused[name] = f"{_size(given)} in the source, {_size(tensor)} here"
            add(name, "new", size, unused[name])
    for name in weights:
        if name not in loaded:
            buffer = name in own and name not in params
            size = 0 if buffer else weights[name].numel()
            add(name, "skipped", size, unused.get(name, "not in the network"))

    total = sum(params.get(name, 0) for name in encoder)
    assert total, "the encoder prefixes cover no parameter"
    share = sum(params.get(name, 0) for name in encoder if name in loaded) / total
    if share < min_encoder_share:
        raise UserError(
            f"{source} covers {_percent(share)} of the encoder's parameters and {_percent(min_encoder_share)} are "
            f"asked for (min_encoder_share); {_diagnosis(encoder, own, weights)}"
        )
    for name, tensor in loaded.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{source}: '{name}' holds NaN or infinite values, so the training that wrote it had diverged; "
                "give weights of an earlier step"
            )
    net.load_state_dict({**own, **loaded})
    return Report(source, tuple(rows), total, share)


def prove(backbone: Component, in_channels: int, num_classes: int, weights: Mapping[str, Tensor]) -> Report:
    """Show, before any training, that what pretraining will write is what finetuning can load.

    A fresh segmentation network takes ``weights`` the way finetuning will, through the bytes of a safetensors
    file, and must then hold the whole encoder, buffers too, bit for bit. Torch's random state stays as it was.

    Args:
        backbone: the network that pretraining trains.
        in_channels: of the crops that pretraining sees.
        num_classes: K of the segmentation; any will do.
        weights: the pretraining backbone's state dict.

    Raises:
        UserError: anything of the encoder would be lost.
    """
    from safetensors.torch import load, save

    name = backbone.name
    with torch.random.fork_rng(devices=[]):
        net: Any = networks.from_component(backbone, in_channels, num_classes)
    # clone: safetensors refuses tensors that share memory
    written = save({key: w.detach().cpu().contiguous().clone() for key, w in weights.items()})
    source = f"what pretraining of '{name}' writes"
    report = transfer(net, load(written), source=source, min_encoder_share=1.0)
    encoder = {key: t for key, t in net.state_dict().items() if under(key, net.encoder_prefixes)}
    lost = [key for key, t in encoder.items() if not (key in weights and _same_bits(t, weights[key]))]
    if lost:
        raise UserError(
            f"backbone '{name}' does not hand its encoder over: {_some(lost)} would not arrive in a segmentation "
            "network as they left; give its file a state dict that is the same for every number of classes"
        )
    return report


def other_channels(weight_OCXYZ: Tensor, num_channels: int) -> Tensor:
    """A convolution's weight for another number of input channels, (O, num_channels, X, Y, Z).

    An image that is the same in every channel gives the same features as before: a multiple of the channels
    repeats them, any other number takes their average, and either is scaled to the same sum.
    """
    before = weight_OCXYZ.shape[1]
    if num_channels % before == 0:
        repeated = weight_OCXYZ.repeat(1, num_channels // before, 1, 1, 1)
    else:
        repeated = weight_OCXYZ.mean(1, keepdim=True).repeat(1, num_channels, 1, 1, 1)
    return repeated * (before / num_channels)


def _channels(net: Any, weights: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Input channels in the source and here, by the encoder's first convolution, if that one tells."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv3d) and module.groups == 1 and under(name, net.encoder_prefixes):
            given = weights.get(f"{name}.weight")
            return None if given is None or given.ndim != 5 else (given.shape[1], module.in_channels)
    return None


def _differ_in_channels(given: Tensor, tensor: Tensor, channels: tuple[int, int] | None) -> bool:
    # Only the input's own pair of numbers: elsewhere other widths mean another network.
    return (
        given.ndim == tensor.ndim == 5
        and (given.shape[1], tensor.shape[1]) == channels
        and (given.shape[0], *given.shape[2:]) == (tensor.shape[0], *tensor.shape[2:])
    )


def _other_positions(
    name: str, given: Tensor, net: Any, known: Mapping[str, Triple]
) -> tuple[Tensor, str] | None:
    """Vectors of positions on the network's own grid, and what happened; None where there is nothing to interpolate."""
    own: Triple | None = getattr(net, "positions", {}).get(name)
    if own is None or given.ndim != 3 or given.shape[2] != net.get_parameter(name).shape[2]:
        return None
    count, side = given.shape[1], round(given.shape[1] ** (1 / 3))
    grid = known.get(name) or (own if math.prod(own) == count else (side, side, side))
    if grid == own or math.prod(grid) != count:
        return None
    before, after = ("x".join(map(str, tokens)) for tokens in (grid, own))
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    return resized_positions(wide, grid, own), f"positions of {before} tokens interpolated to {after}"


def _excluded(name: str, net: Any, parts: str) -> str:
    """Why this tensor is never loaded; "" when it may be."""
    if under(name, net.head_prefixes):
        return CLASSIFIER
    return "" if parts == "all" or under(name, net.encoder_prefixes) else OUTSIDE


def _diagnosis(encoder: Collection[str], own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What is wrong with weights that do not fit the encoder, and the mend."""
    wrong = [name for name in encoder if name in weights and weights[name].shape != own[name].shape]
    missing = [name for name in encoder if name not in weights]
    extra_names = _some(n for n in weights if n not in own)
    names = f"the encoder wants {_some(missing)} and the source has {extra_names}"
    if extra := _common_prefix(weights, missing):
        return f"{names}: its names fit once '{extra}' is taken off their front, so rename them so"
    if extra := _common_prefix([name for name in own if name not in weights], weights):
        return f"{names}: its names fit once '{extra}' is put before them, so rename them so"
    if wrong:
        sizes = _some(f"{n} {_size(weights[n])} instead of {_size(own[n])}" for n in wrong)
        more = f" ({names})" if missing else ""
        return f"shapes differ, {sizes}; build the backbone with the options of the source{more}"
    return f"{names}; give weights of the same backbone"


def _common_prefix(longer: Collection[str], shorter: Collection[str]) -> str:
    """The dotted prefix that makes at least half of ``shorter`` into names of ``longer``; "" for none."""
    ends, prefixes = set(shorter), Counter[str]()
    for name in longer:
        for dot in (i for i, letter in enumerate(name) if letter == "."):
            if name[dot + 1 :] in ends:
                prefixes[name[: dot + 1]] += 1
    prefix, count = max(prefixes.items(), key=lambda item: item[1], default=("", 0))
    return prefix if 2 * count >= len(ends) else ""


def _module(name: str, declared: Iterable[str]) -> str:
    """Where a tensor is counted: the shortest path of its name inside which no declared part lies."""
    parts = name.split(".")
    paths = [".".join(parts[:n]) for n in range(1, len(parts))] or [name]
    return next((p for p in paths if not any(d.rstrip(".").startswith(f"{p}.") for d in declared)), paths[-1])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (t.detach().cpu().contiguous().reshape(-1) for t in (a, b))
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more or "none"


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _percent(share: float) -> str:
    # Down, not to the nearest: 99.99 % must not read as everything.
    return f"{int(share * 1000) / 10:.1f} %"
