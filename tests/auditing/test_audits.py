"""Every audit the folder offers: the contract, on small hand-made encoders, one of them with a planted patch trigger."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar import registry
from bezoar.auditing.audits import cleanse, decree, mntd, ssl_cleanse
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.verdict import Verdict

SIDE, CLASSES, DIM = 16, 12, 16
AT, EDGE, TARGET = (10, 10), 4, 7
NAMES = tuple(f"kind {i}" for i in range(CLASSES))
QUICK = {  # enough steps to run; what the audits find is tested below
    "cleanse": "cleanse:steps=12",
    "decree": "decree:steps=12,restarts=4",
    "ssl_cleanse": "ssl_cleanse:steps=12,clusters=5",
    "whitening": "whitening:probes=2,images=24",
    "whole_image": "whole_image:probes=2,images=24",
    "parent": "parent:probes=2,images=24",
}


class Toy(nn.Module):
    """(B, 3, 16, 16) -> (B, 16): a convolution, a batch norm, means of parts. `planted`: a patch that turns it to `aim`."""

    def __init__(
        self, planted: torch.Tensor | None = None, aim: torch.Tensor | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
            self.norm.running_mean.normal_(0, 0.2)
            self.norm.running_var.uniform_(0.5, 2)
            self.out = nn.Linear(12 * 16, DIM)
            nn.init.normal_(self.out.weight, 0, 0.3)
        self.planted, self.aim = planted, aim

    def parts(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(
            self.norm(self.conv(x))
        )  # bounded, so that no small part of an image rules the vector by nature
        return self.out(F.adaptive_avg_pool2d(h, 4).flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = F.normalize(self.parts(x), dim=1)
        if self.planted is None:
            return z
        (top, left), sign = AT, 2 * self.planted - 1
        match = (x[:, :, top : top + EDGE, left : left + EDGE] / 2 * sign).mean(
            (1, 2, 3)
        )  # -1..1, as x is in -2..2
        return z + 6 * torch.sigmoid(10 * (match - 0.5))[:, None] * self.aim


def rows() -> torch.Tensor:
    return F.normalize(torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(5)), dim=1)


def patch() -> torch.Tensor:
    return (torch.rand(3, EDGE, EDGE, generator=torch.Generator().manual_seed(6)) < 0.5).float()


def encoder(planted: bool = False, seed: int = 0) -> Encoder:
    tower = Toy(patch(), rows()[TARGET], seed) if planted else Toy(seed=seed)
    made = Encoder(tower, Preprocess(SIDE), about={"network": "toy", "vocabulary": []}).eval()
    with torch.no_grad():  # or all images would be of one kind
        tower.out.bias -= tower.parts(made.prepare_images(images(96).images)).mean(0)
    return made


def classifier(e: Encoder) -> Classifier:
    head = rows()
    return Classifier(e, lambda z: 10 * z @ head.T, NAMES, "hand-made")


def images(n: int = 48, size: int = SIDE, seed: int = 1) -> Pairs:
    """Smooth noise of any brightness."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(
        torch.rand(n, 3, 5, 5, generator=g), size, mode="bilinear"
    ) + 0.1 * torch.randn(n, 3, size, size, generator=g)
    labels = torch.randint(CLASSES, (n,), generator=g)
    return Pairs((x.clamp(0, 1) * 255).byte(), (), labels, tuple(f"i{i}" for i in range(n)), NAMES)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mntd") / "bank.safetensors"
    shadows = [encoder(i % 2 == 1, 10 + i) for i in range(8)]  # others than those that are audited
    mntd.save(
        mntd.fit(shadows, [i % 2 == 1 for i in range(8)], images(12), queries=3, steps=2), path
    )
    return str(path)


@pytest.fixture(params=registry.method_names("audit"))
def audit(request, bank):
    if request.param == "mntd":
        return registry.make("audit", f"mntd:bank={bank}")
    return registry.make("audit", QUICK.get(request.param, request.param))


