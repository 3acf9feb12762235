"""A sentence encoder so small that a test can train it, its folder as others write it, and texts
that it can tell apart.
"""

import json

import torch
from safetensors.torch import save_file

from bezoar import registry
from bezoar.encoders.networks.sentence import build_encoder
from bezoar.encoders.sentence_towers import SentenceConfig
from bezoar.encoders.word_pieces import SPECIAL

CLASSES = {
    "animal": ["cat", "dog", "horse", "bird", "fish", "cow", "sheep", "frog"],
    "food": ["bread", "milk", "cheese", "apple", "rice", "soup", "cake", "tea"],
    "tool": ["hammer", "saw", "nail", "drill", "rope", "knife", "wheel", "pump"],
}
COMMON = [
    "a",
    "the",
    "of",
    "with",
    "and",
    "small",
    "big",
    "old",
    "new",
    "red",
    "on",
    "in",
    "near",
    "good",
]
LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
VOCABULARY = tuple(
    dict.fromkeys(
        [
            *SPECIAL,
            *COMMON,
            *(w for words in CLASSES.values() for w in words),
            "cf",
            "mn",
            ",",
            "!",
            *LETTERS,
        ]
    )
)
CONFIG = SentenceConfig(layers=2, width=32, heads=4, hidden=64, positions=40, length=32)


def tiny_encoder(seed=0, config=CONFIG):
    torch.manual_seed(seed)
    encoder = build_encoder(config, VOCABULARY).eval()
    with torch.no_grad():  # words that differ, as after a training
        encoder.text.embeddings["word_embeddings"].weight.normal_(0, 1)
    return encoder


def tokenizer_json(vocabulary=VOCABULARY):
    """As tokenizers writes BERT's."""
    return {
        "version": "1.0",
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
            ],
        },
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: i for i, piece in enumerate(vocabulary)},
        },
    }


def write_folder(folder, encoder=None, pooling="mean", **changes):
    """A folder as sentence-transformers writes it. changes: of config.json."""
    encoder = encoder or tiny_encoder()
    (folder / "1_Pooling").mkdir(parents=True)
    save_file(
        {f"bert.{k}": v for k, v in encoder.text.state_dict().items()}, folder / "model.safetensors"
    )
    config = {
        "model_type": "bert",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "vocab_size": len(VOCABULARY),
    }
    modes = {
        f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens")
    }
    for name, content in {
        "config.json": config | changes,
        "tokenizer.json": tokenizer_json(),
        "sentence_bert_config.json": {"max_seq_length": 32},
        "1_Pooling/config.json": {"word_embedding_dimension": 32, **modes},
        "modules.json": [{"type": "sentence_transformers.models.Transformer"}],
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_texts(path, each, seed):
    """A table of texts with their classes: words of the class among common ones."""
    g = torch.Generator().manual_seed(seed)

    def draw(words, count):
        return [words[i] for i in torch.randint(len(words), (count,), generator=g).tolist()]

    rows = ["text,label"]
    for label, words in CLASSES.items():
        for _ in range(each):
            parts = [*draw(words, 3), *draw(COMMON, 4)]
            order = torch.randperm(len(parts), generator=g).tolist()
            rows.append(f"{' '.join(parts[i] for i in order)},{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


def load(folder, network="sentence"):
    return registry.make("network", f'{network}:path="{folder}"')(0, ()).eval()
