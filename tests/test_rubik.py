"""Both Rubik's cube pretexts: what moves and orders are, and the losses against slow loops.

Shapes: B samples, C input channels, X Y Z the crop's axes, x y z a cell cut's, F features, K orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import Stub, assert_step, batch_for, data_spec_for, sample_for
from test_selfsup import LEARNERS
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.methods import rubik
from logonet.methods.rubik import Config, Move, draw_moves, moved, orders_of

SIZE = (16, 16, 16)
CLASSIFY: dict[str, Any] = {"form": "classify", "cell_multiple_vox": 6}  # cuts of 6 from cells of 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(**options: Any) -> Config:
    return methods.config("rubik", options)


def module_of(net: nn.Module | None = None, in_channels: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    return methods.build("rubik", net or Stub(in_channels), data_spec_for(SIZE, in_channels), **options)


def batch_of(cfg: Config, num_samples: int = 2, in_channels: int = 1) -> dict[str, Tensor]:
    return batch_for("rubik", cfg, data_spec_for(SIZE, in_channels), list(range(num_samples)))


def crop(index: int = 0, size_vox: tuple[int, int, int] = SIZE, in_channels: int = 1) -> np.ndarray:
    return seeding.rng(3, index).integers(0, 65536, (in_channels, *size_vox)).astype(np.uint16)


# ------------------------------------------------------------------------------------------------ moves


def slow_moved(image_CXYZ: np.ndarray, moves: list[Move], cubie_vox: int) -> np.ndarray:
    """Voxel by voxel, one quarter turn after the other: (i, j) of an n x n plane goes to (n - 1 - j, i)."""
    for axis, slab, quarters in moves:
        for _ in range(quarters % 4):
            out = image_CXYZ.copy()
            first, second = (a for a in range(3) if a != axis)
            n = image_CXYZ.shape[1 + second]
            for place in np.ndindex(*image_CXYZ.shape[1:]):
                if place[axis] // cubie_vox == slab:
                    to = list(place)
                    to[first], to[second] = n - 1 - place[second], place[first]
                    out[:, *to] = image_CXYZ[:, *place]
            image_CXYZ = out
    return image_CXYZ


def test_moves_turn_slabs() -> None:
    image = crop(size_vox=(6, 6, 6), in_channels=2)
    moves = [Move(0, 1, 1), Move(1, 0, 2), Move(2, 2, 3), Move(0, 0, 1), Move(2, 1, 1)]
    np.testing.assert_array_equal(moved(image, moves, 2), slow_moved(image, moves, 2))


def test_moves_keep_all_values_and_can_be_undone() -> None:
    cfg = config_of(cubie_vox=4)
    for size_vox in (SIZE, (16, 8, 12)):
        changed = 0
        for index in range(20):
            image = crop(index, size_vox)
            before = image.copy()
            moves = draw_moves(cfg, size_vox, seeding.rng(index))
            turned = moved(image, moves, 4)
            np.testing.assert_array_equal(image, before)
            np.testing.assert_array_equal(np.sort(turned, axis=None), np.sort(image, axis=None))
            back = [move._replace(quarters=-move.quarters) for move in reversed(moves)]
            np.testing.assert_array_equal(moved(turned, back, 4), image)
            changed += not np.array_equal(turned, image)
        assert changed >= 19


def test_a_constant_crop_is_a_fixed_point() -> None:
    image = np.full((1, *SIZE), 777, np.uint16)
    moves = draw_moves(config_of(cubie_vox=4), SIZE, seeding.rng(0))
    np.testing.assert_array_equal(moved(image, moves, 4), image)


def test_what_moves_are_drawn() -> None:
    cfg = config_of(cubie_vox=16)
    every = [draw_moves(cfg, (96, 96, 96), seeding.rng(i)) for i in range(400)]
    assert {len(moves) for moves in every} == set(range(3, 11))
    flat = [move for moves in every for move in moves]
    assert {m.axis for m in flat} == {0, 1, 2}
    assert {m.slab for m in flat} == set(range(6))
    assert {m.quarters for m in flat} == {1, 2, 3}
    oblong = [move for i in range(200) for move in draw_moves(cfg, (96, 96, 64), seeding.rng(i))]
    assert {m.quarters for m in oblong if m.axis == 2} == {1, 2, 3}
    assert {m.quarters for m in oblong if m.axis != 2} == {2}
    assert {m.slab for m in oblong if m.axis == 2} == set(range(4))


def test_restore_prepares_the_moved_crop_and_the_crop() -> None:
    sample = sample_for(0, data_spec_for(SIZE), methods.needs("rubik"))
    cfg = config_of(cubie_vox=4)
    ready = rubik.prepare(sample, cfg, seeding.rng(9))
    np.testing.assert_array_equal(ready["target"], sample["image_CXYZ"])
    moves = draw_moves(cfg, SIZE, seeding.rng(9))
    np.testing.assert_array_equal(ready["image"], moved(sample["image_CXYZ"], moves, 4))
    assert ready["image"].dtype == np.uint16


# ---------------------------------------------------------------------------------------------- restore


class Same(nn.Module):
    """A backbone whose features are the crop."""

    channels, strides, feature_channels = (1,), ((1, 1, 1),), 1
    encoder_prefixes, head_prefixes = ("scale",), ()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return [x_BCXYZ * self.scale]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return feats[0]


def same() -> Any:
    module = module_of(Same(), cubie_vox=4)
    with torch.no_grad():
        module.head.weight.fill_(1)
        module.head.bias.zero_()
    return module


def test_an_identity_leaves_the_crop_as_it_was_moved() -> None:
    module, cfg = same(), config_of(cubie_vox=4)
    _, metrics = module(batch_of(cfg), 0.5)
    assert metrics["restored_error"][0] == metrics["restored_error"][1] > 0
    loss, metrics = module(batch_for("rubik", cfg, data_spec_for(SIZE), [0], image="constant"), 0.5)
    assert loss == 0
    assert metrics["restored_error"].tolist() == [0, 0]


@pytest.mark.parametrize("in_channels", [1, 2])
def test_loss_is_ten_times_the_mean_squared_error(in_channels: int) -> None:
    module = module_of(in_channels=in_channels, cubie_vox=4).eval()
    batch = batch_of(module.cfg, in_channels=in_channels)
    loss, metrics = module(batch, 0.5)
    assert module.head.weight.shape == (in_channels, 6, 1, 1, 1)
    errors, unmoved = [], []
    with torch.no_grad():
        x = batch["image"].double() / 65535
        net = module.backbone
        found = module.head(net.decode_features(x.float(), net.encode(x.float())))
    for b in range(2):
        target = (batch["target"][b].double() / 65535).flatten().tolist()
        for out, image in ((errors, found[b]), (unmoved, x[b])):
            out.append(sum((i - t) ** 2 for i, t in zip(image.flatten().tolist(), target)) / len(target))
    assert loss.item() == pytest.approx(10 * sum(errors) / 2, rel=1e-5)
    assert metrics["loss"].tolist() == pytest.approx([10 * sum(errors), 2], rel=1e-5)
    assert metrics["restored_error"].tolist() == pytest.approx([sum(errors), sum(unmoved)], rel=1e-5)


def test_an_adversary_is_told_apart_from_the_crop_by_what_the_network_learns_to_avoid() -> None:
    """One gradient for both: the discriminator goes down its loss, the network up."""
    module = module_of(cubie_vox=4, w_adversarial=0.5)
    batch = batch_of(module.cfg)
    loss, metrics = module(batch, 0.5)
    x, target = (batch[key].float() / 65535 for key in ("image", "target"))
    net, tell = module.backbone, module.discriminator
    found = module.head(net.decode_features(x, net.encode(x)))
    ones, zeros = torch.ones_like(tell(target)), torch.zeros_like(tell(target))
    cross = F.binary_cross_entropy_with_logits
    told = (cross(tell(target), ones) + cross(tell(found), zeros)) / 2
    mse = (found - target).square().mean()
    torch.testing.assert_close(loss, 10 * mse + 0.5 * told)
    assert (metrics["adversarial_loss"][0] / 2).item() == pytest.approx(told.item(), rel=1e-5)
    loss.backward()
    own, theirs = list(tell.parameters()), [net.fine.weight, module.head.weight]
    for p, expected in zip(own, torch.autograd.grad(0.5 * told, own, retain_graph=True), strict=True):
        torch.testing.assert_close(p.grad, expected)
    for p, expected in zip(theirs, torch.autograd.grad(10 * mse - 0.5 * told, theirs), strict=True):
        torch.testing.assert_close(p.grad, expected)
    assert "adversarial_loss" not in module_of(cubie_vox=4)(batch, 0.5)[1]


def test_restore_trains_all_but_the_classifier() -> None:
    module = module_of(cubie_vox=4)
    assert {k for k, p in module.named_parameters() if not p.requires_grad} == {
        "backbone.classify.weight",
        "backbone.classify.bias",
    }


@pytest.mark.parametrize("options", [{"cubie_vox": 4}, {**CLASSIFY, "orders": 2}])
def test_loss_falls_on_two_crops(options: dict[str, Any]) -> None:
    module = module_of(**options)
    batch = batch_of(module.cfg)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(20):
        loss, _ = module(batch, step / 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


# --------------------------------------------------------------------------------------------- classify


def test_orders_are_far_from_one_another() -> None:
    table = orders_of(100)
    assert table.shape == (100, 8)
    assert all(sorted(order) == list(range(8)) for order in table.tolist())
    apart = [(a != b).sum() for a, b in itertools.combinations(table, 2)]
    assert min(apart) == 5
    assert orders_of(100) is table
    with pytest.raises(ValueError, match="read-only"):
        table[0, 0] = 1


def test_every_next_order_is_the_farthest_there_is() -> None:
    """Greedily, max-min: no order that was left out is farther from its nearest than the one that was taken."""
    every = list(itertools.permutations(range(8)))
    table = [tuple(order) for order in orders_of(6).tolist()]
    for n in range(1, 6):
        nearest = {
            order: min(sum(i != j for i, j in zip(order, there)) for there in table[:n])
            for order in every[:: 1 if n == 1 else 7]
        }
        taken = min(sum(i != j for i, j in zip(table[n], there)) for there in table[:n])
        assert taken >= max(nearest.values())
    assert orders_of(100)[:6].tolist() == orders_of(6).tolist()


@pytest.mark.parametrize(
    ("size_vox", "multiple", "cut"),
    [
        ((96, 96, 96), 16, (32, 32, 32)),
        ((96, 96, 96), 32, (32, 32, 32)),
        ((96, 96, 96), 6, (42, 42, 42)),  # the papers'
        ((128, 128, 64), 16, (48, 48, 16)),
        ((64, 64, 64), 16, (16, 16, 16)),
    ],
)
def test_cuts_are_the_largest_multiple_below_the_cell(
    size_vox: tuple[int, int, int], multiple: int, cut: tuple[int, int, int]
) -> None:
    cfg = config_of(form="classify", cell_multiple_vox=multiple)
    methods.check("rubik", cfg, data_spec_for(size_vox))
    assert methods.sizes("rubik", cfg, size_vox) == (cut,)
    assert methods.sizes("rubik", config_of(), size_vox) == (size_vox,)


def numbered() -> np.ndarray:
    """A crop each of whose voxels has a value of its own, none of them 0."""
    return (1 + np.arange(math.prod(SIZE)).reshape(1, *SIZE)).astype(np.uint16)


def test_cells_lie_in_the_order_and_as_their_marks_say() -> None:
    cfg, seen = config_of(**CLASSIFY), set()
    for index in range(30):
        ready = rubik.prepare({"image_CXYZ": numbered()}, cfg, seeding.rng(index))
        assert ready["cells"].shape == (8, 1, 6, 6, 6)
        for place, cell in enumerate(orders_of(100)[ready["order"]]):
            piece = ready["cells"][place, 0]
            about_x, about_z = ready["turned"][:, place]
            assert not (about_x and about_z)
            if about_x:
                piece = piece[:, ::-1, ::-1]
            if about_z:
                piece = piece[::-1, ::-1]
            places = np.stack(np.unravel_index(np.maximum(piece.astype(int) - 1, 0), SIZE), -1)
            shown = piece > 0
            assert shown.all() != ready["masked"][place]
            start = (places - np.stack(np.indices((6, 6, 6)), -1))[shown]
            assert (start == start[0]).all()  # an upright piece of the crop
            low = np.array(np.unravel_index(int(cell), (2, 2, 2))) * 8
            assert (low <= start[0]).all() and (start[0] + 6 <= low + 8).all()  # of the right cell
            seen.add(tuple(start[0] - low))
    assert len(seen) == 27  # a cut of 6 has 3 places in a cell of 8 along each axis


def test_a_turn_twice_is_none() -> None:
    image = crop()
    for axes in rubik.TURNS:
        flipped = np.flip(image, tuple(a + 1 for a in axes))
        np.testing.assert_array_equal(np.flip(flipped, tuple(a + 1 for a in axes)), image)
        assert np.array_equal(flipped, image) == (axes == ())


def test_how_often_cells_are_turned_and_masked() -> None:
    cfg, total, masked, hidden = config_of(**CLASSIFY), np.zeros(2), 0, 0
    num = 300
    for index in range(num):
        ready = rubik.prepare({"image_CXYZ": numbered()}, cfg, seeding.rng(1, index))
        total += ready["turned"].sum(1)
        masked += ready["masked"].sum()
        hidden += (ready["cells"] == 0).sum()
    assert abs(total - num * 8 / 3).max() < 5 * math.sqrt(num * 8 * 2 / 9)
    assert abs(masked - num * 4) < 5 * math.sqrt(num * 8 / 4)
    voxels = masked * 6**3
    assert abs(hidden - voxels / 2) < 5 * math.sqrt(voxels / 4)


@pytest.mark.parametrize("task", ["turn", "mask"])
def test_tasks_can_be_left_out(task: str) -> None:
    module = module_of(**CLASSIFY, **{task: False})
    batch = batch_of(module.cfg)
    assert not batch[{"turn": "turned", "mask": "masked"}[task]].any()
    _, metrics = module(batch, 0.5)
    assert f"{task}_loss" not in metrics
    assert f"{task}_accuracy" not in metrics
    assert_step(module, batch, 2, channels=8)


def test_losses_of_guessing() -> None:
    """ln K; the entropy of 1/3, .6365; ln 2, .6931."""
    module = module_of(**CLASSIFY)
    with torch.no_grad():
        for head in module.heads.values():
            head.weight.zero_()
            head.bias.zero_()
        module.heads["turn"].bias.fill_(math.log(1 / 2))  # the logit of 1/3
    batch = batch_of(module.cfg, num_samples=3)
    batch["turned"] = (torch.arange(16).view(1, 2, 8) % 3 == 0).repeat(3, 1, 1)
    batch["turned"][:, 1, 7] = False  # 15 bits of which a third is set, and one that is not
    loss, metrics = module(batch, 0.5)
    order, turn, mask = ((metrics[f"{task}_loss"][0] / 3).item() for task in ("order", "turn", "mask"))
    assert order == pytest.approx(4.605, abs=1e-3)
    assert mask == pytest.approx(0.6931, abs=1e-4)
    assert turn == pytest.approx((15 * 0.6365 - math.log(2 / 3)) / 16, abs=1e-4)
    assert loss.item() == pytest.approx((order + turn + mask) / 3, rel=1e-6)


def test_classify_is_its_tasks_slowly() -> None:
    module = module_of(**CLASSIFY).eval()
    batch = batch_of(module.cfg)
    loss, metrics = module(batch, 0.5)
    losses, right, bits = [], 0, {"turn": 0, "mask": 0}
    with torch.no_grad():
        for b in range(2):
            means = []
            for cell_Cxyz in batch["cells"][b]:
                feats = module.backbone.encode(cell_Cxyz[None].float() / 65535)
                means += feats[-1][0].flatten(1).mean(1).tolist()
            shared = module.shared(torch.tensor(means))
            scores = module.heads["order"](shared).tolist()
            own = [math.log(sum(math.exp(s) for s in scores)) - scores[int(batch["order"][b])]]
            right += int(np.argmax(scores)) == int(batch["order"][b])
            for task, key in (("turn", "turned"), ("mask", "masked")):
                truth = batch[key][b].flatten().tolist()
                probabilities = [1 / (1 + math.exp(-s)) for s in module.heads[task](shared).tolist()]
                own.append(
                    -sum(math.log(p if t else 1 - p) for p, t in zip(probabilities, truth)) / len(truth)
                )
                bits[task] += sum((p > 0.5) == t for p, t in zip(probabilities, truth))
            losses.append(sum(own) / 3)
    assert module.levels == (1,)
    assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert metrics["loss"].tolist() == pytest.approx([sum(losses), 2], rel=1e-5)
    assert metrics["order_accuracy"].tolist() == [right, 2]
    assert metrics["order_chance"].tolist() == pytest.approx([0.02, 2])
    assert metrics["turn_accuracy"].tolist() == [bits["turn"], 32]
    assert metrics["mask_accuracy"].tolist() == [bits["mask"], 16]


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("in_channels", [1, 2])
def test_classify_keeps_the_contract(in_channels: int, num_samples: int) -> None:
    module = module_of(in_channels=in_channels, **CLASSIFY)
    assert_step(module, batch_of(module.cfg, num_samples, in_channels), num_samples, channels=8)
    trained = {k.split(".")[1] for k, p in module.backbone.named_parameters("n") if p.requires_grad}
    assert trained == {"fine", "coarse"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("image", ["noise", "constant", "zero"])
def test_classify_stays_finite(image: str, autocast: bool) -> None:
    module = module_of(**CLASSIFY)
    batch = batch_for("rubik", module.cfg, data_spec_for(SIZE), [0, 1], image=image)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = module(batch, 0.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", LEARNERS)
def test_classify_trains_backbones(name: str) -> None:
    torch.manual_seed(0)
    net = networks.build(name, 1, 3, **networks.tiny(name))
    data_spec = data_spec_for((68, 68, 68))  # cells of 34, cuts of 32
    module = methods.build("rubik", net, data_spec, form="classify", cell_multiple_vox=32)
    batch = batch_for("rubik", module.cfg, data_spec, [0])
    assert_step(module, batch, 1, channels=net.channels[-1])


def test_classify_is_pure_and_repeats_to_the_bit() -> None:
    def step() -> list[Tensor]:
        module = module_of(**CLASSIFY)
        batch = batch_of(module.cfg)
        loss, metrics = module(batch, 0.0)
        loss.backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        return [loss, *batch.values(), *metrics.values(), *grads]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


# ------------------------------------------------------------------------------- warnings and settings


def test_what_has_learnt_nothing_is_warned_of() -> None:
    lost = {"epoch": 9, "restored_error": 1.3}
    assert "error 1.30 of theirs" in (rubik.warning(lost) or "")
    assert rubik.warning({**lost, "epoch": 5}) is None
    assert rubik.warning({**lost, "restored_error": 0.8}) is None
    assert rubik.warning({**lost, "restored_error": math.nan}) is None
    guess = {"epoch": 9, "order_loss": 4.61, "order_accuracy": 0.012, "order_chance": 0.01}
    assert "no better than by chance (accuracy 0.012, by chance 0.010)" in (
        methods.warning("rubik", guess) or ""
    )
    assert rubik.warning({**guess, "order_loss": 4.5}) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cubie_vox": 16}, "cubie_vox is 16 and crops have 16x16x16.*2 cubies or more"),
        ({"cubie_vox": 3}, "cubie_vox is 3"),
        ({"cubie_vox": 0}, "cubie_vox is 0"),
        ({"cubie_vox": 4, "moves": (5, 3)}, "moves"),
        ({"cubie_vox": 4, "moves": (0, 3)}, "moves"),
        ({"cubie_vox": 4, "w_restore": 0.0}, "w_restore"),
        ({"form": "classify"}, "cell_multiple_vox is 16 and crops have 16x16x16"),
        ({"form": "classify", "cell_multiple_vox": 0}, "cell_multiple_vox is 0"),
        ({**CLASSIFY, "size_vox": (17, 16, 16)}, "even"),
        ({**CLASSIFY, "orders": 1}, "orders is 1"),
        ({**CLASSIFY, "orders": 40321}, "orders is 40321"),
        ({**CLASSIFY, "hidden": 0}, "hidden is 0"),
        ({"form": "solve"}, "form"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        methods.build("rubik", Stub(), data_spec_for(SIZE), **options)


def test_a_cut_that_the_network_cannot_take_is_refused_before_training() -> None:
    from logonet import training

    backbone = Component("logonet", networks.config("logonet", networks.tiny("logonet")))
    method = Component("rubik", config_of(form="classify"))
    training.dry_run(backbone, method, methods.DataSpec((96, 96, 96), batch_size=2))
    with pytest.raises(UserError, match=r"\(16, 16, 16\) does not fit backbone 'logonet'.*\(32, 32, 32\)"):
        training.dry_run(backbone, method, methods.DataSpec((64, 64, 64), batch_size=2))
