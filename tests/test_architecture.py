"""Who may import whom: the layers of ARCHITECTURE.md, read off the import statements."""

import ast
from pathlib import Path

import bezoar
from bezoar import registry

SRC = Path(bezoar.__file__).parent
LEVEL = {"errors": 0, "registry": 0, "stats": 0, "progress": 0, "ranks": 0}
LEVEL |= dict.fromkeys(
    (
        "pairs",
        "reading",
        "shards",
        "plan",
        "captions",
        "encoder",
        "scores",
        "laws",
        "run",
        "environment",
    ),
    1,
)
LEVEL |= dict.fromkeys(
    (
        "neighbors",
        "training",
        "augment",
        "inputs",
        "drawing",
        "arrays",
        "indexed",
        "feed",
        "success",
    ),
    2,
)
LEVEL |= {"heads": 2, "products": 2, "distributed": 2, "torchrun": 5}
LEVEL |= dict.fromkeys(registry.KINDS.values(), 3)
LEVEL |= dict.fromkeys(("sweep", "tables", "selfsupervised"), 2)
LEVEL |= dict.fromkeys(("towers", "checkpoints", "layouts", "frozen", "references"), 2)
LEVEL |= dict.fromkeys(("corpora", "trust", "survival"), 2)
LEVEL |= dict.fromkeys(("density", "pseudo_classes", "traces", "ensemble"), 2)
LEVEL |= {"verdict": 1} | dict.fromkeys(
    ("classifiers", "inversion", "bank", "receipt", "occlusion", "patterns", "trunks"), 2
)
LEVEL |= dict.fromkeys(("texts", "contrastive", "ladder"), 2)
LEVEL |= {"tars": 1, "shifts": 2, "sarif": 2, "wording": 2}
LEVEL |= {"papers": 5, "verbs": 4, "report": 5, "cli": 5, "__main__": 6, "__init__": 6}


def imported(path: Path) -> set[str]:
    """Names directly below bezoar that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bezoar"):
            parts = (node.module or "").split(".")
            found |= {".".join(parts[1:])} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("bezoar.")}
    return found


def test_imports_point_down():
    for path in SRC.rglob("*.py"):
        own = path.relative_to(SRC).parts[0].removesuffix(".py")
        for name in imported(path):
            other = name.partition(".")[0]
            assert other in LEVEL, f"{path.name} imports {name}, which has no level"
            if LEVEL[own] == 3:
                assert LEVEL[other] < 3, (
                    f"{path}: a method imports {name}; methods never import one another"
                )
            # the run writes its own report when it is done: the one arrow that points up
            elif not (own == "run" and other == "report"):
                assert LEVEL[own] >= LEVEL[other], (
                    f"{path} (level {LEVEL[own]}) imports {name} (level {LEVEL[other]})"
                )


def test_no_file_is_longer_than_four_hundred_lines():
    for path in SRC.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path
