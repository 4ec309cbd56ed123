"""Classes by name between datasets: chosen, merged, renamed, ignored, and a model's on another dataset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from logonet.core.errors import BadScan, UserError
from logonet.data import classes
from logonet.data.classes import IGNORE, Classes, Config
from logonet.data.manifest import Scan
from logonet.inference import metrics
from logonet.methods import _segmentation
from logonet.networks import SegOut

ABDOMEN = ("background", "liver", "spleen", "left kidney", "right kidney")


def scan(declared: tuple[str, ...] = (), values: tuple[int, ...] = (0, 1, 2), **more: Any) -> Scan:
    empty = {
        name: "" for name in ("scan_id", "uri", "sha256", "voxel_sha256", "thumbprint", "subject", "licence")
    }
    grid: dict[str, Any] = {"shape": (4, 4, 4), "spacing_mm": (1.0, 1.0, 1.0)}
    return Scan(
        **empty, **grid, files=(), size_bytes=0, dataset=more.pop("dataset", "d"), modality="CT", orientation="RAS",
        dtype="int16", intensity_min=0.0, intensity_max=1.0, split="train", fold=-1, label_uri="l", label_sha256="",
        label_values=values, classes=declared, **more,
    )  # fmt: skip


def indices(known: Classes, of: Scan, *values: int) -> list[int]:
    return known.of(of).indices(np.array(values, np.uint8)).tolist()


def test_all_declared_classes_keep_their_names_and_values() -> None:
    known = classes.union([scan(("", "liver", "", "spleen"))], Config())
    assert (known.names, known.values) == (("background", "liver", "spleen"), (0, 1, 3))
    assert indices(known, scan(("", "liver", "", "spleen")), 0, 1, 3) == [0, 1, 2]


def test_what_occurs_counts_where_nothing_is_declared() -> None:
    known = classes.union([scan(values=(0, 2)), scan(values=(0, 5))], Config())
    assert (known.names, known.values) == (("background", "class 2", "class 5"), (0, 2, 5))
    assert indices(known, scan(values=(0, 2)), 0, 2, 5) == [0, 1, 2]


def test_datasets_that_number_a_class_differently_are_matched_by_name() -> None:
    first, second = (
        scan(("", "Liver", "left_kidney")),
        scan(("background", "Kidney, left", "tumour", "liver")),
    )
    known = classes.union([first, second], Config())
    assert known.names == ("background", "Liver", "left_kidney", "tumour")
    assert len(set(known.values)) == 4
    assert indices(known, first, 0, 1, 2) == [0, 1, 2]
    assert indices(known, second, 0, 1, 2, 3) == [0, 2, 3, 1]


def test_classes_are_chosen_merged_and_renamed_by_name() -> None:
    source = scan(ABDOMEN, (0, 1, 2, 3, 4))
    chosen = classes.union([source], Config(classes=("spleen", "liver")))
    assert (chosen.names, chosen.values) == (("background", "spleen", "liver"), (0, 2, 1))
    assert indices(chosen, source, 0, 1, 2, 3, 4) == [0, 2, 1, 0, 0]
    merged = classes.union(
        [source], Config(classes={"kidneys": ("left kidney", "right kidney"), "hepar": ("liver",)})
    )
    assert merged.names == ("background", "kidneys", "hepar")
    assert indices(merged, source, 0, 1, 2, 3, 4) == [0, 2, 0, 1, 1]
    by_number = classes.union([scan(values=(0, 1, 2))], Config(classes={"organ": ("class 2",)}))
    assert indices(by_number, scan(values=(0, 1, 2)), 0, 1, 2) == [0, 0, 1]


def test_a_dataset_without_names_is_numbered_as_the_others() -> None:
    known = classes.union([scan(("", "spleen", "liver")), scan(values=(0, 1, 2))], Config(classes=("liver",)))
    assert indices(known, scan(values=(0, 1, 2)), 0, 1, 2) == [0, 0, 1]
    # A model of merged classes numbers them by itself, so numbers alone say nothing.
    merged = Classes.named(("background", "kidneys"), (0, 1), {"kidneys": ["left kidney", "right kidney"]})
    with pytest.raises(UserError, match="are not the model's"):
        classes.match([scan(values=(0, 1))], merged)


@pytest.mark.parametrize(
    ("scans", "cfg", "said"),
    [
        ([scan(values=(0,))], Config(), "no scan has a label but background"),
        (
            [scan(ABDOMEN)],
            Config(classes=("lung",)),
            "names 'lung', which no dataset has (known: liver, spleen",
        ),
        ([scan(("", "liver", "Liver"))], Config(), "'liver' and 'Liver' of one dataset are the same words"),
        ([scan(values=(0, 1, 255))], Config(), "hold 255 beside 1 and no names are declared"),
        ([scan(ABDOMEN)], Config(classes={"mean": ("liver",)}), "the class name 'mean' is taken"),
    ],
)
def test_classes_that_make_no_sense(scans: list[Scan], cfg: Config, said: str) -> None:
    with pytest.raises(UserError) as err:
        classes.union(scans, cfg)
    assert said in str(err.value)


@pytest.mark.parametrize("value", [3, 5, 255])
def test_a_value_that_is_no_class_is_refused_with_the_scan(value: int) -> None:
    source = scan(("", "liver", "spleen"), (0, 1, value))
    known = classes.union([source], Config())
    labels_XYZ = np.full((2, 2, 2), value, np.uint8)
    with pytest.raises(
        BadScan, match=rf"knee-12ab: its label map holds the value {value}, .*\(those are 0, 1, 2\)"
    ):
        classes.check_present(labels_XYZ, known.of(source), "knee-12ab", known)
    # Who chooses classes has said that the others are background.
    chosen = classes.union([source], Config(classes=("liver",)))
    classes.check_present(labels_XYZ, chosen.of(source), "knee-12ab", chosen)


def test_a_model_is_judged_on_another_dataset_by_names() -> None:
    model = Classes.named(("background", "liver", "spleen", "pancreas"), (0, 1, 2, 3))
    external = scan(("", "Spleen", "gall bladder", "liver"), (0, 1, 2, 3))
    (label_map,) = classes.match([external], model).values()
    truth, found = label_map.as_values(
        np.array([0, 1, 2, 3], np.uint8), np.array([0, 2, 3, 1], np.uint8), model.values
    )
    assert truth.tolist() == [0, 2, 0, 1]
    assert found.tolist() == [0, 2, 3, 1]
    assert label_map.present() == {1, 2}
    assert label_map.unknown == {2: "gall bladder"}
    renamed = Classes.named(model.names, model.values, {"liver": ["hepar"]})
    assert classes.match([scan(("", "hepar"))], renamed)[("", "hepar")].present() == {1}
    with pytest.raises(UserError, match="names 'lung', which the model lacks"):
        Classes.named(model.names, model.values, {"lung": ["pulmo"]})


@pytest.mark.parametrize("declared", [("", "milz", "niere"), ()])
def test_a_dataset_without_any_of_the_models_classes_is_refused_with_both_tables(
    declared: tuple[str, ...],
) -> None:
    model = Classes.named(("background", "liver", "spleen"), (0, 1, 2))
    with pytest.raises(UserError) as err:
        classes.match([scan(declared, (0, 1, 7), dataset="external")], model)
    said = str(err.value)
    assert "external" in said
    assert "1 liver, 2 spleen" in said
    assert ("1 milz, 2 niere" if declared else "1 ?, 7 ?") in said
    assert classes.match([scan((), (0, 2))], model)[()].present() == {
        1,
        2,
    }  # by number: nothing else is known


def test_ignored_voxels_count_in_no_score() -> None:
    declared = ("background", "liver", "ignore")
    known = classes.union([scan(declared)], Config())
    assert known.names == ("background", "liver")
    label_map = known.of(scan(declared))
    labels_XYZ = np.array([[[0, 1, 2, 2]]], np.uint8)
    assert label_map.indices(labels_XYZ).tolist() == [[[0, 1, IGNORE, IGNORE]]]
    truth, found = label_map.as_values(labels_XYZ, np.array([[[0, 1, 1, 0]]], np.uint8), known.values)
    assert (truth.tolist(), found.tolist()) == ([[[0, 1, 0, 0]]], [[[0, 1, 0, 0]]])
    counts = metrics.overlap(np.array([[[0, 1, 1, 0]]]), label_map.indices(labels_XYZ), 2)
    assert counts.tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_leaves_ignored_voxels_out(dtype: torch.dtype) -> None:
    """Against plain torch on the voxels that count, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 5, 6), generator=generator)
    labels[0, :2], labels[1, :, 3] = IGNORE, IGNORE
    wanted_dice, wanted_ce = [], []
    for logits_KXYZ, labels_XYZ in zip(logits, labels):
        known = labels_XYZ != IGNORE
        p = logits_KXYZ[:, known].softmax(0)
        one_hot = torch.nn.functional.one_hot(labels_XYZ[known], 3).T
        sums = (p * one_hot).sum(1), p.sum(1), one_hot.sum(1)
        wanted_dice.append(1 - ((2 * sums[0] + 1e-5) / (sums[1] + sums[2] + 1e-5)).mean())
        wanted_ce.append(torch.nn.functional.cross_entropy(logits_KXYZ[:, known].T, labels_XYZ[known]))
    wanted = torch.stack(wanted_dice), torch.stack(wanted_ce)
    found = _segmentation.dice_and_ce(logits, labels.to(torch.uint8), ignores=True)
    for got, want in zip(found, wanted):
        torch.testing.assert_close(got, want)
    weights = torch.tensor([0.3, 0.7], dtype=dtype)
    grads = [
        torch.autograd.grad((d * weights).sum() + (c * weights).sum(), logits)[0] for d, c in (found, wanted)
    ]
    torch.testing.assert_close(*grads)
    assert (grads[0].movedim(1, -1)[labels == IGNORE] == 0).all()
    whole = _segmentation.hard_dice(logits.detach(), labels.to(torch.uint8), 3)
    assert all(torch.isfinite(value).all() for value in whole.values())


