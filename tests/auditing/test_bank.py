"""Banks against closed forms, simulations and slow plain versions; hostile files; the words of a
verdict.
"""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.auditing import bank, sarif, verdict_text
from bezoar.auditing.bank import (
    Bank,
    Calibration,
    Entry,
    Family,
    Sample,
    adjust_p_values,
    judge_value,
)
from bezoar.auditing.source_hash import hash_sources, imported_names, parse_without_docstrings
from bezoar.errors import UserError
from bezoar.evaluation import stats

FAMILY = Family("clip_small:width=32", 32, "scenes:count=20000", "clip:epochs=6")
SAMPLE = Sample("scenes:count=2000,split=test", 512)
VALUES = st.lists(st.integers(0, 12).map(float), min_size=1, max_size=60)
RATES = st.sampled_from([0.01, 0.05, 0.1, 0.2, 1 / 3, 0.5])


def entries(values, attack=""):
    return tuple(Entry(f"e{attack}{i}", float(v), attack) for i, v in enumerate(values))


def calibrate(clean, attacked=(), audit="stub:k=1", code="c0de"):
    return Calibration(audit, code, "", entries(clean), tuple(attacked))


@given(VALUES, RATES, st.integers(-1, 13).map(float))
def test_a_value_is_evidence_exactly_where_its_p_value_is_at_most_the_rate(values, rate, value):
    calibration, n = calibrate(values), len(values)
    threshold = calibration.threshold(rate)
    enough = n >= 1 / rate - 1 - 1e-9
    assert (threshold is not None) == enough and calibration.smallest_rate == 1 / (n + 1)
    p = (1 + sum(v >= value for v in values)) / (n + 1)
    assert calibration.p_value(value) == p
    assert (threshold is not None and value > threshold) == (p <= rate + 1e-12)
    if threshold is not None:
        share = sum(v <= threshold for v in values) / (n + 1)
        assert share >= 1 - rate - 1e-9, (
            "the smallest clean value that leaves at most this rate above it"
        )
        below = [v for v in values if v < threshold]
        assert len(below) / (n + 1) < 1 - rate + 1e-9


def test_the_rate_is_not_lost_to_rounding():
    assert (
        calibrate(range(19)).threshold(0.05) == 18
    )  # (19 + 1) (1 - 0.05) is 19.000000000000004 in floats
    assert calibrate(range(18)).threshold(0.05) is None
    assert calibrate(range(39)).threshold(0.05) == 37
    with pytest.raises(UserError, match="rate"):
        calibrate([1.0]).threshold(1.0)


def test_false_positives_of_a_threshold_have_the_law_of_an_order_statistic():
    m = calibrate(range(20)).false_positive_rate(0.05)
    assert (
        m.value == pytest.approx(1 / 21) and m.n == 20
    )  # Beta(1, 20): its quantiles are 1 - (1 - q)^(1/20)
    assert m.low == pytest.approx(1 - 0.975 ** (1 / 20)) and m.high == pytest.approx(
        1 - 0.025 ** (1 / 20)
    )
    assert calibrate(range(5)).false_positive_rate(0.05) is None
    rng = np.random.default_rng(0)
    for n, rate in ((20, 0.05), (59, 0.1)):
        m, k = calibrate(range(n)).false_positive_rate(rate), calibrate(range(n)).rank(rate)
        own = (
            1 - np.sort(rng.random((20_000, n)), axis=1)[:, k - 1]
        )  # of uniform values the rate is read off
        assert own.mean() == pytest.approx(m.value, abs=0.002)
        assert np.quantile(own, [0.025, 0.975]) == pytest.approx([m.low, m.high], abs=0.004)
        assert own.mean() <= rate


