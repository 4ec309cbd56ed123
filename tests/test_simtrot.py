"""SimTROT against its closed forms, slow loops and every turn it can take.

Shapes: B samples, C input channels, X Y Z the crop's axes, F features, x y z a map's axes, T tokens, D columns.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from test_methods import Stub
from test_selfsup import assert_learns_two_phantoms, phantom_batch, phantom_crop
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.methods import _views, simtrot
from logonet.methods._selfsup import nt_xent

# ----------------------------------------------------------------------------------- rotate and restore

PLANE = [(turns, x, y, 0) for turns in range(4) for x, y in ((0, 0), (1, 0), (0, 1))]
ALL = [(turns, *flips) for turns in range(4) for flips in itertools.product((0, 1), repeat=3)]


def identity(x_BCXYZ: Tensor) -> Tensor:
    return x_BCXYZ


def means_of_patches(x_BCXYZ: Tensor) -> Tensor:
    return F.avg_pool3d(x_BCXYZ, (2, 2, 4))


@pytest.mark.parametrize("encoder", [identity, means_of_patches])
def test_restoring_is_exact_for_an_encoder_that_turns_along(encoder: Any):
    # Whole numbers, whose sums are exact in any order.
    image_CXYZ = torch.randint(0, 2**15, (2, 8, 8, 12), generator=torch.Generator().manual_seed(0)).float()
    image_BCXYZ, move_B4 = image_CXYZ.expand(len(ALL), -1, -1, -1, -1), torch.tensor(ALL)
    seen_BCXYZ = simtrot.moved(image_BCXYZ, move_B4)
    for move, seen_CXYZ in zip(ALL, seen_BCXYZ):
        assert torch.equal(seen_CXYZ, image_CXYZ) == (move in ((0, 0, 0, 0), (2, 1, 1, 0)))
    assert torch.equal(simtrot.restored(encoder(seen_BCXYZ), move_B4), encoder(image_BCXYZ))


def test_moves_turn_first_and_mirror_then():
    image = torch.arange(2 * 3 * 3 * 2.0).reshape(2, 3, 3, 2)
    seen = simtrot.moved(image.expand(len(ALL), -1, -1, -1, -1), torch.tensor(ALL))
    for found, (turns, *flips) in zip(seen, ALL):
        mirrored = [axis for axis, flip in enumerate(flips, start=1) if flip]
        assert torch.equal(found, torch.rot90(image, turns, (1, 2)).flip(mirrored))
    plane = [tuple(one.flatten().tolist()) for one, move in zip(seen, ALL) if move in PLANE]
    assert len(set(plane)) == 8  # a square's all


def test_which_moves_are_drawn():
    generator = seeding.rng(0, "moves")

    def seen(size_vox: tuple[int, int, int], flips: Any) -> set[tuple[int, ...]]:
        return {simtrot.draw_move(size_vox, flips, generator) for _ in range(1000)}

    assert seen((8, 8, 4), "plane") == set(PLANE)
    assert seen((8, 8, 4), "all") == set(ALL)
    assert seen((8, 4, 8), "plane") == {move for move in PLANE if move[0] % 2 == 0}


def test_a_row_is_one_place_with_all_its_channels():
    map_BFxyz = torch.arange(2 * 5 * 2 * 3 * 4.0).reshape(2, 5, 2, 3, 4)
    rows_BTF = simtrot.tokens(map_BFxyz)
    for i, (x, y, z) in itertools.product(range(2), itertools.product(range(2), range(3), range(4))):
        assert torch.equal(rows_BTF[i, (x * 3 + y) * 4 + z], map_BFxyz[i, :, x, y, z])
    assert simtrot.tokens(map_BFxyz.bfloat16()).dtype == torch.float32


class Places(nn.Module):
    """An encoder that turns along with its crop, with tokens of ``side`` voxels."""

    feature_channels = 3
    encoder_prefixes, head_prefixes = ("mix.",), ()

    def __init__(self, side: tuple[int, int, int] = (4, 4, 4)) -> None:
        super().__init__()
        self.channels, self.strides = (3,), (side,)
        self.mix = nn.Conv3d(1, 3, 1)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return [F.avg_pool3d(self.mix(x_BCXYZ), self.strides[0])]


def build(
    backbone: nn.Module | None = None, size_vox: tuple[int, int, int] = (32, 32, 32), **options: Any
) -> Any:
    torch.manual_seed(0)
    return methods.build("simtrot", backbone or Stub(), size_vox=size_vox, **options)


@pytest.mark.parametrize(
    ("side", "move", "done"),
    [
        ((4, 4, 4), (1, 1, 0, 0), (1, 1, 0, 0)),
        ((4, 8, 8), (1, 1, 0, 0), (0, 1, 0, 0)),  # tokens that are no squares cannot be turned by 90 degrees
        ((4, 8, 8), (3, 0, 1, 0), (2, 0, 1, 0)),
    ],
)
def test_in_the_module_places_match_again(
    side: tuple[int, int, int], move: tuple[int, ...], done: tuple[int, ...]
):
    module = build(Places(side), mask=False)
    image = torch.from_numpy(phantom_crop(0).astype(np.float32) / 65535)
    batch = {key: torch.stack([image, image.flip(3)]) for key in ("first", "second")}
    batch["move"] = torch.tensor([move, (0, 0, 0, 0)])
    seen: list[Tensor] = []
    module.backbone.mix.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    module.projector.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    module(batch, 0.0)
    both, first, second = seen
    assert torch.equal(both[0], simtrot.moved(image[None], torch.tensor([done]))[0])
    torch.testing.assert_close(first, second)
    assert len(torch.unique(first, dim=0)) > 10


# ------------------------------------------------------------------------------------------------- loss


def plain_token_contrast(a_BTD: Tensor, b_BTD: Tensor, temperature: float, w: float) -> Tensor:
    """The paper's Eq. 3, with Eq. 1's tau and positive in the denominator, token by token."""
    views = [a_BTD, b_BTD]
    keys = list(itertools.product(range(2), range(len(a_BTD)), range(a_BTD.shape[1])))

    def s(one: tuple[int, ...], other: tuple[int, ...]) -> Tensor:
        return F.cosine_similarity(views[one[0]][one[1:]], views[other[0]][other[1:]], dim=0)

    losses = []
    for anchor in keys:
        view, i, m = anchor
        positive = (1 - view, i, m)
        total = torch.exp(s(anchor, positive) / temperature)
        for key in keys:
            if key not in (anchor, positive):
                same_place = key[1] != i and key[2] == m
                total = total + (w if same_place else 1) * torch.exp(s(anchor, key) / temperature)
        losses.append(-s(anchor, positive) / temperature + torch.log(total))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("num_samples", "num_tokens"), [(2, 3), (3, 4), (3, 1)])
@pytest.mark.parametrize("w", [0.5, 1.0, 5.0])
def test_the_loss_is_equation_3(num_samples: int, num_tokens: int, w: float):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(num_samples, num_tokens, 5, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    found, expected = (loss(a, b, 0.3, w) for loss in (simtrot.token_contrast, plain_token_contrast))
    torch.testing.assert_close(found, expected)
    if w == 1:
        whole = nt_xent(a.flatten(0, 1), b.flatten(0, 1), 0.3)
        assert found.item() == pytest.approx(whole.item(), abs=1e-6)


def cases(num_samples: int, num_tokens: int = 64) -> dict[str, Tensor]:
    """(B, T, D): all tokens alike; alike at each place; all different."""
    return {
        "identical": torch.ones(num_samples, num_tokens, 300),
        "by place": torch.eye(300)[:num_tokens].expand(num_samples, -1, -1),
        "ideal": torch.eye(300)[: num_samples * num_tokens].unflatten(0, (num_samples, num_tokens)),
    }


@pytest.mark.parametrize(
    ("num_samples", "case", "values"),
    [
        (2, "identical", (5.5413, 5.5722, 5.6095)),
        (2, "by place", (3.6137, 3.8090, 4.0092)),
        (2, "ideal", (3.5660, 3.5962, 3.6326)),
        (4, "identical", (6.2364, 6.2823, 6.3368)),
        (4, "by place", (4.3203, 4.5972, 4.8614)),
        (4, "ideal", (4.2488, 4.2941, 4.3481)),
    ],
)
def test_closed_forms(num_samples: int, case: str, values: tuple[float, ...]):
    z_BTD = cases(num_samples)[case]
    for w, expected in zip((1.0, 5.0, 10.0), values):
        assert simtrot.token_contrast(z_BTD, z_BTD, 0.5, w).item() == pytest.approx(expected, abs=5.1e-5)


def test_w_makes_telling_by_place_dear():
    z = cases(2)
    for w, expected in ((1.0, 0.048), (5.0, 0.213)):
        collapsed, ideal = (simtrot.token_contrast(z[k], z[k], 0.5, w) for k in ("by place", "ideal"))
        assert (collapsed - ideal).item() == pytest.approx(expected, abs=5e-4)


def test_position_collapse_index():
    z = cases(3)
    for case, expected in (("by place", 1), ("ideal", 0), ("identical", 0)):
        assert simtrot.position_collapse(z[case]).item() == pytest.approx(expected, abs=1e-6)
    z_BTD = F.normalize(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    pairs = list(itertools.product(range(3), range(4)))
    across, within = (
        [
            z_BTD[i, m] @ z_BTD[j, n]
            for (i, m), (j, n) in itertools.product(pairs, repeat=2)
            if which(i, m, j, n)
        ]
        for which in (lambda i, m, j, n: i != j and m == n, lambda i, m, j, n: i == j and m != n)
    )
    expected = torch.stack(across).mean() - torch.stack(within).mean()
    assert simtrot.position_collapse(2 * z_BTD).item() == pytest.approx(expected.item(), abs=1e-6)
    one_token = simtrot.position_collapse(torch.ones(2, 1, 4))
    assert one_token == 1


def test_position_collapse_is_said_with_advice():
    healthy = {"position_collapse": 0.1, "spread": 0.9, "effective_rank": 9.0}
    assert methods.warning("simtrot", healthy) is None
    said = str(methods.warning("simtrot", healthy | {"position_collapse": 0.83}))
    assert "index 0.83" in said
    assert "raise method.w, set method.rotate to true" in said


# ---------------------------------------------------------------------------------------------- prepare


def prepared(seed: str = "p", **options: Any) -> dict[str, np.ndarray]:
    cfg = methods.config("simtrot", options)
    return methods.prepare("simtrot")({"image_CXYZ": phantom_crop(0)}, cfg, seeding.rng(0, seed))


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
@pytest.mark.parametrize("unit", [(8, 8, 4), (8, 8, 8), (16, 4, 32)])
def test_boxes_are_filled_to_the_exact_count(unit: tuple[int, int, int], share: float):
    generator = seeding.rng(0, "boxes")
    grid = tuple(32 // side for side in unit)
    hidden = [simtrot.draw_boxes((32, 32, 32), unit, share, generator) for _ in range(3)]
    for hidden_XYZ in hidden:
        boxes = hidden_XYZ.reshape(grid[0], unit[0], grid[1], unit[1], grid[2], unit[2])
        full = boxes.all((1, 3, 5))
        assert np.array_equal(full, boxes.any((1, 3, 5)))
        assert full.sum() == int(share * math.prod(grid))
    assert not np.array_equal(hidden[0], hidden[1])


@pytest.mark.parametrize("seed", ["p", "q", "r", "s"])
def test_only_the_second_view_has_boxes_of_noise(seed: str):
    with_mask, without = prepared(seed), prepared(seed, mask=False)
    assert np.array_equal(with_mask["first"], without["first"])
    assert not np.array_equal(without["first"], without["second"])
    generator = seeding.rng(0, seed)
    _, drawn = (_views.draw(_views.RECIPES["texture"], (32, 32, 32), generator) for _ in range(2))
    hidden = simtrot.draw_boxes((32, 32, 32), (8, 8, 4), 0.75, generator)
    assert hidden.mean() == 0.75
    assert kstest(with_mask["second"][0, hidden] / 0.1, "norm").pvalue > 0.01
    own_std = drawn.augment.noise_std
    silent = replace(drawn, augment=replace(drawn.augment, noise_std=0.0))
    image = _views.apply(phantom_crop(0).astype(np.float32) / 65535, silent)
    for views in (with_mask, without):  # other numbers, of the same distribution
        noise = (views["second"] - image)[0, ~hidden]
        assert kstest(noise / own_std, "norm").pvalue > 0.01 if own_std else not noise.any()


def test_views_stay_where_they_are_and_the_move_is_drawn():
    assert prepared(rotate=False)["move"].tolist() == [0, 0, 0, 0]
    moves = {tuple(prepared(f"seed {i}")["move"].tolist()) for i in range(60)}
    assert len(moves) > 8
    assert moves <= set(PLANE)
    for seed in ("a", "b", "c"):
        views = prepared(seed, mask=False)
        image = phantom_crop(0) / 65535
        for key in ("first", "second"):
            assert np.corrcoef(views[key].ravel(), image.ravel())[0, 1] > 0.5


def test_settings_that_cannot_work():
    for options, words in [
        ({"mask_unit_vox": (8, 8, 5)}, r"does not divide crops of \(32, 32, 32\)"),
        ({"mask_unit_vox": (8, 8, 0)}, "mask_unit_vox"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"w": 0.0}, r"method\.w"),
        ({"temperature": 0.0}, "temperature"),
        ({"framework": "byol", "momentum_start": 2.0}, "momentum"),
        ({"projection": 0}, "projection"),
        ({"batch_size": 1}, "set it to 2"),
    ]:
        with pytest.raises(UserError, match=words):
            build(**options)
    build(mask=False, mask_unit_vox=(8, 8, 5))


# --------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    return phantom_batch("simtrot", methods.config("simtrot"), size_vox=(16, 16, 8))


def test_w_reaches_the_loss(batch: dict[str, Tensor]):
    weighted, plain = (build(size_vox=(16, 16, 8), w=w)(batch, 0.0)[0].item() for w in (5.0, 1.0))
    assert weighted > plain


def test_byol_predicts_each_token_of_the_other_view(batch: dict[str, Tensor]):
    module = build(size_vox=(16, 16, 8), framework="byol")
    with torch.no_grad():
        for parameter in module.target_backbone.parameters():
            parameter.mul_(0.9)
    plain = build(size_vox=(16, 16, 8), framework="byol")
    plain.load_state_dict(module.state_dict())
    loss, _ = module(batch, 0.0)
    seen = simtrot.moved(batch["first"], batch["move"])

    def rows(net: Any, x: Tensor, back: bool) -> Tensor:
        map_BFxyz = net.encode(x)[-1]
        if back:
            map_BFxyz = simtrot.restored(map_BFxyz, batch["move"])
        return map_BFxyz.permute(0, 2, 3, 4, 1).reshape(-1, map_BFxyz.shape[1])

    views, expected = [(seen, True), (batch["second"], False)], torch.zeros(())
    for one, other in (views, views[::-1]):
        p = plain.predictor(plain.projector(rows(plain.backbone, *one)))
        t = plain.target_projector(rows(plain.target_backbone, *other)).detach()
        expected = expected + (2 - 2 * F.cosine_similarity(p, t)).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    old = [p.clone() for p in module.target_backbone.parameters()]
    module.after_step(0.0)
    news = zip(module.target_backbone.parameters(), old, module.backbone.parameters())
    for now, was, new in news:
        torch.testing.assert_close(now, 0.99 * was + 0.01 * new)
        assert now.grad is None
    assert not any(key.startswith(("target_", "predictor")) for key, _ in build().named_parameters())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("swinunetr", {"patch": (2, 2, 1)}),
        ("unetr", {"patch": (16, 16, 8), "img_size": (64, 64, 32)}),
    ],
)
def test_flat_patches_make_flat_tokens(backbone: str, options: dict[str, Any]):
    torch.manual_seed(0)
    net = networks.build(backbone, 1, 2, **{**networks.tiny(backbone), **options})
    size_vox = 64, 64, 32
    module = methods.build("simtrot", net, size_vox=size_vox, batch_size=2)
    batch = phantom_batch("simtrot", methods.config("simtrot"), size_vox=size_vox)
    loss, metrics = module(batch, 0.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert metrics["position_collapse"].isfinite().all()
    assert module.square
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_heads_have_the_published_widths():
    def widths(net: nn.Module) -> list[tuple[int, int]]:
        return [(m.in_features, m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]

    assert widths(build().projector) == [(8, 16), (16, 8)]
    byol = build(framework="byol")
    assert widths(byol.projector) == [(8, 8), (8, 256)]
    assert widths(byol.predictor) == [(256, 8), (8, 256)]


@pytest.mark.parametrize("framework", ["simclr", "byol"])
@pytest.mark.parametrize(
    ("backbone", "size_vox"),
    # Of 32 voxels a side LoGoNet and SwinUNETR make one token, which the method is not for.
    [
        pytest.param("logonet", (64, 32, 32), marks=pytest.mark.slow),
        ("unetr", (32, 32, 32)),
        pytest.param("swinunetr", (64, 32, 32), marks=pytest.mark.slow),
    ],
)
def test_it_learns(backbone: str, size_vox: tuple[int, int, int], framework: str):
    assert_learns_two_phantoms("simtrot", backbone, size_vox, framework=framework)
