"""Integrity: what shards record of their images (a hash, sizes, a status) against what is there.

Five to fifteen in a hundred hashes of web corpora do not match, so that people switch the check
off, and a picture that somebody put in the place of another passes with those that were only stored
again. A mismatch is told apart here as far as there is evidence:

* a perceptual hash that was recorded beside it (`phash`, 64 bits, as the library ImageHash makes);
* how well the caption fits, by an encoder that was not trained on these records: worse than 99 in
  100 records whose bytes match, or better than 99 in 100 pairs of a picture and another's caption.
  An attacker who chooses a picture that fits its caption is not told by this.

Sizes alone tell neither: equal ones can be chosen, and others come of scaling and cropping.
img2dataset hashes a file as it was downloaded; where it was scaled then, no stored file can have
the hash.
"""

import csv
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct
from torch import Tensor

from bezoar.data.files.images import decode_image
from bezoar.data.files.metadata import Recorded, parse_recorded
from bezoar.data.files.paths import IMAGE_EXTENSIONS
from bezoar.data.files.skipped import Unreadable
from bezoar.data.files.tars import Group, read_groups
from bezoar.data.files.writing import whole_file
from bezoar.data.sources.shards import ShardSource
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.corpus.record_sources import find_sources
from bezoar.detection.corpus.removal_lists import plain_cell
from bezoar.detection.reliability.stored_images import HEAD_BYTES, parse_image_header
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, proportion

DOMAINS_CSV, MISMATCHES_CSV = "integrity.csv", "mismatches.csv"
SAME_BYTES, RECODED, ANOTHER, UNTOLD = (
    "same bytes", "same picture, recoded", "another picture", "cannot tell",
)  # fmt: skip
SIZES_FIT, UNCHECKED = "sizes fit", ""  # where no hash is recorded; where nothing is
VERDICTS = (UNCHECKED, SIZES_FIT, SAME_BYTES, RECODED, ANOTHER, UNTOLD)
MISMATCHES = (RECODED, ANOTHER, UNTOLD)
COUNTED = (SAME_BYTES, SIZES_FIT, *MISMATCHES)  # columns of integrity.csv
PEEKED = 64  # records of the first shard that are looked at for anything recorded
SAME_BITS, OTHER_BITS = 6, 20  # of 64 that differ: at most, of one picture; at least, of two
LEAST_REFERENCE = 100  # records of matching bytes, for what is said by captions
TAIL = 0.01
FITS = "captions fit as of matching records"
FITS_NOT = "captions fit as of other pictures"


@dataclass(frozen=True)
class Integrity:
    """What is said of N records."""

    verdicts: NDArray[np.int8]  # int8 (N,), numbers of VERDICTS
    evidence: dict[int, str]  # by row of a mismatch, why
    hashed: NDArray[np.bool_]  # bool (N,), whether a hash is recorded

    def count(self, verdict: str, rows: NDArray[np.bool_] | slice = slice(None)) -> int:
        """Return how many of some records have a verdict."""
        return int((self.verdicts[rows] == VERDICTS.index(verdict)).sum())


