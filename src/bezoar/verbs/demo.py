"""Runs a whole example on drawn images: an attack on data and its repair, or one on an encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from bezoar.evaluation.scores import Measure
from bezoar.runs.estimates import SIZE, pairs_per_second
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings, Takes, Trial, Verb
from bezoar.terminal import warn
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

# Heads of the story of an encoder. They were fixed before any attack, and all of them are reported.
HEADS = ("linear", "knn:k=20", "mlp:seeds=1,limit=1000")


@dataclass(frozen=True)
class Demo:
    """The whole story on drawn pictures, without a download: poison, train, measure, scan, train
    again, and a page.
    """

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
    target: Annotated[str, "the class that triggered images shall be read as"] = "striped star"
    trigger: Annotated[str, "a patch"] = "patch:size=6,fill=checker"
    poisons: Annotated[int, "story data: records that carry the patch"] = 200
    victims: Annotated[int, "story data: targeted victims, at 16 captions and again at one"] = 16
    shadow: Annotated[int, "story encoder: shadow images"] = 4000
    labelled: Annotated[int, "story encoder: records that its users train their classifiers on"] = (
        2000
    )
    attack: Annotated[str, "story encoder: how"] = "badencoder:epochs=6,batch=64,lr=0.02,views=16"

    def planned_trials(self, settings: Settings) -> list[Trial]:
        """The trainings of the story, for an estimate."""
        data = f"scenes:count={self.count}"
        if self.story == "encoder":
            recipe = f"simclr:epochs={self.epochs or 3},crop=0.3"
            return [Trial(Train(data, "tower", recipe), settings.seed)]
        verb = Train(data, objective=f"clip:epochs={self.epochs or 7}")
        return [Trial(verb, seed) for seed in range(3)]  # each on other records

    def work(self, job: Job) -> dict[str, Measure]:
        """Run the story.

        Its metrics are those of its runs, under `clean`, `poisoned`, `scan` and so on.
        """
        data = f"scenes:count={self.count}"
        test = f"scenes:count={self.test},split=test"
        if self.story == "data":
            return self._tell_data(job, data, test)
        return self._tell_encoder(job, data, test)

    def _tell_data(self, job: Job, data: str, test: str) -> dict[str, Measure]:
        recipe = f"clip:epochs={self.epochs or 7}"
        backdoor = f"backdoor:count={self.poisons}"
        steps = Steps(job, 10, self.count * (self.epochs or 7) * 3)
        run = steps.run
        patch = run("plant a patch backdoor", Poison(data, backdoor, self.trigger, self.target))
        targeted = f"targeted:captions=16,victims={self.victims}"
        many = run("add targeted poisons", Poison(patch, targeted, victims=test))
        targeted = f"targeted:captions=1,victims={self.victims}"
        plan = run("add more, one caption each", Poison(many, targeted, victims=test))
        clean = run("train on clean data", Train(data, objective=recipe))
        poisoned = run("train on poisoned data", Train(plan, objective=recipe, follow=test))
        scan = run("scan the data", Scan(poisoned))
        repaired = run("train on what the scan keeps", Train(plan, objective=recipe, keep=scan))
        measured_runs = {
            "clean": run("measure the clean model", Evaluate(clean, test, attack=plan)),
            "poisoned": run("measure the poisoned model", Evaluate(poisoned, test, baseline=clean)),
            "scan": scan,
            "repaired": run("measure the repaired model", Evaluate(repaired, test)),
        }
        trainings = {"clean": clean, "poisoned": poisoned, "repaired": repaired}
        return collect_metrics(job, measured_runs, trainings, plan)

    def _tell_encoder(self, job: Job, data: str, test: str) -> dict[str, Measure]:
        steps = Steps(job, 3, self.count * (self.epochs or 3) * 2)  # SimCLR sees each image twice
        recipe = f"simclr:epochs={self.epochs or 3},crop=0.3"
        clean = steps.run("pre-train an encoder", Train(data, "tower", recipe))
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
        attacked = steps.run("put a backdoor into it", inject)
        evaluation = steps.run(
            "measure three classifiers over it",
            Evaluate(attacked, test, HEADS, baseline=clean, train=labelled),
        )
        measured_runs = {"attacked": evaluation, "inject": attacked}
        return collect_metrics(job, measured_runs, {"clean": clean}, attacked)


class Steps:
    """The steps of a story, each announced when it begins, after an estimate of the time."""

    def __init__(self, job: Job, total: int, pairs: int) -> None:
        self.job = job
        self.total = total
        self.done = 0
        # Trainings take about three fifths of the time of either story.
        minutes = max(1, round(pairs / pairs_per_second(SIZE) / 60 / 0.6))
        self._say(
            f"{total} steps, about {minutes} min on this machine; what is done already is not "
            "repeated"
        )

    def run(self, what: str, verb: Verb) -> Run:
        """Run the next step."""
        self.done += 1
        self._say(f"{self.done} of {self.total}: {what}")
        return self.job.run(verb)

    def _say(self, text: str) -> None:
        if not self.job.settings.quiet:
            warn(f"demo: {text}")


def collect_metrics(
    job: Job, measured_runs: Mapping[str, Run], trainings: Mapping[str, Run], attack: Run
) -> dict[str, Measure]:
    """All metrics of the runs under their names. The job's notes name the runs."""
    job.notes = {name: run.name for name, run in measured_runs.items()}
    job.notes["trained"] = {name: run.name for name, run in trainings.items()}
    job.goals = attack.manifest["goal"]
    return {
        f"{name}.{key}": run.metric(key)
        for name, run in measured_runs.items()
        for key in run.manifest["metrics"]
    }
