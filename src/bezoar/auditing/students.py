"""Students: small classifiers of the clean images, taught by an encoder's own readings of them.

A student has never seen a trigger. What leads to a class by nature, such as faint strokes on black
images to one digit, leads students to it as well; a backdoor's trigger does not. So an audit that
would accuse a class searches the students for triggers in the same way, and asks whether theirs
lead to the same class most easily.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.evidence import exact_measure
from bezoar.auditing.trigger_inversion import ImageTower
from bezoar.auditing.unaided_verdict import GOOD_AGREEMENT
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.small_towers import ConvTower
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Measure, proportion

STUDENTS = 3
SIDE, WIDTH = 32, 16  # of a student: of its input in pixels, and channels of its first layer
STEPS, BATCH, RATE = 200, 64, 3e-3
SHIFT = 2  # pixels that images are moved by at most while a student learns
HELD_OUT = 4  # one of so many clean images takes no part in the training

# The sizes of the least triggers in a student, (C,); infinite where there is none.
StudentSearch = Callable[[ImageTower, Classifier], Tensor]


def compare_students(
    classifier: Classifier,
    clean: Pairs,
    accused: Mapping[str, str],
    searches: Mapping[str, StudentSearch],
    seed: int,
) -> dict[str, Measure]:
    """What students say of accused classes, as evidence; empty where nothing is accused.

    Args:
        classifier: the encoder under audit, with its head.
        clean: images of the audit.
        accused: kind of trigger -> the class that it leads to.
        searches: kind of trigger -> the same search, in a student.
        seed: of the students.
    """
    if not accused:
        return {}
    readings = classifier.predict(clean.images)
    count = len(clean) // HELD_OUT
    students: list[Classifier] = []
    hits = 0
    for number in range(seed * STUDENTS, (seed + 1) * STUDENTS):
        students.append(train_student(classifier, clean, readings, count, number))
        hits += int((students[-1].predict(clean.images[-count:]) == readings[-count:]).sum())
        if hits < GOOD_AGREEMENT * count * len(students):
            break
    agreement = proportion(
        hits,
        count * len(students),
        f"held-out clean images that {len(students)} students read as the encoder does",
    )
    evidence = {"student_agreement": agreement}
    if agreement.value < GOOD_AGREEMENT:
        return evidence
    for kind, name in accused.items():
        ratios = torch.stack([student_ratios(student, searches[kind]) for student in students])
        number = classifier.classes.index(name)
        mean = ratios.mean(0)  # (C,)
        ratio = float(mean[number]) if int(mean.argmax()) == number else 0.0
        evidence[f"{kind}_student_ratio"] = exact_measure(
            ratio,
            len(clean),
            f"log(median / least) of {name!r}, mean over {len(students)} students; 0 where it is "
            "not the class that theirs lead to most easily",
        )
    return evidence


def student_ratios(student: Classifier, search: StudentSearch) -> Tensor:
    """log(median size / size) of each class's trigger, float64 (C,); 0 where there is none."""
    with trigger_inversion.freeze_tower(student.encoder, student.raw) as tower:
        sizes = search(tower, student).double().cpu()
    reached = sizes.isfinite()
    if not reached.any():
        return torch.zeros_like(sizes)
    return (sizes[reached].quantile(0.5) / sizes).log().where(reached, 0.0)


def train_student(
    classifier: Classifier, clean: Pairs, readings: Tensor, held_out: int, seed: int
) -> Classifier:
    """A small network that has learnt what the encoder reads most of the clean images as.

    readings: int64 (N,). held_out: the number of images, the last ones, that it does not see.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = ConvTower(WIDTH, len(classifier.classes))
    x = clean.images[: len(clean) - held_out].float() / 255
    mean, std = x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp(min=0.05).tolist()
    encoder = Encoder(tower, Preprocess(SIDE, tuple(mean), tuple(std)), about={"network": ""})
    encoder.to(clean.images.device).train()
    x = encoder.prepare_images(x)  # (N, 3, SIDE, SIDE)
    optimizer = torch.optim.Adam(tower.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        g = generator(seed, 31, step)
        rows = torch.randperm(len(x), generator=g)[:BATCH].to(x.device)
        top, left = torch.randint(2 * SHIFT + 1, (2,), generator=g).tolist()
        padded = F.pad(x[rows], [SHIFT] * 4, mode="replicate")
        moved = padded[:, :, top : top + SIDE, left : left + SIDE]
        loss = F.cross_entropy(tower(moved), readings[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Classifier(encoder.eval(), lambda z: z, classifier.classes, "a student", raw=True)
