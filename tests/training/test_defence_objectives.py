"""siglip, cleanclip, par, roclip and safeclip against plain forms; EDA against a plain form; ranks,
resuming, phases.
"""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training.toys import (
    assert_equal_states,
    descend,
    leave_state,
    rank_states,
    toy_pairs,
    trained_state,
)
from training.toys import start as start_clip

from bezoar import registry
from bezoar.data import randomness
from bezoar.encoders.encoder import WordTokenizer
from bezoar.errors import UserError
from bezoar.training import caption_views, contrastive, loop, ranks
from bezoar.training.augmentation import Chance, Views
from bezoar.training.objectives import roclip, safeclip
from bezoar.training.universal_triggers import PIXEL_STEP, UniversalTriggers

SPECS = {
    "siglip": "siglip:batch=16,bias=-2",
    "cleanclip": "cleanclip:batch=16,temperature=0.1,anchor=1",
    "adversarial": "cleanclip:batch=16,temperature=0.1,anchor=1,adversarial=6",
    "par": "par:batch=16,temperature=0.1",
    "roclip": "roclip:batch=16,temperature=0.1,bank=0.4",
    "safeclip": "safeclip:batch=16,temperature=0.1,apart=1",
}


def start(name, epochs=4, extra=""):
    """A fresh encoder, the objective's loss, the objective, and tokens of the toy records."""
    return start_clip(toy_pairs(), f"{SPECS[name]}{extra},epochs={epochs},lr=1e-3")


def chance(*key):
    return Chance(randomness.generator(*(key or (5,))))


def infonce(a, b, scale):
    """Row by row, in double precision."""
    total = 0.0
    for i in range(len(a)):
        logits = [
            float(scale * (a[i].detach().double() @ b[j].detach().double())) for j in range(len(b))
        ]
        total += math.log(sum(math.exp(x) for x in logits)) - logits[i]
    return total / len(a)


def clip(z, w, scale):
    return (infonce(z, w, scale) + infonce(w, z, scale)) / 2


# EDA


def eda_by_hand(rows, changes, places, gone, share, first):
    """One caption at a time, as lists of words; the draws are given."""
    out, width = [], len(rows[0])
    for row, change, place, lost in zip(rows, changes, places, gone, strict=True):
        words = [t for t in row if t]
        head, body, tail = (
            words[:first],
            words[first : len(words) - first],
            words[len(words) - first :],
        )
        n = len(body)
        m = max(1, int(share * n)) if n else 0
        if change == caption_views.INSERT and len(words) + m > width:
            change = caption_views.SWAP
        if change == caption_views.SWAP and n > 1:
            for k in range(m):
                i = int(place[0][k] * n)
                j = (i + 1 + int(place[1][k] * (n - 1))) % n
                body[i], body[j] = body[j], body[i]
        elif change == caption_views.INSERT:
            new = [(int(place[1][k] * (n + 1)), body[int(place[0][k] * n)]) for k in range(m)]
            longer = []
            for at in range(n + 1):
                longer += [word for where, word in new if where == at] + body[at : at + 1]
            body = longer
        elif change == caption_views.DELETE and n:
            draws = lost[first : first + n]
            last = max(range(n), key=lambda i: draws[i])
            body = [word for i, word in enumerate(body) if draws[i] >= share or i == last]
        words = head + body + tail
        out.append(words + [0] * (width - len(words)))
    return out


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_eda_is_what_lists_of_words_give(marks, share):
    g = torch.Generator().manual_seed(3)
    b, width, first = 300, 14, int(marks)
    rows = []
    for _ in range(b):
        n = int(torch.randint(0 if not marks else 2, width + 1, (1,), generator=g))
        words = torch.randint(1, 50, (n,), generator=g).tolist()
        if marks:
            words[0], words[-1] = 98, 99
        rows.append(words + [0] * (width - n))
    tokens = torch.tensor(rows)
    drawn, most = chance(7), max(1, int(share * width))
    changes, places, gone = drawn.integers(3, b), drawn.uniform(b, 2, most), drawn.uniform(b, width)
    expected = eda_by_hand(rows, changes.tolist(), places.tolist(), gone.tolist(), share, first)
    views = caption_views.eda(tokens, chance(7), share, marks)
    assert views.tolist() == expected
    assert (views != tokens).any(1).float().mean() > 0.5
    assert not marks or ((views[:, 0] == 98).all() and ((views == 99).sum(1) == 1).all())


