"""The backbones that wrap MONAI's networks are those networks, to the last bit.

Letters: B batch, C channels, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks import nets
from monai.networks.nets.dints import TopologyInstance, TopologySearch
from safetensors.torch import load, save
from torch import Tensor, nn

from logonet import networks
from logonet.core import config
from logonet.core.errors import UserError
from logonet.networks import dynunet

pytestmark = pytest.mark.usefixtures("one_thread")

STRIDES = dynunet.TINY["strides"]
# Small nets as a user of MONAI writes them, and the options that shall mean the same.
DYNUNET: dict[str, Any] = {
    "kernel_size": dynunet.TINY["kernel_size"],
    "strides": STRIDES,
    "filters": (4, 8, 12, 16),
}
V2: dict[str, Any] = {"feature_size": 12, "depths": (1, 2, 1, 1), "window_size": 3}
GROUP: Any = ("group", {"num_groups": 4})
AFFINE: Any = ("instance", {"affine": True})
SEGRESNET: dict[str, Any] = {"init_filters": 8, "blocks_down": (1, 2, 1), "blocks_up": (2, 1)}
VAE: dict[str, Any] = {**SEGRESNET, "vae_nz": 6}
# A topology that starts from the second of three levels alone and ends there, with nodes it never visits.
FOUND: dict[str, Any] = {
    "paths": ((0, 0, 0, 1, 0, 1, 0), (0, 1, 0, 0, 1, 0, 0), (0, 0, 1, 1, 0, 0, 0)),
    "ops": ((0, 0, 0, 1, 0, 2, 0), (0, 3, 0, 0, 4, 0, 0), (0, 0, 1, 0, 0, 0, 0)),
}
NODES = np.array([[0, 1, 0], [0, 1, 1], [1, 1, 0], [0, 1, 0]])
DINTS: dict[str, Any] = {"channel_mul": 0.125, "num_blocks": 3, "num_depths": 3}


def monai_dints(space_of: Any, code: Any = None, node_a: Any = None, norm: Any = GROUP) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an instance has no code
        return nets.DiNTS(
            space_of(arch_code=code, **DINTS, norm_name=norm), 2, 3, norm_name=norm, node_a=node_a
        )


CASES: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module], tuple[int, int, int]]] = {
    "attention_unet": (
        "attention_unet",
        {"channels": (4, 6, 8, 10), "strides": (2, 1, 3)},
        lambda: nets.AttentionUnet(3, 2, 3, (4, 6, 8, 10), (2, 1, 3)),
        (6, 12, 6),
    ),
    "attention_unet of two levels": (
        "attention_unet",
        {"channels": (4, 6), "strides": (2,)},
        lambda: nets.AttentionUnet(3, 2, 3, (4, 6), (2,)),
        (4, 2, 6),
    ),
    "dints": ("dints", DINTS, lambda: monai_dints(TopologyInstance, norm=AFFINE), (8, 16, 24)),
    "dints search": (
        "dints",
        {**DINTS, "search": True, "norm": "group"},
        lambda: monai_dints(TopologySearch),
        (8, 8, 16),
    ),
    "dints found": (
        "dints",
        {**DINTS, **FOUND, "norm": "group"},
        lambda: monai_dints(TopologyInstance, [np.array(FOUND["paths"]), np.array(FOUND["ops"])], NODES),
        (8, 8, 16),
    ),
    "dynunet": (
        "dynunet",
        DYNUNET,
        lambda: nets.DynUNet(3, 2, 3, **DYNUNET, upsample_kernel_size=STRIDES[1:], norm_name="instance"),
        (8, 8, 8),
    ),
    "dynunet affine": (
        "dynunet",
        {**DYNUNET, "norm": "instance_affine"},
        lambda: nets.DynUNet(3, 2, 3, **DYNUNET, upsample_kernel_size=STRIDES[1:]),
        (4, 8, 16),
    ),
    "dynunet deep": (
        "dynunet",
        {**DYNUNET, "deep_supervision": True, "deep_supr_num": 2, "norm": "group"},
        lambda: nets.DynUNet(
            3,
            2,
            3,
            **DYNUNET,
            upsample_kernel_size=STRIDES[1:],
            norm_name=GROUP,
            deep_supervision=True,
            deep_supr_num=2,
        ),
        (4, 8, 8),
    ),
    "swinunetr": (
        "swinunetr",
        {"feature_size": 12, "window_size": 4, "num_heads": (1, 2, 4, 8)},
        lambda: nets.SwinUNETR(2, 3, feature_size=12, window_size=4, num_heads=(1, 2, 4, 8)),
        (32, 32, 64),
    ),
    "swinunetr v2": (
        "swinunetr",
        {**V2, "use_v2": True, "norm": "group"},
        lambda: nets.SwinUNETR(2, 3, **V2, use_v2=True, norm_name=GROUP),
        (32, 32, 32),
    ),
    "unetr": (
        "unetr",
        {"img_size": (32, 16, 48), "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 3},
        lambda: nets.UNETR(2, 3, (32, 16, 48), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=3),
        (32, 16, 48),
    ),
    "segresnet": (
        "segresnet",
        SEGRESNET,
        lambda: nets.SegResNet(in_channels=2, out_channels=3, **SEGRESNET),
        (4, 8, 12),
    ),
    "segresnetvae": (
        "segresnetvae",
        {**VAE, "img_size": (16, 8, 24), "vae_weight": 1.0},
        lambda: nets.SegResNetVAE((16, 8, 24), vae_estimate_std=True, in_channels=2, out_channels=3, **VAE),
        (16, 8, 24),
    ),
    "segresnetvae of one std": (
        "segresnetvae",
        {**VAE, "img_size": (8, 8, 16), "vae_weight": 1.0, "vae_estimate_std": False},
        lambda: nets.SegResNetVAE((8, 8, 16), in_channels=2, out_channels=3, **VAE),
        (8, 8, 16),
    ),
    "unet": (
        "unet",
        {"channels": (4, 6, 8, 10), "strides": (2, 1, 2)},
        lambda: nets.UNet(3, 2, 3, (4, 6, 8, 10), (2, 1, 2), num_res_units=2, norm="batch"),
        (4, 8, 12),
    ),
    "unet plain": (
        "unet",
        {"channels": (4, 6), "strides": (1,), "num_res_units": 0, "norm": "instance"},
        lambda: nets.UNet(3, 2, 3, (4, 6), (1,)),
        (3, 4, 5),
    ),
    "unetpp": (
        "unetpp",
        {"features": (4, 6, 8, 10, 12, 3)},
        lambda: nets.BasicUNetPlusPlus(3, 2, 3, (4, 6, 8, 10, 12, 3)),
        (32, 16, 16),
    ),
    "unetpp deep": (
        "unetpp",
        {"features": (4, 4, 8, 8, 12, 8), "norm": "group", "deep_supervision": True},
        lambda: nets.BasicUNetPlusPlus(3, 2, 3, (4, 4, 8, 8, 12, 8), True, norm=GROUP),
        (16, 16, 16),
    ),
}
# What of MONAI's state dict ours has no place for: doubles, and weights that no output depends on.
LEFT_OUT = {
    "dynunet": ("skip_layers.",),
    "unetr": ("vit.blocks.",),
    "dints found": ("stem_down.0.", "stem_down.2.", "stem_up.2."),
    "segresnetvae of one std": ("vae_fc2.",),
    "unetpp": ("final_conv_0_1.", "final_conv_0_2.", "final_conv_0_3."),
}
NAMES = sorted({name for name, *_ in CASES.values()})


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    """Ours and MONAI's from one seed, and a crop of two channels."""
    name, options, theirs, size = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = networks.build(name, in_channels=2, num_classes=3, **options)
        torch.manual_seed(1)
        wrapped = theirs()
    return ours, wrapped, torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(2))