def check_integrity(
    corpus: Corpus, folder: Path, is_independent: bool
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """Check shards against what they record; nothing is said of other data.

    Writes integrity.csv, a line a domain, and mismatches.csv, a line a record that does not match.

    Args:
        is_independent: Whether the encoder was not trained on these records.

    Returns:
        Metrics, and notes for the manifest.
    """
    if not isinstance(corpus.source, ShardSource) or not _records_anything(corpus.source.paths[0]):
        return {}, {}
    integrity = compare_records(corpus)
    if is_independent and corpus.embedded.texts is not None:
        tell_by_captions(integrity, corpus.embedded.images, corpus.embedded.texts)
    _write_mismatches(folder, corpus, integrity)
    _write_domains(folder, corpus, integrity)
    hashed = int(integrity.hashed.sum())
    counts = {verdict: integrity.count(verdict) for verdict in VERDICTS if verdict}
    notes = {"integrity": {"hashed": hashed, "counts": counts, "sentence": _sentence(integrity)}}
    if not hashed:
        return {}, notes
    names = {"same_bytes": SAME_BYTES, "recoded": RECODED, "another": ANOTHER, "untold": UNTOLD}
    measures = {
        f"integrity.{name}": proportion(
            integrity.count(verdict, integrity.hashed),
            hashed,
            f"{verdict}, of the records with a recorded hash",
        )
        for name, verdict in names.items()
    }
    return measures, notes


def compare_records(corpus: Corpus) -> Integrity:
    """Compare the bytes, size and perceptual hash of every image with what its JSON records."""
    n = len(corpus)
    integrity = Integrity(np.zeros(n, np.int8), {}, np.zeros(n, bool))
    shards, offsets = corpus.places["shard"], corpus.places["offset"]
    for shard, path in enumerate(corpus.source.paths):  # type: ignore[attr-defined]
        rows_at: dict[int, list[int]] = {}
        for row in np.flatnonzero(shards == shard).tolist():
            rows_at.setdefault(int(offsets[row]), []).append(row)
        for offset, recorded, image in _stored_records(path):
            verdict, why = compare_image(recorded, image)
            for row in rows_at.get(offset, ()):
                integrity.verdicts[row] = VERDICTS.index(verdict)
                integrity.hashed[row] = bool(recorded.hashes)
                if verdict in MISMATCHES:
                    integrity.evidence[row] = why
    return integrity


def compare_image(recorded: Recorded, image: bytes) -> tuple[str, str]:
    """A verdict on one encoded image, and why."""
    if recorded.status not in ("", "success"):
        return UNTOLD, f"status {recorded.status}, and an image is there"
    if any(hashlib.new(name, image).hexdigest() == v for name, v in recorded.hashes.items()):
        return SAME_BYTES, ""
    stored = parse_image_header(image[:HEAD_BYTES]).shape
    fits = recorded.size is None or stored == recorded.size
    if not recorded.hashes and fits:
        return (SIZES_FIT if recorded.size else UNCHECKED), ""
    if recorded.phash and (distance := phash_distance(image, int(recorded.phash, 16))) is not None:
        why = f"perceptual hashes differ in {distance} of 64 bits"
        if distance <= SAME_BITS:
            return RECODED, why
        return (ANOTHER if distance >= OTHER_BITS else UNTOLD), why
    if not fits and recorded.size is not None:
        scaled = _same_ratio(stored, recorded.size)
        what = "scaled" if scaled else "cropped, or another picture"
        sizes = f"{stored[0]}x{stored[1]}, recorded {recorded.size[0]}x{recorded.size[1]}"
        return UNTOLD, f"{what}: {sizes}"
    if recorded.original and recorded.original != recorded.size:
        return UNTOLD, "scaled when it was downloaded: the hash is of the file before"
    return UNTOLD, "other bytes, nothing else recorded that differs"


def _same_ratio(one: tuple[int, int], two: tuple[int, int]) -> bool:
    """Return whether sides have one ratio, but for rounding by a pixel."""
    (a, b), (c, d) = one, two
    return abs(a * d - b * c) <= max(a, b, c, d)


def phash_distance(image: bytes, recorded: int) -> int | None:
    """Bits by which an image's perceptual hash differs from a recorded one; None without it."""
    try:
        pixels = decode_image(image, None)  # (3, H, W)
    except Unreadable:
        return None
    return (perceptual_hash(pixels) ^ recorded).bit_count()


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """64 bits of an image (3, H, W): which low frequencies lie above their median (`phash`)."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("L")
    grey = np.asarray(picture.resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = dct(dct(grey, axis=0), axis=1)[:8, :8]
    bits = (low > np.median(low)).ravel()
    return int("".join("01"[bit] for bit in bits.astype(int)), 2)


def tell_by_captions(integrity: Integrity, images: Tensor, texts: Tensor) -> None:
    """Decide, in place, what could not be told, by how well captions fit beside records of matching
    bytes.

    images, texts: unit vectors (N, D) of an encoder that was not trained on these records.
    """
    matching = torch.from_numpy(np.flatnonzero(integrity.verdicts == VERDICTS.index(SAME_BYTES)))
    if len(matching) < LEAST_REFERENCE:
        return
    fits = (images[matching].float() * texts[matching].float()).sum(1)
    others = texts[matching.roll(len(matching) // 2)].float()
    lowest = float(fits.double().quantile(TAIL))
    highest = float((images[matching].float() * others).sum(1).double().quantile(1 - TAIL))
    for row in np.flatnonzero(integrity.verdicts == VERDICTS.index(UNTOLD)).tolist():
        fit = float(images[row].float() @ texts[row].float())
        if fit < lowest and fit <= highest:
            verdict, why = ANOTHER, FITS_NOT
        elif fit > highest and fit >= lowest:
            verdict, why = RECODED, FITS
        else:
            continue
        integrity.verdicts[row] = VERDICTS.index(verdict)
        integrity.evidence[row] = f"{why}; {integrity.evidence[row]}"


def _stored_records(path: Path) -> Iterator[tuple[int, Recorded, bytes]]:
    """For each record of a tar with JSON: its image's place, what is recorded, and the image."""
    for group in read_groups(path):
        if not isinstance(group, Group) or "json" not in group.files:
            continue
        recorded = parse_recorded(group.files["json"])
        extension = next((e for e in IMAGE_EXTENSIONS if e in group.files), None)
        if recorded is not None and extension is not None:
            yield group.offsets[extension], recorded, group.files[extension]


def _records_anything(path: Path) -> bool:
    """Return whether one of the first records of a tar records a hash or a size."""
    try:
        for number, (_, recorded, _) in enumerate(_stored_records(path)):
            if recorded.hashes or recorded.size or recorded.phash:
                return True
            if number == PEEKED:
                break
    except UserError:
        pass
    return False


def _sentence(integrity: Integrity) -> str:
    """Say what was found, for the page."""
    hashed, total = int(integrity.hashed.sum()), len(integrity.verdicts)
    if not hashed:
        wrong = sum(map(integrity.count, MISMATCHES))
        return f"No hash is recorded; sizes or status do not fit in {wrong:,} of {total:,} records"
    same = integrity.count(SAME_BYTES)
    if not same:
        return (
            f"None of {hashed:,} recorded hashes is that of the stored file: they are of the files "
            "as they were downloaded, and can check a new download, not these shards"
        )
    recoded, another, untold = (integrity.count(v, integrity.hashed) for v in MISMATCHES)
    return (
        f"Of {hashed:,} recorded hashes {hashed - same:,} are not those of the stored files: "
        f"{recoded:,} are the same picture, recoded, {another:,} another picture, and of "
        f"{untold:,} it cannot be told"
    )


def _write_mismatches(folder: Path, corpus: Corpus, integrity: Integrity) -> None:
    """Write mismatches.csv: other pictures first, then undecided ones, then recoded ones."""
    order = [VERDICTS.index(v) for v in (ANOTHER, UNTOLD, RECODED)]
    rows = sorted(integrity.evidence, key=lambda r: (order.index(int(integrity.verdicts[r])), r))
    with whole_file(folder / MISMATCHES_CSV, newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("id", "place", "url", "verdict", "why"))
        for row in rows:
            url = plain_cell(corpus.urls[row])
            verdict = VERDICTS[integrity.verdicts[row]]
            why = plain_cell(integrity.evidence[row])
            out.writerow((corpus.ids[row], corpus.place_of(row), url, verdict, why))


def _write_domains(folder: Path, corpus: Corpus, integrity: Integrity) -> None:
    """Write integrity.csv: a line a domain, those that surely have most other pictures first."""
    try:
        sources = find_sources(corpus, "domain")
    except UserError:  # no record has a URL
        sources = None
    groups = [("all", np.ones(len(corpus), bool))]
    if sources is not None:
        groups += [(name, sources.of_record == i) for i, name in enumerate(sources.names)]
    lines = []
    for name, rows in groups:
        n = int(integrity.hashed[rows].sum())
        counts = [integrity.count(v, rows) for v in COUNTED]
        share = proportion(integrity.count(ANOTHER, rows & integrity.hashed), n, "") if n else None
        interval = (f"{share.low:.4f}", f"{share.high:.4f}") if share else ("", "")
        lines.append((share.low if share else 0.0, name, int(rows.sum()), n, counts, interval))
    lines[1:] = sorted(lines[1:], key=lambda line: (-line[0], -line[4][-2], -line[4][-1], line[1]))
    with whole_file(folder / DOMAINS_CSV, newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        names = [re.sub(r"\W+", "_", v) for v in COUNTED]
        out.writerow(("domain", "records", "hashed", *names, "another_low", "another_high"))
        for _, name, records, n, counts, interval in lines:
            out.writerow((plain_cell(name), records, n, *counts, *interval))
