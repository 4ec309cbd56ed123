"""Every registered method against the contract.

Shapes: B samples, C input channels, F features, X Y Z the crop's axes, N clusterers.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet import methods, networks
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.methods._parts import effective_rank, freeze

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES, MAJORITY = (5, 7, 3), (1, 6, 0)
SIZE_VOX = (16, 8, 12)
# Settings for methods whose own parts are large by default.
DECODER = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
SMALL: dict[str, dict[str, Any]] = {
    "glmae": {**DECODER, "num_local": 2, "projection_hidden": 16, "projection": 8},
    "mae3d": DECODER,
    "rcr": {"contrast": 16},
    "smit": {"hidden": 16, "bottleneck": 8, "prototypes": 12},
}


class Stub(nn.Module):
    """The smallest network that keeps the backbones' contract, on crops of any size."""

    channels, strides, feature_channels = (4, 8), ((1, 1, 1), (2, 2, 2)), 6
    encoder_prefixes, head_prefixes = ("fine.", "coarse."), ("classify.",)

    def __init__(self, in_channels: int = 1) -> None:
        super().__init__()
        self.fine = nn.Conv3d(in_channels, 4, 3, padding=1)
        self.coarse = nn.Conv3d(4, 8, 2, stride=2)
        self.join = nn.Conv3d(12, 6, 1)
        self.classify = nn.Conv3d(6, 3, 1)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        fine = F.gelu(self.fine(x_BCXYZ))
        return [fine, F.gelu(self.coarse(fine))]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        up = F.interpolate(feats[1], size=feats[0].shape[2:])
        return self.join(torch.cat([feats[0], up], dim=1))

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> networks.SegOut:
        return networks.SegOut(self.classify(self.decode_features(x_BCXYZ, feats)), [], None)

    def forward(self, x_BCXYZ: Tensor) -> networks.SegOut:
        return self.decode(x_BCXYZ, self.encode(x_BCXYZ))


def config_for(name: str) -> Any:
    return methods.config(name, SMALL.get(name, {}))


def size_for(name: str) -> tuple[int, int, int]:
    """SIZE_VOX, whose sides differ, or a cube where the method takes nothing else."""
    try:
        methods.check(name, config_for(name), data_spec_for())
    except UserError:
        return 32, 32, 32
    return SIZE_VOX


def data_spec_for(size_vox: tuple[int, int, int] = SIZE_VOX, in_channels: int = 1) -> methods.DataSpec:
    return methods.DataSpec(size_vox, in_channels, SIZES, MAJORITY, num_classes=3)


def sample_for(
    index: int, data_spec: methods.DataSpec, needs: frozenset[str], image: str = "noise"
) -> dict[str, np.ndarray]:
    """One sample that holds what ``needs`` names and no more; ``image``: noise, constant, zero or phantom."""
    generator = seeding.rng(0, "sample", index)
    size = (data_spec.in_channels, *data_spec.size_vox)
    if image == "phantom":
        scan, labels_XYZ = phantom.phantom(index, data_spec.size_vox, classes=data_spec.num_classes)
        filled = np.broadcast_to((scan.array_CXYZ.clip(-1000, 1000) + 1000) / 2000 * 65535, size)
    else:
        labels_XYZ = generator.integers(0, max(data_spec.num_classes, 1), data_spec.size_vox).astype(np.uint8)
        noise = generator.integers(0, 65536, size)
        filled = {"noise": noise, "constant": np.full(size, 30000), "zero": np.zeros(size)}[image]
    sample = {"image_CXYZ": filled.astype(np.uint16)}
    if "pseudo_labels" in needs:
        per_clusterer = [generator.integers(0, k, data_spec.size_vox[2]) for k in data_spec.cluster_sizes]
        sample["labels_NZ"] = np.stack(per_clusterer).astype(np.int16)
    if "labels" in needs:
        sample["labels_XYZ"] = labels_XYZ
    return sample


