"""The backbones that wrap MONAI's networks are those networks, to the last bit.

Letters: B batch, C channels, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks import nets
from safetensors.torch import load, save
from torch import Tensor, nn

from logonet import backbones, config
from logonet.backbones import dynunet
from logonet.errors import UserError

WRAPPERS = ("dynunet", "swinunetr", "unetr")
STRIDES = dynunet.TINY["strides"]
# Small nets as a user of MONAI writes them, and the options that shall mean the same.
DYNUNET: dict[str, Any] = {
    "kernel_size": dynunet.TINY["kernel_size"],
    "strides": STRIDES,
    "filters": (4, 8, 12, 16),
}
V2: dict[str, Any] = {"feature_size": 12, "depths": (1, 2, 1, 1), "window_size": 3}
GROUP = ("group", {"num_groups": 4})
CASES: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module], tuple[int, int, int]]] = {
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
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Maps this small only make threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Tensor]:
    """Ours and MONAI's from one seed, and a crop of two channels."""
    name, options, theirs, size = CASES[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = backbones.build(name, in_channels=2, num_classes=3, **options)
        torch.manual_seed(1)
        wrapped = theirs()
    return ours, wrapped, torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(2))


def stacked(out: backbones.SegOut) -> Tensor:
    """As MONAI's DynUNet gives logits and deep logits: in training, upsampled and in one tensor."""
    if not out.deep:
        return out.logits
    return torch.stack([out.logits, *(F.interpolate(d, out.logits.shape[2:]) for d in out.deep)], dim=1)


def test_the_weights_are_those_monai_would_draw(pair: tuple[Any, Any, Tensor]) -> None:
    ours, theirs, _ = pair
    wrapped = theirs.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, wrapped[key.removeprefix("net.")]), key


@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients_are_monais(pair: tuple[Any, Any, Tensor], training: bool) -> None:
    ours, theirs, x = pair
    images: list[Any] = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours.train(training)
    theirs.train(training)
    outs = [stacked(ours(images[0])), theirs(images[1])]
    assert torch.equal(*outs)
    for out in outs:
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert torch.equal(images[0].grad, images[1].grad)
    expected = {f"net.{key}": p.grad for key, p in theirs.named_parameters()}
    for key, p in ours.named_parameters():
        if p.grad is None:
            assert not training and "deep_supervision" in key, key
            assert expected[key] is None
        else:
            assert torch.equal(p.grad, expected[key]), key


@pytest.mark.parametrize("name", WRAPPERS)
def test_only_what_monai_never_uses_is_left_out(name: str) -> None:
    """Its weights load by their own names, but for doubles and norms of a cross-attention that is not there."""
    case, options, theirs, size = CASES[name]
    wrapped = theirs()
    ours: Any = backbones.build(case, in_channels=2, num_classes=3, **options)
    left_out = ours.net.load_state_dict(wrapped.state_dict(), strict=False)
    assert left_out.missing_keys == []
    assert all("skip_layers." in k or ".norm_cross_attn." in k for k in left_out.unexpected_keys)
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x).logits, wrapped.eval()(x))


def test_weights_go_through_safetensors(pair: tuple[Any, Any, Tensor]) -> None:
    ours, _, x = pair
    weights = save(ours.state_dict())  # refuses tensors that share memory
    with torch.no_grad():
        before = ours.eval()(x).logits
        for p in ours.parameters():
            p.zero_()
        ours.load_state_dict(load(weights), strict=True)
        assert torch.equal(ours(x).logits, before)


def test_deep_logits_in_training_alone() -> None:
    _, options, _, size = CASES["dynunet deep"]
    net: Any = backbones.build("dynunet", num_classes=3, **options)
    x = torch.randn(1, 1, *size)
    assert [tuple(d.shape) for d in net.train()(x).deep] == [(1, 3, 4, 4, 4), (1, 3, 2, 2, 2)]
    assert net.eval()(x).deep == []
    heads = {k for k, _ in net.named_parameters() if k.startswith(tuple(net.head_prefixes))}
    net.train().decode_features(x, net.encode(x)).sum().backward()
    assert heads == {k for k, p in net.named_parameters() if p.grad is None}


@pytest.mark.parametrize("name", WRAPPERS)
def test_compiles(name: str) -> None:
    """As one graph, forward and backward; without the code generator, which takes minutes."""
    options = {**backbones.tiny(name), **({"deep_supervision": True} if name == "dynunet" else {})}
    net: Any = backbones.build(name, num_classes=3, **options)
    x = torch.randn(1, 1, 32, 32, 32)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    grads = []
    for one in (net, compiled):
        net.zero_grad()
        sum(o.square().mean() for o in (lambda out: [out.logits, *out.deep])(one(x))).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for plain, traced in zip(*grads):
        torch.testing.assert_close(traced, plain, rtol=1e-4, atol=1e-5)


