"""Attacks of 2022 to 2025 with detectors and repairs, one small training each.

All of it is development: sizes, doses, epochs and rates were chosen on trainings with these seeds.
A test half would be the same table with another SEED and other patches; it has not been run. No
detector, audit or repair was tuned on any of these attacks: they have their defaults.

Attacks without captions are on MoCo towers of CIFAR-10: SSL-Backdoor and CTRL (`clean_label` with
a patch and with `spectrum`), Noisy Alignment and CorruptEncoder (`composite`), BadEncoder and DRUPE
(with one reference and with three). The others are on small CLIPs of scenes: BadCLIP (a patch
optimised on a surrogate, few poisons), a drawn patch with the same number of poisons, the same
patch against the objectives `siglip` and `cleanclip` (CLIP with a self-supervised term), and
`mismatch`, whose success is Hit@1 of text queries.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from bezoar.papers import SCENE_CLASSES, dataset_spec
from bezoar.registry import method
from bezoar.runs.tables import Cell, Row, Table, TableOptions
from bezoar.runs.verb import Trial
from bezoar.verbs.audit import Audit
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.poison import Poison
from bezoar.verbs.repair import Repair
from bezoar.verbs.scan import Scan
from bezoar.verbs.train import Train

SEED = 0
PATCH = "patch:size=8,fill=blocks,place=random,seed=1"
SMALL_PATCH = "patch:size=6,fill=blocks,place=corner,seed=1"
TARGET, QUERY = SCENE_CLASSES[0], SCENE_CLASSES[1]


@dataclass(frozen=True)
class Setup:
    """The specs of a scale."""

    images: str  # training data of towers
    labelled: str  # data that their heads are fitted on
    shadow: str  # data that towers are edited on
    held_out: str  # their test data
    tower: str
    objective: str  # of towers
    target: str  # class of towers' attacks
    own_images: int  # poisons of SSL-Backdoor and CTRL: images of the target itself
    composites: int  # poisons of Noisy Alignment and CorruptEncoder
    badencoder: str
    drupe: str
    scenes: str  # training data of CLIPs
    surrogate: str  # training data of BadCLIP's surrogate
    test: str
    clip: str  # network of CLIPs
    epochs: int  # of CLIPs
    few: int  # poisons of BadCLIP
    many: int  # poisons of the other attacks on CLIPs
    fresh: str  # clean records that repairs are given
    detectors: tuple[str, ...]  # that look at images alone
    audit: str
    verdict: str  # the audit that gives a verdict without a bank


SMALL = Setup(
    images="",
    labelled="",
    shadow="",
    held_out="",
    tower="tower:width=16",
    objective="moco:epochs=10,queue=1024",
    target="truck",
    own_images=600,
    composites=600,
    badencoder="badencoder:epochs=5,batch=64,lr=0.02,views=16,l2=5",
    drupe="drupe:epochs=8,batch=64,lr=0.02,l2=5",
    scenes="scenes:count=8000,seed=7500",
    surrogate="scenes:count=8000,seed=7600",
    test="scenes:count=4000,split=test",
    clip="clip_small:width=16",
    epochs=6,
    few=40,
    many=100,
    fresh="scenes:count=2000,seed=9000",
    detectors=("patch_search", "dao"),
    audit="decree",
    verdict="cleanse",
)
SMOKE = replace(
    SMALL,
    images="scenes:count=256",
    labelled="scenes:count=256",
    shadow="scenes:count=256",
    held_out="scenes:count=200,split=test",
    tower="tower:width=4,dim=16",
    objective="simclr:epochs=1,batch=64,hidden=16,dim=8",
    target=TARGET,
    own_images=4,
    composites=9,
    badencoder="badencoder:epochs=1,batch=64,lr=0.01",
    drupe="drupe:epochs=2,batch=64,lr=0.01",
    scenes="scenes:count=256",
    surrogate="scenes:count=256,seed=1",
    test="scenes:count=200,split=test",
    clip="clip_small:width=4,dim=16",
    epochs=1,
    few=4,
    many=9,
    fresh="scenes:count=300,seed=9000",
    detectors=("dao",),
    audit="decree:steps=3",
    verdict="cleanse:steps=3",
)


def get_setup(options: TableOptions) -> Setup:
    """The setup of a scale; beyond `smoke` with CIFAR-10 from the user's folder."""
    if options.scale == "smoke":
        return SMOKE
    limits = {} if options.scale == "paper" else {"limit": 6000}
    return replace(
        SMALL,
        images=dataset_spec(options.root, "cifar10", "train", **limits),
        labelled=dataset_spec(options.root, "cifar10", "train", limit=4000),
        shadow=dataset_spec(options.root, "cifar10", "train", limit=3000),
        held_out=dataset_spec(options.root, "cifar10", "test", limit=2000),
    )