def batch_for(
    name: str, cfg: Any, data_spec: methods.DataSpec, indices: list[int], **kind: str
) -> dict[str, Tensor]:
    prepare, needs = methods.prepare(name), methods.needs(name)
    ready = [
        prepare(sample_for(i, data_spec, needs, **kind), cfg, seeding.rng(0, "prepare", i)) for i in indices
    ]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def stub_for(name: str, data_spec: methods.DataSpec, seed: int = 0, **options: Any) -> nn.Module:
    """The method on a Stub, or where that lacks what the method wants, on the smallest network that has it."""
    torch.manual_seed(seed)
    net: nn.Module = Stub(data_spec.in_channels)
    if missing := wanting(name):
        able = next(b for b in networks.names() if missing <= networks.abilities(b))
        net = tiny_net(able, data_spec)
    return methods.build(name, net, data_spec, **{**SMALL.get(name, {}), **options})


def tiny_net(backbone: str, data_spec: methods.DataSpec) -> nn.Module:
    options = networks.tiny(backbone)
    if "img_size" in options:
        options["img_size"] = data_spec.size_vox
    networks.check_size(backbone, networks.config(backbone, options), data_spec.size_vox)
    return networks.build(backbone, data_spec.in_channels, data_spec.num_classes, **options)


# ------------------------------------------------------------------------------------- every method


@pytest.fixture(params=methods.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_method_file_has_the_contract(name: str):
    cfg = methods.config(name)
    assert dataclasses.is_dataclass(cfg)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cfg, dataclasses.fields(cfg)[0].name, None)
    assert methods.needs(name) <= {"crops", "pseudo_labels", "labels"}
    assert methods.config(name, config.to_dict(cfg)) == cfg  # survives a YAML file
    methods.check(name, cfg, data_spec_for((32, 32, 32)))


def test_prepare_is_pure(name: str):
    data_spec, cfg, prepare = data_spec_for(size_for(name)), config_for(name), methods.prepare(name)
    sample = sample_for(0, data_spec, methods.needs(name))
    before = copy.deepcopy(sample)
    first, second = (prepare(sample, cfg, seeding.rng(0, "p")) for _ in range(2))
    other = prepare(sample_for(1, data_spec, methods.needs(name)), cfg, seeding.rng(0, "q"))
    for key, array in sample.items():
        np.testing.assert_array_equal(array, before[key])
    assert first.keys() == other.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key])
        assert (array.shape, array.dtype) == (other[key].shape, other[key].dtype)


@pytest.mark.parametrize("in_channels", [1, 2])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_forward_gives_a_loss_metrics_and_every_gradient(name: str, num_samples: int, in_channels: int):
    num_samples = max(num_samples, methods.least_batch(name))
    data_spec = data_spec_for(size_for(name), in_channels)
    module = stub_for(name, data_spec)
    batch = batch_for(name, config_for(name), data_spec, list(range(num_samples)))
    assert_step(module, batch, num_samples, channels=module.backbone.channels[-1])


def every_pair() -> list[Any]:
    """All methods on all networks; by default as few as have every method and every network once."""
    names, backbones = methods.names(), networks.names()
    quick = set(zip(itertools.cycle(names), backbones)) | set(zip(names, itertools.cycle(backbones)))
    pairs = itertools.product(names, backbones)
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("name", "backbone"), every_pair())
def test_every_method_trains_every_network(name: str, backbone: str):
    if missing := wanting(name) - networks.abilities(backbone):
        data_spec = data_spec_for((32, 32, 32))
        with pytest.raises(
            UserError, match=f"'{name}' needs {' and '.join(sorted(missing))} of its backbone"
        ):
            methods.build(name, tiny_net(backbone, data_spec), data_spec)
        return
    module, data_spec = module_on(name, backbone)
    batch = batch_for(name, config_for(name), data_spec, [0, 1])
    assert_step(module, batch, 2, channels=module.backbone.channels[-1])


def wanting(name: str) -> set[str]:
    """What the method needs of a backbone beyond the contract."""
    return methods.lacking(name, Stub())


def module_on(name: str, backbone: str) -> tuple[Any, methods.DataSpec]:
    """The method on the smallest network of that name, for crops of 32 voxels a side, or 64 along X where the
    method has too little to do there, such as units to hide that are as large as the crop."""
    torch.manual_seed(0)
    data_spec = data_spec_for((32, 32, 32))
    try:
        return methods.build(name, tiny_net(backbone, data_spec), data_spec, **SMALL.get(name, {})), data_spec
    except UserError:
        data_spec = data_spec_for((64, 32, 32))
        return methods.build(name, tiny_net(backbone, data_spec), data_spec, **SMALL.get(name, {})), data_spec