def test_two_ranks_draw_the_same_views_of_captions():
    tokens = torch.arange(1, 49).view(8, 6)
    halves = [
        caption_views.eda(tokens[4 * r : 4 * r + 4], Chance(randomness.generator(2), r, 2), 0.3)
        for r in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), caption_views.eda(tokens, chance(2), 0.3))


def test_whole_words_have_no_marks():
    encoder = start("cleanclip")[0]
    assert isinstance(encoder.tokenizer, WordTokenizer) and not caption_views.has_marks(encoder)


# The losses


def test_siglip_judges_every_pair_by_itself():
    encoder, loss, _, tokens = start("siglip", extra=",shift=0,temperature=0.2")
    images, tokens = toy_pairs(8).images, tokens[:8]
    twin = copy.deepcopy(encoder).train()
    value = loss.train()(images, tokens, chance())
    with torch.no_grad():
        z, w = twin.encode_images(images).double(), twin.encode_tokens(tokens).double()
    plain = 0.0
    for i in range(8):
        for j in range(8):
            sign = 1 if i == j else -1
            plain += math.log(1 + math.exp(-sign * (5 * float(z[i] @ w[j]) - 2)))
    assert value.item() == pytest.approx(plain / 8, rel=1e-5)
    value.backward()
    assert loss.bias.grad and loss.log_scale.grad
    published = registry.make("objective", "siglip")(encoder)
    assert float(published.scale) == pytest.approx(10) and float(published.bias) == -10


def test_cleanclip_is_clip_and_half_of_what_looks_at_views():
    encoder, loss, _, tokens = start("cleanclip", extra=",weight=3,crop=0.4,words=0.3,anchor=0")
    images, tokens = toy_pairs(8).images, tokens[:8]
    twin = copy.deepcopy(encoder).train()
    value = loss.train()(images, tokens, chance())
    x, views, captions = cleanclip_inputs(images, tokens)
    z, z2 = twin.encode_images(torch.cat([x, views])).chunk(2)
    w, w2 = twin.encode_tokens(tokens), twin.encode_tokens(captions)
    expected = clip(z, w, 10) + 3 / 2 * (infonce(z, z2, 10) + infonce(w, w2, 10))
    assert value.item() == pytest.approx(expected, rel=1e-4)
    plain = registry.make("objective", "cleanclip:weight=0,shift=0,temperature=0.1")(encoder).eval()
    ours = registry.make("objective", "clip:shift=0,temperature=0.1")(encoder).eval()
    assert plain(images, tokens, chance()).item() == pytest.approx(
        ours(images, tokens, chance()).item(), rel=1e-6
    )


def cleanclip_inputs(images, tokens):
    """The images, their views, and the views of captions that cleanclip draws in the test above and
    below.
    """
    drawn = chance()
    x = contrastive.shift_to_float(images, 2, drawn)
    views = Views(32, (0.4, 1.0))(images, drawn, 1)[:, 0]
    return x, views, caption_views.eda(tokens, drawn, 0.3)


