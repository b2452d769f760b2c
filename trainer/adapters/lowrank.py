"""Truncated SVD of matrices of low rank, through their factors: no dense SVD of the whole matrix where it is known.

up = Q_u R_u and downᵀ = Q_d R_d make up · down = Q_u (R_u R_dᵀ) Q_dᵀ, so the SVD of the small core (r, r) gives that of
the product (out, in). The best matrix of a rank keeps the largest singular values (Eckart and Young 1936).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

DENSE_SIDE = 512  # up to this shorter side the whole SVD is fast
OVERSAMPLING = 16
MOST_ITERATIONS = 6
SMALL_GAIN = 0.01  # of the energy still outside; a subspace that grew by less is near its end


class Svd(NamedTuple):
    """u (out, k), s (k,) falling, vh (k, in): the matrix is u · diag(s) · vh, all in fp32 or fp64."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor


class LowRank(NamedTuple):
    """up (out, rank) and down (rank, in): the matrix is up · down."""

    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Rule:
    """How a rank is chosen: `rank` is the most it may be (0: no limit), and of the rest the stricter one holds.

    `energy` is the share of the squared Frobenius norm Σ S² that is kept; `ratio` drops all S_i below ratio · S_0.
    """

    rank: int = 0
    energy: float = 0.0
    ratio: float = 0.0


def svd_of_factors(up: torch.Tensor, down: torch.Tensor) -> Svd:
    """SVD of up (out, r) · down (r, in) with k = min(out, in, r) values; O((out + in) r² + r³)."""
    q_up, r_up = torch.linalg.qr(_at_least_fp32(up))
    q_down, r_down = torch.linalg.qr(_at_least_fp32(down).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Svd(q_up @ u, s, vh @ q_down.T)


def svd_of_dense(matrix: torch.Tensor, rank: int) -> Svd:
    """SVD of a matrix (out, in) whose factors are not known; of a large one only the first `rank` values.

    Large ones are done by randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1),
    with the same draws every time and 16 values more than wanted, until an iteration gains next to nothing: after two
    where the spectrum falls, four where it is flat. The error is within a hundredth of the best.
    """
    matrix = _at_least_fp32(matrix)
    drawn = rank + OVERSAMPLING
    if min(matrix.shape) <= DENSE_SIDE or 4 * drawn > min(matrix.shape):
        return Svd(*torch.linalg.svd(matrix, full_matrices=False))
    draws = torch.randn(matrix.shape[1], drawn, generator=torch.Generator().manual_seed(0)).to(matrix)
    q = torch.linalg.qr(matrix @ draws).Q  # (out, drawn)
    whole, captured = energy(matrix), 0.0
    for iteration in range(MOST_ITERATIONS + 1):
        z, r = torch.linalg.qr(matrix.T @ q)  # q qᵀ matrix = q rᵀ zᵀ
        before, captured = captured, energy(r)
        if iteration == MOST_ITERATIONS or captured - before <= SMALL_GAIN * (whole - captured):
            break
        q = torch.linalg.qr(matrix @ z).Q
    u, s, vh = torch.linalg.svd(r.T)
    return Svd(q @ u[:, :rank], s[:rank], vh[:rank] @ z.T)


def energy(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm of a matrix; each row in its own type, their sum in fp64."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def svd_of_kronecker(first: torch.Tensor, second: torch.Tensor) -> Svd:
    """SVD of kron(first, second) from those of the two: its values are all products of theirs (Van Loan 2000)."""
    one, two = (torch.linalg.svd(_at_least_fp32(matrix), full_matrices=False) for matrix in (first, second))
    s, order = torch.outer(one.S, two.S).flatten().sort(descending=True, stable=True)
    i, j = order // len(two.S), order % len(two.S)
    u = torch.einsum("ak,bk->abk", one.U[:, i], two.U[:, j]).flatten(0, 1)
    vh = torch.einsum("ka,kb->kab", one.Vh[i], two.Vh[j]).flatten(1)
    return Svd(u, s, vh)


def factors_of_hadamard(one: LowRank, two: LowRank) -> LowRank:
    """Factors of (up₁ · down₁) ∘ (up₂ · down₂), of rank r₁ · r₂: all products of their columns, and of their rows."""
    up = torch.einsum("ok,ol->okl", one.up, two.up).flatten(1)
    return LowRank(up, torch.einsum("ki,li->kli", one.down, two.down).flatten(0, 1))


def factors_of_kronecker(first: torch.Tensor, second: LowRank) -> LowRank:
    """Factors of kron(first, up · down) = kron(first, up) · kron(1, down), of rank columns(first) · r."""
    return LowRank(torch.kron(first, second.up), torch.kron(torch.eye(first.shape[1]), second.down))


def exact_factors(matrix: torch.Tensor) -> LowRank:
    """The matrix (out, in) itself and a unit matrix of its shorter side: a LoRA of full rank that rounds nothing."""
    out, inputs = matrix.shape
    return LowRank(matrix, torch.eye(inputs)) if inputs <= out else LowRank(torch.eye(out), matrix)


def factors_from_svd(svd: Svd, rank: int) -> LowRank:
    """The best factors of that rank; each takes √S, so that neither leaves the range of half precision."""
    root = svd.s[:rank].sqrt()
    return LowRank(svd.u[:, :rank] * root, root[:, None] * svd.vh[:rank])


def chosen_rank(s: torch.Tensor, rule: Rule, total: float | None = None) -> int:
    """Rank that `rule` gives to singular values s (k,), at least 1; `total` is Σ S² where s is not all of them."""
    ranks = [len(s), rule.rank or len(s)]
    if rule.energy:
        ranks.append(rank_of_energy(s, rule.energy, total))
    if rule.ratio:
        ranks.append(rank_of_ratio(s, rule.ratio))
    return max(1, min(ranks))


def rank_of_energy(s: torch.Tensor, share: float, total: float | None = None) -> int:
    """The smallest rank whose Σ S² is at least `share` of the whole."""
    squares = s.double().square()
    wanted = share * (float(squares.sum()) if total is None else total)
    return min(len(s), int((squares.cumsum(0) < wanted * (1 - 1e-12)).sum()) + 1)


def rank_of_ratio(s: torch.Tensor, ratio: float) -> int:
    """How many singular values are at least `ratio` of the first."""
    return max(1, int((s >= ratio * s[0]).sum()))


def lost_energy(s: torch.Tensor, rank: int, total: float | None = None) -> float:
    """‖A - A_rank‖² in the Frobenius norm: Σ S² of what the rank leaves out."""
    squares = s.double().square()
    if total is None:
        return float(squares[rank:].sum())
    return max(0.0, total - float(squares[:rank].sum()))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
