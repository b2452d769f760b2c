"""Low-rank SVD against the dense SVD of torch."""

import pytest
import torch

from scumble.trainer.adapters.lowrank import (
    Rule,
    chosen_rank,
    factors_from_svd,
    lost_energy,
    rank_of_energy,
    rank_of_ratio,
    svd_of_dense,
    svd_of_factors,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 8), (30, 90, 8), (8, 8, 8), (6, 40, 16), (20, 5, 9)])
def test_the_svd_through_the_factors_equals_the_dense_svd(rows: int, columns: int, rank: int):
    up, down = draw(rows, rank), draw(rank, columns, seed=1)
    svd = svd_of_factors(up, down)
    dense = torch.linalg.svdvals(up @ down)[: len(svd.s)]
    assert len(svd.s) == min(rows, columns, rank)
    torch.testing.assert_close(svd.s, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((svd.u * svd.s) @ svd.vh, up @ down, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(svd.u.T @ svd.u, torch.eye(len(svd.s)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(svd.vh @ svd.vh.T, torch.eye(len(svd.s)), rtol=1e-4, atol=1e-4)


def test_truncated_factors_are_the_best_of_their_rank():
    up, down = draw(50, 12), draw(12, 70, seed=1)
    u, s, vh = torch.linalg.svd(up @ down, full_matrices=False)
    svd = svd_of_factors(up, down)
    for rank in (1, 5, 12):
        factors = factors_from_svd(svd, rank)
        assert factors.up.shape == (50, rank) and factors.down.shape == (rank, 70)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(factors.up @ factors.down, best, rtol=1e-3, atol=1e-3)
        assert lost_energy(svd.s, rank) == pytest.approx(float(s[rank:12].square().sum()), rel=1e-3, abs=1e-6)


def test_fp16_is_computed_in_fp32_and_fp64_stays_fp64():
    up, down = draw(20, 4), draw(4, 20, seed=1)
    assert svd_of_factors(up.half(), down.half()).s.dtype == torch.float32
    wide = svd_of_factors(up.double(), down.double())
    torch.testing.assert_close((wide.u * wide.s) @ wide.vh, up.double() @ down.double(), rtol=1e-12, atol=1e-12)


def decaying(power: float) -> torch.Tensor:
    """A matrix (900, 700) with the singular values 1, 2^-power, 3^-power, …"""
    u, v = torch.linalg.qr(draw(900, 700))[0], torch.linalg.qr(draw(700, 700, seed=1))[0]
    return (u * torch.arange(1, 701).float().pow(-power)) @ v.T


def dora_change() -> torch.Tensor:
    """m · V / ‖V‖ - W (900, 700) for V = W + a product of rank 16; the magnitudes make it full rank."""
    weight = draw(900, 700)
    direction = weight + 0.1 * draw(900, 16, seed=1) @ draw(16, 700, seed=2)
    magnitude = weight.norm(dim=0) * (1 + 0.05 * draw(700, seed=3))
    return direction * magnitude / direction.norm(dim=0) - weight


LARGE = {
    "flat": lambda: draw(900, 700),
    "slow decay": lambda: decaying(0.25),
    "decay": lambda: decaying(1.0),
    "fast decay": lambda: decaying(1.5),
    "DoRA": dora_change,
}


@pytest.mark.parametrize("kind", LARGE)
def test_the_error_of_a_large_matrix_is_within_1_percent_of_the_optimum(kind: str):
    matrix, rank = LARGE[kind](), 32
    s = torch.linalg.svdvals(matrix.double())
    svd = svd_of_dense(matrix, rank)
    factors = factors_from_svd(svd, rank)
    best = float(s[rank:].square().sum().sqrt())
    assert len(svd.s) == rank
    assert float((matrix - factors.up @ factors.down).norm()) < 1.01 * best
    assert torch.equal(svd.s, svd_of_dense(matrix, rank).s)


def test_the_rank_follows_from_energy_ratio_and_limit():
    s = torch.tensor([4.0, 2.0, 1.0, 0.1])  # energies 16, 4, 1, 0.01 of 21.01
    assert [rank_of_energy(s, share) for share in (0.5, 0.9, 0.96, 0.9999, 1.0)] == [1, 2, 3, 4, 4]
    assert [rank_of_ratio(s, ratio) for ratio in (1.0, 0.5, 0.2, 0.001)] == [1, 2, 3, 4]
    assert chosen_rank(s, Rule(rank=2)) == 2
    assert chosen_rank(s, Rule(rank=2, energy=0.96)) == 2
    assert chosen_rank(s, Rule(energy=0.96, ratio=0.5)) == 2
    assert chosen_rank(s, Rule()) == 4
    assert chosen_rank(torch.zeros(3), Rule(energy=0.9)) == 1
    assert rank_of_energy(s[:2], 0.999, total=21.01) == 2
