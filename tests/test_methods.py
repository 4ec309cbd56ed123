"""Every registered method against the contract, and masked_clusters against slow loops from the paper.

Shapes: B samples, C input channels, F features, X Y Z the crop's axes, N clusterers, K clusters, S slices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
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
from logonet.methods.masked_clusters import Head, MaskedClusters, cluster_nll

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES, MAJORITY = (5, 7, 3), (1, 6, 0)
SIZE_VOX = (16, 8, 12)


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


def size_for(name: str) -> tuple[int, int, int]:
    """SIZE_VOX, whose sides differ, or a cube where the method takes nothing else."""
    try:
        methods.check(name, methods.config(name), facts_for())
    except UserError:
        return 32, 32, 32
    return SIZE_VOX


def facts_for(size_vox: tuple[int, int, int] = SIZE_VOX, in_channels: int = 1) -> methods.DataSpec:
    return methods.DataSpec(size_vox, in_channels, SIZES, MAJORITY, num_classes=3)


def sample_for(
    index: int, facts: methods.DataSpec, needs: frozenset[str], image: str = "noise"
) -> dict[str, np.ndarray]:
    """One sample that holds what ``needs`` names and no more; ``image``: noise, constant, zero or phantom."""
    generator = seeding.rng(0, "sample", index)
    size = (facts.in_channels, *facts.size_vox)
    if image == "phantom":
        scan, labels_XYZ = phantom.phantom(index, facts.size_vox, classes=facts.num_classes)
        filled = np.broadcast_to((scan.array_CXYZ.clip(-1000, 1000) + 1000) / 2000 * 65535, size)
    else:
        labels_XYZ = generator.integers(0, max(facts.num_classes, 1), facts.size_vox).astype(np.uint8)
        noise = generator.integers(0, 65536, size)
        filled = {"noise": noise, "constant": np.full(size, 30000), "zero": np.zeros(size)}[image]
    sample = {"image_CXYZ": filled.astype(np.uint16)}
    if "pseudo_labels" in needs:
        per_clusterer = [generator.integers(0, k, facts.size_vox[2]) for k in facts.cluster_sizes]
        sample["labels_NZ"] = np.stack(per_clusterer).astype(np.int16)
    if "labels" in needs:
        sample["labels_XYZ"] = labels_XYZ
    return sample


def batch_for(
    name: str, cfg: Any, facts: methods.DataSpec, indices: list[int], **kind: str
) -> dict[str, Tensor]:
    prepare, needs = methods.prepare(name), methods.needs(name)
    ready = [prepare(sample_for(i, facts, needs, **kind), cfg, seeding.rng(0, "prepare", i)) for i in indices]
    return {key: torch.from_numpy(np.stack([r[key] for r in ready])) for key in ready[0]}


def stub_for(name: str, facts: methods.DataSpec, seed: int = 0, **options: Any) -> nn.Module:
    """The method on a Stub, or where that lacks what the method wants, on the smallest network that has it."""
    torch.manual_seed(seed)
    net: nn.Module = Stub(facts.in_channels)
    if missing := wanting(name):
        able = next(b for b in networks.names() if missing <= networks.abilities(b))
        net = tiny_net(able, facts)
    return methods.build(name, net, facts, **options)


def tiny_net(backbone: str, facts: methods.DataSpec) -> nn.Module:
    options = networks.tiny(backbone)
    if "img_size" in options:
        options["img_size"] = facts.size_vox
    networks.check_size(backbone, networks.config(backbone, options), facts.size_vox)
    return networks.build(backbone, facts.in_channels, facts.num_classes, **options)


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
    methods.check(name, cfg, facts_for((32, 32, 32)))


def test_prepare_is_pure(name: str):
    facts, cfg, prepare = facts_for(size_for(name)), methods.config(name), methods.prepare(name)
    sample = sample_for(0, facts, methods.needs(name))
    before = copy.deepcopy(sample)
    first, second = (prepare(sample, cfg, seeding.rng(0, "p")) for _ in range(2))
    other = prepare(sample_for(1, facts, methods.needs(name)), cfg, seeding.rng(0, "q"))
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
    facts = facts_for(size_for(name), in_channels)
    module = stub_for(name, facts)
    batch = batch_for(name, methods.config(name), facts, list(range(num_samples)))
    assert_step(module, batch, num_samples, channels=module.backbone.channels[-1])


@pytest.mark.parametrize("backbone", networks.names())
def test_every_method_trains_every_backbone(name: str, backbone: str):
    if missing := wanting(name) - networks.abilities(backbone):
        facts = facts_for((32, 32, 32))
        with pytest.raises(
            UserError, match=f"'{name}' needs {' and '.join(sorted(missing))} of its backbone"
        ):
            methods.build(name, tiny_net(backbone, facts), facts)
        return
    module, facts = module_on(name, backbone)
    batch = batch_for(name, methods.config(name), facts, [0, 1])
    assert_step(module, batch, 2, channels=module.backbone.channels[-1])


def wanting(name: str) -> set[str]:
    """What the method needs of a backbone beyond the contract."""
    return methods.lacking(name, Stub())


def module_on(name: str, backbone: str) -> tuple[Any, methods.DataSpec]:
    """The method on the smallest network of that name, for crops of 32 voxels a side, or 64 along X where the
    method has too little to do there, such as units to hide that are as large as the crop."""
    torch.manual_seed(0)
    facts = facts_for((32, 32, 32))
    try:
        return methods.build(name, tiny_net(backbone, facts), facts), facts
    except UserError:
        facts = facts_for((64, 32, 32))
        return methods.build(name, tiny_net(backbone, facts), facts), facts


OF_THE_PAPERS = pytest.mark.parametrize(
    "backbone",
    [
        pytest.param("logonet", marks=pytest.mark.slow),
        pytest.param("swinunetr", marks=pytest.mark.slow),
        "unetr",
    ],
)


def of_the_papers(name: str, backbone: str) -> tuple[Any, methods.DataSpec]:
    if wanting(name) - networks.abilities(backbone):
        pytest.skip("the method is not for this network")
    return module_on(name, backbone)


@OF_THE_PAPERS
@pytest.mark.parametrize("image", ["constant", "zero"])
def test_featureless_crops_stay_finite_in_the_papers_networks(name: str, backbone: str, image: str):
    module, facts = of_the_papers(name, backbone)
    batch = batch_for(name, methods.config(name), facts, [0, 1], image=image)
    assert_finite_step(module, batch, autocast=False)


@OF_THE_PAPERS
def test_same_seed_same_bits_in_the_papers_networks(name: str, backbone: str):
    def step() -> list[Tensor]:
        module, facts = of_the_papers(name, backbone)
        loss, _ = module(batch_for(name, methods.config(name), facts, [0, 1]), 0.0)
        loss.backward()
        return [loss, *(p.grad for p in module.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


@OF_THE_PAPERS
def test_bfloat16_stays_finite_in_the_papers_networks(name: str, backbone: str):
    # No feature is 2 voxels long on the first axis, where torch 2.13's bfloat16 gradient reads memory nobody wrote.
    sizes = ((96, 32, 32), (96, 96, 32))  # the second for methods that turn crops in the slice plane
    for size in sizes:
        facts = facts_for(size)
        try:
            if wanting(name) - networks.abilities(backbone):
                pytest.skip("the method is not for this network")
            torch.manual_seed(0)
            module = methods.build(name, tiny_net(backbone, facts), facts)
        except UserError:
            continue
        assert_finite_step(module, batch_for(name, methods.config(name), facts, [0, 1]), autocast=True)
        return
    pytest.fail(f"{name} takes none of {sizes}")


@OF_THE_PAPERS
def test_loss_falls_on_two_phantoms(name: str, backbone: str):
    module, facts = of_the_papers(name, backbone)
    batch = batch_for(name, methods.config(name), facts, [0, 1], image="phantom")
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
    facts, cfg = facts_for(size_for(name)), methods.config(name)
    if methods.sees_batch(name):
        pytest.skip("a sample's loss depends on the others of its batch")
    module = stub_for(name, facts).eval()  # with batch statistics samples see one another
    with torch.no_grad():
        together, whole = module(batch_for(name, cfg, facts, [0, 1, 2]), 0.5)
        apart = [module(batch_for(name, cfg, facts, [i]), 0.5) for i in range(3)]
    if getattr(cfg, "reduction", "sum") == "sum":
        torch.testing.assert_close(together, sum(loss for loss, _ in apart) / 3)
    for key in whole.keys() - {"embeddings_BF"}:
        torch.testing.assert_close(whole[key], sum(m[key] for _, m in apart), rtol=1e-6, atol=0)
    if "embeddings_BF" in whole:
        torch.testing.assert_close(whole["embeddings_BF"], torch.cat([m["embeddings_BF"] for _, m in apart]))


def test_same_seed_same_bits(name: str):
    facts, cfg = facts_for(size_for(name)), methods.config(name)

    def step() -> list[Tensor]:
        module = stub_for(name, facts)
        loss, metrics = module(batch_for(name, cfg, facts, [0, 1]), 0.0)
        loss.backward()
        return [loss, *metrics.values(), *(p.grad for p in module.parameters() if p.grad is not None)]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


@pytest.mark.parametrize("image", ["constant", "zero"])
@pytest.mark.parametrize("autocast", [False, True])
def test_featureless_crops_stay_finite(name: str, image: str, autocast: bool):
    facts = facts_for(size_for(name))
    samples = list(range(methods.least_batch(name)))
    batch = batch_for(name, methods.config(name), facts, samples, image=image)
    assert_finite_step(stub_for(name, facts), batch, autocast)


def test_bfloat16_autocast_stays_finite_and_near(name: str):
    facts = facts_for(size_for(name))
    batch = batch_for(name, methods.config(name), facts, [0, 1])
    wide, narrow = (assert_finite_step(stub_for(name, facts), batch, autocast) for autocast in (False, True))
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


def test_facts_may_be_keywords():
    module = methods.build(
        "masked_clusters", Stub(), size_vox=SIZE_VOX, cluster_sizes=SIZES, temperature=0.5, reduction="mean"
    )
    assert (module.cfg.temperature, module.head.conv9.out_channels) == (0.5, 7)
    changed = methods.build(
        "masked_clusters", Stub(), facts_for(), cluster_sizes=(9, 4), majority_labels=(0, 0)
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


# ------------------------------------------------------------------------- masked_clusters: the head


def plain_head(head: Head, x: Tensor) -> Tensor:
    """Algorithm 1 word for word, with the layers of ``head``."""
    x = F.gelu(head.norm3(head.conv2(x)))
    x = F.gelu(head.norm5(head.conv4(x)))
    x = x.permute(0, 3, 2, 1, 4)
    x = F.gelu(head.norm8(head.conv7(x)))
    x = F.gelu(head.norm10(head.conv9(x)))
    x = x.permute(0, 2, 1, 3, 4)
    x = F.gelu(head.norm13(head.conv12(x)))
    x = F.gelu(head.norm15(head.conv14(x)))
    x = x.permute(0, 4, 3, 2, 1)
    x = F.gelu(head.norm18(head.conv17(x)))
    return F.relu(head.conv19(x)).squeeze(-1)


def head_pair(chunk_mib: float, dtype: torch.dtype, num_clusterers: int = 5) -> tuple[Head, Head]:
    """Two heads with the same weights, none of them at its neutral initial value."""
    torch.manual_seed(3)
    head = Head(6, SIZE_VOX, num_clusterers, 7, chunk_mib)
    with torch.no_grad():
        for tensor in (*head.parameters(), *(b for b in head.buffers() if b.is_floating_point())):
            tensor.add_(torch.rand_like(tensor) * 0.3)
    return head.to(dtype), copy.deepcopy(head).to(dtype)


ONE_SLAB, SOME, ALL = 1e-6, 0.02, 1e3  # MiB: chunks of one, of a few (the last one shorter), of all


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("chunk_mib", [ONE_SLAB, SOME, ALL])
def test_head_equals_algorithm_1(chunk_mib: float, num_samples: int, training: bool):
    ours, plain = head_pair(chunk_mib, torch.float64)
    f_BFXYZ = torch.randn(num_samples, 6, *SIZE_VOX, dtype=torch.float64) * 3 + 2
    results = []
    for head, run in ((ours, ours), (plain, lambda x: plain_head(plain, x))):
        head.train(training)
        x = f_BFXYZ.clone().requires_grad_()
        for _ in range(2):  # twice: running statistics move from where they are
            logits_BZNK = run(x)
            (logits_BZNK * torch.linspace(-1, 1, logits_BZNK.numel()).view_as(logits_BZNK)).sum().backward()
        grads = {key: p.grad for key, p in head.named_parameters()}
        results.append({"logits": logits_BZNK, "x": x.grad, **grads, **dict(head.named_buffers())})
    assert results[0]["logits"].shape == (num_samples, SIZE_VOX[2], 5, 7)
    assert results[0]["logits"].count_nonzero() > results[0]["logits"].numel() / 10
    for key, value in results[1].items():
        torch.testing.assert_close(
            results[0][key], value, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_head_is_accurate_in_float32_far_from_zero_mean():
    ours, plain = head_pair(SOME, torch.float32)
    exact = copy.deepcopy(plain).double()
    f_BFXYZ = torch.randn(2, 6, *SIZE_VOX) + 50
    error_ours = (ours(f_BFXYZ) - plain_head(exact, f_BFXYZ.double())).abs().max()
    error_plain = (plain_head(plain, f_BFXYZ) - plain_head(exact, f_BFXYZ.double())).abs().max()
    assert error_ours < 4 * error_plain + 1e-5


@pytest.mark.parametrize("num_clusterers", [4, 5, 7])
def test_chunks_leave_the_logits_alone(num_clusterers: int):
    f_BFXYZ = torch.randn(1, 6, *SIZE_VOX, dtype=torch.float64)
    logits = [head_pair(mib, torch.float64, num_clusterers)[0](f_BFXYZ) for mib in (ONE_SLAB, SOME, ALL)]
    torch.testing.assert_close(logits[0], logits[2], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-10, atol=1e-11)


def test_head_keeps_no_wide_map_for_the_backward_pass():
    num_x, _, num_z = SIZE_VOX
    head = Head(6, SIZE_VOX, num_clusterers=5, num_classes=64, chunk_mib=SOME)
    wide_bytes = 4 * 64 * num_x * 5 * num_z

    def kept_bytes(run: Callable[[Tensor], Tensor]) -> int:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            run(torch.randn(1, 6, *SIZE_VOX, requires_grad=True))
        return sum(kept.values())

    assert kept_bytes(lambda x: plain_head(head, x)) > 4 * wide_bytes
    assert kept_bytes(head) < 2 * wide_bytes


def test_parameter_count_at_the_papers_size():
    with torch.device("meta"):
        head = Head(32, (96, 96, 96), 80, 500, 128)
    assert sum(p.numel() for p in head.parameters()) == 329_859


def test_head_of_a_crop_narrower_than_16_voxels():
    assert Head(6, (8, 8, 8), 2, 3, 1.0)(torch.randn(1, 6, 8, 8, 8)).shape == (1, 8, 2, 3)


# ------------------------------------------------------------------- masked_clusters: loss and masking


def test_loss_is_equations_4_and_5():
    generator = torch.Generator().manual_seed(0)
    logits_SNK = torch.randn(4, 3, 7, generator=generator)
    labels_SN = torch.stack([torch.randint(k, (4,), generator=generator) for k in SIZES], dim=1)
    nll_SN = cluster_nll(logits_SNK, labels_SN, torch.tensor(SIZES), 0.1)
    loss = 0.0
    for i, num_clusters in enumerate(SIZES):
        for j in range(4):
            scores = [logits_SNK[j, i, s].item() / 0.1 for s in range(num_clusters)]
            top = max(scores)
            log_sum = top + math.log(sum(math.exp(score - top) for score in scores))
            nll = log_sum - scores[labels_SN[j, i]]
            assert nll_SN[j, i].item() == pytest.approx(nll, rel=1e-5, abs=1e-5)
            loss += nll
    assert nll_SN.sum().item() == pytest.approx(loss, rel=1e-5)


def test_logits_beyond_a_clusterers_own_clusters_never_win():
    logits_SNK = torch.zeros(2, 3, 7)
    for n, num_clusters in enumerate(SIZES):
        logits_SNK[:, n, num_clusters:] = 1e4
    logits_SNK.requires_grad_()
    labels_SN = torch.zeros(2, 3, dtype=torch.long)
    nll_SN = cluster_nll(logits_SNK, labels_SN, torch.tensor(SIZES), 0.1)
    torch.testing.assert_close(nll_SN, torch.tensor(SIZES).float().log().expand(2, 3))
    nll_SN.sum().backward()
    for n, num_clusters in enumerate(SIZES):
        assert (logits_SNK.grad[:, n, num_clusters:] == 0).all()
        assert (logits_SNK.grad[:, n, :num_clusters] != 0).all()


def masked_clusters(**options: Any) -> tuple[MaskedClusters, dict[str, Tensor]]:
    facts = facts_for()
    module = stub_for("masked_clusters", facts, **options)
    assert isinstance(module, MaskedClusters)
    return module, batch_for("masked_clusters", module.cfg, facts, [0, 1])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_forward_sums_over_masked_slices_and_clusterers(reduction: str):
    module, batch = masked_clusters(reduction=reduction, temperature=0.2)
    module.eval()
    loss, metrics = module(batch, 0.0)
    _, logits_BZNK = module.predict(batch["image"].float() / 65535, batch["hidden"])
    total, count, right, floor = 0.0, 0, [0] * 3, 0
    for b in range(2):
        for z in range(SIZE_VOX[2]):
            if not batch["chain"][b, z]:
                continue
            for n, num_clusters in enumerate(SIZES):
                label = int(batch["labels"][b, n, z])
                own = logits_BZNK[b, z, n, :num_clusters].double()
                total -= torch.log_softmax(own / 0.2, dim=0)[label].item()
                count += 1
                right[n] += int(own.argmax()) == label
                floor += label == MAJORITY[n]
    assert loss.item() == pytest.approx(total / (2 if reduction == "sum" else count), rel=1e-5)
    assert metrics["loss"].tolist() == pytest.approx([total, count], rel=1e-5)
    assert metrics["accuracy"].tolist() == [sum(right), count]
    assert metrics["accuracy_per_clusterer"].tolist() == [right, [count / 3] * 3]
    assert metrics["accuracy_floor"].tolist() == [floor, count]
    assert metrics["masked_share"].tolist() == [int(batch["hidden"].sum()), batch["hidden"].numel()]


def test_no_floor_without_majority_labels():
    module = methods.build("masked_clusters", Stub(), facts_for(), majority_labels=())
    batch = batch_for("masked_clusters", module.cfg, facts_for(), [0])
    assert "accuracy_floor" not in module(batch, 0.0)[1]


def test_hidden_voxels_cannot_influence_the_output():
    module, batch = masked_clusters()
    assert batch["hidden"].any()
    image = batch["image"].float() / 65535
    other = torch.where(batch["hidden"][:, None], torch.rand_like(image), image)
    assert not torch.equal(image, other)
    for a, b in zip(
        [*module.predict(image, batch["hidden"])[0], module.predict(image, batch["hidden"])[1]],
        [*module.predict(other, batch["hidden"])[0], module.predict(other, batch["hidden"])[1]],
    ):
        assert torch.equal(a, b)
    shown = torch.where(batch["hidden"][:, None], image, torch.rand_like(image))
    assert not torch.equal(
        module.predict(image, batch["hidden"])[1], module.predict(shown, batch["hidden"])[1]
    )


def test_labels_of_unmasked_slices_cannot_influence_the_loss():
    module, batch = masked_clusters()
    outside_B1Z = ~batch["chain"][:, None]
    assert outside_B1Z.any()
    changed = {
        **batch,
        "labels": torch.where(outside_B1Z, torch.zeros_like(batch["labels"]), batch["labels"]),
    }
    assert not torch.equal(batch["labels"], changed["labels"])
    assert torch.equal(module(batch, 0.0)[0], module(changed, 0.0)[0])
    inside = {**batch, "labels": torch.where(outside_B1Z, batch["labels"], torch.zeros_like(batch["labels"]))}
    assert not torch.equal(module(batch, 0.0)[0], module(inside, 0.0)[0])


def test_the_mask_token_is_learnt_per_channel():
    facts = facts_for(in_channels=2)
    module = stub_for("masked_clusters", facts)
    batch = batch_for("masked_clusters", module.cfg, facts, [0])
    module(batch, 0.0)[0].backward()
    assert module.mask_token.shape == (2,)
    assert (module.mask_token.grad != 0).all()


def test_the_classifier_is_frozen_and_nothing_else():
    module, _ = masked_clusters()
    frozen = {key for key, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.classify.weight", "backbone.classify.bias"}


def fit(num_steps: int, **options: Any) -> list[dict[str, float]]:
    """Train on two samples; each step's metrics as plain averages."""
    module, batch = masked_clusters(**options)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for step in range(num_steps):
        loss, metrics = module(batch, step / num_steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({key: (metrics[key][0] / metrics[key][1]).item() for key in ("loss", "accuracy")})
    return history


@pytest.mark.parametrize("final_relu", [True, False])
def test_loss_falls_on_two_samples(final_relu: bool):
    history = fit(20, final_relu=final_relu)
    assert history[-1]["loss"] < 0.7 * history[0]["loss"], history


def test_without_the_final_relu_two_samples_are_learnt_by_heart():
    assert fit(60, final_relu=False)[-1]["accuracy"] == 1.0
    module, batch = masked_clusters(final_relu=False)
    assert (module.predict(batch["image"].float() / 65535, batch["hidden"])[1] < 0).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chain_length": 13}, "chain_length is 13.*12 slices"),
        ({"phi1": 0.0}, "phi1"),
        ({"phi2": 1.5}, "phi2"),
        ({"patch_sizes": (9, 96)}, "16x8"),
        ({"temperature": 0.0}, "temperature"),
        ({"head_chunk_mib": 0.0}, "head_chunk_mib"),
        ({"reduction": "max"}, "reduction"),
        ({"cluster_sizes": ()}, "no clusterers"),
        ({"majority_labels": (1,)}, "1 majority labels for 3 clusterers"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        methods.build("masked_clusters", Stub(), facts_for(), **options)
