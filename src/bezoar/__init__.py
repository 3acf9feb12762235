"""bezoar: is this data set poisoned, is this encoder backdoored, and what now?

from bezoar import Evaluate, Poison, Settings, Train, execute

poisoned = Poison("scenes", "backdoor:count=200", "patch:size=6", "striped star")
run = execute(Evaluate(Train(poisoned)), Settings(seed=0))
print(run.verdict, run.metric("attack_success"), run.path / "report.html")
"""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bezoar.errors import suggest
from bezoar.machine import set_threads

set_threads()  # OpenMP reads these settings once, when torch or numpy are imported

_MODULES = {  # public name -> its module; every verb is a class named like its file
    **{
        file.stem.title(): f"verbs.{file.stem}"
        for file in sorted((Path(__file__).parent / "verbs").glob("[!_]*.py"))
    },
    "Run": "runs.run",
    "Settings": "runs.verb",
    "execute": "reports.page",
    "UserError": "errors",
}
__all__ = list(_MODULES)


def __dir__() -> list[str]:
    """The public names, for `dir` and for completion by the tab key."""
    return sorted([*__all__, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import bezoar` is instant."""
    if name == "__version__":
        return version("bezoar")
    if name not in _MODULES:
        hint = suggest(name, _MODULES)
        raise AttributeError(f"module 'bezoar' has no attribute {name!r}{hint}")
    return getattr(importlib.import_module(f"bezoar.{_MODULES[name]}"), name)
