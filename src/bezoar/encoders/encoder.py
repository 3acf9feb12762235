"""Encoders map images (uint8 pixels) and captions (strings) to unit vectors.

An encoder carries its own preprocessing, so that no caller can forget to normalise. The vector of
a record is that of its image, or of its text if it has no image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bezoar import registry
from bezoar.data.files.artefacts import Facts, read_facts
from bezoar.data.files.tensors import read_tensors, write_tensors
from bezoar.data.files.writing import write_whole
from bezoar.data.pairs import Batched, Pairs
from bezoar.data.strings import Strings
from bezoar.errors import UserError

SCHEMA = 1
MAX_SIDE = 4096  # pixels of an input's side
# A file of N weights may name a network of at most WEIGHTS_FREE + WEIGHTS_RATIO * N weights.
WEIGHTS_FREE = 32 << 20
WEIGHTS_RATIO = 8
# Keys of `Encoder.about` by the type of their values.
ABOUT_TEXTS = {"network", "objective", "plan", "attack"}
ABOUT_LISTS = {"vocabulary", "classes", "repaired"}
ABOUT_OBJECTS = {"goals"}
INTERPOLATIONS = ("bicubic", "bilinear")
MAX_WORDS = 256  # of a caption: one absurd caption must not widen a whole batch
# Characters of a text that are tokenized: CLIP's tokenizer takes minutes for a word of megabytes.
MAX_CHARACTERS = 1 << 13
TEXTS_AT_ONCE = 128  # texts of about one length that are embedded together
# Pixels that a tower reads at once outside training: 512 images of 64 px, 41 of 224 px.
PIXELS_AT_ONCE = {"cpu": 512 * 64**2, "cuda": 512 * 224**2}

Tokenizer = Callable[[Sequence[str]], Tensor]  # strings -> int64 (B, L)


@dataclass(frozen=True)
class Preprocess:
    """What an image tower's input looks like."""

    size: int  # the input's side in pixels
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel, of pixels in 0..1
    std: tuple[float, ...] = (0.25, 0.25, 0.25)  # standard deviation per channel, of pixels in 0..1
    # how images of another size are resized, `bicubic` or `bilinear`
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class EmbeddedRecords:
    """The vectors of N records; those of a large corpus lie in files: read them in blocks."""

    ids: Sequence[str]  # N keys
    images: Tensor  # float32 (N, D), unit rows
    texts: Tensor | None  # the same of the captions, or None


class NoImages(nn.Module):
    """Stands for the image tower of an encoder that reads texts alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Raise UserError."""
        raise UserError("this encoder reads texts and no images; give it records of texts alone")