def test_sensitivity_is_a_share_with_wilsons_interval_of_attacks_that_worked():
    bad = (*entries([25.0, 5.0, 30.0], "backdoor patch"), *entries([40.0], "badencoder patch"))
    failed = dataclasses.replace(bad[1], name="failed", success=0.1)
    calibration = calibrate(range(20), (*bad, failed))
    sensitivity = calibration.sensitivity(0.05)
    assert set(sensitivity) == {"", "backdoor patch", "badencoder patch"}
    assert (sensitivity[""].value, sensitivity[""].n) == (0.75, 4) and sensitivity[
        "backdoor patch"
    ].value == pytest.approx(2 / 3)
    assert (sensitivity[""].low, sensitivity[""].high) == stats.wilson_interval(3, 4)
    assert calibration.sensitivity(0.01) == {} and calibrate(range(20)).sensitivity(0.05) == {}
    m = bank.measure_auroc(calibration)
    assert m.value == stats.auroc([25, 5, 30, 40, *range(20)], [True] * 4 + [False] * 20)
    assert bank.measure_auroc(calibrate([1.0])) is None


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8), st.floats(0.01, 0.5))
def test_holm_rejects_where_the_step_down_does(p, rate):
    adjusted = adjust_p_values(p)
    rejected, order = set(), sorted(range(len(p)), key=lambda i: p[i])
    for place, i in enumerate(order):
        if p[i] > rate / (len(p) - place):
            break
        rejected.add(i)
    for i, value in enumerate(adjusted):
        if abs(value - rate) > 1e-9:
            assert (value <= rate) == (i in rejected)
        assert p[i] <= value <= 1


def test_only_encoders_of_one_family_fit():
    small_bank = Bank(FAMILY, SAMPLE, (calibrate(range(20)),))
    assert small_bank.differences(FAMILY, SAMPLE) == []
    other = {"network": "resnet:depth=18", "size": 64, "data": "cifar10", "objective": "simclr"}
    for field, value in other.items():
        differences = small_bank.differences(dataclasses.replace(FAMILY, **{field: value}), SAMPLE)
        name, other_name = (str(v).partition(":")[0] for v in (value, getattr(FAMILY, field)))
        assert differences == [f"{field} {name}, not {other_name}"]
    assert small_bank.differences(dataclasses.replace(FAMILY, network=""), SAMPLE), (
        "what network it is must be known"
    )
    assert "clean images" in small_bank.differences(FAMILY, Sample("other", 512))[0]
    assert "64 clean images" in small_bank.differences(FAMILY, Sample(SAMPLE.data, 64))[0]
    unknown = dataclasses.replace(FAMILY, data="", objective="")
    assert (
        small_bank.differences(unknown, SAMPLE) == []
        and len(small_bank.assumptions(unknown)) == 2
        and small_bank.assumptions(FAMILY) == []
    )


def judge(banks, value=0.0, rate=0.05, family=FAMILY, sample=SAMPLE, audited=None, name=""):
    return judge_value(banks, family, sample, audited or calibrate(()), value, rate, name)


def test_what_banks_say_of_a_value():
    bad = entries([25.0, 5.0], "backdoor patch")
    small_bank = Bank(FAMILY, SAMPLE, (calibrate(range(20), bad),))
    high, low = judge([small_bank], 25.0), judge([small_bank], 3.0)
    assert (
        high.outcome == "evidence"
        and high.p_value == pytest.approx(1 / 21)
        and high.threshold == 19
    )
    assert "false-positive rate 0.05" in high.sentence() and "20 clean encoders" in high.sentence()
    assert (
        low.outcome == "no evidence"
        and "sensitivity 0.50" in low.sentence()
        and "backdoor patch" in low.sentence()
    )
    alone = judge([Bank(FAMILY, SAMPLE, (calibrate(range(20)),))], 3.0)
    assert "sensitivity is not known" in alone.sentence()
    uncalibrated = {
        "no bank": judge([]),
        "network": judge([small_bank], family=dataclasses.replace(FAMILY, network="tower")),
        "version": judge([small_bank], audited=calibrate((), code="other")),
        "another classifier": judge(
            [small_bank], audited=dataclasses.replace(calibrate(()), classifier="linear")
        ),
        "not audited so": judge([small_bank], audited=calibrate((), audit="other")),
        "0.01 takes 99": judge([small_bank], 25.0, 0.01),
    }
    for words, verdict in uncalibrated.items():
        assert verdict.outcome == "no calibration" and words in verdict.sentence()
    for verdict in (high, low, alone, *uncalibrated.values()):
        assert "is clean" not in verdict.sentence() and "\n" not in verdict.sentence()


def test_banks_of_several_kinds_are_not_thrown_together():
    one = Bank(FAMILY, SAMPLE, (calibrate(range(20)),))
    other = Bank(dataclasses.replace(FAMILY, data="photos"), SAMPLE, (calibrate(range(100, 120)),))
    unknown = dataclasses.replace(FAMILY, data="")
    assert judge([one], 25.0, family=unknown).outcome == "evidence"
    both = judge([one, other], 25.0, family=unknown)
    assert (
        both.outcome == "no calibration"
        and "photos" in both.sentence()
        and FAMILY.data in both.sentence()
    )
    assert (
        judge([one, other], 25.0).outcome == "evidence"
    )  # what it was trained on is known, and one bank is of that kind


