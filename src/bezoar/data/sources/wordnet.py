"""WordNet's definitions of nouns (Miller 1995): 82,115 texts in 26 supersenses.

Supersenses are WordNet's lexicographer files. Debian's package `wordnet-base` holds them: run
`apt-get download wordnet-base`, then `dpkg -x` into a folder; nothing needs to be installed.
"""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from bezoar.data.files.paths import existing_folder, read_regular_text
from bezoar.data.files.skipped import ReadReport, Skipped
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import draws
from bezoar.errors import UserError
from bezoar.registry import method

SUPERSENSES = (  # by the number of the lexicographer file, from 3 on
    "tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event",
    "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon", "plant",
    "possession", "process", "quantity", "relation", "shape", "state", "substance", "time",
)  # fmt: skip
FIRST = 3
TEN = (
    "act", "animal", "artifact", "body", "communication", "food", "location", "person", "plant",
    "substance",
)  # fmt: skip
FILE = "data.noun"
PLACES = (FILE, f"usr/share/wordnet/{FILE}", f"dict/{FILE}")
MAX_BYTES = 256 << 20
TEST_SHARE = 0.2  # of the definitions, by a draw that belongs to each


@method
class Wordnet:
    """An id is `noun/OFFSET`, the place in data.noun.

    Texts are definitions without their examples.
    """

    path: Annotated[str, "folder that the package was unpacked into, or that holds data.noun"]
    split: Annotated[Literal["train", "test"], "four fifths of the definitions, or the others"] = (
        "train"
    )
    classes: Annotated[tuple[str, ...], "supersenses, in this order"] = TEN
    each: Annotated[int | None, "most texts of a supersense, a fixed sample; none: all"] = 200

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.classes) - set(SUPERSENSES)):
            raise ValueError(f"no supersense {unknown[0]!r}; there are {', '.join(SUPERSENSES)}")
        if len(self.classes) < 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must name supersenses, each once")
        if self.each is not None and self.each < 1:
            raise ValueError("each must be at least 1")

    def files(self) -> list[Path]:
        """The file of definitions. Raises UserError if there is none."""
        folder = existing_folder(self.path, "folder of WordNet")
        path = next((folder / p for p in PLACES if (folder / p).is_file()), None)
        if path is None:
            raise UserError(f"{folder} holds no {FILE}, nor does usr/share/wordnet in it")
        return [path]

    def __call__(self) -> Pairs:
        """Return the records. Raises UserError if no line is a definition."""
        (path,) = self.files()
        report = ReadReport()
        records: list[tuple[str, int, str]] = []
        for number, line in enumerate(read_regular_text(path, MAX_BYTES).split("\n"), 1):
            if not line or line.startswith(" "):  # the licence at the beginning
                continue
            record = _parse_line(line)
            if record is None:
                report.leave_out(Skipped(self.path, f"line {number}", "no definition"))
            elif SUPERSENSES[record[1]] in self.classes:
                records.append(record)
        if not records:
            raise UserError(f"{path}: no line is a definition ({report})")
        ids = [record[0] for record in records]
        in_test = draws(0, ids, 1, "split")[:, 0] < TEST_SHARE
        order = draws(0, ids, 1, "pool")[:, 0].argsort()
        rows = order[in_test[order] == (self.split == "test")]
        chosen = self._sample(rows, np.array([record[1] for record in records]))
        report.read = len(chosen)
        labels = torch.tensor([self.classes.index(SUPERSENSES[records[i][1]]) for i in chosen])
        texts = [records[i][2] for i in chosen]
        return Pairs.of_texts(texts, [ids[i] for i in chosen], labels, self.classes, report)

    def _sample(self, rows: np.ndarray, senses: np.ndarray) -> list[int]:
        """The first rows of each supersense, in the order of the file."""
        chosen: list[int] = []
        for name in self.classes:
            of_sense = rows[senses[rows] == SUPERSENSES.index(name)]
            chosen += of_sense[: self.each].tolist()
        return sorted(chosen)


def _parse_line(line: str) -> tuple[str, int, str] | None:
    """Id, number of the supersense and definition of a line; None if it has none."""
    head, bar, gloss = line.partition(" | ")
    fields = head.split(" ", 3)
    definition = gloss.partition('; "')[0].strip()
    if not bar or len(fields) < 4 or not definition or not fields[1].isdecimal():
        return None
    sense = int(fields[1][:4]) - FIRST
    is_noun = 0 <= sense < len(SUPERSENSES) and fields[0].isdecimal() and fields[0].isascii()
    return (f"noun/{fields[0][:20]}", sense, definition) if is_noun else None