def test_a_half_of_cleanclips_views_carries_triggers_that_ascend():
    _, loss, _, tokens = start("adversarial", extra=",crop=0.4,words=0.3,anchor=0")
    images, tokens = toy_pairs(12).images, tokens[:12]
    drawn, twin = chance(), copy.deepcopy(loss.encoder).train()
    value = loss.train()(images, tokens, chance())
    x = contrastive.shift_to_float(images, 2, drawn)
    mine = UniversalTriggers(6, 32, 32, x.device)
    stamped = mine(x[6:], drawn)  # drawn before the views
    views = Views(32, (0.4, 1.0))(images[:6], drawn, 1)[:, 0]
    captions = caption_views.eda(tokens, drawn, 0.3)
    z, z2 = twin.encode_images(torch.cat([x, views, stamped])).chunk(2)
    w, w2 = twin.encode_tokens(tokens), twin.encode_tokens(captions)
    expected = clip(z, w, 10) + (infonce(z, z2, 10) + infonce(w, w2, 10)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    moved = (loss.triggers.patterns - mine.patterns).detach().abs()
    assert moved.max() == pytest.approx(PIXEL_STEP) and loss.triggers.patterns.grad is None


def test_cleanclips_anchor_is_the_distance_to_the_vectors_at_the_start():
    encoder, loss, _, tokens = start("cleanclip", extra=",crop=0.4,words=0.3,anchor=2")
    images, tokens = toy_pairs(8).images, tokens[:8]
    initial = copy.deepcopy(encoder).eval()
    nn.init.normal_(encoder.image.head.bias, generator=torch.Generator().manual_seed(0))
    without_anchor = copy.deepcopy(loss).train()
    without_anchor.initial = None
    moved = copy.deepcopy(encoder).train()
    value = loss.train()(images, tokens, chance()) - without_anchor(images, tokens, chance())
    x, views, _ = cleanclip_inputs(images, tokens)
    with torch.no_grad():
        z = moved.encode_images(torch.cat([x, views]))[:8]
        cosines = (
            (z * initial.encode_images(x)).sum(1),
            (moved.encode_tokens(tokens) * initial.encode_tokens(tokens)).sum(1),
        )
    distance = sum(float(1 - cosine.mean()) for cosine in cosines)
    assert value.item() == pytest.approx(2 * distance, abs=1e-3) and distance > 0.05


def test_par_pushes_away_from_the_start_as_far_as_tau():
    encoder, loss, _, tokens = start("par", extra=",shift=0")
    images, tokens = toy_pairs(8).images, tokens[:8]
    initial = copy.deepcopy(encoder).eval().requires_grad_(False)
    with torch.no_grad():
        encoder.text.head[3].bias += torch.randn(16, generator=torch.Generator().manual_seed(0))
    twin = copy.deepcopy(encoder).train()
    value = loss.train()(images, tokens, chance())
    with torch.no_grad():
        z, w = twin.encode_images(images), twin.encode_tokens(tokens)
    pairs = ((z, initial.encode_images(images)), (w, initial.encode_tokens(tokens)))
    distances = [float((2 - 2 * (a * b).sum(1)).mean()) for a, b in pairs]
    assert min(distances) > 0.01
    assert value.item() == pytest.approx(clip(z, w, 10) - sum(distances) / 2, rel=1e-4)
    value.backward()
    assert all(p.grad is None for p in loss.initial.parameters())
    assert not any(m.training for m in loss.initial.modules())
    tau = sum(distances) / 2  # one of the two is further away
    bounded = registry.make("objective", f"par:temperature=0.1,shift=0,tau={tau}")(initial)
    bounded.encoder = encoder
    value = bounded.train()(images, tokens, chance()).item()
    assert value == pytest.approx(clip(z, w, 10) - min(distances) / 2, rel=1e-3)


def test_par_remembers_its_start_when_it_goes_on():
    _, loss, recipe, tokens = start("par")
    first = {k: v.clone() for k, v in loss.initial.state_dict().items()}
    loop.fit(loss, recipe, toy_pairs(), tokens, 3)
    assert all(torch.equal(v, loss.state_dict()[f"initial.{k}"]) for k, v in first.items())


def test_roclip_compares_with_the_nearest_of_the_captions_it_saw(monkeypatch):
    monkeypatch.setattr(roclip, "LEAST_BATCHES", 1)
    encoder, loss, _, tokens = start("roclip", extra=",words=0,crop=1")
    data = toy_pairs()
    loss.begin(data, tokens)
    assert len(loss.bank) == 38 and loss.epoch_steps == 6  # 0.4 of 96 records, 6 steps an epoch
    loss.train()
    with torch.no_grad():
        ring = [(tokens[i], encoder.encode_tokens(tokens[i : i + 1])[0]) for i in range(38)]
    whole_images = Views(32, (1.0, 1.0), flip=0, jitter=0, gray=0)
    position = 0
    for step in range(12):
        rows = torch.arange(16) + 16 * (step % 6)
        twin = copy.deepcopy(encoder).train()
        value = loss(data.images[rows], tokens[rows], chance(step))
        with torch.no_grad():
            z = twin.encode_images(whole_images(data.images[rows], chance(step), 1)[:, 0])
            current = w = twin.encode_tokens(tokens[rows])
            if step >= 6:  # the second epoch matches
                nearest = (z @ torch.stack([v for _, v in ring]).T).argmax(1).tolist()
                w = twin.encode_tokens(torch.stack([ring[i][0] for i in nearest]))
        assert value.item() == pytest.approx(clip(z, w, 10), rel=1e-4), step
        loss.zero_grad()
        value.backward()
        assert any(p.grad is not None and p.grad.any() for p in encoder.text.parameters())
        for token, vector in zip(tokens[rows], current, strict=True):
            ring[position], position = (token, vector), (position + 1) % 38
        assert torch.equal(loss.bank, torch.stack([t for t, _ in ring]))
        assert int(loss.position) == position
        assert torch.allclose(loss.vectors, torch.stack([v for _, v in ring]), atol=1e-6)


def test_safeclip_has_three_phases_and_a_set_that_grows(monkeypatch):
    _, loss, recipe, tokens = start("safeclip", epochs=6, extra=",more=0.1,most=0.6")
    data, calls, sizes = toy_pairs(), [], []
    terms = ("unimodal_loss", "multimodal_loss")
    for name in terms:
        term = getattr(loss, name)
        monkeypatch.setattr(
            loss,
            name,
            lambda x, t, c, name=name, term=term: calls.append((name, len(x))) or term(x, t, c),
        )
    first = torch.linspace(0, 1, 96) > 0.7
    monkeypatch.setattr(
        safeclip, "upper_component_probability", lambda values: first.numpy() * 0.99
    )

    def count_safe(epoch):
        sizes.append(int(loss.safe.sum()))
        return {}

    loop.fit(loss, recipe, data, tokens, 3, on_epoch_end=count_safe)
    separate, together, mixed = calls[:6], calls[6:12], calls[12:]
    assert separate == [("unimodal_loss", 16)] * 6 and together == [("multimodal_loss", 16)] * 6
    share = int(first.sum()) / 96
    assert sizes == [0, 0, *(round(min(0.6, share + 0.1 * k) * 96) for k in range(4))]
    assert sum(n for _, n in mixed) <= 24 * 16 and {name for name, _ in mixed} == set(terms)
    agreement = loss.agreement()
    loss.split(3)
    assert agreement[loss.safe].min() >= agreement[~loss.safe].max()


def test_safeclip_never_compares_image_and_text_of_risky_pairs():
    _, loss, _, tokens = start("safeclip", extra=",shift=0")
    data = toy_pairs()
    rows = loss.begin(data, tokens)[:16]
    loss.train()
    loss.step.fill_(13)  # within the third epoch, the split made
    loss.safe[:10] = True
    twin = copy.deepcopy(loss)
    value = loss(data.images[:16], rows, chance())
    drawn = chance()
    safe, risky = data.images[:10], data.images[10:16]
    expected = clip(twin.encoder.encode_images(safe), twin.encoder.encode_tokens(tokens[:10]), 10)
    views = twin.view_images(risky, drawn), twin.view_images(risky, drawn)
    z, z2 = twin.encoder.encode_images(torch.cat(views)).chunk(2)
    captions = [caption_views.eda(tokens[10:16], drawn) for _ in range(2)]
    w, w2 = (twin.encoder.encode_tokens(c) for c in captions)
    # the safe pairs are drawn for first, though their images are not moved
    expected += (clip(z, z2, 10) + clip(w, w2, 10)) / 2
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_safeclip_takes_its_low_rate_in_one_epoch():
    recipe = registry.make("objective", "safeclip:epochs=8,apart=3,lr=1e-2,together=1e-4")
    plain = registry.make("objective", "clip:epochs=8,lr=1e-2")
    rates = [loop.learning_rate(recipe, step, 80) for step in range(80)]
    usual = [loop.learning_rate(plain, step, 80) for step in range(80)]
    same = [a == b for a, b in zip(rates, usual, strict=True)]
    assert same == [not 30 <= step < 40 for step in range(80)]
    assert rates[35] == pytest.approx(usual[35] / 100)


def test_two_gaussians_are_told_apart():
    g = torch.Generator().manual_seed(0)
    low, high = torch.randn(300, generator=g) * 0.1, 1 + torch.randn(700, generator=g) * 0.2
    values = torch.cat([low, high])
    p = safeclip.upper_component_probability(values)
    # the mixture that they were drawn from
    density = [
        share / sd * torch.exp(-((values - m) ** 2) / (2 * sd**2))
        for share, m, sd in ((0.3, 0, 0.1), (0.7, 1, 0.2))
    ]
    truth = density[1] / (density[0] + density[1])
    assert ((torch.from_numpy(p) > 0.9) == (truth > 0.9)).float().mean() > 0.99


@pytest.mark.parametrize(
    "spec, what",
    [
        ("siglip:flip=2", "flip in 0..1"),
        ("siglip:bias=-1000", "bias in -100..100"),
        ("cleanclip:weight=-1", "weight, anchor and adversarial >= 0"),
        ("cleanclip:crop=0", "crop in 0..1"),
        ("cleanclip:words=1", "words in 0..1"),
        ("cleanclip:shift=-1", "shift >= 0"),
        ("par:tau=5", "tau in 0..4"),
        ("par:temperature=0", "temperature > 0"),
        ("roclip:every=0", "every >= 1"),
        ("roclip:bank=2", "bank in 0..1"),
        ("safeclip:epochs=6", "apart [+] 2"),
        ("safeclip:together=0", "together > 0"),
        ("safeclip:sure=2", "sure, least and more in 0..1"),
    ],
)
def test_fields_that_make_no_sense_are_refused(spec, what):
    with pytest.raises(UserError, match=what):
        registry.make("objective", spec)


# The loop


def trained(name, folder=None, until=None):
    return trained_state(*start(name), folder and folder / f"{name}.safetensors", until)


@pytest.mark.parametrize("name", SPECS)
def test_an_interrupted_run_continues_to_the_same_bits(name, tmp_path, monkeypatch):
    whole = trained(name)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    trained(name, tmp_path, until=16)
    assert_equal_states(whole, trained(name, tmp_path))
    assert torch.isfinite(whole["losses"]).all()


def descended(name):
    """The loss's state after a few steps of descent."""
    _, loss, recipe, tokens = start(name, epochs=3 if name == "safeclip" else 2)
    descend(loss, recipe, toy_pairs(32), tokens[:32], rate=1e-3)
    return {k: v.clone() for k, v in loss.state_dict().items()}


def run_rank(folder):
    """What each of the two ranks does."""
    ranks.join()
    names = [name for name in SPECS if name != "safeclip"]
    state = {f"{name}.{k}": v for name in names for k, v in descended(name).items()}
    with pytest.raises(UserError, match="start one process"):
        descended("safeclip")
    leave_state(state, folder)


def test_two_ranks_are_one(tmp_path):
    states = rank_states(__file__, tmp_path)
    for name in ("siglip", "cleanclip", "par", "roclip"):
        for key, value in descended(name).items():
            scale = value.abs().max().clamp(min=1e-2) if value.is_floating_point() else 1
            for state in states:
                assert ((state[f"{name}.{key}"] - value).abs() <= 2e-4 * scale).all(), (name, key)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
