"""Targeted success against the number of captions of one image (Carlini & Terzis 2022, 5.1)."""

from bezoar.papers.carlini2022 import captions_cells, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Claim, Row, Table, TableOptions, row_difference


@method
class Targeted:
    """Every victim is a different image with a different target."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        counts = setup.caption_counts
        trials = [training.trial for training in setup.shared_trainings()]
        rows = [Row("0", captions_cells(setup.clean_trials(), *counts), 0)]
        rows += [Row(str(count), captions_cells(trials, count), count) for count in counts]
        few = str(min(count for count in counts if count >= min(3, counts[-1])))
        most = str(counts[-1])
        return Table(
            title="Targeted poisoning: success against the number of captions",
            paper_finding=(
                "3 pairs of 3,000,000 make CLIP misread a chosen image; near 40 % of victims were "
                "misread at 3 captions (recalled)."
            ),
            axis="captions of one image",
            rows=tuple(rows),
            claims=(
                Claim(
                    f"{most} captions make a chosen image misread",
                    "abstract",
                    "+",
                    row_difference("success", most, "0"),
                ),
                Claim(
                    f"As few as {few} captions already do",
                    "abstract",
                    "+",
                    row_difference("success", few, "0"),
                ),
            ),
            dose_response_cells=("success",),
            unit="captions",
            notes=(
                "Victims are held-out images, as in the paper; each is added with its captions, "
                "and none is in the data.",
            ),
        )
