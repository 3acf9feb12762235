"""Declarations of papers' tables. Kind `paper`: a folder for each paper, a file for each table.

A table is called with the user's options and returns a declaration: rows of cells, each a metric of
several trials. The `__init__` of a paper's folder holds the shared parts of its tables, and lists
them in `TABLES`, in the order of the page.
"""

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from bezoar.registry import make, spec
from bezoar.runs.tables import Table, TableOptions

SCENE_CLASSES = ("striped star", "dotted heart", "solid ring", "checkered crescent")
FIXED_PLACES = ("corner", "upper_left", "upper_right", "lower_left")  # for triggers of one training


class PaperTable(Protocol):
    """The interface of a paper's table."""

    def __call__(self, options: TableOptions) -> Table:
        """Declare the table at a scale. Raises UserError when `options` lacks the data."""
        ...


def dataset_spec(root: str, name: str, split: str, **fields: object) -> str:
    """The spec of a data set in the user's folder: `NAME.npz`, or the publisher's files.

    Args:
        root: The folder; "" means `data`.
        name: The name of the data source.
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