def forward(net: Any, x: Tensor) -> Any:
    """With the same draws whenever it is called, for the autoencoder."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return net(x)


def as_monai(net: nn.Module, out: networks.SegOut) -> list[Tensor]:
    """Our output as MONAI's nets give theirs, inner nodes first."""
    if isinstance(net, dynunet.DynUNet) and out.deep:  # upsampled and in one tensor
        up = [F.interpolate(deep, out.logits.shape[2:]) for deep in out.deep]
        return [torch.stack([out.logits, *up], dim=1)]
    return [*reversed(out.deep), out.logits, *([] if out.aux_loss is None else [out.aux_loss])]


def of_monai(out: Any) -> list[Tensor]:
    return [o for o in out if o is not None] if isinstance(out, list | tuple) else [out]


def test_the_weights_are_those_monai_would_draw(pair: tuple[Any, Any, Tensor]) -> None:
    ours, theirs, _ = pair
    wrapped = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, wrapped[key.removeprefix("net.")]), key


@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients_are_monais(pair: tuple[Any, Any, Tensor], training: bool) -> None:
    ours, theirs, x = pair
    how: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
    if isinstance(theirs, nets.BasicUNetPlusPlus):
        # It reads a feature several times and adds up the gradients in another order than we do.
        how = {"rtol": 1e-9, "atol": 1e-9}
        ours, theirs, x = ours.double(), theirs.double(), x.double()
    images: list[Any] = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours.train(training)
    theirs.train(training)
    outs = [as_monai(ours, forward(ours, images[0])), of_monai(forward(theirs, images[1]))]
    if not training:
        outs[1] = outs[1][-1:]  # MONAI's UNet++ has every node's logits
    assert len(outs[0]) == len(outs[1])
    for our, their in zip(*outs):
        assert torch.equal(our, their)
    for out in outs:
        torch.stack([(o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in out]).sum().backward()
    torch.testing.assert_close(images[0].grad, images[1].grad, **how)
    expected = {f"net.{key}": p.grad for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        if p.grad is None:
            assert not training, key
            assert expected[key] is None, key
        else:
            torch.testing.assert_close(p.grad, expected[key], **how, msg=key)
    buffers = dict(theirs.named_buffers())
    for key, value in ours.named_buffers():
        assert torch.equal(value, buffers[key.removeprefix("net.")]), key


@pytest.mark.parametrize("case", CASES)
def test_only_what_monai_never_uses_is_left_out(case: str) -> None:
    """Its weights load by their own names, but for doubles and what no output depends on."""
    name, options, theirs, size = CASES[case]
    wrapped = theirs()
    ours: Any = networks.build(name, in_channels=2, num_classes=3, **options)
    left_out = ours.net.load_state_dict(wrapped.state_dict(), strict=False)
    assert left_out.missing_keys == []
    allowed = LEFT_OUT.get(case, LEFT_OUT.get(name, ()) if name in ("dynunet", "unetr") else ())
    assert all(key.startswith(allowed) for key in left_out.unexpected_keys), left_out.unexpected_keys
    assert name != "unetr" or all(".norm_cross_attn." in key for key in left_out.unexpected_keys)
    assert bool(left_out.unexpected_keys) is bool(allowed)
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x).logits, of_monai(wrapped.eval()(x))[-1])


