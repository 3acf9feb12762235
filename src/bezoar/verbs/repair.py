"""Repair an encoder with clean data, and write the receipt."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import Run
from bezoar.runs.verb import Input, Takes
from bezoar.verbs import evaluate

if TYPE_CHECKING:
    from bezoar.attacks.plan import Goal
    from bezoar.data.pairs import Pairs
    from bezoar.encoders.encoder import Encoder
    from bezoar.repair.receipt import EvaluationData

FRESH, ANOTHER = (
    4000,
    1009,
)  # clean records that are made to order: how many, and how far their seed is from the data's
LABELLED = 4000  # records that linear heads are fitted on, a fixed sample at most


@dataclass(frozen=True)
class Repair:
    """Take a backdoor out of an encoder with clean data alone, and say what that did: before, after, and after a relapse.

    Learning rates are chosen on clean validation records, never on the attack. Known triggers are only measured, with those
    that an audit inverted; a repair is given none but the audit's.
    """

    encoder: Annotated[
        Input,
        Takes("encoder", positional=True),
        "the suspect: a run, or a network with published weights",
    ]
    data: Annotated[
        Input,
        Takes("data"),
        "clean data; without it, fresh records where the training data are made to order",
    ] = None
    repair: Annotated[
        tuple[Input, ...],
        Takes("repair"),
        "one or more, one after another: see `bezoar list repair`",
    ] = ("finetune",)
    test: Annotated[
        Input, Takes("data"), "test data; without it, the test split of the training data"
    ] = None
    audit: Annotated[
        Input,
        Takes("run"),
        "audit run whose inverted triggers are measured, and unlearnt by `unlearn`",
    ] = None
    labelled: Annotated[
        Input, Takes("data"), "labelled data for linear heads; without it, TEST's training split"
    ] = None
    repaired: Annotated[
        Input,
        Takes("encoder"),
        "repaired already (trained on a keep-list, say): write the receipt alone",
    ] = None
    twin: Annotated[
        Input, Takes("encoder"), "the clean twin: what ten poisons do where no backdoor was"
    ] = None
    held: Annotated[float, "share of the clean data held apart to choose learning rates by"] = 0.2
    revive: Annotated[bool, "whether short fine-tunes try to bring the backdoor back"] = True

    def work(self, job: Job) -> dict[str, Any]:
        """-> encoder.json + encoder.safetensors (unless `repaired`), inverted-*.npz, readings.json; the receipt as metrics."""
        from bezoar.repair import rate_ladder, receipt
        from bezoar.runs import inputs

        if not 0 < self.held < 1:
            raise UserError(f"held must be a share above 0 and below 1; got {self.held}")
        given = job.inputs
        suspect = inputs.load_encoder(given["encoder"], job.device)
        case, clean = self._case(job, suspect), self._clean(job)
        if both := evaluate.shared_records(clean, case.test):
            raise UserError(
                f"{len(both)} clean records are test records too, such as {both[0]!r}; name other data"
            )
        train, validation = rate_ladder.split_validation(clean, self.held, job.seed)
        found = receipt.load_inversions(given["audit"].path) if given["audit"] is not None else ()
        first = case.default_head(suspect)
        case = dataclasses.replace(
            case, inverted=receipt.export_goals(found, job.folder, case, first)
        )

        def report(done: int, total: int, text: str) -> None:
            job.progress.step(done, total, text)

        before, clock = case.measure(suspect, first), (time.monotonic(), time.process_time())
        log: dict[str, Any] = {}
        if given["repaired"] is not None:
            cured = inputs.load_encoder(given["repaired"], job.device)
        else:
            cured, log = receipt.apply_repairs(
                given["repair"], suspect, train, validation, found, job.seed, report
            )
            cured.save(job.folder)
        spent = time.monotonic() - clock[0], time.process_time() - clock[1]
        last = case.default_head(cured)
        out = {f"before.{k}": m for k, m in before.items()} | {
            f"after.{k}": m for k, m in case.measure(cured, last).items()
        }
        out["clean_accuracy_lost"] = receipt.accuracy_loss(case, first, last)
        inputs.write_json(job.folder / "readings.json", receipt.compare_readings(case, first, last))
        if given["repaired"] is None:
            out |= seconds(*spent)
        goal = next((g for g in (*case.goals, *case.inverted) if g.trigger), None)
        if self.revive and goal is not None:
            twin = None if given["twin"] is None else inputs.load_encoder(given["twin"], job.device)
            out |= receipt.RevivalTest(case, train, goal, job.seed, report).measure(cured, twin)
        self._tell(job, case, train, validation, log, goal)
        return out

    def _case(self, job: Job, suspect: Encoder) -> EvaluationData:
        """Test data, known goals, victims, labelled data."""
        from bezoar.repair.receipt import EvaluationData
        from bezoar.runs import inputs

        given, run = job.inputs, job.inputs["encoder"]
        method = given["test"]
        if method is None:
            if not isinstance(run, Run):
                raise UserError("name the TEST data: this encoder's training data are not known")
            method = inputs.test_split(inputs.root_method(run))
        parts = inputs.open_dataset(method)
        test = parts.pairs.to(job.device)
        goals = fitting(inputs.known_goals(run), test)
        victims = evaluate.attack_victims(run) if isinstance(run, Run) else None
        labelled = self._labelled(job, parts, test, suspect)
        job.notes["test"] = method.name if isinstance(method, Run) else registry.spec(method)
        return EvaluationData(
            test, goals, victims if any(g.victims for g in goals) else None, labelled
        )

    def _labelled(self, job: Job, parts: Any, test: Pairs, suspect: Encoder) -> Pairs | None:
        """Clean labelled records that are not tested on; None where there are none and the text tower reads classes."""
        from bezoar.data import randomness
        from bezoar.runs import inputs

        named = job.inputs["labelled"]
        if named is None:
            try:
                named = evaluate.training_split(parts.method)
                named = (
                    dataclasses.replace(named, count=LABELLED) if hasattr(named, "count") else named
                )
            except UserError:
                if suspect.text is None:
                    raise
                return None
        found = inputs.in_memory(inputs.open_dataset(named).clean)
        if both := evaluate.shared_records(found, test):
            raise UserError(
                f"{len(both)} labelled records are test records too, such as {both[0]!r}; name other labelled data"
            )
        return found.take(randomness.sample_rows(found.ids, LABELLED, 0))

    def _clean(self, job: Job) -> Pairs:
        """The records that the repair may use. Raises UserError for a run whose data are poisoned, or where none are named."""
        from bezoar.runs import inputs

        named, run = job.inputs["data"], job.inputs["encoder"]
        if named is None:
            method = inputs.root_method(run) if isinstance(run, Run) else None
            if method is None or not {"count", "seed"} <= {
                f.name for f in dataclasses.fields(method)
            }:
                raise UserError(
                    "name clean DATA (--data): this encoder's training data cannot be made anew"
                )
            named = dataclasses.replace(
                method, count=FRESH, seed=method.seed + ANOTHER, split="train"
            )
        parts = inputs.open_dataset(named)
        if parts.plan.edits:
            raise UserError(f"the data of {named.name} are poisoned; a repair needs clean ones")
        job.notes |= parts.reading_notes() | {
            "data": named.name if isinstance(named, Run) else registry.spec(parts.method)
        }
        return inputs.in_memory(parts.clean)

    def _tell(
        self,
        job: Job,
        case: EvaluationData,
        train: Pairs,
        validation: Pairs,
        log: dict,
        goal: Goal | None,
    ) -> None:
        """The manifest's notes, and on stderr what a reader must not miss."""
        limits = []
        if not any(g.trigger for g in case.goals):
            limits.append(
                "No trigger is known: success is measured for inverted triggers alone, and accuracy."
            )
        if not case.inverted:
            limits.append(
                "No audit was named, or it inverted nothing: no inverted trigger is measured."
            )
        for rungs in log.get("ladder", []):
            if not rungs["held"]:
                limits.append(
                    f"No learning rate kept the validation score within {rungs['tolerance']:g}; the least fall was taken."
                )
        for line in limits:
            print(f"repair: {line}", file=sys.stderr)
        job.notes |= {
            "poisoned": any(g.trigger or g.victims for g in case.goals),
            "records": len(train),
            "validation": len(validation),
            "repairs": [registry.spec(r) for r in job.inputs["repair"]]
            if job.inputs["repaired"] is None
            else [],
            "inverted": [g.target for g in case.inverted],
            "relapse": {"target": goal.target, "trigger": goal.trigger}
            if self.revive and goal is not None
            else None,
            "limits": limits,
            **log,
        }


def fitting(goals: list[Goal], test: Pairs) -> tuple[Goal, ...]:
    """The goals of the test data's task; an encoder may carry others. Where none fits, all, and measuring refuses them."""
    return tuple(g for g in goals if g.target in test.classes) or tuple(goals)


def seconds(wall: float, own: float) -> dict[str, Any]:
    """How long the repair took, the choice of its learning rate included."""
    from bezoar.evaluation.scores import Measure

    return {
        "seconds": Measure(
            wall,
            1,
            wall,
            wall,
            "seconds of the repair, all learning rates that were tried; one run",
        ),
        "cpu_seconds": Measure(
            own, 1, own, own, "the same in processor time of this process; one run"
        ),
    }
