"""The table of a scan's sources: records grouped by content, tested by source, and written down."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar.data.files.writing import whole_file
from bezoar.data.randomness import sample_rows
from bezoar.detection import merging, source_table
from bezoar.detection.corpus.corpus import Corpus
from bezoar.detection.corpus.record_sources import find_sources
from bezoar.detection.corpus.removal_lists import plain_cell
from bezoar.detection.pseudo_classes import SAMPLE, assign_centres, frequent_words
from bezoar.detection.source_table import SourceTable, tabulate_sources
from bezoar.evaluation.kmeans import cluster_centres
from bezoar.evaluation.scores import Measure, Scores, proportion

FILE = "sources.csv"
GROUPS = 32  # groups of content at most
GROUP_RECORDS = 100  # records of a group, on average, at least
WORDS = 3  # that describe the captions of a source that stands out
MERGED = "all together"  # name of the merged ranking
HEAD = (
    "source", "records", "verdict", "q", "p", "raised", "ranking", "pooled", "worst_tenth",
    "nats", "low", "high", "words",
)  # fmt: skip


def pool_sources(
    data: Corpus, merged: Scores, by_detector: Mapping[str, Scores], wanted: str
) -> SourceTable | None:
    """Test the sources of a scan's records; None where they have none.

    Args:
        by_detector: Scores of each.
        wanted: What the sources are; see `find_sources`.

    Raises:
        UserError: As `find_sources` does.
    """
    sources = find_sources(data, wanted)
    if sources is None:
        return None
    images = group_vectors(data.embedded.images, data.ids)
    texts = data.embedded.texts
    captions = images if texts is None else group_vectors(texts, data.ids)
    rankings = {name: scores.select(data.ids) for name, scores in by_detector.items()}
    if len(rankings) > 1:
        rankings[MERGED] = merged.select(data.ids)
    return tabulate_sources(sources, rankings, captions, images)


def group_vectors(vectors: Tensor, ids: Any) -> NDArray[np.int64]:
    """The nearest of at most GROUPS centres of k-means, of each of N vectors: int64 (N,)."""
    count = max(1, min(GROUPS, len(ids) // GROUP_RECORDS))
    sample = torch.from_numpy(sample_rows(ids, SAMPLE, 0))
    centres = cluster_centres(vectors[sample].float(), count, 0)
    return assign_centres(vectors, centres).numpy()


def lift_records(merged: Scores, table: SourceTable, by_detector: Mapping[str, Scores]) -> Scores:
    """The merged ranking with the records for which sources stand out after the raised ones."""
    raised = merging.raised_rows([s.select(merged.ids) for s in by_detector.values()], len(merged))
    return source_table.lift_records(merged, table.accused, raised)


def write_table(folder: Path, data: Corpus, table: SourceTable) -> None:
    """Write sources.csv: a line for each source that was tested, the most suspicious first.

    Columns: `pooled` records were tested together, all of the source or those of one caption group;
    of these `worst_tenth` are in the worst tenth of the ranking; `nats` is the mean of -log of a
    record's level there, 1 where nothing is suspicious, with its 95 % interval; `words` are those
    of the suspicious records of a source that stands out.
    """
    rows_of: dict[int, list[int]] = {}
    for row, number in zip(table.accused.tolist(), table.source_of_accused.tolist(), strict=True):
        rows_of.setdefault(number, []).append(row)
    with whole_file(folder / FILE, newline="") as file:
        out = csv.writer(file)
        out.writerow(HEAD)
        for row in table.rows:
            test = row.evidence
            captions = [data.captions[i] for i in rows_of.get(row.number, ()) if len(data.captions)]
            nats = [f"{x:.3f}" for x in (test.mean, test.low, test.high)]
            counts = (
                plain_cell(row.name),
                row.records,
                row.verdict,
                f"{row.q:.3g}",
                f"{test.p:.3g}",
                row.raised,
            )
            words = plain_cell(" ".join(frequent_words(captions, WORDS)))
            out.writerow((*counts, test.ranking, test.records, test.in_tail, *nats, words))


def describe_table(
    table: SourceTable | None,
) -> tuple[list[str], dict[str, Any], dict[str, Measure]]:
    """Return sentences, notes for the manifest, and metrics of a table, if there is one."""
    if table is None:
        return [], {}, {}
    sentence = _sentence(table)
    standing_out = table.standing_out
    notes = {
        "what": table.what,
        "tested": len(table.rows),
        "untested": table.untested,
        "lifted": len(table.accused),
        "sentence": sentence,
    }
    how = (
        "sources that hold more suspicious records than their content explains, at a false "
        f"discovery rate of {source_table.FALSE_DISCOVERIES:g}; on clean data, false alarms"
    )
    if not table.rows:
        return [sentence], {"sources": notes}, {}
    return (
        [sentence],
        {"sources": notes},
        {"sources": proportion(len(standing_out), len(table.rows), how)},
    )


def _sentence(table: SourceTable) -> str:
    """Say how many sources stand out, and name the first."""
    names = [row.name for row in table.standing_out]
    text = f"{len(names):,} of {len(table.rows):,} sources ({table.what}) stand out"
    if names:
        more = " ..." if len(names) > 3 else ""
        text += (
            f": {', '.join(names[:3])}{more}; {len(table.accused):,} of their records are lifted"
        )
    if table.differs_by_nature:
        text += ", since so many differ by nature"
    if table.untested:
        text += f"; {table.untested:,} have fewer than {source_table.LEAST_RECORDS} records"
    return text
