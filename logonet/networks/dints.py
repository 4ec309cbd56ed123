"""DiNTS (He et al. 2021), a network found by differentiable search: MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor

from logonet.core.config import Count, Positive, Section
from logonet.core.errors import UserError
from logonet.networks import Network, Triple
from logonet.networks._shared import GROUPS, Norm, norm_name

WIDTH = 32  # at full resolution, with a channel_mul of 1
OPS = 5  # operations a path chooses from: skip, 3x3x3, and 3x3 in each of the three planes

TINY: dict[str, Any] = {"num_blocks": 2, "num_depths": 2, "channel_mul": 0.125, "norm": "group"}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the DiNTS instance of LoGoNet's Table 1, which is the whole space: no path is left out.

    A block has 3 * num_depths - 2 paths, in this order: into the finest level from itself and from the one
    below; into the next level from above, from itself, from below; and so on.

    Attributes:
        search: learn what each path and each operation is worth; `DiNTS.searched` reads the result.
        num_blocks: how often features pass between levels.
        num_depths: levels, at 1/2, 1/4, ... of the crop's resolution.
        channel_mul: of all widths.
        paths: per block, for each of its paths 1 or 0; None is all of them.
        ops: per block, for each of its paths the operation, 0 to 4 (skip, 3x3x3, 3x3x1, 3x1x3, 1x3x3); None is
            all of them, added up. Give both, or neither.
        norm: of every convolution.
    """

    search: bool = False
    num_blocks: Count = 6
    num_depths: Count = 3
    channel_mul: Positive = 1.0
    paths: tuple[tuple[Literal[0, 1], ...], ...] | None = None
    ops: tuple[tuple[Annotated[int, Ge(0), Lt(OPS)], ...], ...] | None = None
    norm: Norm = "instance_affine"

    def __post_init__(self) -> None:
        super().__post_init__()
        least = GROUPS if self.norm == "group" else 1
        width = WIDTH * self.channel_mul
        if width < least or width != int(width) or int(width) % least:
            raise UserError(
                f"backbone.channel_mul is {self.channel_mul}; {WIDTH} times it must be a positive multiple of {least}"
            )
        if (self.paths is None) != (self.ops is None):
            raise UserError(
                "an architecture is backbone.paths and backbone.ops; give both, or neither for all of them"
            )
        if self.paths is None or self.ops is None:
            return
        if self.search:
            raise UserError("backbone.search looks for paths and ops; leave both out")
        shape = (self.num_blocks, 3 * self.num_depths - 2)
        for key, rows in (("paths", self.paths), ("ops", self.ops)):
            if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
                raise UserError(f"backbone.{key} must have {shape[0]} rows of {shape[1]}, one for each path")
        self._check_joints()

    def _check_joints(self) -> None:
        for block in range(self.num_blocks):
            starts = {start for start, _ in self.active(block)}
            if not starts:
                raise UserError(f"backbone.paths: row {block} has no path; give each block one")
            reached = {end for _, end in self.active(block - 1)} if block else starts
            if starts != reached:
                raise UserError(
                    f"backbone.paths: row {block - 1} reaches levels {sorted(reached)} and row {block} starts "
                    f"from {sorted(starts)}; make them the same"
                )

    def active(self, block: int) -> dict[tuple[int, int], int]:
        """The number of each path that ``block`` has, by the levels (from, to) it joins."""
        levels = range(self.num_depths)
        joins = [(start, end) for end in levels for start in (end - 1, end, end + 1) if start in levels]
        kept = self.paths[block] if self.paths is not None else (1,) * len(joins)
        return {join: path for path, (join, keep) in enumerate(zip(joins, kept)) if keep}

    @property
    def levels_in(self) -> list[int]:
        """The levels that the first block starts from."""
        return sorted({start for start, _ in self.active(0)})

    @property
    def levels_out(self) -> list[int]:
        """The levels that the last block reaches."""
        return sorted({end for _, end in self.active(self.num_blocks - 1)})


def size_multiple(cfg: Config) -> Triple:
    return (2**cfg.num_depths,) * 3


