"""Tables of papers, declared. KIND `paper`: one file a table, a folder a paper.

A table is called with the user's options and returns a declaration: rows of cells, each a metric of
several trials. The `__init__` of a paper's folder holds what its tables share and lists them in
`TABLES`, in the order of the page.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bezoar.registry import make, spec
from bezoar.runs.tables import Table, TableOptions

SCENE_CLASSES = ("striped star", "dotted heart", "solid ring", "checkered crescent")
FIXED_PLACES = ("corner", "upper_left", "upper_right", "lower_left")  # for triggers of one training


class PaperTable(Protocol):
    """A table of a paper, configured: what every file of this kind defines."""

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table at a scale.

        Raises UserError when the scale needs data that `options` does not name.
        """
        ...


def dataset_spec(root: str, name: str, split: str, **fields: object) -> str:
    """The spec of a data set in the user's folder: `NAME.npz` or its publisher's own files.

    Args:
        root: The folder; "" stands for `data`.
        name: The data set, as its source is called.
        split: `train` or `test`.
        **fields: Further fields of the source, such as `limit` or `size`.
    """
    file = Path(root or "data") / f"{name}.npz"
    values: dict[str, object]
    if file.is_file():
        source, values = "npz", {"path": file, "split": split}
    else:
        source, values = name, {"split": split}
        if root:
            values["root"] = root
    return f"{source}:" + ",".join(f"{key}={value}" for key, value in (values | fields).items())


def limit_records(data: str, count: int) -> str:
    """The spec of the same data with another number of records."""
    source = make("data", data)
    field = "limit" if hasattr(source, "limit") else "count"
    return spec(replace(source, **{field: count}))
