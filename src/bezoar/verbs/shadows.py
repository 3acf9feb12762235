"""Fits a meta-classifier on clean and attacked shadow encoders, and measures it on held-out
ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from bezoar.auditing import bank
from bezoar.auditing.audits import mntd
from bezoar.data.files.writing import write_json
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.run import MANIFEST, Run
from bezoar.runs.verb import Input, Takes, input_name
from bezoar.verbs import audit
from bezoar.verbs.calibrate import attacked_run, check_clean

SHADOWS_FILE = "shadows.json"
NO_FOLD = -1  # a fold that no encoder is in


@dataclass(frozen=True)
class Shadows:
    """Fit MNTD on encoders known to be clean and on attacked ones; `bezoar audit --audit
    mntd:bank=RUN` applies it to others.

    Its figures are of encoders that it was not fitted on. An attacked encoder and the clean one
    that it was made from may both be given. They are nearer to each other than to any other encoder
    and stay in one fold, because a bank that knows the label of one pulls the other towards that
    label, which is the wrong one.
    """

    encoder: Annotated[
        tuple[Input, ...],
        Takes("encoder", positional=True),
        "encoders known to be clean, all of one kind",
    ] = ()
    attacked: Annotated[
        tuple[Input, ...],
        Takes("run"),
        "attacked ones of that kind: train, inject or evaluate runs",
    ] = ()
    data: Annotated[
        Input, Takes("data"), "clean images; without them, the test split of the training data"
    ] = None
    images: Annotated[int, "clean images that queries are drawn from"] = 512
    queries: Annotated[int, "learnt query images"] = 12
    steps: Annotated[int, "optimisation steps in which the queries are learnt"] = 60
    folds: Annotated[
        int, "parts of the cross-validation, each judged by a bank that was fitted on the others"
    ] = 5

    def work(self, job: Job) -> dict[str, Measure]:
        """Fit the bank on all shadows, and measure it by cross-validation.

        Writes mntd.safetensors and shadows.json.
        """
        self._check_numbers()
        sources = shadow_encoders(job.inputs["encoder"], job.inputs["attacked"])
        names = [input_name(source) for source in sources]
        labels = [i >= len(job.inputs["encoder"]) for i in range(len(sources))]
        lineages = [lineage_of(source, names) for source in sources]
        folds = deal_folds(lineages, labels, self.folds, job.seed)
        check_enough_shadows(labels, folds, len(set(lineages)))
        encoders = [
            audit.check_auditable(inputs.load_encoder(source, job.device), f"encoder {name}")
            for source, name in zip(sources, names, strict=True)
        ]
        weights = hash_weights(encoders, names)
        method = audit.clean_images(job.inputs["data"], sources[0])
        clean = audit.sample_clean_records(method, self.images)[0].to(job.device)
        shadow_bank, held_out = self._fit(job, encoders, labels, folds, clean)
        mntd.save(shadow_bank | {mntd.HELD_OUT: held_out}, job.folder / mntd.FILE)
        rows = []
        for i, source in enumerate(sources):
            attack, trigger = "", ""
            if labels[i]:
                attack, trigger = bank.describe_attack(inputs.known_goals(source))
            rows.append(
                {
                    "name": names[i],
                    "attacked": labels[i],
                    "attack": attack,
                    "trigger": trigger,
                    "lineage": lineages[i],
                    "fold": folds[i],
                    "logit": float(held_out[i]),
                    "weights": weights[i],
                }
            )
        write_json(job.folder / SHADOWS_FILE, {"schema": 1, "shadows": rows})
        job.goals = []  # a bank is no poisoned artefact, whatever it was fitted on
        job.notes = {
            "clean": labels.count(False),
            "attacked": labels.count(True),
            "lineages": len(set(lineages)),
            "folds": len(set(folds)),
            "shadows": dict(zip(names, weights, strict=True)),  # which the bank must not judge
        }
        return mntd.measure_held_out(held_out, torch.tensor(labels))

    def _check_numbers(self) -> None:
        are_enough = self.folds >= 2 and self.queries >= 3 and self.steps >= 0
        if not are_enough or self.images < max(audit.MIN_IMAGES, self.queries):
            raise UserError(
                f"MNTD takes at least 2 folds, 3 queries, 0 steps and {audit.MIN_IMAGES} images, "
                f"and as many images as queries; got {self.folds}, {self.queries}, {self.steps} "
                f"and {self.images}"
            )

    def _fit(
        self,
        job: Job,
        encoders: Sequence[Encoder],
        labels: Sequence[bool],
        folds: Sequence[int],
        clean: Pairs,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Fit a bank on all shadows, and one without each fold.

        Returns:
            The bank of all shadows; and each shadow's logit, float32 (M,), by the bank without its
            fold.
        """
        held_out = torch.empty(len(folds))
        parts = sorted(set(folds))
        banks = len(parts) + 1

        def fit(without: int, number: int) -> dict[str, Tensor]:
            rows = [i for i, fold in enumerate(folds) if fold != without]

            def report(done: int, total: int) -> None:
                job.progress.step(
                    number * total + done, banks * total, f"fit {number + 1} of {banks}"
                )

            return mntd.fit(
                [encoders[i] for i in rows],
                [labels[i] for i in rows],
                clean,
                job.seed,
                self.queries,
                self.steps,
                report=report,
            )

        for number, part in enumerate(parts):
            fold_bank = fit(part, number)
            for i, fold in enumerate(folds):
                if fold == part:
                    held_out[i] = mntd.measure_logit(fold_bank, encoders[i])
        return fit(NO_FOLD, len(parts)), held_out


