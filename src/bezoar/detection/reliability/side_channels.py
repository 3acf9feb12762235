"""Side channels: can what has nothing to do with an attack tell poisons from the rest? File sizes,
headers, order, templates.

A benchmark whose poisons were written by another program, at another time or in another place than
the rest is solved by reading that off. A detector's figures on such a set say little. A *channel*
is one number or one kind for each record.

A channel has no direction of its own. Taking the better of both after looking is biased upwards (a
channel of noise gives 0.5 + 0.8 times the AUROC's standard error on average, and never less than
0.5). So a fixed half of the records, by their ids, chooses the direction (of kinds: how poisoned
each kind is), and only the other half is measured.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bezoar.data.decoding import Record
from bezoar.data.files.paths import expand_paths
from bezoar.data.files.skipped import Skipped
from bezoar.data.randomness import draws
from bezoar.data.source import as_source
from bezoar.data.sources.shards import ShardSource
from bezoar.detection.reliability import stored_images
from bezoar.detection.reliability.stored_images import StoredImage
from bezoar.encoders.encoder import split_words
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import Run

COMMON_WORDS = 64  # words that count as a caption's template; the others are left open
TEMPLATE_WORDS = 12  # words and gaps of a template
ORDER_BLOCKS = 20  # equal parts of the corpus
RARE = 20  # records of a kind, below which it counts as rare
MIN_RECORDS = 2  # poisons, and others, in either half, below which nothing is measured
# AUROC from which a channel separates poisons from the rest, when chance is ruled out over all
# channels
SEPARATES = 0.6
FILE_CHANNELS = {  # what a channel is, in the words of a page
    "file_size": "size of the image's file in bytes",
    "file_time": "time stamp of the file, or in the tar's header",
    "file_owner": "owner, group and mode of the file, or in the tar's header",
    "extension": "the file name's extension",
    "format": "the image's format by its first bytes",
    "layout": "the image header's parts in order, and its colour sampling",
    "jpeg_tables": "JPEG quantisation tables",
    "shape": "width x height as stored",
    "aspect": "width / height as stored",
}
SHARD_CHANNELS = {
    "shard": "which shard",
    "place_in_shard": "place within the shard",
}
ORDER_CHANNELS = {
    "row": "place in the corpus",
    "row_block": f"which of {ORDER_BLOCKS} equal parts of the corpus (fewer of a small one)",
    "key_pattern": "the id with its numbers left out",
}
CAPTION_CHANNELS = {
    "caption_length": "characters of the caption",
    "caption_repeats": "how many records share the caption",
    "caption_template": f"the caption with all but the {COMMON_WORDS} commonest words left out",
}
DESCRIPTIONS = FILE_CHANNELS | SHARD_CHANNELS | ORDER_CHANNELS | CAPTION_CHANNELS


@dataclass
class Channels:
    """The channels of N records."""

    ids: Sequence[str]  # N keys
    numbers: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # name -> float64 (N,)
    # name -> int64 (N,), equal for equal
    kinds: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # name -> why
    # float64 (N, 2), width and height as stored, 0 where no header says; None where nothing is
    # known
    sizes: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class MeasuredChannel:
    """A channel."""

    name: str
    auroc: Measure
    separates: bool  # whether it tells poisons from the rest, chance ruled out


def collect_channels(
    scanned: Any, dataset: Dataset, ids: Sequence[str], captions: Sequence[str]
) -> Channels:
    """Every channel of a scan's data.

    Files are looked at where they hold what is scanned: shards that a poison run has written, or
    data without a plan. A plan that is applied while records are read leaves the files of its
    poisons as they were.

    Args:
        scanned: The run or data method that was scanned.
        dataset: What it opens as.
        ids: Of its records, in their order.
        captions: Of the same records, or none.
    """
    channels = record_channels(ids, captions)
    poison = scanned.ancestor("poison") if isinstance(scanned, Run) else None
    shards = None if poison is None else poison.path / "shards"
    why = "these data are not read from files"
    records: Iterable[Record | Skipped] | None
    if shards is not None and any(shards.glob("*.tar")):
        records = ShardSource(expand_paths(str(shards))).records()
    elif dataset.plan.edits:
        records = None
        why = "poisons are made as records are read; poison with --write shards to look at files"
    else:
        records = stored_records(dataset.method)
    from_files = file_channels(records) if records is not None else None
    if from_files is None or not len(from_files.ids):
        channels.absent |= dict.fromkeys(FILE_CHANNELS, why)
        return channels
    return join_channels(channels, from_files)


def stored_records(method: Any) -> Iterable[Record | Skipped] | None:
    """The records of a data method that reads files, images not decoded; None for others."""
    reader = method if hasattr(method, "records") else as_source(inputs.open_source(method))
    records: Iterable[Record | Skipped] | None = reader.records()
    return records


def join_channels(records: Channels, files: Channels) -> Channels:
    """Channels of both, over the records of the first, in their order."""
    row_of = {key: row for row, key in enumerate(files.ids)}
    rows = np.array([row_of.get(key, -1) for key in records.ids], dtype=np.int64)
    stored = rows >= 0
    if not stored.any():
        records.absent |= dict.fromkeys(FILE_CHANNELS, "the files hold none of these records' ids")
        return records
    for name, values in files.numbers.items():
        # a record that is in no file stands where it tells nothing
        records.numbers[name] = np.where(stored, values[rows], np.median(values))
    for name, kind in files.kinds.items():
        records.kinds[name] = np.where(stored, kind[rows], -1)
    records.absent |= files.absent
    if files.sizes is not None:
        records.sizes = np.where(stored[:, None], files.sizes[rows], 0.0)
    return records


# ---- what is read off the records


def record_channels(ids: Sequence[str], captions: Sequence[str]) -> Channels:
    """Order, ids and captions."""
    channels, n = Channels(ids), len(ids)
    order = np.arange(n)
    order_blocks = min(ORDER_BLOCKS, max(1, n // (2 * RARE)))
    channels.numbers["row"] = order.astype(np.float64)
    channels.kinds["row_block"] = order * order_blocks // max(1, n)
    channels.kinds["key_pattern"] = number_values(key_pattern(key) for key in ids)
    if not len(captions):
        channels.absent |= dict.fromkeys(CAPTION_CHANNELS, "no captions")
        return channels
    channels.numbers["caption_length"] = np.fromiter(map(len, captions), np.float64, n)
    same = number_values(captions)
    channels.numbers["caption_repeats"] = np.bincount(same)[same].astype(np.float64)
    channels.kinds["caption_template"] = number_values(caption_templates(captions))
    return channels


def key_pattern(key: str) -> str:
    """An id with its numbers left out, cut: `train/00012/003.jpg` -> `train/0/0.jpg`."""
    return re.sub(r"\d+", "0", key[:512])


def caption_templates(captions: Sequence[str]) -> Iterator[str]:
    """Each caption with only the commonest words of all captions left, others as `_`."""
    holders = Counter(word for c in captions for word in set(split_words(c[:4096])))
    common = {word for word, _ in holders.most_common(COMMON_WORDS)}
    for caption in captions:
        words = split_words(caption[:4096])[: 4 * TEMPLATE_WORDS]
        template: list[str] = []
        for word in words:
            if word in common:
                template.append(word)
            elif template[-1:] != ["_"]:
                template.append("_")
        yield " ".join(template[:TEMPLATE_WORDS])


def number_values(values: Iterable[Hashable]) -> NDArray[np.int64]:
    """Equal values -> equal numbers 0, 1, ..., in order of appearance."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(v, len(number)) for v in values], dtype=np.int64)


