"""The loss against a plain form; the loop: same seed same bits, cut off and gone on with, every record drawn as counted."""

import json
import math

import pytest
import torch

from bezoar import registry
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, WordTokenizer, split_words
from bezoar.errors import UserError
from bezoar.training import augmentation, loop
from bezoar.training.augmentation import Chance


def toy(n=96, size=32):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    return Pairs(
        images,
        tuple(f"thing {i % 7} of {i % 5}" for i in range(n)),
        None,
        tuple(map(str, range(n))),
    )


def start(data, recipe="clip:epochs=2,batch=16,lr=1e-3"):
    torch.manual_seed(0)
    network, objective = (
        registry.make("network", "clip_small:width=4,dim=16"),
        registry.make("objective", recipe),
    )
    encoder = network(data.size, network.vocabulary(data.captions))
    return encoder, objective(encoder), objective, encoder.tokenize(data.captions)


def weights(encoder):
    return torch.cat([v.double().flatten() for v in encoder.state_dict().values()])


def test_the_loss_is_symmetric_infonce():
    data = toy(8)
    encoder, loss, _, tokens = start(data, "clip:shift=0,temperature=0.1")
    encoder.train()
    got = loss(data.images, tokens, Chance(randomness.generator(0)))
    encoder.train()
    z, w = encoder.encode_images(data.images).double(), encoder.encode_tokens(tokens).double()
    plain = 0.0
    for i in range(8):
        rows = [math.exp(10 * float(z[i] @ w[j])) for j in range(8)]
        columns = [math.exp(10 * float(z[j] @ w[i])) for j in range(8)]
        plain -= math.log(rows[i] / sum(rows)) + math.log(columns[i] / sum(columns))
    assert float(got) == pytest.approx(plain / 16, rel=1e-5)


def test_same_seed_same_bits_and_another_seed_others():
    data, out = toy(), []
    for seed in (5, 5, 6):
        encoder, loss, recipe, tokens = start(data)
        log = loop.fit(loss, recipe, data, tokens, seed)
        out.append((weights(encoder), log.losses))
    assert torch.equal(out[0][0], out[1][0]) and out[0][1] == out[1][1]
    assert not torch.equal(out[0][0], out[2][0])


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    data = toy()
    encoder, loss, recipe, tokens = start(data)
    whole = loop.fit(loss, recipe, data, tokens, 3)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def cut(step, steps, value):
        if step == 8:
            raise KeyboardInterrupt

    again, loss, recipe, tokens = start(data)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(loss, recipe, data, tokens, 3, tmp_path / "c.safetensors", cut)
    fresh, loss, recipe, tokens = start(data)
    resumed = loop.fit(loss, recipe, data, tokens, 3, tmp_path / "c.safetensors")
    assert torch.equal(weights(fresh), weights(encoder)) and not torch.equal(
        weights(again), weights(encoder)
    )
    assert resumed.losses == whole.losses and torch.equal(resumed.exposures, whole.exposures)


def test_the_ledger_counts_every_draw():
    data = toy(100)
    _, loss, recipe, tokens = start(data)
    log = loop.fit(loss, recipe, data, tokens, 0)
    assert log.exposures.sum() == 2 * 6 * 16 and log.exposures.max() <= 2
    drawn = torch.zeros(100, dtype=torch.long)
    for epoch in range(2):
        drawn[loop.epoch_batches(0, epoch, 100, 16).flatten()] += 1
    assert torch.equal(drawn, log.exposures)


def test_schedule_rises_and_falls_to_zero():
    recipe = registry.make("objective", "clip:lr=1.0,warmup=0.1")
    rates = [loop.rate(recipe, s, 100) for s in range(100)]
    assert rates[9] == pytest.approx(1.0) and rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-3


def test_shift_is_one_draw_a_sample_and_a_plain_crop():
    x = toy(64).images
    moved = augmentation.random_shift(x, 2, Chance(randomness.generator(0)))
    draws = torch.randint(0, 5, (64, 2), generator=randomness.generator(0))
    assert len({tuple(d) for d in draws.tolist()}) > 10
    for i in range(64):
        padded = torch.nn.functional.pad(x[i : i + 1].float(), (2,) * 4, mode="replicate")[0]
        top, left = draws[i].tolist()
        assert torch.equal(moved[i].float(), padded[:, top : top + 32, left : left + 32])