def test_weights_go_through_safetensors(pair: tuple[Any, Any, Tensor]) -> None:
    ours, _, x = pair
    weights = save(ours.state_dict())  # refuses tensors that share memory
    with torch.no_grad():
        before = ours.eval()(x).logits
        for p in ours.parameters():
            p.zero_()
        ours.load_state_dict(load(weights), strict=True)
        assert torch.equal(ours(x).logits, before)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [("dynunet deep", [(4, 4, 4), (2, 2, 2)]), ("unetpp deep", [(16, 16, 16)] * 3)],
)
def test_deep_logits_in_training_alone(case: str, sizes: list[tuple[int, int, int]]) -> None:
    name, options, _, size = CASES[case]
    net: Any = networks.build(name, num_classes=3, **options)
    x = torch.randn(1, 1, *size)
    assert [tuple(d.shape) for d in net.train()(x).deep] == [(1, 3, *size) for size in sizes]
    assert net.eval()(x).deep == []
    heads = {k for k, _ in net.named_parameters() if k.startswith(tuple(net.head_prefixes))}
    net.train().decode_features(x, net.encode(x)).sum().backward()
    assert heads == {k for k, p in net.named_parameters() if p.grad is None}


def test_the_autoencoder_weighs_in_training_alone() -> None:
    _, options, _, size = CASES["segresnetvae"]
    torch.manual_seed(0)
    nets = [networks.build("segresnetvae", 2, 3, **{**options, "vae_weight": w}) for w in (1.0, 0.25)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 2, *size)
    whole, quarter = (forward(net.train(), x).aux_loss for net in nets)
    assert whole > 0
    assert quarter == whole / 4
    again, other_draws = forward(nets[0], x).aux_loss, nets[0](x).aux_loss
    assert whole == again != other_draws
    assert nets[0].eval()(x).aux_loss is None


