"""Reproduce a table of a paper and print its claims: confirmed, contradicted or undecided.

    python examples/reproduce_a_table.py [TABLE] [SCALE]

Scale `smoke` trains on 512 scenes, only to see whether the table runs; `small` takes minutes a
table on two cores.
"""

import json
import sys

from bezoar import Reproduce, Settings, execute


def main(
    table: str = "carlini2022/sources", scale: str = "smoke", settings: Settings | None = None
) -> None:
    run = execute(Reproduce((table,), scale), settings)
    for result in json.loads(run.file("tables.json").read_text()):
        print(result["title"])
        for row in result["rows"]:
            cells = (f"{cell['name']} {cell['measure']['value']:.3f}" for cell in row["cells"])
            print(f"  {row['name']}: {', '.join(cells)}")
        for claim in result["claims"]:
            interval = f"{float(claim['low']):.3f} .. {float(claim['high']):.3f}"
            print(f"  {claim['text']}: {claim['verdict']} ({claim['value']:.3f}, {interval})")


if __name__ == "__main__":
    main(*sys.argv[1:])
