"""The whole story on embedded data: poison, train, measure, find, train again without what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from bezoar.run import Job, Run
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train


@dataclass(frozen=True)
class Demo:
    """The whole story on embedded data, in minutes on two cores, without a download. Ends with a report."""

    count: Annotated[int, "clean pairs to train on"] = 20000
    test: Annotated[int, "held-out pairs"] = 2000
    epochs: Annotated[int, "passes of each of the three trainings"] = 7
    poisons: Annotated[int, "records that carry the patch"] = 200
    victims: Annotated[int, "targeted victims, at 16 captions and again at one"] = 16
    target: Annotated[str, "what the patch is to be read as"] = "striped star"
    trigger: Annotated[str, "the patch"] = "patch:size=6,fill=checker"

    def work(self, job: Job) -> dict[str, Any]:
        """-> metrics `clean.*`, `poisoned.*`, `scan.*`, `repaired.*` of the runs it makes."""
        data, test = f"scenes:count={self.count}", f"scenes:count={self.test},split=test"
        recipe = f"clip:epochs={self.epochs}"
        patch = job.run(Poison(data, f"backdoor:count={self.poisons}", self.trigger, self.target))
        many = job.run(Poison(patch, f"targeted:captions=16,victims={self.victims}", victims=test))
        plan = job.run(Poison(many, f"targeted:captions=1,victims={self.victims}", victims=test))
        clean = job.run(Train(data, objective=recipe))
        poisoned = job.run(Train(plan, objective=recipe, follow=test))
        scan = job.run(Scan(poisoned))
        repaired = job.run(Train(plan, objective=recipe, keep=scan))
        measured = {
            "clean": job.run(Evaluate(clean, test, attack=plan)),
            "poisoned": job.run(Evaluate(poisoned, test, baseline=clean)),
            "scan": scan,
            "repaired": job.run(Evaluate(repaired, test)),
        }
        job.notes = {name: run.name for name, run in measured.items()}
        job.notes |= {"trained": {"clean": clean.name, "poisoned": poisoned.name, "repaired": repaired.name}}
        job.goals = plan.manifest["goal"]
        return {f"{name}.{key}": run.metric(key) for name, run in measured.items() for key in metrics(run)}


def metrics(run: Run) -> list[str]:
    """Names of a run's metrics."""
    return list(run.manifest["metrics"])
