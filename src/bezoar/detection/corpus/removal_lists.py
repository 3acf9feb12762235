"""CSV tables of a scan: the records that it removes, each with the reason, and all scores."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from pyarrow import csv as arrow_csv

from bezoar.data.files.writing import whole_file
from bezoar.detection.corpus.corpus import ROWS, Corpus
from bezoar.detection.ranking import Ranking
from bezoar.evaluation.scores import Scores

REMOVED = "removed.csv"
SCORES_CSV = "scores.csv"
COPY = "a further copy of a picture whose captions diverge"
FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that spreadsheets would run


def explain_removal(row: int, place: int, by_detector: Mapping[str, Scores]) -> str:
    """Why a record leaves. place: its rank, from 1."""
    raising = [
        name for name, s in by_detector.items() if s.raised is not None and bool(s.raised[row])
    ]
    return f"raised by {' and '.join(raising)}" if raising else f"rank {place:,} by score"


def write_removed(folder: Path, corpus: Corpus, ranking: Ranking) -> None:
    """Write removed.csv: what the keep-list leaves out and why, the worst first."""
    with whole_file(folder / REMOVED, "w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("rank", "id", "place", "why", "score", "caption"))
        for place, row in enumerate(ranking.leaving.tolist(), 1):
            caption = corpus.captions[row] if len(corpus.captions) else ""
            is_copy = place > len(ranking.removed)
            why = COPY if is_copy else explain_removal(row, place, ranking.by_detector)
            score = f"{float(ranking.merged.values[row]):.6g}"
            out.writerow(
                (
                    "" if is_copy else place,
                    corpus.ids[row],
                    corpus.place_of(row),
                    why,
                    score,
                    plain_cell(caption),
                )
            )


def plain_cell(text: str) -> str:
    """A caption as a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULAS) else text


def write_scores_csv(folder: Path, parquet: str) -> None:
    """Write the columns of scores.parquet, captions aside, as scores.csv."""
    with (
        pq.ParquetFile(folder / parquet) as table,
        whole_file(folder / SCORES_CSV, "wb") as file,
    ):
        names: Sequence[str] = [n for n in table.schema_arrow.names if n != "caption"]
        schema = table.schema_arrow.remove(table.schema_arrow.get_field_index("caption"))
        with arrow_csv.CSVWriter(file, schema) as out:
            for batch in table.iter_batches(ROWS, columns=names):
                out.write_batch(batch)
