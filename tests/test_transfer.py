"""Weights reach the network bit for bit, every tensor is accounted for, and too little of them is an error.

Shapes: B samples, C input channels, X Y Z the crop's axes.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet import networks, training
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.storage import object_store
from logonet.training.weight_transfer import Report, other_channels, prove, transfer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = networks.names()
Weights = dict[str, Tensor]


def fresh(name: str, seed: int, in_channels: int = 1, num_classes: int = 3) -> Any:
    torch.manual_seed(seed)
    return networks.build(name, in_channels, num_classes, **networks.tiny(name))


def moved(name: str, seed: int, num_classes: int = 3) -> Any:
    """A tiny net none of whose tensors has the value that another seed's has."""
    net = fresh(name, seed, num_classes=num_classes)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(torch.rand_like(tensor) if tensor.is_floating_point() else seed + 1)
    return net


class Small(nn.Module):
    """Two encoder parts, a decoder that sees the image too, a head: the names of a backbone, nothing else."""

    encoder_prefixes, head_prefixes = ("body.encoder.", "norm."), ("head.",)

    def __init__(self, in_channels: int = 1, num_classes: int = 3, width: int = 4) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "encoder": nn.Sequential(nn.Conv3d(in_channels, width, 3), nn.Conv3d(width, width, 3)),
                "decoder": nn.Conv3d(width + in_channels, 4, 1),
            }
        )
        self.norm = nn.BatchNorm3d(width)
        self.image = nn.Conv3d(in_channels, 2, 1)
        self.head = nn.Conv3d(4, num_classes, 1)


def small(seed: int, **options: int) -> Any:
    torch.manual_seed(seed)
    return Small(**options)


def bits(net: nn.Module) -> Weights:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes)


def actions(report: Report) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for row in report.rows:
        out.setdefault(row.action, []).append(row.name)
    return out


# ---------------------------------------------------------------------------------- every backbone


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", ["all", "encoder"])
def test_what_is_loaded_is_bit_equal_and_the_rest_untouched(name: str, parts: Any) -> None:
    source, net = moved(name, 0, num_classes=5), moved(name, 1)
    given, before = bits(source), bits(net)
    report = transfer(net, given, source="a.safetensors", parts=parts)
    assert report.encoder_share == 1
    for key, tensor in net.state_dict().items():
        loads = under(key, net.encoder_prefixes) or (parts == "all" and not under(key, net.head_prefixes))
        assert torch.equal(tensor, given[key] if loads else before[key]), key
        if loads:
            assert not torch.equal(tensor, before[key]), f"{key} could not tell"
    assert all(under(n, net.head_prefixes) or parts == "encoder" for n in actions(report)["new"])
    assert set(actions(report)["new"]) == set(actions(report)["skipped"])


@pytest.mark.parametrize("name", NAMES)
def test_the_head_stays_fresh_even_when_it_fits(name: str) -> None:
    source, net = moved(name, 0), moved(name, 1)
    before = bits(net)
    transfer(net, bits(source), source="a.safetensors")
    head = [key for key in before if under(key, net.head_prefixes)]
    assert head
    for key in head:
        assert torch.equal(net.state_dict()[key], before[key])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_counted_once(name: str) -> None:
    source, net = moved(name, 0), moved(name, 1)
    report = transfer(net, bits(source), source="a.safetensors")
    of_net = sum(row.params for row in report.rows if row.action != "skipped")
    assert of_net == sum(p.numel() for p in net.parameters())
    encoder = sum(p.numel() for n, p in net.named_parameters() if under(n, net.encoder_prefixes))
    assert report.encoder_params == encoder
    tensors = [row.name for row in report.rows if row.action != "skipped"]
    assert sorted(tensors) == sorted(net.state_dict())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["backbone.", "module.", "net."])
def test_a_wrong_prefix_fails_loudly_and_changes_nothing(name: str, prefix: str) -> None:
    source, net = moved(name, 0), moved(name, 1)
    before = bits(net)
    wrong = {prefix + key: value for key, value in bits(source).items()}
    with pytest.raises(UserError, match=rf"b\.safetensors covers 0\.0 %.*'{prefix}' is taken off") as failure:
        transfer(net, wrong, source="b.safetensors")
    first = next(key for key in before if under(key, net.encoder_prefixes))
    assert first in str(failure.value)
    assert f"{prefix}{next(iter(before))}" in str(failure.value)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values()))