def test_the_search_names_the_architecture_it_likes_best() -> None:
    torch.manual_seed(0)
    net: Any = networks.build("dints", 2, 3, **DINTS, search=True, norm="group")
    space = net.net.dints_space
    with torch.no_grad():
        space.log_alpha_a.copy_(8 * torch.tensor(FOUND["paths"]) - 4)
        space.log_alpha_c.copy_(F.one_hot(torch.tensor(FOUND["ops"]), 5))
    found = net.searched()
    assert found == FOUND
    _, _, theirs, _ = CASES["dints found"]
    instance = networks.build("dints", 2, 3, **DINTS, **found, norm="group")
    assert (
        instance.load_state_dict(
            {f"net.{key}": value for key, value in theirs().state_dict().items()}, strict=False
        ).missing_keys
        == []
    )


# ---- sizes and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dints", "dynunet", "swinunetr", "unet", "unetpp"])
@pytest.mark.parametrize("kind", ["least", "one voxel", "odd"])
def test_one_voxel_under_instance_norm_is_refused_with_a_size_that_fits(name: str, kind: str) -> None:
    options: dict[str, Any] = {"norm": "instance"}
    if name == "dynunet":
        options["strides"] = ((1, 1, 1), *((2, 2, 2),) * 5)
    cfg = networks.config(name, options)
    m = {"dints": 8, "dynunet": 32, "swinunetr": 32, "unet": 16, "unetpp": 16}[name]
    size = {"least": (m, m, m), "one voxel": (1, 1, 1), "odd": (m + 1, m + 4, 2 * m - 1)}[kind]
    with pytest.raises(UserError, match="one voxel at its coarsest level") as refused:
        networks.check_size(name, cfg, size)
    near = str(refused.value).rsplit("(", 1)[1].rstrip(")")
    networks.check_size(name, cfg, [int(n) for n in near.split(",")])
    other = {**options, "norm": "batch" if name == "unet" else "group"}
    networks.check_size(name, networks.config(name, other), (m, m, m))


@pytest.mark.parametrize("name", NAMES)
def test_the_least_size_that_is_let_through_runs(name: str) -> None:
    options = networks.tiny(name)
    net: Any = networks.build(name, num_classes=3, **options)
    with pytest.raises(UserError) as refused:
        networks.check_size(name, networks.config(name, options), (1, 1, 1))
    size = [int(n) for n in str(refused.value).rsplit("(", 1)[1].rstrip(")").split(",")]
    x = torch.randn(2, 1, *size)
    assert net(x).logits.shape == (2, 3, *size)
    assert net.decode_features(x, net.encode(x)).shape == (2, net.feature_channels, *size)


def test_unetr_takes_one_size_alone() -> None:
    net = networks.build("unetr", num_classes=3, **networks.tiny("unetr"))
    with pytest.raises(UserError, match=r"\(48, 32, 32\).*backbone\.img_size.*\(32, 32, 32\)"):
        net(torch.zeros(1, 1, 48, 32, 32))
    with pytest.raises(UserError, match=r"img_size is \(32, 40, 32\).*multiples.*\(32, 48, 32\)"):
        networks.config("unetr", {"img_size": [32, 40, 32]})


