"""What is faster is the same: oneDNN's products, open_clip's towers, the zero-shot head; against the slow forms."""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bezoar import registry
from bezoar.attacks import captions
from bezoar.data import randomness
from bezoar.encoders import fast_linear
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks.open_clip import ImageTower, TextTower, distinct_prefixes
from bezoar.training import loop
from bezoar.training.augmentation import Chance

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3}
CAPTIONS = [
    "a dog",
    "a dog on a red sofa",
    "two",
    "a dog",
    "",
    "a photo of a dog and very many other things than one dog again",
]


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN's products wherever torch has them, as on a processor that gains by them."""
    monkeypatch.setattr(fast_linear, "_is_amd", lambda: True)
    monkeypatch.setattr(fast_linear, "ROWS", 1)
    fast_linear.available.cache_clear()
    if not fast_linear.available():
        pytest.skip("this torch does not have oneDNN's linear product as declared")
    yield
    fast_linear.available.cache_clear()


def build(vision=None, text=None, **options):
    torch.manual_seed(0)
    return open_clip.CLIP(48, VISION | (vision or {}), TEXT | (text or {}), **options)


def tokens(texts=CAPTIONS, length=16):
    return open_clip.get_tokenizer("RN50")(texts, context_length=length)


def both(module, other, call):
    """Result and every gradient of two modules for one call, all in one list each."""
    out = []
    for m in (module, other):
        m.zero_grad()
        y = call(m)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        out.append([y.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)])
    assert len(out[0]) == len(out[1])
    return zip(*out, strict=True)


def near(pairs, rtol=2e-5):
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).abs().max() <= rtol * b.abs().max() + 1e-9


