"""Configs, search spaces, weights and models for the fuzz tests, their damage, and the commands that read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz_damage import Random, damaged, damaged_json, flip, some
from fuzz_scans import damage_json_in, damage_text_in

from logonet.core.errors import UserError

# -------------------------------------------------------------------------------------------- settings


def make_config(folder: Path) -> None:
    from logonet import recipes
    from logonet.core import config

    (folder / "mine.yaml").write_text(config.to_yaml(recipes.PRETRAINING["demo"]()))


def damage_config(rng: Random, folder: Path) -> str:
    """Half of them well-formed: one value is another, so that what checks values is reached and not the parser."""
    if rng.random() < 0.5:
        return damage_text_in("mine.yaml")(rng, folder)
    from logonet.core import config

    path = folder / "mine.yaml"
    values = config.read_yaml(path.read_text(), "mine.yaml")
    path.write_bytes(damaged_json(rng, json.dumps(values).encode(), times=1))
    return "mine.yaml by one value"


def reach_config(folder: Path) -> Iterator[str]:
    from logonet import cli, pipelines, recipes
    from logonet.core import config

    cfg = cli.job_config(cli.JobArgs(recipe="demo", config=f"{folder}/mine.yaml"), recipes.PRETRAINING)
    config.fingerprint(pipelines.resolve(cfg))
    yield from ()


def make_settings(folder: Path) -> None:
    settings = ["train.lr=1e-3", "method.phi1=0.2", "crops.size_vox=[32, 32, 32]", "backbone.full_width=8"]
    (folder / "settings").write_text("\n".join(settings))


def reach_settings(folder: Path) -> Iterator[str]:
    from logonet import cli, pipelines, recipes
    from logonet.core import config

    text = (folder / "settings").read_bytes().decode("utf-8", "surrogateescape")
    settings = text.split("\n")
    for each in settings:
        try:
            cfg = cli.job_config(cli.JobArgs(recipe="demo", set=(each,)), recipes.PRETRAINING)
            config.fingerprint(pipelines.resolve(cfg))
        except UserError as err:
            yield str(err)
    cli.job_config(cli.JobArgs(recipe="demo", set=tuple(settings)), recipes.PRETRAINING)


def make_space(folder: Path) -> None:
    lines = ["search:", "  method.chain_length: {grid: [3, 5, 7]}", "  method.phi1: {uniform: [0.1, 0.3]}"]
    lines += ["  train.lr: {loguniform: [3.0e-5, 1.0e-3]}", "  clusterers.n: {int: [2, 4]}", "first:"]
    lines += ["  - {method.chain_length: 5, method.phi1: 0.1}", ""]
    (folder / "space.yaml").write_text("\n".join(lines))


def reach_space(folder: Path) -> Iterator[str]:
    from logonet.core import config
    from logonet.storage import object_store
    from logonet.sweep import space

    uri = f"{folder}/space.yaml"
    config.fingerprint(space.read(object_store.read(uri).decode("utf-8", "replace"), uri).to_dict())
    yield from ()


# ----------------------------------------------------------------------------------------- safetensors


def damaged_tensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header, or blind damage."""
    way = int(rng.integers(5))
    if way == 0:
        return damaged(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    if way == 1:
        length = int(some(rng, [0, 1, 7, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1]))
        return length.to_bytes(8, "little") + header + body
    if way == 2:
        header = damaged_json(rng, header)
    elif way == 3:
        header = _odd_entries(rng, header, len(body))
    else:
        body = some(rng, [body[:-1], body + b"\0", b"", body * 2, flip(rng, body)])
    return len(header).to_bytes(8, "little") + header + body


def _odd_entries(rng: Random, header: bytes, size: int) -> bytes:
    fields = json.loads(header)
    names = [n for n in fields if n != "__metadata__"]
    name, other = some(rng, names), some(rng, names)
    entry = fields[name]
    way = int(rng.integers(7))
    if way == 0:
        entry["data_offsets"] = fields[other]["data_offsets"]
    elif way == 1:
        entry["data_offsets"] = some(
            rng, [[0, size], [size, 0], [-1, 4], [0, 2**63], [0, 0], [0], [0, 1, 2], None]
        )
    elif way == 2:
        entry["shape"] = some(
            rng,
            [
                [],
                [0],
                [2**31, 2**31],
                [-1],
                [10**6, 10**6],
                entry["shape"][::-1],
                [1, *entry["shape"]],
                [10**30],
            ],
        )
    elif way == 3:
        entry["dtype"] = some(
            rng, ["F32", "F64", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "C64", "U16", "F4", "?", None]
        )
    elif way == 4:
        fields["x" * 100] = entry
    elif way == 5:
        del fields[name]
    else:
        fields[name] = some(rng, [None, [], {}, 3, "x"])
    return json.dumps(fields).encode()


def damage_tensors_in(*names: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        path = folder / some(rng, names)
        path.write_bytes(damaged_tensors(rng, path.read_bytes()))
        return path.name

    return damage


def _net() -> Any:
    from logonet import networks
    from logonet.networks import unet

    return networks.build("unet", 1, 3, **unet.TINY)


def make_weights(folder: Path) -> None:
    from safetensors.torch import save

    (folder / "given.safetensors").write_bytes(
        save({n: t.contiguous() for n, t in _net().state_dict().items()})
    )


def reach_weights(folder: Path) -> Iterator[str]:
    """finetune --init x.safetensors: as found, copied, loaded and laid into a network."""
    from logonet import training
    from logonet.pipelines import finetuning
    from logonet.training import weight_transfer

    source = f"{folder}/given.safetensors"
    found = finetuning.find_weights(source, f"{folder}/root")
    assert found is not None
    weight_transfer.transfer(
        _net(), training.load_weights(training.Init(found.uri, found.sha256)), source=source
    )
    yield from ()


def make_model(folder: Path) -> None:
    from logonet.inference import model
    from logonet.networks import unet

    spec = model.Spec(
        backbone={"name": "unet", **unet.TINY},
        in_channels=1,
        classes=("background", "liver", "spleen"),
        label_values=(0, 1, 2),
        size_vox=(16, 16, 16),
        spacing_mm=(1.5, 1.5, 2.0),
        window_hu=(-1000.0, 1000.0),
        mr_percentiles=(0.5, 99.5),
        modality="CT",
    )
    for name, blob in model.files(spec, _net().state_dict()).items():
        (folder / name).write_bytes(blob)


def damage_model(rng: Random, folder: Path) -> str:
    if rng.random() < 0.6:
        return damage_json_in("config.json")(rng, folder)
    return damage_tensors_in("weights.safetensors")(rng, folder)


def reach_model(folder: Path) -> Iterator[str]:
    from logonet.inference import model

    spec, weights = model.read(str(folder))
    model.build(spec, weights)
    yield from ()
