"""Trace: how each pair behaves while a small model is trained on the suspect data. Several detectors share one training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.data import stored_pairs
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.randomness import sample_rows
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder, precision_for, tokenize_captions
from bezoar.errors import UserError
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.training import loop, prefetch

NETWORK, OBJECTIVE = "clip_small", "clip:epochs=6"  # the small model and its schedule
SIDE = 64  # images are brought to this many pixels at most
OTHERS = 256  # captions that a loss is measured against
TEMPERATURE = 0.07  # of that loss: fixed, so that epochs compare and any objective will do
BATCH = 512

_kept: dict[
    int, tuple[tuple[Any, ...], Trace]
] = {}  # identity of a living source -> the last question and its answer


@dataclass(frozen=True)
class Trace:
    """ids: N keys. agreement: float32 (E, N), cosine of image and caption after each epoch, as the records are, unaugmented.

    loss: float32 (E, N) >= 0, in nats: -log of the own caption's share of a softmax over itself and `OTHERS` fixed captions
    that differ from it, at `TEMPERATURE`.
    """

    ids: Sequence[str]
    agreement: Tensor
    loss: Tensor


def trace(
    source: Any,
    network: str,
    objective: str,
    seed: int,
    device: torch.device,
    side: int = SIDE,
    report: ProgressReport = no_report,
    upto: int = 0,
) -> Trace:
    """Train `network` with `objective` (specs) on a source, and look at every pair after every epoch.

    upto: the epoch after which nothing more is asked; 0: the last. The training ends there, on its way through the whole
    schedule, so that a trace is the beginning of a longer one, bit for bit, and a longer one may be what is given.
    A function of the records and the arguments: the records' order has no say. The last trace of a source is kept while
    the source lives. Raises UserError for a source without captions, and as `training.fit` does.
    """
    recipe = registry.make("objective", objective)
    wanted = upto or recipe.epochs
    asked = (registry.spec(registry.make("network", network)), recipe, seed, device, side)
    if (
        id(source) in _kept
        and _kept[id(source)][0] == asked
        and len(_kept[id(source)][1].loss) >= wanted
    ):
        return _kept[id(source)][1]
    study = SmallModel.build(source, network, seed, device, side)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(epoch: int) -> dict:
        seen.append(study.measure_pairs())
        return {"stop": epoch >= wanted}

    def told(step: int, steps: int, text: str = "") -> None:
        report(step, steps * wanted // recipe.epochs, text)

    study.train(recipe(study.encoder), recipe, told, "training traces", look)
    found = Trace(study.ids, *(torch.stack(part) for part in zip(*seen, strict=True)))
    if id(source) not in _kept:
        weakref.finalize(source, _kept.pop, id(source), None)
    _kept[id(source)] = asked, found
    return found


@dataclass(frozen=True)
class SmallModel:
    """A fresh model and the records that it will be trained on, in an order that belongs to them.

    ids: N keys, in the order of the source. rows: int64 (N,), where each of the records stands there. tokens: int64 (N, L),
    their captions. rivals: int64 (P,), records with the first `OTHERS` different captions. own: int64 (N,), which of these
    captions is a record's (-1: none).
    """

    ids: Sequence[str]
    records: Pairs | StoredPairs
    rows: Tensor
    encoder: Encoder
    tokens: Tensor
    rivals: Tensor
    own: Tensor
    seed: int

    @staticmethod
    def build(
        source: Any, network: str, seed: int, device: torch.device, side: int = SIDE
    ) -> SmallModel:
        """network: a spec. Raises UserError for a source without captions and for a network that does not fit."""
        records = getattr(source, "records", source)  # those of a corpus
        records = records if isinstance(records, Pairs | StoredPairs) else load_pairs(records)
        if not len(records) or not len(records.captions):
            raise UserError("training a model on the scanned data needs captions; there are none")
        ids, rows = records.ids, sample_rows(records.ids, len(records), seed)
        records, configured = (
            stored_pairs.subset(records, rows.tolist()),
            registry.make("network", network),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                encoder = configured(
                    min(records.size, side), configured.vocabulary(records.captions)
                ).to(device)
            except ValueError as error:
                raise UserError(str(error)) from error
        if encoder.text is None:
            raise UserError(
                f"training a model on the scanned data needs a text tower; network {network!r} has none"
            )
        encoder.precision = precision_for(device)
        tokens = tokenize_captions(encoder, records.captions)
        return SmallModel(
            ids,
            records,
            torch.as_tensor(rows),
            encoder,
            tokens,
            *rivals(records.captions, OTHERS),
            seed,
        )

    def train(
        self,
        loss: nn.Module,
        recipe: loop.Recipe,
        report: ProgressReport = no_report,
        what: str = "training a small model",
        each_epoch: Callable[[int], dict] | None = None,
    ) -> None:
        """Minimise a loss that owns the encoder; see `training.fit`."""
        device = self.tokens.device

        def order(epoch: int) -> Tensor:
            return loop.epoch_batches(self.seed, epoch, len(self.records), recipe.batch)

        def told(step: int, steps: int, value: float) -> None:
            report(step, steps, f"{what}, loss {value:.3f}")

        with prefetch.training_data(self.records, device, order, recipe.epochs) as data:
            loop.fit(
                loss.to(device),
                recipe,
                data,
                self.tokens,
                self.seed,
                report=told,
                on_epoch_end=each_epoch,
            )

    @torch.inference_mode()
    def measure_pairs(self) -> tuple[Tensor, Tensor]:
        """-> agreement and loss as in Trace, float32 (N,) each, on the CPU, in the order of the source."""
        self.encoder.eval()
        others = self.encoder.encode_tokens(self.tokens[self.rivals.to(self.tokens.device)])
        columns = torch.arange(len(others))
        agreement, loss = torch.empty(2, len(self.rows)).unbind()
        start = 0
        for part in self.records.batches(BATCH):
            here = slice(start, start + len(part))
            z, w = (
                self.encoder.encode_images(part.images),
                self.encoder.encode_tokens(self.tokens[here]),
            )
            cosine, same = (z * w).sum(1), (self.own[here, None] == columns).to(z.device)
            logits = (
                torch.cat([cosine[:, None], (z @ others.T).masked_fill(same, -torch.inf)], 1)
                / TEMPERATURE
            )
            agreement[self.rows[here]] = cosine.cpu()
            loss[self.rows[here]] = (logits.logsumexp(1) - logits[:, 0]).cpu()
            start = here.stop
        if not torch.isfinite(loss).all():
            raise UserError(
                "the small model gives NaN or infinite vectors; lower the objective's learning rate"
            )
        return agreement, loss


def rivals(captions: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """Rows of the first `count` different captions, int64 (P,), and which of them is each record's, int64 (N,), -1: none."""
    first: dict[str, int] = {}
    for i, caption in enumerate(captions):
        first.setdefault(caption, i)
        if len(first) == count:
            break
    place = {caption: k for k, caption in enumerate(first)}
    own = np.fromiter((place.get(c, -1) for c in captions), np.int64, len(captions))
    return torch.tensor(list(first.values())), torch.from_numpy(own)