BACKBONES_OF_THE_PAPERS = ["logonet", "swinunetr", "unetr"]
OF_THE_PAPERS = pytest.mark.parametrize(
    "backbone", [pytest.param(backbone, marks=pytest.mark.slow) for backbone in BACKBONES_OF_THE_PAPERS]
)


def of_the_papers(name: str, backbone: str) -> tuple[Any, methods.DataSpec]:
    if wanting(name) - networks.abilities(backbone):
        pytest.skip("the method is not for this network")
    return module_on(name, backbone)


@OF_THE_PAPERS
@pytest.mark.parametrize("image", ["constant", "zero"])
def test_featureless_crops_stay_finite_in_the_papers_networks(name: str, backbone: str, image: str):
    module, data_spec = of_the_papers(name, backbone)
    batch = batch_for(name, config_for(name), data_spec, [0, 1], image=image)
    assert_finite_step(module, batch, autocast=False)


@OF_THE_PAPERS
def test_same_seed_same_bits_in_the_papers_networks(name: str, backbone: str):
    def step() -> list[Tensor]:
        module, data_spec = of_the_papers(name, backbone)
        loss, _ = module(batch_for(name, config_for(name), data_spec, [0, 1]), 0.0)
        loss.backward()
        return [loss, *(p.grad for p in module.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


@OF_THE_PAPERS
def test_bfloat16_stays_finite_in_the_papers_networks(name: str, backbone: str):
    # No feature is 2 voxels long on the first axis, where torch 2.13's bfloat16 gradient reads memory nobody wrote.
    sizes = ((96, 32, 32), (96, 96, 32))  # the second for methods that turn crops in the slice plane
    for size in sizes:
        data_spec = data_spec_for(size)
        try:
            if wanting(name) - networks.abilities(backbone):
                pytest.skip("the method is not for this network")
            torch.manual_seed(0)
            module = methods.build(name, tiny_net(backbone, data_spec), data_spec, **SMALL.get(name, {}))
        except UserError:
            continue
        assert_finite_step(module, batch_for(name, config_for(name), data_spec, [0, 1]), autocast=True)
        return
    pytest.fail(f"{name} takes none of {sizes}")


def falling() -> list[Any]:
    """All methods on the papers' networks; by default one pair."""
    quick = {("masked_clusters", "unetr")}
    pairs = itertools.product(methods.names(), BACKBONES_OF_THE_PAPERS)
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(("name", "backbone"), falling())
def test_loss_falls_on_two_phantoms(name: str, backbone: str):
    module, data_spec = of_the_papers(name, backbone)
    batch = batch_for(name, config_for(name), data_spec, [0, 1], image="phantom")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(20):
        loss, _ = module(batch, step / 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if hasattr(module, "after_step"):
            module.after_step(step / 20)
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < losses[0], losses


def assert_step(module: nn.Module, batch: dict[str, Tensor], num_samples: int, channels: int) -> None:
    loss, metrics = module(batch, 0.5)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    for key, value in metrics.items():
        assert not value.requires_grad, key
        assert torch.isfinite(value).all(), key
        if key == "embeddings_BF":
            assert value.shape == (num_samples, channels)
        else:
            assert value.dtype == torch.float64, key
            assert value.shape[0] == 2, key
            assert (value[1] > 0).all(), key
    loss.backward()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient for {key}"
            assert torch.isfinite(parameter.grad).all(), key
        else:
            assert parameter.grad is None, key


def test_metrics_add_up_however_samples_are_spread(name: str):
    data_spec, cfg = data_spec_for(size_for(name)), config_for(name)
    if methods.least_batch(name) > 1:
        pytest.skip("a sample's loss depends on the others of its batch")
    module = stub_for(name, data_spec).eval()  # with batch statistics samples see one another
    with torch.no_grad():
        together, whole = module(batch_for(name, cfg, data_spec, [0, 1, 2]), 0.5)
        apart = [module(batch_for(name, cfg, data_spec, [i]), 0.5) for i in range(3)]
    if getattr(cfg, "reduction", "sum") == "sum":
        torch.testing.assert_close(together, sum(loss for loss, _ in apart) / 3)
    for key in whole.keys() - {"embeddings_BF"}:
        torch.testing.assert_close(whole[key], sum(m[key] for _, m in apart), rtol=1e-6, atol=0)
    if "embeddings_BF" in whole:
        torch.testing.assert_close(whole["embeddings_BF"], torch.cat([m["embeddings_BF"] for _, m in apart]))


def test_same_seed_same_bits(name: str):
    data_spec, cfg = data_spec_for(size_for(name)), config_for(name)

    def step() -> list[Tensor]:
        module = stub_for(name, data_spec)
        loss, metrics = module(batch_for(name, cfg, data_spec, [0, 1]), 0.0)
        loss.backward()
        return [loss, *metrics.values(), *(p.grad for p in module.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


@pytest.mark.parametrize("image", ["constant", "zero"])
@pytest.mark.parametrize("autocast", [False, True])
def test_featureless_crops_stay_finite(name: str, image: str, autocast: bool):
    data_spec = data_spec_for(size_for(name))
    samples = list(range(methods.least_batch(name)))
    batch = batch_for(name, config_for(name), data_spec, samples, image=image)
    assert_finite_step(stub_for(name, data_spec), batch, autocast)


def test_bfloat16_autocast_stays_finite_and_near(name: str):
    data_spec = data_spec_for(size_for(name))
    batch = batch_for(name, config_for(name), data_spec, [0, 1])
    wide, narrow = (
        assert_finite_step(stub_for(name, data_spec), batch, autocast) for autocast in (False, True)
    )
    assert abs(wide - narrow) < 0.05 * abs(wide)


def assert_finite_step(module: nn.Module, batch: dict[str, Tensor], autocast: bool) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = module(batch, 0.0)
    loss.backward()
    assert torch.isfinite(loss)
    for key, parameter in module.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    for key, buffer in module.named_buffers():
        assert torch.isfinite(buffer).all(), key
    return loss.item()


def test_a_file_in_the_folder_is_a_method(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "new_method.py").write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True)\nclass Config:\n    width: int = 3\n"
    )
    (tmp_path / "_helper.py").write_text("")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    assert "new_method" in methods.names()
    assert not any(n.startswith("_") for n in methods.names())
    assert methods.config("new_method", {"width": 4}).width == 4


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'masked_clusters'"):
        methods.config("masked_cluster")
    with pytest.raises(UserError, match=r"method\.phi_1.*did you mean 'method\.phi1'"):
        methods.config("masked_clusters", {"phi_1": 0.2})


def test_fields_of_the_data_spec_may_be_keywords():
    module = methods.build(
        "masked_clusters", Stub(), size_vox=SIZE_VOX, cluster_sizes=SIZES, temperature=0.5, reduction="mean"
    )
    assert (module.cfg.temperature, module.head.conv9.out_channels) == (0.5, 7)
    changed = methods.build(
        "masked_clusters", Stub(), data_spec_for(), cluster_sizes=(9, 4), majority_labels=(0, 0)
    )
    assert (changed.head.conv2.out_channels, changed.head.conv9.out_channels) == (2, 9)


def test_features_that_are_all_alike_are_warned_of(name: str):
    collapsed, healthy = ({"effective_rank": rank} for rank in (1.0, 12.0))
    assert methods.warning(name, healthy, 64) is None
    assert methods.warning(name, collapsed, 2) is None  # of two embeddings no rank is above 1
    assert "train.lr" in (methods.warning(name, collapsed, 64) or "")


# ------------------------------------------------------------------------------------------- parts


def test_freeze_stops_at_the_dot():
    net = nn.ModuleDict({"head": nn.Linear(2, 2), "header": nn.Linear(2, 2)})
    freeze(net, ("head",))
    assert [k for k, p in net.named_parameters() if p.requires_grad] == ["header.weight", "header.bias"]


def test_effective_rank():
    corners = torch.cat([torch.eye(4), -torch.eye(4)])  # four equal singular values
    assert effective_rank(corners) == pytest.approx(4)
    assert effective_rank(corners * 1e-3 + 100) == pytest.approx(4, rel=1e-3)
    assert effective_rank(torch.arange(6.0)[:, None] * torch.ones(5)) == pytest.approx(1)
    values = torch.tensor([3.0, 1.0])  # singular values in ratio 3 : 1
    share = (values / values.sum()).tolist()
    expected = math.exp(-sum(p * math.log(p) for p in share))
    assert effective_rank(torch.cat([values.diag(), -values.diag()])) == pytest.approx(expected)
    collapsed = torch.full((8, 5), 0.1) + 1e-8 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert effective_rank(collapsed) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, float("nan")]])))
