"""Every registered backbone keeps the contract; LoGoNet and ULKANet are the networks of the paper.

Letters: B batch, C channels, XYZ the crop's axes.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet import networks
from logonet.core.errors import UserError
from logonet.networks import ulkanet

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = networks.names()


def tiny_net(name: str, seed: int = 0, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return networks.build(name, num_classes=3, **{**networks.tiny(name), **options})


def crop(name: str, batch: int = 2, seed: int = 0, widths: int = 1) -> Tensor:
    """Noise of the smallest size the tiny net takes, ``widths`` times along X unless it takes one size alone."""
    mx, my, mz = _multiple(name)
    size = (batch, 1, mx * (1 if _takes_one_size(name) else widths), my, mz)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def everything(out: networks.SegOut) -> Tensor:
    """A loss of all that a network gives; an autoencoder's weights have no other gradient than ``aux_loss``'s."""
    loss = torch.stack([logits.float().square().mean() for logits in (out.logits, *out.deep)]).sum()
    return loss if out.aux_loss is None else loss + out.aux_loss


def _multiple(name: str) -> tuple[int, int, int]:
    cfg = networks.config(name, networks.tiny(name))
    with pytest.raises(UserError) as refused:
        networks.check_size(name, cfg, (1, 1, 1))
    nearest = str(refused.value).rsplit("(", 1)[1].rstrip(")")
    x, y, z = (int(n) for n in nearest.split(","))
    return x, y, z


def _takes_one_size(name: str) -> bool:
    return hasattr(networks.config(name), "img_size")


# ---- the contract, for whatever is registered -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_match_what_is_declared(name: str) -> None:
    net, x = tiny_net(name), crop(name, widths=2)
    feats = net.encode(x)
    assert [feat.shape[1] for feat in feats] == list(net.channels)
    for feat, stride in zip(feats, net.strides):
        steps = (stride,) * 3 if isinstance(stride, int) else stride
        assert feat.shape[2:] == torch.Size(n // step for n, step in zip(x.shape[2:], steps))
    assert list(net.strides) == sorted(net.strides)
    assert net.decode_features(x, feats).shape == (2, net.feature_channels, *x.shape[2:])
    out = net(x)
    assert isinstance(out, networks.SegOut)
    assert out.logits.shape == (2, 3, *x.shape[2:])


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_decode_of_encode(name: str) -> None:
    net, x = tiny_net(name).eval(), crop(name)
    with torch.no_grad():
        assert torch.equal(net(x).logits, net.decode(x, net.encode(x)).logits)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    net = tiny_net(name)
    # Two widths: BatchNorm of only two values gives +-1 whatever they are, and so no gradient.
    everything(net(crop(name, widths=2))).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("name", NAMES)
def test_prefixes_name_disjoint_parts(name: str) -> None:
    net, x = tiny_net(name), crop(name)
    params = dict(net.named_parameters())
    for prefix in (*net.encoder_prefixes, *net.head_prefixes):
        assert any(n.startswith(prefix) for n in params), f"no parameter begins with {prefix}"
    encoder = {n for n in params if n.startswith(tuple(net.encoder_prefixes))}
    head = {n for n in params if n.startswith(tuple(net.head_prefixes))}
    assert not encoder & head
    sum(f.square().mean() for f in net.encode(x)).backward()
    assert {n for n, p in params.items() if p.grad is not None} == encoder
    net.zero_grad(set_to_none=True)
    net.decode_features(x, net.encode(x)).square().mean().backward()
    assert {n for n, p in params.items() if p.grad is None} == head


@pytest.mark.parametrize("name", NAMES)
def test_eval_does_not_mix_the_batch(name: str) -> None:
    net, x = tiny_net(name).eval(), crop(name)
    with torch.no_grad():
        both, first = net(x).logits, net(x[:1]).logits
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_is_finite(name: str) -> None:
    net, x = tiny_net(name), crop(name)
    with networks.autocast("bf16", torch.device("cpu")):
        loss = everything(net(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def trained_once(name: str, training: bool, **options: Any) -> nn.Module:
    """A net in float64 after one backward pass, from weights that do not depend on ``options``."""
    net = tiny_net(name, **options).double().train(training)
    net.load_state_dict(tiny_net(name).state_dict())
    # BatchNorm cannot train on a single value.
    net(crop(name, batch=1, widths=2 if training else 1).double()).logits.square().sum().backward()
    return net


plain = functools.cache(trained_once)


def with_options() -> list[Any]:
    """Every network with each of the options that change speed or memory alone; LoGoNet is nine ULKANets."""
    options: list[dict[str, Any]] = [{"checkpointing": True}, {"channels_last": False}, {"lka": "plain"}]
    pairs = [(n, o) for n in NAMES for o in options if hasattr(networks.config(n), next(iter(o)))]
    return [pytest.param(*pair, marks=pytest.mark.slow if pair[0] == "logonet" else ()) for pair in pairs]


@pytest.mark.parametrize(("name", "options"), with_options())
@pytest.mark.parametrize("training", [True, False])
def test_options_of_speed_and_memory_change_no_number(
    name: str, options: dict[str, Any], training: bool
) -> None:
    if not training and not any(isinstance(m, nn.BatchNorm3d) for m in tiny_net(name).modules()):
        pytest.skip(f"{name} computes the same in evaluation as in training")
    nets = [plain(name, training), trained_once(name, training, **options)]
    for ours, theirs in zip(*(dict(net.named_buffers()).values() for net in nets)):
        torch.testing.assert_close(ours, theirs)
    for (key, p), q in zip(nets[0].named_parameters(), nets[1].parameters()):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "unet" else pytest.mark.slow) for n in NAMES]
)
def test_compiles_into_one_graph(name: str) -> None:
    """Forward and backward, traced whole; without the code generator, which takes minutes."""
    more = {
        "dynunet": {"deep_supervision": True},
        "unetpp": {"deep_supervision": True},
        "dints": {"search": True},
    }
    net, x = tiny_net(name, **more.get(name, {})), crop(name, widths=2)
    torch._dynamo.reset()
    traced: Any = torch.compile(net, backend="aot_eager", fullgraph=True)
    losses, grads = [], []
    for one in (net, traced):
        net.zero_grad()
        torch.manual_seed(0)  # an autoencoder draws
        losses.append(everything(one(x)))
        losses[-1].backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(losses[1], losses[0])
    for plain, found in zip(*grads):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_goes_round(name: str) -> None:
    net, other, x = tiny_net(name, seed=0).eval(), tiny_net(name, seed=1).eval(), crop(name)
    assert all(v.is_contiguous() for v in net.state_dict().values()), "safetensors refuses other layouts"
    other.load_state_dict(net.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(net(x).logits, other(x).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(name: str) -> None:
    cfg = networks.config(name, networks.tiny(name))
    mx, my, mz = _multiple(name)
    if _takes_one_size(name):
        networks.check_size(name, cfg, cfg.img_size)
        with pytest.raises(UserError, match=rf"img_size.*\({mx}, {my}, {mz}\)"):
            networks.check_size(name, cfg, (2 * mx, my, mz))
        return
    networks.check_size(name, cfg, (mx, 3 * my, 2 * mz))
    with pytest.raises(UserError) as refused:
        networks.check_size(name, cfg, (2 * mx + 1, my, mz))
    assert f"({2 * mx}, {my}, {mz}) or ({3 * mx}, {my}, {mz})" in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_found_without_memory(name: str) -> None:
    x = crop(name, widths=2)
    with torch.device("meta"):
        net: Any = networks.build(name, num_classes=3, **networks.tiny(name))
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"meta"}
    assert net(x.to("meta")).logits.shape == (2, 3, *x.shape[2:])


@pytest.mark.parametrize("name", NAMES)
def test_more_input_channels(name: str) -> None:
    net = networks.build(name, in_channels=2, num_classes=3, **networks.tiny(name))
    x = torch.cat((crop(name, seed=0), crop(name, seed=1)), dim=1)
    assert net(x).logits.shape == (2, 3, *x.shape[2:])


# ---- finding them --------------------------------------------------------------------------------


def test_a_file_on_the_path_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "throwaway.py").write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass(frozen=True)\n"
        "class Config:\n"
        "    width: int = 4\n"
        "def build(cfg, in_channels, num_classes):\n"
        "    return nn.Conv3d(in_channels, num_classes, cfg.width)\n"
        "def size_multiple(cfg):\n"
        "    return 1, 1, 1\n"
    )
    (tmp_path / "_private.py").write_text("")
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    assert set(networks.names()) == {*NAMES, "throwaway"}
    assert networks.build("throwaway", width=2).kernel_size == (2, 2, 2)


def test_bad_names_and_options_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'logonet'"):
        networks.build("logone")
    with pytest.raises(UserError, match=r"backbone\.dimz.*did you mean 'backbone\.dims'"):
        networks.config("logonet", {"dimz": [8]})
    with pytest.raises(UserError, match=r"backbone\.dims has 2 entries"):
        networks.build("ulkanet", dims=(8, 16))
    with pytest.raises(UserError, match=r"backbone\.local_blocks"):
        networks.config("logonet", {"local_blocks": 5})


# ---- the networks of the paper -------------------------------------------------------------------


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def on_meta(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return networks.build(name, **options)


def test_parameters_of_every_part() -> None:
    net = on_meta("logonet")
    whole, octant = net.global_net, net.local_nets[0]
    assert [params(block) for block in whole.encoder] == [367_104, 1_698_432, 5_334_272, 11_528_704]
    assert [params(skip) for skip in whole.decoder.skips] == [3_540_480, 885_504, 221_568]
    assert params(whole.decoder.skip_image) == 28_704
    assert [params(dec) for dec in whole.decoder.decs] == [7_080_192, 7_080_192, 2_212_992, 553_536, 110_880]
    assert params(whole.decoder.last) == 55_392
    assert params(whole.output) == 1_056
    assert params(whole) == 40_699_008
    assert params(octant) == 3_369_024
    assert params(net.local_nets) == 26_952_192
    assert params(net.head) == 28_206
    assert params(net) == 67_679_406


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ulkanet", {}, 40_698_414),
        ("ulkanet", {"variant": "large"}, 116_807_310),
        ("logonet", {"variant": "large"}, 166_501_134),
        ("logonet", {"variant": "large", "full_width": 48}, 168_482_558),
        ("logonet", {"prenorm_residual": True}, 67_679_406),
    ],
)
def test_parameters_of_the_variants(name: str, options: dict[str, Any], expected: int) -> None:
    assert params(on_meta(name, **options)) == expected


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("logonet", {}, 246_194_463_744),
        pytest.param("logonet", {"variant": "large"}, 308_741_690_880, marks=pytest.mark.slow),
        pytest.param(
            "logonet", {"variant": "large", "full_width": 48}, 550_904_550_912, marks=pytest.mark.slow
        ),
        ("ulkanet", {}, 115_135_000_000),
        pytest.param("ulkanet", {"variant": "large"}, 155_631_000_000, marks=pytest.mark.slow),
    ],
)
def test_multiply_accumulates_at_96(
    name: str, options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within half of the last digit that is given; thop needs shapes only, hence the meta device."""
    import thop

    # thop warns that it counts trilinear upsampling as nothing.
    monkeypatch.setattr(logging.getLogger(), "level", logging.ERROR)
    macs, _ = thop.profile(
        on_meta(name, lka="plain", **options), (torch.empty(1, 1, 96, 96, 96, device="meta"),), verbose=False
    )
    assert macs == pytest.approx(expected, abs=0 if expected % 1_000_000 else 500_000)


