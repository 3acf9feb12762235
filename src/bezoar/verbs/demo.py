"""Whole stories on embedded data. data: poison, train, measure, find, train again. encoder: pre-train, inject, measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Takes
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

HEADS = (
    "linear",
    "knn:k=20",
    "mlp:seeds=1,limit=1000",
)  # fixed before any attack; all are reported


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

    def work(self, job: Job) -> dict[str, Any]:
        """-> metrics `clean.*`, `poisoned.*`, `scan.*`, `repaired.*`, or `attacked.*` and `inject.*`, of the runs it makes."""
        return self._data(job) if self.story == "data" else self._encoder(job)

    def _data(self, job: Job) -> dict[str, Any]:
        data, test = f"scenes:count={self.count}", f"scenes:count={self.test},split=test"
        recipe = f"clip:epochs={self.epochs or 7}"
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
        trained = {"clean": clean.name, "poisoned": poisoned.name, "repaired": repaired.name}
        return told(job, measured, {"trained": trained}, plan)

    def _encoder(self, job: Job) -> dict[str, Any]:
        data, test = f"scenes:count={self.count}", f"scenes:count={self.test},split=test"
        clean = job.run(Train(data, "tower", f"simclr:epochs={self.epochs or 3},crop=0.3"))
        shadow = f"scenes:count={self.shadow},seed=1"  # the attacker's own images, not those of the victim
        labelled = f"scenes:count={self.labelled},seed=2"
        bad = job.run(
            Inject(
                clean,
                shadow,
                (self.target,),
                (labelled,),
                self.attack,
                (self.trigger,),
                "confident",
            )
        )
        found = job.run(Evaluate(bad, test, HEADS, baseline=clean, train=labelled))
        return told(
            job, {"attacked": found, "inject": bad}, {"trained": {"clean": clean.name}}, bad
        )


def told(job: Job, measured: dict[str, Run], notes: dict[str, Any], attack: Run) -> dict[str, Any]:
    """Every metric of the runs under their names; the notes name the runs."""
    job.notes = {name: run.name for name, run in measured.items()} | notes
    job.goals = attack.manifest["goal"]
    return {
        f"{name}.{key}": run.metric(key)
        for name, run in measured.items()
        for key in run.manifest["metrics"]
    }
