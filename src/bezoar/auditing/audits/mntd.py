"""MNTD (Xu et al. 2021): a meta-classifier over shadow encoders, clean and attacked, and queries that were learnt with it.

For encoders: trained apart, two of them share no axes, so what is read is not their vectors but the cosines of the queries'
vectors with one another, which no rotation changes. A tiny-model form: the published one takes hundreds of shadow models.
A bank knows its shadow encoders by their weights and judges none of them: their labels are what it was fitted on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, proportion, separation
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

FILE = "mntd.safetensors"
NAMES = ("bias", "labels", "mean", "outputs", "prints", "queries", "std", "weight")
HELD_OUT = "held_out"  # of a bank that was cross-validated: each shadow's logit by one that was fitted without it
APART = "; each by a bank that was fitted without its lineage"
MIN_PER_KIND, MANY = (
    4,
    100,
)  # shadow encoders: of each kind at least, of both kinds until they are few no more
HOW_TO = "make one: `bezoar shadows CLEAN... --attacked ATTACKED...` (from Python bezoar.audits.mntd.fit, then save)"


@method
class Mntd:
    """Value: the meta-classifier's logit, that of chance being 0."""

    needs: ClassVar[tuple[str, ...]] = ()

    bank: Annotated[
        str,
        "run of `bezoar shadows`, or its mntd.safetensors: learnt queries and their meta-classifier",
    ] = ""

    def files(self) -> list[Path]:
        """What is read: the bank, of a directory the one in it."""
        if not self.bank:
            return []
        inside = Path(self.bank).expanduser() / FILE
        return [existing_file(str(inside) if inside.parent.is_dir() else self.bank, "MNTD bank")]

    def __call__(self, encoder: Encoder, clean: Pairs, seed: int) -> Verdict:
        """clean: not looked at; the queries are the bank's. Raises UserError without a bank, and of an encoder in it."""
        if not self.bank:
            raise UserError(f"mntd needs a bank of shadow encoders (bank=RUN or FILE); {HOW_TO}")
        bank = load(str(self.files()[0]))
        labels, tested = bank["labels"], HELD_OUT in bank
        own = bank[HELD_OUT] if tested else logits(bank, bank["outputs"])
        if (bank["prints"] == fingerprint(encoder)).all(1).any():
            raise UserError(
                f"this encoder is one of the {len(own)} shadow encoders of {self.bank}, which may judge others alone"
            )
        value, bad = measure_logit(bank, encoder), int(labels.sum())
        how = APART if tested else "; the queries were fitted on them"
        told = f"share below this one's logit of {len(own)} shadow encoders, {bad} of them attacked{how}, counted"
        ranks = float((own < value).double().mean())
        evidence = {"above_shadows": Measure(ranks, len(own), ranks, ranks, told)}
        limits = [
            "It knows what sets its attacked shadow encoders apart, be it their tuning alone; of other attacks nothing.",
            "A relative of a shadow encoder (its parent, one tuned from it) is not recognised and is drawn to its label.",
        ]
        if tested:
            area = evidence["shadows_auroc"] = measure_held_out(own, labels)["auroc"]
            if area.low <= 0.5:
                found = f"AUROC {area.value:.2f} ({area.low:.2f} .. {area.high:.2f})"
                limits.append(
                    f"Cross-validated on its shadow encoders it is not shown to be better than chance: {found}."
                )
        if len(own) < MANY:
            limits.append(
                f"{len(own)} shadow encoders are few: the published form takes hundreds, and this one may be at chance."
            )
        return Verdict(
            value, evidence, notes={"shadows": len(own), "attacked_shadows": bad, "limits": limits}
        )