def test_an_autoencoder_trains_on_one_size_alone() -> None:
    net = networks.build("segresnetvae", num_classes=3, **networks.tiny("segresnetvae"))
    x = torch.zeros(1, 1, 64, 32, 32)  # which MONAI would take for two crops
    with pytest.raises(UserError, match=r"\(64, 32, 32\).*backbone\.img_size.*\(32, 32, 32\)"):
        net(x)
    assert net.eval()(x).logits.shape == (1, 3, 64, 32, 32)
    with pytest.raises(UserError, match=r"img_size is \(32, 40, 32\).*multiples of 16"):
        networks.config("segresnetvae", {"img_size": [32, 40, 32]})


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("dynunet", {"strides": [[1, 1, 1], [2, 2, 2]]}, "strides has 2 entries"),
        ("dynunet", {"strides": [[2, 2, 2]] * 6}, "strides begins"),
        ("dynunet", {"kernel_size": [[2, 3, 3]] * 6}, "kernel_size"),
        (
            "dynunet",
            {"kernel_size": [[1, 1, 1]] * 6, "strides": [[1, 1, 1]] + [[3, 3, 3]] * 5},
            "kernel_size",
        ),
        ("dynunet", {"filters": [8, 16]}, "filters has 2 entries"),
        ("dynunet", {"filters": [6] * 6, "norm": "group"}, "multiple of 4"),
        ("dynunet", {"deep_supervision": True, "deep_supr_num": 5}, "at most 4"),
        ("dynunet", {"norm": "batch"}, "norm"),
        ("swinunetr", {"feature_size": 16}, "feature_size"),
        ("swinunetr", {"depths": [2, 2]}, "depths"),
        ("swinunetr", {"num_heads": [5, 6, 12, 24]}, "num_heads"),
        ("swinunetr", {"window_size": 1}, "window_size"),
        ("unetr", {"num_heads": 7}, "num_heads"),
        ("unetr", {"feature_size": 0}, "feature_size"),
        ("unetr", {"variant": "vit_t", "num_heads": 5}, "hidden_size 192"),
        ("attention_unet", {"channels": [8], "strides": []}, "channels has 1 entries"),
        ("attention_unet", {"channels": [8, 16]}, "strides 3"),
        ("attention_unet", {"channels": [1, 2], "strides": [2]}, "channels.* at least"),
        ("unet", {"channels": [4, 0], "strides": [2]}, "channels.* at least"),
        ("unet", {"channels": [4, 8], "strides": [0]}, "strides.* at least"),
        ("unet", {"num_res_units": -1}, "num_res_units"),
        ("unet", {"norm": "group"}, "norm"),
        ("unetpp", {"features": [4, 8]}, "features.* entries"),
        ("unetpp", {"features": [4, 4, 1, 4, 4, 4]}, "features.* at least 2"),
        ("unetpp", {"features": [4, 4, 6, 4, 4, 4], "norm": "group"}, "multiple of 4"),
        ("segresnet", {"init_filters": 12}, "init_filters"),
        ("segresnet", {"blocks_down": [1, 0, 1, 1]}, "blocks_down"),
        ("segresnet", {"blocks_up": [1, 1]}, "blocks_up has 2 entries"),
        ("segresnetvae", {"init_filters": 4}, "init_filters"),
        ("segresnetvae", {"vae_nz": 0}, "vae_nz"),
        ("segresnetvae", {"vae_weight": 0}, "vae_weight"),
        ("dints", {"num_blocks": 0}, "num_blocks"),
        ("dints", {"channel_mul": 0.3}, "channel_mul"),
        ("dints", {"channel_mul": 0.0625, "norm": "group"}, "multiple of 4"),
        ("dints", {"paths": [[1] * 7] * 6}, "give both"),
        ("dints", {**DINTS, **FOUND, "search": True}, "search"),
        ("dints", {**DINTS, **FOUND, "num_blocks": 4}, "paths must have 4 rows of 7"),
        ("dints", {**DINTS, **FOUND, "ops": [[5] * 7] * 3}, "ops.* below 5"),
        ("dints", {**DINTS, **FOUND, "paths": [[0] * 7] * 3}, "row 0 has no path"),
        (
            "dints",
            {**DINTS, **FOUND, "paths": [[1, 0, 0, 0, 0, 0, 0], *FOUND["paths"][1:]]},
            r"row 0 reaches levels \[0\] and row 1 starts from \[1, 2\]",
        ),
    ],
)
def test_what_monai_would_choke_on_is_named(name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        networks.config(name, options)


@pytest.mark.parametrize(
    ("name", "options", "size", "strides", "fewer"),
    [
        (
            "swinunetr",
            {**networks.tiny("swinunetr"), "patch": (2, 2, 1)},
            (32, 32, 16),
            [(2, 2, 1), (4, 4, 2), (8, 8, 4), (16, 16, 8), (32, 32, 16)],
            # of the patch embedding and the last transposed convolution
            12 * 2 * 4 + 12 * 12 * 4,
        ),
        (
            "unetr",
            {**networks.tiny("unetr"), "img_size": (32, 32, 16), "patch": (16, 16, 8)},
            (32, 32, 16),
            [(16, 16, 8)] * 4,
            12 * 2 * 16 * 16 * 8 + 8 * 4 * 4,
        ),
    ],
)
def test_flat_patches_keep_slices_apart(
    name: str, options: dict[str, Any], size: Any, strides: list[Any], fewer: int
) -> None:
    """SimTROT's patches for thick slices: half as thick along Z, with as many tokens and the rest of the net as is."""
    torch.manual_seed(0)
    net = networks.build(name, 2, 3, **options).eval()
    assert list(net.strides) == strides
    networks.check_size(name, networks.config(name, options), size)
    x = torch.randn(2, 2, *size)
    with torch.no_grad():
        feats = net.encode(x)
        assert net.decode(x, feats).logits.shape == (2, 3, *size)
    for feat, stride in zip(feats, strides):
        assert feat.shape[2:] == tuple(side // s for side, s in zip(size, stride))
    cube = {k: v for k, v in options.items() if k not in ("patch", "img_size")}
    cube |= {"img_size": (32, 32, 32)} if name == "unetr" else {}
    before = networks.build(name, 2, 3, **cube)
    assert sum(p.numel() for p in before.parameters()) - sum(p.numel() for p in net.parameters()) == fewer
    assert before.state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "options", "tokens", "width", "params"),
    [
        ("swinunetr", {"patch": (2, 2, 1)}, (4, 4, 4), 768, 62_187_296 - 48 * 4 - 48 * 48 * 4),
        (
            "unetr",
            {"img_size": (128, 128, 64), "patch": (16, 16, 8)},
            (8, 8, 8),
            768,
            101_787_214 - 768 * 16 * 16 * 8 + (512 - 216) * 768 - 64 * 32 * 4,
        ),
        ("nnformer", {}, (4, 4, 4), 1536, 150_054_210),
    ],
)
def test_simtrots_networks_for_abdominal_ct(
    name: str, options: dict[str, Any], tokens: Any, width: int, params: int
) -> None:
    """Hu et al. 2023, section 4: crops of 128 x 128 x 64, patches [1, 2, 2], [8, 16, 16] and [2, 4, 4] in (Z, Y, X)."""
    with torch.device("meta"):
        net = networks.build(name, 1, 14, **options)
        assert net.encode(torch.empty(1, 1, 128, 128, 64))[-1].shape == (1, width, *tokens)
    assert sum(p.numel() for p in net.parameters()) == params


