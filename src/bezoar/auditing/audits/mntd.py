"""MNTD: a meta-classifier over shadow encoders, and queries learnt with it (Xu et al., S&P 2021).

Two encoders that were trained apart share no axes, so the meta-classifier does not read the
queries' vectors but their cosines with one another, which no rotation changes. This is a form for
tiny models: the published one takes hundreds of shadow models. A bank recognises its shadow
encoders by their weights and refuses to judge them, because their labels are what it was fitted on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from bezoar.auditing.evidence import exact_measure
from bezoar.data.files import checkpoints
from bezoar.data.files.paths import existing_file
from bezoar.data.files.writing import write_whole
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError, expand_home
from bezoar.evaluation.scores import Measure, proportion, separation
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

FILE = "mntd.safetensors"
NAMES = ("bias", "labels", "mean", "outputs", "prints", "queries", "std", "weight")
HELD_OUT = "held_out"  # of a cross-validated bank: each shadow's logit by a bank fitted without it
CROSS_VALIDATED = "; each by a bank that was fitted without its lineage"
MIN_PER_KIND = 4  # shadow encoders of each kind
MANY_SHADOWS = 100  # with fewer, a bank says that they are few
HOW_TO = (
    "make one: `bezoar shadows CLEAN... --attacked ATTACKED...` "
    "(from Python bezoar.auditing.audits.mntd.fit, then save)"
)

# What `fit` makes and a file holds: NAMES, and HELD_OUT of a cross-validated bank. See `fit`.
ShadowBank = dict[str, Tensor]


@method
class Mntd:
    """Value: the meta-classifier's logit; 0 is undecided, above 0 attacked."""

    run_fields: ClassVar[dict[str, str]] = {"bank": "bank"}
    needs: ClassVar[tuple[str, ...]] = ()

    bank: Annotated[
        str,
        "run of `bezoar shadows`, or its mntd.safetensors: learnt queries and their "
        "meta-classifier",
    ] = ""

    def files(self) -> list[Path]:
        """The bank's file, for a directory the one in it."""
        if not self.bank:
            return []
        inside = expand_home(self.bank) / FILE
        return [existing_file(str(inside) if inside.parent.is_dir() else self.bank, "MNTD bank")]

    def __call__(self, encoder: Encoder, clean: Pairs, seed: int) -> Verdict:
        """Audit an encoder with the bank's queries; the clean images are not read.

        Raises:
            UserError: without a bank, or for one of its shadow encoders.
        """
        if not self.bank:
            raise UserError(f"mntd needs a bank of shadow encoders (bank=RUN or FILE); {HOW_TO}")
        bank = load(str(self.files()[0]))
        labels = bank["labels"]
        shadows, attacked = len(labels), int(labels.sum())
        if (bank["prints"] == fingerprint(encoder)).all(1).any():
            raise UserError(
                f"this encoder is one of the {shadows} shadow encoders of {self.bank}, which can "
                "judge only others"
            )
        value = measure_logit(bank, encoder)
        validated = HELD_OUT in bank
        shadow_logits = bank[HELD_OUT] if validated else logits(bank, bank["outputs"])
        fitted_how = CROSS_VALIDATED if validated else "; the queries were fitted on them"
        evidence = {
            "above_shadows": exact_measure(
                float((shadow_logits < value).double().mean()),
                shadows,
                f"share below this one's logit of {shadows} shadow encoders, {attacked} of them "
                f"attacked{fitted_how}, counted",
            )
        }
        limits = [
            "It detects what sets its attacked shadow encoders apart, which may be their tuning "
            "alone, and no other attack.",
            "A relative of a shadow encoder (its parent, one tuned from it) is not recognised and "
            "is drawn to its label.",
        ]
        if validated:
            area = evidence["shadows_auroc"] = measure_held_out(shadow_logits, labels)["auroc"]
            if area.low <= 0.5:
                limits.append(
                    "Cross-validated on its shadow encoders it is not shown to be better than "
                    f"chance: AUROC {area.value:.2f} ({area.low:.2f} .. {area.high:.2f})."
                )
        if shadows < MANY_SHADOWS:
            limits.append(
                f"{shadows} shadow encoders are few: the published form takes hundreds, and this "
                "one may be at chance."
            )
        notes = {"shadows": shadows, "attacked_shadows": attacked, "limits": limits}
        return Verdict(value, evidence, notes=notes)


