"""The command line: a sub-command per verb, an option per field. Knows no method, and imports no torch for help."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import io
import json
import os
import sys
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bezoar import registry
from bezoar.errors import UserError
from bezoar.runs.run import get_run
from bezoar.runs.verb import Input, Settings, Takes, input_to_json, positional_fields, verb_name

VERBS = (
    "poison",
    "train",
    "inject",
    "evaluate",
    "scan",
    "survive",
    "audit",
    "calibrate",
    "shadows",
    "repair",
    "check",
    "reproduce",
    "dose",
    "demo",
)
SWEEPS = ("reproduce", "dose", "scan", "calibrate")


def option(hint: Any, positional: bool, required: bool) -> Any:
    """A verb's annotated field -> the same for tyro: inputs are texts, named as README names them; the note is the help."""
    base, *marks = typing.get_args(hint)
    note = next((m for m in marks if isinstance(m, str)), "")
    takes = next((m.what.upper() for m in marks if isinstance(m, Takes)), None)
    if takes and base == tuple[Input, ...]:
        base, takes = tuple[str, ...], f"{takes} ..."
    elif takes:
        base = str
    if takes and positional and not required:
        takes = f"[{takes}]"
    conf = [tyro.conf.Positional] if positional else []
    return Annotated[base, *conf, tyro.conf.arg(help=note, metavar=takes)]


def command(name: str) -> type:
    """The command-line form of a verb: its fields, then the options that every verb has."""
    verb = getattr(importlib.import_module(f"bezoar.verbs.{name}"), name.title())
    hints = typing.get_type_hints(verb, include_extras=True)
    fields: list[tuple] = []
    for f in dataclasses.fields(verb):
        default = f.default
        kind = option(
            hints[f.name], f.name in positional_fields(verb), default is dataclasses.MISSING
        )
        if default is None:
            base, *rest = typing.get_args(kind)
            kind = Annotated[base | None, *rest]
        if isinstance(default, Path):
            default = str(default)
        fields.append((f.name, kind) if default is dataclasses.MISSING else (f.name, kind, default))
    common: list[tuple] = [
        ("runs", Annotated[Path, tyro.conf.arg(help="directory of the runs")], Path("runs")),
        ("seed", Annotated[int, tyro.conf.arg(help="of everything random")], 0),
        ("device", Annotated[str, tyro.conf.arg(help="auto, cpu, cuda, cuda:1")], "auto"),
        ("dry", Annotated[bool, tyro.conf.arg(help="print what would be run, and stop")], False),
        (
            "fresh",
            Annotated[bool, tyro.conf.arg(help="run again even if a finished run answers this")],
            False,
        ),
        (
            "json",
            Annotated[bool, tyro.conf.arg(help="print the manifest as one JSON object")],
            False,
        ),
    ]
    if name in SWEEPS:
        common += [
            (
                "workers",
                Annotated[
                    int, tyro.conf.arg(help="processes at a time; 0: one a core, or one a GPU")
                ],
                0,
            ),
            (
                "ray",
                Annotated[
                    bool,
                    tyro.conf.arg(help="on Ray: the cluster RAY_ADDRESS names, or a local one"),
                ],
                False,
            ),
        ]
    if name == "audit":
        levels = Literal["never", "evidence", "unknown"]
        common.append(
            (
                "fail_on",
                Annotated[
                    levels, tyro.conf.arg(help="exit with 3 on it; unknown: or without calibration")
                ],
                "never",
            )
        )
    if name == "scan":
        cases = Literal["never", "trigger"]
        common.append(
            (
                "fail_on",
                Annotated[
                    cases, tyro.conf.arg(help="exit with 3 where a detector has found a trigger")
                ],
                "never",
            )
        )
    if name == "poison":
        fields = [
            (f[0], Annotated[str | None, *typing.get_args(f[1])[1:]], None) if f[0] == "data" else f
            for f in fields
        ]
        common.append(
            (
                "verify",
                Annotated[
                    str | None,
                    tyro.conf.arg(help="derive its plan anew, compare bit by bit", metavar="RUN"),
                ],
                None,
            )
        )
    made = dataclasses.make_dataclass(name.title(), fields + common, frozen=True)
    made.__doc__ = verb.__doc__
    made.verb = verb  # type: ignore[attr-defined]
    return made


@dataclasses.dataclass(frozen=True)
class List:
    """What there is, with every field: all methods, or those of one kind."""

    kind: Annotated[
        str | None,
        tyro.conf.Positional,
        tyro.conf.arg(help=f"of {', '.join(registry.KINDS)}", metavar="[KIND]"),
    ] = None
    json: Annotated[bool, tyro.conf.arg(help="print it as one JSON object")] = False


