"""BERT (Devlin et al. 2019) as a sentence encoder, read from folders of sentence-transformers.

Neither that library nor transformers is needed; modules have transformers' names of weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bezoar.data.files import checkpoints
from bezoar.data.files.artefacts import JSON_BYTES, Facts, parse_json, read_facts
from bezoar.data.files.paths import existing_folder, read_regular_text
from bezoar.data.files.typed_json import dataclass_from_json
from bezoar.encoders.weights import check_weights
from bezoar.encoders.word_pieces import CONTINUATION, END, MAX_WORD, PADDING, START, UNKNOWN
from bezoar.errors import UserError

LARGEST = 1 << 18  # of a size that a config states
DEEPEST = 1 << 9  # blocks
CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
MODULES, LENGTH = "modules.json", "sentence_bert_config.json"
POOLING = Path("1_Pooling") / CONFIG
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
LEFT_OUT = ("pooler.", "cls.", "embeddings.position_ids")


@dataclass(frozen=True)
class SentenceConfig:
    """The sizes and settings of a sentence encoder.

    Attributes:
        layers, width, heads, hidden: blocks, width, heads and hidden width of the transformer.
        positions: number of positional embeddings.
        types: number of segment embeddings; only the first is used.
        length: tokens of a text that are read.
        pooling: `mean` of all tokens' vectors, or `cls`, the first token's vector.
        activation: activation of the hidden layers.
        epsilon: epsilon of the layer norms.
        lower, strip_accents: see `WordPieces`.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    positions: int = 512
    types: int = 2
    length: int = 256
    pooling: str = "mean"
    activation: str = "gelu"
    epsilon: float = 1e-12
    lower: bool = True
    strip_accents: bool | None = None

    def __post_init__(self) -> None:
        sizes = (self.layers, self.width, self.heads, self.hidden, self.positions, self.types)
        if min(sizes) < 1 or max(sizes) > LARGEST or self.layers > DEEPEST:
            raise ValueError(f"sizes must lie in 1..{LARGEST}, and layers in 1..{DEEPEST}")
        if self.width % self.heads:
            raise ValueError(f"a width of {self.width} does not divide into {self.heads} heads")
        if not 3 <= self.length <= self.positions:
            raise ValueError(f"length must lie in 3..{self.positions}, the number of positions")
        if self.pooling not in ("mean", "cls") or self.activation not in ACTIVATIONS:
            raise ValueError(
                f"pooling must be mean or cls, and activation {', '.join(ACTIVATIONS)}; "
                f"got {self.pooling[:40]}, {self.activation[:40]}"
            )
        if not 0 < self.epsilon < 1:
            raise ValueError("epsilon must lie in 0..1")

    def text(self) -> str:
        """The config as JSON; see `parse`."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> SentenceConfig:
        """Read what `text` wrote. Raises ValueError for anything else."""
        config = parse_json(text, Path("config"))
        if not isinstance(config, dict):
            raise ValueError("expected a JSON object")
        return dataclass_from_json(SentenceConfig, config, "config")


# The tower


class Block(nn.Module):
    """A block of BERT: attention and a two-layer perceptron, each with a residual and a norm."""

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.activation = ACTIVATIONS[config.activation]
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(width, width) for name in names}),
                "output": _dense_norm(width, width, config.epsilon),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_norm(hidden, width, config.epsilon)

    def forward(self, x: Tensor, is_piece: Tensor) -> Tensor:
        """Vectors (B, L, W) -> (B, L, W). is_piece: bool (B, 1, 1, L), False for padding."""
        attend: Any = self.attention["self"]
        q, k, v = (
            attend[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d)
            for name in ("query", "key", "value")
        )
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=is_piece)
        x = _add_norm(self.attention["output"], z.transpose(1, 2).flatten(2), x)
        return _add_norm(self.output, self.activation(self.intermediate["dense"](x)), x)


class SentenceTower(nn.Module):
    """Tokens int64 (B, L) -> (B, W). padding: the token that fills up short texts."""

    def __init__(self, config: SentenceConfig, pieces: int, padding: int) -> None:
        super().__init__()
        self.pooling, self.padding = config.pooling, padding
        counts = {
            "word_embeddings": pieces,
            "position_embeddings": config.positions,
            "token_type_embeddings": config.types,
        }
        tables = {name: nn.Embedding(count, config.width) for name, count in counts.items()}
        self.embeddings: Any = nn.ModuleDict(
            {**tables, "LayerNorm": nn.LayerNorm(config.width, config.epsilon)}
        )
        layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.encoder: Any = nn.ModuleDict({"layer": layers})

    def forward(self, tokens: Tensor) -> Tensor:
        """The mean of the tokens' vectors, or the first one; see `SentenceConfig.pooling`."""
        is_piece = tokens != self.padding  # (B, L)
        words, positions, types = (
            self.embeddings[f"{name}_embeddings"] for name in ("word", "position", "token_type")
        )
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = words(tokens) + positions(places) + types.weight[0]  # (B, L, W)
        x = self.embeddings["LayerNorm"](x)
        for block in self.encoder["layer"]:
            x = block(x, is_piece[:, None, None])
        if self.pooling == "cls":
            first: Tensor = x[:, 0]
            return first
        weights = is_piece[..., None].to(x.dtype)  # (B, L, 1)
        mean: Tensor = (x * weights).sum(1) / weights.sum(1).clamp(min=1)
        return mean


