"""The loop: same seed same bits, interrupted and resumed, every draw counted; CLIP's loss; encoders
saved and loaded.
"""

import json
import math
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from training.toys import float_state, start, toy_pairs, train_toy

from bezoar import registry
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, WordTokenizer, split_words
from bezoar.errors import UserError
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance


def test_the_loss_is_symmetric_infonce():
    data = toy_pairs(8)
    encoder, loss, _, tokens = start(data, "clip:shift=0,temperature=0.1")
    encoder.train()
    value = loss(data.images, tokens, Chance(randomness.generator(0)))
    z, w = encoder.encode_images(data.images).double(), encoder.encode_tokens(tokens).double()
    plain = 0.0
    for i in range(8):
        rows = [math.exp(10 * float(z[i] @ w[j])) for j in range(8)]
        columns = [math.exp(10 * float(z[j] @ w[i])) for j in range(8)]
        plain -= math.log(rows[i] / sum(rows)) + math.log(columns[i] / sum(columns))
    assert float(value) == pytest.approx(plain / 16, rel=1e-5)


def test_same_seed_same_bits_and_another_seed_others():
    data, results = toy_pairs(), []
    for seed in (5, 5, 6):
        encoder, loss, recipe, tokens = start(data)
        log = loop.fit(loss, recipe, data, tokens, seed)
        results.append((float_state(encoder), log.losses))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    data, file = toy_pairs(), tmp_path / "c.safetensors"
    encoder, loss, recipe, tokens = start(data)
    log = train_toy(loss, recipe, tokens)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    interrupted, loss, recipe, tokens = start(data)
    assert train_toy(loss, recipe, tokens, file, until=8) is None
    resumed, loss, recipe, tokens = start(data)
    resumed_log = train_toy(loss, recipe, tokens, file)
    assert torch.equal(float_state(resumed), float_state(encoder))
    assert not torch.equal(float_state(interrupted), float_state(encoder))
    assert resumed_log.losses == log.losses
    assert torch.equal(resumed_log.exposures, log.exposures)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_the_ledger_counts_every_draw():
    data = toy_pairs(100)
    _, loss, recipe, tokens = start(data)
    log = loop.fit(loss, recipe, data, tokens, 0)
    assert log.exposures.sum() == 2 * 6 * 16 and log.exposures.max() <= 2
    drawn = torch.zeros(100, dtype=torch.long)
    for epoch in range(2):
        drawn[loop.epoch_batches(0, epoch, 100, 16).flatten()] += 1
    assert torch.equal(drawn, log.exposures)


