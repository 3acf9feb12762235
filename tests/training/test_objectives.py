"""SimCLR, MoCo and SimSiam against slow plain forms and closed forms; ranks, resuming, and training
without captions.
"""

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from training.toys import (
    assert_equal_states,
    descend,
    leave_state,
    normal,
    rank_states,
    toy_pairs,
    trained_state,
)

from bezoar import Settings, Train, execute, registry
from bezoar.data import randomness
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.training import loop, ranks, selfsupervised
from bezoar.training.augmentation import Chance, Views
from bezoar.training.objectives.simclr import nt_xent
from bezoar.training.objectives.simsiam import negative_cosine

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10.npz"
SMALL = "batch=16,hidden=8,dim=8"
SPECS = {
    "simclr": f"simclr:{SMALL},temperature=0.2",
    "moco": f"moco:{SMALL},queue=40,slow=0.7,groups=4",
    "simsiam": f"simsiam:{SMALL},bottleneck=4,layers=3",
}


def start(name, epochs=1):
    """A fresh encoder without text, the objective's loss, and the objective."""
    torch.manual_seed(0)
    encoder = registry.make("network", "tower:width=4,dim=16")(32)
    recipe = registry.make("objective", f"{SPECS[name]},epochs={epochs},lr=1e-3")
    return encoder, recipe(encoder), recipe


def without_captions(n):
    return torch.zeros(n, 0, dtype=torch.long)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


# The losses


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_nt_xent_is_equation_1(temperature):
    z = unit(10, 6)
    plain = 0.0
    for i in range(10):
        pair = i + 1 if i % 2 == 0 else i - 1
        terms = {
            k: math.exp(float(z[i].double() @ z[k].double()) / temperature)
            for k in range(10)
            if k != i
        }
        plain -= math.log(terms[pair] / sum(terms.values()))
    assert float(nt_xent(z, z, 0, temperature)) == pytest.approx(plain / 10, rel=1e-5)
    halves = [nt_xent(z[rows], z, rows.start, temperature) for rows in (slice(0, 4), slice(4, 10))]
    assert float(halves[0] * 4 + halves[1] * 6) == pytest.approx(plain, rel=1e-5)


def test_nt_xent_of_two_images_in_closed_form():
    # views of an image alike, the images at right angles
    z = torch.eye(2).repeat_interleave(2, 0).requires_grad_()
    loss = nt_xent(z, z, 0, 0.5)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), rel=1e-6)
    loss.backward()
    assert torch.isfinite(z.grad).all()
    without_negatives = nt_xent(unit(2, 5), unit(2, 5), 0, 0.5)
    assert float(without_negatives) == pytest.approx(0, abs=1e-6)


def test_simclr_projects_features_that_are_not_normalised():
    _, loss, recipe = start("simclr")
    images = toy_pairs(8).images
    loss.train()
    twin = copy.deepcopy(loss)
    value = loss(images, without_captions(8), Chance(randomness.generator(5)))
    views = Views(32)(images, Chance(randomness.generator(5)))
    x = (views.flatten(0, 1) - 0.5) / 0.25
    first, norm, _, last = twin.head
    h = norm(twin.encoder.image(x) @ first.weight.T).relu()
    z = F.normalize(h @ last.weight.T + last.bias, dim=1)
    assert value.item() == pytest.approx(nt_xent(z, z, 0, 0.2).item(), rel=1e-5)
    assert recipe.colour == 0.5 and selfsupervised.make_views(recipe, 32) == Views(32)


def test_simsiam_is_the_mean_negative_cosine_and_stops_the_gradient():
    p, z = normal(6, 5, seed=1).requires_grad_(), normal(6, 5, seed=2).requires_grad_()
    loss = negative_cosine(p, z)
    cosine = nn.CosineSimilarity(dim=1)
    plain = -(cosine(p[0::2], z[1::2]).mean() + cosine(p[1::2], z[0::2]).mean()) / 2
    assert torch.allclose(loss, plain)
    loss.backward()
    assert z.grad is None and torch.allclose(p.grad, torch.autograd.grad(plain, p)[0])
    others = p.detach().unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert float(negative_cosine(p.detach(), others * 3)) == pytest.approx(-1)


def test_simsiam_gradients_reach_the_encoder_through_the_predictor_alone():
    _, loss, _ = start("simsiam")
    images = toy_pairs(8).images
    loss.train()
    for p in loss.predictor.parameters():
        nn.init.zeros_(p)
    loss(images, without_captions(8), Chance(randomness.generator(5))).backward()
    assert not any(
        p.grad.any() for p in [*loss.encoder.image.parameters(), *loss.head.parameters()]
    )