@pytest.mark.parametrize("case", CASES)
def test_options_survive_a_file(case: str) -> None:
    cfg = networks.config(*CASES[case][:2])
    assert networks.config(CASES[case][0], config.to_dict(cfg)) == cfg


# ---- the paper's Table 1 -------------------------------------------------------------------------

BRATS = {"img_size": (128, 128, 128), "feature_size": 16}
HEADS_M, HEADS_G = 3 * (32 * 14 + 14) / 1e6, 3 * 32 * 14 * 96**3 / 1e9


class Row(NamedTuple):
    """Parameters of ours and, in millions, of MONAI's; thop's multiply-accumulates in G at 96^3, one channel and
    14 classes (BRATS: 128^3, 4 and 4)."""

    name: str
    options: dict[str, Any]
    params: int
    monai_m: float
    monai_g: float
    left_out_m: float = 0.0  # what MONAI has and never uses
    left_out_g: float = 0.0
    printed: tuple[float, float] | None = (
        None  # G (cut off) and M (rounded; UNETR's cut off) of the paper's Table 1
    )


TABLE: dict[str, Row] = {
    "nnU-Net": Row("dynunet", {}, 30_745_326, 30.745, 312.960),
    "SwinUNETR": Row("swinunetr", {}, 62_187_296, 62.187, 329.840, printed=(329.84, 62.2)),
    "UNETR": Row("unetr", {}, 101_787_214, 101.806, 264.598, 0.018432, printed=(264.59, 101.7)),
    "UNETR 16": Row("unetr", {"feature_size": 16}, 92_784_046, 92.802, 82.705, 0.018432),
    "UNETR ViT-T 16": Row(
        "unetr", {"feature_size": 16, "variant": "vit_t"}, 8_981_230, 8.986, 62.181, 0.004608
    ),
    "UNETR ViT-T 32": Row("unetr", {"variant": "vit_t"}, 16_362_382, 16.367, 241.271, 0.004608),
    "UNETR BraTS": Row("unetr", BRATS, 102_449_732, 102.468, 203.357, 0.018432),
    "SegResNetVAE": Row("segresnetvae", {}, 3_863_471, 3.863, 15.508, printed=(15.50, 3.9)),
    "SegResNetVAE of one std": Row(
        "segresnetvae",
        {"vae_estimate_std": False},
        2_978_479,
        3.863,
        15.508,
        (16 * 6**3 + 1) * 256 / 1e6,
    ),
    "DiNTS Instance": Row("dints", {}, 74_127_278, 74.127, 743.887, printed=(743.88, 74.1)),
    "DiNTS Search": Row("dints", {"search": True}, 74_127_530, 74.128, 743.887, printed=(743.88, 74.1)),
    "Attention U-Net": Row("attention_unet", {}, 64_121_626, 64.122, 7984.219, printed=(7984.21, 64.1)),
    # Not Table 1's 4229.20 G and 84.6 M, for which no widths are known.
    "UNet++": Row("unetpp", {}, 6_980_174, 6.982, 564.890, HEADS_M, HEADS_G),
    "UNet++ deep": Row("unetpp", {"deep_supervision": True}, 6_981_560, 6.982, 564.890, 0, HEADS_G),
    "UNet++ 96": Row(
        "unetpp",
        {"features": (96, 96, 192, 384, 768, 96), "deep_supervision": True},
        62_779_064,
        62.779,
        5062.287,
        0,
        3 * HEADS_G,
    ),
    "UNet++ 64": Row(
        "unetpp",
        {"features": (64, 128, 256, 512, 1024, 64), "deep_supervision": True},
        105_505_272,
        105.505,
        3777.598,
        0,
        2 * HEADS_G,
    ),
}