def check_shadows(shadows: Sequence[Encoder], attacked: Tensor) -> None:
    """Raise UserError unless there is a label for each shadow, and enough of both kinds."""
    of_each_kind = int(attacked.sum()), int((~attacked).sum())
    if len(attacked) != len(shadows) or min(of_each_kind) < MIN_PER_KIND:
        raise UserError(
            f"MNTD takes at least {MIN_PER_KIND} clean and {MIN_PER_KIND} attacked shadow "
            "encoders, and a label for each"
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
) -> ShadowBank:
    """Learn queries and meta-classifier together, then fit the meta-classifier alone.

    Args:
        shadows: M encoders of one architecture.
        labels: which of them were attacked.
        clean: uint8 images (N, 3, H, W), of which every other query starts; the rest start as
            noise.
        queries: their number k.
        penalty: L2 penalty on the meta-classifier's weights, above 0.
        report: told after every step.

    Returns:
        What `save` writes: queries uint8 (k, 3, H, W); outputs float32 (M, F), the shadows' query
        cosines, F = k (k - 1) / 2; their mean and std (F,); weight (F,) and bias (1,); labels
        bool (M,); prints int32 (M, 8), the shadows' fingerprints.

    Raises:
        UserError: for too few shadow encoders, clean images or queries, or a penalty of 0.
    """
    attacked = torch.tensor(list(labels), dtype=torch.bool)
    check_shadows(shadows, attacked)
    if len(clean) < queries or queries < 3 or steps < 0:
        raise UserError(
            f"MNTD takes 3 queries or more and as many clean images; got {queries} queries and "
            f"{len(clean)} images"
        )
    if penalty <= 0:
        raise UserError(f"the penalty must be above 0; got {penalty:g}")
    start = draw_queries(clean, queries, seed).to(shadows[0].device)
    pixels = learn_queries(shadows, attacked, start, steps, lr, penalty, report)
    outputs = torch.stack([query_cosines(embed_images(e, [pixels])) for e in shadows]).cpu()
    mean = outputs.mean(0)
    std = outputs.std(0) + 1e-3
    weight, bias = fit_logistic((outputs - mean) / std, attacked, penalty)
    return {
        "queries": pixels.cpu().contiguous(),
        "outputs": outputs,
        "labels": attacked,
        "mean": mean,
        "std": std,
        "weight": weight,
        "bias": bias,
        "prints": torch.stack([fingerprint(e) for e in shadows]),
    }


def draw_queries(clean: Pairs, count: int, seed: int) -> Tensor:
    """Where the queries start: images float 0..1 (count, 3, H, W), every other one noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(clean), generator=generator)[:count]
    start = clean.images[rows.to(clean.images.device)].float() / 255
    start[::2] = torch.rand(start[::2].shape, generator=generator).to(start.device)
    return start


def learn_queries(
    shadows: Sequence[Encoder],
    attacked: Tensor,
    start: Tensor,
    steps: int,
    lr: float,
    penalty: float,
    report: Callable[[int, int], None],
) -> Tensor:
    """Query tuning: queries and meta-classifier descend together; the queries, uint8 (k, 3, H, W).

    start: float 0..1 (k, 3, H, W). attacked: bool (M,). The other arguments are those of `fit`.
    """
    device, k = start.device, len(start)
    attacked = attacked.to(device)
    free = torch.logit(start.clamp(0.02, 0.98)).requires_grad_()  # the queries are its sigmoid
    weight = torch.zeros(k * (k - 1) // 2, device=device, requires_grad=True)
    bias = torch.zeros(1, device=device, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [free], "lr": lr}, {"params": [weight, bias], "lr": 0.1}]
    )
    for step in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            images = free.sigmoid()
            x = torch.stack([query_cosines(e.eval().encode_images(images)) for e in shadows])
        mean, std = x.mean(0), x.std(0) + 1e-3
        x.requires_grad_()  # (M, F)
        z = ((x - mean) / std) @ weight + bias
        loss = balanced_loss(z, attacked) + penalty * weight.square().sum() / (2 * len(shadows))
        grad_x = torch.autograd.grad(loss, x, retain_graph=True)[0]
        torch.autograd.backward(loss, inputs=[weight, bias])
        # Once more, encoder by encoder: this takes the memory of one of them, not of all.
        for encoder, grad in zip(shadows, grad_x, strict=True):
            cosines = query_cosines(encoder.encode_images(free.sigmoid()))
            torch.autograd.backward(cosines, grad, inputs=[free])
        optimizer.step()
        report(step + 1, steps)
    return (free.detach().sigmoid() * 255).round().byte()


def measure_logit(bank: ShadowBank, encoder: Encoder) -> float:
    """The meta-classifier's logit of one encoder."""
    z = embed_images(encoder, [bank["queries"].to(encoder.device)])
    return float(logits(bank, query_cosines(z).cpu()[None])[0])