def test_schedule_rises_and_falls_to_zero():
    recipe = registry.make("objective", "clip:lr=1.0,warmup=0.1")
    rates = [loop.learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[9] == pytest.approx(1.0) and rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def test_shift_is_one_draw_a_sample_and_a_plain_crop():
    x = toy_pairs(64).images
    shifted = augmentation.random_shift(x, 2, Chance(randomness.generator(0)))
    draws = torch.randint(0, 5, (64, 2), generator=randomness.generator(0))
    assert len({tuple(d) for d in draws.tolist()}) > 10
    for i in range(64):
        padded = torch.nn.functional.pad(x[i : i + 1].float(), (2,) * 4, mode="replicate")[0]
        top, left = draws[i].tolist()
        assert torch.equal(shifted[i].float(), padded[:, top : top + 32, left : left + 32])


def test_flip_mirrors_whole_samples():
    x = toy_pairs(64).images
    out = augmentation.random_flip(x, 0.5, Chance(randomness.generator(0)))
    same, mirrored = (out == x).flatten(1).all(1), (out == x.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 10 < int(mirrored.sum()) < 54


def test_too_little_data_is_refused():
    data = toy_pairs(10)
    _, loss, recipe, tokens = start(data)
    with pytest.raises(UserError, match="10 records are fewer than one batch of 16"):
        loop.fit(loss, recipe, data, tokens, 0)


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    with pytest.raises(UserError, match="became nan at step 8"):
        loop._read_losses([torch.tensor(v) for v in (1.0, math.nan, math.inf)], 10)
    unread = [torch.tensor(0.1), torch.tensor(2.0)]
    assert loop._read_losses(unread, 2) == [float(torch.tensor(0.1)), 2.0] and unread == []


def test_losses_of_a_gpu_are_read_together(monkeypatch):
    data, steps_reported = toy_pairs(), []
    _, loss, recipe, tokens = start(data, "clip:epochs=1,batch=16")
    expected = loop.fit(loss, recipe, data, tokens, 0)
    monkeypatch.setitem(loop.UNREAD, "cpu", 4)
    _, loss, recipe, tokens = start(data, "clip:epochs=1,batch=16")
    log = loop.fit(
        loss,
        recipe,
        data,
        tokens,
        0,
        report=lambda step, steps, value: steps_reported.append(step),
    )
    assert log.losses == expected.losses and log.epochs == expected.epochs
    assert steps_reported == [4, 6]


def test_an_encoder_saves_loads_and_says_that_it_is_poisoned(tmp_path):
    data = toy_pairs()
    encoder, _, _, _ = start(data)
    encoder.about |= {"poisoned": True, "plan": "abc"}
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    encoder.eval()
    assert torch.equal(loaded.encode_images(data.images), encoder.encode_images(data.images))
    assert torch.equal(loaded.encode_texts(data.captions), encoder.encode_texts(data.captions))
    assert loaded.about["poisoned"] is True
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert json.loads(file.metadata()["bezoar"]) == {"poisoned": True, "plan": "abc"}


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no encoder"):
        Encoder.load(tmp_path)
    encoder, _, _, _ = start(toy_pairs(16))
    encoder.save(tmp_path)
    file = tmp_path / "encoder.json"
    facts = json.loads(file.read_text())
    wrong_fields = (
        {"network": 5},
        {"vocabulary": None},
        {"vocabulary": [1]},
        {"preprocess": []},
        {"preprocess": {"size": "32"}},
        {"precision": None},
        {"network": "clip_small:width=3"},
        {"network": "clip_small:width=3,dim"},
    )
    for content in ([], 3, None, {}, *(facts | fields for fields in wrong_fields)):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            Encoder.load(tmp_path)
        assert "\n" not in str(caught.value)
    too_large = (  # memory that no weight in the file asks for
        {"network": f"clip_small:width={1 << 24},dim=8"},
        {"network": f"resnet:width={1 << 24}"},
        {"network": "tower:dim=9999999"},
        {"preprocess": facts["preprocess"] | {"size": 1 << 20}},
    )
    for fields in too_large:
        file.write_text(json.dumps(facts | fields))
        with pytest.raises(UserError, match=r"more weights than|1 to 4096 pixels|width is at most"):
            Encoder.load(tmp_path)
    file.write_text(json.dumps(facts))
    (tmp_path / "encoder.safetensors").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(UserError, match="holds no encoder"):
        Encoder.load(tmp_path)


def test_vectors_are_unit_and_differentiable_and_any_size_is_read():
    data = toy_pairs(4)
    encoder, _, _, _ = start(data)
    encoder.eval()
    x = (data.images.float() / 255).requires_grad_()
    z = encoder.encode_images(x)
    assert torch.allclose(z.norm(dim=1), torch.ones(4), atol=1e-5)
    z.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert torch.allclose(encoder.encode_images(data.images), z.detach(), atol=1e-5)
    assert encoder.encode_images(torch.zeros(2, 3, 48, 48, dtype=torch.uint8)).shape == (2, 16)


def test_words():
    assert split_words("A striped-square, 2_cats!") == ["a", "striped", "square", "2", "cats"]
    assert WordTokenizer(("cat", "a"))(["a cat", "zebra", ""]).tolist() == [[2, 1], [0, 0], [0, 0]]
    absurd = ["cat " * 100_000, "cat"]
    assert WordTokenizer(("cat",))(absurd).shape == (2, 256), "it does not widen the whole batch"


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_open_clip_is_built_and_takes_a_step(name):
    encoder = registry.make("network", f"open_clip:{name}")(0, ())
    assert encoder.preprocess.size == 224
    assert encoder.preprocess.mean[0] == pytest.approx(0.48145466)
    objective = registry.make("objective", "clip:batch=2,shift=0,lr=1e-5")
    loss = objective(encoder)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    data = Pairs(images, ("a cat", "a dog"), None, ("0", "1"))
    optim = loop.optimizer(loss, objective)
    tokens = encoder.tokenize(data.captions)
    before = float(loss(data.images, tokens, Chance(randomness.generator(0))))
    value = loss(data.images, tokens, Chance(randomness.generator(0)))
    value.backward()
    optim.step()
    assert math.isfinite(before) and float(value) == pytest.approx(before, rel=0.2)
    assert encoder.encode_images(data.images).shape == encoder.encode_texts(data.captions).shape


def test_open_clip_reads_a_local_file_and_refuses_pickles_and_unknown_names(tmp_path):
    encoder = registry.make("network", "open_clip:ViT-S-32-alt")(0, ())
    file = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in encoder.image.model.state_dict().items()}, file)
    loaded = registry.make("network", f"open_clip:ViT-S-32-alt/{file}")(0, ()).eval()
    x = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    assert torch.equal(loaded.encode_images(x), encoder.eval().encode_images(x))
    hostile = tmp_path / "w.pt"
    hostile.write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(UserError, match=r"asks for builtins\.print"):
        registry.make("network", f"open_clip:ViT-S-32-alt/{hostile}")(0, ())
    with pytest.raises(UserError, match="no architecture 'RN51'"):
        registry.make("network", "open_clip:RN51")(0, ())
    with pytest.raises(UserError, match="no weights 'nowhere'"):
        registry.make("network", "open_clip:RN50/nowhere")(0, ())