def test_moco_against_a_plain_form_over_several_steps():
    _, loss, recipe = start("moco")
    data = toy_pairs(64)
    loss.train()
    image, head = copy.deepcopy((loss.encoder.image, loss.head))
    key = copy.deepcopy(nn.Sequential(image, head))  # with plain batch norms
    queue = loss.queue.tolist()  # the oldest first
    optim = loop.optimizer(loss, recipe)
    ours = torch.optim.SGD(loss.parameters(), 0.1)
    plain = torch.optim.SGD([*image.parameters(), *head.parameters()], 0.1)
    assert not {id(p) for p in loss.key.parameters()} & {
        id(p) for g in optim.param_groups for p in g["params"]
    }
    for step in range(4):
        images = data.images[16 * step : 16 * step + 16]
        value = loss(images, without_captions(16), Chance(randomness.generator(5, step)))
        with torch.no_grad():
            for slow, fast in zip(
                key.parameters(), [*image.parameters(), *head.parameters()], strict=True
            ):
                slow.copy_(0.7 * slow + 0.3 * fast)
        for a, b in zip(loss.key.parameters(), key.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7), step
        chance = Chance(randomness.generator(5, step))
        x = (selfsupervised.make_views(recipe, 32)(images, chance) - 0.5) / 0.25
        q = F.normalize(head(image(x[:, 0])), dim=1)
        shuffled, k = torch.randperm(16, generator=chance.generator).tolist(), torch.zeros(16, 8)
        for four in range(0, 16, 4):
            rows = shuffled[four : four + 4]
            k[rows] = F.normalize(key(x[rows, 1]), dim=1).detach()
        negatives = torch.tensor(queue)
        parts = []
        for i in range(16):
            logits = torch.stack([q[i] @ k[i], *(q[i] @ n for n in negatives)]) / 0.2
            parts.append(torch.logsumexp(logits, 0) - logits[0])
        expected = torch.stack(parts).mean()
        assert torch.allclose(value, expected, rtol=1e-4), step
        queue = [*queue, *k.tolist()][-40:]
        at = int(loss.position)
        assert at == 16 * (step + 1) % 40
        assert torch.allclose(loss.queue.roll(-at, 0), torch.tensor(queue), atol=1e-5), step
        for optimizer, result in ((ours, value), (plain, expected)):
            optimizer.zero_grad()
            result.backward()
            optimizer.step()
    loss.eval()
    before = copy.deepcopy(loss.state_dict())
    loss(data.images[:16], without_captions(16), Chance(randomness.generator(5)))
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_a_norm_that_moco_does_not_know_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    encoder = registry.make("network", "tower:width=4,dim=16")(32)
    encoder.image.layers[1] = Own(4)
    with pytest.raises(UserError, match="cannot group what this network's Own normalises"):
        registry.make("objective", SPECS["moco"])(encoder)


@pytest.mark.parametrize("name", SPECS)
def test_heads_are_not_saved_with_the_encoder(name, tmp_path):
    encoder, loss, _ = start(name)
    assert sum(1 for _ in loss.parameters()) > sum(1 for _ in encoder.parameters())
    encoder.eval().save(tmp_path)
    x = toy_pairs(4).images
    assert torch.equal(Encoder.load(tmp_path).encode_images(x), encoder.encode_images(x))


def test_measuring_the_width_changes_nothing():
    encoder = registry.make("network", "tower:width=4,dim=7")(32)
    encoder.image.layers[1].eval()
    before = copy.deepcopy(encoder.state_dict())
    modes = [m.training for m in encoder.image.modules()]
    assert selfsupervised.measure_width(encoder) == 7
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert [m.training for m in encoder.image.modules()] == modes
    assert False in modes and True in modes


@pytest.mark.parametrize(
    "spec, what",
    [
        ("simclr:temperature=0", "temperature > 0"),
        ("simclr:batch=1", "batch >= 2"),
        ("simclr:crop=0", "crop in 0..1"),
        ("simclr:colour=3", "colour in 0..2.5"),
        ("simclr:blur=2", "shares: 0..1"),
        ("moco:queue=100,batch=200", r"queue \(100\) must hold at least one batch \(200\)"),
        ("moco:slow=1.5", "slow in 0..1"),
        ("moco:batch=20", "20 does not divide into 8 groups"),
        ("simsiam:layers=0", "layers >= 1"),
    ],
)
def test_fields_that_make_no_sense_are_refused(spec, what):
    with pytest.raises(UserError, match=what):
        registry.make("objective", spec)


# The loop


def trained(name, folder=None, until=None, epochs=2):
    file = folder and folder / f"{name}.safetensors"
    return trained_state(*start(name, epochs), without_captions(96), file, until)


@pytest.mark.parametrize("name", SPECS)
def test_an_interrupted_run_continues_to_the_same_bits(name, tmp_path, monkeypatch):
    whole = trained(name)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    trained(name, tmp_path, until=8)
    assert_equal_states(whole, trained(name, tmp_path))
    assert name != "moco" or int(whole["position"]) == 12 * 16 % 40