class DiNTS(Network):
    """74,127,278 parameters (252 more when searching) and 743.89 G multiply-accumulates (as thop counts) at 96^3
    with 14 classes.

    Features: the outputs of the search space, at the levels that the last block reaches. When searching, the
    weights of paths and operations are parameters like all others, trained by the same loss and optimizer;
    MONAI's recipe alternates two and adds terms for memory and for the topology's entropy.
    """

    encoder_prefixes = ("net.stem_down.", "net.dints_space.")
    head_prefixes = ("net.stem_finals.1.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.cfg = cfg
        device = torch.get_default_device()
        # MONAI moves what it has just made to the CPU, which the meta device cannot.
        with torch.device("cpu"):
            self.net: Any = _wrapped(cfg, in_channels, num_classes)
        self.net.to(device)
        # Moved to the end, so that the encoder's first convolution in the state dict is one on the crop: weight
        # transfer reads the number of input channels from it.
        space = self.net.dints_space
        del self.net.dints_space
        self.net.dints_space = space
        # MONAI runs the stems of levels that no path starts from and multiplies the result by 0, and never runs
        # those above which no path ends: no gradient would ever reach these weights.
        for level in range(cfg.num_depths):
            if level not in cfg.levels_in:
                del self.net.stem_down[str(level)]
            if level > cfg.levels_out[-1]:
                del self.net.stem_up[str(level)]
        widths = self.net.filter_nums
        self.channels = tuple(widths[level + 1] for level in cfg.levels_out)
        self.strides = tuple(2 ** (level + 1) for level in cfg.levels_out)
        self.feature_channels = widths[0]

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        # MONAI's forward reads its paths from a tensor, which torch.compile cannot trace, so this loop runs the cells.
        space = self.net.dints_space
        path_weights = space.get_prob_a()[1] if self.cfg.search else None
        levels = {level: self.net.stem_down[str(level)](x_BCXYZ) for level in self.cfg.levels_in}
        for block in range(self.cfg.num_blocks):
            after: dict[int, Tensor] = {}
            for (start, end), path in self.cfg.active(block).items():
                cell = space.cell_tree[str((block, path))]
                if path_weights is None:
                    f = cell(levels[start], None)
                else:
                    op_weights = F.softmax(space.log_alpha_c[block, path], dim=-1)
                    f = cell(levels[start], op_weights) * path_weights[block, path]
                after[end] = after[end] + f if end in after else f
            levels = after
        return [levels[level] for level in self.cfg.levels_out]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        levels = dict(zip(self.cfg.levels_out, feats))
        deepest = self.cfg.levels_out[-1]
        f = self.net.stem_up[str(deepest)](levels[deepest])
        for level in range(deepest - 1, -1, -1):
            f = self.net.stem_up[str(level)](levels[level] + f if level in levels else f)
        return self.net.stem_finals[0](f)

    def searched(self) -> dict[str, Any]:
        """``paths`` and ``ops`` of the most probable architecture: options of the instance to train next."""
        assert self.cfg.search, "an instance has nothing to search"
        space = self.net.dints_space
        space.device = space.log_alpha_a.device
        _, paths, ops, _ = space.decode()
        rows = {"paths": paths, "ops": ops}
        return {key: tuple(tuple(int(value) for value in row) for row in rows[key]) for key in rows}


def _wrapped(cfg: Config, in_channels: int, num_classes: int) -> Any:
    import numpy as np
    from monai.networks.nets.dints import DiNTS as Wrapped
    from monai.networks.nets.dints import TopologyInstance, TopologySearch

    code = None if cfg.paths is None else [np.array(cfg.paths), np.array(cfg.ops)]
    space_of: Any = TopologySearch if cfg.search else TopologyInstance
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # It prints a recommended size, and warns that an instance without a code is unusual.
        warnings.simplefilter("ignore", UserWarning)
        same = {key: getattr(cfg, key) for key in ("channel_mul", "num_blocks", "num_depths")}
        space = space_of(arch_code=code, norm_name=norm_name(cfg.norm), **same)
    return Wrapped(space, in_channels, num_classes, norm_name=norm_name(cfg.norm))


build = DiNTS
