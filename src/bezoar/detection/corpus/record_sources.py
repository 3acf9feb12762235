"""Where records come from: the site, uploader, folder or shard that whoever controls it can fill.

An attacker who buys a few expired domains decides what all records of these are (Carlini et al.,
"Poisoning web-scale training datasets is practical", IEEE S&P 2024). What single records do not
show may show in all records of a source.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bezoar.data.files.metadata import HOST, ORIGIN_COLUMNS, registrable_domain
from bezoar.data.files.paths import printable
from bezoar.data.files.tables import ID_COLUMNS, cell_text, column_names, match_column, read_rows
from bezoar.data.strings import Strings
from bezoar.detection.corpus.corpus import Corpus
from bezoar.errors import UserError

KINDS = ("metadata", "domain", "folder", "shard")  # in the order in which `auto` tries them
LEAST_SHARE = 0.5  # of the records that must have a source of a kind before `auto` takes it
FOLDER = r"^(?P<folder>.+)/"  # of the path of a file
MAX_NAME = 200  # characters of a source's name


@dataclass(frozen=True)
class RecordSources:
    """The sources of N records."""

    what: str  # what they are, for the page: `domains of the URLs`
    names: tuple[str, ...]  # of S sources, printable, in alphabetical order
    of_record: NDArray[np.int64]  # int64 (N,), each record's; -1 where it is not known


def find_sources(corpus: Corpus, wanted: str) -> RecordSources | None:
    """Find where the records of a corpus come from.

    Args:
        corpus: What was scanned.
        wanted: `auto`: the first of `KINDS` that half of the records have, with two sources or
            more; one of `KINDS`; `none`; or a table with a column of ids and one of sources.

    Returns:
        The sources; None where `auto` finds none, or none are wanted.

    Raises:
        UserError: Where the kind that is wanted is not there, or the table cannot be read.
    """
    if wanted == "none":
        return None
    if wanted not in ("auto", *KINDS):
        return _number_sources(Path(wanted).name, _read_table(wanted, corpus.ids))
    for kind in KINDS if wanted == "auto" else (wanted,):
        what, names = _names_of(corpus, kind)
        share = 1 - names.null_count / max(1, len(names))
        if share and (wanted != "auto" or share >= LEAST_SHARE):
            sources = _number_sources(what, names)
            if wanted != "auto" or len(sources.names) > 1:
                return sources
    if wanted == "auto":
        return None
    raise UserError(f"--sources {wanted}: no record says so; a table of id and source can")


def check_wanted(wanted: str) -> list[Path]:
    """The file that `wanted` names, if it names one. Raises UserError where it does not exist."""
    if wanted in ("auto", "none", *KINDS):
        return []
    path = Path(wanted)
    if not path.is_file():
        kinds = ", ".join(("auto", *KINDS, "none"))
        raise UserError(f"--sources {wanted!r}: no such file; expected {kinds} or a table")
    return [path]


def _names_of(corpus: Corpus, kind: str) -> tuple[str, pa.Array]:
    """Return what the sources of a kind are called, and each record's, null where there is none."""
    if kind == "metadata":
        return "named in the metadata", _without_empty(corpus.origins)
    if kind == "domain":
        hosts = _without_empty(Strings(_first_group(corpus.urls.column, HOST, "host")))
        return "domains of the URLs", _map_distinct(hosts)
    if kind == "folder":
        is_class = getattr(getattr(corpus.source, "walk", None), "layout", "") == "classes"
        members = (
            corpus.members.column if not is_class else pa.nulls(len(corpus), pa.large_string())
        )
        return "folders", _without_empty(Strings(_first_group(members, FOLDER, "folder")))
    names = pa.array(corpus.file_names, pa.large_string())
    shards = names.take(pa.array(corpus.places["shard"]))
    return "shards", _without_empty(Strings(shards))


def _first_group(column: pa.Array, pattern: str, name: str) -> pa.Array:
    """The part of each text that a pattern's group matches; null where it does not match."""
    return pc.struct_field(pc.extract_regex(column, pattern), name)


def _without_empty(texts: Strings) -> pa.Array:
    """Texts with nulls in place of empty ones."""
    column = texts.column.cast(pa.large_string())
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.large_string()), column)


def _map_distinct(hosts: pa.Array) -> pa.Array:
    """The registrable domain of each host; a distinct host is looked at once."""
    encoded = hosts.dictionary_encode()
    domains = [registrable_domain(host) for host in encoded.dictionary.to_pylist()]
    return pa.array(domains, pa.large_string()).take(encoded.indices)


def _read_table(path: str, ids: Strings) -> pa.Array:
    """The source that a table gives each id; null where it names none."""
    names = column_names(Path(path))
    key = match_column(names, ID_COLUMNS)
    column = match_column(names, ORIGIN_COLUMNS)
    if not key or not column:
        raise UserError(
            f"{path}: expected columns {' or '.join(ID_COLUMNS)} and "
            f"{' or '.join(ORIGIN_COLUMNS)}; it has: {', '.join(names)}"
        )
    rows = (row for _, row in read_rows(Path(path), columns=[key, column]) if isinstance(row, dict))
    pairs = [(_as_unicode(row.get(key)), _as_unicode(row.get(column))) for row in rows]
    keys, sources = zip(*pairs, strict=True) if pairs else ((), ())
    places = pc.index_in(ids.column, pa.array(keys, pa.large_string()))
    if places.null_count == len(ids):
        raise UserError(f"{path}: none of its ids is that of a record")
    return _without_empty(Strings(pa.array(sources, pa.large_string()).take(places)))


def _as_unicode(cell: object) -> str:
    """The text of a cell; bytes that are no UTF-8, which are read as lone surrogates, are spelt
    out.
    """
    return cell_text(cell).encode(errors="backslashreplace").decode()


def _number_sources(what: str, names: pa.Array) -> RecordSources:
    """Number the sources in alphabetical order; names that print alike are one source."""
    encoded = names.dictionary_encode()
    shown = [printable(name)[:MAX_NAME] for name in encoded.dictionary.to_pylist()]
    ordered = sorted(set(shown))
    place = {name: i for i, name in enumerate(ordered)}
    number = np.array([place[name] for name in shown] or [-1], np.int64)
    index = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return RecordSources(what, tuple(ordered), np.where(index >= 0, number[index], -1))