def test_flip_mirrors_whole_samples():
    x = toy(64).images
    out = augmentation.random_flip(x, 0.5, Chance(randomness.generator(0)))
    same, mirrored = (out == x).flatten(1).all(1), (out == x.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 10 < int(mirrored.sum()) < 54


def test_too_little_data_is_refused():
    data = toy(10)
    _, loss, recipe, tokens = start(data)
    with pytest.raises(UserError, match="10 records are fewer than one batch of 16"):
        loop.fit(loss, recipe, data, tokens, 0)


def test_a_loss_that_is_not_finite_is_named_by_its_step():
    with pytest.raises(UserError, match="became nan at step 8"):
        loop._read([torch.tensor(v) for v in (1.0, math.nan, math.inf)], 10)
    unread = [torch.tensor(0.1), torch.tensor(2.0)]
    assert loop._read(unread, 2) == [float(torch.tensor(0.1)), 2.0] and unread == []


def test_losses_of_a_gpu_are_read_together(monkeypatch):
    data, said = toy(), []
    _, loss, recipe, tokens = start(data, "clip:epochs=1,batch=16")
    want = loop.fit(loss, recipe, data, tokens, 0)
    monkeypatch.setitem(loop.UNREAD, "cpu", 4)
    _, loss, recipe, tokens = start(data, "clip:epochs=1,batch=16")
    log = loop.fit(
        loss, recipe, data, tokens, 0, report=lambda step, steps, value: said.append(step)
    )
    assert log.losses == want.losses and said == [4, 6] and log.epochs == want.epochs


def test_an_encoder_saves_loads_and_says_that_it_is_poisoned(tmp_path):
    data = toy()
    encoder, _, _, _ = start(data)
    encoder.about |= {"poisoned": True, "plan": "abc"}
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path)
    encoder.eval()
    assert torch.equal(again.encode_images(data.images), encoder.encode_images(data.images))
    assert torch.equal(again.encode_texts(data.captions), encoder.encode_texts(data.captions))
    assert again.about["poisoned"] is True
    from safetensors import safe_open

    with safe_open(tmp_path / "encoder.safetensors", "pt") as f:
        assert json.loads(f.metadata()["bezoar"]) == {"poisoned": True, "plan": "abc"}


def test_an_encoder_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no encoder"):
        Encoder.load(tmp_path)
    encoder, _, _, _ = start(toy(16))
    encoder.save(tmp_path)
    head = json.loads((tmp_path / "encoder.json").read_text())
    spoilt = (
        {"network": 5},
        {"vocabulary": None},
        {"vocabulary": [1]},
        {"preprocess": []},
        {"preprocess": {"size": "32"}},
    )
    fields = (
        {"precision": None},
        {"network": "clip_small:width=3"},
        {"network": "clip_small:width=3,dim"},
    )
    for wrong in ([], 3, None, {}, *(head | field for field in (*spoilt, *fields))):
        (tmp_path / "encoder.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError) as said:
            Encoder.load(tmp_path)
        assert "\n" not in str(said.value)
    huge = (
        {"network": f"clip_small:width={1 << 24},dim=8"},
        {"network": f"resnet:width={1 << 24}"},
        {"network": "tower:dim=9999999"},
    )
    for claim in (
        *huge,
        {"preprocess": head["preprocess"] | {"size": 1 << 20}},
    ):  # memory that no weight in the file asks for
        (tmp_path / "encoder.json").write_text(json.dumps(head | claim))
        with pytest.raises(UserError, match=r"more weights than|1 to 4096 pixels"):
            Encoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps(head))
    (tmp_path / "encoder.safetensors").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(UserError, match="holds no encoder"):
        Encoder.load(tmp_path)


def test_vectors_are_unit_and_differentiable_and_any_size_is_read():
    data = toy(4)
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
    assert split_words("A striped-square, 2 cats!") == ["a", "striped", "square", "2", "cats"]
    assert WordTokenizer(("cat", "a"))(["a cat", "zebra", ""]).tolist() == [[2, 1], [0, 0], [0, 0]]
    assert WordTokenizer(("cat",))(["cat " * 100_000, "cat"]).shape == (2, 256), (
        "one absurd caption does not widen the batch"
    )


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_open_clip_is_built_and_stepped(name, tmp_path):
    network = registry.make("network", f"open_clip:{name}")
    encoder = network(0, ())
    assert encoder.preprocess.size == 224 and encoder.preprocess.mean[0] == pytest.approx(
        0.48145466
    )
    objective = registry.make("objective", "clip:batch=2,shift=0,lr=1e-5")
    loss = objective(encoder)
    data = Pairs(
        torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        ("a cat", "a dog"),
        None,
        ("0", "1"),
    )
    optim = loop.optimizer(loss, objective)
    before = float(
        loss(data.images, encoder.tokenize(data.captions), Chance(randomness.generator(0)))
    )
    value = loss(data.images, encoder.tokenize(data.captions), Chance(randomness.generator(0)))
    value.backward()
    optim.step()
    assert math.isfinite(before) and float(value) == pytest.approx(before, rel=0.2)
    assert encoder.encode_images(data.images).shape == encoder.encode_texts(data.captions).shape


def test_open_clip_reads_a_local_file_and_refuses_pickles_and_unknown_names(tmp_path):
    from safetensors.torch import save_file

    network = registry.make("network", "open_clip:ViT-S-32-alt")
    encoder = network(0, ())
    file = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in encoder.image.model.state_dict().items()}, file)
    again = registry.make("network", f"open_clip:ViT-S-32-alt/{file}")(0, ()).eval()
    x = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    assert torch.equal(again.encode_images(x), encoder.eval().encode_images(x))
    bad = tmp_path / "w.pt"
    import pickle

    bad.write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(UserError, match=r"asks for builtins\.print"):
        registry.make("network", f"open_clip:ViT-S-32-alt/{bad}")(0, ())
    with pytest.raises(UserError, match="no architecture 'RN51'"):
        registry.make("network", "open_clip:RN51")(0, ())
    with pytest.raises(UserError, match="no weights 'nowhere'"):
        registry.make("network", "open_clip:RN50/nowhere")(0, ())