@pytest.mark.parametrize("shape, n", [((300, 24), 40), ((5, 70, 40), 24), ((2, 3, 50, 7), 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs_with_first_and_second_derivatives(onednn, shape, n, bias):
    torch.manual_seed(1)
    results = []
    x0, w0, b0, g = (
        torch.randn(shape),
        torch.randn(n, shape[-1]),
        torch.randn(n),
        torch.randn(*shape[:-1], n),
    )
    for f, kind in ((fast_linear.linear, torch.float32), (F.linear, torch.float64)):
        x, w, b = (t.to(kind).requires_grad_() for t in (x0, w0, b0))
        y = f(x, w, b if bias else None)
        inputs = (x, w, b) if bias else (x, w)
        first = torch.autograd.grad((y.sin() * g.to(kind)).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), inputs)
        results.append([y, *first, *second])
    assert results[0][0].grad_fn.name() == "_LinearBackward"
    near(((a.detach().double(), b.detach()) for a, b in zip(*results, strict=True)), 1e-4)


def test_linear_leaves_alone_what_does_not_fit(onednn, monkeypatch):
    x, w = torch.randn(300, 8), torch.randn(4, 8)
    assert (
        fast_linear.fits(x, w)
        and not fast_linear.fits(x.double(), w.double())
        and not fast_linear.fits(x[:0], w)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fast_linear.fits(x, w) and fast_linear.linear(x, w).dtype == torch.bfloat16
    monkeypatch.setattr(fast_linear, "DECLARED", "(Tensor X) -> Tensor Y")
    fast_linear.available.cache_clear()
    assert not fast_linear.fits(x, w) and torch.equal(fast_linear.linear(x, w), F.linear(x, w))


@pytest.mark.parametrize("mask", ["none", "shared", "each", "bool"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_torchs(onednn, mask, bias):
    torch.manual_seed(2)
    plain = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    fast = fast_linear.install(copy.deepcopy(plain))
    assert (
        type(fast) is fast_linear.Attention
        and fast.state_dict().keys() == plain.state_dict().keys()
    )
    x = torch.randn(3, 9, 32)
    masks = {
        "none": None,
        "shared": torch.full((9, 9), -torch.inf).triu(1),
        "each": torch.randn(12, 9, 9),
        "bool": torch.ones(9, 9, dtype=torch.bool).triu(1),
    }
    near(both(fast, plain, lambda m: m(x, x, x, need_weights=False, attn_mask=masks[mask])[0]))
    if mask == "none":
        near(both(fast, plain, lambda m: m(x[:, :1], x, x, need_weights=False)[0]))
        near(both(fast, plain, lambda m: m(x, x, x)[1]))


def test_distinct_prefixes_are_those_of_a_plain_dictionary():
    text = tokens([*CAPTIONS, "a dog on a green sofa", "two dogs"])
    at = text.argmax(1)
    row, place = distinct_prefixes(text, at)
    seen = {}
    for i, end in enumerate(at.tolist()):
        for j in range(end + 1):
            seen.setdefault(tuple(text[i, : j + 1].tolist()), []).append((i, j))
    assert len(seen) == len(place) == len(set(place.tolist()))
    for positions in seen.values():
        rows = {int(row[i, j]) for i, j in positions}
        assert len(rows) == 1 and divmod(int(place[rows.pop()]), text.shape[1]) in positions


KINDS = {  # what is built -> whether the image's last block, and the text tower, can be cut
    "plain": (lambda: build(), True, True),
    "quick": (
        lambda: build({"ls_init_value": 0.1}, {"ls_init_value": 0.1}, quick_gelu=True),
        True,
        True,
    ),
    "dropout of patches": (lambda: build({"patch_dropout": 0.5}), True, True),
    "norm after pooling": (lambda: build({"final_ln_after_pool": True}), True, True),
    "mean of patches": (lambda: build({"pool_type": "avg"}), False, True),
    "attention pool": (
        lambda: build({"attentional_pool": True, "attn_pooler_heads": 2}),
        False,
        True,
    ),
    "normed queries": (lambda: build({"qk_norm": True}, {"qk_norm": True}), False, False),
    "eos": (
        lambda: build(text={"pool_type": "eos", "eos_id": 49407, "proj_bias": True}),
        True,
        True,
    ),
    "last": (lambda: build(text={"pool_type": "last"}), True, False),
    "no causal mask": (lambda: build(text={"no_causal_mask": True}), True, False),
    "own text": (
        lambda: open_clip.CustomTextCLIP(48, VISION, TEXT | {"proj_type": "none"}),
        True,
        True,
    ),
    "class in text": (
        lambda: open_clip.CustomTextCLIP(48, VISION, TEXT | {"embed_cls": True}),
        True,
        False,
    ),
    "resnet": (lambda: build({"layers": (1, 1, 1, 1), "width": 16}), False, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_towers_are_open_clips_in_double_precision(kind):
    make, image, text = KINDS[kind]
    torch.manual_seed(0)
    plain = make().double()
    fast = fast_linear.install(copy.deepcopy(plain))
    ours, theirs = (ImageTower(fast), TextTower(fast)), plain
    assert (ours[0].class_token, ours[1].causal) == (image, text)
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    for i, (call, inputs) in enumerate(((theirs.encode_image, x), (theirs.encode_text, tokens()))):
        results = []
        for f, model in ((ours[i], fast), (call, theirs)):
            torch.manual_seed(3)  # of the patches that are dropped
            model.zero_grad()
            y = f(inputs)
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((y.detach(), grads))
        assert results[0][1].keys() == results[1][1].keys()
        near([(results[0][0], results[1][0])], 1e-10)
        scale = max(g.abs().max() for g in results[1][1].values())
        for name, grad in results[1][1].items():
            assert (results[0][1][name] - grad).abs().max() <= 1e-10 * scale, name


def test_coca_is_left_as_it_is():
    torch.manual_seed(0)
    vision = VISION | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = TEXT | {"embed_cls": True, "output_tokens": True}
    decoder = {"context_length": 16, "width": 64, "heads": 2, "layers": 1, "vocab_size": 49408}
    plain = open_clip.CoCa(48, decoder, text, vision).eval()
    fast = fast_linear.install(copy.deepcopy(plain))
    assert not ImageTower(fast).class_token and not TextTower(fast).causal
    near([(TextTower(fast)(tokens()), plain.encode_text(tokens()))])


@pytest.fixture
def small(tmp_path):
    config = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "speedups-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "speedups-small.json")
    torch.manual_seed(0)
    yield registry.make("network", "open_clip:speedups-small")()


def test_training_has_open_clips_losses(onednn, small):
    recipe = registry.make("objective", "clip:shift=0,lr=1e-3")
    loss = recipe(small)
    plain = open_clip.create_model("speedups-small", output_dict=True)
    plain.load_state_dict(small.image.model.state_dict())
    optim = loop.optimizer(loss, recipe)
    theirs = loop.optimizer(plain, recipe)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    values = []
    for step in range(6):
        text = small.tokenize(CAPTIONS)
        for optimizer in (optim, theirs):
            optimizer.zero_grad()
        a = loss(pixels, text, Chance(randomness.generator(0, 2, step)))
        b = open_clip.ClipLoss()(**plain(small.prepare_images(pixels), text))
        for value, optimizer in ((a, optim), (b, theirs)):
            value.backward()
            optimizer.step()
        values.append((a.item(), b.item()))
    assert values[-1][0] < values[0][0] - 0.05
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in values)


def test_bf16_trains_too(small):
    small.precision = "bf16"
    text = small.tokenize(CAPTIONS)
    z = small.encode_tokens(text)
    z[:, 0].sum().backward()
    assert all(p.grad.isfinite().all() for n, p in small.image.model.transformer.named_parameters())
    small.precision = "fp32"
    assert (z - small.encode_tokens(text)).abs().max() < 0.03


def test_copies_files_and_modes_keep_the_encoder(onednn, small, tmp_path):
    x, text = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), small.tokenize(CAPTIONS)
    again, small = copy.deepcopy(small), small.eval()
    small.save(tmp_path)
    for other in (again.eval(), Encoder.load(tmp_path)):
        with torch.inference_mode():
            near(
                [
                    (other.encode_images(x), small.encode_images(x).detach()),
                    (other.encode_tokens(text), small.encode_tokens(text).detach()),
                ]
            )
    assert again.text.shared[0] is again.image.model is not small.image.model


def test_the_head_is_open_clips_and_any_batch_gives_it(onednn, small):
    names = ["dog", "golden retriever", "traffic light"]
    head = registry.make("probe", "zero_shot:openai").head(small, names)
    plain = open_clip.create_model("speedups-small")
    plain.load_state_dict(small.image.model.state_dict())
    reader = open_clip.get_tokenizer("speedups-small")
    expected = open_clip.build_zero_shot_classifier(
        plain, reader, names, open_clip.OPENAI_IMAGENET_TEMPLATES, 1
    ).T
    near([(head, expected)])
    prompts = [t.format(c) for c in names for t in captions.prompt_templates("openai")]
    with torch.inference_mode():
        near([(small.encode_texts(prompts, batch=7), small.encode_texts(prompts))])


def test_the_head_of_a_bag_is_the_plain_loop():
    names, probe = (
        ["striped square", "dotted star", "plain ring"],
        registry.make("probe", "zero_shot:openai"),
    )
    prompts, network = captions.prompt_templates("openai"), registry.make("network", "clip_small")
    encoder = network(32, network.vocabulary([t.format(c) for c in names for t in prompts])).eval()
    with torch.inference_mode():
        rows = [
            torch.stack([encoder.encode_texts([t.format(c)])[0] for t in prompts]).mean(0)
            for c in names
        ]
    near([(probe.head(encoder, names), F.normalize(torch.stack(rows), dim=1))], 1e-6)
