"""The benchmarks of whole networks: Table 1's rows are the paper's digits, and a network's layers add up to it.

Times and memory are for the benchmarks themselves; here are the counts, on the meta device or on tiny networks.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from logonet import networks
from logonet.inference.model import folded

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import layers
import table1

PAPER = {name: network.paper for name, network in table1.NETWORKS.items() if network.paper}
NOT_REPRODUCED = {"UNet++", "LoGoNet"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logging.getLogger(), "level", logging.ERROR
    )  # thop warns of what it counts as nothing


# ---- Table 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("DiNTS") else ()) for n in PAPER]
)
def test_a_row_is_the_papers_digits_or_says_why_not(name: str) -> None:
    network, counts = table1.NETWORKS[name], table1.count(table1.NETWORKS[name])
    verdict = table1.verdict(counts, PAPER[name])
    assert (verdict == "no") is (name in NOT_REPRODUCED)
    assert (verdict == "yes, M cut off") is (name == "UNETR")
    assert verdict == "yes" or network.note
    line = table1.counts_table({name: counts}).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == name
    assert (cells[1], cells[3]) == PAPER[name]
    if name not in NOT_REPRODUCED:
        assert cells[4].split(" ")[0] == PAPER[name].gmacs
        assert cells[6] == verdict
    else:
        assert cells[6].startswith("no: ")
    if name == "nnU-Net":  # its own module, once, is what the paper's is four times
        assert counts.thop_macs < counts.profiled_macs / 3.9
        assert cells[4] == "1250.65 (MONAI's module; 312.95 counted once)"
    else:
        assert counts.thop_macs == counts.profiled_macs


def test_the_paper_has_nine_rows_and_every_backbone_has_one() -> None:
    assert len(PAPER) == 9
    assert {network.backbone for network in table1.NETWORKS.values()} == set(networks.names())


@pytest.mark.parametrize("name", ["ULKANet", "3D UX-Net", "PCRLv2"])
def test_thop_knows_every_convolution_of_the_other_networks(name: str) -> None:
    """It passes in silence over layers of types it does not know, and then counts less than there is."""
    counts = table1.count(table1.NETWORKS[name])
    assert counts.thop_macs >= counts.true_macs


@pytest.mark.parametrize(
    ("number", "expected"), [(264_597_774_336, "264.59"), (15_507_652_608, "15.50"), (4_009_999_999, "4.00")]
)
def test_multiply_accumulates_are_cut_off(number: int, expected: str) -> None:
    assert table1.cut(number, 10**9, 2) == expected


@pytest.mark.parametrize("name", ["segresnetvae", "uxnet3d"])
def test_a_measured_step_trains_and_a_measured_forward_does_not(name: str) -> None:
    torch.manual_seed(0)
    net: Any = networks.build(name, 1, 3, **networks.tiny(name))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    x = torch.rand(1, 1, 32, 32, 32)
    before = [p.detach().clone() for p in net.parameters()]
    table1.forward(net, optimizer, x)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))
    table1.step(net, optimizer, x)  # of every output: the autoencoder's weights, too
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before))


def run(wall_s: float, peak_mb: float = 1.0) -> table1.Run:
    return table1.Run(wall_s, wall_s / 2, peak_mb)


def test_the_least_times_and_the_highest_peak_and_a_failure_is_one() -> None:
    assert table1.least([run(3, 5), run(2, 4)]) == run(2, 5)
    failed = table1.Failed("does not fit in 1.0 GiB")
    assert table1.least([run(3), failed]) is failed
    assert table1.mean(run(1), failed) is table1.mean(failed, run(1)) is failed


def test_ratios_are_to_the_swinunetr_that_was_measured_alike() -> None:
    """LoGoNet's to the one it took turns with; others' to the mean of beginning and end."""
    start: table1.Best = {"forward": run(4.0), "step": run(40.0)}
    end: table1.Best = {"forward": run(6.0), "step": run(60.0)}
    failed: table1.Best = {"forward": run(1.0), "step": table1.Failed("does not fit in 1.0 GiB")}
    best: dict[str, table1.Best] = {"LoGoNet": {"forward": run(2.0), "step": run(10.0)}, "UNETR": failed}
    measured = table1.Measured(best, start, end)
    ours, theirs = (table1.times_row(name, measured) for name in best)
    assert (ours["forward_ratio"], ours["step_ratio"]) == (0.5, 0.25)
    assert (theirs["forward_ratio"], theirs["step_ratio"]) == (0.2, None)
    assert (theirs["train_step_s"], theirs["peak_mb"]) == (None, None)
    assert measured.drift("forward") == 0.5
    assert "does not fit in 1.0 GiB" in table1.times_table([{"name": "UNETR", **theirs}])
    alone = table1.times_row("LoGoNet", table1.Measured(best))
    assert (alone["forward_s"], alone["forward_ratio"]) == (2.0, None)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_only_want_of_memory_is_taken_for_it(error: Exception, ours: bool) -> None:
    assert table1.ran_out(error) is ours


# ---- layers --------------------------------------------------------------------------------------


def true_macs(name: str, options: dict[str, Any], side: int) -> int:
    with torch.device("meta"):
        net = networks.build(name, 1, 14, **options).eval()
        with FlopCounterMode(display=False) as flops:
            net(torch.empty(1, 1, side, side, side))
    return flops.get_total_flops() // 2


PLAIN: dict[str, dict[str, Any]] = {
    "logonet": {"lka": "plain"},
    "pcrlv2": {"channels_last": False},
    "swinunetr": {},
}
SIDE = {"logonet": 64, "pcrlv2": 16, "swinunetr": 32}


@functools.cache
def recorded(name: str, training: bool) -> list[layers.Layer]:
    torch.manual_seed(0)
    net = networks.build(name, 1, 14, **networks.tiny(name))
    net = net if training else folded(net)
    x = torch.rand(1, 1, *(SIDE[name],) * 3)
    clock = iter(range(10**9)).__next__  # every operation takes one second
    return layers.record(net, x, training, 2, clock)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "logonet" else ()) for n in PLAIN]
)
@pytest.mark.parametrize("training", [False, True])
def test_the_layers_multiply_accumulates_are_the_networks(name: str, training: bool) -> None:
    """Whatever route a convolution takes on a CPU, and with normalisations folded into it or not."""
    expected = true_macs(name, {**networks.tiny(name), **PLAIN[name]}, SIDE[name])
    assert sum(layer.macs for layer in recorded(name, training)) == expected


@pytest.mark.parametrize("name", PLAIN)
def test_every_layer_is_booked_forward_and_backward(name: str) -> None:
    assert all(layer.backward_s == 0 for layer in recorded(name, False))
    convs = [layer for layer in recorded(name, True) if layer.macs]
    assert all(layer.forward_s > 0 and layer.backward_s > 0 for layer in convs)
    # A gradient each of input and weights, but the first convolutions' of the image.
    assert all(layer.backward_macs in (layer.macs, 2 * layer.macs) for layer in convs)
    assert 0 < sum(layer.backward_macs == layer.macs for layer in convs) < len(convs) / 2


def test_logonets_layers_are_named_for_what_they_are() -> None:
    kind_of = {layer.path: layer.kind for layer in recorded("logonet", True) if layer.macs}
    block = "global_net.encoder.0.lka.0"
    assert kind_of[f"{block}.attention.dilated"] == "depthwise 7^3, dilation 3"
    assert kind_of[f"{block}.attention.local"] == "depthwise 5^3"
    assert kind_of[f"{block}.mlp.depthwise"] == "depthwise 3^3"
    assert kind_of[f"{block}.mlp.fc1"] == "pointwise"
    assert kind_of["global_net.encoder.0.patch"] == "conv 7^3, stride 4"
    assert kind_of["head.conv"] == "conv 3^3"
    of_norms = [
        {layer.path for layer in recorded("logonet", training) if layer.kind == "norm"}
        for training in (True, False)
    ]
    assert {"head.norm", "global_net.decoder.decs.0.0.norm"} <= of_norms[0] - of_norms[1]


def test_rows_add_up_and_the_largest_gap_is_first() -> None:
    rates = layers.Rates(product_macs_per_s=5.0, conv_macs_per_s=10.0, copy_bytes_per_s=2.0)
    some = [
        layers.Layer("a", "conv", macs=100, bytes=2, forward_s=12.0),  # floor 10 s
        layers.Layer("b", "conv", macs=10, bytes=40, forward_s=20.0),  # floor 20 s
        layers.Layer("c", "norm", macs=0, bytes=4, forward_s=9.0),  # floor 2 s
    ]
    norm, conv = layers.rows_of(some, rates, backward=False, by="kind")
    assert (norm["name"], norm["seconds"], norm["floor_s"]) == ("norm", 9.0, 2.0)
    assert (conv["name"], conv["calls"], conv["seconds"], conv["floor_s"]) == ("conv", 2, 32.0, 30.0)
    total = [
        cell.strip() for cell in layers.table([norm, conv], top=1).splitlines()[-1].strip("|").split("|")
    ]
    assert total == ["total", "3", "41000.0", "100.0%", "0.00", "0", "32000.0", "1.3", "9000.0"]
