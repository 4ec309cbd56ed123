"""The fused labeller: every clusterer's label of every slice, exactly, for a fraction of the arithmetic.

Shape legend: S slices, T pixels of a slice (C*X*Y), N clusterers, K codes of one clusterer, V codes of all
clusterers together, R dimensions of the screen, U codes that survive the screen, P (slice, code) pairs.

Labels of one slice x are argmin_j |x - c_j|^2 over the codes c_j of each clusterer. Real slices and the
centroids fitted to them lie close to a subspace of a few hundred dimensions, so three steps of falling
width and rising cost settle all labels:

1. Screen, all V codes, R dimensions. Let Q (T, R) have orthonormal columns and write
   x = Q a + x', c = Q b + c' with a = Q^T x, b = Q^T c, so x.c = a.b + x'.c' and, by Cauchy-Schwarz,

       | (|c|^2 - 2 x.c) - (|c|^2 - 2 a.b) |  <=  2 |x'| |c'|,   |x'|^2 = |x|^2 - |a|^2.            (1)

   A code whose lower bound exceeds the least upper bound of its clusterer cannot be the nearest.
2. Survivors only: x.c over all T pixels in float32.
3. What float32 cannot tell apart: |x - c|^2 in float64, lowest index first, as argmin does.

Rounding. With u = 2^-24, a float32 sum of n products, in any order, with or without fused multiply-add,
is within gamma_n sum |x_i c_i| <= gamma_n |x| |c| of the exact one, gamma_n = n u / (1 - n u) (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1). Long sums are cut into blocks that are added
in float64, so n is the block's length. Centroids are projected in float64; slices in float32, so their a
is within rho |x| of Q^T x, with rho = sqrt(R) (gamma_block + u) + 2 u. That changes a.b by at most
rho |x| |c| and |a|^2 by at most 2 rho (1 + rho) |x|^2. With r^2 = |x|^2 - |a|^2 + 3 rho |x|^2 >= |x'|^2 and
p q + rho |x| |c| <= sqrt(p^2 + k rho |x|^2) sqrt(q^2 + rho |c|^2 / k) for any k > 0, the bound (1) becomes

    2 X Y + eps |c|^2,   X^2 = r^2 + (k rho + eps) |x|^2,   Y^2 = |c'|^2 + (rho / k + eps) |c|^2        (2)

where eps = 4 gamma_(R+8) covers the screen's own float32 sums: their R + 2 terms add up, in absolute
value, to at most |c|^2 + 2 |a| |b| + 2 X Y. Step 2 is within 2 gamma_block |x| |c| of the truth.
``tests/test_labeller.py`` checks all of it against float64 brute force.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from logonet.clustering.kmeans import ClustererSet
from logonet.core.errors import UserError
from logonet.data.volume import from_uint16

UNIT = 2.0**-24  # float32, round to nearest
RANK = 510  # with two more columns the screen is 512 wide; 254 took a sixth longer on CT crops, 766 no less
PROJECT_BLOCK = 256
EXACT_BLOCK = 1024
ROWS = 1024  # gathered rows of one product: 1024 x 1024 float32 stay in the shared cache
PAIRS = 64
SLICES = 192  # of one pass; bounds the scratch: all pairs of incompressible slices take 1 GB at V = 23,000
BASIS_SAMPLE = 1024
SKEW = 8.0  # k in (2): slices have larger residuals than centroids, so they can bear more of rho
LARGEST = 1e16  # |x|^2 up to here; intensities in [0, 1] stay far below
TINY = 1e-24  # what float32 products that underflow can add up to; relative bounds do not see them
NEVER = 1e30  # stands for +inf: a real inf could meet 0 * inf in a padded kernel


class Labeller:
    """Labels slices by all clusterers at once.

    The centroids are never copied on the CPU, so ``clusterers.centroids_VT`` may be a read-only view of
    shared memory; the screen adds 4 * (RANK + 4) bytes per code (5.6 % at T = 9216) plus the basis. Building it takes
    seconds to tens of seconds, so a labeller is built once and travels with its screen.

    Args:
        clusterers: the fitted set.
        device: where to compute; the centroids are copied there unless it is the CPU.

    Raises:
        UserError: centroids that are not finite or absurdly large.
    """

    def __init__(self, clusterers: ClustererSet, device: str | torch.device = "cpu") -> None:
        self._take(torch.device(device), [int(k) for k in clusterers.sizes_N], clusterers.centroids_VT)
        with torch.inference_mode():
            self.norm2_V = _norm2(self.centroids_VT)
            if not bool((self.norm2_V <= LARGEST).all()):  # also False for NaN
                raise UserError(f"clusterer set {clusterers.id} has centroids that are not finite; refit it")
            basis_TR = self._basis()
            self.rank = basis_TR.shape[1]
            self.rho = self.rank**0.5 * (_gamma(PROJECT_BLOCK) + UNIT) + 2 * UNIT
            self.eps = 4 * _gamma(self.rank + 8)
            self._build_screen(basis_TR)

    def _take(self, device: torch.device, sizes: list[int], centroids_VT: np.ndarray) -> None:
        self.device, self.sizes = device, sizes
        self.centroids_VT = _tensor(centroids_VT).to(device)
        self.first_N = torch.tensor([0, *sizes[:-1]], device=device).cumsum(0)
        sizes_N = torch.tensor(sizes, device=device)
        self.clusterer_V = torch.arange(len(sizes), device=device).repeat_interleave(sizes_N)

    def __getstate__(self) -> dict[str, Any]:
        """Arrays and numbers; Ray keeps the arrays in shared memory, once a machine."""
        screen = {
            "norm2_V": self.norm2_V,
            "lift_V2": self._lift_V2,
            "rows_VR": _plain(self._rows_VR),
            "basis_RT": torch.cat([_plain(q) for q in self._basis_RB], 1),
        }
        return {
            "taken": (str(self.device), self.sizes, self.centroids_VT.cpu().numpy()),
            "numbers": (self.rank, self.rho, self.eps),
            "screen": {name: tensor.cpu().numpy() for name, tensor in screen.items()},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        device, *rest = state["taken"]
        self._take(torch.device(device), *rest)
        self.rank, self.rho, self.eps = state["numbers"]
        with torch.inference_mode():
            screen = {name: _tensor(array).to(self.device) for name, array in state["screen"].items()}
            self.norm2_V, self._lift_V2 = screen["norm2_V"], screen["lift_V2"]
            self._rows_VR = _fast(screen["rows_VR"])
            self._basis_RB = [_fast(q.contiguous()) for q in screen["basis_RT"].split(PROJECT_BLOCK, 1)]

    def _basis(self) -> torch.Tensor:
        """Leading right singular vectors of an evenly spaced sample of centroids, float64 (T, R).

        Not centred: near air both x and c are then small, and so are all rounding bounds.
        """
        V, T = self.centroids_VT.shape
        pick = torch.linspace(0, V - 1, min(V, BASIS_SAMPLE), device=self.device).long().unique()
        sample_MT = self.centroids_VT[pick].double()
        _, vectors_MM = torch.linalg.eigh(sample_MT @ sample_MT.T)  # ascending
        rank = min(RANK, len(pick), T)
        # QR makes the columns orthonormal to float64 even where the sample has no more dimensions.
        return torch.linalg.qr(sample_MT.T @ vectors_MM.flip(1)[:, :rank]).Q

    def _build_screen(self, basis_TR: torch.Tensor) -> None:
        project_V = [c.double() @ basis_TR for c in self.centroids_VT.split(1024)]
        b_VR = torch.cat([p.float() for p in project_V])
        inside_V = torch.cat([p.square().sum(1) for p in project_V])
        residual2_V = (self.norm2_V - inside_V).clamp_min(0)
        pad = self.rho / SKEW + self.eps
        residual_V = _up((residual2_V + pad * self.norm2_V).sqrt()).float()
        low_V = torch.where(~self._repeats(), (1 - self.eps) * self.norm2_V, NEVER).float()
        self._rows_VR = _fast(torch.cat([b_VR, residual_V[:, None], low_V[:, None]], 1))
        # What lifts a lower bound to the upper one: 4 X Y + 2 eps |c|^2.
        self._lift_V2 = torch.stack([4 * residual_V, (2 * self.eps * self.norm2_V).float()], 1)
        self._basis_RB = [_fast(q.T.float().contiguous()) for q in basis_TR.split(PROJECT_BLOCK)]

    def _repeats(self) -> torch.Tensor:
        """True for codes equal to a lower-numbered code of the same clusterer: argmin never picks them."""
        repeats_V = torch.zeros(len(self.norm2_V), dtype=torch.bool)
        start = 0
        for norm2_K in self.norm2_V.cpu().split(self.sizes):
            seen: dict[float, list[int]] = {}
            for j, norm2 in enumerate(norm2_K.tolist(), start):
                same = seen.setdefault(norm2, [])
                repeats_V[j] = any(torch.equal(self.centroids_VT[i], self.centroids_VT[j]) for i in same)
                if not repeats_V[j]:
                    same.append(j)
            start += len(norm2_K)
        return repeats_V.to(self.device)

    def __call__(self, slices_ST: torch.Tensor | np.ndarray) -> np.ndarray:
        """Labels int16 (S, N) of slices (S, T): uint16 crops' slices, or float32 intensities.

        Raises:
            UserError: the slices' length is not the centroids', or they are not finite.
        """
        if isinstance(slices_ST, np.ndarray):
            # On the CPU: CUDA divides by a constant less exactly, and labels belong to these very floats.
            x_ST = from_uint16(slices_ST) if slices_ST.dtype == np.uint16 else np.ascontiguousarray(slices_ST)
            slices_ST = torch.from_numpy(x_ST)
        T = self.centroids_VT.shape[1]
        if slices_ST.ndim != 2 or slices_ST.shape[1] != T:
            odd = f"slices have shape {tuple(slices_ST.shape)}, the clusterers were fitted to slices of {T} pixels"
            raise UserError(f"{odd}; label crops of the size the clusterers were fitted on")
        if not len(slices_ST):
            return np.zeros((0, len(self.sizes)), np.int16)
        with torch.inference_mode(), _ieee_float32():
            parts = slices_ST.to(self.device, torch.float32).split(SLICES)
            return torch.cat([self._label(part) for part in parts]).cpu().numpy()

    def _label(self, x_ST: torch.Tensor) -> torch.Tensor:
        S, N = len(x_ST), len(self.sizes)
        norm2_S = _norm2(x_ST)
        if not bool((norm2_S <= LARGEST).all()):
            raise UserError("slices to label are not finite; the crop stage must clip intensities to [0, 1]")
        # Step 1: the pairs that can be nearest, codes ascending.
        low_VS, high_VS = self._bounds(x_ST, norm2_S)
        high_NS = torch.stack([high_KS.amin(0) for high_KS in high_VS.split(self.sizes)])
        code_P, slice_P = (low_VS <= high_NS[self.clusterer_V] + TINY).nonzero().unbind(1)
        del low_VS, high_VS
        labels = torch.full((N * S,), -1, device=self.device)
        key_P = self.clusterer_V[code_P] * S + slice_P
        key_P, code_P = _settle(labels, key_P, code_P, torch.ones_like(code_P, dtype=torch.bool))

        rows_U, row_P = torch.unique_consecutive(code_P, return_inverse=True)
        slice_P = key_P % S
        score_P = self.norm2_V[code_P] - 2 * self._products(x_ST, rows_U)[row_P, slice_P]
        error_P = 2 * _gamma(EXACT_BLOCK + 2) * (norm2_S[slice_P] * self.norm2_V[code_P]).sqrt() + TINY
        keep_P = score_P - error_P <= _least(score_P + error_P, key_P, N * S)[key_P]
        key_P, code_P = _settle(labels, key_P, code_P, keep_P)

        distance_P = self._distances(x_ST, key_P % S, code_P)
        _settle(labels, key_P, code_P, distance_P == _least(distance_P, key_P, N * S)[key_P], lowest=True)
        assert not bool((labels < 0).any()), "a slice lost its last candidate: the bounds are wrong"
        return (labels.view(N, S) - self.first_N[:, None]).T.to(torch.int16)

    def _bounds(self, x_ST: torch.Tensor, norm2_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Lower and upper bounds (2) of |c|^2 - 2 x.c, float32 (V, S)."""
        a_SR = torch.zeros(len(x_ST), self.rank, dtype=torch.float64, device=self.device)
        for x_SB, basis_RB in zip(x_ST.split(PROJECT_BLOCK, 1), self._basis_RB):
            a_SR += _product(_fast(x_SB.contiguous()), basis_RB)
        residual2_S = (norm2_S - a_SR.square().sum(1)).clamp_min(0)
        pad = (3 + SKEW) * self.rho + self.eps
        residual_S = _up((residual2_S + pad * norm2_S).sqrt()).float()
        ones_S = torch.ones_like(residual_S)
        columns_SR = torch.cat([-2 * a_SR.float(), -2 * residual_S[:, None], ones_S[:, None]], 1)
        low_VS = _product(self._rows_VR, _fast(columns_SR))
        return low_VS, torch.addmm(low_VS, self._lift_V2, torch.stack([residual_S, ones_S]))

    def _products(self, x_ST: torch.Tensor, rows_U: torch.Tensor) -> torch.Tensor:
        """Step 2: x.c of every slice with the codes ``rows_U``, float64 sums of float32 blocks (U, S)."""
        blocks = [_fast(x.contiguous()) for x in x_ST.split(EXACT_BLOCK, 1)]
        out_US = torch.zeros(len(rows_U), len(x_ST), dtype=torch.float64, device=self.device)
        if not len(rows_U):  # oneDNN takes no empty tensors
            return out_US
        for out, rows in zip(out_US.split(ROWS), rows_U.split(ROWS)):
            for c_VT, x in zip(self.centroids_VT.split(EXACT_BLOCK, 1), blocks):
                out += _product(_fast(c_VT.index_select(0, rows)), x)
        return out_US

    def _distances(self, x_ST: torch.Tensor, slice_P: torch.Tensor, code_P: torch.Tensor) -> torch.Tensor:
        """Step 3: squared distances of the pairs, float64 (P,)."""
        some = zip(slice_P.split(PAIRS), code_P.split(PAIRS))
        parts = [(self.centroids_VT[code].double() - x_ST[s]).square().sum(1) for s, code in some]
        return torch.cat(parts) if parts else self.norm2_V.new_zeros(0)


