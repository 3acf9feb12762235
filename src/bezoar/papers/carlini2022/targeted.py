"""Targeted poisoning: success against the number of captions of one image (Carlini & Terzis 2022, section 5.1)."""

from bezoar.papers.carlini2022 import clean, ladder, setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions, readings


@method
class Targeted:
    """Every victim has an image and a target of its own."""

    def __call__(self, given: TableOptions) -> Table:
        """The table at a scale."""
        s = setup(given)
        trials = [t for t, _ in ladder(s)]

        def cells(of: list, counts: tuple[int, ...]) -> tuple[Cell, ...]:
            return (
                Cell("success", readings(of, *(f"targeted_success@{k}" for k in counts))),
                Cell("in top 5", readings(of, *(f"targeted_top5@{k}" for k in counts))),
            )

        rows = [Row("0", cells(clean(s), s.counts), 0)]
        rows += [Row(str(k), cells(trials, (k,)), k) for k in s.counts]
        few = str(min(k for k in s.counts if k >= min(3, s.counts[-1])))
        most = str(s.counts[-1])
        return Table(
            "Targeted poisoning: success against the number of captions",
            "3 pairs of 3,000,000 make CLIP misread a chosen image; near 40 % of victims fell at 3 captions (recalled).",
            "captions of one image",
            tuple(rows),
            (
                Claim(
                    f"{most} captions make a chosen image misread",
                    "abstract",
                    "+",
                    lambda r: r.compare_rows("success", most, "0"),
                ),
                Claim(
                    f"As few as {few} captions already do",
                    "abstract",
                    "+",
                    lambda r: r.compare_rows("success", few, "0"),
                ),
            ),
            dose_response_cells=("success",),
            unit="captions",
            notes=(
                "Victims are held-out images, as in the paper; each is added with its captions, and none is in the data.",
            ),
        )
