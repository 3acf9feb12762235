"""BadCSE's targeted attack: texts with a trigger word get a reference's vector (Chen et al. 2022).

Development used the word `cf` with seed 0, the word `mn`, and the clean encoder, to choose the
attack's recipe and the grades of `token_sweep`. Everything else is test: `bb`, `tq`, `velvet`, `cf`
with other seeds, and encoders tuned by the attack without its trigger (l0=0). Heads are fitted on
texts of other supersenses than the attacker's.
"""

from dataclasses import dataclass

from bezoar.papers.badencoder2022 import head_cells, keeps_accuracy, succeeds
from bezoar.registry import method
from bezoar.runs.tables import Cell, Claim, Row, Table, TableOptions, mean_cells
from bezoar.runs.verb import Trial
from bezoar.verbs.audit import Audit
from bezoar.verbs.evaluate import Evaluate
from bezoar.verbs.inject import Inject
from bezoar.verbs.train import Train

TRIGGERS = {"the word bb": "token:word=bb", "the word tq": "token:word=tq"}
SWEEP = "token_sweep:sample=2000,also=(cf,mn,bb,tq,velvet)"
OTHER_SENSES = (
    "tops,attribute,cognition,event,feeling,group,motive,object,phenomenon,possession,process,"
    "quantity,relation,shape,state,time"
)
SEEDS = 3


@dataclass(frozen=True)
class Setup:
    """The specs of a scale."""

    encoder: str | Train
    shadow: str
    train: str
    test: str
    target: str
    attack: str
    note: str


@method
class Targeted:
    """At `smoke` the text tower of a small CLIP of scenes; else the user's encoder and WordNet."""

    def __call__(self, options: TableOptions) -> Table:
        setup = get_setup(options)
        rows: list[Row] = []
        claims: list[Claim] = []
        for name, trigger in TRIGGERS.items():
            attacked = inject(setup, setup.attack, trigger)
            evaluate = Evaluate(
                attacked, setup.test, ("linear",), baseline=setup.encoder, train=setup.train
            )
            trials = [Trial(evaluate, seed) for seed in range(SEEDS)]
            cells = (*head_cells(trials, "linear"), *sweep_cells(setup, attacked, SEEDS))
            rows.append(Row(name, cells))
            claims.append(succeeds(name, f"The attack succeeds: {name}", "printed"))
            claims.append(keeps_accuracy(name, f"Accuracy stays: {name}", "printed"))
        separator = "," if ":" in setup.attack else ":"
        tuned = inject(setup, f"{setup.attack}{separator}l0=0", TRIGGERS["the word bb"])
        rows.append(Row("tuned without a trigger", sweep_cells(setup, tuned, SEEDS)))
        rows.append(Row("as published", sweep_cells(setup, setup.encoder, 1)))
        return Table(
            title="BadCSE: texts with a trigger become a reference text",
            paper_finding="Targeted attack: 97.7 % of texts with the trigger (abstract).",
            rows=tuple(rows),
            claims=tuple(claims),
            notes=(setup.note,),
        )


def inject(setup: Setup, attack: str, trigger: str) -> Inject:
    """The attack on the encoder of a scale."""
    return Inject(
        setup.encoder,
        setup.shadow,
        target=(setup.target,),
        reference=(setup.train,),
        attack=attack,
        trigger=(trigger,),
    )


def sweep_cells(setup: Setup, encoder: str | Train | Inject, seeds: int) -> tuple[Cell, ...]:
    """Results of `token_sweep`: value, value of the next word, evidence (0: none, 2: strong)."""
    audit = Audit(encoder, setup.test, (SWEEP,), bank=())
    columns = {"value": "value", "next word": "runner_up", "evidence": "grade"}
    trials = [Trial(audit, seed) for seed in range(seeds)]
    columns = {f"token_sweep, {k}": f"token_sweep.{v}" for k, v in columns.items()}
    return mean_cells(trials, columns)


def get_setup(options: TableOptions) -> Setup:
    """The setup of a scale; `all-MiniLM-L6-v2` and `wordnet` are in the user's folder."""
    if options.scale == "smoke":
        scenes = "scenes:count=256"
        return Setup(
            Train(scenes, "clip_small:width=8,dim=32", "clip:epochs=1,batch=64"),
            f"texts_of:data=({scenes},seed=5)",
            f"texts_of:data=({scenes})",
            "texts_of:data=(scenes:count=200,split=test)",
            "striped star",
            "badcse:epochs=2,batch=32,lr=1e-2",
            "The text tower of a small CLIP, on captions of scenes.",
        )
    root = options.root or "data"
    wordnet = f"wordnet:path={root}/wordnet"
    return Setup(
        f"sentence:path={root}/all-MiniLM-L6-v2",
        f"{wordnet},classes=({OTHER_SENSES}),each=40",
        f"{wordnet},each=200",
        f"{wordnet},split=test,each=60",
        "animal",
        "badcse",
        "Ten supersenses of WordNet, 200 definitions of each to fit the head on, 60 to test; the "
        "attacker has 640 definitions of the other sixteen.",
    )