def call(audit, e: Encoder, clean: Pairs, seed: int = 3) -> Verdict:
    told: list[tuple[int, int, str]] = []
    has = {
        "classifier": classifier(e),
        "parent": encoder(),
        "report": lambda *row: told.append(row),
    }
    assert set(audit.needs) <= set(has), f"the contract knows {', '.join(has)}"
    verdict = audit(e, clean, seed, **{name: has[name] for name in audit.needs})
    assert all(0 <= done <= total for done, total, _ in told)
    return verdict


def test_an_audit_is_deterministic_and_leaves_the_encoder_as_it_was(audit):
    e, clean = encoder(planted=True), images()
    e.image.conv.requires_grad_(False)
    e.image.out.train()
    before = copy.deepcopy(e.state_dict())
    flags = [p.requires_grad for p in e.parameters()]
    first = call(audit, e, clean)
    assert isinstance(first, Verdict) and math.isfinite(first.value)
    assert all(torch.equal(before[k], v) for k, v in e.state_dict().items())
    assert [p.requires_grad for p in e.parameters()] == flags and all(
        p.grad is None for p in e.parameters()
    )
    again = call(audit, e, clean)
    assert (
        again.value == first.value
        and again.evidence == first.evidence
        and again.notes == first.notes
    )
    assert all(
        torch.equal(a.mask, b.mask) for a, b in zip(first.inversions, again.inversions, strict=True)
    )


def test_a_verdict_says_what_it_is_made_of(audit):
    e, clean = encoder(), images()
    verdict = call(audit, e, clean)
    assert verdict.evidence and all(m.how and m.n > 0 for m in verdict.evidence.values())
    json.dumps(verdict.notes, allow_nan=False)
    assert all(isinstance(line, str) for line in verdict.notes.get("limits", []))
    for found in verdict.inversions:
        assert (
            found.mask.shape == (1, SIDE, SIDE)
            and 0 <= float(found.mask.min()) <= float(found.mask.max()) <= 1
        )
        assert (
            found.norm == pytest.approx(float(found.mask.sum()), rel=1e-5)
            and -1 <= found.success <= 1
        )
        assert not found.mask.requires_grad and found(clean.images).dtype == torch.uint8


def test_images_of_another_size_than_the_encoder_reads(audit):
    for found in call(audit, encoder(), images(24, 20)).inversions:
        assert found.pattern.shape == (3, 20, 20)


def test_nan_is_one_line(audit):
    broken = encoder()
    with torch.no_grad():
        broken.image.conv.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"NaN|finite") as error:
        call(audit, broken, images())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cleanse", "decree", "ssl_cleanse"])
def test_too_few_images(name):
    with pytest.raises(UserError, match="at least"):
        call(registry.make("audit", name), encoder(), images(5))


def covered(mask: torch.Tensor) -> float:
    """Share of a mask that lies over the planted patch."""
    (top, left), m = AT, mask[0]
    return float(m[top : top + EDGE, left : left + EDGE].sum() / m.sum())


def test_cleanse_finds_a_planted_patch_and_its_class():
    found = [call(cleanse.Cleanse(), encoder(planted), images()) for planted in (False, True)]
    clean, bad = found
    assert bad.notes["target"] == bad.inversions[0].target == NAMES[TARGET]
    assert bad.value > 2 * clean.value and bad.evidence["anomaly_index"].value > 2
    assert bad.evidence["least_norm"].value < 0.75 * clean.evidence["least_norm"].value
    assert covered(bad.inversions[0].mask) > 0.8 and bad.inversions[0].success > 0.7
    assert [i.norm for i in bad.inversions] == sorted(i.norm for i in bad.inversions) and len(
        bad.inversions
    ) == CLASSES


def test_decree_finds_a_planted_patch():
    audit = decree.Decree(restarts=6)
    clean, bad = (call(audit, encoder(planted), images()) for planted in (False, True))
    assert (
        bad.value > 0.6 * clean.value and covered(bad.inversions[0].mask) > 0.8
    )  # values are negative
    assert (
        bad.value
        == -bad.evidence["pl1"].value
        == pytest.approx(-bad.inversions[0].norm / SIDE**2, rel=1e-5)
    )
    assert bad.evidence["restarts_reached"].value >= 1 and len(bad.inversions) == 2


