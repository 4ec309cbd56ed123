"""How much of a pretext's score is left without the encoder's features, and that measuring it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LocalLoop, a_job, crops_dataset
from test_methods import Stub, batch_for, config_for, data_spec_for, stub_for
from torch import Tensor, nn

from logonet import methods
from logonet.training import encoder_use
from logonet.training.dataset import TrainingDataset

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = torch.autocast("cpu", enabled=False)


class Zeroed(Stub):
    """Encodes, and throws some of it away."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels = levels

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        feats = super().encode(x_BCXYZ)
        return [0 * f if i in self.levels else f for i, f in enumerate(feats)]


@pytest.mark.parametrize(("name", "score"), [("masked_clusters", "accuracy"), ("simmim", "loss")])
def test_scores_are_those_of_a_network_without_the_features(name: str, score: str) -> None:
    data_spec, cfg = data_spec_for((32, 32, 32)), config_for(name)
    batch = batch_for(name, cfg, data_spec, [0, 1])
    assert methods.bypass_score(name) == score
    torch.manual_seed(0)
    found = encoder_use.measure(methods.build(name, Stub(), data_spec, cfg=cfg), score, batch, 0.5, OFF)
    endings = {"": (), "_without_deepest": (1,), "_without_encoder": (0, 1)}
    assert found.keys() == {f"batch_{score}{ending}" for ending in endings}
    for ending, levels in endings.items():
        torch.manual_seed(0)
        module = methods.build(name, Zeroed(levels), data_spec, cfg=cfg)
        total, count = module(batch, 0.5)[1][score].tolist()
        assert found[f"batch_{score}{ending}"] == total / count


def test_measuring_leaves_the_module_and_random_numbers_as_they_were() -> None:
    data_spec = data_spec_for()
    module = stub_for("masked_clusters", data_spec)
    batch = batch_for("masked_clusters", module.cfg, data_spec, [0, 1])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    encoder_use.measure(module, "accuracy", batch, 0.0, OFF)
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert "encode" not in vars(module.backbone)


def test_an_encode_of_the_networks_own_comes_back() -> None:
    net: Any = Stub()
    net.encode = own = net.encode  # as a compiled one is
    with encoder_use.blanked(net, slice(None)) as calls:
        assert not any(feat.any() for feat in net.encode(torch.ones(1, 1, 4, 4, 4)))
    assert net.encode is own
    assert calls == [2]


def test_nothing_is_said_of_a_method_that_does_not_encode() -> None:
    module: Any = nn.Linear(1, 1)
    module.backbone = Stub()
    module.forward = lambda batch, progress: (None, {"loss": torch.ones(2)})
    assert encoder_use.measure(module, "loss", {}, 0.0, OFF) == {}


@pytest.mark.parametrize(
    ("scores", "floor", "warned"),
    [
        ((0.5, 0.5, 0.495), 0.1, True),
        ((0.5, 0.5, 0.4), 0.1, False),
        ((0.5, 0.3, 0.5), 0.1, False),
        ((0.1, 0.1, 0.1), 0.1, False),
        ((0.5, 0.6, 0.6), 0.1, True),
    ],
)
def test_a_pretext_that_needs_no_encoder_is_warned_of(
    scores: tuple[float, float, float], floor: float, warned: bool
) -> None:
    entry = {f"batch_accuracy{ending}": score for ending, score in zip(encoder_use.BLANKED, scores)}
    advice = encoder_use.warning({**entry, "accuracy_floor": floor})
    assert (advice is not None) == warned
    assert encoder_use.warning({"accuracy": 0.5}) is None


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataset:
    return crops_dataset(tmp_path_factory.mktemp("crops"))


def test_a_run_logs_it_and_trains_as_without(
    crops: TrainingDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = LocalLoop(crops, a_job(f"{tmp_path}/measured", epochs=1))
    measured.train()
    keys = {f"batch_accuracy{ending}" for ending in encoder_use.BLANKED}
    for entry in measured.history:
        assert all(0 <= entry[key] <= 1 for key in keys)
    assert "without encoder" in capsys.readouterr().out
    monkeypatch.setattr(methods, "bypass_score", lambda name: None)
    plain = LocalLoop(crops, a_job(f"{tmp_path}/plain", epochs=1))
    plain.train()
    for ours, theirs in zip(measured.history, plain.history):
        assert ours.keys() - theirs.keys() == keys
        assert ours["loss"] == theirs["loss"]
    for (name, a), b in zip(measured.method.state_dict().items(), plain.method.state_dict().values()):
        assert torch.equal(a, b), name


def test_every_rank_is_told_what_the_first_measured(crops: TrainingDataset, tmp_path: Path) -> None:
    loop = LocalLoop(crops, a_job(str(tmp_path)))
    told = {"batch_accuracy": 0.25}
    loop.rank = 1
    loop.communicator.gather = lambda own: [told, own]  # type: ignore[assignment, method-assign]
    loop.first_batch = {}
    assert loop._measure_encoder_use() == told
