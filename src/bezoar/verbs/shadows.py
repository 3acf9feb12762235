"""Fit a meta-classifier over shadow encoders, clean and attacked, and measure what it is worth on those it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.run import MANIFEST, Run
from bezoar.runs.verb import Input, Takes
from bezoar.verbs.audit import (
    MIN_IMAGES,
    check_auditable,
    default_clean_images,
    encoder_name,
    sample_clean_records,
)
from bezoar.verbs.calibrate import attacked_run, check_clean

if TYPE_CHECKING:
    from torch import Tensor

    from bezoar.data.pairs import Pairs
    from bezoar.encoders.encoder import Encoder

SHADOWS_FILE = "shadows.json"


@dataclass(frozen=True)
class Shadows:
    """Fit MNTD on encoders known to be clean and on attacked ones; `bezoar audit --audit mntd:bank=RUN` asks it of others.

    Its figures are of encoders that it was not fitted on. An attacked encoder and the clean one that it was made from may
    both be given: natural shadows, and nearer to each other than to any other. They stay in one fold, because a bank that
    knows the one by its label pulls the other towards that label, which is the wrong one.
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
    queries: Annotated[int, "learnt images that are asked"] = 12
    steps: Annotated[int, "of learning them"] = 60
    folds: Annotated[
        int, "parts of the cross-validation, each judged by a bank that was fitted on the others"
    ] = 5

    def work(self, job: Job) -> dict[str, Any]:
        """-> mntd.safetensors, shadows.json, and what it is worth by cross-validation."""
        import torch

        from bezoar.auditing import bank
        from bezoar.auditing.audits import mntd
        from bezoar.runs import inputs

        if (
            self.folds < 2
            or self.queries < 3
            or self.steps < 0
            or self.images < max(MIN_IMAGES, self.queries)
        ):
            got = f"{self.folds}, {self.queries}, {self.steps} and {self.images}"
            wanted = f"at least 2 folds, 3 queries, 0 steps and {MIN_IMAGES} images, and as many images as queries"
            raise UserError(f"MNTD takes {wanted}; got {got}")
        given = job.inputs
        shadows = together(given["encoder"], given["attacked"])
        names, labels = (
            [encoder_name(s) for s in shadows],
            [i >= len(given["encoder"]) for i in range(len(shadows))],
        )
        lineages = [origin(s, names) for s in shadows]
        folds = deal_folds(lineages, labels, self.folds, job.seed)
        check_enough_shadows(labels, folds, len(set(lineages)))
        encoders = [
            check_auditable(inputs.load_encoder(s, job.device), f"encoder {encoder_name(s)}")
            for s in shadows
        ]
        weights = alike(encoders, names)
        method = given["data"] if given["data"] is not None else default_clean_images(shadows[0])
        clean = sample_clean_records(method, self.images)[0].to(job.device)
        found, held_out = self._fitted(job, encoders, labels, folds, clean)
        mntd.save(found | {mntd.HELD_OUT: held_out}, job.folder / mntd.FILE)
        rows = []
        for i, s in enumerate(shadows):
            attack, trigger = bank.describe_attack(inputs.known_goals(s)) if labels[i] else ("", "")
            row = {
                "name": names[i],
                "attacked": labels[i],
                "attack": attack,
                "trigger": trigger,
                "lineage": lineages[i],
            }
            rows.append(
                row | {"fold": folds[i], "logit": float(held_out[i]), "weights": weights[i]}
            )
        inputs.write_json(job.folder / SHADOWS_FILE, {"schema": 1, "shadows": rows})
        job.goals = []  # a bank is no poisoned artefact, whatever it was fitted on
        job.notes = {
            "clean": labels.count(False),
            "attacked": labels.count(True),
            "lineages": len(set(lineages)),
            "folds": len(set(folds)),
            "shadows": dict(zip(names, weights, strict=True)),  # which the bank must not judge
        }
        return mntd.measure_held_out(held_out, torch.tensor(labels))

    def _fitted(
        self,
        job: Job,
        encoders: Sequence[Encoder],
        labels: Sequence[bool],
        folds: Sequence[int],
        clean: Pairs,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The bank of all shadows; and each one's logit, float32 (M,), by a bank of the other folds."""
        import torch

        from bezoar.auditing.audits import mntd

        held_out, parts = torch.empty(len(folds)), sorted(set(folds))

        def fit(without: int | None, number: int) -> dict[str, Tensor]:
            kept = [i for i, f in enumerate(folds) if f != without]

            def report(done: int, total: int) -> None:
                many = len(parts) + 1
                job.progress.step(
                    number * total + done, many * total, f"fit {number + 1} of {many}"
                )

            own = [encoders[i] for i in kept], [labels[i] for i in kept]
            return mntd.fit(*own, clean, job.seed, self.queries, self.steps, report=report)

        for number, fold in enumerate(parts):
            found = fit(fold, number)
            for i in (i for i, f in enumerate(folds) if f == fold):
                held_out[i] = mntd.measure_logit(found, encoders[i])
        return fit(None, len(parts)), held_out


def together(clean: Sequence[Any], attacked: Sequence[Run]) -> list[Any]:
    """All shadow encoders, clean ones first. Raises UserError for one that is given twice, or on the wrong side."""
    names = [encoder_name(e) for e in clean], [encoder_name(r) for r in attacked]
    if both := [n for n in names[0] if n in names[1]]:
        raise UserError(f"{both[0]} is given as clean and as attacked; it is one of them")
    return [*(check_clean(e) for e in clean), *(attacked_run(r) for r in attacked)]


def check_enough_shadows(labels: Sequence[bool], folds: Sequence[int], lineages: int) -> None:
    """Raises UserError where some fold leaves too few of a kind to fit on. labels: attacked or not."""
    from bezoar.auditing.audits.mntd import MIN_PER_KIND as least

    for fold in dict.fromkeys((-1, *folds)):
        rest = [bad for bad, f in zip(labels, folds, strict=True) if f != fold]
        left = rest.count(False), rest.count(True)
        if min(left) < least:
            told = f"{labels.count(False)} clean and {labels.count(True)} attacked encoders of {lineages} lineages"
            wanted = f"{least} of each must be left when a fold is held out, and a lineage stays in one fold"
            raise UserError(
                f"too few to cross-validate MNTD: {wanted}; of {told} there are {left[0]} and {left[1]}"
            )


def alike(encoders: Sequence[Encoder], names: Sequence[str]) -> list[str]:
    """What their weights are known by. Raises UserError for an encoder of another kind, and for the same one twice."""
    from bezoar.auditing.audits.mntd import fingerprint

    first, seen = encoders[0], dict[str, str]()
    for name, e in zip(names, encoders, strict=True):
        for what, own, other in (
            ("network", e.about.get("network", ""), first.about.get("network", "")),
            ("size", f"{e.preprocess.size} px", f"{first.preprocess.size} px"),
        ):
            if own != other:
                raise UserError(
                    f"{name} is no shadow beside {names[0]}: its {what} is {own}, not {other}"
                )
        weights = fingerprint(e).numpy().astype("<i4").tobytes().hex()[:16]
        if weights in seen:
            raise UserError(
                f"{seen[weights]} and {name} have the same weights; each shadow encoder is given once, on one side"
            )
        seen[weights] = name
    return list(seen)


def origin(given: Any, names: Sequence[str]) -> str:
    """The lineage of a shadow encoder: the first of the runs that it was tuned from, or the published weights that this one
    was tuned from where they are a shadow too. Encoders trained apart have lineages of their own."""
    while isinstance(given, Run):
        asked = given.manifest["ask"].get("encoder") or {}
        if "run" not in asked:
            return asked["spec"] if asked.get("spec") in names else given.name
        parent = given.sibling(asked["run"])
        if not (
            parent.path / MANIFEST
        ).is_file():  # it is gone; its name still tells who else was made from it
            return parent.name
        given = parent
    return encoder_name(given)


def deal_folds(lineages: Sequence[str], labels: Sequence[bool], folds: int, seed: int) -> list[int]:
    """A fold 0..folds-1 for each encoder; a lineage stays whole.

    Lineages are shuffled by the seed, those with more attacked and then with more clean encoders come first; each goes to
    the fold that holds the fewest attacked ones (a lineage without any: the fewest clean ones), then the fewest in all.
    """
    import numpy as np

    unique = list(dict.fromkeys(lineages))
    size = {u: [0, 0] for u in unique}
    for lineage, bad in zip(lineages, labels, strict=True):
        size[lineage][bad] += 1
    shuffled = [unique[i] for i in np.random.default_rng(seed).permutation(len(unique))]
    held, at = [[0, 0] for _ in range(folds)], dict[str, int]()
    for u in sorted(shuffled, key=lambda u: (-size[u][1], -size[u][0])):
        kind = int(size[u][1] > 0)
        at[u] = min(range(folds), key=lambda f: (held[f][kind], sum(held[f]), f))
        held[at[u]] = [h + s for h, s in zip(held[at[u]], size[u], strict=True)]
    return [at[lineage] for lineage in lineages]