def test_without_ignored_voxels_the_loss_is_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(2, 3, 4, 4, 4, generator=generator), torch.randint(0, 3, (2, 4, 4, 4))
    for got, want in zip(*(_segmentation.dice_and_ce(logits, labels, ignores=i) for i in (True, False))):
        torch.testing.assert_close(got, want)


def test_a_scan_of_another_split_has_the_same_map() -> None:
    known = classes.union([scan(ABDOMEN)], Config())
    assert known.of(replace(scan(ABDOMEN), split="test")) == known.of(scan(ABDOMEN))


# ------------------------------------------------------------------------------------------------ regions

TUMOUR = ("background", "edema", "necrosis", "enhancing")
WT_TC_ET = {"WT": ("edema", "necrosis", "enhancing"), "TC": ("necrosis", "enhancing"), "ET": ("enhancing",)}


def test_regions_are_chosen_by_the_names_of_their_classes() -> None:
    known = classes.union([scan(TUMOUR, (0, 1, 2, 3))], Config(regions=WT_TC_ET))
    assert known.regions == {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}
    assert known.region_values == (1, 2, 3)  # what a region has and none after it
    given = classes.union(
        [scan(TUMOUR)], Config(regions={"ET": ("enhancing",), "WT": ("edema",)}, region_values=(3, 1))
    )
    assert given.region_values == (3, 1)


