"""Truncated SVD of low-rank matrices. If the factors are known, no dense SVD of the full matrix is computed.

If up = Q_u R_u and downᵀ = Q_d R_d, then up · down = Q_u (R_u R_dᵀ) Q_dᵀ, so the SVD of the small core (r, r) gives the
SVD of the product (out, in). The best rank-k approximation keeps the k largest singular values (Eckart and Young 1936).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

DENSE_SIDE = 512  # a full SVD is fast up to this shorter side
OVERSAMPLING = 16
MAX_ITERATIONS = 6
MIN_GAIN = 0.01  # of the energy not yet captured; iteration stops below it


class Svd(NamedTuple):
    """u (out, k), s (k,) in descending order, vh (k, in), in fp32 or fp64: the matrix is u · diag(s) · vh."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor


class LowRank(NamedTuple):
    """up (out, rank) and down (rank, in): the matrix is up · down."""

    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Rule:
    """How to choose a rank. `rank` is the maximum (0: no limit); the strictest of the three limits applies.

    `energy` is the share of the squared Frobenius norm Σ S² to keep; `ratio` drops all S_i below ratio · S_0.
    """

    rank: int = 0
    energy: float = 0.0
    ratio: float = 0.0


def svd_of_factors(up: torch.Tensor, down: torch.Tensor) -> Svd:
    """Return the SVD of up (out, r) · down (r, in) with k = min(out, in, r) values, in O((out + in) r² + r³)."""
    q_up, r_up = torch.linalg.qr(_at_least_fp32(up))
    q_down, r_down = torch.linalg.qr(_at_least_fp32(down).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Svd(q_up @ u, s, vh @ q_down.T)


def svd_of_dense(matrix: torch.Tensor, rank: int) -> Svd:
    """Return the SVD of a matrix (out, in) with unknown factors; for large matrices only the first `rank` values.

    Large matrices use randomized subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1) with a
    fixed seed and an oversampling of 16. It stops when an iteration gains little: after two iterations for a decaying
    spectrum, four for a flat one. The error is within 1 % of the optimum.
    """
    matrix = _at_least_fp32(matrix)
    drawn = rank + OVERSAMPLING
    if min(matrix.shape) <= DENSE_SIDE or 4 * drawn > min(matrix.shape):
        return Svd(*torch.linalg.svd(matrix, full_matrices=False))
    draws = torch.randn(matrix.shape[1], drawn, generator=torch.Generator().manual_seed(0)).to(matrix)
    q = torch.linalg.qr(matrix @ draws).Q  # (out, drawn)
    total, captured = energy(matrix), 0.0
    for iteration in range(MAX_ITERATIONS + 1):
        z, r = torch.linalg.qr(matrix.T @ q)  # q qᵀ matrix = q rᵀ zᵀ
        before, captured = captured, energy(r)
        if iteration == MAX_ITERATIONS or captured - before <= MIN_GAIN * (total - captured):
            break
        q = torch.linalg.qr(matrix @ z).Q
    u, s, vh = torch.linalg.svd(r.T)
    return Svd(q @ u[:, :rank], s[:rank], vh[:rank] @ z.T)


def energy(matrix: torch.Tensor) -> float:
    """Return the squared Frobenius norm of a matrix: row norms in the matrix's dtype, their sum in fp64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def svd_of_kronecker(first: torch.Tensor, second: torch.Tensor) -> Svd:
    """Return the SVD of kron(first, second): its singular values are all products of theirs (Van Loan 2000)."""
    one, two = (torch.linalg.svd(_at_least_fp32(matrix), full_matrices=False) for matrix in (first, second))
    s, order = torch.outer(one.S, two.S).flatten().sort(descending=True, stable=True)
    i, j = order // len(two.S), order % len(two.S)
    u = torch.einsum("ak,bk->abk", one.U[:, i], two.U[:, j]).flatten(0, 1)
    vh = torch.einsum("ka,kb->kab", one.Vh[i], two.Vh[j]).flatten(1)
    return Svd(u, s, vh)


def factors_of_hadamard(one: LowRank, two: LowRank) -> LowRank:
    """Return factors of (up₁ · down₁) ∘ (up₂ · down₂) of rank r₁ · r₂: the products of all column and row pairs."""
    up = torch.einsum("ok,ol->okl", one.up, two.up).flatten(1)
    return LowRank(up, torch.einsum("ki,li->kli", one.down, two.down).flatten(0, 1))


def factors_of_kronecker(first: torch.Tensor, second: LowRank) -> LowRank:
    """Return factors of kron(first, up · down) = kron(first, up) · kron(1, down), of rank columns(first) · r."""
    return LowRank(torch.kron(first, second.up), torch.kron(torch.eye(first.shape[1]), second.down))


def exact_factors(matrix: torch.Tensor) -> LowRank:
    """Return the matrix (out, in) and an identity matrix of its shorter side: a full-rank LoRA without rounding."""
    out, inputs = matrix.shape
    return LowRank(matrix, torch.eye(inputs)) if inputs <= out else LowRank(torch.eye(out), matrix)


def factors_from_svd(svd: Svd, rank: int) -> LowRank:
    """Return the best factors of the given rank. Each is scaled by √S, so that both stay in the fp16 range."""
    root = svd.s[:rank].sqrt()
    return LowRank(svd.u[:, :rank] * root, root[:, None] * svd.vh[:rank])


def chosen_rank(s: torch.Tensor, rule: Rule, total: float | None = None) -> int:
    """Return the rank, at least 1, that `rule` gives for singular values s (k,). `total` is Σ S² if s is truncated."""
    ranks = [len(s), rule.rank or len(s)]
    if rule.energy:
        ranks.append(rank_of_energy(s, rule.energy, total))
    if rule.ratio:
        ranks.append(rank_of_ratio(s, rule.ratio))
    return max(1, min(ranks))


def rank_of_energy(s: torch.Tensor, share: float, total: float | None = None) -> int:
    """Return the smallest rank whose Σ S² is at least `share` of the total."""
    squares = s.double().square()
    required = share * (float(squares.sum()) if total is None else total)
    return min(len(s), int((squares.cumsum(0) < required * (1 - 1e-12)).sum()) + 1)


def rank_of_ratio(s: torch.Tensor, ratio: float) -> int:
    """Return the number of singular values that are at least `ratio` times the first."""
    return max(1, int((s >= ratio * s[0]).sum()))


def lost_energy(s: torch.Tensor, rank: int, total: float | None = None) -> float:
    """Return ‖A - A_rank‖² (Frobenius): Σ S² of the discarded singular values."""
    squares = s.double().square()
    if total is None:
        return float(squares[rank:].sum())
    return max(0.0, total - float(squares[:rank].sum()))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
