"""bezoar: is this data set poisoned, is this encoder backdoored, and what now?

from bezoar import Evaluate, Poison, Settings, Train, execute

poisoned = Poison("scenes", "backdoor:count=200", "patch:size=6", "striped star")
run = execute(Evaluate(Train(poisoned)), Settings(seed=0))
print(run.metric("attack_success"), run.path / "report.html")
"""

import importlib
from typing import Any

_WHERE = {
    "Poison": "verbs.poison",
    "Train": "verbs.train",
    "Inject": "verbs.inject",
    "Evaluate": "verbs.evaluate",
    "Scan": "verbs.scan",
    "Survive": "verbs.survive",
    "Audit": "verbs.audit",
    "Calibrate": "verbs.calibrate",
    "Shadows": "verbs.shadows",
    "Repair": "verbs.repair",
    "Check": "verbs.check",
    "Reproduce": "verbs.reproduce",
    "Dose": "verbs.dose",
    "Demo": "verbs.demo",
    "Run": "runs.run",
    "Settings": "runs.verb",
    "execute": "reports.page",
    "UserError": "errors",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Names are looked up when they are used, so that `import bezoar` is instant."""
    if name not in _WHERE:
        raise AttributeError(f"module 'bezoar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bezoar.{_WHERE[name]}"), name)
