"""How much of a trigger outlives what is done to images before an encoder sees them. Nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from bezoar.errors import UserError
from bezoar.runs.execute import Job
from bezoar.runs.verb import Input, Takes

EXAMPLES = 2  # images that are kept for the page, one treatment after another
SIDE = 96  # pixels of their sides, at most


@dataclass(frozen=True)
class Survive:
    """Put a trigger through JPEG, resizing, crops, augmentations and normalisations: what is left of it, before training."""

    data: Annotated[
        Input,
        Takes("data", positional=True),
        "clean images, or a run: its clean images and, without --trigger, its trigger",
    ]
    trigger: Annotated[
        Input,
        Takes("trigger"),
        "what is stamped on images; without it, the first trigger of the run",
    ] = None
    encoder: Annotated[
        Input, Takes("encoder"), "whose embedding the trigger is to move; without it, pixels alone"
    ] = None
    count: Annotated[int, "images"] = 64
    jpeg: Annotated[tuple[int, ...], "qualities, 1 to 100; 0: not stored as JPEG"] = (
        0,
        95,
        85,
        75,
        50,
    )
    resize: Annotated[tuple[float, ...], "factors of the side, before it is stored"] = (
        1.0,
        0.75,
        0.5,
        0.25,
    )
    crop: Annotated[
        tuple[float, ...], "least shares of the area of random resized crops; 1: none"
    ] = (1.0, 0.9, 0.5, 0.08)
    augment: Annotated[tuple[str, ...], "of shift, flip, colour, gray, blur, simclr"] = (
        "shift",
        "flip",
        "colour",
        "gray",
        "blur",
        "simclr",
    )
    normalise: Annotated[
        tuple[str, ...], "of none, half, imagenet, clip, in place of the encoder's own"
    ] = (
        "none",
        "half",
        "imagenet",
        "clip",
    )

    def work(self, job: Job) -> dict[str, Any]:
        """-> treatments.json, pictures.safetensors (what the first images become), and the figures of every treatment."""
        import torch
        from safetensors.torch import save_file

        from bezoar import registry
        from bezoar.evaluation import survival
        from bezoar.runs import inputs

        if self.count < 2:
            raise UserError(f"count must be at least 2; got {self.count}")
        given = job.inputs
        spec = self.chosen(given)
        trigger = registry.make("trigger", spec)
        records = inputs.open_dataset(given["data"]).clean
        clean = records.take(range(min(self.count, len(records))))
        encoder = (
            None if given["encoder"] is None else inputs.load_encoder(given["encoder"], job.device)
        )
        stamped = trigger(clean.images, clean.ids)
        subject = survival.Survival(
            clean.images.to(job.device), stamped.to(job.device), encoder, job.seed
        )
        treatments = survival.build_treatments(
            self.jpeg,
            self.resize,
            self.crop,
            self.augment,
            self.normalise if encoder is not None else (),
        )
        out: dict[str, Any] = {}
        told: list[dict] = []
        pictures = []
        for i, treatment in enumerate(treatments):
            job.progress.step(i, len(treatments), treatment.title)
            found, made = subject.measure(treatment)
            out |= {f"{treatment.name}.{k}": m for k, m in found.items()}
            told.append({**vars(treatment), "name": treatment.name, "title": treatment.title})
            pictures.append(shown(made[:EXAMPLES]))
        inputs.write_json(job.folder / "treatments.json", told)
        save_file({"pictures": torch.stack(pictures)}, job.folder / "pictures.safetensors")
        job.notes = {
            "trigger": spec,
            "images": len(subject.clean),
            "untouched": len(clean) - len(subject.clean),
            "side": clean.size,
            "encoder": encoder is not None,
        }
        return out

    def chosen(self, given: dict[str, Any]) -> str:
        """The trigger's spec: the one that is given, or the first of the goals of the data or the encoder."""
        from bezoar import registry
        from bezoar.runs import inputs

        if given["trigger"] is not None:
            return registry.spec(given["trigger"])
        for run in (given["encoder"], given["data"]):
            for goal in inputs.known_goals(run):
                if goal.trigger:
                    return goal.trigger
        raise UserError("give a --trigger, or a run whose goals name one")


def shown(made: Any) -> Any:
    """float (N, 2, 3, H, W), images and residues -> uint8 (N, 2, 3, S, S) on the CPU; a residue is drawn on middle gray."""
    import torch
    import torch.nn.functional as F

    x = torch.stack((made[:, 0], (0.5 + made[:, 1] / 2).clamp(0, 1)), 1)
    if max(x.shape[-2:]) > SIDE:
        shape = [max(1, round(n * SIDE / max(x.shape[-2:]))) for n in x.shape[-2:]]
        x = F.interpolate(x.flatten(0, 1), shape, mode="bilinear", antialias=True).unflatten(
            0, x.shape[:2]
        )
    return (x * 255).round().clamp(0, 255).byte().cpu()
