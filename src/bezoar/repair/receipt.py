"""Receipt: what a repair did to an encoder. Accuracy, success of known and of inverted triggers, z, what linear heads see,
and whether a short fine-tune, clean or with ten poisons, brings the backdoor back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, stats, success
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Inversion
from bezoar.repair import rate_ladder

POISONS = 10  # of the fine-tune that is to bring the backdoor back
SHOWN = 16  # triggered images whose readings are kept for the page
MOST = 4  # inverted triggers that are measured, the most suspicious first
SHORT, SHORT_IMAGES = (
    "clip:epochs=2,batch={},lr=1e-3",
    "simclr:epochs=2,batch={},lr=1e-3",
)  # the fine-tunes
BATCHES = 128, 256  # of these, at most
KEPT = (
    "clean_accuracy",
    "attack_success",
    "attack_success_without_trigger",
    "poisoned_accuracy",
    "targeted_success",
)


@dataclass(frozen=True)
class SuccessHead:
    """A head that success is read by, and the group of metrics it makes: '' for the text tower's, or `linear`."""

    group: str
    classifier: Classifier


@dataclass(frozen=True)
class EvaluationData:
    """What encoders are measured on. goals: known ones whose target is a class of the test set. victims: of targeted ones.
    labelled: clean records for linear heads, or None. inverted: triggers that an audit found, with what they turn images
    into.
    """

    test: Pairs
    goals: tuple[Goal, ...] = ()
    victims: Pairs | None = None
    labelled: Pairs | None = None
    inverted: tuple[Goal, ...] = ()

    def default_head(self, encoder: Encoder) -> SuccessHead:
        """The head that success is read by: the text tower's, else a linear one."""
        if encoder.text is not None and self.test.classes:
            return SuccessHead("", classifiers.zero_shot_classifier(encoder, self.test.classes))
        if self.labelled is None:
            raise UserError(
                "this encoder reads no text: name labelled data of the test's classes (labelled)"
            )
        return SuccessHead("linear", self.linear(encoder))

    def linear(self, encoder: Encoder) -> Classifier:
        """A linear head on the labelled records."""
        assert self.labelled is not None
        return classifiers.fit_classifier(encoder, align_labels(self.labelled, self.test.classes))

    def measure(self, encoder: Encoder, main: SuccessHead) -> dict[str, Measure]:
        """Accuracy and success by the main head and by a linear one, z of each known trigger, success of inverted ones."""
        others = (
            []
            if main.group or self.labelled is None
            else [SuccessHead("linear", self.linear(encoder))]
        )
        out: dict[str, Measure] = {}
        with success.embedding_cache():
            for reader in (main, *others):
                out |= self.read(reader, self.goals)
            if any(g.trigger for g in self.goals):
                found = registry.make("probe", "z_score")(encoder, None, self.test, self.goals)
                out |= {k: m for k, m in found.items() if k.startswith("z_std")}
            if self.inverted:
                found = self.read(main, self.inverted)
                out |= {f"inverted.{k}": m for k, m in found.items() if "attack_success" in k}
        return out

    def read(self, reader: SuccessHead, goals: Sequence[Goal]) -> dict[str, Measure]:
        """What a head makes of the test images, as they are and stamped: the metrics that a receipt keeps."""
        seen = success.TestViews.of(reader.classifier.encoder, self.test, goals, self.victims)
        found = seen.measures(reader.classifier.head, f"; {reader.classifier.how}")
        lead = f"{reader.group}." if reader.group else ""
        return {lead + k: m for k, m in found.items() if k.partition("@")[0] in KEPT}


def align_labels(labelled: Pairs, classes: tuple[str, ...]) -> Pairs:
    """The records with a label, numbered as the test set numbers its classes. Raises UserError as `success.labelled`."""
    blank = Pairs(labelled.images[:0], labels=torch.zeros(0, dtype=torch.long), classes=classes)
    return replace(success.select_labelled(labelled, blank), classes=classes)


def accuracy_loss(case: EvaluationData, before: SuccessHead, after: SuccessHead) -> Measure:
    """How much accuracy the repair cost: the same images, read before and after."""
    assert case.test.labels is not None
    known = case.test.labels >= 0
    right = [
        r.classifier.predict(case.test.images[known]) == case.test.labels[known]
        for r in (before, after)
    ]
    lost, won = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    n = len(right[0])
    how = (
        "accuracy on clean test images lost, the same images before and after; Student's t over their differences, at least "
        f"Wilson over {n} images"
    )
    return Measure((lost - won) / n, n, *stats.discordance_interval(lost, won, n), how)


