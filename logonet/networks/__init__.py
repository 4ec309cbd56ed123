"""Networks that turn a crop into features and logits. One file each; the file name is the network's name.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes (Z is the slice axis), xyz those
of its tokens.

**The contract.** A network is a module of this package whose name does not begin with ``_``. There is no list to
add it to: `names` looks into the package's ``__path__``. Users choose it under the config key ``backbone``.

The file defines what `NetworkFile` says: ``Config``, ``TINY``, ``size_multiple`` and ``build``. Two options of a
``Config`` have a meaning that `check_size` knows: ``img_size`` is the only crop size that the network takes, and a
``norm`` that begins with "instance" needs more than one voxel at the coarsest level.

What ``build`` returns is a `Network`. A network that cuts the crop into tokens can be a `TokenNetwork`, for methods
that mask tokens. It may lack either of ``encode_hidden`` and ``encode_visible``.

A network knows nothing of methods. Tests run over `names`, so adding a file is enough to have it tested.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, get_args, get_type_hints

import torch
from torch import Tensor, nn

from logonet.core.config import Component, from_dict, unknown
from logonet.core.errors import UserError
from logonet.networks._bf16 import mend_autocast

Triple = tuple[int, int, int]
OPTIONAL = ("encode_hidden", "encode_visible")


class SegOut(NamedTuple):
    """What a network's ``decode`` returns."""

    logits: Tensor  # (B, K, X, Y, Z)
    deep: list[Tensor]  # logits of auxiliary heads for deep supervision, fine to coarse; may be empty
    aux_loss: Tensor | None  # a scalar that the network adds to the loss, such as a VAE term


class Network(nn.Module):
    """The base class of all networks. (A Protocol could not say that it is an nn.Module too.)

    Attributes:
        channels, strides: of the features that `encode` returns, fine to coarse; a stride (voxels of the crop per
            voxel of the feature) is three ints where the axes differ.
        feature_channels: the F of `decode_features`.
        encoder_prefixes: prefixes of the names of the parameters that `encode` uses.
        head_prefixes: prefixes of the parameters that only the classifier uses. Pretraining does not train them.
        channels_last: its maps lie channels last on CUDA, where convolutions then want their weights to lie so too.
        positions: the tensors of the state dict that hold a vector for each token, (1, N, E), and their grid of
            tokens. Weight transfer interpolates them to another crop size's.
    """

    channels_last = False
    positions: Mapping[str, Triple] = MappingProxyType({})

    channels: tuple[int, ...]
    strides: tuple[int | Triple, ...]
    feature_channels: int
    encoder_prefixes: tuple[str, ...]
    head_prefixes: tuple[str, ...]

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """Features, fine to coarse."""
        raise NotImplementedError

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        """Dense features at full resolution, before the classifier, (B, F, X, Y, Z). Pretraining heads take them."""
        raise NotImplementedError

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        """By default the logits of the classifier, the module that ``head_prefixes[0]`` names."""
        classifier = self.get_submodule(self.head_prefixes[0].rstrip("."))
        return SegOut(classifier(self.decode_features(x_BCXYZ, feats)), [], None)

    def forward(self, x_BCXYZ: Tensor) -> SegOut:
        return self.decode(x_BCXYZ, self.encode(x_BCXYZ))

    def compile_parts(self) -> None:
        """Compile the encoder and the decoder, each as a whole."""
        self.encode, self.decode_features = compiled(self.encode), compiled(self.decode_features)  # type: ignore[method-assign]


