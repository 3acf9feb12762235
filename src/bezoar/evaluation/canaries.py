"""Counts the pairs of poison `canary` after a data pipeline, and tests if a model learnt them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks.plan import Edit, Plan
from bezoar.attacks.poisons.canary import FORMS
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average, proportion

THUMBNAIL = 8  # pixels a side, grey
ALIKE = 0.9  # correlation of thumbnails of one picture, scaled or stored again
EQUAL = 1e-6  # between fits of equal texts
MOST_WORDS = 100  # of a form, among which a canary's own is looked for


@dataclass(frozen=True)
class Canaries:
    """The pairs that were put in front of the pipeline."""

    edits: tuple[Edit, ...]  # the plan's edits, M of them
    images: Tensor  # uint8 (M, 3, H, W)

    @property
    def words(self) -> list[str]:
        """The invented word of each."""
        return [edit.caption.rpartition(" ")[2].lower() for edit in self.edits]

    def rows(self, form: str) -> list[int]:
        """Numbers of the canaries of a form."""
        return [i for i, e in enumerate(self.edits) if e.id.endswith(f"+canary-{form}")]


def canary_edits(plan: Plan) -> tuple[Edit, ...]:
    """The edits of a plan that are canaries."""
    of_canaries = {i for i, g in enumerate(plan.goals) if g.how.partition(":")[0] == "canary"}
    return tuple(edit for edit in plan.edits if edit.goal in of_canaries)


def make_canaries(plan: Plan, clean: Pairs | StoredPairs) -> Canaries:
    """The canaries of a plan with their images. Raises UserError if the plan has none."""
    edits = canary_edits(plan)
    if not edits:
        raise UserError(
            "this run holds no canaries; `bezoar poison DATA --poison canary --trigger patch "
            "--write shards` makes them"
        )
    sources = {edit.source for edit in edits}
    pairs = plan.poisons(clean.take(clean.find_rows(sources)))
    row_of = {key: row for row, key in enumerate(pairs.ids)}
    return Canaries(edits, pairs.images[[row_of[edit.id] for edit in edits]])


def find_outcomes(canaries: Canaries, after: Pairs | StoredPairs) -> list[str]:
    """The outcome of each canary: `pair`, `caption` (with another picture) or `lost`.

    A canary is recognised by its word, and its picture by a thumbnail; ids, files and sizes may
    have changed.
    """
    number = {word: i for i, word in enumerate(canaries.words)}
    rows: list[int] = []
    owners: list[int] = []
    for row, caption in enumerate(after.captions):
        for word in set(re.findall(r"\w+", caption.lower())) & number.keys():
            rows.append(row)
            owners.append(number[word])
    outcomes = ["lost"] * len(canaries.edits)
    if not rows:
        return outcomes
    alike = compare_thumbnails(after.take(rows).images, canaries.images[owners])
    for owner, is_same in zip(owners, (alike >= ALIKE).tolist(), strict=True):
        if is_same or outcomes[owner] == "lost":
            outcomes[owner] = "pair" if is_same else "caption"
    return outcomes


def compare_thumbnails(images: Tensor, others: Tensor) -> Tensor:
    """Correlate the grey thumbnails of uint8 images (N, 3, H, W) and (N, 3, H', W') -> (N,)."""
    flat = []
    for pictures in (images, others):
        small = F.interpolate(pictures.float(), (THUMBNAIL, THUMBNAIL), mode="area").mean(1)
        vectors = small.flatten(1)
        flat.append(F.normalize(vectors - vectors.mean(1, keepdim=True), dim=1))
    return (flat[0] * flat[1]).sum(1)


def count_outcomes(canaries: Canaries, outcomes: Sequence[str]) -> dict[str, Measure]:
    """The shares of canaries whose pair, or caption alone, came out, by form and over all."""
    measures: dict[str, Measure] = {}
    groups = {form: rows for form in FORMS if (rows := canaries.rows(form))}
    for form, rows in (groups | {"all": list(range(len(canaries.edits)))}).items():
        for name, what in (("pair", "picture and caption"), ("caption", "caption alone")):
            hits = sum(outcomes[row] == name for row in rows)
            how = f"canaries ({form}) of which {what} came out of the pipeline"
            measures[f"canaries.{form}.{name}_kept"] = proportion(hits, len(rows), how)
    return measures


@torch.inference_mode()
def measure_learning(canaries: Canaries, encoder: Encoder) -> dict[str, Measure]:
    """Measure whether an encoder ranks a canary's own word above the words of other canaries.

    Words were assigned to pictures at random, so an encoder that never saw the pairs ranks the own
    word first in one of M, and in the middle on average.
    """
    if encoder.text is None:
        raise UserError("an encoder without a text tower cannot have learnt words; leave it out")
    measures: dict[str, Measure] = {}
    for form in FORMS:
        rows = canaries.rows(form)[:MOST_WORDS]
        if len(rows) < 2:
            continue
        words = [canaries.words[row] for row in rows]
        images = encoder.encode_images(encoder.prepare_images(canaries.images[rows]))
        places = []
        for i, row in enumerate(rows):
            beginning = canaries.edits[row].caption.rpartition(" ")[0]
            texts = encoder.encode_texts([f"{beginning} {word}" for word in words])
            fits = (texts @ images[i]).double().cpu().numpy()  # (M,)
            # Equal fits, as of words that a vocabulary does not hold, share their places.
            equal = np.abs(fits - fits[i]) <= EQUAL
            places.append(float((~equal & (fits > fits[i])).sum() + (equal.sum() - 1) / 2))
        m = len(rows)
        how = f"canaries ({form}) whose own word fits best of {m}; by chance one in {m}"
        first = sum(place == 0 for place in places)
        measures[f"canaries.{form}.learnt"] = proportion(first, m, how)
        how = f"place of a canary's own word among {m}, 0 first, 1 last; 0.5 by chance"
        measures[f"canaries.{form}.place"] = average(np.array(places) / (m - 1), how)  # type: ignore[arg-type]
    return measures


def describe(measures: Mapping[str, Measure], count: int) -> str:
    """The result in words, for the page."""
    parts = []
    if share_kept := measures.get("canaries.all.pair_kept"):
        share = f"{share_kept.value:.0%} ({share_kept.low:.0%} to {share_kept.high:.0%})"
        parts.append(
            f"{share} of {count} canaries came out of the pipeline with picture and caption"
        )
    learnt = {form: m for form in FORMS if (m := measures.get(f"canaries.{form}.learnt"))}
    if learnt:
        shares = [f"{m.value:.0%} of those of form {form}" for form, m in learnt.items()]
        by_chance = f"{1 / max(m.n for m in learnt.values()):.1%}"
        parts.append(f"the encoder has learnt {', '.join(shares)} (by chance {by_chance})")
    return "; ".join(parts)
