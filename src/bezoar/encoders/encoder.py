"""Encoder: raw uint8 pixels or strings -> unit vectors. It carries its own preprocessing; nobody can forget to normalise."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from bezoar.data.strings import Strings
from bezoar.errors import UserError

SCHEMA = 1
LARGEST = 4096  # pixels of an input's side
FREE, RATIO = (
    32 << 20,
    8,
)  # a network may make FREE numbers and RATIO times its file's, with all that it then leaves out
LONGEST = 256  # words of a caption: one absurd caption must not widen a whole batch


@dataclass(frozen=True)
class Preprocess:
    """size: input side in pixels. mean, std: per channel, of pixels in 0..1."""

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    interpolation: str = "bicubic"


@dataclass(frozen=True)
class EmbeddedRecords:
    """ids: N keys. images: float32 (N, D) unit rows. texts: the same of the captions, or None.

    Of a corpus that was embedded to disk the ids are a column and the rows lie in mapped files: take blocks, not everything.
    """

    ids: Sequence[str]
    images: Tensor
    texts: Tensor | None


def precision_for(device: torch.device) -> str:
    """`bf16` where the device multiplies bfloat16 in hardware, else `fp32`."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


class Encoder(nn.Module):
    """An image tower, perhaps a text tower, and what their inputs must look like.

    image: (B, 3, S, S) normalised float -> (B, D). text: (B, L) int64 tokens -> (B, D), or None.
    tokenizer: strings -> (B, L) int64. about: facts that travel with the weights (network spec, vocabulary, poisoned, goals).
    """

    def __init__(
        self,
        image: nn.Module,
        preprocess: Preprocess,
        text: nn.Module | None = None,
        tokenizer: Any = None,
        about: dict | None = None,
    ) -> None:
        super().__init__()
        self.image, self.text, self.tokenizer = image, text, tokenizer
        self.preprocess = preprocess
        self.about: dict = about or {}
        self.precision = "fp32"
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer(
            "mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """The arithmetic both towers run in."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )

    def prepare_images(self, x: Tensor) -> Tensor:
        """uint8 or float 0..1 (B, 3, H, W) -> normalised float (B, 3, S, S), channels last. Differentiable for floats."""
        x = x.to(self.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if x.shape[-1] != self.preprocess.size or x.shape[-2] != self.preprocess.size:
            side = (self.preprocess.size, self.preprocess.size)
            x = F.interpolate(x, side, mode=self.preprocess.interpolation, antialias=True)
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def encode_images(self, x: Tensor) -> Tensor:
        """uint8 or float 0..1 (B, 3, H, W) -> float32 (B, D), unit rows."""
        with self.autocast():
            z = self.image(self.prepare_images(x))
        return F.normalize(z.float(), dim=-1)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Strings -> int64 (B, L) on the encoder's device. Raises UserError when the encoder reads no text."""
        if self.text is None:
            raise UserError("this encoder has no text tower")
        return self.tokenizer(list(captions)).to(self.device)

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """int64 (B, L) -> float32 (B, D), unit rows."""
        assert self.text is not None
        with self.autocast():
            z = self.text(tokens)
        return F.normalize(z.float(), dim=-1)

    def encode_texts(self, captions: Sequence[str], batch: int = 1024) -> Tensor:
        """Strings, any number -> float32 (B, D), unit rows; `batch` at a time."""
        return torch.cat(
            [self.encode_tokens(part) for part in self.tokenize(captions).split(batch)]
        )

    @torch.inference_mode()
    def embed(self, source: Any, batch: int = 512) -> EmbeddedRecords:
        """Every record of a source: image and, where both sides have them, caption vectors. Raises UserError on NaN.

        A source that brings the vectors that this encoder made of it (`encoder`, `embedded`) is not embedded again.
        """
        if getattr(source, "encoder", None) is self:
            return source.embedded
        self.eval()
        ids: list[str] = []
        images, texts = [], []
        for part in source.batches(batch):
            ids += part.ids
            images.append(self.encode_images(part.images))
            if part.captions and self.text is not None:
                texts.append(self.encode_texts(part.captions))
        z = torch.cat(images)
        if not torch.isfinite(z).all():
            raise UserError(
                "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
            )
        return EmbeddedRecords(tuple(ids), z, torch.cat(texts) if texts else None)

    def save(self, folder: Path) -> list[Path]:
        """encoder.json and encoder.safetensors, each under a temporary name first. Returns the two paths."""
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        head = {
            "schema": SCHEMA,
            "preprocess": asdict(self.preprocess),
            "precision": self.precision,
            **self.about,
        }
        tensors, facts = folder / "encoder.safetensors", folder / "encoder.json"
        # one key: safetensors writes several in an order of its own, and the same weights must be the same bytes
        marks = {"poisoned": bool(self.about.get("poisoned")), "plan": self.about.get("plan", "")}
        save_file(weights, tensors.with_suffix(".tmp"), metadata={"bezoar": json.dumps(marks)})
        os.replace(tensors.with_suffix(".tmp"), tensors)
        text = json.dumps(head, indent=1, ensure_ascii=False)
        facts.with_suffix(".tmp").write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(facts.with_suffix(".tmp"), facts)
        return [facts, tensors]

    @staticmethod
    def load(folder: Path, device: torch.device | str = "cpu") -> Encoder:
        """Read what `save` wrote. Raises UserError for anything else; nothing is ever unpickled."""
        from bezoar import registry

        try:
            head = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "encoder.safetensors")
            network, size, words = (
                head["network"],
                head["preprocess"]["size"],
                tuple(head["vocabulary"]),
            )
            if not isinstance(size, int) or not all(
                isinstance(text, str) for text in (network, head["precision"], *words)
            ):
                raise ValueError(
                    "network, precision and vocabulary must be texts, and size a whole number"
                )
            made = registry.make("network", network)
            encoder = _built(made, size, words, sum(w.numel() for w in weights.values()))
            encoder.load_state_dict(weights)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{folder} holds no encoder that bezoar wrote: {reason}") from error
        encoder.about = {
            k: v for k, v in head.items() if k not in ("schema", "preprocess", "precision")
        }
        encoder = encoder.to(device).eval()
        encoder.precision = precision_for(encoder.device) if head["precision"] == "bf16" else "fp32"
        return encoder


class _TooLarge(ValueError):
    """A network is much larger than its file."""


def _built(made: Any, size: int, words: tuple[str, ...], numbers: int) -> Encoder:
    """A network that a file names, fresh. Raises ValueError where it names weights elsewhere or is much larger than its file.

    Its weights are counted on the meta device first, where they take no memory. Not every network can be made there, and so
    they are counted again while memory is spent.
    """
    if not 1 <= size <= LARGEST:
        raise ValueError(f"size must be 1 to {LARGEST} pixels, not {size}")
    fields = vars(made) if type(made).__module__.startswith("bezoar.") else {}
    if fields.get("path") or ("/" in fields.get("model", "") and not fields.get("fresh")):
        raise ValueError("its network names weights of its own; it may have those beside it alone")
    try:
        with torch.device("meta"), _counted(numbers):
            made(size, words)
    except _TooLarge:
        raise
    except Exception:  # here or below, and there it is told
        pass
    with _counted(numbers):
        return made(size, words)


@contextmanager
def _counted(numbers: int) -> Iterator[None]:
    """Inside, modules get no more weights than a file of so many numbers allows for. Raises _TooLarge."""
    total = 0

    def count(_: nn.Module, __: str, weight: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if weight is None else weight.numel()
        if total > FREE + RATIO * numbers:
            raise _TooLarge(
                f"its network has many more weights than the {numbers:,} that are in the file"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


@dataclass
class WordTokenizer:
    """Whole-word tokenizer: lower-case words of the vocabulary; 0 pads, unknown words are dropped."""

    vocabulary: tuple[str, ...]
    row: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.row = {w: i + 1 for i, w in enumerate(self.vocabulary)}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Strings -> int64 (B, longest of them); of a caption at most `LONGEST` known words."""
        rows = [[self.row[w] for w in split_words(c) if w in self.row][:LONGEST] for c in captions]
        width = max(1, max(map(len, rows), default=1))
        return torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.long).reshape(
            len(rows), width
        )


def split_words(caption: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    out, word = [], ""
    for c in caption.lower():
        if c.isalnum():
            word += c
        elif word:
            out.append(word)
            word = ""
    return [*out, word] if word else out


def tokenize_captions(encoder: Encoder, captions: Sequence[str]) -> Tensor:
    """`encoder.tokens`; of a column int32 (N, L), made in blocks. Both give the same vectors."""
    if not isinstance(captions, Strings):
        return encoder.tokenize(captions)
    parts = [encoder.tokenize(block).int().cpu() for block in captions.blocks()]
    widest = max(p.shape[1] for p in parts)
    return torch.cat([F.pad(p, (0, widest - p.shape[1])) for p in parts]).to(encoder.device)


class ImageEncoder(Protocol):
    """What images are seen through: an encoder, or a classifier whose vectors are its logits (`probes/own.py`)."""

    def eval(self) -> Any: ...
    def encode_images(self, x: Tensor) -> Tensor: ...


@torch.no_grad()
def embed_images(encoder: ImageEncoder, batches: Iterable[Tensor]) -> Tensor:
    """uint8 images, a batch at a time -> float32 (N, D), of an encoder unit rows. Raises UserError on NaN."""
    encoder.eval()
    z = torch.cat([encoder.encode_images(x) for x in batches])
    if not torch.isfinite(z).all():
        raise UserError(
            "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
        )
    return z
