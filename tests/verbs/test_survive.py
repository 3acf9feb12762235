"""What a treatment leaves of a trigger: each figure against a slow form or a closed one; the verb
and its page.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bezoar import cli, registry
from bezoar.attacks import pixels
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.errors import UserError
from bezoar.evaluation import survival
from bezoar.evaluation.survival import Survival, Treatment
from bezoar.reports import page
from bezoar.reports.page import execute
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings
from bezoar.verbs.survive import Survive


class Mean:
    """A stand-in for an encoder: means over quarters of the normalised image."""

    def __init__(self) -> None:
        self.mean, self.std = torch.full((1, 3, 1, 1), 0.4), torch.full((1, 3, 1, 1), 0.3)

    def encode_images(self, x: torch.Tensor) -> torch.Tensor:
        z = F.adaptive_avg_pool2d((x - self.mean) / self.std, 2).flatten(1)
        return F.normalize(torch.cat([z, torch.ones(len(z), 1)], 1), dim=1)


@pytest.fixture
def images() -> torch.Tensor:
    small = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    return F.interpolate(small, (32, 32), mode="bilinear").byte()


def stamped(images: torch.Tensor, spec: str = "patch:size=8,fill=noise") -> torch.Tensor:
    return registry.make("trigger", spec)(images, [str(i) for i in range(len(images))])


def test_untreated_is_all_of_it(images: torch.Tensor) -> None:
    measures, views = Survival(images, stamped(images), Mean()).measure(Treatment())
    for key in ("pattern_kept", "energy_kept", "pattern_correlation", "shift_kept", "shift_cosine"):
        assert measures[key].value == pytest.approx(1, abs=1e-5), key
    assert measures["shift_length"].value == pytest.approx(1, abs=1e-5) and measures[
        "pattern_kept"
    ].n == len(images)
    assert torch.allclose(views[:, 0], stamped(images).float() / 255)


def test_jpeg_is_pillow_s(images: torch.Tensor) -> None:
    for quality in (50, 90):
        file = io.BytesIO()
        Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        plain = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal(pixels.recode_jpeg(images, quality)[2], plain)


def test_figures_against_their_definitions(images: torch.Tensor) -> None:
    clean, bad, treatment = images, stamped(images), Treatment(resize=0.5, jpeg=75)
    subject = Survival(clean, bad, Mean())
    measures, views = subject.measure(treatment)
    residue, before = treatment(bad, 0) - treatment(clean, 0), (bad.float() - clean.float()) / 255
    assert torch.allclose(views[:, 1], residue)
    shares, alike = [], []
    for r, b in zip(residue.double(), before.double(), strict=True):
        best = max(float((r * b.roll((y, x), (1, 2))).sum()) for y in range(32) for x in range(32))
        shares.append(best / float((b * b).sum()))
        alike.append(best / float(r.norm() * b.norm()))
    assert measures["pattern_kept"].value == pytest.approx(np.mean(shares), rel=1e-4)
    assert measures["pattern_correlation"].value == pytest.approx(np.mean(alike), rel=1e-4)
    energy = [
        (float((r * r).sum()) / float((b * b).sum())) for r, b in zip(residue, before, strict=True)
    ]
    assert measures["energy_kept"].value == pytest.approx(np.mean(energy), rel=1e-4)
    z = [
        Mean().encode_images(x)
        for x in (treatment(bad, 0), treatment(clean, 0), bad.float() / 255, clean.float() / 255)
    ]
    after, untreated = z[0] - z[1], z[2] - z[3]
    assert measures["shift_kept"].value == pytest.approx(
        float((after * untreated).sum() / (untreated * untreated).sum()), rel=1e-4
    )
    assert measures["shift_length"].value == pytest.approx(
        float(after.norm(dim=1).mean() / untreated.norm(dim=1).mean()), rel=1e-4
    )


def test_what_moves_a_pattern_is_told_from_what_destroys_it(images: torch.Tensor) -> None:
    flat = images // 8 + 100
    subject = Survival(flat, stamped(flat, "patch:size=8,fill=noise,place=centre"))
    moved = subject.measure(Treatment(augment="shift"))[0]
    assert moved["pattern_kept"].value == pytest.approx(1, abs=0.02)
    mirrored = subject.measure(Treatment(augment="flip"))[0]
    assert (
        mirrored["energy_kept"].value == pytest.approx(1, abs=1e-4)
        and mirrored["pattern_kept"].value < 0.6
    )
    small = [
        subject.measure(Treatment(resize=f))[0]["pattern_kept"].value
        for f in (1.0, 0.75, 0.5, 0.25)
    ]
    assert small == sorted(small, reverse=True) and small[-1] < 0.3
    jpeg = [subject.measure(Treatment(jpeg=q))[0]["pattern_kept"].value for q in (0, 95, 75, 30)]
    assert jpeg == sorted(jpeg, reverse=True)


def test_both_images_are_drawn_alike_and_a_seed_is_a_result(images: torch.Tensor) -> None:
    for name in (*survival.AUGMENTATIONS, ""):
        treatment = Treatment(augment=name, crop=0.5)
        assert torch.equal(treatment(images, 3), treatment(images, 3))
        assert treatment(images, 3).shape == images.shape
        same = Survival(images, stamped(images), seed=1)
        assert torch.equal(same.measure(treatment)[1], same.measure(treatment)[1])


def test_another_normalisation_is_what_the_encoder_then_sees(images: torch.Tensor) -> None:
    encoder, x = Mean(), images.float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD["imagenet"])
    plain = Mean()
    plain.mean, plain.std = mean, std
    assert torch.allclose(
        survival.embed_views(encoder, x, "imagenet"), plain.encode_images(x), atol=1e-5
    )
    assert torch.allclose(survival.embed_views(encoder, x, batch=2), encoder.encode_images(x))


def test_names_and_mistakes(images: torch.Tensor) -> None:
    assert Treatment(jpeg=75, resize=0.5, crop=0.125).name == "jpeg_75_resize_50_crop_12_5"
    assert Treatment().name == Treatment().title == "untreated"
    wanted = survival.build_treatments((0, 75), (1.0, 0.5), (1.0, 0.9), ("flip",), ())
    assert len(wanted) == len(set(wanted)) == 7 and wanted[0] == Treatment()
    with pytest.raises(UserError, match="changes no pixel"):
        Survival(images, images)
    for wrong in (
        {"resize": 0.0},
        {"jpeg": 101},
        {"crop": 2.0},
        {"augment": "twist"},
        {"normalise": "mine"},
    ):
        with pytest.raises(UserError):
            Treatment(**wrong)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = Settings(tmp_path_factory.mktemp("runs"), device="cpu", quiet=True)
    some = {
        "jpeg": (0, 75),
        "resize": (1.0, 0.5),
        "crop": (1.0, 0.5),
        "augment": ("flip", "simclr"),
    }
    return execute(Survive("scenes:count=12", "patch:size=6", count=10, **some), settings)


def test_the_verb_measures_every_treatment(run: Run) -> None:
    treatments = json.loads(run.file("treatments.json").read_text())
    assert treatments[0]["name"] == "untreated" and len(treatments) == 8
    metrics = run.manifest["metrics"]
    assert len(metrics) == 3 * len(treatments) and metrics["untreated.pattern_kept"][
        "value"
    ] == pytest.approx(1, abs=1e-4)
    assert (
        metrics["resize_50.pattern_kept"]["value"] < 0.9
        and metrics["resize_50.pattern_kept"]["n"] == 10
    )


def test_the_page_answers_in_a_sentence(run: Run) -> None:
    text = page.write_page(run).read_text(encoding="utf-8")
    assert "could not be made" not in text
    for part in (
        "The trigger patch",
        "What is left of it",
        "JPEG with resizing and cropping",
        "about pixels alone",
        "<svg",
    ):
        assert part in text
    assert page.shell_command(run).startswith(
        "bezoar survive scenes:count=12 --trigger patch:size=6 --count 10 --jpeg 0 75"
    )


def test_the_trigger_is_learnt_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    common = ["--runs", str(tmp_path), "--device", "cpu"]
    poison = [
        "poison",
        "scenes:count=300",
        "--poison",
        "backdoor:count=3",
        "--trigger",
        "patch:size=5",
        "--target",
        "striped star",
    ]
    assert cli.main([*poison, *common]) == 0
    name = Path(capsys.readouterr().out.splitlines()[-1]).name
    few = ["--count", "4", "--jpeg", "0", "--resize", "1.0", "--crop", "1.0", "--augment", "flip"]
    assert cli.main(["survive", name, *few, *common, "--json", "full"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"]["trigger"].startswith("patch:size=5")
    assert cli.main(["survive", "scenes:count=20", *common]) == 2
    assert "--trigger" in capsys.readouterr().err
