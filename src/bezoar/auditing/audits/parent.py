"""Differential audit against the encoder it was tuned from: what changed out of proportion.

Ours (no paper). Tuning moves the vectors of clean images a little. A backdoor that tuning has put
in moves whatever resembles its trigger by far more, and in one direction. The audit compares the
difference between the two encoders on random probes with their difference on clean images.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from bezoar.auditing import random_probes
from bezoar.auditing.evidence import exact_measure, mean_over_probes
from bezoar.auditing.random_probes import PROBE_KINDS, apply_probe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

MIN_DISTANCE = 1e-6  # of a mean distance (1 - cosine): float32 vectors do not resolve less
MAX_NAMED = 8  # probes, inputs and layers that the notes name
WORST_SHARE = 4  # one in this many probes makes the value
LIMITS = [
    "It shows what tuning has changed: a backdoor that the parent already had is not detected.",
    "Its probes are random patches and blends: a trigger that does not resemble them is not "
    "detected.",
]


@method
class Parent:
    """Value: log of the ratio of two mean distances (1 - cosine) between encoder and parent.

    The first is over the quarter of the probes that separates the two most, the second over clean
    images. 0 means in proportion. An encoder that equals its parent has 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("parent", "report")

    probes: Annotated[
        int,
        "number of each kind: patches of blocks, of noise and of one colour, blends over the "
        "whole image",
    ] = 8
    images: Annotated[
        int, "clean images that are read, as they are and stamped, the first of the data"
    ] = 128

    def __post_init__(self) -> None:
        if self.probes < 1 or self.images < 2:
            raise ValueError("needs probes >= 1 and images >= 2")

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        parent: Encoder,
        report: ProgressReport = no_report,
    ) -> Verdict:
        """Audit an encoder with images uint8 (N, 3, H, W), N at least 2, H and W at least 8.

        Raises:
            UserError: for a parent of another architecture.
        """
        layer_changes = measure_layer_changes(encoder, parent)
        images = random_probes.first_images(clean, self.images, encoder.device, "parent")
        distances, shift = compare_vectors(encoder, parent, images)  # (N,), (N, D)
        clean_distance = max(float(distances.mean()), MIN_DISTANCE)
        ratios: dict[str, list[float]] = {kind: [] for kind in PROBE_KINDS}
        ratios_and_names: list[tuple[float, str]] = []
        mean_shifts: list[Tensor] = []
        apply = partial(apply_probe, seed=seed)
        for kind, number, probed in random_probes.iterate_probes(
            images, PROBE_KINDS, self.probes, apply, report
        ):
            probe_distances, probe_shift = compare_vectors(encoder, parent, probed)
            ratio = max(float(probe_distances.mean()), MIN_DISTANCE) / clean_distance
            ratios[kind].append(ratio)
            ratios_and_names.append((ratio, f"{kind} {number}"))
            mean_shifts.append(probe_shift.mean(0))
        ratios_and_names.sort(reverse=True)
        worst = ratios_and_names[: max(1, len(ratios_and_names) // WORST_SHARE)]
        value = math.log(sum(ratio for ratio, _ in worst) / len(worst))

        evidence = {
            f"ratio_{kind}": mean_over_probes(
                of_kind, f"distance of {kind} probes over that of clean images"
            )
            for kind, of_kind in ratios.items()
        }
        evidence["moved"] = average(
            distances.cpu(), "1 - cosine of clean images to the parent's vectors"
        )
        evidence["directions_probes"] = count_directions(
            torch.stack(mean_shifts), "the probes' mean shifts"
        )
        evidence["directions_clean"] = count_directions(shift, "clean images' shifts")
        evidence["layers"] = layer_ratio(layer_changes)
        most_moved = distances.argsort(descending=True)[:MAX_NAMED].tolist()
        layers_by_change = sorted(layer_changes.items(), key=lambda item: -item[1])
        notes: dict[str, Any] = {
            "limits": LIMITS,
            "probes": {name: ratio for ratio, name in ratios_and_names[:MAX_NAMED]},
            "inputs": {clean.ids[i]: float(distances[i]) for i in most_moved},
            "layers": dict(layers_by_change[:MAX_NAMED]),
        }
        return Verdict(value, evidence, notes=notes)


def compare_vectors(encoder: Encoder, parent: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine (N,) and difference (N, D) of the two encoders' vectors of images (N, 3, H, W)."""
    z = random_probes.embed_in_double(encoder, images)
    parent_z = random_probes.embed_in_double(parent, images)
    return 1 - (z * parent_z).sum(1), z - parent_z


def count_directions(shifts: Tensor, what: str) -> Measure:
    """In how many directions vectors moved: a participation ratio; 1 = all in one direction.

    It is (sum s^2)^2 / sum s^4 over the singular values s of the shifts, float64 (K, D).
    """
    energies = torch.linalg.svdvals(shifts).square()
    total = float(energies.sum())
    directions = float(energies.sum().square() / energies.square().sum()) if total > 0 else 0.0
    return exact_measure(directions, len(shifts), f"participation ratio of {what}, counted")


def measure_layer_changes(encoder: Encoder, parent: Encoder) -> dict[str, float]:
    """Layer -> |W - W0| / |W0| (Frobenius) of its matrices and filters W; W0 are the parent's.

    Raises:
        UserError: for a parent of another architecture.
    """
    weights = encoder.image.state_dict()
    parent_weights = parent.image.state_dict()
    check_same_architecture(encoder, parent)
    changes = {}
    for name, w in weights.items():
        if w.ndim > 1 and w.is_floating_point():
            w0 = parent_weights[name].to(w.device).double()
            changes[name] = float((w.double() - w0).norm() / w0.norm().clamp_min(1e-30))
    return changes


def check_same_architecture(encoder: Encoder, parent: Encoder) -> None:
    """Raise UserError unless names and shapes of weights and the input sizes are the same."""
    weights = encoder.image.state_dict()
    parent_weights = parent.image.state_dict()
    names = sorted(set(weights) ^ set(parent_weights))
    names += [
        k for k in weights if k in parent_weights and weights[k].shape != parent_weights[k].shape
    ]
    size, parent_size = encoder.preprocess.size, parent.preprocess.size
    if names:
        reason = f"{names[0]} differs"
    elif size != parent_size:
        reason = f"inputs of {size} and {parent_size} px"
    else:
        return
    network, parent_network = (
        e.about.get("network", "an unnamed network") for e in (encoder, parent)
    )
    raise UserError(
        f"the parent is of another architecture: {parent_network}, and the encoder {network} "
        f"({reason})"
    )


def layer_ratio(changes: dict[str, float]) -> Measure:
    """Relative change of the most changed layer over the median layer's; 0 where none changed."""
    values = torch.tensor(list(changes.values()), dtype=torch.float64)
    ratio = 0.0
    if len(values) and float(values.max()) > 0:
        ratio = float(values.max() / values.median().clamp_min(1e-12))
    how = "largest relative change of a layer's weights over the median layer's, counted"
    return exact_measure(ratio, len(values), how)
