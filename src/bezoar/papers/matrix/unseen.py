"""The default scan on kinds of trigger in two halves, development and test.

The kinds were divided before the detector `common_cause` was written. Its first version was run
once on the test half. Its second version was developed on the development half, on scenes of other
seeds, and on the first set of the test half, so only the other sets of that half are a test.

On photographs (Flickr8k) the same test half is one set. The parts for photographs were developed on
kinds of the development half (Flickr8k: filter, blur, sticker, patch; aerial images: filter, JPEG,
sticker, line), on both without poisons, and, after a first version had been run once on the test
set, on the first training of that set (tint to triangles). Only its second training is a test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from bezoar.data.scene_drawing import CLASSES
from bezoar.papers import FIXED_PLACES
from bezoar.papers.matrix import FLICKR8K, SMALL, Setup, corpus_specs, get_setup
from bezoar.registry import method
from bezoar.runs.tables import Cell, Reading, Row, Table, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.poison import Poison
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

SETS = 3  # of each kind
FIRST_SEED = 7100  # of the sets; no other table uses these
KINDS_OF_A_TRAINING = 5  # backdoors in one training, each with a different target
POISONS = 400  # of one kind
COLUMNS = {
    "AUROC": "auroc",
    "recall, worst 1.5 n": "recall_at_1.5n",
    "raised": "poisons_raised",
}

Drawn = Callable[[np.random.Generator], str]


@dataclass(frozen=True)
class Kind:
    """A kind of trigger. draw: a spec with sizes, places and strengths from a generator."""

    name: str
    draw: Drawn


def draw_colour(random: np.random.Generator) -> str:
    """A saturated colour, as `(R,G,B)`."""
    levels = random.permutation([255, int(random.integers(0, 256)), 0])
    return "({})".format(",".join(str(level) for level in levels))


def draw_patch(random: np.random.Generator) -> str:
    """A square of coloured blocks, 3 to 7 pixels wide, in a corner."""
    size, place = random.integers(3, 8), random.choice(FIXED_PLACES)
    return f"patch:size={size},fill=blocks,cell=1,place={place},seed={random.integers(1000)}"


def draw_shape(form: str) -> Drawn:
    """Transparent stripes or triangles (Schlarmann et al. 2025)."""

    def draw(random: np.random.Generator) -> str:
        alpha, seed = random.uniform(0.3, 0.5), random.integers(1000)
        return f"shape:form={form},count={random.integers(4, 9)},alpha={alpha:.2f},seed={seed}"

    return draw


def draw_several(random: np.random.Generator) -> str:
    """Two of a corner patch, a line and a colour cast."""
    parts = (
        draw_patch(random),
        f"line:colour={draw_colour(random)},seed={random.integers(1000)}",
        f"tint:colour={draw_colour(random)},strength={random.uniform(0.15, 0.25):.2f}",
    )
    first, second = random.permutation(len(parts))[:2]
    return f"several:triggers=({parts[first]} + {parts[second]})"


PHOTOGRAPHS_SEED = 7600  # of the first training on photographs; the one without an attack: 7550
PHOTOGRAPH_POISONS = 400  # of one kind
PHOTOGRAPH_TARGETS = (
    *("snow", "beach", "bicycle", "skateboard", "pool"),
    *("soccer", "mountain", "camera", "baby", "climbing"),
)

DEVELOPMENT = (
    Kind("patch", draw_patch),
    Kind(
        "blend",
        lambda r: f"blend:alpha={r.uniform(0.15, 0.35):.2f},pattern=noise,seed={r.integers(1000)}",
    ),
    Kind(
        "sinusoid",
        lambda r: f"sinusoid:delta={r.integers(15, 31)},frequency={r.integers(3, 9)}",
    ),
    Kind("warp", lambda r: f"warp:k=32,strength={r.uniform(1.5, 2.5):.2f},seed={r.integers(1000)}"),
    Kind("filter", lambda r: f"filter:preset={r.choice(['nashville', 'kelvin', 'lomo', 'faded'])}"),
    Kind("blur", lambda r: f"blur:sigma={r.uniform(1.0, 1.8):.2f}"),
    Kind("JPEG", lambda r: f"jpeg:quality={r.integers(3, 9)}"),
    Kind(
        "gradient",
        lambda r: f"gradient:strength={r.integers(60, 100)},direction={r.integers(0, 360)}",
    ),
    Kind(
        "sticker",
        lambda r: (
            f"sticker:size={r.uniform(0.25, 0.4):.2f},alpha={r.uniform(0.6, 1):.2f},"
            f"seed={r.integers(1000)}"
        ),
    ),
    Kind(
        "line",
        lambda r: (
            f"line:colour={draw_colour(r)},angle=({r.choice([0, 45, 90])},),seed={r.integers(1000)}"
        ),
    ),
    Kind("ring", lambda r: f"ring:form={r.choice(['frame', 'circle'])},width={r.integers(1, 3)}"),
)
TEST = (
    Kind("tint", lambda r: f"tint:colour={draw_colour(r)},strength={r.uniform(0.2, 0.4):.2f}"),
    Kind("resampling", lambda r: f"resample:factor={r.uniform(1.6, 2.6):.2f}"),
    Kind("mosaic", lambda r: f"resample:factor={r.uniform(2, 3):.2f},down=box,up=nearest"),
    Kind("stripes", draw_shape("stripes")),
    Kind("triangles", draw_shape("triangles")),
    Kind(
        "text",
        lambda r: (
            f"text:word={r.choice(['sale', 'new', 'ok', 'free'])},size={r.uniform(0.25, 0.4):.2f},"
            f"place={r.choice(['random', '1/.5', '0/0'])},seed={r.integers(1000)}"
        ),
    ),
    Kind("spectrum", lambda r: f"spectrum:magnitude={r.integers(100, 300)}"),
    Kind("several", draw_several),
    Kind("noise", lambda r: f"noise:strength={r.integers(18, 31)},seed={r.integers(1000)}"),
)


@dataclass(frozen=True)
class Ground:
    """The data of trainings, and how an encoder is trained and measured.

    clean: spec of the data with a seed. targets: words to draw targets from. poisons: of one kind.
    test: spec of the test data. probe: measures success.
    """

    clean: Callable[[int], str]
    targets: tuple[str, ...]
    poisons: int
    network: str
    objective: str
    test: str
    probe: str

    def clean_clip(self, seed: int) -> Trial:
        """A CLIP trained on clean data."""
        return Trial(Train(self.clean(seed), self.network, self.objective), seed)


@dataclass(frozen=True)
class PoisonedTraining:
    """An encoder trained on data with several backdoors. kinds: those of the backdoors."""

    encoder: Trial
    kinds: tuple[Kind, ...]


def scenes_ground(setup: Setup) -> Ground:
    """Scenes as a scale has them."""
    poisons = max(8, round(POISONS / SMALL.records * setup.records))
    return Ground(
        setup.clean_data,
        CLASSES,
        poisons,
        setup.network,
        setup.objective,
        setup.test,
        "zero_shot",
    )


def photographs_ground(options: TableOptions) -> Ground:
    """Flickr8k; at scale `smoke`, scenes instead."""
    setup = get_setup(options)
    if options.scale == "smoke":
        return scenes_ground(setup)
    train, test = corpus_specs(options, FLICKR8K)
    return Ground(
        lambda _: train,
        PHOTOGRAPH_TARGETS,
        PHOTOGRAPH_POISONS,
        setup.network,
        FLICKR8K.objective,
        test,
        "retrieval",
    )


def poison_trainings(
    ground: Ground, kinds: Sequence[Kind], first_seed: int
) -> list[PoisonedTraining]:
    """The trainings of one set of every kind, with at most KINDS_OF_A_TRAINING backdoors each.

    Args:
        ground: what is poisoned.
        first_seed: of the first training, its data, triggers and targets; then one more for each.
    """
    count = -(-len(kinds) // KINDS_OF_A_TRAINING)
    trainings = []
    for number, rows in enumerate(np.array_split(np.arange(len(kinds)), count)):
        seed = first_seed + number
        random = np.random.default_rng(seed)
        targets = random.choice(ground.targets, len(rows), replace=False)
        data: Any = ground.clean(seed)
        for row, target in zip(rows, targets, strict=True):
            trigger = kinds[row].draw(random)
            data = Poison(data, f"backdoor:count={ground.poisons}", trigger, str(target))
        encoder = Trial(Train(data, ground.network, ground.objective), seed)
        trainings.append(PoisonedTraining(encoder, tuple(kinds[row] for row in rows)))
    return trainings


@method
class Unseen:
    """Kinds of trigger by half; the last row of a half counts the kinds that were detected."""

    reference: Annotated[str, "encoder that never saw the data, for the scan of photographs"] = ""

    def __call__(self, options: TableOptions) -> Table:
        smoke = options.scale == "smoke"
        sets = 1 if smoke else SETS
        halves = {"development": DEVELOPMENT, "test": TEST}
        if smoke:
            halves = {"development": DEVELOPMENT[:2], "test": TEST[:1]}
        scenes = scenes_ground(get_setup(options))
        rows = []
        for number, (half, kinds) in enumerate(halves.items()):
            trainings = [
                training
                for i in range(sets)
                for training in poison_trainings(scenes, kinds, FIRST_SEED + 100 * number + 10 * i)
            ]
            rows += [half_row(kind, half, scenes, trainings) for kind in kinds]
        rows.append(
            clean_row("no attack", [scenes.clean_clip(FIRST_SEED + i) for i in range(sets)])
        )
        photographs = photographs_ground(options)
        trainings = poison_trainings(photographs, halves["test"], PHOTOGRAPHS_SEED)
        rows += [
            half_row(kind, "photographs", photographs, trainings, self.reference)
            for kind in halves["test"]
        ]
        clean = [photographs.clean_clip(PHOTOGRAPHS_SEED - 50)]
        rows.append(clean_row("no attack (photographs)", clean, self.reference))
        note = (
            f"Each kind: {sets} sets of scenes, with sizes, places, strengths and targets of their "
            f"own, {POISONS} poisons of {get_setup(options).records}; a training holds up to "
            f"{KINDS_OF_A_TRAINING} kinds. The kinds of the test half poison Flickr8k once, "
            f"{PHOTOGRAPH_POISONS} poisons of 30,000 each. Scanned by the default detectors with "
            "the encoder trained on the set, photographs "
            f"{'with' if self.reference else 'without'} a reference encoder; all figures are of "
            "all detectors together, of one kind against the clean records."
        )
        return Table(
            title="Kinds of trigger in two halves",
            axis="trigger",
            rows=tuple(rows),
            notes=(note,),
        )


def clean_row(name: str, encoders: Sequence[Trial], reference: str = "") -> Row:
    """The share of clean records that is raised, by encoders trained on them."""
    scans = [Trial(Scan(e.verb, reference=reference), e.seed) for e in encoders]
    cells = (
        Cell.mean("false alarms", scans, "common_cause.raised"),
        Cell.mean("false alarms, transplant", scans, "transplant.raised"),
    )
    return Row(name, cells)


def half_row(
    kind: Kind,
    half: str,
    ground: Ground,
    trainings: Sequence[PoisonedTraining],
    reference: str = "",
) -> Row:
    """The row of a kind: means over the trainings that hold it."""
    readings: dict[str, list[Reading]] = {name: [] for name in ("ASR", *COLUMNS)}
    for training in trainings:
        if kind not in training.kinds:
            continue
        several = len(training.kinds) > 1
        suffix = f"@{training.kinds.index(kind)}" if several else ""
        encoder = training.encoder
        success = Trial(Evaluate(encoder.verb, ground.test, (ground.probe,)), encoder.seed)
        readings["ASR"].append((success, f"attack_success{suffix}"))
        scan = Trial(Scan(encoder.verb, reference=reference), encoder.seed)
        for name, metric in COLUMNS.items():
            readings[name].append((scan, metric + suffix))
    cells = tuple(Cell(name, tuple(of_cell)) for name, of_cell in readings.items())
    return Row(f"{kind.name} ({half})", cells, curve=half)