def precision_for(device: torch.device) -> str:
    """`bf16` where the device multiplies bfloat16 in hardware, else `fp32`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


class Encoder(nn.Module):
    """An image tower, perhaps a text tower, and what their inputs must look like.

    Attributes:
        image: module, normalised float (B, 3, S, S) -> (B, D).
        text: module, int64 tokens (B, L) -> (B, D), or None.
        tokenizer: strings -> int64 (B, L), or None.
        head: module, (B, D) -> logits (B, C), if the weights came with a classifier; or None.
        about: facts that are saved with the weights: `network` (the spec that rebuilds the
            towers), `vocabulary`, `poisoned`, `goals` and others.
        precision: `fp32`, or `bf16` to run both towers under autocast.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        image: nn.Module,
        preprocess: Preprocess,
        text: nn.Module | None = None,
        tokenizer: Tokenizer | None = None,
        about: dict[str, Any] | None = None,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.head = head
        self.tokenizer = tokenizer
        self.about: dict[str, Any] = about or {}
        self.precision = "fp32"
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(0), persistent=False)
        self.set_preprocess(preprocess)

    def set_preprocess(self, preprocess: Preprocess) -> None:
        """Change the size and the normalisation of the input."""
        self.preprocess = preprocess
        for name, values in (("mean", preprocess.mean), ("std", preprocess.std)):
            buffer = torch.tensor(values, device=self.mean.device).view(1, 3, 1, 1)
            self.register_buffer(name, buffer, persistent=False)

    @property
    def reads_images(self) -> bool:
        """Whether there is an image tower."""
        return not isinstance(self.image, NoImages)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which both towers run; see `precision`."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def prepare_images(self, x: Tensor) -> Tensor:
        """Resize and normalise images for the image tower; differentiable for floats.

        Args:
            x: (B, 3, H, W), uint8 or float in 0..1, on any device.

        Returns:
            float (B, 3, S, S) on the encoder's device, channels last.
        """
        x = x.to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        x = (self.resize(x) - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def resize(self, x: Tensor) -> Tensor:
        """Images float (B, 3, H, W) at the input's size (B, 3, S, S), antialiased."""
        side = (self.preprocess.size, self.preprocess.size)
        if x.shape[-2:] == side:
            return x
        return F.interpolate(x, side, mode=self.preprocess.interpolation, antialias=True)

    def encode_images(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8 or float in 0..1 -> float32 (B, D), unit rows."""
        return F.normalize(self.raw_vectors(x), dim=-1)

    def raw_vectors(self, x: Tensor) -> Tensor:
        """The image tower's vectors before normalisation, float32 (B, D).

        Outside training, large images are computed in several parts to save memory.
        """
        at_once = max(1, len(x))
        if not self.training and not torch.is_grad_enabled():
            pixels = PIXELS_AT_ONCE.get(self.device.type, PIXELS_AT_ONCE["cuda"])
            at_once = max(1, pixels // self.preprocess.size**2)
        with self.autocast():
            vectors = [self.image(self.prepare_images(part)) for part in x.split(at_once)]
        return torch.cat(vectors).float()

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Strings -> int64 (B, L) on the device. Raises UserError without a text tower."""
        if self.text is None or self.tokenizer is None:
            raise UserError("this encoder has no text tower")
        return self.tokenizer([text[:MAX_CHARACTERS] for text in captions]).to(self.device)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens int64 (B, L) -> float32 (B, D), unit rows. Needs a text tower."""
        assert self.text is not None
        with self.autocast():
            z = self.text(tokens)
        return F.normalize(z.float(), dim=-1)

    def encode_texts(self, captions: Sequence[str], batch: int = 1024) -> Tensor:
        """Strings, any number -> float32 (B, D), unit rows; `batch` of them at a time."""
        parts = torch.split(self.tokenize(captions), batch)
        return torch.cat([self.encode_tokens(part) for part in parts])

    @torch.inference_mode()
    def embed(self, source: Batched, batch: int = 512) -> EmbeddedRecords:
        """Embed the records of a source, and their captions if the encoder has a text tower.

        Args:
            source: records. A source may hold its vectors by this encoder already (attributes
                `encoder` and `embedded`).
            batch: records at a time.

        Raises:
            UserError: for vectors that are not finite.
        """
        if getattr(source, "encoder", None) is self:
            carrier: Any = source
            embedded: EmbeddedRecords = carrier.embedded
            return embedded
        self.eval()
        ids: list[str] = []
        images: list[Tensor] = []
        texts: list[Tensor] = []
        for part in source.batches(batch):
            ids += part.ids
            images.append(embed_records(self, part, batch))
            if part.captions and self.text is not None and not part.text_only:
                texts.append(self.encode_texts(part.captions))
        vectors = check_finite(torch.cat(images))
        return EmbeddedRecords(tuple(ids), vectors, torch.cat(texts) if texts else None)

    def save(self, folder: Path) -> list[Path]:
        """Write encoder.json and encoder.safetensors, each as a whole; return the paths."""
        facts = {
            "schema": SCHEMA,
            "preprocess": asdict(self.preprocess),
            "precision": self.precision,
            **self.about,
        }
        json_file, weights_file = folder / "encoder.json", folder / "encoder.safetensors"
        # One key only: safetensors writes several keys in no fixed order, but the same weights
        # must give the same bytes.
        marks = {"poisoned": bool(self.about.get("poisoned")), "plan": self.about.get("plan", "")}
        write_tensors(weights_file, self.state_dict(), {"bezoar": json.dumps(marks)})
        write_whole(json_file, json.dumps(facts, indent=1, ensure_ascii=False))
        return [json_file, weights_file]

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu") -> Encoder:
        """Read what `save` wrote; nothing is ever unpickled. Raises UserError for anything else."""
        try:
            try:
                facts = read_facts(folder / "encoder.json")
                weights = read_tensors(folder / "encoder.safetensors")
            except UserError as error:
                raise ValueError(str(error)) from error
            encoder = _rebuild(facts, weights)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, MemoryError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{folder} holds no encoder that bezoar wrote: {reason}") from error
        _check_about(facts)
        apart = ("schema", "preprocess", "precision")
        encoder.about = {k: v for k, v in facts.items() if k not in apart}
        encoder = encoder.to(device).eval()
        encoder.precision = (
            precision_for(encoder.device) if facts["precision"] == "bf16" else "fp32"
        )
        return encoder


def check_finite(vectors: Tensor) -> Tensor:
    """The same vectors (N, D). Raises UserError for NaN and infinity."""
    if not torch.isfinite(vectors).all():
        raise UserError(
            "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
        )
    return vectors


# Encoders out of files, which may be hostile


def _check_about(facts: Facts) -> None:
    """Raise UserError if a value of `about` has the wrong type."""
    for key in facts.keys() & ABOUT_TEXTS:
        facts.text(key)
    for key in facts.keys() & ABOUT_LISTS:
        facts.texts(key)
    for key in facts.keys() & ABOUT_OBJECTS:
        facts.objects(key)


def _rebuild(facts: Any, weights: Mapping[str, Tensor]) -> Encoder:
    """Build an encoder from encoder.json and its weights. Raises what `Encoder.load` catches."""
    network, size = facts["network"], facts["preprocess"]["size"]
    vocabulary = tuple(facts["vocabulary"])
    texts = (network, facts["precision"], *vocabulary)
    if not isinstance(size, int) or not all(isinstance(text, str) for text in texts):
        raise ValueError("network, precision and vocabulary must be texts, and size a whole number")
    count = sum(weight.numel() for weight in weights.values())
    encoder = _build_network(registry.make("network", network), size, vocabulary, count)
    encoder.set_preprocess(_read_preprocess(facts["preprocess"], encoder.preprocess))
    if encoder.head is None and "head.weight" in weights:
        classes, width = weights["head.weight"].shape
        encoder.head = nn.Linear(width, classes, bias="head.bias" in weights)
    encoder.load_state_dict(weights)
    return encoder


def _read_preprocess(facts: Any, of_network: Preprocess) -> Preprocess:
    """The preprocessing that encoder.json states, at the network's size. Raises ValueError."""
    mean, std = (tuple(map(float, facts[key])) for key in ("mean", "std"))
    numbers = (*mean, *std)
    if len(mean) != 3 or len(std) != 3 or not all(abs(n) < 1e3 for n in numbers) or min(std) <= 0:
        raise ValueError("preprocess must have three means, and three deviations above 0")
    interpolation = facts["interpolation"]
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}")
    return Preprocess(of_network.size, mean, std, interpolation)


class _NetworkTooLarge(ValueError):
    """A network has many more weights than its file."""


def _build_network(network: Any, size: int, vocabulary: tuple[str, ...], count: int) -> Encoder:
    """Build a network that a file of `count` weights names.

    Its weights are first counted on the meta device, where they take no memory. Not every network
    can be built there, so they are counted again during the real build.

    Raises:
        ValueError: if the network names other files of weights, or is much larger than its file.
    """
    if not 1 <= size <= MAX_SIDE:
        raise ValueError(f"size must be 1 to {MAX_SIDE} pixels, not {size}")
    if _names_weights(network):
        raise ValueError("its network names weights of its own; it may have those beside it alone")
    try:
        with torch.device("meta"), limit_weights(count):
            network(size, vocabulary)
    except _NetworkTooLarge:
        raise
    except Exception:  # the meta device is to blame, or the same exception is raised again below
        pass
    with limit_weights(count):
        encoder: Encoder = network(size, vocabulary)
    return encoder


def _names_weights(network: Any) -> bool:
    """Whether a network names files of weights, or one of the networks that it is made of does."""
    fields = vars(network) if type(network).__module__.startswith("bezoar.") else {}
    named = fields.get("path") or fields.get("name")
    in_model = "/" in fields.get("model", "") and not fields.get("fresh")
    parts = network.parts() if hasattr(network, "parts") else ()
    return bool(named or in_model) or any(map(_names_weights, parts))


@contextmanager
def limit_weights(count: int) -> Iterator[None]:
    """Raise _NetworkTooLarge inside the block if a network is much larger than `count` weights."""
    total = 0

    def add_weight(_: nn.Module, __: str, weight: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if weight is None else weight.numel()
        if total > WEIGHTS_FREE + WEIGHTS_RATIO * count:
            raise _NetworkTooLarge(f"it has far more weights than the {count:,} of its file")

    hook = register_module_parameter_registration_hook(add_weight)
    try:
        yield
    finally:
        hook.remove()


# Texts


@dataclass
class WordTokenizer:
    """A tokenizer of lower-case words; 0 is padding, and unknown words are dropped."""

    vocabulary: tuple[str, ...]
    numbers: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.numbers = {word: i + 1 for i, word in enumerate(self.vocabulary)}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Strings -> int64 (B, longest of them); at most `MAX_WORDS` words of a caption count."""
        words = ([w for w in split_words(text) if w in self.numbers] for text in captions)
        rows = [[self.numbers[word] for word in row[:MAX_WORDS]] for row in words]
        width = max(1, max(map(len, rows), default=1))
        padded = [row + [0] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def split_words(caption: str) -> list[str]:
    """The lower-case runs of letters and digits in a caption."""
    return re.findall(r"[^\W_]+", caption.lower())


def tokenize_captions(encoder: Encoder, captions: Sequence[str]) -> Tensor:
    """Tokenize captions: (N, L) on the encoder's device. A long column is tokenized in blocks."""
    if not isinstance(captions, Strings):
        return encoder.tokenize(captions)
    parts = [encoder.tokenize(block).int().cpu() for block in captions.blocks()]
    width = max(part.shape[1] for part in parts)
    padded = [F.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.cat(padded).to(encoder.device)


# Images


class ImageEncoder(Protocol):
    """An encoder, or a classifier, whose vectors are its logits."""

    def eval(self) -> object: ...
    def encode_images(self, x: Tensor) -> Tensor: ...


@torch.no_grad()
def embed_images(encoder: ImageEncoder, batches: Iterable[Tensor]) -> Tensor:
    """Batches of uint8 images -> float32 (N, D); unit rows where `encoder` is an Encoder.

    Raises:
        UserError: for vectors that are not finite.
    """
    encoder.eval()
    return check_finite(torch.cat([encoder.encode_images(x) for x in batches]))


@torch.no_grad()
def embed_records(encoder: ImageEncoder, records: Pairs, batch: int = 512) -> Tensor:
    """Embed the images of N records, or their texts if they have no images: float32 (N, D).

    Raises:
        UserError: for vectors that are not finite, and for texts if the encoder reads none.
    """
    if not records.text_only:
        return embed_images(encoder, records.images.split(batch))
    if not isinstance(encoder, Encoder):
        raise UserError("these records are texts, which this classifier does not read")
    return embed_texts(encoder, records.captions)


@torch.no_grad()
def embed_texts(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """Embed N texts: float32 (N, D), unit rows.

    Raises UserError for vectors that are not finite, and without a text tower.
    """
    encoder.eval()
    return check_finite(encode_by_length(encoder, texts, TEXTS_AT_ONCE))


def encode_by_length(encoder: Encoder, texts: Sequence[str], batch: int) -> Tensor:
    """Encode N texts in batches of similar length, which need little padding: float32 (N, D)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    vectors = torch.cat([encoder.encode_texts([texts[i] for i in rows]) for rows in parts])
    return vectors[torch.tensor(order, device=vectors.device).argsort()]
