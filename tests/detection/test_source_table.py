"""Evidence pooled over sources: the statistics against scipy's, honest on clean sets, and where
records come from.
"""

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy import stats

from bezoar.data.files.metadata import HOST, registrable_domain
from bezoar.detection import source_table
from bezoar.detection.corpus import record_sources
from bezoar.detection.corpus.record_sources import RecordSources
from bezoar.detection.source_table import (
    adjust_levels,
    find_evidence,
    level_sums,
    lift_records,
    standardise,
    tabulate_sources,
    tail_levels,
)
from bezoar.evaluation.scores import Scores

N, SOURCES, GROUPS = 12_000, 200, 24


def as_scores(values: np.ndarray) -> Scores:
    return Scores([f"r{i}" for i in range(len(values))], torch.from_numpy(values).float())


def clean_set(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Sources, groups and two correlated rankings; groups differ in mean and spread, source 7 is of
    one group alone.
    """
    rng = np.random.default_rng(seed)
    groups, of_record = rng.integers(0, GROUPS, N), rng.integers(0, SOURCES, N)
    groups[of_record == 7] = 3
    means, spreads = rng.normal(0, 1, GROUPS), np.exp(rng.normal(0, 0.3, GROUPS))
    means[3] = 3
    common = rng.normal(size=N)
    values = {
        name: (0.5 * common + 0.8 * rng.normal(size=N)) * spreads[groups] + means[groups]
        for name in ("a", "b")
    }
    return of_record, groups, groups.copy(), values


def table_of(of_record, captions, images, values):
    sources = RecordSources("domains", tuple(f"s{i}" for i in range(SOURCES)), of_record)
    rankings = {name: as_scores(v) for name, v in values.items()}
    return tabulate_sources(sources, rankings, captions, images)


def test_the_test_of_a_source_is_fishers():
    """One ranking, one group: twice the p-value of scipy's combination of the levels."""
    rng = np.random.default_rng(1)
    levels = tail_levels(rng.normal(size=500))
    of_record = rng.integers(0, 12, 500)
    levels[of_record == 4] /= 20
    counts = np.bincount(of_record)
    one_group = np.zeros(500, int)
    nats = level_sums(levels, one_group)
    assert np.allclose(nats, -np.log(levels) / max(1, -np.log(levels).mean()))
    evidence = find_evidence(of_record, counts, one_group, {"a": levels})
    for source in (3, 4):
        p = stats.combine_pvalues(np.exp(-nats[of_record == source]), "fisher").pvalue
        assert evidence[source].p == pytest.approx(min(1, 2 * p), rel=1e-6)
        low, high = evidence[source].low, evidence[source].high
        n = int(counts[source])
        total = nats[of_record == source].sum()
        assert stats.gamma.sf(total / high, n) == pytest.approx(0.975)  # mean of 1 / rate
        assert stats.gamma.sf(total / low, n) == pytest.approx(0.025)
    assert min(range(12), key=lambda i: evidence[i].p) == 4


def test_ties_share_the_larger_level_and_small_groups_are_left_alone():
    assert tail_levels(np.array([1.0, 3, 3, 2])).tolist() == [1, 0.5, 0.5, 0.75]
    values = np.concatenate([np.arange(40.0), [5.0, 9]])
    groups = np.array([0] * 40 + [1, 1])
    z = standardise(values, groups)
    assert np.allclose(z[:40], stats.zscore(values[:40])) and z[40:].tolist() == [5, 9]
    assert len(set(adjust_levels(as_scores(np.zeros(50)), *[np.zeros(50, int)] * 2))) == 1


def test_no_clean_source_stands_out_and_one_of_other_content_is_called_that():
    verdicts = []
    for seed in range(6):
        table = table_of(*clean_set(seed))
        assert not table.standing_out and not len(table.accused)
        verdicts += [row.verdict for row in table.rows if row.name == "s7"]
        assert all(row.name == "s7" for row in table.rows if row.verdict)
    assert verdicts == ["differs in content"] * 6


@pytest.mark.parametrize(("whole", "shift"), [(True, 2.6), (False, 3.2)])
def test_three_sources_of_poisons_come_first_though_their_poisons_do_not(whole, shift):
    """18 poisons of one target; their sources hold nothing else, or 60 others each."""
    of_record, captions, images, values = clean_set(3)
    rng = np.random.default_rng(4)
    poisons = rng.choice(np.flatnonzero((of_record > 20) & (captions != 5)), 18, replace=False)
    if whole:
        of_record[of_record < 3] = 30
    of_record[poisons], captions[poisons] = np.arange(18) % 3, 5
    for v in values.values():
        v[poisons] = v[captions == 5].mean() + shift * v[captions == 5].std()
        v[poisons] += 0.5 * rng.normal(size=18)
    in_worst = np.isin(np.argsort(-values["a"])[:100], poisons)
    assert in_worst.sum() < (2 if whole else 12)
    table = table_of(of_record, captions, images, values)
    assert {row.name for row in table.rows[:3]} == {"s0", "s1", "s2"}
    assert {row.name for row in table.standing_out} <= {"s0", "s1", "s2"} and table.standing_out
    hits = np.isin(table.accused, poisons)
    assert hits.sum() >= 5 and hits.mean() > 0.6
    assert (table.source_of_accused < 3).all()
    for row in table.standing_out:
        assert row.evidence.low > 1 and (row.evidence.group == 5 or whole)


def test_many_sources_that_stand_out_differ_by_nature_and_lift_nothing():
    of_record, captions, images, values = clean_set(5)
    for v in values.values():
        v[of_record < 60] += 2 * np.random.default_rng(0).random((of_record < 60).sum())
    table = table_of(of_record, captions, images, values)
    assert len(table.standing_out) > 10 and table.differs_by_nature and not len(table.accused)


def test_accused_records_come_after_raised_ones_and_before_all_others():
    merged = as_scores(np.array([5.0, 1, 2, 9, 0, 4]))
    raised = np.array([0, 1, 0, 0, 0, 0], bool)
    lifted = lift_records(merged, np.array([2, 4]), raised)
    assert lifted.ranking().tolist() == [1, 2, 4, 3, 0, 5]
    assert lift_records(merged, np.empty(0, int), raised) is merged


def test_sources_of_few_records_are_counted_and_not_tested():
    of_record = np.array([0] * 50 + [1, 1, -1] + [2] * 3)
    values = np.arange(56.0)
    rankings = {"a": as_scores(values)}
    one = np.zeros(56, int)
    table = tabulate_sources(RecordSources("x", ("p", "q", "r"), of_record), rankings, one, one)
    assert {row.name for row in table.rows} == {"p", "r"} and table.untested == 1
    assert [row.records for row in table.rows] == [3, 50] and source_table.LEAST_RECORDS == 3


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("img.Example.co.uk", "example.co.uk"),
        ("a.b.example.com", "example.com"),
        ("example.com.", "example.com"),
        ("co.uk", "co.uk"),
        ("192.168.0.1", "192.168.0.1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("localhost", "localhost"),
        ("x.de", "x.de"),
    ],
)
def test_what_somebody_buys_of_a_host(host, domain):
    assert registrable_domain(host) == domain


def test_hosts_are_found_in_urls():
    urls = [
        "http://u:p@a.example.com:80/x?y@z",
        "ftp://b.example.com",
        "no url",
        "",
        "//c.d/x",
        "https://[::1]/a",
    ]
    column = pa.array(urls, pa.large_string())
    hosts = record_sources._first_group(column, HOST, "host").to_pylist()
    assert hosts == ["a.example.com", "b.example.com", None, None, None, "[::1]"]
