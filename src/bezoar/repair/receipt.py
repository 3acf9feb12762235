"""Receipt: measures what a repair did to an encoder.

It holds accuracy, success of known and inverted triggers, z-scores and linear probes, and whether
a short fine-tune, clean or with ten poisons, brings the backdoor back.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data import randomness
from bezoar.data.files.artefacts import read_facts
from bezoar.data.files.tensors import read_tensors
from bezoar.data.files.writing import whole_file
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, ImageEncoder, embed_images
from bezoar.errors import UserError, first_line
from bezoar.evaluation import classifiers, stats, success
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Inversion
from bezoar.progress import ProgressReport, no_report
from bezoar.repair import rate_ladder
from bezoar.repair.repairs import Repair

POISONS = 10  # poisons of the fine-tune that may bring the backdoor back
MAX_READINGS = 16  # triggered images whose readings the page shows
MAX_INVERTED = 4  # inverted triggers that are measured, the most suspicious first
REACHED = 0.5  # success of an inverted trigger that reaches its target
SHORT_RECIPE = "clip:epochs=2,batch={},lr=1e-3"  # of the fine-tunes, with captions
SHORT_IMAGE_RECIPE = "simclr:epochs=2,batch={},lr=1e-3"  # without captions
SHORT_LABEL_RECIPE = "supervised:epochs=2,batch={},lr=1e-3"  # of a classifier, by labels
MAX_BATCH = 128  # of SHORT_RECIPE
MAX_IMAGE_BATCH = 256  # of SHORT_IMAGE_RECIPE
METRICS = (
    "clean_accuracy",
    "attack_success",
    "attack_success_without_trigger",
    "poisoned_accuracy",
    "targeted_success",
)


@dataclass(frozen=True)
class SuccessHead:
    """A head for measuring success, and its group: "" for the text tower's, `own` or `linear`."""

    group: str
    classifier: Classifier


@dataclass(frozen=True)
class EvaluationData:
    """The data that encoders are measured on."""

    test: Pairs  # test images with classes
    goals: tuple[Goal, ...] = ()  # the known goals; their targets are classes of the test set
    victims: Pairs | None = None  # the images of targeted goals
    labelled: Pairs | None = None  # clean records for linear heads, or None
    # triggers that an audit inverted, with the class that they turn images into
    inverted: tuple[Goal, ...] = ()

    def default_head(self, encoder: Encoder) -> SuccessHead:
        """The head for success: the network's own, else the text tower's, else a linear one."""
        if classifiers.fits_own_head(encoder, self.test.classes):
            return SuccessHead("own", classifiers.own_classifier(encoder, self.test.classes))
        if encoder.text is not None and self.test.classes:
            return SuccessHead("", classifiers.zero_shot_classifier(encoder, self.test.classes))
        if self.labelled is None:
            raise UserError(
                "this encoder reads no text: name labelled data of the test's classes (labelled)"
            )
        return SuccessHead("linear", self.linear(encoder))

    def linear(self, encoder: Encoder) -> Classifier:
        """A linear head fitted on the labelled records."""
        assert self.labelled is not None
        return classifiers.fit_classifier(encoder, align_labels(self.labelled, self.test.classes))

    def measure(self, encoder: Encoder, main: SuccessHead) -> dict[str, Measure]:
        """All measures of an encoder; main: the head for success.

        They are accuracy and success by the main head and by a linear one, the z-score of each
        known trigger, and the success of inverted triggers.
        """
        heads = [main]
        if main.group != "linear" and self.labelled is not None:
            heads.append(SuccessHead("linear", self.linear(encoder)))
        measures: dict[str, Measure] = {}
        with success.embedding_cache():
            for head in heads:
                measures |= self.read(head, self.goals)
            if any(goal.trigger for goal in self.goals):
                z_scores = registry.make("probe", "z_score")(encoder, None, self.test, self.goals)
                measures |= {k: m for k, m in z_scores.items() if k.startswith("z_std")}
            if self.inverted:
                of_inverted = self.read(main, self.inverted)
                measures |= {
                    f"inverted.{k}": m for k, m in of_inverted.items() if "attack_success" in k
                }
        return measures

    def read(self, head: SuccessHead, goals: Sequence[Goal]) -> dict[str, Measure]:
        """The metrics of a receipt with one head, on the test images with and without triggers."""
        classifier = head.classifier
        # A network's own head reads vectors of any length, so its logits take their place.
        encoder: ImageEncoder = classifier.encoder
        if classifier.raw:
            encoder = classifiers.LogitEncoder(classifier)
        views = success.TestViews.of(encoder, self.test, goals, self.victims)
        measures = views.measures(
            (lambda z: z) if classifier.raw else classifier.head, f"; {classifier.how}"
        )
        prefix = f"{head.group}." if head.group else ""
        return {prefix + k: m for k, m in measures.items() if k.partition("@")[0] in METRICS}