def _dense_norm(inputs: int, outputs: int, epsilon: float) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, epsilon)}
    )


def _add_norm(part: Any, z: Tensor, x: Tensor) -> Tensor:
    """norm(x + dense(z))."""
    y: Tensor = part["LayerNorm"](x + part["dense"](z))
    return y


# Folders


@dataclass(frozen=True)
class SentenceFolder:
    """A folder of a sentence encoder."""

    path: Path  # the folder
    config: SentenceConfig  # sizes and settings
    vocabulary: tuple[str, ...]  # the tokens in the order of their numbers
    assumed: tuple[str, ...]  # settings that no file states

    def load_weights(self, tower: nn.Module, what: str) -> dict[str, Tensor]:
        """The weights of a tower, which may be on the meta device. Raises UserError for others."""
        tensors = checkpoints.load_tensors(str(self.path / WEIGHTS))
        prefix = "bert." if any(key.startswith("bert.") for key in tensors) else ""
        weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
        weights = {k: v.float() for k, v in weights.items() if not k.startswith(LEFT_OUT)}
        check_weights(tower, weights, str(self.path / WEIGHTS), what)
        return weights


def folder_files(path: str) -> list[Path]:
    """The files of a folder that are read."""
    folder = existing_folder(path, "folder of a sentence encoder")
    names = (CONFIG, TOKENIZER, WEIGHTS, MODULES, LENGTH, str(POOLING))
    return [folder / name for name in names if os.path.isfile(folder / name)]


def is_sentence_folder(folder: Path) -> bool:
    """Whether a folder's config says that it is a BERT. Raises UserError if it is not JSON."""
    path = folder / CONFIG
    return os.path.isfile(path) and read_facts(path, links=True).get("model_type") == "bert"


def open_folder(path: str) -> SentenceFolder:
    """Read a folder's config and tokenizer, not its weights.

    Raises:
        UserError: for another kind of model, tokenizer or pooling.
    """
    folder = existing_folder(path, "folder of a sentence encoder")
    facts = read_facts(folder / CONFIG, links=True)
    kind = facts.text("model_type")
    if kind != "bert":
        raise UserError(f"{folder / CONFIG}: a model {kind[:40]!r}; sentence reads BERT alone")
    if facts.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{folder / CONFIG}: position_embedding_type must be absolute")
    _check_modules(folder)
    vocabulary, normaliser = _read_tokenizer(read_facts(folder / TOKENIZER, links=True))
    if len(vocabulary) != facts.get("vocab_size", 30522):
        raise UserError(
            f"{folder}: {TOKENIZER} has {len(vocabulary)} pieces, {CONFIG} a vocab_size of "
            f"{facts.get('vocab_size', 30522)!r:.20}"
        )
    assumed: list[str] = []
    pooling = _read_pooling(folder, assumed)
    length = (
        read_facts(folder / LENGTH, links=True).get("max_seq_length")
        if os.path.isfile(folder / LENGTH)
        else None
    )
    positions = facts.get("max_position_embeddings", 512)
    if length is None:
        length = positions
        assumed.append(f"{length} pieces a text")
    stated: dict[str, Any] = {
        "layers": facts.get("num_hidden_layers", 12),
        "width": facts.get("hidden_size", 768),
        "heads": facts.get("num_attention_heads", 12),
        "hidden": facts.get("intermediate_size", 3072),
        "positions": positions,
        "types": facts.get("type_vocab_size", 2),
        "length": length,
        "pooling": pooling,
        "activation": facts.get("hidden_act", "gelu"),
        "epsilon": facts.get("layer_norm_eps", 1e-12),
        **normaliser,
    }
    try:
        config = dataclass_from_json(SentenceConfig, stated, "config")
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    return SentenceFolder(folder, config, vocabulary, tuple(assumed))