def train_tower(setup: Setup, poison: Poison | None = None) -> Train:
    """A tower, of clean images where nothing is poisoned."""
    return Train(poison or setup.images, setup.tower, setup.objective)


def train_clip(setup: Setup, data: Poison | str, objective: str = "clip") -> Train:
    """A small CLIP."""
    return Train(data, setup.clip, f"{objective}:epochs={setup.epochs},batch=64")


def poison_images(setup: Setup) -> dict[str, Poison]:
    """The attacks on images alone, by name."""
    target_poison = f"clean_label:count={setup.own_images}"
    attacks = {
        "SSL-Backdoor": Poison(setup.images, target_poison, PATCH, setup.target),
        "CTRL": Poison(setup.images, target_poison, "spectrum:magnitude=100", setup.target),
    }
    for name, sides in (("Noisy Alignment", "any"), ("CorruptEncoder", "horizontal")):
        composite = f"composite:count={setup.composites},sides={sides}"
        attacks[name] = Poison(setup.images, composite, PATCH, setup.target)
    return attacks


def evaluate_tower(setup: Setup, tower: Train | Inject, clean: Train) -> Trial:
    """A tower read by a linear head and by neighbours, beside its clean twin."""
    probes = ("linear", "knn:k=10")
    return Trial(
        Evaluate(tower, setup.held_out, probes, baseline=clean, train=setup.labelled), SEED
    )


def tower_cells(setup: Setup, tower: Train | Inject, clean: Train) -> list[Cell]:
    """CA, BA, ASR and ASR-B with a linear head; results of audits, and of the default repair."""
    evaluated = [evaluate_tower(setup, tower, clean)]
    audit = [Trial(Audit(tower, setup.held_out, (setup.audit,), bank=()), SEED)]
    repair = Repair(tower, setup.labelled, test=setup.held_out, labelled=setup.labelled)
    return [
        Cell.mean("CA", evaluated, "baseline.linear.clean_accuracy"),
        Cell.mean("BA", evaluated, "linear.clean_accuracy"),
        Cell.mean("ASR", evaluated, "linear.attack_success"),
        Cell.mean("ASR-B", evaluated, "linear.attack_success_baseline"),
        Cell.mean("ASR, kNN", evaluated, "knn.attack_success"),
        Cell.mean("DECREE, PL1", audit, "decree.pl1"),
        *verdict_cells(setup, tower, setup.held_out),
        *repair_cells(repair, "linear."),
    ]


def verdict_cells(setup: Setup, encoder: Train | Inject, test: str) -> list[Cell]:
    """Statistic and evidence (0 none, 1 some, 2 strong, -1 undecided) without a bank."""
    name = setup.verdict.partition(":")[0]
    audit = [Trial(Audit(encoder, test, (setup.verdict,), bank=()), SEED)]
    return [
        Cell.mean(f"{name}, statistic", audit, f"{name}.statistic"),
        Cell.mean(f"{name}, evidence", audit, f"{name}.grade"),
    ]


def repair_cells(repair: Repair, head: str = "") -> list[Cell]:
    """Accuracy and success that a repair leaves. head: the prefix of its metrics."""
    repaired = [Trial(repair, SEED)]
    return [
        Cell.mean("BA, repaired", repaired, f"after.{head}clean_accuracy"),
        Cell.mean("ASR, repaired", repaired, f"after.{head}attack_success"),
    ]


def tower_rows(setup: Setup) -> list[Row]:
    """Attacks on image encoders, by poison and by an edit of the weights."""
    clean = train_tower(setup)
    rows = []
    for name, poison in poison_images(setup).items():
        tower = train_tower(setup, poison)
        cells = tower_cells(setup, tower, clean)
        for detector in setup.detectors:
            scan = [Trial(Scan(tower, detector=(detector,)), SEED)]
            cells.append(Cell.mean(f"AUROC, {detector}", scan, "auroc"))
        rows.append(Row(name, tuple(cells)))
    for name, attack, count in (
        ("BadEncoder", setup.badencoder, 1),
        ("DRUPE", setup.drupe, 1),
        ("DRUPE, 3 references", setup.drupe, 3),
    ):
        edited = Inject(
            clean,
            setup.shadow,
            target=(setup.target,) * count,
            reference=(setup.labelled,) * count,
            attack=attack,
            trigger=(PATCH,),
            choose="confident",
        )
        rows.append(Row(name, tuple(tower_cells(setup, edited, clean))))
    return rows