def fit(
    shadows: Sequence[Encoder],
    labels: Sequence[bool],
    clean: Pairs,
    seed: int = 0,
    queries: int = 12,
    steps: int = 60,
    lr: float = 0.05,
    penalty: float = 1.0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Learn queries and meta-classifier together (query tuning), then the meta-classifier alone to its optimum.

    shadows: encoders of one architecture. labels: which were attacked. clean: uint8 (N, 3, H, W), of which every other
    query starts; the rest start as noise. penalty: l2 on the meta-classifier's weights. report: told after
    every step. -> what `save` writes: queries uint8 (k, 3, H, W); outputs (M, k (k - 1) / 2); mean, std and weight of that
    width; bias (1,); labels bool (M,); prints int32 (M, 8), see `fingerprint`.
    """
    truth = torch.tensor(list(labels), dtype=torch.bool)
    if len(truth) != len(shadows) or min(int(truth.sum()), int((~truth).sum())) < MIN_PER_KIND:
        raise UserError(
            f"MNTD takes at least {MIN_PER_KIND} clean and {MIN_PER_KIND} attacked shadow encoders, and a label for each"
        )
    if len(clean) < queries or queries < 3 or steps < 0:
        raise UserError(
            f"{queries} queries start from as many clean images, and there are {len(clean)}; 3 at the least"
        )
    device, g = shadows[0].device, torch.Generator().manual_seed(seed)
    start = (
        clean.images[torch.randperm(len(clean), generator=g)[:queries].to(clean.images.device)]
        .to(device)
        .float()
        / 255
    )
    start[::2] = torch.rand(start[::2].shape, generator=g).to(
        device
    )  # noise is what the published queries start from
    free = torch.logit(start.clamp(0.02, 0.98)).requires_grad_()
    weight = torch.zeros(queries * (queries - 1) // 2, device=device, requires_grad=True)
    bias = torch.zeros(1, device=device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [free], "lr": lr}, {"params": [weight, bias], "lr": 0.1}]
    )
    for step in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            x = torch.stack(
                [query_cosines(e.eval().encode_images(free.sigmoid())) for e in shadows]
            )
        mean, std = x.mean(0), x.std(0) + 1e-3
        x.requires_grad_()
        z = ((x - mean) / std) @ weight + bias
        loss = balanced(z, truth.to(device)) + penalty * weight.square().sum() / (2 * len(truth))
        pulls = torch.autograd.grad(loss, x, retain_graph=True)[0]
        loss.backward(inputs=[weight, bias])
        for e, pull in zip(
            shadows, pulls, strict=True
        ):  # once more, one by one: the memory of one encoder, not of all
            query_cosines(e.encode_images(free.sigmoid())).backward(pull, inputs=[free])
        optimizer.step()
        report(step + 1, steps)
    made = (free.detach().sigmoid() * 255).round().byte()
    x = torch.stack([query_cosines(embed_images(e, [made])) for e in shadows]).cpu()
    mean, std = x.mean(0), x.std(0) + 1e-3
    weight, bias = logistic((x - mean) / std, truth, penalty)
    found = {
        "queries": made.cpu(),
        "outputs": x,
        "labels": truth,
        "mean": mean,
        "std": std,
        "weight": weight,
        "bias": bias,
    }
    found["prints"] = torch.stack([fingerprint(e) for e in shadows])
    return {k: v.contiguous() for k, v in found.items()}


def measure_logit(bank: dict[str, Tensor], encoder: Encoder) -> float:
    """The meta-classifier's logit of one encoder."""
    x = query_cosines(embed_images(encoder, [bank["queries"].to(encoder.device)])).cpu()
    return float(logits(bank, x[None])[0])


def measure_held_out(held_out: Tensor, labels: Tensor) -> dict[str, Measure]:
    """What logits (M,) of shadow encoders that a bank was not fitted on say of banks made so. labels: bool (M,), attacked."""
    bad, clean = held_out[labels], held_out[~labels]
    area = separation(bad.tolist(), clean.tolist())
    right = int((bad > 0).sum() + (clean <= 0).sum())
    return {
        "auroc": dataclasses.replace(area, how=area.how + APART),
        "accuracy": proportion(
            right, len(labels), f"shadow encoders on their own side of logit 0{APART}"
        ),
        "sensitivity": proportion(
            int((bad > 0).sum()), len(bad), f"attacked shadow encoders above logit 0{APART}"
        ),
        "false_positive_rate": proportion(
            int((clean > 0).sum()), len(clean), f"clean shadow encoders above logit 0{APART}"
        ),
    }


def fingerprint(encoder: Encoder) -> Tensor:
    """What the image tower's weights are known by, whatever run or file they lie in: sha256 as int32 (8,)."""
    total = hashlib.sha256()
    for name, v in sorted(encoder.image.state_dict().items()):
        total.update(f"{name}:{v.dtype}:{tuple(v.shape)};".encode())
        total.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return torch.from_numpy(np.frombuffer(total.digest(), "<i4").astype(np.int32))


def query_cosines(z: Tensor) -> Tensor:
    """Unit rows (k, D) of the queries -> float32 (k (k - 1) / 2,): their cosines, row by row above the diagonal."""
    row, column = torch.triu_indices(len(z), len(z), 1)
    return (z @ z.T)[row, column]


def logits(bank: dict[str, Tensor], x: Tensor) -> Tensor:
    """Outputs (M, F) -> the meta-classifier's logits, float32 (M,)."""
    return ((x - bank["mean"]) / bank["std"]) @ bank["weight"] + bank["bias"]


def balanced(z: Tensor, truth: Tensor) -> Tensor:
    """Logistic loss of logits (M,), both kinds counting the same however many there are of each."""
    n, bad = len(truth), truth.sum()
    share = torch.where(truth, n / (2 * bad), n / (2 * (n - bad)))
    return F.binary_cross_entropy_with_logits(z, truth.to(z.dtype), share)


def logistic(x: Tensor, truth: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Balanced logistic regression with penalty |w|^2 / (2 M), bias free, at its optimum: weight (F,), bias (1,)."""
    x64 = x.double()
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [w, b],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = balanced(x64 @ w + b, truth) + penalty * w.square().sum() / (2 * len(truth))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    return w.detach().float(), b.detach().float()


def save(bank: dict[str, Tensor], path: Path) -> None:
    """Write what `fit` made as one safetensors file; pixels and labels as whole numbers of more bits."""
    save_file(
        {k: v if v.is_floating_point() else v.int() for k, v in bank.items()},
        path.with_suffix(".tmp"),
    )
    path.with_suffix(".tmp").replace(path)


def load(path: str) -> dict[str, Tensor]:
    """Read what `save` wrote. Raises UserError for anything else."""
    found = checkpoints.load_tensors(path)
    if sorted(set(found) - {HELD_OUT}) != list(NAMES):
        raise UserError(f"{path}: no MNTD bank, which holds {', '.join(NAMES)}; {HOW_TO}")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    queries, many = shapes["queries"], len(found["labels"]) if found["labels"].ndim == 1 else 0
    if len(queries) != 4 or queries[1] != 3 or not 0 < int(found["labels"].bool().sum()) < many:
        raise UserError(
            f"{path}: not queries (k, 3, H, W) and labels (M,) of both kinds, but {queries} and {shapes['labels']}"
        )
    width = queries[0] * (queries[0] - 1) // 2
    expected = {
        "bias": (1,),
        "mean": (width,),
        "std": (width,),
        "weight": (width,),
        "outputs": (many, width),
    }
    expected |= {HELD_OUT: (many,)} if HELD_OUT in found else {}
    expected["prints"] = (many, 8)
    if odd := [f"{k} {shapes[k]}, not {v}" for k, v in expected.items() if shapes[k] != v]:
        raise UserError(
            f"{path}: {queries[0]} queries and {many} shadow encoders do not go with {odd[0]}"
        )
    pixels = found["queries"]
    if not all(torch.isfinite(v).all() for v in found.values()) or (found["std"] <= 0).any():
        raise UserError(f"{path}: NaN, infinite numbers or deviations of 0 in the bank")
    if (pixels < 0).any() or (pixels > 255).any():
        raise UserError(f"{path}: queries must be pixels, 0..255")
    own = {k: found[k].float() for k in expected if k != "prints"}
    return own | {
        "queries": pixels.byte(),
        "labels": found["labels"].bool(),
        "prints": found["prints"].int(),
    }
