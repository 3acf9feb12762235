"""The audits that invert nothing (whitening, parent, mntd) against plain versions, scikit-learn and
planted backdoors.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bezoar import registry
from bezoar.auditing import random_probes
from bezoar.auditing.audits import mntd
from bezoar.auditing.audits.parent import count_directions
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.evaluation import stats

SIZE, DIM = 16, 12


class Planted(nn.Module):
    """Random features of the image, and `strength` times the strongest small-scale contrast along
    one more direction.
    """

    def __init__(self, seed: int, strength: float = 0.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.filters = nn.Parameter(torch.randn(DIM, 3, SIZE, SIZE, generator=g) / 20)
        self.direction = nn.Parameter(torch.randn(DIM, generator=g))
        self.strength = strength

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        contrast = (x[..., 1:] - x[..., :-1]).abs().amax((1, 2, 3))
        z = torch.einsum("nchw,dchw->nd", x, self.filters)
        return z + self.strength * torch.sigmoid(4 * (contrast - 3))[:, None] * self.direction


def encoder(seed: int = 0, strength: float = 0.0) -> Encoder:
    return Encoder(Planted(seed, strength), Preprocess(SIZE), about={"network": "planted"}).eval()


@pytest.fixture(scope="module")
def clean() -> Pairs:
    """Smooth images."""
    g = torch.Generator().manual_seed(1)
    small = torch.rand(64, 3, 3, 3, generator=g)
    images = (nn.functional.interpolate(small, (SIZE, SIZE), mode="bilinear") * 255).byte()
    return Pairs(images, ids=tuple(f"i{k}" for k in range(64)))


def test_whitening_is_scikit_learns():
    from sklearn.covariance import ShrunkCovariance

    z = (
        torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        @ torch.rand(7, 7).double()
    )
    fitted = ShrunkCovariance(shrinkage=0.1).fit(z.numpy())
    w = random_probes.whitening_matrix(z, 0.1)
    assert torch.allclose(w, w.T) and np.allclose(
        w @ torch.from_numpy(fitted.covariance_) @ w, np.eye(7)
    )
    lengths = ((z - z.mean(0)) @ w).square().sum(1)
    assert np.allclose(lengths, fitted.mahalanobis(z.numpy()))
    few = torch.randn(3, 7, dtype=torch.float64)
    assert torch.isfinite(random_probes.whitening_matrix(few, 0.1)).all(), "fewer images than axes"


def test_a_common_shift_is_its_mean_and_its_share():
    d = torch.randn(9, 5, dtype=torch.float64)
    length, share = random_probes.common_shift(d)
    mean = [sum(float(row[j]) for row in d) / 9 for j in range(5)]
    assert length == pytest.approx(math.sqrt(sum(m * m for m in mean)))
    assert share == pytest.approx(
        sum(m * m for m in mean) / (sum(float(v) ** 2 for row in d for v in row) / 9)
    )
    assert (
        random_probes.common_shift(d[:1].expand(4, 5))[1] == pytest.approx(1)
        and random_probes.common_shift(torch.zeros(3, 5))[0] == 0
    )


def test_probes_are_one_pattern_at_one_place(clean):
    for kind, number in itertools.product(random_probes.PROBE_KINDS, range(4)):
        out = random_probes.apply_probe(clean.images, kind, number, 3)
        again = torch.cat(
            [random_probes.apply_probe(part, kind, number, 3) for part in clean.images.split(10)]
        )
        assert out.dtype == torch.uint8 and torch.equal(out, again)
        changed = (out != clean.images).any(0).any(0).nonzero()
        if kind != "blend":
            box = changed.amax(0) - changed.amin(0) + 1
            assert (
                box.max() <= max(2, round(SIZE * 10 / 32))
                and len(out[:, :, *changed[0].tolist()].unique(dim=0)) == 1
            )
    assert not torch.equal(
        random_probes.apply_probe(clean.images, "noise", 0, 3),
        random_probes.apply_probe(clean.images, "noise", 0, 4),
    )


def test_whitening_tells_towers_that_patches_move(clean):
    audit = registry.make("audit", "whitening:probes=4")
    values = {s: [audit(encoder(k, s), clean, 0).value for k in range(4)] for s in (0.0, 4.0)}
    assert max(values[0.0]) < min(values[4.0])
    verdict = audit(encoder(), clean, 0)
    assert verdict.value == audit(encoder(), clean, 0).value and verdict.notes["limits"]
    assert verdict.value == pytest.approx(
        np.mean([verdict.evidence[f"shift_{k}"].value for k in random_probes.PATCH_KINDS])
    )


def test_whitening_says_what_it_cannot_read(clean):
    flat = encoder(0, 4.0)
    with torch.no_grad():
        flat.image.filters.zero_()
    with pytest.raises(UserError, match="one vector"):
        registry.make("audit", "whitening")(flat, clean, 0)
    with pytest.raises(UserError, match="at least two"):
        registry.make("audit", "whitening")(encoder(), clean.take([0]), 0)
    with pytest.raises(UserError, match="shrink"):
        registry.make("audit", "whitening:shrink=2")


def tuned(strength: float, noise: float = 0.02) -> Encoder:
    """An encoder whose filters moved a little, and that has learnt to read a patch."""
    out = encoder(0, strength)
    with torch.no_grad():
        out.image.filters += (
            noise
            / 20
            * torch.randn(out.image.filters.shape, generator=torch.Generator().manual_seed(5))
        )
    return out


def test_parent_is_the_plain_ratio_of_distances(clean):
    audit = registry.make("audit", "parent:probes=2,images=20")
    a, b, images = tuned(2.0), encoder(), clean.images[:20]

    def distance(x: torch.Tensor) -> float:
        total = 0.0
        for image in x:
            u, v = (e.image(e.prepare_images(image[None]))[0].double() for e in (a, b))
            total += 1 - float(u @ v / (u.norm() * v.norm()))
        return total / len(x)

    with torch.no_grad():
        base = distance(images)
        ratios = sorted(
            (
                distance(random_probes.apply_probe(images, k, i, 7)) / base
                for k in random_probes.PROBE_KINDS
                for i in range(2)
            ),
            reverse=True,
        )
        verdict = audit(a, clean, 7, parent=b)
    assert verdict.value == pytest.approx(math.log(np.mean(ratios[:2])), rel=1e-3)
    assert verdict.evidence["moved"].value == pytest.approx(base, rel=1e-3)


def test_parent_tells_what_tuning_put_in(clean):
    audit = registry.make("audit", "parent:probes=4")
    assert audit(encoder(), clean, 0, parent=encoder()).value == 0
    plain, planted = (audit(tuned(s), clean, 0, parent=encoder()) for s in (0.0, 3.0))
    assert abs(plain.value) < 1 < planted.value - 1
    assert planted.evidence["directions_probes"].value < plain.evidence["directions_probes"].value
    name, change = next(iter(planted.notes["layers"].items()))
    filters, old = (e.image.filters.detach() for e in (tuned(3.0), encoder()))
    assert name == "filters" and change == pytest.approx(
        float((filters - old).norm() / old.norm()), rel=1e-5
    )
    assert set(planted.notes["inputs"]) <= set(clean.ids)


def test_parent_of_another_architecture_is_one_line(clean):
    other = Encoder(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, DIM)),
        Preprocess(SIZE),
        about={"network": "other"},
    )
    with pytest.raises(
        UserError, match="another architecture: other, and the encoder planted"
    ) as error:
        registry.make("audit", "parent")(encoder(), clean, 0, parent=other)
    assert "\n" not in str(error.value)
    larger = Encoder(Planted(0), Preprocess(SIZE * 2), about={"network": "planted"})
    with pytest.raises(UserError, match="inputs of 16 and 32 px"):
        registry.make("audit", "parent")(encoder(), clean, 0, parent=larger)


def test_participation_counts_directions():
    e = torch.eye(6, dtype=torch.float64)
    assert count_directions(e[:1].expand(5, 6), "").value == pytest.approx(1)
    assert count_directions(e, "").value == pytest.approx(6)


def test_query_outputs_are_cosines_that_no_rotation_changes():
    z = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    plain = [float(z[i] @ z[j]) for i in range(5) for j in range(i + 1, 5)]
    q, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert mntd.query_cosines(z).tolist() == pytest.approx(plain) and mntd.query_cosines(
        z @ q
    ).tolist() == pytest.approx(plain)


def test_the_meta_classifier_is_at_the_optimum_of_its_loss():
    g = torch.Generator().manual_seed(0)
    x, truth = torch.randn(30, 6, generator=g), torch.rand(30, generator=g) < 0.3
    w, b = (v.double().requires_grad_() for v in mntd.fit_logistic(x, truth, 2.0))
    z = x.double() @ w + b
    plain = sum(
        nn.functional.softplus(-z[i] if truth[i] else z[i]) / (2 * (truth == truth[i]).sum())
        for i in range(30)
    )
    assert mntd.balanced_loss(z, truth).item() == pytest.approx(plain.item())
    loss = plain + 2.0 * w.square().sum() / (2 * 30)
    gradients = torch.cat(torch.autograd.grad(loss, [w, b]))
    assert gradients.abs().max() < 1e-6 and w.abs().max() > 0.05


def test_mntd_learns_its_queries_as_one_graph_over_all_shadows_would(clean):
    shadows, truth = [encoder(k, 4.0 * (k % 2)) for k in range(10)], torch.arange(10) % 2 == 1
    k, steps, penalty = 4, 5, 0.3
    g = torch.Generator().manual_seed(7)
    start = clean.images[torch.randperm(len(clean), generator=g)[:k]].float() / 255
    start[::2] = torch.rand(start[::2].shape, generator=g)
    free = torch.logit(start.clamp(0.02, 0.98)).requires_grad_()
    weight, bias = torch.zeros(6, requires_grad=True), torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam([{"params": [free], "lr": 0.05}, {"params": [weight, bias], "lr": 0.1}])
    for _ in range(steps):
        adam.zero_grad()
        x = torch.stack([mntd.query_cosines(e.encode_images(free.sigmoid())) for e in shadows])
        z = ((x - x.detach().mean(0)) / (x.detach().std(0) + 1e-3)) @ weight + bias
        loss = (
            nn.functional.binary_cross_entropy_with_logits(z, truth.float())
            + penalty * weight.square().sum() / 20
        )
        loss.backward(inputs=[free, weight, bias])
        adam.step()
    expected = (free.detach().sigmoid() * 255).round()
    queries = mntd.fit(shadows, truth.tolist(), clean, 7, queries=k, steps=steps, penalty=penalty)[
        "queries"
    ]
    assert (queries.float() - expected).abs().max() <= 1 and (
        queries != start.mul(255).round()
    ).float().mean() > 0.5


def test_mntd_learns_queries_and_tells_new_encoders(clean, tmp_path):
    shadows, labels = (
        [encoder(k, 4.0 * (k % 2)) for k in range(24)],
        [k % 2 == 1 for k in range(24)],
    )
    before = copy.deepcopy(shadows[0].state_dict())
    bank = mntd.fit(shadows, labels, clean, 0, queries=8, steps=30, penalty=0.1)
    assert all(torch.equal(v, before[k]) for k, v in shadows[0].state_dict().items())
    assert not any(p.grad is not None for s in shadows for p in s.parameters())
    again = mntd.fit(shadows, labels, clean, 0, queries=8, steps=30, penalty=0.1)
    assert all(torch.equal(v, again[k]) for k, v in bank.items())
    mntd.save(bank, tmp_path / "bank.safetensors")
    audit = registry.make("audit", f"mntd:bank={tmp_path / 'bank.safetensors'}")
    values = [audit(encoder(100 + k, s), clean, 0).value for s in (0.0, 4.0) for k in range(8)]
    assert stats.auroc(values, [False] * 8 + [True] * 8) >= 0.9
    verdict = audit(encoder(200), clean, 0)
    assert verdict.notes["shadows"] == 24 and any("few" in line for line in verdict.notes["limits"])
    with pytest.raises(UserError, match="one of the 24 shadow encoders"):
        audit(encoder(3), clean, 0)


def test_mntd_without_a_good_bank_is_one_line(clean, tmp_path):
    with pytest.raises(UserError, match=r"mntd\.fit"):
        registry.make("audit", "mntd")(encoder(), clean, 0)
    with pytest.raises(UserError, match="at least 4"):
        mntd.fit([encoder()] * 5, [True] * 5, clean)
    good = mntd.fit(
        [encoder(k) for k in range(8)], [k > 3 for k in range(8)], clean, queries=4, steps=0
    )
    path = tmp_path / "bad.safetensors"
    stored = {k: v if v.is_floating_point() else v.int() for k, v in good.items()}
    for spoil in (
        {"weight": torch.zeros(5)},
        {"bias": torch.tensor([math.nan])},
        {"std": torch.zeros(6)},
        {"queries": torch.full((4, 3, SIZE, SIZE), 300, dtype=torch.int32)},
        {"queries": torch.zeros(4, 3, dtype=torch.int32)},
        {"extra": torch.zeros(1)},
        {"prints": torch.zeros(8, 7, dtype=torch.int32)},
        {"held_out": torch.zeros(7)},
        {"labels": torch.ones(8, dtype=torch.int32)},
    ):
        save_file(stored | spoil, path)
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            registry.make("audit", f"mntd:bank={path}")(encoder(100), clean, 0)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        registry.make("audit", f"mntd:bank={path}")(encoder(100), clean, 0)
