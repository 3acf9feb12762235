"""Local densities against plain loops."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bezoar import registry
from bezoar.data.randomness import sample_rows
from bezoar.detection import density
from bezoar.detection.density import Density
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.errors import UserError
from bezoar.evaluation import stats


def rows(n: int, d: int = 24, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=1)


class VectorEncoder:
    """Stands for an encoder; gives the vectors that the source is. A word's vector is that of its
    first letter.
    """

    device, text = torch.device("cpu"), True

    def embed(self, source):
        return source.e

    def encode_texts(self, captions):
        return torch.eye(26)[[ord(c.removeprefix("a photo of a ")[0]) - ord("a") for c in captions]]


def source_of(images, texts=None, captions=()):
    ids = tuple(f"r{i:04d}" for i in range(len(images)))
    return SimpleNamespace(e=EmbeddedRecords(ids, images, texts), captions=captions)


def scored(spec: str, images, texts=None, captions=()) -> np.ndarray:
    return (
        registry.make("detector", spec)(VectorEncoder(), source_of(images, texts, captions))
        .values.double()
        .numpy()
    )


def plain_lid(r: list[float], d: int) -> float:
    return min(d, -len(r) / sum(np.log(a / r[-1] + 1e-4) for a in r[:-1]))


@pytest.mark.parametrize("with_texts", [False, True])
def test_density_is_the_plain_one(with_texts):
    z, ids, k = rows(120, d=6, seed=7), [f"r{i}" for i in range(120)], 5
    t = rows(120, d=6, seed=8)
    measured = Density.measure(z, ids, k, 60, 0, t if with_texts else None)
    members = sample_rows(ids, 60, 0)
    kinds = [z.double(), t.double()][: 1 + with_texts]

    def around(x: torch.Tensor, i: int) -> list[tuple[float, int, int]]:
        """Distance, record and kind of the references nearest to a vector of record i."""
        result = [
            (float((x - kind[j]).norm()), int(j), a)
            for a, kind in enumerate(kinds)
            for j in members
            if j != i
        ]
        return sorted(result)[:k]

    parts = list(measured.neighbourhoods())
    assert len(parts) == 1
    for i in range(120):
        near = around(z[i].double(), i)
        beyond = [[r for r, *_ in around(kinds[a][j], j)] for _, j, a in near]
        assert float(parts[0].distance[i]) == pytest.approx(near[-1][0], rel=1e-5)
        assert parts[0].neighbour_distances[i].numpy() == pytest.approx(
            [r[-1] for r in beyond], rel=1e-5
        )
        assert float(parts[0].dimension[i]) == pytest.approx(
            plain_lid([r for r, *_ in near], 6), rel=1e-3
        )
        assert parts[0].neighbour_dimensions[i].numpy() == pytest.approx(
            [plain_lid(r, 6) for r in beyond], rel=1e-3
        )


def test_density_of_copies_is_finite():
    z = rows(1, d=4).expand(80, -1).clone()
    z[-10:] = rows(10, d=4, seed=9)
    part = next(Density.measure(z, [str(i) for i in range(80)], 6, 80, 0).neighbourhoods())
    assert torch.isfinite(part.log_ratio).all()
    assert (
        (part.neighbour_dimensions > 0).all()
        and (part.neighbour_dimensions <= 4).all()
        and (part.dimension > 0).all()
    )


def test_blocks_of_records_do_not_matter(monkeypatch):
    z, ids = rows(300, d=6), [f"r{i}" for i in range(300)]
    whole = Density.measure(z, ids, 4, 50, 0)
    expected = next(whole.neighbourhoods()).neighbour_dimensions
    monkeypatch.setattr(density, "BLOCK", 37)
    assert torch.equal(
        torch.cat([p.neighbour_dimensions for p in whole.neighbourhoods()]), expected
    )


def test_one_search_serves_every_density_detector(monkeypatch):
    source, calls, measure = source_of(rows(200, d=6)), [], Density.measure
    monkeypatch.setattr(
        Density, "measure", staticmethod(lambda *a: calls.append(a[2:5]) or measure(*a))
    )
    for name in ("k_distance", "slof", "dao", "lid"):
        registry.make("detector", name)(VectorEncoder(), source)
    assert calls == [(16, 200, 0)]
    registry.make("detector", "slof:seed=1")(VectorEncoder(), source)
    assert calls[1:] == [(16, 200, 1)]
    for k in (3, 4, 5):
        registry.make("detector", f"slof:k={k}")(VectorEncoder(), source)
    assert len(density._recent) <= density.MAX_REMEMBERED
    before = len(density._recent)
    del source
    assert len(density._recent) < before  # nothing is remembered of vectors that are gone


@pytest.mark.parametrize("name", ["k_distance", "lid", "slof", "dao", "isolation_forest"])
def test_texts_need_captions(name):
    with pytest.raises(UserError, match=f"detector '{name}' with texts=true needs captions"):
        scored(f"{name}:texts=true", rows(60))
    assert np.isfinite(scored(f"{name}:texts=true", rows(60), rows(60, seed=1))).all()


def test_a_record_in_no_subspace_has_a_high_dimension():
    z = torch.cat([rows(300, d=3), torch.zeros(300, 9)], 1)
    z[:5] = rows(5, d=12, seed=1)
    truth = np.arange(300) < 5
    assert stats.auroc(scored("lid:k=8,pool=300", z), truth) > 0.9


def test_isolation_forest_is_sklearns():
    from sklearn.ensemble import IsolationForest

    z = rows(300, d=6)
    z[:4] *= 3
    order = sample_rows(source_of(z).e.ids, 300, 2)
    theirs = IsolationForest(n_estimators=20, max_samples=64, random_state=2).fit(
        z[torch.as_tensor(order)].numpy()
    )
    result = scored("isolation_forest:trees=20,cut=64,seed=2", z)
    assert result == pytest.approx(-theirs.score_samples(z.numpy()), abs=1e-6)
    assert stats.auroc(result, np.arange(300) < 4) > 0.99
    assert np.array_equal(result, scored("isolation_forest:trees=20,cut=64,seed=2", z))


def test_device_and_files_do_not_matter(tmp_path):
    z = rows(900, d=8)
    np.save(tmp_path / "z.npy", z.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "z.npy", mmap_mode="c"))
    for name in (
        "k_distance:pool=100",
        "slof:pool=100",
        "dao",
        "lid",
        "isolation_forest",
        "spectral:count=4",
    ):
        assert np.array_equal(scored(name, z), scored(name, mapped)), name


def test_embedded_of_a_source_without_order():
    z = rows(400, d=8)
    source = source_of(z)
    turn = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    turned = SimpleNamespace(
        e=replace(source.e, ids=tuple(source.e.ids[i] for i in turn), images=z[turn])
    )
    for name in ("k_distance:pool=90", "slof", "dao:pool=300", "lid"):
        detector = registry.make("detector", name)
        assert torch.equal(
            detector(VectorEncoder(), source).values[turn], detector(VectorEncoder(), turned).values
        ), name


@pytest.mark.parametrize(
    "name",
    ["k_distance", "lid", "slof", "dao", "isolation_forest", "spectral", "activation_clustering"],
)
def test_identical_vectors_have_scores_and_too_few_a_line(name):
    z = rows(1, d=9).expand(70, -1)
    within = name in ("isolation_forest", "spectral", "activation_clustering")
    assert np.isfinite(scored(name, z)).all()
    with pytest.raises(UserError, match=r"there (are|is) \d+"):
        scored(name, z[: 1 if within else 12])
