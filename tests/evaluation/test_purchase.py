"""What domains cost an attacker: against every choice of domains; tables of domains and of URLs."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from bezoar.errors import UserError
from bezoar.evaluation.purchase import DomainTable, describe, read_domains
from bezoar.evaluation.scores import Measure


def cheapest(records: list[int], prices: list[float], needed: float) -> tuple[float, int]:
    """The least sum, and the fewest domains, over every choice."""
    choices = [
        c for n in range(len(records) + 1) for c in itertools.combinations(range(len(records)), n)
    ]
    holding = [c for c in choices if sum(records[i] for i in c) >= needed]
    if not holding:
        return math.inf, len(records)
    return min(sum(prices[i] for i in c) for c in holding), min(map(len, holding))


@pytest.mark.parametrize("seed", range(8))
def test_domains_are_bought_as_cheaply_as_any_choice(seed: int) -> None:
    draw = np.random.default_rng(seed)
    records = draw.integers(0, 20, 9).tolist()
    varied = draw.integers(1, 9, 9).tolist()
    for needed in (0, 1, 5, 17, 40, sum(records), sum(records) + 1):
        for prices in ([10.0] * 9, varied):
            table = DomainTable(
                tuple("abcdefghi"), np.array(records, float), np.array(prices, float)
            )
            count, cost = table.buy(needed)
            least, fewest = cheapest(records, prices, needed)
            if prices[0] == 10.0 == prices[-1]:
                assert (cost, count) == (least, fewest)
            else:
                assert least <= cost <= least + max(prices) or cost == least == math.inf


def test_a_table_of_urls_counts_what_mentions_the_target(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [
        "http://img.a.co.uk/1.jpg,a red star",
        "http://a.co.uk/2.jpg,a STAR",
        "https://b.org/x,starry night",
        "nothing,a star",
        "http://c.net:80/x,blue",
    ]
    path.write_text("url,caption\n" + "\n".join(rows) + "\n")
    table = read_domains(path, 7.0, "star")
    assert table.names == ("a.co.uk", "b.org", "c.net")
    assert table.records.tolist() == [2, 0, 0] and table.prices.tolist() == [7, 7, 7]
    assert read_domains(path, 7.0, "").records.tolist() == [2, 1, 1]


def test_shares_and_sums_have_the_intervals_of_the_dose(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("domain,records,price\nwww.a.com,4,5\na.com,6,8\nb.com,5,1\nc.com,1,100\n")
    table = read_domains(path, 10.0, "star")
    assert table.names == ("a.com", "b.com", "c.com") and table.records.tolist() == [10, 5, 1]
    assert table.prices.tolist() == [8, 1, 100]
    measures = table.measures(Measure(12, 6, 3, math.inf, "dose"), "x")
    share, cost = measures["domain_share_x"], measures["cost_x"]
    assert (share.value, share.low, share.high) == (2 / 3, 1 / 3, math.inf)
    assert (cost.value, cost.low, cost.high) == (9, 1, math.inf)
    assert describe(measures, "x") == "66.67% of 3 domains hold so many, for 9 (1 .. no upper end)"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "expected a column domain"),
        ("domain,records\na.com,nan\n", "row 1: expected a number"),
        ("domain,price\na.com,-1\n", "row 1: expected a number"),
        ("domain,records\na.com,1e999\n", "row 1: expected a number"),
        ("domain\n", "expected a column domain"),
        ("domain,records\na.com,0\n", "no domain holds a record"),
    ],
)
def test_other_tables_are_refused_in_a_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_domains(path, 10.0, "")
    assert "\n" not in str(caught.value)
