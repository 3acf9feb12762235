"""Every metric of every finished run as one CSV table, with n and its 95 % interval.

python examples/results_as_table.py [RUNS] > results.csv
"""

import csv
import sys
from pathlib import Path
from typing import TextIO

from bezoar import Run

COLUMNS = ("run", "verb", "seed", "metric", "value", "low", "high", "n", "definition")


def main(runs: str = "runs", file: TextIO = sys.stdout) -> None:
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for manifest in sorted(Path(runs).glob("*/manifest.json")):
        run = Run(manifest.parent)
        if run.manifest["status"] != "done":
            continue
        for name in run.manifest["metrics"]:
            m = run.metric(name)
            facts = (run.name, run.verb, run.manifest["ask"]["seed"], name)
            writer.writerow((*facts, m.value, m.low, m.high, m.n, m.how))


if __name__ == "__main__":
    main(*sys.argv[1:])
