"""Exact neighbours against scikit-learn and plain distances; densities against plain loops."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from bezoar.errors import UserError
from bezoar.neighbors import Density, nearest, pool, pool_size


def rows(n: int, d: int = 24, seed: int = 0, unit: bool = True) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1) if unit else 3 * x + 100


def plain(q: torch.Tensor, r: torch.Tensor, k: int, own: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """float64 differences, full sort, ties to the lower index."""
    distance = (q.double()[:, None] - r.double()).square().sum(-1).sqrt().float().numpy()
    for i, j in enumerate(own.tolist()):
        if j >= 0:
            distance[i, j] = np.inf
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, 1), order


@pytest.mark.parametrize("unit", [True, False])
def test_same_as_sklearn(unit):
    x = rows(700, unit=unit)
    found = nearest(x, x, 9, exclude_self=True)
    distance, index = NearestNeighbors(n_neighbors=10, algorithm="brute", metric="euclidean").fit(x.double()).kneighbors()
    assert torch.allclose(found.distance.double(), torch.tensor(distance)[:, :9], atol=1e-5)
    assert (found.index.numpy() == index[:, :9]).mean() > 0.999


@pytest.mark.parametrize("cells", [1, 997, 50_000, 1 << 24])
def test_exact_ties_and_blocks(cells):
    x = rows(300, seed=1)
    x[40:90] = x[40]  # fifty copies: more than k and the margin
    x[120:128] = x[40] + 1e-5 * rows(8, seed=2)  # closer than a float32 product resolves
    found = nearest(x, x, 7, exclude_self=True, cells=cells)
    distance, index = plain(x, x, 7, torch.arange(300))
    assert np.array_equal(found.distance.numpy(), distance)
    assert np.array_equal(found.index.numpy(), index)


def test_far_from_the_origin():
    x = rows(200, seed=3) * 1e-3 + 50
    found = nearest(x, x, 5, exclude_self=True)
    distance, index = plain(x, x, 5, torch.arange(200))
    assert np.array_equal(found.distance.numpy(), distance) and np.array_equal(found.index.numpy(), index)


def test_more_references_than_a_block():
    q, r = rows(5, d=3, seed=4), rows(70_000, d=3, seed=5)
    own = torch.tensor([-1, 3, 69_999, -1, 65_536])
    q[own >= 0] = r[own[own >= 0]]
    found = nearest(q, r, 6, own)
    distance, index = plain(q, r, 6, own)
    assert np.array_equal(found.distance.numpy(), distance) and np.array_equal(found.index.numpy(), index)


def test_no_exclusion_finds_itself_and_all_can_be_asked_for():
    x = rows(20)
    assert torch.equal(nearest(x, x, 1).index[:, 0], torch.arange(20))
    assert torch.equal(nearest(x, x, 20).index.sort(1).values, torch.arange(20).expand(20, -1))


def test_too_few_records_is_the_users_mistake():
    with pytest.raises(UserError, match="16 nearest neighbours asked for; there are 9"):
        nearest(rows(10), rows(10), 16, exclude_self=True)


def test_pool_belongs_to_the_records():
    ids = [f"r{i}" for i in range(500)]
    chosen = {ids[i] for i in pool(ids, 100, 3)}
    turned = ids[::-1]
    assert len(chosen) == 100 and chosen == {turned[i] for i in pool(turned, 100, 3)}
    assert chosen != {ids[i] for i in pool(ids, 100, 4)}
    assert [ids[i] for i in pool(ids, 100, 3)][:50] == [ids[i] for i in pool(ids, 50, 3)]


def test_pool_keeps_poisons_below_k():
    for k, rate in ((16, 0.01), (8, 0.03), (16, 0.0001)):
        assert rate * pool_size(k, rate, 10**9) <= k / 2 + 1e-9
    assert pool_size(16, 0.01, 300) == 300 and pool_size(16, 1.0, 300) == 32


def test_density_is_the_plain_one():
    z, ids, k = rows(120, d=6, seed=7), [f"r{i}" for i in range(120)], 5
    density = Density.measure(z, ids, k, 60, seed=0)
    members = pool(ids, 60, 0)
    everything = torch.cdist(z.double(), z.double())

    def around(i: int) -> list[tuple[float, int]]:
        return sorted((float(everything[i, j]), int(j)) for j in members if j != i)[:k]

    for i in range(120):
        near = around(i)
        ratios, lids = [], []
        for _, y in near:
            r = [d for d, _ in around(y)]
            ratios.append(np.log(near[-1][0] / r[-1]))
            lids.append(min(6, -k / sum(np.log(a / r[-1] + 1e-4) for a in r[:-1])))
        assert density.log_ratio[i].numpy() == pytest.approx(ratios, abs=1e-5)
        assert density.lid[i].numpy() == pytest.approx(lids, rel=1e-4)


def test_density_of_copies_is_finite():
    z = rows(1, d=4).expand(80, -1).clone()
    z[-10:] = rows(10, d=4, seed=9)
    density = Density.measure(z, [str(i) for i in range(80)], 6, 80, 0)
    assert torch.isfinite(density.log_ratio).all() and torch.isfinite(density.lid).all()
    assert (density.lid > 0).all() and (density.lid <= 4).all()
