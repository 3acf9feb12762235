"""Rank the records of a data set by how suspicious they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from bezoar import registry
from bezoar.errors import UserError
from bezoar.run import Input, Job, Run, Takes


@dataclass(frozen=True)
class Scan:
    """Rank a data set's records, most suspicious first, and write a keep-list. Several detectors are merged by rank."""

    data: Annotated[Input, Takes("data"), "data set, poison run, or a train run: its data scanned with its encoder"]
    encoder: Annotated[Input, Takes("encoder"), "what embeds the records; without it, the train run's own"] = None
    detector: Annotated[tuple[Input, ...], Takes("detector"), "see `bezoar list detector`"] = ("transplant", "duplicates")
    remove: Annotated[float, "share of the records, the worst first, that the keep-list leaves out"] = 0.03
    write: Annotated[Literal["keep-list", "shards"], "the keep-list alone, or shards (PNG) of what is kept"] = "keep-list"

    def work(self, job: Job) -> dict[str, Any]:
        """-> scores.safetensors, ids.json, ranked.json (the worst 500 with their scores), keep.txt, and their figures.

        The plan of a poisoned set, where there is one, is read only after the ranking is written, to measure it.
        """
        import torch
        from safetensors.torch import save_file

        from bezoar import inputs
        from bezoar.scores import Scores, detection

        if not 0 <= self.remove < 1:
            raise UserError(f"remove must be a share in 0..1; got {self.remove}")
        given = job.inputs
        source = given["encoder"] or given["data"]
        if not isinstance(source, Run) and given["encoder"] is None:
            raise UserError("give --encoder: what embeds the records (a train run, or a network with weights)")
        parts = inputs.dataset(given["data"])
        pairs, encoder = parts.pairs, inputs.encoder(source, job.device)
        found: dict[str, Scores] = {}
        for detector in given["detector"]:
            name = registry.source_name(type(detector))
            with counted(encoder, expected(detector, len(pairs)), job.progress, name):
                found[name] = detector(encoder, pairs)
        merged = merge(list(found.values()))
        order = merged.ranked()
        tensors = {"score": merged.values, **{f"detector.{k}": s.of(merged.ids) for k, s in found.items()}}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, job.folder / "scores.safetensors")
        inputs.write_json(job.folder / "ids.json", list(merged.ids))
        removed = round(self.remove * len(pairs))
        kept = sorted(order[removed:].tolist())
        (job.folder / "keep.txt").write_text("\n".join(merged.ids[i] for i in kept) + "\n")
        inputs.write_json(job.folder / "ranked.json", [self._row(i, merged, found, pairs) for i in order[:500].tolist()])
        job.notes = parts.reading() | {
            "records": len(pairs),
            "removed": removed,
            "detectors": [registry.spec(d) for d in given["detector"]],
        }
        if self.write == "shards":
            from bezoar.shards import write_shards

            write_shards(job.folder / "shards", pairs.take(kept))
        if not parts.plan.edits:
            return {}
        truth = torch.from_numpy(parts.plan.mask(merged.ids))
        out = detection(merged, truth)
        for name, scores in found.items() if len(found) > 1 else ():
            out |= {f"{name}.{k}": m for k, m in detection(scores, torch.from_numpy(parts.plan.mask(scores.ids))).items()}
        return out | removal(parts.plan, set(merged.ids) - {merged.ids[i] for i in kept})

    @staticmethod
    def _row(i: int, merged: Any, found: dict[str, Any], pairs: Any) -> dict:
        caption = pairs.captions[i] if pairs.captions else ""
        each = {k: float(s.values[i]) for k, s in found.items()}
        return {"id": merged.ids[i], "caption": caption, "score": float(merged.values[i]), "detectors": each}


def expected(detector: Any, n: int) -> int:
    """Images that a detector will embed: what it says itself, or each record once."""
    return detector.passes(n) if hasattr(detector, "passes") else n


@contextmanager
def counted(encoder: Any, total: int, progress: Any, name: str) -> Iterator[None]:
    """Report progress by the images that pass through the encoder's image tower."""
    done = 0

    def count(_: Any, given: Any, __: Any) -> None:
        nonlocal done
        done += len(given[0])
        progress.step(min(done, total), total, name)

    progress.step(0, total, name)
    hook = encoder.image.register_forward_hook(count)
    try:
        yield
    finally:
        hook.remove()


def merge(found: list[Any]) -> Any:
    """Scores of several detectors over the same records -> one: the largest -log10 of a record's share of rank.

    A record counts as suspicious as its most suspicious detector finds it; with one detector the order is its own.
    """
    import numpy as np
    import torch

    from bezoar.scores import Scores

    first = found[0]
    if len(found) == 1:
        return first
    best = np.full(len(first), -np.inf)
    for scores in found:
        aligned = Scores(first.ids, scores.of(first.ids).cpu())
        surprise = np.empty(len(first))
        surprise[aligned.ranked()] = -np.log10((np.arange(len(first)) + 1) / len(first))
        best = np.maximum(best, surprise)
    return Scores(first.ids, torch.from_numpy(best).float())


def removal(plan: Any, removed: set[str]) -> dict[str, Any]:
    """How many of the poisons the keep-list leaves out, over all and by goal."""
    from bezoar.scores import proportion

    hit = sum(e.id in removed for e in plan.edits)
    return {"poisons_removed": proportion(hit, len(plan.edits), "poisons that the keep-list leaves out")}