def measure_held_out(held_out: Tensor, labels: Tensor) -> dict[str, Measure]:
    """How well cross-validated banks tell shadow encoders apart.

    Args:
        held_out: (M,), the logit of each shadow encoder by a bank that was fitted without it.
        labels: bool (M,), whether it was attacked.
    """
    attacked, clean = held_out[labels], held_out[~labels]
    detected, false_alarms = int((attacked > 0).sum()), int((clean > 0).sum())
    correct = detected + len(clean) - false_alarms
    area = separation(attacked.tolist(), clean.tolist())
    return {
        "auroc": dataclasses.replace(area, how=area.how + CROSS_VALIDATED),
        "accuracy": proportion(
            correct, len(labels), f"shadow encoders on their own side of logit 0{CROSS_VALIDATED}"
        ),
        "sensitivity": proportion(
            detected, len(attacked), f"attacked shadow encoders above logit 0{CROSS_VALIDATED}"
        ),
        "false_positive_rate": proportion(
            false_alarms, len(clean), f"clean shadow encoders above logit 0{CROSS_VALIDATED}"
        ),
    }


def fingerprint(encoder: Encoder) -> Tensor:
    """Hash of the image tower's weights, whatever run or file holds them: sha256 as int32 (8,)."""
    total = hashlib.sha256()
    for name, v in sorted(encoder.image.state_dict().items()):
        total.update(f"{name}:{v.dtype}:{tuple(v.shape)};".encode())
        total.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return torch.from_numpy(np.frombuffer(total.digest(), "<i4").astype(np.int32))


def query_cosines(z: Tensor) -> Tensor:
    """Cosines of each two of k unit rows (k, D), the upper triangle row by row: (k (k - 1) /
    2,)."""
    row, column = torch.triu_indices(len(z), len(z), 1)
    return (z @ z.T)[row, column]


def logits(bank: ShadowBank, x: Tensor) -> Tensor:
    """The meta-classifier's logits, float32 (M,), of query cosines (M, F)."""
    return ((x - bank["mean"]) / bank["std"]) @ bank["weight"] + bank["bias"]


def balanced_loss(z: Tensor, attacked: Tensor) -> Tensor:
    """Logistic loss of logits (M,); clean and attacked ones, bool (M,), weigh the same in all."""
    n, bad = len(attacked), attacked.sum()
    weight = torch.where(attacked, n / (2 * bad), n / (2 * (n - bad)))
    return F.binary_cross_entropy_with_logits(z, attacked.to(z.dtype), weight)


def fit_logistic(x: Tensor, attacked: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Logistic regression at the optimum of `balanced_loss` + penalty |w|^2 / (2 M).

    x: (M, F). attacked: bool (M,). -> weight (F,) and bias (1,), float32.
    """
    model = LogisticRegression(C=1 / penalty, class_weight="balanced", tol=1e-10, max_iter=10_000)
    model.fit(x.double().numpy(), attacked.numpy())
    return torch.from_numpy(model.coef_[0]).float(), torch.from_numpy(model.intercept_).float()


def save(bank: ShadowBank, path: Path) -> None:
    """Write what `fit` made as one safetensors file; whole numbers are widened to int32."""
    widened = {k: v if v.is_floating_point() else v.int() for k, v in bank.items()}
    write_whole(path, safetensors.torch.save(widened))


def load(path: str) -> ShadowBank:
    """Read what `save` wrote. Raises UserError for anything else."""
    tensors = checkpoints.load_tensors(path)
    if set(tensors) - {HELD_OUT} != set(NAMES):
        raise UserError(f"{path}: no MNTD bank, which holds {', '.join(NAMES)}; {HOW_TO}")
    floats = check_shapes(tensors, path)
    pixels = tensors["queries"]
    if not all(torch.isfinite(v).all() for v in tensors.values()) or (tensors["std"] <= 0).any():
        raise UserError(f"{path}: NaN, infinite numbers or deviations of 0 in the bank")
    if (pixels < 0).any() or (pixels > 255).any():
        raise UserError(f"{path}: queries must be pixels, 0..255")
    return {k: tensors[k].float() for k in floats} | {
        "queries": pixels.byte(),
        "labels": tensors["labels"].bool(),
        "prints": tensors["prints"].int(),
    }


def check_shapes(tensors: dict[str, Tensor], path: str) -> list[str]:
    """Raise UserError unless a bank's tensors fit together; return the names of the floats."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    labels, queries = tensors["labels"], shapes["queries"]
    shadows = len(labels) if labels.ndim == 1 else 0
    if len(queries) != 4 or queries[1] != 3 or not 0 < int(labels.bool().sum()) < shadows:
        raise UserError(
            f"{path}: not queries (k, 3, H, W) and labels (M,) of both kinds, but {queries} and "
            f"{shapes['labels']}"
        )
    width = queries[0] * (queries[0] - 1) // 2
    floats: dict[str, tuple[int, ...]] = {
        "bias": (1,),
        "mean": (width,),
        "std": (width,),
        "weight": (width,),
        "outputs": (shadows, width),
    }
    if HELD_OUT in tensors:
        floats[HELD_OUT] = (shadows,)
    for name, shape in {**floats, "prints": (shadows, 8)}.items():
        if shapes[name] != shape:
            raise UserError(
                f"{path}: {queries[0]} queries and {shadows} shadow encoders do not go with {name} "
                f"{shapes[name]}, not {shape}"
            )
    return list(floats)