# ---- sizes and options ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dynunet", "swinunetr"])
@pytest.mark.parametrize("size", [(32, 32, 32), (1, 1, 1), (33, 40, 50)], ids=str)
def test_one_voxel_under_instance_norm_is_refused_with_a_size_that_fits(
    name: str, size: tuple[int, int, int]
) -> None:
    options = {"strides": ((1, 1, 1), *((2, 2, 2),) * 5)} if name == "dynunet" else {}
    cfg = backbones.config(name, options)
    with pytest.raises(UserError, match="one voxel at its coarsest level") as refused:
        backbones.check_size(name, cfg, size)
    near = str(refused.value).rsplit("(", 1)[1].rstrip(")")
    backbones.check_size(name, cfg, [int(n) for n in near.split(",")])
    backbones.check_size(name, backbones.config(name, {**options, "norm": "group"}), (32, 32, 32))


def test_unetr_takes_one_size_alone() -> None:
    net = backbones.build("unetr", num_classes=3, **backbones.tiny("unetr"))
    with pytest.raises(UserError, match=r"\(48, 32, 32\).*backbone\.img_size.*\(32, 32, 32\)"):
        net(torch.zeros(1, 1, 48, 32, 32))
    with pytest.raises(UserError, match=r"img_size is \(32, 40, 32\).*multiples of 16"):
        backbones.config("unetr", {"img_size": [32, 40, 32]})


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
        ("dynunet", {"deep_supervision": True, "deep_supr_num": 5}, "between 1 and 4"),
        ("dynunet", {"norm": "batch"}, "norm"),
        ("swinunetr", {"feature_size": 16}, "feature_size"),
        ("swinunetr", {"depths": [2, 2]}, "depths"),
        ("swinunetr", {"num_heads": [5, 6, 12, 24]}, "num_heads"),
        ("swinunetr", {"window_size": 1}, "window_size"),
        ("unetr", {"num_heads": 7}, "num_heads"),
        ("unetr", {"feature_size": 0}, "feature_size"),
    ],
)
def test_what_monai_would_choke_on_is_named(name: str, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        backbones.config(name, options)


@pytest.mark.parametrize("case", CASES)
def test_options_survive_a_file(case: str) -> None:
    cfg = backbones.config(*CASES[case][:2])
    assert backbones.config(CASES[case][0], config.to_dict(cfg)) == cfg


# ---- the paper's Table 1 -------------------------------------------------------------------------

VIT_T = {"hidden_size": 192, "mlp_dim": 768}
BRATS = {"img_size": (128, 128, 128), "feature_size": 16}
# Parameters of ours and, in millions, of MONAI's, which has 2 * 12 * hidden_size unused ones in UNETR;
# thop's multiply-accumulates in G at 96^3, one channel and 14 classes (BRATS: 128^3, 4 and 4).
TABLE: dict[str, tuple[str, dict[str, Any], int, int, int, float, float]] = {
    "nnU-Net": ("dynunet", {}, 1, 14, 30_745_326, 30.745, 312.960),
    "SwinUNETR": ("swinunetr", {}, 1, 14, 62_187_296, 62.187, 329.840),
    "UNETR": ("unetr", {}, 1, 14, 101_787_214, 101.806, 264.598),
    "UNETR 16": ("unetr", {"feature_size": 16}, 1, 14, 92_784_046, 92.802, 82.705),
    "UNETR ViT-T 16": ("unetr", {"feature_size": 16, **VIT_T}, 1, 14, 8_981_230, 8.986, 62.181),
    "UNETR ViT-T 32": ("unetr", VIT_T, 1, 14, 16_362_382, 16.367, 241.271),
    "UNETR BraTS": ("unetr", BRATS, 4, 4, 102_449_732, 102.468, 203.357),
}


def macs(net: nn.Module, in_channels: int, side: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """As thop counts, which needs shapes only: hence the meta device."""
    import thop

    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    x = torch.empty(1, in_channels, side, side, side, device="meta")
    return thop.profile(net.to("meta").eval(), (x,), verbose=False)[0]


@pytest.mark.parametrize("row", TABLE)
def test_counts_of_table_1(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, in_channels, num_classes, ours, theirs_m, thop_g = TABLE[row]
    cfg = backbones.config(name, options)
    net = backbones.build(name, in_channels, num_classes, cfg=cfg)
    params = sum(p.numel() for p in net.parameters())
    assert params == ours
    unused = 2 * 12 * cfg.hidden_size if name == "unetr" else 0
    assert round((params + unused) / 1e6, 3) == theirs_m
    assert round(
        macs(net, in_channels, 128 if row == "UNETR BraTS" else 96, monkeypatch) / 1e9, 3
    ) == pytest.approx(thop_g, abs=6e-4)


def test_the_papers_count_of_nnu_net_is_four_times_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    """thop meets each block of MONAI's, but the last, at two places and counts at both for both."""
    kernels, strides = dynunet.Config().kernel_size, dynunet.Config().strides
    theirs = nets.DynUNet(3, 1, 14, kernels, strides, strides[1:], norm_name="instance")
    assert round(macs(theirs, 1, 96, monkeypatch) / 1e9, 2) == 1250.65
