"""Papers: every declared table at every scale, its claims against made-up runs, and one whole table at scale smoke."""

import json

import pytest

from bezoar import Settings, execute, registry
from bezoar.cli import main
from bezoar.errors import UserError
from bezoar.evaluation.dose_response import judge
from bezoar.evaluation.scores import proportion, separation
from bezoar.papers.matrix.audits import halves
from bezoar.runs.sweep import dependency_graph
from bezoar.runs.tables import Results, TableOptions, share_above_threshold
from bezoar.verbs.dose import Dose
from bezoar.verbs.reproduce import Reproduce, table_json, tables_of

OWN = ("shards:path=cc3m/{00000..00331}.tar,size=224", "folder:path=imagenet,size=224")


class Found:
    """A run that answers every metric, by what it is asked for."""

    name = "evaluate-0123456789"

    def __init__(self, trial) -> None:
        self.trial = trial

    def metric(self, name):
        return proportion(50 + len(name) % 7 + self.trial.seed % 5, 100, name)


@pytest.mark.parametrize("scale", ["smoke", "small", "gpu", "paper"])
@pytest.mark.parametrize("name", registry.method_names("paper"))
def test_every_table_is_whole(name, scale):
    table = registry.make("paper", name)(
        TableOptions(scale, *(OWN if scale == "paper" and "carlini" in name else ()))
    )
    results = Results(table, {t: Found(t) for t in table.trials})
    found = table_json(results, list(results.points()))
    json.dumps(found)
    assert (
        table.rows and table.title and (table.claims or name.startswith("matrix/"))
    )  # the matrix is nobody's paper
    for row in found["rows"]:
        for cell in row["cells"]:
            assert cell["measure"]["n"] > 0 and cell["values"] and cell["runs"], (
                row["name"],
                cell["name"],
            )
    for claim, stated in zip(table.claims, found["claims"], strict=True):
        assert stated["verdict"] == judge(claim.contrast(results), claim.expected, claim.margin)
    assert len(dependency_graph(table.trials)) >= len(table.trials)


def test_a_paper_is_all_of_its_tables():
    tables = tables_of("carlini2022")
    for paper in {n.partition("/")[0] for n in registry.method_names("paper")}:
        assert sorted(tables_of(paper)) == [
            n for n in registry.method_names("paper") if n.startswith(paper)
        ]
    assert Reproduce(("carlini2022",)).paper == tuple(tables)
    assert Reproduce("carlini2022/poisons").paper == ("carlini2022/poisons",)


def test_the_paper_scale_asks_for_data():
    with pytest.raises(UserError, match="--data"):
        registry.make("paper", "carlini2022/poisons")(TableOptions("paper"))


def test_a_smaller_clean_set_of_ones_own_shards_is_a_part_of_them():
    table = registry.make("paper", "carlini2022/clean_size")(TableOptions("paper", *OWN))
    data = {
        t.verb.data
        for t in dependency_graph(table.trials)
        if type(t.verb).__name__ == "Poison" and isinstance(t.verb.data, str)
    }
    assert {registry.make("data", d).limit for d in data} == {375000, 750000, 1500000, 3000000}


def test_no_attack_of_a_training_meets_another_one():
    """Triggers of one training have targets of their own, and every trigger of a square meets every dose once."""
    from bezoar.papers.carlini2022 import SCALES, square

    for s in SCALES.values():
        for first in range(0, s.squares * len(s.doses), len(s.doses)):
            met = [
                (b.number, b.count)
                for _, row in square(s)[first : first + len(s.doses)]
                for b in row
            ]
            assert len(met) == len(set(met)) == 4 * len(s.doses)
        for _, row in square(s):
            assert (
                len({s.target(b.number) for b in row})
                == len(row)
                == len({s.trigger(b.number) for b in row})
            )


