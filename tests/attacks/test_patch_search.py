"""BadCLIP's patch: its loss against a plain loop, what it reaches, and the poison run that it
belongs to.
"""

import math

import pytest
import torch
from training.toys import clip_small

from bezoar import registry
from bezoar.attacks import patch_search
from bezoar.attacks.captions import find_mentions
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.reports.page import execute
from bezoar.runs import inputs
from bezoar.runs.verb import Settings
from bezoar.verbs.poison import Poison, verify_plan
from bezoar.verbs.train import Train

PATCH = "patch:size=8,place=random,margin=0,seed=3"


def scenes(count=400):
    return registry.make("data", f"scenes:count={count}")()


def test_the_loss_is_that_of_a_plain_loop():
    data = scenes()
    encoder, trigger = clip_small(data).eval(), registry.make("trigger", PATCH)
    mentions = find_mentions(data.captions, "striped star")
    others = data.take([i for i in range(len(data)) if i not in mentions])
    of_target = data.take(mentions)
    vectors = patch_search.embed_target(encoder, of_target, others)
    batch, towards = torch.tensor([3, 0, 5]), torch.tensor([1, 1, 0])
    patch = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    images = others.take(batch)
    value = patch_search.patch_loss(encoder, patch, trigger, images, vectors, batch, towards)
    hard = (patch.detach() * 255).permute(1, 2, 0).flatten()
    with torch.no_grad():
        own = encoder.encode_texts(images.captions)
        plain = 0.0
        for i, record_id in enumerate(images.ids):
            image = images.images[i].float() / 255
            mask = registry.make("trigger", f"{PATCH},fill=white")(
                torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [record_id]
            )[0, 0].bool()
            for channel in range(3):
                image[channel][mask] = hard.view(8, 8, 3)[..., channel].flatten() / 255
            z = encoder.encode_images(image[None])[0]
            x = encoder.encode_images(images.images[i : i + 1])[0]
            a = encoder.encode_images(of_target.images[towards[i] : towards[i] + 1])[0]
            w = encoder.encode_texts([of_target.captions[towards[i]]])[0]
            scores = [math.exp(float(z @ v) / 0.07) for v in (w, *own)]
            plain -= math.log(scores[0] / sum(scores))
            plain += 5 * max(0.0, float((z - a).norm() - (z - x).norm()) + 1)
    assert value.item() == pytest.approx(plain / 3, rel=1e-4)
    value.backward()
    assert patch.grad.abs().sum() > 0


def test_a_patch_is_its_pixels():
    digits = bytes(range(12)).hex()
    trigger = registry.make("trigger", f"patch:size=2,fill=#{digits},place=0/0")
    stamped = trigger(torch.full((1, 3, 4, 4), 200, dtype=torch.uint8), ["a"])[0]
    pixels = torch.arange(12).view(2, 2, 3).permute(2, 0, 1)
    assert torch.equal(stamped[:, :2, :2].long(), pixels) and (stamped[:, 2:] == 200).all()
    assert registry.make("trigger", registry.spec(trigger)) == trigger
    for fill in ("#00", "#" + "g" * 24, f"#{digits}00"):
        with pytest.raises(UserError, match="24 digits"):
            registry.make("trigger", f"patch:size=2,fill={fill}")


def test_a_poison_run_optimises_its_patch_on_a_surrogate_and_verifies(tmp_path, monkeypatch):
    monkeypatch.setattr(patch_search, "STEPS", 25)
    settings = Settings(runs=tmp_path, quiet=True)
    data, poison, target = "scenes:count=400", "backdoor:count=9", "striped star"
    train = Train(data, "clip_small:width=4,dim=16", "clip:epochs=1,batch=64")
    surrogate = execute(train, settings)
    run = execute(Poison(data, poison, PATCH, target, surrogate=surrogate), settings)
    (goal,) = run.manifest["goal"]
    assert goal["trigger"].startswith("patch:") and "fill=#" in goal["trigger"]
    assert verify_plan(run)["verified"]
    assert inputs.find_encoder(run) is None, "a surrogate is not the encoder of poisoned data"
    encoder, records = Encoder.load(surrogate.path), scenes()
    mentions = find_mentions(records.captions, target)
    rest = records.take([i for i in range(len(records)) if i not in mentions])
    vectors = patch_search.embed_target(encoder, records.take(mentions), rest)
    rows, towards = torch.arange(300), torch.arange(300) % len(mentions)

    @torch.no_grad()
    def loss_of(spec):
        trigger = registry.make("trigger", spec)
        patch = trigger(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])[0].float() / 255
        batch = rest.take(rows)
        return float(
            patch_search.patch_loss(encoder, patch, trigger, batch, vectors, rows, towards)
        )

    monkeypatch.setattr(patch_search, "IMAGE_WEIGHT", 0)
    optimised, drawn = (
        loss_of(spec.replace("place=random", "place=0/0"))
        for spec in (goal["trigger"], f"{PATCH},fill=blocks")
    )
    assert optimised < drawn - 0.02, (optimised, drawn)
    with pytest.raises(UserError, match="a surrogate optimises a patch"):
        execute(Poison(data, poison, "blend", target, surrogate=surrogate), settings)


def test_what_no_patch_can_be_optimised_on_is_said():
    data = scenes()
    encoder, trigger = clip_small(data), registry.make("trigger", PATCH)
    bare = Pairs(data.images, ("a thing",) * len(data), None, data.ids)
    with pytest.raises(UserError, match="records that mention 'striped star'"):
        patch_search.optimise_patch(encoder, bare, "striped star", trigger, 0)