def test_regions_that_a_dataset_declares() -> None:
    declared = scan(
        ("background", "label 1", "label 2", "ET"),
        regions=("WT:1,2,3", "TC:2,3", "ET:3"),
        region_values=(1, 2, 3),
    )
    known = classes.union([declared], Config())
    assert (known.regions, known.region_values) == ({"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}, (1, 2, 3))


def test_classes_that_regions_need_cannot_be_left_out() -> None:
    declared = scan(("", "label 1", "ET"), regions=("WT:1,2", "ET:2"), region_values=(1, 2))
    with pytest.raises(UserError, match="leaves out a class of the region 'WT'"):
        classes.union([declared], Config(classes=("ET",)))
    many = scan(("", *(f"c{i}" for i in range(9))), regions=tuple(f"r{i}:{i + 1}" for i in range(9)))
    with pytest.raises(UserError, match="there are 9 regions; at most 8"):
        classes.union([many], Config())


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (Config(regions={"WT": ("oedema",)}), "names the class 'oedema', which there is not (known: edema"),
        (Config(regions={"WT": ("edema", "necrosis")}), "what the region 'WT' is written as is not clear"),
        (Config(regions=WT_TC_ET, region_values=(1, 2)), "give each of WT, TC, ET one of 1, 2, 3"),
    ],
)
def test_regions_that_make_no_sense(cfg: Config, said: str) -> None:
    with pytest.raises(UserError) as err:
        classes.union([scan(TUMOUR)], cfg)
    assert said in str(err.value)


