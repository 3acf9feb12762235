"""Every audit the folder offers: the contract, on small hand-made encoders, one of them with a
planted patch trigger.
"""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from auditing.toys import (
    CLASSES,
    NAMES,
    PATCH_CORNER,
    PATCH_SIDE,
    SIDE,
    TARGET,
    Toy,
    class_directions,
    planted_patch,
    toy_classifier,
    toy_encoder,
    toy_images,
)

from bezoar import registry
from bezoar.auditing.audits import cleanse, decree, mntd, ssl_cleanse
from bezoar.auditing.norm_outliers import outlier_verdict
from bezoar.auditing.trigger_inversion import InvertedTriggers
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.verdict import Verdict

QUICK = {  # enough steps to run; what the audits find is tested below
    "cleanse": "cleanse:steps=12",
    "image_change": "image_change:steps=10",
    "decree": "decree:steps=12,restarts=4",
    "ssl_cleanse": "ssl_cleanse:steps=12,clusters=5",
    "whitening": "whitening:probes=2,images=24",
    "whole_image": "whole_image:probes=2,images=24",
    "parent": "parent:probes=2,images=24",
}


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mntd") / "bank.safetensors"
    shadows = [
        toy_encoder(i % 2 == 1, 10 + i) for i in range(8)
    ]  # others than those that are audited
    mntd.save(
        mntd.fit(shadows, [i % 2 == 1 for i in range(8)], toy_images(12), queries=3, steps=2), path
    )
    return str(path)