# ---- what is read off the files


def file_channels(records: Iterable[Record | Skipped]) -> Channels:
    """Of the stored images that can be read. Raises UserError for a shard that cannot be."""
    ids: list[str] = []
    images: list[StoredImage] = []
    counts: Counter[int] = Counter()
    in_tars = False
    try:
        for record, tar_header in stored_images.with_tar_headers(records):
            image = stored_images.describe_image(record, tar_header)
            if image is None:
                continue
            in_tars |= tar_header is not None
            shard = record.shard
            ids += record.ids
            images += [replace(image, shard=shard, place=counts[shard])] * len(record.ids)
            counts[shard] += 1
    except OSError as error:
        raise UserError(
            f"{error.filename or 'a shard'} cannot be read: {error.strerror or error}"
        ) from error
    return _image_channels(ids, images, in_tars) if images else Channels(ids)


def _image_channels(ids: list[str], images: list[StoredImage], in_tars: bool) -> Channels:
    """The channels of stored images, at least one."""
    sizes = np.array([image.header.shape for image in images], np.float64)
    numbers = {
        "file_size": np.array([image.size for image in images], np.float64),
        "file_time": np.array([image.time for image in images], np.float64),
    }
    kinds = {
        "file_owner": number_values(image.owner for image in images),
        "extension": number_values(image.extension for image in images),
        "format": number_values(image.header.format for image in images),
        "layout": number_values(image.header.layout for image in images),
    }
    channels = Channels(ids, numbers, kinds)
    if (sizes > 0).any():
        kinds["shape"] = number_values(image.header.shape for image in images)
        numbers["aspect"] = sizes[:, 0] / np.maximum(sizes[:, 1], 1)
        channels.sizes = sizes
    else:
        channels.absent |= dict.fromkeys(("shape", "aspect"), "no header says its size")
    if any(image.header.tables for image in images):
        kinds["jpeg_tables"] = number_values(image.header.tables for image in images)
    else:
        channels.absent["jpeg_tables"] = "no image is a JPEG"
    if in_tars:
        kinds["shard"] = np.array([image.shard for image in images], np.int64)
        numbers["place_in_shard"] = np.array([image.place for image in images], np.float64)
    else:
        channels.absent |= dict.fromkeys(SHARD_CHANNELS, "not in shards")
    return channels