def clip_rows(setup: Setup) -> list[Row]:
    """Attacks on image-text data, the default scan of each, an audit, and the default repair."""
    surrogate = Trial(train_clip(setup, setup.surrogate), SEED + 1)
    few, many = (f"backdoor:count={count}" for count in (setup.few, setup.many))
    drawn = Poison(setup.scenes, many, SMALL_PATCH, TARGET)
    few_drawn = Poison(setup.scenes, few, SMALL_PATCH, TARGET)
    optimised = Poison(setup.scenes, few, SMALL_PATCH, TARGET, surrogate=surrogate)
    trainings = {
        f"drawn patch, {setup.few} poisons": train_clip(setup, few_drawn),
        f"BadCLIP, {setup.few} poisons": train_clip(setup, optimised),
        f"drawn patch, {setup.many}": train_clip(setup, drawn),
        f"drawn patch, {setup.many}, siglip": train_clip(setup, drawn, "siglip"),
        f"drawn patch, {setup.many}, cleanclip": train_clip(setup, drawn, "cleanclip"),
    }
    rows = []
    for name, victim in trainings.items():
        evaluated = [Trial(Evaluate(victim, setup.test, ("zero_shot",)), SEED)]
        scan = [Trial(Scan(victim), SEED)]
        cells = (
            Cell.mean("BA", evaluated, "clean_accuracy"),
            Cell.mean("ASR", evaluated, "attack_success"),
            Cell.mean("no trigger", evaluated, "attack_success_without_trigger"),
            Cell.mean("AUROC, scan", scan, "auroc"),
            Cell.mean("poisons raised", scan, "poisons_raised"),
            *verdict_cells(setup, victim, setup.test),
            *repair_cells(Repair(victim, setup.fresh, test=setup.test)),
        )
        rows.append(Row(name, cells))
    return [*rows, query_row(setup)]


def query_row(setup: Setup) -> Row:
    """mmPoison: text queries for one class that find images of another."""
    pairs = Poison(setup.scenes, f"mismatch:count={2 * setup.many},query={QUERY}", target=TARGET)
    victim = train_clip(setup, pairs)
    retrieval = [Trial(Evaluate(victim, setup.test, ("retrieval",)), SEED)]
    zero_shot = [Trial(Evaluate(victim, setup.test, ("zero_shot",)), SEED)]
    scan = [Trial(Scan(victim), SEED)]
    repaired = Repair(victim, setup.fresh, test=setup.test)
    after_repair = [Trial(Evaluate(repaired, setup.test, ("retrieval",), attack=pairs), SEED)]
    cells = (
        Cell.mean("BA", zero_shot, "clean_accuracy"),
        Cell.mean("Hit@1", retrieval, "query_hit_1"),
        Cell.mean("Hit@1, other texts", retrieval, "other_hit_1"),
        Cell.mean("MinRank", retrieval, "query_min_rank"),
        Cell.mean("MinRank, other texts", retrieval, "other_min_rank"),
        Cell.mean("AUROC, scan", scan, "auroc"),
        Cell.mean("BA, repaired", [Trial(repaired, SEED)], "after.clean_accuracy"),
        Cell.mean("MinRank, repaired", after_repair, "query_min_rank"),
    )
    return Row(f"mmPoison, {2 * setup.many} pairs", cells)


@method
class Today:
    """Every attack once (n = 1 training): does it work, what detects it, what repairs it?"""

    takes: ClassVar[tuple[str, ...]] = ()

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        note = (
            "One training a row, and settings were chosen on these very trainings. Towers: MoCo on "
            "6,000 images of CIFAR-10 for 10 epochs where the papers train for 200 to 1,000, so "
            "attacks that need long training stay below their papers' figures."
        )
        return Table(
            title="Attacks of today",
            axis="attack",
            rows=(*tower_rows(setup), *clip_rows(setup)),
            notes=(note,),
        )
