"""A trained segmentation network as a folder: ``config.json`` and ``weights.safetensors``, nothing pickled.

The folder is all that is needed to run the network on a scan: its layers, how scans are prepared for it and what its
output channels mean.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from logonet import networks
from logonet.core import config
from logonet.core.config import Component, Positive
from logonet.core.errors import UserError
from logonet.data import classes, volume
from logonet.data.preprocessing import Percentile, Preprocessing
from logonet.storage import object_store

CONFIG_FILE, WEIGHTS_FILE = FILES = "config.json", "weights.safetensors"
MODALITIES = {"CT", "MR", "mixed", *volume.NORMALISATIONS}
MAX_VALUE = 255  # label maps are uint8


@dataclass(frozen=True)
class Spec(Preprocessing):
    """The content of ``config.json``.

    backbone: ``{"name": ..., **options}``.
    in_channels: C of the scans.
    classes: name of each output channel; the first is "background".
    label_values: the value that each output channel is written as, 0 to 255.
    size_vox: the window that the network was trained on, along R, A, S.
    spacing_mm, window_hu, mr_percentiles: see `Preprocessing`.
    modality: what it was trained on: "CT", "MR", ... (see `volume.modality`), or "mixed".
    channels: the last words of the names of a case's files, where channels were chosen so.
    regions: the classes of each region, where the network's outputs are regions that overlap and not classes.
    region_values: what each region is written as in a label map, those written later on top.
    members: the names of the datasets' classes that were merged into, or renamed to, each class; empty: none were.
    ensemble: of a model of several networks all of them; ``backbone`` is then the first.
    largest_component: classes, or regions, of which the largest connected component alone is kept in a label map.

    Raises:
        UserError: for values that contradict each other.
    """

    backbone: Component
    in_channels: int
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    size_vox: tuple[int, int, int]
    modality: str
    # said by every model, not left to a default
    spacing_mm: tuple[Positive, Positive, Positive] | None = field(kw_only=True)
    window_hu: tuple[float, float] = field(kw_only=True)
    mr_percentiles: tuple[Percentile, Percentile] = field(kw_only=True)
    members: dict[str, tuple[str, ...]] = field(
        default_factory=dict, kw_only=True, metadata=config.OMIT_DEFAULT
    )
    channels: tuple[str, ...] = field(default=(), kw_only=True, metadata=config.OMIT_DEFAULT)
    regions: dict[str, tuple[str, ...]] = field(
        default_factory=dict, kw_only=True, metadata=config.OMIT_DEFAULT
    )
    region_values: tuple[int, ...] = field(default=(), kw_only=True, metadata=config.OMIT_DEFAULT)
    ensemble: tuple[Component, ...] = field(default=(), kw_only=True, metadata=config.OMIT_DEFAULT)
    largest_component: tuple[str, ...] = field(default=(), kw_only=True, metadata=config.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        Component.convert(self, "backbone")
        super().__post_init__()
        if not self.backbone.name:
            raise UserError(f"backbone has no name; it must be one of {', '.join(networks.names())}")
        if self.in_channels < 1:
            raise UserError(f"in_channels is {self.in_channels}; it must be at least 1")
        if len(self.classes) < 2 or self.classes[0] != "background":
            raise UserError(f"classes are {list(self.classes)}; give background and at least one more")
        values = self.label_values
        if len(values) != len(self.classes):
            raise UserError(f"{len(values)} label_values for {len(self.classes)} classes; give one each")
        if len(set(values)) != len(values) or not all(0 <= value <= MAX_VALUE for value in values):
            raise UserError(f"label_values are {list(values)}; set distinct ones from 0 to {MAX_VALUE}")
        if strange := {m for members in self.regions.values() for m in members} - set(self.classes):
            raise UserError(
                f"regions hold '{min(strange)}', which is none of the classes {list(self.classes)}"
            )
        if len(self.region_values) != len(self.regions) or len(self.regions) > classes.MAX_REGIONS:
            given = f"{len(self.region_values)} region_values for {len(self.regions)} regions"
            raise UserError(f"{given}; give one each, and at most {classes.MAX_REGIONS}")
        for name in self.largest_component:
            if name not in self.scored:
                raise UserError(config.unknown("class of largest_component", name, self.scored))
        if not {*self.modality.split(volume.JOIN)} <= MODALITIES:
            raise UserError(
                f"modality is '{self.modality}'; it must be one of {', '.join(sorted(MODALITIES))}"
            )

    @property
    def components(self) -> tuple[Component, ...]:
        """The networks, of an ensemble several."""
        return self.ensemble or (self.backbone,)

    @property
    def num_outputs(self) -> int:
        """Channels of the logits."""
        return len(self.regions) or len(self.classes)

    @property
    def scored(self) -> dict[str, tuple[int, ...]]:
        """What scores are of: name -> its values in label maps, of each class but background, or of each region."""
        value_of = dict(zip(self.classes, self.label_values))
        if self.regions:
            return {name: tuple(value_of[m] for m in members) for name, members in self.regions.items()}
        return {name: (value,) for value, name in self.foreground.items()}

    @property
    def written(self) -> np.ndarray:
        """uint8 label values of what a voxel is found to be: of a class index, or of the bits of its regions."""
        if self.regions:
            return classes.written_as(self.region_values)
        return np.array(self.label_values, np.uint8)

    @property
    def one_modality(self) -> str:
        """What a scan is if nothing else is known of it; "" for a model of several modalities."""
        return "" if self.modality == "mixed" else self.modality

    @property
    def foreground(self) -> dict[int, str]:
        """Label value -> class, of all but the value 0."""
        return {value: name for value, name in zip(self.label_values, self.classes) if value}


def files(spec: Spec, weights: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The folder's files by name; equal models give equal bytes."""
    from safetensors.torch import save

    tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
    text = json.dumps(config.to_dict(spec), indent=2, sort_keys=True) + "\n"
    return {CONFIG_FILE: text.encode(), WEIGHTS_FILE: save(tensors)}