def shadow_encoders(clean: Sequence[Any], attacked: Sequence[Run]) -> list[Any]:
    """All shadow encoders, clean ones first.

    Raises UserError for one on both sides or the wrong side.
    """
    clean_names = [input_name(encoder) for encoder in clean]
    for run in attacked:
        if run.name in clean_names:
            raise UserError(f"{run.name} is given as clean and as attacked; it is one of them")
    return [*(check_clean(e) for e in clean), *(attacked_run(run) for run in attacked)]


def check_enough_shadows(labels: Sequence[bool], folds: Sequence[int], lineages: int) -> None:
    """Raise UserError where some fold, held out, leaves too few of a kind to fit on.

    Args:
        labels: of each shadow, whether it was attacked.
        folds: the fold of each.
        lineages: how many there are.
    """
    least = mntd.MIN_PER_KIND
    for held_out in dict.fromkeys((NO_FOLD, *folds)):
        rest = [label for label, fold in zip(labels, folds, strict=True) if fold != held_out]
        clean, attacked = rest.count(False), rest.count(True)
        if min(clean, attacked) < least:
            raise UserError(
                f"too few to cross-validate MNTD: {least} of each must be left when a fold is held "
                f"out, and a lineage stays in one fold; of {labels.count(False)} clean and "
                f"{labels.count(True)} attacked encoders of {lineages} lineages there are {clean} "
                f"and {attacked}"
            )


def hash_weights(encoders: Sequence[Encoder], names: Sequence[str]) -> list[str]:
    """A hash of each encoder's weights.

    Raises UserError for another kind of encoder, and for copies.
    """
    first = encoders[0]
    name_of_weights: dict[str, str] = {}
    for name, encoder in zip(names, encoders, strict=True):
        for what, value, expected in (
            ("network", encoder.about.get("network", ""), first.about.get("network", "")),
            ("size", f"{encoder.preprocess.size} px", f"{first.preprocess.size} px"),
        ):
            if value != expected:
                raise UserError(
                    f"{name} is no shadow beside {names[0]}: its {what} is {value}, not {expected}"
                )
        weights = mntd.fingerprint(encoder).numpy().astype("<i4").tobytes().hex()[:16]
        if weights in name_of_weights:
            raise UserError(
                f"{name_of_weights[weights]} and {name} have the same weights; each shadow encoder "
                "is given once, on one side"
            )
        name_of_weights[weights] = name
    return list(name_of_weights)


def lineage_of(encoder: Any, names: Sequence[str]) -> str:
    """The lineage of a shadow, a run or a network: separate trainings have different ones.

    It is the first run that the encoder was tuned from, or the published weights that this run was
    tuned from, if they are a shadow too.
    """
    seen = set()
    while isinstance(encoder, Run):
        if encoder.path in seen:
            raise UserError(f"run {encoder.name} is made from itself")
        seen.add(encoder.path)
        source: Mapping[str, Any] = encoder.asked_for("encoder") or {}
        if "run" not in source:
            return str(source["spec"]) if source.get("spec") in names else encoder.name
        parent = encoder.sibling(source["run"])
        if not (parent.path / MANIFEST).is_file():
            return parent.name  # it was deleted; its name still identifies its other descendants
        encoder = parent
    return input_name(encoder)


def deal_folds(lineages: Sequence[str], labels: Sequence[bool], folds: int, seed: int) -> list[int]:
    """Assign encoders to folds; encoders of one lineage share a fold.

    Lineages are shuffled by the seed, then sorted: those with more attacked and then with more
    clean encoders come first. Each is assigned to the fold with the fewest attacked encoders (a
    lineage without any: the fewest clean ones), then the fewest in all.

    Args:
        lineages: lineage of each encoder.
        labels: whether each encoder was attacked.
        folds: number of folds.
        seed: seed of the shuffle.

    Returns:
        Each encoder's fold, 0 to folds - 1.
    """
    unique = list(dict.fromkeys(lineages))
    size = {lineage: [0, 0] for lineage in unique}  # clean and attacked encoders
    for lineage, label in zip(lineages, labels, strict=True):
        size[lineage][label] += 1
    shuffled = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    counts = [[0, 0] for _ in range(folds)]  # clean and attacked encoders of each fold
    fold_of: dict[str, int] = {}
    for lineage in sorted(shuffled, key=lambda u: (-size[u][1], -size[u][0])):
        kind = int(size[lineage][1] > 0)
        fold = min(range(folds), key=lambda f: (counts[f][kind], sum(counts[f]), f))
        fold_of[lineage] = fold
        for k in (0, 1):
            counts[fold][k] += size[lineage][k]
    return [fold_of[lineage] for lineage in lineages]