def test_an_encoder_sets_no_threshold_for_itself_and_counts_once():
    small_bank = Bank(FAMILY, SAMPLE, (calibrate(range(20)),))
    twice = judge([small_bank, small_bank], 30.0)
    assert len(twice.calibration.clean) == 20
    itself = judge([small_bank], 19.0, 0.05, name="e19")
    assert len(itself.calibration.clean) == 19 and itself.outcome == "evidence"


def test_a_bank_is_written_and_read(tmp_path):
    small_bank = Bank(
        FAMILY,
        SAMPLE,
        (calibrate([1.5, 2], [Entry("b", 3.0, "backdoor patch", "patch:size=6", 0.9)]),),
    )
    small_bank.write(tmp_path / "bank.json")
    assert Bank.read(tmp_path / "bank.json") == small_bank
    assert registry.make("bank", f"file:path={tmp_path / 'bank.json'}")() == (small_bank,)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_bank_holds_no_times_and_one_that_does_is_read(tmp_path):
    small_bank = Bank(FAMILY, SAMPLE, (calibrate([1.5, 2], [Entry("b", 3.0)]),))
    small_bank.write(tmp_path / "bank.json")
    assert "seconds" not in (tmp_path / "bank.json").read_text()
    old = json.loads((tmp_path / "bank.json").read_text())
    for number, entry in enumerate((*old["audits"][0]["clean"], *old["audits"][0]["attacked"])):
        entry["seconds"] = number / 7
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Bank.read(tmp_path / "old.json") == small_bank


def test_shipped_banks_are_of_this_code():
    for shipped in registry.make("bank", "shipped")():
        for c in shipped.audits:
            audit = registry.make("audit", c.audit)
            assert registry.spec(audit) == c.audit
            assert bank.code_hash(type(audit)) == c.code, (
                f"audit {c.name} has changed: where test_audit_values.py passes its values are the "
                "same, and the bank takes the new hash; else it must be made anew (`bezoar "
                "calibrate`)"
            )
            assert len(c.clean) >= 19, "the rate 0.05 needs them"


def test_shipped_values_are_those_that_were_measured():
    """A bank that is made anew takes a new digest here. Hashes of code may change without it."""
    folder = registry.PACKAGE / registry.KINDS["bank"]
    raw = json.loads((folder / "clip_small-scenes.json").read_text(encoding="utf-8"))
    for calibration in raw["audits"]:
        del calibration["code"]
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    assert digest == "f9997e746048716b45f1c9d28ca090435cd1b7116cfecd7a781af1341f6c875d"


@pytest.fixture
def raw(tmp_path):
    Bank(FAMILY, SAMPLE, (calibrate([1.5, 2], [Entry("b", 3.0)]),)).write(tmp_path / "bank.json")
    return json.loads((tmp_path / "bank.json").read_text())


def put(raw, path, value):
    at = raw
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(raw)


SPOILT = [
    (("schema",), 2),
    (("family",), []),
    (("family", "size"), "32"),
    (("family", "size"), True),
    (("family", "size"), 1.5),
    (("family", "size"), 10**400),
    (("family", "network"), None),
    (("family", "network"), "x" * 5000),
    (("family", "colour"), "red"),
    (("audits",), {}),
    (("audits", 0, "clean"), "many"),
    (("audits", 0, "clean", 0, "value"), "NaN"),
    (("audits", 0, "clean", 0, "value"), math.nan),
    (("audits", 0, "clean", 0, "value"), math.inf),
    (("audits", 0, "clean", 0, "value"), None),
    (("audits", 0, "clean", 0, "name"), 7),
    (("audits", 0, "attacked", 0, "success"), "all"),
]


@pytest.mark.parametrize(("path", "value"), SPOILT)
def test_a_spoilt_bank_is_one_line(raw, tmp_path, path, value):
    (tmp_path / "spoilt.json").write_text(put(raw, path, value))
    with pytest.raises(UserError) as error:
        Bank.read(tmp_path / "spoilt.json")
    assert (
        "spoilt.json" in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )


def test_no_bank_at_all_is_one_line(tmp_path, monkeypatch):
    bad = tmp_path / "bad.json"
    for content in (b"", b"\xff\xfe", b"[" * 200_000, b"{", b"7", b'{"schema": 1}'):
        bad.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.json"):
            Bank.read(bad)
    monkeypatch.setattr(bank, "MAX_BYTES", 10)
    bad.write_bytes(b" " * 11)
    with pytest.raises(UserError, match="at most 10"):
        Bank.read(bad)
    with pytest.raises(UserError, match="no bank"):
        registry.make("bank", "file:path=missing.json")()


def test_data_are_compared_without_seed_and_folder():
    a = registry.spec(registry.make("data", "scenes:count=500,seed=3"))
    b = registry.spec(registry.make("data", "scenes:count=500,seed=9"))
    assert (
        bank.comparable_data_spec(a)
        == bank.comparable_data_spec(b)
        != bank.comparable_data_spec(a.replace("count=500", "count=501"))
    )
    one, two = (f"npz:path=/{folder}/cifar10.npz,split=test" for folder in ("here", "over/there"))
    assert (
        bank.comparable_data_spec(one)
        == bank.comparable_data_spec(two)
        == "npz:path=cifar10.npz,split=test"
    )
    assert bank.comparable_data_spec("/evil.py:path=x") == "evil.py:path=x", (
        "a spec out of a stranger's manifest is text, and runs nothing"
    )


SOURCE = '''"""An audit."""
from bezoar.registry import method

@method
class Own:
    """Doc."""
    k: int = 1
'''
INVERTS = SOURCE.replace(
    "@method", "from bezoar.auditing.trigger_inversion import invert_triggers\n\n@method"
)


def test_the_code_hash_depends_on_what_is_computed_not_on_what_is_said(tmp_path):
    hashes = []
    sources = SOURCE, SOURCE.replace("Doc.", "Other words."), SOURCE.replace("= 1", "= 2"), INVERTS
    for i, text in enumerate(sources):
        path = tmp_path / f"{i}" / "own.py"
        path.parent.mkdir()
        path.write_text(text)
        registry.allow(str(path))
        hashes.append(bank.code_hash(registry.find_method("audit", str(path))))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_the_code_hash_covers_modules_that_shared_modules_import(tmp_path, monkeypatch):
    """The search is not imported by the audit itself."""
    (tmp_path / "own.py").write_text(INVERTS)
    code = tmp_path / "code"
    (code / "auditing").mkdir(parents=True)
    for name in ("trigger_inversion", "trigger_search"):
        text = (registry.PACKAGE / "auditing" / f"{name}.py").read_text()
        (code / "auditing" / f"{name}.py").write_text(text)
    monkeypatch.setattr(registry, "PACKAGE", code)
    first = hash_sources(tmp_path / "own.py", bank.SHARED)
    search = code / "auditing" / "trigger_search.py"
    search.write_text(search.read_text().replace("ADAM_EPSILON = 1e-8", "ADAM_EPSILON = 1e-7"))
    assert hash_sources(tmp_path / "own.py", bank.SHARED) != first


def test_every_module_of_auditing_that_an_audit_imports_is_shared_or_changes_no_value():
    shared = {name.removeprefix("auditing.") for name in bank.SHARED}
    for path in (registry.PACKAGE / registry.KINDS["audit"]).glob("*.py"):
        imports = imported_names(parse_without_docstrings(path))
        modules = {n.split(".")[2] for n in imports if n.startswith("bezoar.auditing.")}
        assert modules <= shared | {"evidence", "students", "unaided_verdict"}


def test_attacks_have_names():
    goals = [
        Goal("a", "patch:size=6", how="backdoor:count=40"),
        Goal("b", "warp", how="backdoor:count=40"),
    ]
    assert bank.describe_attack(goals) == ("backdoor patch + backdoor warp", "patch:size=6; warp")
    assert bank.describe_attack([Goal("a", victims=("x",), how="targeted")]) == ("targeted", "")


def facts(words, sensitivity=None, p=0.05, name="decree", **more):
    m = {"value": 0.9, "n": 10, "low": 0.6, "high": 1.0, "how": ""}
    found = {
        "audit": f"{name}:steps=3",
        "name": name,
        "summary": "s",
        "words": words,
        "sentence": f"S {words}.",
        "p": p,
    }
    found |= {"value": 1.0, "threshold": 0.5, "rate": 0.05, "notes": {}, "assumed": []}
    return found | {
        "sensitivity": {"": m} if sensitivity else {},
        "bank": {"clean": [], "attacked": [["backdoor patch", 1.0]]},
        **more,
    }