def compare_readings(
    case: EvaluationData, before: SuccessHead, after: SuccessHead
) -> list[dict[str, Any]]:
    """For each known and inverted trigger (`inverted`: its number) some test images of other classes: `ids`, `own` class, and
    what they are read as when stamped, `before` and `after`. JSON.
    """
    out: list[dict[str, Any]] = []
    test, classes = case.test, case.test.classes
    assert test.labels is not None
    goals = [(g, None) for g in case.goals if g.trigger] + [
        (g, i) for i, g in enumerate(case.inverted)
    ]
    for goal, number in goals:
        rows = (
            (test.labels >= 0) & (test.labels != success.class_index(goal.target, classes))
        ).nonzero()[:SHOWN, 0]
        picked = test.take(rows.cpu())
        stamped = registry.make("trigger", goal.trigger or "")(picked.images, picked.ids)
        named = [
            [classes[j] for j in r.classifier.predict(stamped).tolist()] for r in (before, after)
        ]
        own = [classes[j] for j in test.labels[rows].tolist()]
        facts = {"target": goal.target, "trigger": goal.trigger, "inverted": number}
        out.append(
            {**facts, "ids": list(picked.ids), "own": own, "before": named[0], "after": named[1]}
        )
    return out


def load_inversions(folder: Path) -> tuple[Inversion, ...]:
    """The triggers that an audit wrote: `inversions.safetensors`, mask@i (1, H, W) and pattern@i (3, H, W), and targets and
    norms in `verdict.json`. Empty where the audit inverted nothing; raises UserError for what is not such a file.
    """
    import json

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, verdict = folder / "inversions.safetensors", folder / "verdict.json"
    if not path.exists():
        return ()
    try:
        tensors = load_file(path)
        told = json.loads(verdict.read_text()).get("inversions", []) if verdict.exists() else []
        found = []
        for i in range(sum(k.startswith("mask@") for k in tensors)):
            mask, pattern = (
                tensors[f"mask@{i}"].float().clamp(0, 1),
                tensors[f"pattern@{i}"].float().clamp(0, 1),
            )
            facts = told[i] if i < len(told) else {}
            norm, share = float(facts.get("norm", mask.sum())), float(facts.get("success", 0.0))
            found.append(Inversion(mask, pattern, str(facts.get("target", "")), norm, share))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(
            f"{path} holds no triggers that an audit of bezoar wrote: {str(error).splitlines()[0]}"
        ) from error
    return tuple(found)


def export_goals(
    found: Sequence[Inversion], folder: Path, case: EvaluationData, before: SuccessHead
) -> tuple[Goal, ...]:
    """Inverted triggers as goals, each written to a file of a trigger's, `inverted-0.npz`: any verb can stamp it.

    The target is the audit's where it is a class of the test set, else the class that the encoder under repair reads most
    stamped images as.
    """
    goals = []
    for i, inversion in enumerate(found[:MOST]):
        if tuple(inversion.mask.shape[1:]) != tuple(case.test.images.shape[2:]):
            made, given = (
                "x".join(map(str, s))
                for s in (inversion.mask.shape[1:], case.test.images.shape[2:])
            )
            raise UserError(
                f"the audit's triggers are of {made} px, the test images of {given}; give both one size"
            )
        path = folder / f"inverted-{i}.npz"
        with path.open("wb") as file:
            np.savez(
                file, t=inversion.pattern.permute(1, 2, 0).numpy(), tm=1 - inversion.mask[0].numpy()
            )
        trigger = registry.spec(replace(registry.make("trigger", "file:x.npz"), path=str(path)))
        target = inversion.target
        if target not in case.test.classes:
            stamped = registry.make("trigger", trigger)(case.test.images, case.test.ids)
            target = case.test.classes[int(before.classifier.predict(stamped).mode().values)]
        goals.append(Goal(target, trigger, how="inverted by an audit"))
    return tuple(goals)


