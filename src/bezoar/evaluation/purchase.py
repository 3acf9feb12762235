"""Purchase power: the price of the expired domains for a number of poisons (Carlini et al. 2023).

In split-view poisoning, the owner of a URL's domain decides what a later download finds there. The
caption cannot be changed: it is in the list of URLs. So only records whose captions mention the
target are useful.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bezoar.attacks.captions import find_mentions
from bezoar.data.files.metadata import HOST, registrable_domain
from bezoar.data.files.tables import (
    CAPTION_COLUMNS,
    cell_text,
    column_names,
    match_column,
    read_rows,
)
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure

DOMAIN_COLUMNS, URL_COLUMNS = ("domain", "host", "site"), ("url", "link", "image_url")
COUNT_COLUMNS, PRICE_COLUMNS = ("records", "count", "images"), ("price", "cost")
MOST_DOMAINS = 10_000_000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DomainTable:
    """Domains of a data set."""

    names: tuple[str, ...]  # names of D domains
    records: Floats  # float64 (D,), number of useful records of each
    prices: Floats  # float64 (D,), price of each

    def buy(self, needed: float) -> tuple[int, float]:
        """The number of domains to buy for so many records, and the price, which may be infinite.

        Domains are bought in the order of records for the price. If all prices are equal, this is
        optimal; otherwise the sum is at most the price of one domain above the least.
        """
        if needed <= 0:
            return 0, 0.0
        order = np.lexsort((-self.records, -self.records / np.maximum(self.prices, 1e-9)))
        cumulative = np.cumsum(self.records[order])
        count = int(np.searchsorted(cumulative, needed * (1 - 1e-12))) + 1
        if not len(cumulative) or needed > cumulative[-1] or math.isinf(needed):
            return len(self.names), math.inf
        return count, float(self.prices[order][:count].sum())

    def measures(self, dose: Measure, name: str) -> dict[str, Measure]:
        """The share of domains and the sum for a dose, whose interval is that of the dose."""
        bought = [self.buy(d) for d in (dose.value, dose.low, dose.high)]
        n = len(self.names)
        shares = [count / n if math.isfinite(cost) else math.inf for count, cost in bought]
        cost, low, high = (cost for _, cost in bought)
        how = f"of {n:,} domains with {self.records.sum():,.0f} records that serve; {dose.how}"
        return {
            f"domain_share_{name}": Measure(shares[0], n, shares[1], shares[2], f"share {how}"),
            f"cost_{name}": Measure(cost, n, low, high, f"sum of prices {how}"),
        }


def read_domains(path: Path, price: float, target: str) -> DomainTable:
    """Read a table of domains, or of URLs.

    Columns: a domain (`domain`), or a URL with its domain; a number of records (`records`), by
    default one a row; a `price`, by default the argument; a caption, with which only rows that
    mention the target count. Rows of one domain are added up, at the highest price.

    Raises:
        UserError: for a table without these columns, and for invalid numbers.
    """
    names = column_names(path)
    domain, url, count, cost, caption = (
        match_column(names, columns)
        for columns in (DOMAIN_COLUMNS, URL_COLUMNS, COUNT_COLUMNS, PRICE_COLUMNS, CAPTION_COLUMNS)
    )
    if not domain and not url:
        raise UserError(
            f"{path}: expected a column {' or '.join((*DOMAIN_COLUMNS, *URL_COLUMNS))}; it has: "
            f"{', '.join(names)[:200]}"
        )
    records: dict[str, float] = {}
    prices: dict[str, float] = {}
    columns_read = [name for name in (domain or url, count, cost, caption) if name]
    for number, row in read_rows(path, columns=columns_read):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: {row}")
        place = f"{path} row {number}"
        host = cell_text(row.get(domain)) if domain else _host(cell_text(row.get(url)))
        if not host:
            continue
        name = registrable_domain(host)
        serves = not caption or not target or find_mentions([cell_text(row.get(caption))], target)
        n = _number(row.get(count), place) if count else 1.0
        records[name] = records.get(name, 0.0) + (n if serves else 0.0)
        prices[name] = max(prices.get(name, 0.0), _number(row.get(cost), place) if cost else price)
        if len(records) > MOST_DOMAINS:
            raise UserError(f"{path}: more than {MOST_DOMAINS:,} domains")
    if not records or not sum(records.values()):
        raise UserError(f"{path}: no domain holds a record that serves")
    return DomainTable(
        tuple(records), np.array(list(records.values())), np.array(list(prices.values()))
    )


def _host(url: str) -> str:
    match = re.match(HOST, url)
    return match["host"] if match else ""


def _number(text: object, place: str) -> float:
    """A number that is not negative. Raises UserError for anything else."""
    try:
        value = float(str(text))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1e15:
        raise UserError(f"{place}: expected a number of records or a price; got {str(text)[:40]!r}")
    return value


def describe(measures: dict[str, Measure], name: str) -> str:
    """A sentence on share and sum, for the page."""
    share, cost = measures[f"domain_share_{name}"], measures[f"cost_{name}"]
    if not math.isfinite(cost.value):
        return f"all {share.n:,} domains together hold fewer records that serve"
    end = f"{cost.high:,.0f}" if math.isfinite(cost.high) else "no upper end"
    held = f"{share.value:.2%} of {share.n:,} domains hold so many"
    return f"{held}, for {cost.value:,.0f} ({cost.low:,.0f} .. {end})"