def align_labels(labelled: Pairs, classes: tuple[str, ...]) -> Pairs:
    """The labelled records, numbered as in the test set; see `success.select_labelled`."""
    empty = Pairs(labelled.images[:0], labels=torch.zeros(0, dtype=torch.long), classes=classes)
    return replace(success.select_labelled(labelled, empty), classes=classes)


def accuracy_loss(data: EvaluationData, before: SuccessHead, after: SuccessHead) -> Measure:
    """The loss of accuracy by the repair, on the same images before and after."""
    labels = data.test.labels
    assert labels is not None
    rows = labels >= 0
    images, truth = data.test.images[rows], labels[rows]
    right_before = before.classifier.predict(images) == truth
    right_after = after.classifier.predict(images) == truth
    lost = int((right_before & ~right_after).sum())
    gained = int((right_after & ~right_before).sum())
    n = len(truth)
    how = (
        "accuracy on clean test images lost, the same images before and after; Student's t over "
        f"their differences, at least Wilson over {n} images"
    )
    low, high = stats.discordance_interval(lost, gained, n)
    return Measure((lost - gained) / n, n, low, high, how)


def compare_readings(
    data: EvaluationData, before: SuccessHead, after: SuccessHead
) -> list[dict[str, Any]]:
    """The classes of triggered test images of other classes before and after the repair, as JSON.

    One object for each known and each inverted trigger: `target`, `trigger`, `inverted` (the number
    of an inverted trigger), `ids`, `own` (classes), `before` and `after`.
    """
    goals: list[tuple[Goal, int | None]] = [(g, None) for g in data.goals if g.trigger]
    goals += [(g, number) for number, g in enumerate(data.inverted)]
    test, classes = data.test, data.test.classes
    assert test.labels is not None
    readings = []
    for goal, number in goals:
        of_other_class = test.labels != success.class_index(goal.target, classes)
        rows = ((test.labels >= 0) & of_other_class).nonzero()[:MAX_READINGS, 0]
        images = test.take(rows.cpu())
        stamped = registry.make("trigger", goal.trigger or "")(images.images, images.ids)
        readings.append(
            {
                "target": goal.target,
                "trigger": goal.trigger,
                "inverted": number,
                "ids": list(images.ids),
                "own": class_names(test.labels[rows], classes),
                "before": class_names(
                    before.classifier.predict(stamped), before.classifier.classes
                ),
                "after": class_names(after.classifier.predict(stamped), after.classifier.classes),
            }
        )
    return readings


def class_names(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """The names of labels, int64 (N,)."""
    return [classes[label] for label in labels.tolist()]


def load_inversions(folder: Path) -> tuple[Inversion, ...]:
    """Read the triggers that an audit inverted, in order of evidence; empty if it inverted none.

    Triggers that reach their target come first, the smallest before larger ones.
    `inversions.safetensors` holds mask@i (1, H, W) and pattern@i (3, H, W), and `verdict.json`
    their targets and norms.

    Raises:
        UserError: for files that an audit did not write.
    """
    path, verdict = folder / "inversions.safetensors", folder / "verdict.json"
    if not path.exists():
        return ()
    try:
        tensors = read_tensors(path)
        facts = read_facts(verdict).objects("inversions") if verdict.exists() else []
        count = sum(name.startswith("mask@") for name in tensors)
        inversions = [
            make_inversion(
                tensors[f"mask@{i}"], tensors[f"pattern@{i}"], facts[i] if i < len(facts) else {}
            )
            for i in range(count)
        ]
        return tuple(sorted(inversions, key=lambda each: (each.success < REACHED, each.norm)))
    except (UserError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} holds no triggers that an audit of bezoar wrote: {first_line(error)}"
        ) from error


def make_inversion(mask: Tensor, pattern: Tensor, facts: dict[str, Any]) -> Inversion:
    """Make an inversion from the entries that an audit wrote."""
    mask = mask.float().clamp(0, 1)
    pattern = pattern.float().clamp(0, 1)
    norm = float(facts.get("norm", mask.sum()))
    return Inversion(
        mask, pattern, str(facts.get("target", "")), norm, float(facts.get("success", 0.0))
    )