@dataclass(frozen=True)
class RevivalTest:
    """Whether a short fine-tune brings a backdoor back. clean: records to tune on. goal: the trigger, known or inverted."""

    case: EvaluationData
    clean: Pairs
    goal: Goal
    seed: int
    report: ProgressReport = no_report

    def measure(self, repaired: Encoder, twin: Encoder | None = None) -> dict[str, Measure]:
        """Success after a clean fine-tune (`revived_clean`), after one with ten poisons (`revived_poisons`), and after the
        same ten poisons with a trigger that the encoder has never met (`revived_other`), or in a clean twin
        (`revived_twin`): what ten poisons do where no backdoor was.
        """
        stranger = replace(
            self.goal, trigger=unseen_trigger(self.goal.trigger or "", self.case.test.size)
        )
        asked: list[tuple[str, Encoder, Goal, bool]] = [
            ("revived_clean", repaired, self.goal, False),
            ("revived_poisons", repaired, self.goal, True),
            ("revived_other", repaired, stranger, True),
        ]
        asked += [("revived_twin", twin, self.goal, True)] if twin is not None else []
        out: dict[str, Measure] = {}
        for i, (name, encoder, goal, poisoned) in enumerate(asked):
            self.report(i, len(asked), name.replace("_", " "))
            case = replace(self.case, goals=(goal,), victims=None, inverted=())
            if poisoned and encoder.text is None:
                found = self.headed(case, encoder, goal)
            else:
                found = case.read(
                    case.default_head(self.tuned(encoder, goal if poisoned else None)), (goal,)
                )
            out |= {f"{name}.{k}": m for k, m in found.items()}
        return out

    def tuned(self, encoder: Encoder, goal: Goal | None) -> Encoder:
        """A copy after two epochs on the clean records, ten of them with a goal's trigger and captions where it has one."""
        reads = encoder.text is not None and bool(self.clean.captions)
        spec, most = (SHORT, BATCHES[0]) if reads else (SHORT_IMAGES, BATCHES[1])
        recipe, data = (
            registry.make("objective", spec.format(min(most, len(self.clean)))),
            self.clean,
        )
        if goal is not None:
            plan = registry.make("poison", f"backdoor:count={POISONS},captions=templates")(
                data, goal, self.seed
            )
            stamp = registry.make("trigger", goal.trigger or "")
            data = replace(plan, stamps=(stamp,)).apply(data)
        if not reads and encoder.text is not None:
            raise UserError(
                "a receipt's short fine-tunes need clean data with captions for this encoder; give --no-revive"
            )
        tokens = rate_ladder.tokenize_for(encoder, recipe, data)
        return rate_ladder.train_copy(
            encoder, recipe, recipe, data, tokens, self.seed, what="a short fine-tune"
        )

    def headed(self, case: EvaluationData, encoder: Encoder, goal: Goal) -> dict[str, Measure]:
        """Without captions: a linear head that is fitted on the labelled records and ten stamped ones, labelled as the
        target. It finds whatever the vectors still say of the trigger.
        """
        assert case.labelled is not None and case.test.labels is not None
        known = align_labels(case.labelled, case.test.classes)
        assert known.labels is not None
        target = success.class_index(goal.target, case.test.classes)
        free = (known.labels != target).nonzero()[:, 0].cpu().numpy()
        rows = free[randomness.sample_rows([known.ids[i] for i in free], POISONS, self.seed)]
        stamped = registry.make("trigger", goal.trigger or "")(
            known.images[rows], [known.ids[i] for i in rows]
        )
        z = embed_images(encoder, torch.cat([known.images, stamped]).split(512))
        y = torch.cat([known.labels, torch.full((len(rows),), target)]).to(z.device)
        head = registry.make("probe", "linear").fit(z, y, len(case.test.classes))
        how = f"linear head on {len(known)} clean labelled records and {len(rows)} stamped ones"
        return case.read(
            SuccessHead("linear", Classifier(encoder, head, case.test.classes, how)), (goal,)
        )


def unseen_trigger(trigger: str, side: int) -> str:
    """A trigger that an encoder has not met: of a patch one of other colours at its place, else a patch."""
    known = registry.make("trigger", trigger)
    if "fill" in {f.name for f in dataclasses.fields(known)}:
        return registry.spec(replace(known, fill="blocks", seed=known.seed + 1000))
    return f"patch:size={max(2, side // 5)},fill=blocks,seed=1000"


def apply_repairs(
    repairs: Sequence[Any],
    encoder: Encoder,
    clean: Pairs,
    validation: Pairs,
    found: Sequence[Inversion],
    seed: int,
    report: Callable[[int, int, str], Any] = no_report,
) -> tuple[Encoder, dict[str, Any]]:
    """One repair after another -> the repaired encoder, and what they said of themselves (JSON)."""
    log: dict[str, Any] = {}
    known = {"validation": validation, "inversions": tuple(found), "report": report, "log": log}
    for repair in repairs:
        wanted = {name: known[name] for name in getattr(repair, "needs", ())}
        encoder = functools.partial(repair, encoder, clean, seed)(**wanted)
    return encoder, log
