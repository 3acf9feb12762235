"""Traces: how each pair behaves while a small model is trained on the suspect data. Several
detectors share one training.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.randomness import sample_rows
from bezoar.data.stored_pairs import StoredPairs
from bezoar.detection.detectors import Records
from bezoar.encoders.encoder import Encoder, precision_for, tokenize_captions
from bezoar.errors import UserError
from bezoar.progress import ProgressReport, no_report
from bezoar.training import loop, prefetch

NETWORK = "clip_small"  # the small model
OBJECTIVE = "clip:epochs=6"  # its schedule
SIDE = 64  # images are brought to this many pixels at most
RIVALS = 256  # captions that a loss is measured against
TEMPERATURE = 0.07  # of that loss: fixed, so that epochs compare and any objective will do
BATCH = 512

# identity of a living source -> the last question about it and the answer
_traces: dict[int, tuple[tuple[Any, ...], Trace]] = {}


@dataclass(frozen=True)
class Trace:
    """What a small model says of N pairs after each of E epochs."""

    ids: Sequence[str]  # N keys
    agreement: Tensor  # float32 (E, N), cosine of image and caption, unaugmented
    # float32 (E, N) >= 0, in nats: -log of the share of the pair's caption in a softmax over itself
    # and `RIVALS` fixed captions that differ from it, at `TEMPERATURE`
    loss: Tensor


def trace(
    source: Records,
    network: str,
    objective: str,
    seed: int,
    device: torch.device,
    side: int = SIDE,
    report: ProgressReport = no_report,
    upto: int = 0,
) -> Trace:
    """Train a small model on the records and measure every pair after every epoch.

    A trace is a function of the records and the arguments; the order of the records does not
    matter. The last trace of a source is remembered while the source lives.

    Args:
        device: Where to train.
        side: Images are brought to this many pixels at most.
        upto: The last epoch that is needed; 0: the last of the schedule. The training ends there,
            on its way through the whole schedule, so that a trace is the beginning of a longer one,
            bit for bit. A longer one may be returned.

    Raises:
        UserError: For a source without captions, and as `SmallModel.train` does.
    """
    recipe = registry.make("objective", objective)
    epochs = upto or recipe.epochs
    question = (registry.spec(registry.make("network", network)), recipe, seed, device, side)
    earlier = _traces.get(id(source))
    if earlier is not None and earlier[0] == question and len(earlier[1].loss) >= epochs:
        return earlier[1]
    model = SmallModel.build(source, network, seed, device, side)
    agreements: list[Tensor] = []
    losses: list[Tensor] = []

    def measure(epoch: int) -> dict[str, Any]:
        agreement, loss = model.measure_pairs()
        agreements.append(agreement)
        losses.append(loss)
        return {"stop": epoch >= epochs}

    def report_epochs(step: int, steps: int, text: str = "") -> None:
        report(step, steps * epochs // recipe.epochs, text)

    model.train(recipe(model.encoder), recipe, report_epochs, "training traces", measure)
    answer = Trace(model.ids, torch.stack(agreements), torch.stack(losses))
    if id(source) not in _traces:
        weakref.finalize(source, _traces.pop, id(source), None)
    _traces[id(source)] = question, answer
    return answer


def read_without(
    source: Records,
    left_out: Tensor,
    network: str,
    objective: str,
    seed: int,
    device: torch.device,
    report: ProgressReport = no_report,
) -> Tensor:
    """Train a small model on some of the records, and measure the loss of all.

    Args:
        source: N records.
        left_out: bool (N,), the records that the model does not see.
        device: where to train.

    Returns:
        float32 (N,), as `Trace.loss`, in the source's order.

    Raises:
        UserError: as `SmallModel.build` and `SmallModel.train` do.
    """
    model = SmallModel.build(source, network, seed, device)
    recipe = registry.make("objective", objective)
    trained = model.select(~left_out[model.rows])
    trained.train(recipe(model.encoder), recipe, report, "training without what is suspected")
    return model.measure_pairs()[1]


@dataclass(frozen=True)
class SmallModel:
    """A fresh model and the N records that it is trained on, in an order that belongs to the
    records.
    """

    ids: Sequence[str]  # N keys, in the order of the source
    records: Pairs | StoredPairs
    rows: Tensor  # int64 (N,), where each of `records` stands in the source
    encoder: Encoder
    tokens: Tensor  # int64 (N, L), the captions of `records`
    rivals: Tensor  # int64 (P,), `records` with the first `RIVALS` different captions
    rival_of: Tensor  # int64 (N,), which of these captions a record has (-1: none)
    seed: int

    @staticmethod
    def build(
        source: Records, network: str, seed: int, device: torch.device, side: int = SIDE
    ) -> SmallModel:
        """A fresh model for the records of a source. See `trace` for the arguments.

        Raises:
            UserError: For a source without captions, and for a network that does not fit.
        """
        records = getattr(source, "records", source)  # those of a corpus
        records = records if isinstance(records, Pairs | StoredPairs) else load_pairs(records)
        if not len(records) or not len(records.captions):
            raise UserError("training a model on the scanned data needs captions; there are none")
        ids, rows = records.ids, sample_rows(records.ids, len(records), seed)
        records = records.select(rows.tolist())
        configured = registry.make("network", network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                vocabulary = configured.vocabulary(records.captions)
                encoder = configured(min(records.size, side), vocabulary).to(device)
            except ValueError as error:
                raise UserError(str(error)) from error
        if encoder.text is None:
            raise UserError(
                f"training a model on the scanned data needs a text tower; network {network!r} has "
                "none"
            )
        encoder.precision = precision_for(device)
        tokens = tokenize_captions(encoder, records.captions)
        rivals, rival_of = distinct_captions(records.captions, RIVALS)
        return SmallModel(
            ids, records, torch.as_tensor(rows), encoder, tokens, rivals, rival_of, seed
        )

    def train(
        self,
        loss: nn.Module,
        recipe: loop.Recipe,
        report: ProgressReport = no_report,
        activity: str = "training a small model",
        on_epoch_end: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        """Minimise a loss that owns the encoder, as `loop.fit` does. activity: for the report."""
        device = self.tokens.device

        def epoch_order(epoch: int) -> Tensor:
            return loop.epoch_batches(self.seed, epoch, len(self.records), recipe.batch)

        def report_loss(step: int, steps: int, value: float) -> None:
            report(step, steps, f"{activity}, loss {value:.3f}")

        with prefetch.training_data(self.records, device, epoch_order, recipe.epochs) as data:
            loop.fit(
                loss.to(device),
                recipe,
                data,
                self.tokens,
                self.seed,
                report=report_loss,
                on_epoch_end=on_epoch_end,
            )

    def select(self, chosen: Tensor) -> SmallModel:
        """The same model with some of the records. chosen: bool (N,), in the order of `records`."""
        numbers = chosen.nonzero()[:, 0]
        records = self.records.select(numbers.tolist())
        tokens = self.tokens[numbers.to(self.tokens.device)]
        return replace(self, records=records, rows=self.rows[numbers], tokens=tokens)

    @torch.inference_mode()
    def measure_pairs(self) -> tuple[Tensor, Tensor]:
        """Agreement and loss of every pair as in `Trace`, (N,) each, in the source's order."""
        self.encoder.eval()
        rivals = self.encoder.encode_tokens(self.tokens[self.rivals.to(self.tokens.device)])
        agreement, loss = torch.empty(len(self.rows)), torch.empty(len(self.rows))
        start = 0
        for batch in self.records.batches(BATCH):
            part = slice(start, start + len(batch))
            z = self.encoder.encode_images(batch.images)
            w = self.encoder.encode_tokens(self.tokens[part])
            agreement[self.rows[part]] = (z * w).sum(1).cpu()
            loss[self.rows[part]] = caption_losses(z, w, rivals, self.rival_of[part]).cpu()
            start = part.stop
        if not torch.isfinite(loss).all():
            raise UserError(
                "the small model gives NaN or infinite vectors; lower the objective's learning rate"
            )
        return agreement, loss


def caption_losses(images: Tensor, texts: Tensor, rivals: Tensor, rival_of: Tensor) -> Tensor:
    """-log of the share of each pair's caption in a softmax over itself and its rivals, (B,).

    Args:
        images: unit (B, D).
        texts: unit (B, D), of the pairs' captions.
        rivals: unit (P, D), of different captions.
        rival_of: int64 (B,), which of the rivals is the pair's own caption (-1: none).
    """
    same_caption = (rival_of[:, None] == torch.arange(len(rivals))).to(images.device)
    others = (images @ rivals.T).masked_fill(same_caption, -torch.inf)
    logits = torch.cat([(images * texts).sum(1)[:, None], others], 1) / TEMPERATURE
    return logits.logsumexp(1) - logits[:, 0]


def distinct_captions(captions: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """Rows of the first different captions, (P,), and which each record has, (N,), -1: none."""
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
        if len(first) == count:
            break
    number = {caption: i for i, caption in enumerate(first)}
    of_record = np.fromiter((number.get(c, -1) for c in captions), np.int64, len(captions))
    return torch.tensor(list(first.values())), torch.from_numpy(of_record)