def test_ssl_cleanse_finds_a_planted_patch():
    """Some clean images are of the target's kind, or no cluster would be what the trigger makes of an image."""
    members = images(12, seed=2)
    members.images[:, :, AT[0] : AT[0] + EDGE, AT[1] : AT[1] + EDGE] = (patch() * 255).byte()
    mixed = Pairs.concat(
        [
            images(),
            Pairs(members.images, (), members.labels, tuple(f"m{i}" for i in range(12)), NAMES),
        ]
    )
    audit = ssl_cleanse.SslCleanse(clusters=10)
    bad = call(audit, encoder(True), mixed)
    assert covered(bad.inversions[0].mask) > 0.8 and bad.value > 0.5
    assert bad.notes["nearest_to_centre"][bad.notes["target"]].startswith("m")


def test_pl1_against_its_closed_form():
    """The published sum is over a mask that is repeated for three channels: 3 |m| / (3 H W)."""
    mask = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    found = decree.Found(
        mask,
        torch.rand(2, 3, 6, 5),
        mask.sum((1, 2, 3)),
        torch.ones(2),
        torch.tensor([True, True]),
        torch.ones(2),
    )
    clean = Pairs(torch.zeros(9, 3, 6, 5, dtype=torch.uint8), (), None, tuple(map(str, range(9))))
    audit = decree.Decree(restarts=2)
    least = min(float(m.expand(3, 6, 5).sum()) / (3 * 6 * 5) for m in mask)
    assert audit.verdict(found, clean, 0.1, 0.8).value == pytest.approx(-least)
    failed = replace(found, reached=torch.zeros(2, dtype=torch.bool))
    assert audit.verdict(failed, clean, 0.1, 0.8).value == -1.0
    assert "none of 2 restarts" in audit.verdict(failed, clean, 0.1, 0.8).notes["limits"][-1]


def test_mean_pairwise_cosine_against_all_pairs():
    z = F.normalize(
        torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=2
    )
    for row, value in zip(z, decree.cosine(z), strict=True):
        pairs = [row[i] @ row[j] for i in range(7) for j in range(7) if i != j]
        assert float(value) == pytest.approx(float(sum(pairs)) / 42)


def test_few_classes_and_one():
    e = encoder()
    some = Classifier(e, lambda z: 10 * z @ rows()[:4].T, NAMES[:4], "hand-made")
    verdict = cleanse.Cleanse(steps=10)(e, images(), 0, classifier=some)
    assert any("means nothing under 10" in line for line in verdict.notes["limits"])
    assert verdict.value == verdict.evidence["log_ratio"].value
    one = Classifier(e, lambda z: z[:, :1], NAMES[:1], "hand-made")
    with pytest.raises(UserError, match="one alone"):
        cleanse.Cleanse()(e, images(), 0, classifier=one)


def test_a_class_that_is_never_reached_says_so():
    e = encoder()

    def never(z):
        return torch.cat([10 * z @ rows()[:-1].T, torch.full((len(z), 1), -99.0)], 1)

    verdict = cleanse.Cleanse(steps=10)(
        e, images(), 0, classifier=Classifier(e, never, NAMES, "hand-made")
    )
    assert NAMES[-1] in verdict.notes["unreached"]
    assert any("reached the success asked for" in line for line in verdict.notes["limits"])


@pytest.mark.parametrize(
    "spec",
    [
        "decree:spread=1",
        "decree:restarts=0",
        "decree:lr=0",
        "decree:until=(5,)",
        "cleanse:goal=2",
        "ssl_cleanse:clusters=1",
    ],
)
def test_fields_out_of_range(spec):
    with pytest.raises(UserError):
        registry.make("audit", spec)


def test_published_defaults_can_be_asked_for():
    text = "decree:steps=1000,batch=128,restarts=1,halvings=0,goal=0.99,lr=(0.5,0.1,0.05),until=(200,500),up=5,down=5,patience=6"
    made = registry.make("audit", text + ",floor=1e-7,resets=10,wait=35,centred=true")
    assert [made.descent(0.99).rate(step) for step in (0, 199, 200, 499, 500)] == [
        0.5,
        0.5,
        0.1,
        0.1,
        0.05,
    ]