def test_the_overall_line():
    yes, no, none = (
        facts("evidence", p=0.01),
        facts("no evidence", True, 0.5, "cleanse"),
        facts("no calibration", p=None),
    )
    assert verdict_text.overall_verdict([yes], 0.05) == ("evidence", "S evidence.")
    words, said = verdict_text.overall_verdict([yes, no], 0.05)
    assert words == "evidence" and "over all 2 audits together" in said and "p = 0.02" in said
    words, said = verdict_text.overall_verdict([facts("evidence", p=0.04), no], 0.05)
    assert (
        words == "evidence"
        and "not over all together" in said
        and "p = 0.08" in said
        and "at most 0.1" in said
    )
    words, said = verdict_text.overall_verdict(
        [no, facts("no evidence", False, 0.3, "other")], 0.05
    )
    assert words == "no evidence" and "cleanse 0.90" in said and "p = 0.6" in said
    words, said = verdict_text.overall_verdict([none, no], 0.05)
    assert words == "no evidence" and "No calibration for decree" in said
    assert (
        verdict_text.overall_verdict([none, none | {"name": "x", "sentence": "T."}], 0.05)[0]
        == "no calibration"
    )
    for found in ([yes], [no], [yes, no], [none, no]):
        assert "clean." not in verdict_text.overall_verdict(found, 0.05)[1]


def test_what_was_not_tested_is_said():
    whole = {
        "audits": [facts("no evidence", notes={"limits": ["It cannot fly."]})],
        "few": "60 images",
        "text_tower": True,
    }
    said = "\n".join(verdict_text.list_untested(whole, {"cleanse": "too few classes"}))
    for words in (
        "cleanse did not run: too few classes",
        "backdoor warp",
        "badencoder",
        "It cannot fly",
        "60 images",
        "text tower",
    ):
        assert words in said
    assert "backdoor patch" not in said and "mntd" in said
    assert (
        verdict_text.small_sample_warning(512, 0) == ""
        and "calibrate with --images 60" in verdict_text.small_sample_warning(60, 512)
        and verdict_text.small_sample_warning(60, 0)
    )


def test_sarif_has_what_the_standard_requires():
    audits = [
        facts("evidence"),
        facts("no evidence", True, name="./own"),
        facts("no calibration", p=None),
    ]
    log = sarif.build_log(
        "train-1 é", "train-1 é/encoder.safetensors", audits, {"cleanse": "no classes"}, "S."
    )
    assert json.loads(json.dumps(log, allow_nan=False)) == log
    assert log["version"] == "2.1.0" and len(log["runs"]) == 1  # 3.13: version, runs
    run = log["runs"][0]
    driver = run["tool"]["driver"]  # 3.14: tool; 3.18: driver; 3.19: name
    assert driver["name"] == "bezoar" and len(driver["rules"]) == len(run["results"]) == 3
    for rule in driver["rules"]:  # 3.49: id; 3.12: a message string's text
        assert rule["id"] and rule["shortDescription"]["text"] and rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] in ("none", "note", "warning", "error")
    for result, a in zip(
        run["results"], audits, strict=True
    ):  # 3.27: message; ruleId as the rule's at ruleIndex
        assert (
            result["message"]["text"]
            and result["ruleId"] == driver["rules"][result["ruleIndex"]]["id"]
        )
        assert result["level"] == ("error" if a["words"] == "evidence" else "note")
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert uri == "train-1%20%C3%A9/encoder.safetensors"
        assert all(isinstance(v, str) for v in result["partialFingerprints"].values())
    invocation = run["invocations"][0]  # 3.20: executionSuccessful
    assert invocation["executionSuccessful"] is False and "no classes" in json.dumps(invocation)


def test_of_two_specs_of_one_method_only_the_fields_that_differ_are_told():
    assert (
        bank.describe_difference("clip:epochs=6,batch=128", "clip:epochs=8,batch=128")
        == "clip:epochs=6, not epochs=8"
    )
    assert (
        bank.describe_difference('classifier:architecture="a,b"', "clip_small:width=32")
        == "classifier, not clip_small"
    )