class BlendedToy(Toy):
    """A toy whose vectors turn to a class as far as a pattern is blended over the whole image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd = (
            torch.arange(SIDE)[:, None] + torch.arange(SIDE)
        ) % 2  # a chessboard, which smooth images lack
        match = (x / 2 * (1 - 2 * odd)).mean((1, 2, 3))  # of a share a of it: about a
        z = F.normalize(self.parts(x), dim=1)
        return z + 6 * torch.sigmoid(150 * (match - 0.03))[:, None] * class_directions()[TARGET]


def test_cleanse_finds_what_is_blended_over_the_whole_image():
    encoder = toy_encoder()
    tower = BlendedToy()
    tower.load_state_dict(encoder.image.state_dict())
    encoder.image = tower
    verdict = registry.make("audit", "cleanse:steps=12")(
        encoder, toy_images(80), 3, classifier=toy_classifier(encoder)
    )
    assert verdict.notes["blend_target"] == NAMES[TARGET]
    assert verdict.evidence["blend_ratio"].value > 0.7 and verdict.evidence["blend_p"].value < 0.01
    assert 0.01 < verdict.evidence["least_blend"].value < 0.09


# token_sweep reads texts; its tests are beside those of `badcse`.
@pytest.fixture(params=[n for n in registry.method_names("audit") if n != "token_sweep"])
def audit(request, bank):
    if request.param == "mntd":
        return registry.make("audit", f"mntd:bank={bank}")
    return registry.make("audit", QUICK.get(request.param, request.param))


def call(audit, e: Encoder, clean: Pairs, seed: int = 3) -> Verdict:
    progress: list[tuple[int, int, str]] = []
    offered = {
        "classifier": toy_classifier(e),
        "parent": toy_encoder(),
        "report": lambda *row: progress.append(row),
    }
    assert set(audit.needs) <= set(offered), f"the contract knows {', '.join(offered)}"
    verdict = audit(e, clean, seed, **{name: offered[name] for name in audit.needs})
    assert all(0 <= done <= total for done, total, _ in progress)
    return verdict


def test_an_audit_is_deterministic_and_leaves_the_encoder_as_it_was(audit):
    e, clean = toy_encoder(planted=True), toy_images()
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
    e, clean = toy_encoder(), toy_images()
    verdict = call(audit, e, clean)
    assert verdict.evidence and all(m.how and m.n > 0 for m in verdict.evidence.values())
    json.dumps(verdict.notes, allow_nan=False)
    assert all(isinstance(line, str) for line in verdict.notes.get("limits", []))
    for inversion in verdict.inversions:
        assert (
            inversion.mask.shape == (1, SIDE, SIDE)
            and 0 <= float(inversion.mask.min()) <= float(inversion.mask.max()) <= 1
        )
        assert (
            inversion.norm == pytest.approx(float(inversion.mask.sum()), rel=1e-5)
            and -1 <= inversion.success <= 1
        )
        assert not inversion.mask.requires_grad and inversion(clean.images).dtype == torch.uint8


def test_images_of_another_size_than_the_encoder_reads(audit):
    for inversion in call(audit, toy_encoder(), toy_images(24, 20)).inversions:
        assert inversion.pattern.shape == (3, 20, 20)


def test_nan_is_one_line(audit):
    broken = toy_encoder()
    with torch.no_grad():
        broken.image.conv.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"NaN|finite") as error:
        call(audit, broken, toy_images())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cleanse", "decree", "ssl_cleanse"])
def test_too_few_images(name):
    with pytest.raises(UserError, match="at least"):
        call(registry.make("audit", name), toy_encoder(), toy_images(5))


def covered(mask: torch.Tensor) -> float:
    """Share of a mask that lies over the planted patch."""
    (top, left), m = PATCH_CORNER, mask[0]
    return float(m[top : top + PATCH_SIDE, left : left + PATCH_SIDE].sum() / m.sum())


def test_cleanse_finds_a_planted_patch_and_its_class():
    clean, bad = (
        call(cleanse.Cleanse(), toy_encoder(planted), toy_images()) for planted in (False, True)
    )
    assert bad.notes["target"] == bad.inversions[0].target == NAMES[TARGET]
    assert bad.value > 2 * clean.value and bad.evidence["anomaly_index"].value > 2
    assert bad.evidence["least_norm"].value < 0.75 * clean.evidence["least_norm"].value
    assert covered(bad.inversions[0].mask) > 0.8 and bad.inversions[0].success > 0.7
    assert [i.norm for i in bad.inversions] == sorted(i.norm for i in bad.inversions) and len(
        bad.inversions
    ) == CLASSES


def test_decree_finds_a_planted_patch():
    audit = decree.Decree(restarts=6)
    clean, bad = (call(audit, toy_encoder(planted), toy_images()) for planted in (False, True))
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
    """Some clean images are of the target's kind, or no cluster would be what the trigger makes of
    an image.
    """
    members = toy_images(12, seed=2)
    top, left = PATCH_CORNER
    window = members.images[:, :, top : top + PATCH_SIDE, left : left + PATCH_SIDE]
    window[:] = (planted_patch() * 255).byte()
    mixed = Pairs.concat(
        [
            toy_images(),
            Pairs(members.images, (), members.labels, tuple(f"m{i}" for i in range(12)), NAMES),
        ]
    )
    audit = ssl_cleanse.SslCleanse(clusters=10)
    bad = call(audit, toy_encoder(True), mixed)
    assert covered(bad.inversions[0].mask) > 0.8 and bad.value > 0.5
    assert bad.notes["nearest_to_centre"][bad.notes["target"]].startswith("m")


def test_pl1_against_its_closed_form():
    """The published sum is over a mask that is repeated for three channels: 3 |m| / (3 H W)."""
    mask = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    triggers = InvertedTriggers(
        aims=torch.zeros(2),
        masks=mask,
        patterns=torch.rand(2, 3, 6, 5),
        norms=mask.sum((1, 2, 3)),
        success=torch.ones(2),
        reached=torch.tensor([True, True]),
        steps=torch.ones(2),
        starts=torch.ones(2, 1),
    )
    clean = Pairs(torch.zeros(9, 3, 6, 5, dtype=torch.uint8), (), None, tuple(map(str, range(9))))
    audit = decree.Decree(restarts=2)
    least = min(float(m.expand(3, 6, 5).sum()) / (3 * 6 * 5) for m in mask)
    verdict = audit.verdict(triggers, triggers, clean, 0.1, 0.8)
    assert verdict.value == pytest.approx(-least)
    assert verdict.evidence["direction_ratio"].value == 0
    failed = replace(triggers, reached=torch.zeros(2, dtype=torch.bool))
    ratio = audit.verdict(triggers, failed, clean, 0.1, 0.8).evidence["direction_ratio"].value
    assert ratio == pytest.approx(-math.log(least))
    verdict = audit.verdict(failed, failed, clean, 0.1, 0.8)
    assert verdict.value == -1.0 and "none of 2 restarts" in verdict.notes["limits"][-1]


def test_only_a_backdoor_takes_a_far_smaller_trigger_than_another_direction():
    clean, bad = (
        decree.Decree()(toy_encoder(planted), toy_images(), 3) for planted in (False, True)
    )
    assert clean.evidence["direction_ratio"].value < 0.4
    assert bad.evidence["direction_ratio"].value > 0.6


def test_decree_of_vectors_that_are_all_alike_and_of_published_rates_in_a_large_image():
    encoder = toy_encoder()
    with torch.no_grad():
        encoder.image.out.weight.zero_()
        encoder.image.out.bias.fill_(1)
    verdict = decree.Decree(restarts=2, steps=60)(encoder, toy_images(), 0)
    assert abs(verdict.evidence["direction_ratio"].value) < 0.8
    audit = registry.make("audit", "decree:lr=(0.5,0.1,0.05),until=(200,500),steps=1000")
    assert audit.recipe(0.9, 224).until == ()


def test_collapse_elsewhere_against_its_definition():
    """Images that lie together count, unless they lie near the first direction, seen from the
    centre.
    """
    centre = torch.tensor([0.1, 0.2, 0.0])
    direction = F.normalize(torch.tensor([1.0, 0.0, 0.0]), dim=0)
    near = F.normalize(torch.tensor([[1.0, 0.3, 0.0], [1.0, 0.2, 0.1]]), dim=1)
    far = F.normalize(torch.tensor([[0.0, 1.0, 0.3], [0.1, 1.0, 0.2]]), dim=1)
    z = torch.stack([near, far])  # (2, n, D)
    loss, success = decree.collapse_elsewhere(centre, direction)(z, torch.zeros(2).long())
    cosines = torch.stack([near[0] @ near[1], far[0] @ far[1]])
    places = [F.normalize(v.mean(0) - centre, dim=0) @ direction for v in (near, far)]
    assert places[0] > decree.TOO_NEAR and places[1] < decree.NEAR
    assert success[0] == 0 and torch.allclose(success[1], cosines[1])
    penalty = decree.NEAR_WEIGHT * (places[0] - decree.NEAR)
    assert torch.allclose(loss, torch.stack([penalty - cosines[0], -cosines[1]]))


def test_mean_pairwise_cosine_against_all_pairs():
    z = F.normalize(
        torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=2
    )
    for row, value in zip(z, decree.mean_pairwise_cosine(z), strict=True):
        pairs = [row[i] @ row[j] for i in range(7) for j in range(7) if i != j]
        assert float(value) == pytest.approx(float(sum(pairs)) / 42)


def test_few_classes_and_one():
    e = toy_encoder()
    some = Classifier(e, lambda z: 10 * z @ class_directions()[:4].T, NAMES[:4], "hand-made")
    verdict = cleanse.Cleanse(steps=10)(e, toy_images(), 0, classifier=some)
    assert any("means nothing under 10" in line for line in verdict.notes["limits"])
    assert verdict.value == verdict.evidence["log_ratio"].value
    one = Classifier(e, lambda z: z[:, :1], NAMES[:1], "hand-made")
    with pytest.raises(UserError, match="only one"):
        cleanse.Cleanse()(e, toy_images(), 0, classifier=one)


def test_a_class_that_is_never_reached_says_so():
    e = toy_encoder()

    def never(z):
        return torch.cat([10 * z @ class_directions()[:-1].T, torch.full((len(z), 1), -99.0)], 1)

    verdict = cleanse.Cleanse(steps=10)(
        e, toy_images(), 0, classifier=Classifier(e, never, NAMES, "hand-made")
    )
    assert NAMES[-1] in verdict.notes["unreached"]
    assert any("reached the success asked for" in line for line in verdict.notes["limits"])


def test_the_least_target_is_one_that_was_reached_and_its_trigger_comes_first():
    """The mask of a search that reached nothing says nothing by its size."""
    masks = torch.tensor([0.1, 0.9, 0.3, 0.5])[:, None, None, None].expand(4, 1, 8, 8)
    ones = torch.ones(4)
    triggers = InvertedTriggers(
        aims=torch.arange(4),
        masks=masks,
        patterns=torch.rand(4, 3, 8, 8),
        norms=masks.sum((1, 2, 3)),
        success=torch.tensor([0.02, 0.9, 0.1, 1.0]),
        reached=torch.tensor([False, True, False, True]),
        steps=ones,
        starts=ones[:, None],
    )
    clean = toy_images(16)
    judge = partial(
        outlier_verdict, triggers, ["a", "b", "c", "d"], "class", "log_ratio", clean, {}
    )
    verdict = judge(excluding=True)
    assert [inversion.target for inversion in verdict.inversions] == ["d", "b", "a", "c"]
    assert verdict.notes["target"] == "d" and verdict.evidence["least_norm"].value == 32
    assert (
        verdict.value == pytest.approx(math.log(0.7 / 0.5)) and len(verdict.notes["unreached"]) == 2
    )
    assert judge().notes["target"] == "a"  # where unreached masks count too


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
    text = (
        "decree:steps=1000,batch=128,restarts=1,halvings=0,goal=0.99,lr=(0.5,0.1,0.05),"
        "until=(200,500),up=5,down=5,patience=6"
    )
    audit = registry.make("audit", text + ",floor=1e-7,resets=10,wait=35,centred=true")
    assert [audit.recipe(0.99).rate(step) for step in (0, 199, 200, 499, 500)] == [
        0.5,
        0.5,
        0.1,
        0.1,
        0.05,
    ]