def gradients(name):
    """Those of one step, as descent at rate 1 shows them, and the loss's state after it."""
    _, loss, recipe = start(name)
    before = {k: p.detach().clone() for k, p in loss.named_parameters() if p.requires_grad}
    descend(loss, recipe, toy_pairs(16), without_captions(16), rate=1.0)
    after = {k: v.clone() for k, v in loss.state_dict().items()}
    return {"gradients": torch.cat([(v - after[k]).flatten() for k, v in before.items()]), **after}


def run_rank(folder):
    """What each of the two ranks does."""
    ranks.join()
    state = {f"{name}.{k}": v for name in SPECS for k, v in gradients(name).items()}
    leave_state(state | {f"fit.{k}": v for k, v in trained("moco", epochs=1).items()}, folder)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """What each rank left."""
    return rank_states(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", SPECS)
def test_two_ranks_are_one(states, name):
    expected = gradients(name)
    assert expected["gradients"].abs().max() > 0.01
    for state in states:
        for key, value in expected.items():
            scale = value.abs().max().clamp(min=1e-3) if value.is_floating_point() else 1
            assert ((state[f"{name}.{key}"] - value).abs() <= 1e-4 * scale).all(), key


def test_ranks_hold_the_same_queue(states):
    one = trained("moco", epochs=1)
    a, b = states
    assert all(torch.equal(v, b[k]) for k, v in a.items() if k.startswith("fit."))
    assert int(a["fit.position"]) == int(one["position"])
    assert torch.allclose(a["fit.losses"], one["losses"], rtol=1e-3)
    assert torch.allclose(a["fit.queue"], one["queue"], atol=1e-2)


@pytest.mark.skipif(not CIFAR.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("spec", ["simclr:lr=3e-3", "moco:lr=2e-3,queue=128", "simsiam:lr=3e-3"])
def test_a_few_steps_lower_the_loss_and_tell_classes_apart(spec):
    data = registry.make("data", f"npz:path={CIFAR},limit=1500")()
    train, test = data.take(range(1024)), data.take(range(1024, 1500))
    torch.manual_seed(0)
    encoder = registry.make("network", "tower:width=8,dim=32")(32)
    recipe = registry.make("objective", f"{spec},epochs=3,batch=64")
    log = loop.fit(recipe(encoder), recipe, train, without_captions(1024), 0)
    # moco's queue starts with random vectors, which are easy to tell from: they are gone after two
    # steps
    assert sum(log.losses[-8:]) / 8 < sum(log.losses[2:6]) / 4 - 0.05
    accuracy = registry.make("probe", "knn:k=100")(encoder, train, test)["knn.clean_accuracy"]
    assert accuracy.low > 0.13  # of ten classes


# The verb


def folder_of(tmp_path, per_class=12):
    """Images of two classes that anything tells apart."""
    generator = torch.Generator().manual_seed(0)
    for name, light in (("dark", 60), ("light", 250)):
        (tmp_path / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = torch.randint(
                light - 60, light, (32, 32, 3), generator=generator, dtype=torch.uint8
            )
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i}.png")
    return f"folder:path={tmp_path},size=32"


def test_training_without_captions_followed_by_neighbours(tmp_path):
    data = folder_of(tmp_path / "images")
    settings = Settings(tmp_path / "runs", device="cpu", quiet=True)
    network = "tower:width=4,dim=16"
    run = execute(Train(data, network, f"{SPECS['simclr']},epochs=2", follow=data), settings)
    epochs = [json.loads(line) for line in run.file("log.jsonl").read_text().splitlines()]
    assert [sorted(e) for e in epochs] == [["clean_accuracy", "epoch", "loss"]] * 2
    assert epochs[-1]["clean_accuracy"] == 1.0  # dark against light
    assert Encoder.load(run.path).text is None and (run.path / "report.html").exists()
    np.savez(tmp_path / "plain.npz", x=toy_pairs(32).images.permute(0, 2, 3, 1).numpy())
    plain = f"npz:path={tmp_path / 'plain.npz'}"
    run = execute(Train(plain, network, f"{SPECS['simsiam']},epochs=1"), settings)
    assert run.metric("final_loss").n == 1
    for fields, message in [
        (
            (data, network, "clip"),
            "objective clip reads captions, and network tower has no text tower",
        ),
        (
            (data, "clip_small:width=4", SPECS["simclr"]),
            "simclr trains images alone, and network clip_small has a text tower",
        ),
        (
            (plain, "clip_small:width=4", "clip"),
            "no captions to train on, and objective clip needs them",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            execute(Train(*fields), settings)
    with pytest.raises(UserError, match="give train data that have classes and labels"):
        execute(Train(plain, network, SPECS["simclr"], follow=plain), settings)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
