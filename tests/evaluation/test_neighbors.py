"""Exact neighbours against scikit-learn and plain distances."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from bezoar.data.randomness import sample_rows
from bezoar.detection.density import pool_size
from bezoar.errors import UserError
from bezoar.evaluation import neighbors
from bezoar.evaluation.neighbors import Index, nearest_neighbors, smallest


def rows(n: int, d: int = 24, seed: int = 0, unit: bool = True) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1) if unit else 3 * x + 100


def plain(
    q: torch.Tensor, r: torch.Tensor, k: int, excluded: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """float64 differences, full sort, ties to the lower index."""
    distance = (q.double()[:, None] - r.double()).square().sum(-1).sqrt().float().numpy()
    for i, several in enumerate(excluded.view(len(q), -1).tolist()):
        distance[i, [j for j in several if j >= 0]] = np.inf
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, 1), order


def check_equal(neighbours, expected):
    """Compare the bits of distances and rows with those of `plain`."""
    distance, index = expected
    assert np.array_equal(neighbours.distance.numpy(), distance)
    assert np.array_equal(neighbours.index.numpy(), index)


@pytest.mark.parametrize("unit", [True, False])
def test_same_as_sklearn(unit):
    x = rows(700, unit=unit)
    neighbours = nearest_neighbors(x, x, 9, exclude_self=True)
    distance, index = (
        NearestNeighbors(n_neighbors=10, algorithm="brute", metric="euclidean")
        .fit(x.double())
        .kneighbors()
    )
    assert torch.allclose(neighbours.distance.double(), torch.tensor(distance)[:, :9], atol=1e-5)
    assert (neighbours.index.numpy() == index[:, :9]).mean() > 0.999


@pytest.mark.parametrize("cells", [1, 997, 50_000, 1 << 24])
def test_exact_ties_and_blocks(cells, monkeypatch):
    monkeypatch.setitem(neighbors.CELLS, "cpu", cells)
    x = rows(300, seed=1)
    x[40:90] = x[40]  # fifty copies: more than k and the margin
    x[120:128] = x[40] + 1e-5 * rows(8, seed=2)  # closer than a float32 product resolves
    neighbours = nearest_neighbors(x, x, 7, exclude_self=True)
    check_equal(neighbours, plain(x, x, 7, torch.arange(300)))


def test_far_from_the_origin():
    x = rows(200, seed=3) * 1e-3 + 50
    neighbours = nearest_neighbors(x, x, 5, exclude_self=True)
    check_equal(neighbours, plain(x, x, 5, torch.arange(200)))


def test_more_references_than_a_block():
    q, r = rows(5, d=3, seed=4), rows(70_000, d=3, seed=5)
    excluded = torch.tensor([-1, 3, 69_999, -1, 65_536])
    q[excluded >= 0] = r[excluded[excluded >= 0]]
    neighbours = nearest_neighbors(q, r, 6, excluded)
    check_equal(neighbours, plain(q, r, 6, excluded))


def test_no_exclusion_finds_itself_and_all_can_be_asked_for():
    x = rows(20)
    assert torch.equal(nearest_neighbors(x, x, 1).index[:, 0], torch.arange(20))
    assert torch.equal(
        nearest_neighbors(x, x, 20).index.sort(1).values, torch.arange(20).expand(20, -1)
    )


def test_too_few_records_is_the_users_mistake():
    with pytest.raises(UserError, match="16 nearest neighbours asked for; there are 9"):
        nearest_neighbors(rows(10), rows(10), 16, exclude_self=True)


def test_pool_belongs_to_the_records():
    ids = [f"r{i}" for i in range(500)]
    chosen = {ids[i] for i in sample_rows(ids, 100, 3)}
    turned = ids[::-1]
    assert len(chosen) == 100 and chosen == {turned[i] for i in sample_rows(turned, 100, 3)}
    assert chosen != {ids[i] for i in sample_rows(ids, 100, 4)}
    assert [ids[i] for i in sample_rows(ids, 100, 3)][:50] == [
        ids[i] for i in sample_rows(ids, 50, 3)
    ]


def test_pool_keeps_poisons_below_k():
    for k, rate in ((16, 0.01), (8, 0.03), (16, 0.0001)):
        assert rate * pool_size(k, rate, 10**9) <= k / 2 + 1e-9
    assert pool_size(16, 0.01, 300) == 300 and pool_size(16, 1.0, 300) == 32


def test_several_references_can_be_left_out():
    x = rows(120, seed=6)
    excluded = torch.stack(
        [torch.arange(120), (torch.arange(120) + 60) % 120, torch.full((120,), -1)], 1
    )
    neighbours = nearest_neighbors(x, x, 5, excluded)
    check_equal(neighbours, plain(x, x, 5, excluded))
    with pytest.raises(UserError, match="119 nearest neighbours asked for; there are 118"):
        nearest_neighbors(x, x, 119, excluded)


@pytest.mark.parametrize("copies", [40, 390])
def test_copies_beyond_k_are_dropped_and_nothing_changes(copies):
    x = rows(400, seed=8)
    x[:copies] = x[0]
    x[7:9] = x[399]  # copies of another
    x[20] = -x[0]
    turn = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    x = x[turn]
    assert Index(x, 6, 1).n == 400 - max(0, copies - 3 - 7)
    neighbours = nearest_neighbors(x, x, 6, exclude_self=True)
    check_equal(neighbours, plain(x, x, 6, torch.arange(400)))


def test_all_identical():
    x = rows(1, d=8).expand(5000, -1)
    neighbours = nearest_neighbors(x, x, 9, exclude_self=True)
    assert (neighbours.distance == 0).all()
    assert neighbours.index[100].tolist() == list(range(9)) and neighbours.index[3].tolist() == [
        0,
        1,
        2,
        *range(4, 10),
    ]


def test_near_copies_are_told_apart_by_a_product_in_float64():
    """More of them than the margin, closer than float32 resolves."""
    x = rows(300, d=48, seed=1)
    x[:200] = x[0] + 1e-4 * rows(200, d=48, seed=2)
    neighbours = nearest_neighbors(x, x, 5, exclude_self=True)
    check_equal(neighbours, plain(x, x, 5, torch.arange(300)))


def test_a_block_of_queries_that_all_have_a_crowd_of_near_copies():
    x = rows(800, d=8, seed=1)
    x[:700] = x[0] + 1e-5 * rows(700, d=8, seed=2)
    neighbours = nearest_neighbors(x[:20], x, 5)
    check_equal(neighbours, plain(x[:20], x, 5, torch.full((20,), -1)))


def test_near_copies_that_float64_does_not_resolve_either():
    x = rows(900, d=8, seed=1) + 1e5
    x[:800] = x[0] + 1e-2 * torch.arange(800)[:, None] % 3
    neighbours = nearest_neighbors(x[::9].clone(), x, 5)
    check_equal(neighbours, plain(x[::9], x, 5, torch.full((100,), -1)))


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vectors_in_files(held, dtype, tmp_path, monkeypatch):
    if not held:
        monkeypatch.setattr(neighbors, "HELD", 0)
        monkeypatch.setitem(neighbors.CELLS, "cpu", 10_000)
    x = rows(600, d=12, seed=3)
    x[100:140] = x[100]
    x = x.numpy().astype(dtype)
    np.save(tmp_path / "x.npy", x)
    z = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c"))
    neighbours = nearest_neighbors(
        z, z[:500], 4, torch.arange(600).where(torch.arange(600) < 500, -1)
    )
    check_equal(
        neighbours,
        plain(
            torch.tensor(x),
            torch.tensor(x[:500]),
            4,
            torch.arange(600).where(torch.arange(600) < 500, -1),
        ),
    )


def test_less_than_float32_products_asked_for_elsewhere_do_not_matter():
    x = rows(400, d=64, seed=9)
    expected = nearest_neighbors(x, x, 5, True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            neighbours = nearest_neighbors(x, x, 5, True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(neighbours.index, expected.index) and torch.equal(
        neighbours.distance, expected.distance
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_vectors_that_are_not_finite_are_the_users_mistake(bad, side):
    both = [rows(50), rows(50, seed=1)]
    both[side][7, 3] = bad
    with pytest.raises(UserError, match="NaN or infinite vectors"):
        nearest_neighbors(*both, 3)


@pytest.mark.parametrize(("width", "count"), [(16, 16), (48, 3), (643, 40), (2048, 16), (16, 40)])
def test_the_smallest_values_of_a_tile_are_among_those_that_are_read(width, count):
    draws = torch.Generator().manual_seed(0)
    tile = torch.randint(0, 900, (40, width), generator=draws).float()  # with ties
    tile[7, :10] = torch.inf
    values, columns = smallest(tile, count)
    padded = torch.nn.functional.pad(tile, (0, 16), value=torch.inf)
    assert torch.equal(padded.gather(1, columns), values)
    assert all(len(set(row)) == len(row) for row in columns.tolist())
    count = min(count, width)
    assert torch.equal(values.sort(1).values[:, :count], tile.sort(1).values[:, :count])


@pytest.mark.parametrize("n", [40, 333, 1200])
@pytest.mark.parametrize("tile", [16 * 16, 100 * 100, 1 << 22])
def test_blocks_of_any_size(n, tile, monkeypatch):
    monkeypatch.setitem(neighbors.CELLS, "cpu", tile)
    x = rows(n, seed=n)
    x[3:6] = x[20]
    neighbours = nearest_neighbors(x, x, 7, exclude_self=True)
    check_equal(neighbours, plain(x, x, 7, torch.arange(n)))


def test_pool_of_a_column_of_ids():
    from bezoar.data.strings import Strings

    ids = [f"r{i}" for i in range(700)]
    for size in (0, 1, 300, 700, 900):
        assert np.array_equal(
            sample_rows(ids, size, 1), sample_rows(Strings.from_texts(ids), size, 1)
        ) and len(sample_rows(ids, size, 1)) == min(size, 700)