def _settle(
    labels: torch.Tensor,
    key_P: torch.Tensor,
    code_P: torch.Tensor,
    keep_P: torch.Tensor,
    lowest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the labels of keys with one kept code (or the lowest kept one) and return the other pairs."""
    key_P, code_P = key_P[keep_P], code_P[keep_P]
    if lowest:
        labels.scatter_reduce_(0, key_P, code_P, "amin", include_self=False)
        return key_P[:0], code_P[:0]
    alone_P = torch.bincount(key_P, minlength=len(labels))[key_P] == 1
    labels[key_P[alone_P]] = code_P[alone_P]
    return key_P[~alone_P], code_P[~alone_P]


def _least(value_P: torch.Tensor, key_P: torch.Tensor, num_keys: int) -> torch.Tensor:
    return value_P.new_full((num_keys,), torch.inf).scatter_reduce_(0, key_P, value_P, "amin")


def _norm2(x_MT: torch.Tensor) -> torch.Tensor:
    """Squared lengths, float64 (M,). In parts, of which torch makes float64 copies."""
    return torch.cat(
        [torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square() for x in x_MT.split(1024)]
    )


def _gamma(n: int) -> float:
    return n * UNIT / (1 - n * UNIT)


def _up(x: torch.Tensor) -> torch.Tensor:
    """Room for rounding an upper bound to float32."""
    return x * (1 + 4 * UNIT)


def _fast(x: torch.Tensor) -> torch.Tensor:
    """oneDNN's layout on the CPU: its float32 products ran twice as fast as the BLAS behind ``@`` (AMD Zen)."""
    return x.to_mkldnn() if x.device.type == "cpu" and torch.backends.mkldnn.is_available() else x


def _plain(x: torch.Tensor) -> torch.Tensor:
    """What went through ``_fast``, in the usual layout."""
    return x.to_dense() if x.layout is torch._mkldnn else x  # type: ignore[attr-defined]


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # A view of shared memory is read-only; nothing here writes to it.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _product(rows_MK: torch.Tensor, columns_NK: torch.Tensor) -> torch.Tensor:
    """rows @ columns.T, float32 (M, N), of two tensors that went through ``_fast``."""
    if rows_MK.layout is torch._mkldnn:  # type: ignore[attr-defined]
        return F.linear(rows_MK, columns_NK).to_dense()
    return rows_MK @ columns_NK.T


@contextlib.contextmanager
def _ieee_float32() -> Iterator[None]:
    """TensorFloat-32 or bfloat16 products, which training switches on, would break the bounds."""
    # Not torch.set_float32_matmul_precision: it refuses to answer once a program has used these settings.
    settings = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "ieee"
        yield
    finally:
        for s, precision in zip(settings, before):
            s.fp32_precision = precision