def test_regions_become_bits_and_bits_the_last_region_on_top() -> None:
    bits = classes.membership([(1, 2, 3), (2, 3), (3,)])
    assert bits[:5].tolist() == [0b000, 0b001, 0b011, 0b111, 0]
    assert classes.written_as((1, 2, 4))[[0b000, 0b001, 0b011, 0b111, 0b100, 0b101]].tolist() == [
        0,
        1,
        2,
        4,
        4,
        4,
    ]


def test_the_loss_of_regions_is_that_of_each_by_itself() -> None:
    """Against plain torch on the voxels that count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (2, 3, 4, 5), generator=generator)
    labels[0, 0] = IGNORE
    regions = _segmentation.Regions([(1, 2, 3), (3,)])
    ((dice_B, ce_B),) = regions.losses(SegOut(logits, [], None), labels.to(torch.uint8))
    for logits_RXYZ, labels_XYZ, dice, ce in zip(logits, labels, dice_B, ce_B):
        known = labels_XYZ != IGNORE
        t = torch.stack([(labels_XYZ[known] >= 1), (labels_XYZ[known] == 3)]).double()
        p = logits_RXYZ[:, known].sigmoid()
        parts = (2 * (p * t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5)
        torch.testing.assert_close(dice, 1 - parts.mean())
        torch.testing.assert_close(ce, torch.nn.functional.binary_cross_entropy(p, t))
    cfg = _segmentation.Losses(batch_dice=True, squared=True)
    ((of_batch_B, _),) = regions.losses(SegOut(logits, [], None), labels.to(torch.uint8), cfg)
    known = labels != IGNORE
    t, p = (
        torch.stack([labels[known] >= 1, labels[known] == 3]).double(),
        logits.movedim(1, 0)[:, known].sigmoid(),
    )
    parts = (2 * (p * t).sum(1) + 1e-5) / (p.square().sum(1) + t.sum(1) + 1e-5)
    torch.testing.assert_close(of_batch_B, (1 - parts.mean()).expand(2))
    measured = regions.metrics(torch.where(labels[:, None] == 3, 1.0, -1.0).expand(-1, 2, -1, -1, -1), labels)
    both, sizes = measured["train_dice_per_class"]
    assert both[1] == sizes[1] > 0
    assert both[0] < sizes[0]


def test_label_values_above_a_byte() -> None:
    """As MM-WHS and FreeSurfer number; label maps are then written with 1, 2, 3."""
    row = scan(values=(0, 205, 500, 850))
    by_name = Config(classes={"cavity": ("LV", "class 500"), "wall": ("class 205",)})
    known = classes.union([row], by_name)
    assert (known.names, known.values) == (("background", "cavity", "wall"), (0, 1, 2))
    labels_XYZ = np.array([[[0, 205, 500, 850]]], np.uint16)
    np.testing.assert_array_equal(known.of(row).indices(labels_XYZ), [[[0, 2, 1, 0]]])
    assert classes.union([row], Config()).values == (0, 1, 2, 3)
    # Another scan of the dataset may hold more.
    np.testing.assert_array_equal(known.of(scan(values=(0, 205))).indices(labels_XYZ), [[[0, 2, 0, 0]]])


def test_one_of_a_classs_names_is_enough() -> None:
    cfg = Config(classes={"liver": ("hepar", "liver"), "spleen": ("spleen",)})
    assert classes.union([scan(ABDOMEN)], cfg).values[1:] == (1, 2)
    assert classes.absent([scan(ABDOMEN)], cfg) == ["hepar"]


def test_more_classes_than_a_byte_are_refused() -> None:
    with pytest.raises(UserError, match="300 classes, and a network learns at most 254"):
        classes.union([scan(("", *(f"region {i}" for i in range(300))))], Config())
