"""masked_clusters against slow loops from the paper, and Algorithm 1's head against its plain layers.

Shapes: B samples, C input channels, F features, X Y Z the crop's axes, N clusterers, K clusters, S slices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_methods import MAJORITY, SIZE_VOX, SIZES, Stub, batch_for, data_spec_for, stub_for
from torch import Tensor

from logonet import methods
from logonet.core.errors import UserError
from logonet.methods._cluster_head import Head
from logonet.methods._pooled_head import PooledHead
from logonet.methods.masked_clusters import MaskedClusters, cluster_nll

pytestmark = pytest.mark.usefixtures("one_thread")


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
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("chunk_mib", [ONE_SLAB, SOME, ALL])
def test_head_equals_algorithm_1(chunk_mib: float, keep: bool, num_samples: int, training: bool):
    ours, plain = head_pair(chunk_mib, torch.float64)
    ours.keep = keep
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


def test_what_is_kept_changes_no_bit():
    """Line 9's output is the same whether it is kept or computed again."""
    f_BFXYZ = torch.randn(2, 6, *SIZE_VOX)
    grads = []
    for keep in (True, False):
        head, _ = head_pair(SOME, torch.float32)
        head.keep = keep
        head(f_BFXYZ).square().sum().backward()
        grads.append([p.grad for p in head.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_head_in_bfloat16_is_about_as_near_to_exact_as_the_plain_layers():
    """Under autocast, with statistics in float32. Linear layers with a norm's scale in them are rounded once more."""
    ours, plain = head_pair(SOME, torch.float32)
    exact = copy.deepcopy(plain).double()
    f_BFXYZ = torch.randn(2, 6, *SIZE_VOX) + 1
    far: list[Tensor] = []
    results: list[dict[str, Tensor]] = []
    for head, run in ((exact, plain_head), (plain, plain_head), (ours, lambda head, x: head(x))):
        x = f_BFXYZ.to(next(head.parameters()).dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=head is not exact):
            logits_BZNK = run(head, x)
        logits_BZNK.double().square().sum().backward()
        own = {key: p.grad.double() for key, p in head.named_parameters() if p.grad is not None}
        results.append({"logits": logits_BZNK.double().detach(), **own})
    for found in results[1:]:
        far.append(torch.stack([(found[key] - value).norm() for key, value in results[0].items()]))
    norms = torch.stack([value.norm() for value in results[0].values()])
    assert ((far[1] < 4 * far[0] + 1e-2 * norms) | (norms < 1e-6)).all()
    assert ours.norm10.running_var.dtype == torch.float32
    torch.testing.assert_close(ours.norm10.running_var.double(), exact.norm10.running_var, rtol=1e-2, atol=0)
    assert not ours.conv9.bias.grad.any()  # its batch norm cancels it, to the last bit


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
    kept = kept_bytes(head)
    head.keep = False
    assert kept_bytes(head) == kept - wide_bytes
    assert kept < 3 * wide_bytes


def test_parameter_count_at_the_papers_size():
    with torch.device("meta"):
        head = Head(32, (96, 96, 96), 80, 500, 128)
    assert sum(p.numel() for p in head.parameters()) == 329_859


def test_head_of_a_crop_narrower_than_16_voxels():
    assert Head(6, (8, 8, 8), 2, 3, 1.0)(torch.randn(1, 6, 8, 8, 8)).shape == (1, 8, 2, 3)


# ------------------------------------------------------------------- masked_clusters: the pooled head


def test_the_pooled_head_is_a_slow_loop_over_slices():
    torch.manual_seed(0)
    feats = [torch.randn(2, 4, 5, 6, 12), torch.randn(2, 8, 2, 3, 4), torch.randn(2, 3, 1, 1, 1)]
    head = PooledHead((4, 8, 3), num_slices=12, num_clusterers=3, num_classes=7)
    logits_BZNK = head(feats)
    assert logits_BZNK.shape == (2, 12, 3, 7)
    norm, first, _, second = head.mlp
    for b in range(2):
        for z in range(12):
            row: list[float] = []
            for feat in feats:
                depth = feat.shape[4]
                at = max(0.0, (z + 0.5) * depth / 12 - 0.5)
                below, share = int(at), at - int(at)
                above = min(below + 1, depth - 1)
                planes = [feat[b, :, :, :, k].flatten(1).mean(1) for k in (below, above)]
                row += (planes[0] * (1 - share) + planes[1] * share).tolist()
            x = torch.tensor(row)
            x = (x - x.mean()) / (x.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
            expected = second(F.gelu(first(x)))
            for n in range(3):
                torch.testing.assert_close(logits_BZNK[b, z, n], expected[7 * n : 7 * n + 7])


def test_the_pooled_head_trains_the_encoder_alone():
    module, batch = masked_clusters(head="pooled")
    module.backbone.decode_features = lambda *args: pytest.fail("the decoder ran")
    frozen = {key for key, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"backbone.{part}.{kind}" for part in ("join", "classify") for kind in ("weight", "bias")
    }
    assert module.head is None
    loss, metrics = module(batch, 0.0)
    loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    assert metrics["accuracy"].shape == (2,)


def test_both_heads_losses_add_up():
    module, batch = masked_clusters(head="both")
    module.eval()
    loss, metrics = module(batch, 0.0)
    image, hidden = batch["image"].float() / 65535, batch["hidden"]
    feats, first = module.predict(image, hidden)
    labels_BZN = batch["labels"].transpose(1, 2).long().masked_fill(~batch["chain"][..., None], -1)
    nll = [
        cluster_nll(logits, labels_BZN, torch.tensor(SIZES), 0.1).sum()
        for logits in (first, module.pooled_head(feats))
    ]
    torch.testing.assert_close(loss, (nll[0] + nll[1]) / 2)
    assert metrics["accuracy"][1] == metrics["accuracy_pooled"][1] > 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reconstruction_weighs_beside_a_labels_mean_loss(reduction: str):
    both = {}
    for weight in (0.0, 3.0):
        module, batch = masked_clusters(reduction=reduction, reconstruction=weight)
        both[weight] = module.eval()(batch, 0.0)
    image, hidden = batch["image"].float() / 65535, batch["hidden"]
    x = torch.where(hidden[:, None], module.mask_token[:, None, None, None], image)
    rebuilt = module.rebuild(module.backbone.decode_features(x, module.backbone.encode(x)))
    mse_B, labels_B = [], []
    for b in range(2):
        errors = [
            (rebuilt[b, 0][tuple(at)] - image[b, 0][tuple(at)]).item() ** 2 for at in hidden[b].nonzero()
        ]
        mse_B.append(sum(errors) / len(errors))
        labels_B.append(3 * int(batch["chain"][b].sum()))
    extra = (
        3.0 * sum(mse * n for mse, n in zip(mse_B, labels_B)) / (2 if reduction == "sum" else sum(labels_B))
    )
    assert (both[3.0][0] - both[0.0][0]).item() == pytest.approx(extra, rel=1e-3)
    assert both[3.0][1]["reconstruction_mse"].tolist() == pytest.approx([sum(mse_B), 2], rel=1e-4)


class Skipping(Stub):
    """Its decoder sees the image."""

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return super().decode_features(x_BCXYZ, feats) + x_BCXYZ.mean(1, keepdim=True)


@pytest.mark.parametrize("hide_image", [False, True])
def test_a_hidden_image_tells_the_decoder_nothing(hide_image: bool):
    torch.manual_seed(0)
    module = methods.build("masked_clusters", Skipping(), data_spec_for(), hide_image=hide_image).eval()
    hidden = torch.zeros(1, *SIZE_VOX, dtype=torch.bool)
    images = torch.rand(2, 1, 1, *SIZE_VOX)
    module.backbone.encode = lambda x: [torch.ones(1, 4, *SIZE_VOX), torch.ones(1, 8, 8, 4, 6)]
    logits = [module.predict(image, hidden)[1] for image in images]
    assert torch.equal(*logits) == hide_image


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
    data_spec = data_spec_for()
    module = stub_for("masked_clusters", data_spec, **options)
    assert isinstance(module, MaskedClusters)
    return module, batch_for("masked_clusters", module.cfg, data_spec, [0, 1])


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
    module = methods.build("masked_clusters", Stub(), data_spec_for(), majority_labels=())
    batch = batch_for("masked_clusters", module.cfg, data_spec_for(), [0])
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
    data_spec = data_spec_for(in_channels=2)
    module = stub_for("masked_clusters", data_spec)
    batch = batch_for("masked_clusters", module.cfg, data_spec, [0])
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
        ({"head": "average"}, "head"),
        ({"reconstruction": 1.0, "masking": "none"}, "masking=none hides none"),
        ({"hide_image": True, "head": "pooled"}, "head=pooled does not run"),
        ({"cluster_sizes": ()}, "no clusterers"),
        ({"majority_labels": (1,)}, "1 majority labels for 3 clusterers"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        methods.build("masked_clusters", Stub(), data_spec_for(), **options)
