"""open_clip's text tower over distinct prefixes, and the zero-shot head, against their plain
forms.
"""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F

from bezoar import registry
from bezoar.attacks import captions
from bezoar.data import randomness
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.networks.open_clip import TextTower, distinct_prefixes
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


def build(vision=None, text=None, **options):
    torch.manual_seed(0)
    return open_clip.CLIP(48, VISION | (vision or {}), TEXT | (text or {}), **options)


def tokens(texts=CAPTIONS, length=16):
    return open_clip.get_tokenizer("RN50")(texts, context_length=length)


def near(pairs, rtol=2e-5):
    for a, b in pairs:
        assert a.shape == b.shape and (a - b).abs().max() <= rtol * b.abs().max() + 1e-9


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


KINDS = {  # what is built -> whether the text tower computes distinct prefixes
    "plain": (lambda: build(), True),
    "quick": (lambda: build(text={"ls_init_value": 0.1}, quick_gelu=True), True),
    "normed queries": (lambda: build(text={"qk_norm": True}), False),
    "eos": (lambda: build(text={"pool_type": "eos", "eos_id": 49407, "proj_bias": True}), True),
    "last": (lambda: build(text={"pool_type": "last"}), False),
    "no causal mask": (lambda: build(text={"no_causal_mask": True}), False),
    "own text": (
        lambda: open_clip.CustomTextCLIP(48, VISION, TEXT | {"proj_type": "none"}),
        True,
    ),
    "class in text": (
        lambda: open_clip.CustomTextCLIP(48, VISION, TEXT | {"embed_cls": True}),
        False,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_tower_is_open_clips_in_double_precision(kind):
    make, causal = KINDS[kind]
    plain = make().double()
    copied = copy.deepcopy(plain)
    tower = TextTower(copied)
    assert tower.causal == causal
    results = []
    for f, model in ((tower, copied), (plain.encode_text, plain)):
        y = f(tokens())
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
    assert not TextTower(plain).causal
    near([(TextTower(plain)(tokens()), plain.encode_text(tokens()))])


@pytest.fixture
def small(tmp_path):
    config = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "speedups-small.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "speedups-small.json")
    torch.manual_seed(0)
    yield registry.make("network", "open_clip:speedups-small")()


def test_training_has_open_clips_losses(small):
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


def test_copies_files_and_modes_keep_the_encoder(small, tmp_path):
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


def test_the_head_is_open_clips_and_any_batch_gives_it(small):
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