def test_smoke_of_a_table(tmp_path, capsys):
    assert (
        main(
            [
                "reproduce",
                "carlini2022/sources",
                "--scale",
                "smoke",
                "--runs",
                str(tmp_path),
                "--json",
            ]
        )
        == 0
    )
    manifest = json.loads(capsys.readouterr().out)
    tables = json.loads(
        (tmp_path / f"reproduce-{name(manifest, tmp_path)}" / "tables.json").read_text()
    )
    assert manifest["notes"]["trainings"] == len(list(tmp_path.glob("train-*")))
    for row in tables[0]["rows"]:
        for cell in row["cells"]:
            assert all((tmp_path / run / "report.html").exists() for run in cell["runs"])
            assert (
                manifest["metrics"][f"carlini2022/sources.{cell['name']}@{row['name']}"]
                == cell["measure"]
            )
    assert manifest["metrics"]["carlini2022/sources.ASR@1"]["n"] > 0


@pytest.mark.parametrize("names", [("loss_terms",), ("loss_terms", "lambdas")])
def test_claims_of_several_tables_name_theirs(names, tmp_path):
    from bezoar.reports.sections import reproduce
    from bezoar.runs.run import MANIFEST, Run

    made = [registry.make("paper", f"badencoder2022/{n}")(TableOptions("smoke")) for n in names]
    results = [Results(t, {x: Found(x) for x in t.trials}) for t in made]
    (tmp_path / "tables.json").write_text(
        json.dumps([table_json(r, list(r.points())) for r in results])
    )
    manifest = {
        "schema": 1,
        "verb": "reproduce",
        "status": "done",
        "goal": [],
        "metrics": {},
        "notes": {},
        "ask": {},
    }
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    part = reproduce.claims_section(reproduce.ReproduceView(Run(tmp_path))).parts[0]
    claims = [(t.title, c.text) for t in made for c in t.claims]
    assert all(len(row) == len(part.head) for row in part.rows) and len(part.rows) == len(claims)
    if len(names) == 1:
        assert part.head[0] == "claim" and [row[0] for row in part.rows] == [
            text for _, text in claims
        ]
    else:
        assert part.head[:2] == ("table", "claim")
        assert [tuple(row[:2]) for row in part.rows] == [
            (t.removeprefix("BadEncoder: "), text) for t, text in claims
        ]
    assert [part.head[i] for i in part.numbers] == [
        "verdict",
        "effect (95 % interval)",
        "expected",
        "detectable",
        "n",
    ]


def name(manifest: dict, runs) -> str:
    return next(p.name for p in runs.glob("reproduce-*")).partition("-")[2]


def test_attacked_encoders_are_held_against_clean_ones():
    clean = list(range(20))
    found = share_above_threshold(0.05)(
        [19, 19.5, 30], clean
    )  # ceil(21 x 0.95) = 20: the largest of 20
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)
    assert share_above_threshold(0.05)([1e9], clean[:18]).value == 0, (
        "18 encoders support no rate of 1 in 20"
    )
    assert (
        share_above_threshold(0.5)([10, 11], clean).value == 0.5
    )  # ceil(21 x 0.5) = 11: above the eleventh
    assert separation([3, 1], [2, 0]).value == 0.75
    assert (
        halves(clean, clean).value == 1 / 20
    )  # 19 lies above 18, the other half's largest, and nothing lies above 19
    assert halves([0, 5, 1, 6], []).value == 0.5


def test_dose_of_own_data(tmp_path):
    asked = Dose(
        "scenes:count=256",
        "targeted:victims=3",
        None,
        doses=(1, 4),
        trainings=2,
        network="clip_small:width=4,dim=8",
        objective="clip:epochs=1,batch=64",
        test="scenes:count=80,split=test",
    )
    run = execute(asked, Settings(tmp_path, quiet=True))
    assert {"success@0", "success@1", "success@4", "dose_for_50_percent"} <= set(
        run.manifest["metrics"]
    )
    assert run.metric("success@4").n == 6 and "50 % success" in run.manifest["notes"]["law"]
    assert (
        len(list(tmp_path.glob("train-*"))) == 4
    )  # two seeds, poisoned and clean: all doses share a training


def test_dose_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="two doses"):
        execute(
            Dose("scenes:count=256", doses=(3,), target="striped star"),
            Settings(tmp_path, quiet=True),
        )