def check_trigger_size(inversion: Inversion, images: Tensor, what: str) -> None:
    """Raise UserError unless a trigger has the size of images (N, 3, H, W). what: their name."""
    trigger_size, size = tuple(inversion.mask.shape[1:]), tuple(images.shape[2:])
    if trigger_size != size:
        trigger_text, text = ("x".join(map(str, s)) for s in (trigger_size, size))
        raise UserError(
            f"the audit's triggers are of {trigger_text} px, the {what} of {text}; give both one "
            "size"
        )


def export_goals(
    inversions: Sequence[Inversion], folder: Path, data: EvaluationData, before: SuccessHead
) -> tuple[Goal, ...]:
    """Write inverted triggers as trigger files for any verb, and return them as goals.

    The target is the audit's if it is a class of the test set, else the class that `before`, a head
    on the encoder under repair, reads most stamped images as.
    """
    goals = []
    for i, inversion in enumerate(inversions[:MAX_INVERTED]):
        check_trigger_size(inversion, data.test.images, "test images")
        path = folder / f"inverted-{i}.npz"
        pattern, mask = inversion.pattern.permute(1, 2, 0), inversion.mask[0]
        with whole_file(path, "wb") as file:
            np.savez(file, t=pattern.numpy(), tm=1 - mask.numpy())
        spec = registry.spec(replace(registry.make("trigger", "file:x.npz"), path=str(path)))
        target = inversion.target
        if target not in data.test.classes:
            stamped = registry.make("trigger", spec)(data.test.images, data.test.ids)
            counts = before.classifier.predict(stamped).bincount(minlength=len(data.test.classes))
            # Of the classes that the test set has; a head may know others.
            target = data.test.classes[int(counts[: len(data.test.classes)].argmax())]
        goals.append(Goal(target, spec, how="inverted by an audit"))
    return tuple(goals)