# ---- how well each tells poisons from the rest


def measure_channels(
    channels: Channels, truth: NDArray[np.bool_], what: str = "poisons"
) -> list[MeasuredChannel]:
    """AUROC of every channel with its interval, worst first.

    A channel separates when its AUROC reaches SEPARATES and the interval at a level corrected for
    the number of channels (Bonferroni) lies above 0.5.

    Args:
        channels: Of N records.
        truth: bool (N,), what the channels are to tell.
        what: `truth` in words.

    Returns:
        One for each channel; none where either half of the records has too few of either side.
    """
    choosing = draws(0, channels.ids, 1, "leaks")[:, 0] < 0.5
    for half in (truth[choosing], truth[~choosing]):
        if min(half.sum(), (~half).sum()) < MIN_RECORDS:
            return []
    scores = {name: orient(v, truth, choosing) for name, v in channels.numbers.items()}
    scores |= {name: rate_kinds(kind, truth, choosing) for name, kind in channels.kinds.items()}
    target, level = truth[~choosing], 1 - 0.05 / max(1, len(scores))
    measured = []
    for name, values in scores.items():
        s = values[~choosing]
        auroc, (low, high) = stats.auroc(s, target), stats.auroc_interval(s, target)
        how = (
            f"{DESCRIPTIONS[name]}, alone; {int(target.sum())} {what} and {int((~target).sum())} "
            f"others; direction chosen on the other half of the records, {stats.AUROC_INTERVAL}"
        )
        separates = auroc >= SEPARATES and stats.auroc_interval(s, target, level)[0] > 0.5
        measured.append(MeasuredChannel(name, Measure(auroc, len(s), low, high, how), separates))
    return sorted(measured, key=lambda channel: (-channel.auroc.value, channel.name))


def orient(
    values: NDArray[np.float64], truth: NDArray[np.bool_], choosing: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Numbers, with the sign by which poisons are higher among the choosing half."""
    return values if stats.auroc(values[choosing], truth[choosing]) >= 0.5 else -values


def rate_kinds(
    kind: NDArray[np.int64], truth: NDArray[np.bool_], choosing: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Poison rate of each record's kind in the choosing half, the overall rate as a prior."""
    code, size = np.unique(kind, return_inverse=True, return_counts=True)[1:]
    # rare kinds count as one: a kind that is hardly seen twice would be judged by whether the
    # choosing half happens to hold it
    code = np.where(size[code] < RARE, len(size), code)
    count = np.bincount(code[choosing], minlength=code.max() + 1)
    poisons = np.bincount(code[choosing], truth[choosing], minlength=code.max() + 1)
    rate: NDArray[np.float64] = (poisons + truth[choosing].mean()) / (count + 1)
    return rate[code]