@pytest.mark.parametrize("name", NAMES)
def test_other_input_channels_are_adapted(name: str) -> None:
    source, net = fresh(name, 0).double(), fresh(name, 1, in_channels=2).double()
    report = transfer(net, bits(source), source="a.safetensors")
    assert report.encoder_share == 1
    assert any(under(key, net.encoder_prefixes) for key in actions(report)["adapted"])
    x_BCXYZ = torch.rand(1, 1, 32, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        ours = net.eval().encode(x_BCXYZ.expand(-1, 2, -1, -1, -1))
        theirs = source.eval().encode(x_BCXYZ)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_handover_is_proven(name: str) -> None:
    weights = bits(moved(name, 0, num_classes=2))
    state = torch.get_rng_state()
    report = prove(Component(name, networks.tiny(name)), 1, 14, weights)
    assert report.encoder_share == 1
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_a_handover_that_would_lose_a_tensor_is_refused(name: str) -> None:
    net = moved(name, 0)
    weights = bits(net)
    params = [n for n, _ in net.named_parameters() if under(n, net.encoder_prefixes)]
    with pytest.raises(UserError, match=r"covers \d+\.\d % of the encoder"):
        prove(
            Component(name, networks.tiny(name)),
            1,
            3,
            {k: w for k, w in weights.items() if k != params[-1]},
        )


# -------------------------------------------------------------------------------- positions of tokens

POSITIONS = "net.vit.patch_embedding.position_embeddings"


def unetr(seed: int, *img_size: int) -> Any:
    torch.manual_seed(seed)
    return networks.build("unetr", 1, 3, **{**networks.tiny("unetr"), "img_size": img_size})


def test_positions_are_interpolated_to_another_crop_size() -> None:
    """A field that is linear in the position stays so; at a border, where interpolation repeats, it flattens."""
    source, net = unetr(0, 64, 64, 64), unetr(1, 128, 64, 64)
    with torch.no_grad():
        ramp_x111 = torch.arange(4.0)[:, None, None, None]
        source.get_parameter(POSITIONS).copy_(ramp_x111.expand(4, 4, 4, 12).reshape(1, 64, 12))
    report = transfer(net, bits(source), source="a.safetensors")
    assert report.encoder_share == 1
    row = next(row for row in report.rows if row.name == POSITIONS)
    assert row.action == "adapted"
    assert row.why == "positions of 4x4x4 tokens interpolated to 8x4x4"
    assert f"adapted: {POSITIONS}, {row.why}" in report.summary()
    at_x = net.get_parameter(POSITIONS).view(8, 4, 4, 12)[:, 0, 0, 0].tolist()
    assert at_x == pytest.approx([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    for key, tensor in source.state_dict().items():
        if key != POSITIONS and under(key, net.encoder_prefixes):
            assert torch.equal(net.state_dict()[key], tensor), key


def test_grids_with_as_many_tokens_are_told_apart_by_the_networks_config() -> None:
    source, net = unetr(0, 32, 64, 64), unetr(1, 64, 32, 64)
    given = bits(source)
    known = transfer(net, given, source="a.safetensors", positions=source.positions)
    assert actions(known)["adapted"] == [POSITIONS]
    map_1Exyz = given[POSITIONS].transpose(1, 2).unflatten(2, (2, 4, 4))
    expected = F.interpolate(map_1Exyz, (4, 2, 4), mode="trilinear", align_corners=False)
    assert torch.equal(net.get_parameter(POSITIONS), expected.flatten(2).transpose(1, 2))
    unknown = transfer(net, given, source="a.safetensors")  # taken to be the network's own
    assert "adapted" not in actions(unknown)


def test_initial_weights_come_with_the_network_that_they_are_of(tmp_path: Path) -> None:
    source, net = unetr(0, 32, 64, 64), unetr(1, 64, 32, 64)
    uri = str(tmp_path / "a.safetensors")
    sha256 = object_store.write(uri, safetensors.torch.save(bits(source))).sha256
    of = Component("unetr", {**networks.tiny("unetr"), "img_size": [32, 64, 64]})
    report = training.load_initial(net, training.Init(uri, sha256, backbone=of))
    row = next(row for row in report.rows if row.name == POSITIONS)
    assert (row.action, row.why) == ("adapted", "positions of 2x4x4 tokens interpolated to 4x2x4")
    assert training.load_initial(net, training.Init(uri, sha256)).totals()["adapted"]["tensors"] == 0


def test_positions_that_nobody_can_place_are_said_to_be_lost() -> None:
    source, net = unetr(0, 32, 64, 64), unetr(1, 64, 64, 64)
    report = transfer(net, bits(source), source="a.safetensors", min_encoder_share=0.9)
    assert f"new: {POSITIONS}, 1x32x12 in the source, 1x64x12 here" in report.summary()


# ---------------------------------------------------------------------------------------- the rules


def test_a_buffer_lost_on_the_way_is_noticed() -> None:
    net = moved("ulkanet", 0)
    weights = bits(net)
    lost = next(k for k in weights if under(k, net.encoder_prefixes) and k.endswith("running_mean"))
    del weights[lost]
    with pytest.raises(UserError, match=f"{lost} would not arrive"):
        prove(Component("ulkanet", networks.tiny("ulkanet")), 1, 3, weights)


def test_bits_that_change_on_the_way_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bits(moved("ulkanet", 0))
    save = safetensors.torch.save

    def lossy(tensors: Weights) -> bytes:
        return save({k: w.bfloat16().to(w.dtype) for k, w in tensors.items()})

    monkeypatch.setattr(safetensors.torch, "save", lossy)
    with pytest.raises(UserError, match="does not hand its encoder over"):
        prove(Component("ulkanet", networks.tiny("ulkanet")), 1, 3, weights)


def test_each_action_has_its_reason() -> None:
    source, net = small(0), small(1, in_channels=2)
    given = bits(source)
    given["extra.weight"] = torch.zeros(7)
    del given["norm.bias"], given["norm.running_var"]
    report = transfer(net, given, source="a.safetensors", min_encoder_share=0.9)
    rows = {(row.name, row.action): row for row in report.rows}
    assert set(actions(report)["adapted"]) == {"body.encoder.0.weight", "image.weight"}
    assert rows["body.encoder.0.weight", "adapted"].why == "1 input channels in the source, 2 here"
    assert rows["norm.bias", "new"].why == "not in the source"
    assert rows["norm.running_var", "new"].params == 0
    assert rows["norm.running_mean", "matched"].params == 0
    assert rows["extra.weight", "skipped"].why == "not in the network"
    assert rows["extra.weight", "skipped"].params == 7
    assert rows["head.weight", "new"].why == rows["head.weight", "skipped"].why == "the classifier"
    # width + 1 -> width + 2 channels: no input convolution, so another network's
    assert rows["body.decoder.weight", "new"].why == "4x5x1x1x1 in the source, 4x6x1x1x1 here"
    encoder = 2 * 4 * 27 + 4 + 4 * 4 * 27 + 4 + 4 + 4
    assert report.encoder_params == encoder
    assert report.encoder_share == (encoder - 4) / encoder
    assert {row.module for row in report.rows} == {
        "body.encoder", "body.decoder", "norm", "image", "head", "extra"
    }  # fmt: skip


def test_the_share_is_of_parameters() -> None:
    given = bits(small(0))
    del given["body.encoder.1.weight"]
    total = 27 * 4 + 4 + 16 * 27 + 4 + 8
    share = (total - 16 * 27) / total
    report = transfer(small(1), given, source="a.safetensors", min_encoder_share=share)
    assert report.encoder_share == pytest.approx(share)
    with pytest.raises(UserError, match=r"22\.3 % of the encoder's parameters and 23\.0 % are asked"):
        transfer(small(1), given, source="a.safetensors", min_encoder_share=0.23)
    assert transfer(small(1), {}, source="nothing", min_encoder_share=0.0).encoder_share == 0


def test_names_without_the_networks_prefix() -> None:
    class Wrapped(nn.Module):
        encoder_prefixes, head_prefixes = ("net.body.encoder.", "net.norm."), ("net.head.",)

        def __init__(self) -> None:
            super().__init__()
            self.net = small(1)

    with pytest.raises(UserError, match=r"'net\.' is put before them"):
        transfer(Wrapped(), bits(small(0)), source="a.safetensors")
    encoder_only = {k.removeprefix("body.encoder."): w for k, w in bits(small(0)).items() if "encoder" in k}
    with pytest.raises(UserError, match=r"'body\.encoder\.' is put before them"):
        transfer(small(1), encoder_only, source="a.safetensors")


def test_weights_of_another_width_say_so() -> None:
    with pytest.raises(
        UserError, match=r"shapes differ, body\.encoder\.0\.weight 8x1x3x3x3 instead of 4x1x3x3x3.*options"
    ):
        transfer(small(1), bits(small(0, width=8)), source="a.safetensors")


def test_foreign_and_missing_weights_name_both_sides() -> None:
    foreign = {f"layer{i}.w": torch.zeros(2) for i in range(5)}
    with pytest.raises(
        UserError, match=r"wants body\.encoder\.0\.weight, .* more and the source has layer0\.w, .*and 2 more"
    ):
        transfer(small(1), foreign, source="a.safetensors")
    with pytest.raises(UserError, match="the source has none"):
        transfer(small(1), {}, source="a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    given, net = bits(small(0)), small(1)
    before = bits(net)
    given["body.encoder.1.bias"][2] = value
    with pytest.raises(UserError, match=r"a\.safetensors: 'body\.encoder\.1\.bias' holds NaN"):
        transfer(net, given, source="a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), before.values()))
    del given["body.encoder.1.bias"]
    given["head.weight"][:] = value  # not loaded, so no matter
    transfer(net, given, source="a.safetensors", min_encoder_share=0.9)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 4), (2, 3), (3, 1), (4, 2), (3, 2)])
def test_other_channels_keep_what_a_grey_image_gives(before: int, after: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, before, 3, 3, 3, dtype=torch.float64)
    changed = other_channels(weight, after)
    assert changed.shape == (5, after, 3, 3, 3)
    x = torch.randn(1, 1, 6, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv3d(x.expand(-1, after, -1, -1, -1), changed), F.conv3d(x.expand(-1, before, -1, -1, -1), weight)
    )
    if after == 2 * before:
        torch.testing.assert_close(changed[:, :before] * 2, weight)


def test_narrower_types_are_converted_exactly() -> None:
    given = {k: w.bfloat16() if w.is_floating_point() else w for k, w in bits(small(0)).items()}
    net = small(1)
    transfer(net, copy.deepcopy(given), source="a.safetensors")
    assert net.norm.weight.dtype == torch.float32
    assert torch.equal(net.body["encoder"][1].weight, given["body.encoder.1.weight"].float())


def test_the_report_for_logs_tables_and_files() -> None:
    given = bits(small(0, num_classes=7))
    report = transfer(small(1, in_channels=2), given, source="run 7", min_encoder_share=0.9)
    table = report.by_module()
    assert list(table.columns) == ["tensors", "matched", "adapted", "skipped", "new"]
    assert table.loc["body.encoder"].to_dict() == {
        "tensors": 4, "matched": 4 + 16 * 27 + 4, "adapted": 2 * 4 * 27, "skipped": 0, "new": 0
    }  # fmt: skip
    assert table.loc["head"].to_dict() == {
        "tensors": 4, "matched": 0, "adapted": 0, "skipped": 5 * 7, "new": 5 * 3
    }  # fmt: skip
    totals = report.totals()
    for action, numbers in totals.items():
        assert numbers["params"] == table[action].sum()
    assert table["tensors"].sum() == sum(n["tensors"] for n in totals.values()) == len(report.rows)
    lines = report.summary().splitlines()
    assert lines[0] == f"run 7: 100.0 % of the encoder's {report.encoder_params:,} parameters"
    assert "skipped 3 tensors (55 parameters)" in lines[1]
    assert any(line.split() == ["head", "4", "0", "0", "35", "15"] for line in lines)
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["totals"] == totals
    assert stored["rows"][0] == {
        "name": "body.encoder.0.weight", "module": "body.encoder", "action": "adapted", "params": 216,
        "why": "1 input channels in the source, 2 here",
    }  # fmt: skip