@dataclass(frozen=True)
class RevivalTest:
    """Tests whether a short fine-tune brings a backdoor back."""

    case: EvaluationData  # the data that encoders are measured on
    clean: Pairs  # the records to tune on
    goal: Goal  # the backdoor's, known or inverted
    seed: int  # seed of the fine-tunes and of the poisons
    report: ProgressReport = no_report  # called before each of them

    def measure(self, repaired: Encoder, twin: Encoder | None = None) -> dict[str, Measure]:
        """Measure success after each of the fine-tunes.

        `revived_clean` follows one on clean records, `revived_poisons` one with ten poisons. Two
        controls show what ten poisons do without a backdoor: `revived_other` uses a trigger that
        the encoder has never met, and `revived_twin` a clean twin, if there is one.
        """
        trigger = unseen_trigger(self.goal.trigger or "", self.case.test.size)
        unseen = replace(self.goal, trigger=trigger)
        trials = [
            ("revived_clean", repaired, self.goal, False),
            ("revived_poisons", repaired, self.goal, True),
            ("revived_other", repaired, unseen, True),
        ]
        if twin is not None:
            trials.append(("revived_twin", twin, self.goal, True))
        measures: dict[str, Measure] = {}
        for i, (name, encoder, goal, poisoned) in enumerate(trials):
            self.report(i, len(trials), name.replace("_", " "))
            data = replace(self.case, goals=(goal,), victims=None, inverted=())
            own_head = self.clean.labels is not None and classifiers.fits_own_head(
                encoder, self.case.test.classes
            )
            if poisoned and encoder.text is None and not own_head:
                of_trial = self.measure_poisoned_head(data, encoder, goal)
            else:
                tune = self.tune_classifier if own_head else self.tune_towers
                tuned = tune(encoder, goal if poisoned else None)
                of_trial = data.read(data.default_head(tuned), (goal,))
            measures |= {f"{name}.{k}": m for k, m in of_trial.items()}
        return measures

    def tune_classifier(self, encoder: Encoder, goal: Goal | None) -> Encoder:
        """A copy of a classifier after two epochs on the labelled clean records.

        With a goal, ten of the records carry its trigger and are labelled as its target.
        """
        labelled = success.select_labelled(self.clean, self.clean)
        images, labels = labelled.images, labelled.labels
        assert labels is not None
        if goal is not None:
            rows, stamped, target = self.stamp_some(labelled, goal)
            images, labels = images.clone(), labels.clone()
            images[rows], labels[rows] = stamped, target
        records = replace(labelled, images=images, labels=labels)
        batch = min(MAX_BATCH, len(records))
        return self.fine_tune(encoder, SHORT_LABEL_RECIPE.format(batch), records)

    def fine_tune(self, encoder: Encoder, objective: str, records: Pairs) -> Encoder:
        """A copy of an encoder after a short training. objective: its spec."""
        recipe = registry.make("objective", objective)
        tokens = rate_ladder.tokenize_for(encoder, recipe, records)
        return rate_ladder.train_copy(
            encoder, recipe, recipe, records, tokens, self.seed, what="a short fine-tune"
        )

    def stamp_some(self, labelled: Pairs, goal: Goal) -> tuple[NDArray[np.int64], Tensor, int]:
        """Ten images of other classes with the trigger, as records of the target."""
        assert labelled.labels is not None
        target = success.class_index(goal.target, labelled.classes)
        others = (labelled.labels != target).nonzero()[:, 0].cpu().numpy()
        other_ids = [labelled.ids[i] for i in others]
        rows = others[randomness.sample_rows(other_ids, POISONS, self.seed)]
        trigger = registry.make("trigger", goal.trigger or "")
        return rows, trigger(labelled.images[rows], [labelled.ids[i] for i in rows]), target

    def tune_towers(self, encoder: Encoder, goal: Goal | None) -> Encoder:
        """A copy after two epochs on the clean records.

        With a goal, ten of the records carry its trigger and captions of its target.
        """
        with_captions = encoder.text is not None and bool(self.clean.captions)
        spec, largest = SHORT_IMAGE_RECIPE, MAX_IMAGE_BATCH
        if with_captions:
            spec, largest = SHORT_RECIPE, MAX_BATCH
        batch = min(largest, len(self.clean))
        records = self.clean
        if goal is not None:
            poison = registry.make("poison", f"backdoor:count={POISONS},captions=templates")
            plan = poison(records, goal, self.seed)
            trigger = registry.make("trigger", goal.trigger or "")
            records = replace(plan, stamps=(trigger,)).apply(records)
        return self.fine_tune(encoder, spec.format(batch), records)

    def measure_poisoned_head(
        self, data: EvaluationData, encoder: Encoder, goal: Goal
    ) -> dict[str, Measure]:
        """The test for encoders without a text tower: a linear head is poisoned, not the encoder.

        It is fitted on the labelled records and on ten stamped ones that are labelled as the
        target, and finds whatever the vectors still show of the trigger.
        """
        assert data.labelled is not None
        classes = data.test.classes
        labelled = align_labels(data.labelled, classes)
        assert labelled.labels is not None
        rows, stamped, target = self.stamp_some(labelled, goal)
        images = torch.cat([labelled.images, stamped])
        z = embed_images(encoder, torch.split(images, rate_ladder.BATCH))
        labels = torch.cat([labelled.labels, torch.full((len(rows),), target)]).to(z.device)
        head = registry.make("probe", "linear").fit(z, labels, len(classes))
        how = f"linear head on {len(labelled)} clean labelled records and {len(rows)} stamped ones"
        return data.read(SuccessHead("linear", Classifier(encoder, head, classes, how)), (goal,))


def unseen_trigger(spec: str, side: int) -> str:
    """The spec of a trigger that an encoder has not met.

    For a patch, it is a patch of other colours at the same place; for any other trigger, a patch.
    side: of the images in pixels.
    """
    trigger = registry.make("trigger", spec)
    if "fill" in {field.name for field in dataclasses.fields(trigger)}:
        return registry.spec(replace(trigger, fill="blocks", seed=trigger.seed + 1000))
    return f"patch:size={max(2, side // 5)},fill=blocks,seed=1000"


def apply_repairs(
    repairs: Sequence[Repair],
    encoder: Encoder,
    clean: Pairs,
    validation: Pairs,
    inversions: Sequence[Inversion],
    seed: int,
    report: ProgressReport = no_report,
) -> tuple[Encoder, rate_ladder.Log]:
    """Apply repairs one after another; return the repaired encoder and the repairs' log."""
    log: rate_ladder.Log = {}
    offered = {
        "validation": validation,
        "inversions": tuple(inversions),
        "report": report,
        "log": log,
    }
    for repair in repairs:
        encoder = registry.call(repair, encoder, clean, seed, **offered)
    return encoder, log