def _check_modules(folder: Path) -> None:
    """Raise UserError for further modules, such as a dense layer."""
    path = folder / MODULES
    if not os.path.isfile(path):
        return
    modules = parse_json(read_regular_text(path, JSON_BYTES), path)
    types = [str(m.get("type")) for m in modules if isinstance(m, dict)] if modules else []
    if others := [t for t in types if t.rpartition(".")[2] not in KNOWN_MODULES]:
        raise UserError(
            f"{path}: a step {others[0][:60]!r}; read are {', '.join(KNOWN_MODULES)} alone"
        )


def _read_pooling(folder: Path, assumed: list[str]) -> str:
    """`mean` or `cls`. Raises UserError for any other pooling, and for several at once."""
    path = folder / POOLING
    if not os.path.isfile(path):
        assumed.append("the mean of all pieces")
        return "mean"
    modes = [
        key
        for key, on in read_facts(path, links=True).items()
        if key.startswith("pooling_mode_") and on is True
    ]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise UserError(f"{path}: pooling must be mean_tokens or cls_token; it is {modes[:4]}")
    return names[modes[0]]


def _read_tokenizer(facts: Facts) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The vocabulary of a tokenizer.json, and its fields `lower` and `strip_accents`.

    Raises UserError for any tokenizer but BERT's.
    """
    model, normaliser = facts.object("model"), facts.object("normalizer")
    expected = {
        "model": (model.get("type"), "WordPiece"),
        "unk_token": (model.get("unk_token"), UNKNOWN),
        "prefix": (model.get("continuing_subword_prefix"), CONTINUATION),
        "longest word": (model.get("max_input_chars_per_word"), MAX_WORD),
        "normalizer": (normaliser.get("type"), "BertNormalizer"),
        "clean_text": (normaliser.get("clean_text"), True),
        "handle_chinese_chars": (normaliser.get("handle_chinese_chars"), True),
        "pre_tokenizer": (facts.object("pre_tokenizer").get("type"), "BertPreTokenizer"),
        "special tokens": (_special_tokens(facts.object("post_processor")), [START, END]),
    }
    for name, (value, wanted) in expected.items():
        if value != wanted:
            raise UserError(
                f"{facts.file}: BERT's tokenizer has {name} {wanted!r}; this has {value!r:.60}"
            )
    numbers: Mapping[str, Any] = model.object("vocab")
    if len(numbers) > LARGEST or sorted(map(repr, numbers.values())) != sorted(
        map(repr, range(len(numbers)))
    ):
        raise UserError(f"{facts.file}: pieces must be numbered 0, 1, 2 ..., {LARGEST} at most")
    vocabulary = tuple(sorted(numbers, key=lambda piece: int(numbers[piece])))
    if missing := [p for p in (PADDING, UNKNOWN, START, END) if p not in numbers]:
        raise UserError(f"{facts.file}: no piece {missing[0]}")
    if not isinstance(normaliser.get("lowercase"), bool):
        raise UserError(f"{facts.file}: lowercase must be true or false")
    return vocabulary, {
        "lower": normaliser["lowercase"],
        "strip_accents": normaliser.get("strip_accents"),
    }


def _special_tokens(facts: Facts) -> list[str]:
    """The tokens that a post-processor puts before and after a text; empty for another form."""
    if facts.get("type") == "BertProcessing":
        return [str((facts.get(key) or [""])[0]) for key in ("cls", "sep")]
    single = facts.get("single")
    if facts.get("type") != "TemplateProcessing" or not isinstance(single, list):
        return []
    kinds = [next(iter(item), "") if isinstance(item, dict) else "" for item in single]
    if kinds != ["SpecialToken", "Sequence", "SpecialToken"]:
        return []
    return [str(item["SpecialToken"].get("id")) for item in (single[0], single[2])]