def read(folder_uri: str) -> tuple[Spec, dict[str, torch.Tensor]]:
    """What `files` has made, from a local folder or s3://.

    Raises:
        UserError: naming the file that is missing, damaged or of another kind.
    """
    blobs = {n: object_store.read(object_store.join(folder_uri, n)) for n in FILES}
    return parse(blobs, folder_uri)


def parse(blobs: Mapping[str, bytes], where: str = "") -> tuple[Spec, dict[str, torch.Tensor]]:
    """The same of a folder's files by name; ``where`` is the folder, for errors.

    Raises:
        UserError: naming the file that is damaged or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    config_name, weights_name = (object_store.join(where, n) if where else n for n in FILES)
    try:
        spec = config.from_dict(Spec, config.parse_json(blobs[CONFIG_FILE]))
    except UserError as err:
        raise UserError(f"{config_name}: {err}") from None
    except ValueError as err:
        raise UserError(f"{config_name} is not valid JSON ({err}); fetch the model again") from None
    try:
        return spec, load(blobs[WEIGHTS_FILE])
    except (SafetensorError, KeyError, ValueError) as err:
        raise UserError(f"{weights_name} is not a whole safetensors file ({err}); fetch it again") from None


class Ensemble(nn.ModuleList):
    """Networks whose answers are averaged; its ``logits`` are the mean of their probabilities.

    Of regions less a half, so that a region is where its own is above 0, as with logits.
    """

    def __init__(self, nets: Sequence[nn.Module], regions: bool) -> None:
        super().__init__(nets)
        self.regions = regions

    def forward(self, x_BCXYZ: torch.Tensor) -> networks.SegOut:
        total: torch.Tensor | None = None
        for net in self:  # one at a time, so that no more than one network's answer is held beside the sum
            logits = net(x_BCXYZ).logits.float()
            found = logits.sigmoid() if self.regions else logits.softmax(1)
            total = found if total is None else total.add_(found)
        assert total is not None
        mean = total / len(self)
        return networks.SegOut(mean - 0.5 if self.regions else mean, [], None)


def ensemble(
    models: Sequence[tuple[Spec, Mapping[str, torch.Tensor]]],
) -> tuple[Spec, dict[str, torch.Tensor]]:
    """One model whose answer is the mean of the probabilities of ``models``, which may be of several networks.

    Raises:
        UserError: one is an ensemble itself, or they differ in anything but their networks.
    """
    specs = [spec for spec, _ in models]
    if any(spec.ensemble for spec in specs):
        raise UserError("a member of the ensemble is an ensemble itself; name its members instead")
    first, *others = (config.to_dict(replace(spec, backbone=specs[0].backbone)) for spec in specs)
    for number, other in enumerate(others, 2):
        for key in sorted(first | other):
            if first.get(key) != other.get(key):
                differ = f"members 1 and {number} of the ensemble differ in {key}"
                raise UserError(f"{differ} ({first.get(key)} and {other.get(key)}); only networks may differ")
    weights = {f"{i}.{name}": w for i, (_, own) in enumerate(models) for name, w in own.items()}
    return replace(specs[0], ensemble=tuple(spec.backbone for spec in specs)), weights


def network(spec: Spec) -> nn.Module:
    """A fresh network of the model, or the `Ensemble` of its networks."""
    return assemble(spec.components, spec.in_channels, spec.num_outputs, bool(spec.regions))


def assemble(parts: Sequence[Component], in_channels: int, num_outputs: int, regions: bool) -> nn.Module:
    """A fresh network of each of ``parts``; the `Ensemble` of them where there are several."""
    nets = [networks.from_component(part, in_channels, num_outputs) for part in parts]
    return nets[0] if len(nets) == 1 else Ensemble(nets, regions)


def build(spec: Spec, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The network with exactly these weights, on the CPU, in eval mode.

    Raises:
        UserError: when the backbone does not exist or cannot take ``size_vox``, or the weights are not
            its own or not finite.
    """
    for backbone in (part.resolve(networks.config, "backbone") for part in spec.components):
        networks.check_size(backbone.name, backbone.config, spec.size_vox)
    net = network(spec)
    try:
        net.load_state_dict(dict(weights), strict=True)
    except RuntimeError as err:  # one line per tensor
        lines = [" ".join(line.split()) for line in str(err).splitlines()[1:]]
        raise UserError(
            f"{WEIGHTS_FILE} does not fit the backbone '{spec.backbone.name}' of {CONFIG_FILE}: {lines[0][:300]}"
            f"{f' (and {len(lines) - 1} more)' if len(lines) > 1 else ''}; take both files from one model"
        ) from None
    for key, tensor in net.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{WEIGHTS_FILE}: '{key}' is not finite: its training diverged; use another")
    return net.eval()


def folded(net: nn.Module) -> nn.Module:
    """A copy of ``net``, in eval mode, whose convolutions include the batch norms that follow them in a Sequential.

    Answers are the same to rounding; a pass over memory for each batch norm is spared.
    """
    net = copy.deepcopy(net).eval()
    for module in list(net.modules()):
        for (home, name), (next_home, next_name) in itertools.pairwise(_steps(module)):
            conv, norm = getattr(home, name), getattr(next_home, next_name)
            if isinstance(conv, _ConvNd) and isinstance(norm, _BatchNorm):
                transposed = isinstance(conv, _ConvTransposeNd)
                setattr(home, name, fuse_conv_bn_eval(conv, norm, transposed))
                setattr(next_home, next_name, nn.Identity())
    return net


def _steps(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that a Sequential runs one after the other, those of Sequentials in it too: owner and name."""
    if type(module).forward is nn.Sequential.forward:
        for name, child in module._modules.items():
            inner = list(_steps(child)) if child is not None else []
            yield from inner or [(module, name)]