class Literal:
    """ULKANet and LoGoNet word for word from the paper's figures and algorithms, on another net's weights."""

    def __init__(self, net: nn.Module, training: bool) -> None:
        self.weights = dict(net.named_parameters()) | {k: v.clone() for k, v in net.named_buffers()}
        self.training = training

    def conv(self, x: Tensor, name: str, **how: Any) -> Tensor:
        return F.conv3d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **how)

    def batch_norm(self, x: Tensor, name: str) -> Tensor:
        mean, var = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.batch_norm(x, mean, var, weight, bias, training=self.training)

    def encoder_block(self, x: Tensor, name: str, first: bool, depth: int) -> Tensor:
        how = {"stride": 4, "padding": 3} if first else {"stride": 2, "padding": 1}
        x = self.batch_norm(self.conv(x, f"{name}.patch", **how), f"{name}.patch_norm")  # Algorithm 2
        b, d, *size = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        for n in range(depth):
            tokens = self.lka_module(tokens, size, f"{name}.lka.{n}")
        weight, bias = self.weights[f"{name}.norm.weight"], self.weights[f"{name}.norm.bias"]
        return F.layer_norm(tokens, (d,), weight, bias).transpose(1, 2).reshape(b, d, *size)

    def lka_module(self, tokens: Tensor, size: list[int], name: str) -> Tensor:  # Algorithms 3 and 4
        b, n, d = tokens.shape
        x = self.batch_norm(tokens.permute(0, 2, 1).view(b, d, *size), f"{name}.norm1")
        attention = self.conv(x, f"{name}.attention.local", padding=2, groups=d)
        attention = self.conv(attention, f"{name}.attention.dilated", padding=9, dilation=3, groups=d)
        attention = self.conv(attention, f"{name}.attention.point")
        x = x + attention * x
        x = self.batch_norm(x, f"{name}.norm2")
        hidden = F.gelu(self.conv(x, f"{name}.mlp.fc1"))
        hidden = F.gelu(self.conv(hidden, f"{name}.mlp.depthwise", padding=1, groups=hidden.shape[1]))
        x = x + self.conv(hidden, f"{name}.mlp.fc2")
        return x.view(b, d, n).permute(0, 2, 1)

    def conv_block(self, x: Tensor, name: str) -> Tensor:
        x = self.batch_norm(self.conv(x, f"{name}.conv", padding=1), f"{name}.norm")
        return F.leaky_relu(x, 0.01)

    def dec(self, x: Tensor, name: str) -> Tensor:
        for n in range(3):
            x = self.conv_block(x, f"{name}.{n}")
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)

    def skip(self, x: Tensor, name: str) -> Tensor:
        return self.conv_block(self.conv_block(x, f"{name}.0"), f"{name}.1")

    def ulkanet(self, image: Tensor, name: str, depths: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        feats, x = [], image
        for i, depth in enumerate(depths):
            x = self.encoder_block(x, f"{name}.encoder.{i}", i == 0, depth)
            feats.append(x)
        for i, feat in enumerate(reversed(feats[:-1])):
            x = self.dec(x, f"{name}.decoder.decs.{i}")
            x = torch.cat((x, self.skip(feat, f"{name}.decoder.skips.{i}")), dim=1)
        x = self.dec(x, f"{name}.decoder.decs.{len(depths) - 1}")
        x = self.dec(x, f"{name}.decoder.decs.{len(depths)}")
        x = torch.cat((x, self.skip(image, f"{name}.decoder.skip_image")), dim=1)
        return self.conv(self.conv_block(x, f"{name}.decoder.last"), f"{name}.output"), feats

    def logonet(
        self, image: Tensor, depths: tuple[int, ...], local_blocks: int
    ) -> tuple[Tensor, list[Tensor]]:
        whole, feats = self.ulkanet(image, "global_net", depths)
        hx, hy, hz = (n // 2 for n in image.shape[2:])
        local = torch.zeros_like(whole)
        grids = [torch.zeros_like(feat) for feat in feats[:local_blocks]]
        for i in (0, 1):
            for j in (0, 1):
                for k in (0, 1):
                    cube = image[:, :, i * hx : (i + 1) * hx, j * hy : (j + 1) * hy, k * hz : (k + 1) * hz]
                    net = f"local_nets.{4 * i + 2 * j + k}"
                    out, cube_feats = self.ulkanet(cube, net, depths[:local_blocks])
                    for part, into in zip([out, *cube_feats], [local, *grids]):
                        nx, ny, nz = part.shape[2:]
                        into[:, :, i * nx : (i + 1) * nx, j * ny : (j + 1) * ny, k * nz : (k + 1) * nz] = part
        joined = [torch.cat(pair, dim=1) for pair in zip(feats, grids)] + feats[local_blocks:]
        x = self.batch_norm(self.conv(whole + local, "head.conv", padding=1), "head.norm")
        return self.conv(F.gelu(x), "head.classifier"), joined


@pytest.mark.parametrize("name", ["logonet", "ulkanet"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_paper_word_for_word(name: str, training: bool) -> None:
    depths = (2, 1, 1, 1)
    net = tiny_net(name, depths=depths).double()
    x = crop(name, batch=1, widths=2).double()
    net(x)  # moves the running statistics off their initial values
    net.train(training)
    literal = Literal(net, training)
    with torch.no_grad():
        if name == "logonet":
            logits, feats = literal.logonet(x, depths, local_blocks=2)
        else:
            logits, feats = literal.ulkanet(x, "net", depths)
        for ours, theirs in zip(net.encode(x), feats, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(net(x).logits, logits)


def test_the_usual_residual_leaves_the_input_alone() -> None:
    """With all of a module's branches silenced, a pre-norm module is the identity and Algorithm 3 is not."""
    x = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for prenorm in (True, False):
        net: Any = networks.build("ulkanet", **{**ulkanet.TINY, "prenorm_residual": prenorm})
        module = net.net.encoder[0].lka[0]
        for last in (module.attention.point, module.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        assert torch.equal(module(x), x) is prenorm