def macs(net: nn.Module, in_channels: int, side: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """As thop counts, which needs shapes only: hence the meta device."""
    import thop

    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    x = torch.empty(1, in_channels, side, side, side, device="meta")
    return thop.profile(net.to("meta").eval(), (x,), verbose=False)[0]


@pytest.mark.parametrize("key", TABLE)
def test_counts_of_table_1(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = TABLE[key]
    in_channels, num_classes, side = (4, 4, 128) if key == "UNETR BraTS" else (1, 14, 96)
    with torch.device("meta"):
        net = networks.build(row.name, in_channels, num_classes, **row.options)
    params = sum(p.numel() for p in net.parameters())
    assert params == row.params
    assert round(params / 1e6 + row.left_out_m, 3) == row.monai_m
    count_g = macs(net, in_channels, side, monkeypatch) / 1e9
    assert round(count_g + row.left_out_g, 3) == row.monai_g
    if row.printed is not None:
        printed_g, printed_m = row.printed
        assert int(count_g * 100) / 100 == printed_g
        assert printed_m == (int(params / 1e5) / 10 if key == "UNETR" else round(params / 1e6, 1))


def test_the_papers_count_of_nnu_net_is_four_times_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """thop meets each block of MONAI's, but the last, at two places and counts at both for both."""
    kernels, strides = dynunet.Config().kernel_size, dynunet.Config().strides
    theirs = nets.DynUNet(3, 1, 14, kernels, strides, strides[1:], norm_name="instance")
    assert round(macs(theirs, 1, 96, monkeypatch) / 1e9, 2) == 1250.65


def test_what_monais_unetpp_counts_beyond_ours_is_its_idle_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        nodes = [nets.BasicUNetPlusPlus(3, 1, 14), networks.build("unetpp")]
    theirs, ours = (macs(net, 1, 96, monkeypatch) / 1e9 for net in nodes)
    assert (round(theirs, 3), theirs - ours) == (564.890, pytest.approx(HEADS_G))