@dataclasses.dataclass(frozen=True)
class Show:
    """What a run found: its metrics with n and interval, and where its report is."""

    run: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="a run's directory, or the start of its name", metavar="RUN"),
    ]
    page: Annotated[
        Path | None,
        tyro.conf.arg(
            help="write its page here, to hand around: without links to other runs", metavar="FILE"
        ),
    ] = None
    runs: Annotated[Path, tyro.conf.arg(help="directory of the runs")] = Path("runs")
    json: Annotated[bool, tyro.conf.arg(help="print the manifest as one JSON object")] = False


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print. Returns the exit status.

    0: done. 1: a bug. 2: the user's input. 3: `--fail-on` found its case. 4: done, but for what could not be read or
    asked; the run's notes (`incomplete`) say what. 130: interrupted. 141: nobody reads what it prints.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        commands: dict[str, Any] = {name: command(name) for name in VERBS}
        asked = tyro.extras.subcommand_cli_from_dict(
            {**commands, "list": List, "show": Show},  # type: ignore[dict-item]
            prog="bezoar",
            description="Is this data set poisoned, is this encoder backdoored, and what now?",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if isinstance(asked, List):
            return show_methods(asked)
        if isinstance(asked, Show):
            return show_run(asked)
        return carry_out(asked)
    except UserError as error:
        print(f"bezoar: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bezoar: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read has seen enough: `bezoar list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            print(f"bezoar: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
            return 2
        raise


def carry_out(asked: Any) -> int:
    """Run the verb that was asked for; stdout ends with its directory, or is its manifest."""
    if getattr(asked, "verify", None):
        return verify(asked)
    values = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked.verb)}
    if hasattr(asked, "verify") and values["data"] is None:
        raise UserError("name the DATA to poison, or --verify RUN")
    verb = asked.verb(**values)
    if asked.dry:
        print(json.dumps({"verb": verb_name(verb), **input_to_json(verb)}, indent=1))
        return 0
    how = {name: getattr(asked, name) for name in ("workers", "ray") if hasattr(asked, name)}
    from bezoar.reports.page import execute

    run = execute(verb, Settings(asked.runs, asked.seed, asked.device, asked.fresh, **how))
    manifest = run.manifest
    incomplete = manifest["notes"].get("incomplete") or []
    for line in incomplete:  # of a run that is at hand already, too
        print(f"{verb_name(verb)}: {line}", file=sys.stderr)
    status = 3 if fails(asked, manifest) else 4 if incomplete else 0
    if asked.json:
        print(json.dumps(manifest, indent=1, ensure_ascii=False))
        return status
    table(manifest)
    print(f"report: {run.path / 'report.html'}")
    print(run.path)
    return status


def fails(asked: Any, manifest: dict) -> bool:
    """Whether a scan or an audit is to end a build.

    A scan: where a detector that decides has found a trigger; raises UserError where none of those asked for decides, because
    that would pass whatever there is. An audit: on evidence; with `unknown` also where one has no calibration or did not run.
    """
    wanted, notes = getattr(asked, "fail_on", "never"), manifest["notes"]
    if wanted == "trigger":
        decided = [m["value"] for k, m in manifest["metrics"].items() if k.endswith(".raised")]
        if not decided and not notes.get("incomplete"):
            raise UserError(
                "--fail-on trigger: no detector asked for says whether there is one; --detector transplant does"
            )
        return any(decided)
    unknown = bool(notes.get("uncalibrated") or notes.get("incomplete"))
    return wanted != "never" and (
        notes.get("words") == "evidence" or (wanted == "unknown" and unknown)
    )


def verify(asked: Any) -> int:
    """`bezoar poison --verify RUN`."""
    from bezoar.verbs.poison import verify_plan as derive_again

    run = get_run(asked.runs, asked.verify)
    found = derive_again(run)
    print(
        json.dumps(found)
        if asked.json
        else f"{run.name} verifies: {found['records']} records, plan {found['plan']}"
    )
    return 0


def show_run(asked: Show) -> int:
    """`bezoar show RUN`."""
    run = get_run(asked.runs, asked.run)
    manifest = run.manifest
    if asked.json:
        print(json.dumps(manifest, indent=1, ensure_ascii=False))
        return 0
    print(
        f"{run.name}: {manifest['status']}"
        + (f" ({manifest['error']})" if manifest.get("error") else "")
    )
    table(manifest)
    if asked.page is not None or (
        manifest["status"] == "done" and not (run.path / "report.html").exists()
    ):
        from bezoar.reports import page

        written = (
            page.write_page(run)
            if asked.page is None
            else page.write_standalone_page(run, asked.page)
        )
        print(f"report: {written}")
    elif (run.path / "report.html").exists():
        print(f"report: {run.path / 'report.html'}")
    return 0


def table(manifest: dict) -> None:
    """The verdict where there is one; metrics with n and 95 % interval."""
    from rich.console import Console
    from rich.table import Table

    if verdict := manifest.get("notes", {}).get("verdict"):
        print(verdict)

    rows = Table("metric", "value", "95 % interval", "n", box=None, pad_edge=False)
    for name, m in manifest["metrics"].items():
        value, low, high = (float(m[k]) for k in ("value", "low", "high"))
        rows.add_row(name, f"{value:.4g}", f"{low:.4g} .. {high:.4g}", str(m["n"]))
    if rows.rows:
        Console(soft_wrap=True, width=200).print(rows)  # a name that is cut off cannot be asked for


def show_methods(asked: List) -> int:
    """`bezoar list [KIND]`."""
    if asked.kind not in (None, *registry.KINDS):
        raise UserError(
            f"no kind {asked.kind!r} of methods; there are: {', '.join(registry.KINDS)}"
        )
    kinds = [asked.kind] if asked.kind else list(registry.KINDS)
    found = {
        kind: [
            dataclasses.replace(
                registry.describe(registry.PACKAGE / registry.KINDS[kind] / f"{n}.py"), name=n
            )
            for n in registry.method_names(kind)
        ]
        for kind in kinds
    }
    if asked.json:
        print(
            json.dumps({k: [dataclasses.asdict(d) for d in v] for k, v in found.items()}, indent=1)
        )
        return 0
    for kind, methods in found.items():
        print(kind)
        for d in methods:
            print(f"  {d.name}: {d.summary}")
            for name, hint, default, text in d.fields if asked.kind else ():
                print(f"      {name}: {hint}{' = ' + default if default else ''}  {text}")
    return 0
