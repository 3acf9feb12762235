"""Whole stories on embedded data. data: poison, train, measure, find, train again. encoder: pre-train, inject, measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from bezoar.evaluation.scores import Measure
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Takes
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

# Heads of the story of an encoder. They were fixed before any attack, and all of them are reported.
HEADS = ("linear", "knn:k=20", "mlp:seeds=1,limit=1000")


@dataclass(frozen=True)
class Demo:
    """A whole story on embedded data, in minutes on two cores, without a download. Ends with a report."""

    story: Annotated[
        Literal["data", "encoder"],
        Takes(positional=True),
        "poisoned data that a CLIP learns from, or a backdoor put into an encoder",
    ] = "data"
    count: Annotated[int, "clean records to train on"] = 20000
    test: Annotated[int, "held-out records"] = 2000
    epochs: Annotated[
        int, "passes of each training; 0: as the story needs, 7 for data, 3 for encoder"
    ] = 0
    target: Annotated[str, "what triggered images are to be read as"] = "striped star"
    trigger: Annotated[str, "a patch"] = "patch:size=6,fill=checker"
    poisons: Annotated[int, "story data: records that carry the patch"] = 200
    victims: Annotated[int, "story data: targeted victims, at 16 captions and again at one"] = 16
    shadow: Annotated[int, "story encoder: shadow images"] = 4000
    labelled: Annotated[int, "story encoder: records that its users train their classifiers on"] = (
        2000
    )
    attack: Annotated[str, "story encoder: how"] = "badencoder:epochs=6,batch=64,lr=0.02,views=16"

    def work(self, job: Job) -> dict[str, Measure]:
        """Run the story. Its metrics are those of the runs it makes, under `clean`, `poisoned`, `scan` and so on."""
        data = f"scenes:count={self.count}"
        test = f"scenes:count={self.test},split=test"
        if self.story == "data":
            return self._tell_data(job, data, test)
        return self._tell_encoder(job, data, test)

    def _tell_data(self, job: Job, data: str, test: str) -> dict[str, Measure]:
        recipe = f"clip:epochs={self.epochs or 7}"
        backdoor = f"backdoor:count={self.poisons}"
        patch = job.run(Poison(data, backdoor, self.trigger, self.target))
        many = job.run(Poison(patch, f"targeted:captions=16,victims={self.victims}", victims=test))
        plan = job.run(Poison(many, f"targeted:captions=1,victims={self.victims}", victims=test))
        clean = job.run(Train(data, objective=recipe))
        poisoned = job.run(Train(plan, objective=recipe, follow=test))
        scan = job.run(Scan(poisoned))
        repaired = job.run(Train(plan, objective=recipe, keep=scan))
        measured_runs = {
            "clean": job.run(Evaluate(clean, test, attack=plan)),
            "poisoned": job.run(Evaluate(poisoned, test, baseline=clean)),
            "scan": scan,
            "repaired": job.run(Evaluate(repaired, test)),
        }
        trainings = {"clean": clean, "poisoned": poisoned, "repaired": repaired}
        return collect_metrics(job, measured_runs, trainings, plan)

    def _tell_encoder(self, job: Job, data: str, test: str) -> dict[str, Measure]:
        clean = job.run(Train(data, "tower", f"simclr:epochs={self.epochs or 3},crop=0.3"))
        shadow = f"scenes:count={self.shadow},seed=1"  # the attacker's own images
        labelled = f"scenes:count={self.labelled},seed=2"
        inject = Inject(
            clean,
            shadow,
            (self.target,),
            (labelled,),
            self.attack,
            (self.trigger,),
            "confident",
        )
        attacked = job.run(inject)
        evaluation = job.run(Evaluate(attacked, test, HEADS, baseline=clean, train=labelled))
        measured_runs = {"attacked": evaluation, "inject": attacked}
        return collect_metrics(job, measured_runs, {"clean": clean}, attacked)


def collect_metrics(
    job: Job, measured_runs: Mapping[str, Run], trainings: Mapping[str, Run], attack: Run
) -> dict[str, Measure]:
    """Every metric of the runs under their names. The job's notes name the runs, its goals are those of the attack."""
    job.notes = {name: run.name for name, run in measured_runs.items()}
    job.notes["trained"] = {name: run.name for name, run in trainings.items()}
    job.goals = attack.manifest["goal"]
    return {
        f"{name}.{key}": run.metric(key)
        for name, run in measured_runs.items()
        for key in run.manifest["metrics"]
    }