def under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether the dotted ``name`` of a module, parameter or buffer equals one of ``prefixes`` or lies below it."""
    return f"{name}.".startswith(tuple(f"{prefix.rstrip('.')}." for prefix in prefixes))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """In "bf16" in bfloat16, in "fp32" not, and in "auto" on CUDA alone."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    if bf16 and device.type == "cpu":
        mend_autocast()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile, in up to 64 variants: of sizes, modes and, of a method, its objects."""
    import torch._dynamo  # seconds

    # By default it is the ninth and every later variant that silently is not compiled.
    return torch._dynamo.config.patch(recompile_limit=64)(torch.compile(function))


class TokenNetwork(Network):
    """A network of tokens.

    Attributes:
        embed_stride: sides of a token in voxels.
        embed_channels: E, the width of a token's vector.
        encode_hidden: ``(x_BCXYZ, hidden_Bxyz, token_E) -> feats``: as ``encode``, with the vectors of hidden tokens
            (bool, one for each token) replaced by ``token_E`` before positions are added.
        encode_visible: ``(x_BCXYZ, keep_BV, prefix_B1E) -> tokens_BVE``: the last layer's normalised vectors of the V
            tokens with the indices ``keep_BV`` (in C order), computed from these tokens alone. A prefix, unless
            None, is one more vector, without a position. It goes before the tokens, and its own comes back first
            (V + 1). The crop may be of any size that divides into tokens: positions are interpolated.
    """

    embed_stride: Triple
    embed_channels: int
    encode_hidden: Callable[[Tensor, Tensor, Tensor], list[Tensor]]
    encode_visible: Callable[[Tensor, Tensor, Tensor | None], Tensor]


class NetworkFile(Protocol):
    """What a network's file defines.

    Attributes:
        Config: a frozen dataclass of options, every one with a default.
        TINY: options that make the smallest sensible network, for tests and demos.
    """

    Config: type
    TINY: dict[str, Any]

    def size_multiple(self, cfg: Any) -> Triple:
        """Voxels; each side of a crop must be a multiple of these, the stride of the coarsest level."""

    def build(self, cfg: Any, in_channels: int, num_classes: int) -> Network:
        """A fresh network: most often the class itself."""


def names() -> list[str]:
    """The registered networks, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def config(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The network's ``Config``: its defaults, overridden by ``options``.

    Raises:
        UserError: for an unknown network, an unknown option or a value of the wrong type.
    """
    return from_dict(_load(name).Config, options or {}, where="backbone")


def build(name: str, in_channels: int = 1, num_classes: int = 14, cfg: Any = None, **options: Any) -> Network:
    """A fresh network, initialised from torch's global random state.

    Args:
        name: one of `names`.
        in_channels: C of the crops.
        num_classes: K, background included.
        cfg: the network's ``Config``; or else give its fields as ``options``.

    Raises:
        UserError: for an unknown network or a bad option.
    """
    assert cfg is None or not options, "give either cfg or options"
    return _load(name).build(cfg if cfg is not None else config(name, options), in_channels, num_classes)


def from_component(component: Component, in_channels: int, num_classes: int) -> Network:
    """A fresh network as a config describes it; see `build`."""
    component = component.resolve(config, "backbone")
    return build(component.name, in_channels, num_classes, component.config)


def check_size(name: str, cfg: Any, size_vox: Sequence[int]) -> None:
    """Refuse a crop size (X, Y, Z in voxels) that the network cannot take.

    Raises:
        UserError: naming the nearest sizes that it can take.
    """
    file = _load(name)
    multiple = file.size_multiple(cfg)
    if len(size_vox) != 3:
        raise UserError(f"crop size {tuple(size_vox)} must be three numbers of voxels (X, Y, Z)")
    check_img_size(name, getattr(cfg, "img_size", tuple(size_vox)), size_vox)
    sides = list(zip(size_vox, multiple))
    above = tuple(max(-(-side // m), 1) * m for side, m in sides)
    if getattr(cfg, "norm", "").startswith("instance") and all(side < 2 * m for side, m in sides):
        norms = get_args(get_type_hints(type(cfg))["norm"])
        others = " or ".join(norm for norm in norms if not norm.startswith("instance"))
        wider = (2 * multiple[0], *multiple[1:]) if above == multiple else above
        raise UserError(
            f"crop size {tuple(size_vox)} leaves backbone '{name}' one voxel at its coarsest level, where its "
            f"instance normalisation has nothing to average; set backbone.norm to {others} or use {wider}"
        )
    if all(side > 0 and side % m == 0 for side, m in sides):
        return
    below = tuple(max(side // m, 1) * m for side, m in sides)
    near = " or ".join(str(size) for size in dict.fromkeys((below, above)))
    raise UserError(
        f"crop size {tuple(size_vox)} does not fit backbone '{name}', whose sides must be multiples of "
        f"{multiple}; use {near}"
    )


def check_img_size(name: str, img_size: Sequence[int], size_vox: Sequence[int]) -> None:
    """Refuse a crop that does not have the one size that a network was built for.

    Raises:
        UserError: naming that size.
    """
    if tuple(size_vox) != img_size:
        raise UserError(
            f"crop size {tuple(size_vox)} does not fit backbone '{name}', which is built for one size; set "
            f"backbone.img_size to the crop's size or use crops of {img_size}"
        )


@functools.cache
def abilities(name: str) -> frozenset[str]:
    """The optional parts of the contract that the network has, out of `OPTIONAL`."""
    with torch.device("meta"):
        net = build(name, **tiny(name))
    return frozenset(part for part in OPTIONAL if hasattr(net, part))


def tiny(name: str) -> dict[str, Any]:
    """Options that make the smallest sensible network, for tests and demos."""
    return dict(_load(name).TINY)


def _load(name: str) -> NetworkFile:
    if name not in names():
        raise UserError(unknown("backbone", name, names()))
    file: Any = importlib.import_module(f"{__name__}.{name}")
    return file
