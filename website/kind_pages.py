"""A page for each kind of method, made from the methods' source texts; nothing of them is imported
or run, torch neither.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from bezoar import method_source, registry
from bezoar.runs import verb_source
from bezoar.runs.verb import verb_names
from bezoar.runs.verb_source import MISSING

ROOT = Path(__file__).parents[1]
ENCODER = "bezoar train scenes:count=2000 --objective clip:epochs=4"
CLEAN = "scenes:count=256,seed=1"


class KindExample(NamedTuple):
    """How a kind is used. title: of its page. before: commands that make what `command` needs; `{}`
    stands for a spec.
    """

    title: str
    command: str
    before: tuple[str, ...] = ()
    method: str = ""


KINDS = {  # kind -> its page; a run is named by the start of its name, as `train-`
    "data": KindExample("Data", 'bezoar scan "{}"', (), "scenes:count=2000"),
    "trigger": KindExample(
        "Triggers",
        'bezoar poison scenes:count=2000 --trigger "{}" --target "striped star"',
        (),
        "patch",
    ),
    "poison": KindExample(
        "Poisons",
        'bezoar poison scenes:count=2000 --poison "{}" --trigger patch --target "striped star"',
        (),
        "backdoor",
    ),
    "network": KindExample(
        "Networks",
        "bezoar train scenes:count=2000 --network {} --objective clip:epochs=2",
        (),
        "clip_small",
    ),
    "objective": KindExample(
        "Objectives", "bezoar train scenes:count=2000 --objective {}", (), "clip:epochs=4"
    ),
    "attack": KindExample(
        "Attacks on encoders",
        'bezoar inject train- --data scenes:count=1000,seed=1 --attack {} --reference scenes:count=400,seed=2 --target "striped star"',  # noqa: E501
        (ENCODER,),
        "badencoder:epochs=2",
    ),
    "probe": KindExample("Probes", "bezoar evaluate train- --probe {}", (ENCODER,), "zero_shot"),
    "detector": KindExample(
        "Detectors", "bezoar scan train- --detector {}", (ENCODER,), "k_distance"
    ),
    "audit": KindExample(
        "Audits", f"bezoar audit train- --data {CLEAN} --audit {{}}", (ENCODER,), "whitening"
    ),
    "repair": KindExample(
        "Repairs",
        "bezoar repair train- --data scenes:count=1000,seed=1 --repair {}",
        (ENCODER,),
        "prune",
    ),
    "check": KindExample(
        "Checks at test time",
        f"bezoar check train- scenes:count=200,seed=2 --clean {CLEAN} --check {{}}",
        (ENCODER,),
        "scale_up",
    ),
    "bank": KindExample(
        "Banks",
        f"bezoar audit train- --data {CLEAN} --audit whitening --bank {{}}",
        (ENCODER,),
        "shipped",
    ),
    "paper": KindExample(
        "Papers' tables", "bezoar reproduce {} --scale smoke", (), "carlini2022/poisons"
    ),
}
SPECS = {  # methods that cannot be written by their name alone
    "embeddings": "embeddings:path=clip-retrieval",
    "folder": "folder:path=photos",
    "image": "image:path=photo.jpg",
    "npz": "npz:path=images.npz",
    "shards": "shards:path=cc/00000.tar",
    "table": "table:path=pairs.csv",
    "file": "file:path=trigger.png",
    "several": "several:triggers=(patch:size=3+tint:strength=.1)",
    "trigger/composite": "composite:reference=photo.png",
    "mismatch": "mismatch:query=dotted heart",
    "texts": "texts:path=texts.csv",
    "texts_of": "texts_of:data=(scenes:count=500)",
    "hub": "hub:name=timm/resnet18.a1_in1k",
    "hugging_face": "hugging_face:path=siglip-folder",
    "imported": "imported:path=moco.pth",
    "sentence": "sentence:path=all-MiniLM-L6-v2",
    "lit": "lit:image=(weights:path=lite0.pth,size=128),text=(sentence:path=all-MiniLM-L6-v2)",
    "weights": "weights:path=model.pth",
    "cross_encoder": "cross_encoder:reference=open_clip:RN50/openai",
    "mntd": "mntd:bank=shadows-19c2/bank.json",
    "bank/file": "file:path=bank.json",
}


def kind_pages() -> dict[str, str]:
    """Path of a page below docs -> its Markdown: `kinds/index.md`, and one a kind."""
    pages = {f"kinds/{kind}.md": kind_page(kind) for kind in registry.KINDS}
    return {"kinds/index.md": index_page(), **pages}


def index_page() -> str:
    """What kinds there are, with their methods."""
    lines = [
        "# Every kind of method",
        "",
        "These pages are made from the source texts of the methods. A method is written "
        "`name:field=value,field=value`;",
        "[how specs are written](../inputs.md#specs) has the rest, and `./mine.py:k=8` is one of "
        "your own",
        "([how to write it](../../CONTRIBUTING.md)).",
        "",
        "| kind | methods |",
        "|---|---|",
    ]
    for kind, example in KINDS.items():
        names = ", ".join(f"[{n}]({kind}.md#{anchor(n)})" for n in registry.method_names(kind))
        lines.append(f"| [{example.title}]({kind}.md) | {names} |")
    return "\n".join([*lines, ""])


def kind_page(kind: str) -> str:
    """The page of a kind: what its methods are called with, an example to copy, and every method
    with its fields.
    """
    example = KINDS[kind]
    called, returns, verb = kind_contract(kind)
    folder = registry.PACKAGE / registry.KINDS[kind]
    commands = [*example.before, example.command.format(example.method)]
    parts = [
        f"# {example.title}",
        docstring_text(read_module(folder / "__init__.py")),
        f"Called with {called}; returns {returns}. Verb: {verb}.",
        "For example, with what bezoar draws itself, in an empty folder (`train-` is the start of "
        "a run's name):",
        code_block(commands),
        f"`bezoar list {kind}` prints what this page holds.",
    ]
    parts += [method_part(kind, name) for name in registry.method_names(kind)]
    return "\n\n".join(parts) + "\n"


def method_part(kind: str, name: str) -> str:
    """A method's heading, what its docstrings say, a command that uses it, and a table of its
    fields.
    """
    path = registry.PACKAGE / registry.KINDS[kind] / f"{name}.py"
    module = read_module(path)
    cls = method_source.class_node(module, registry.class_name(path.stem))
    texts = [docstring_text(module), docstring_text(cls) if cls else ""]
    parts = [f"## {name} {{ #{anchor(name)} }}", *filter(None, texts)]
    parts.append(code_block([method_command(kind, name)]))
    fields = method_source.describe(path).fields
    if fields:
        rows = [
            f"| `{f.name}` | {code(f.type)} | {code(f.default) or 'needed'} | {cell(f.help)} |"
            for f in fields
        ]
        parts.append("\n".join(["| field | type | default | |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def method_command(kind: str, name: str) -> str:
    """A command that uses a method. A field that it needs, and that `SPECS` does not fill, stands
    in capitals.
    """
    path = registry.PACKAGE / registry.KINDS[kind] / f"{name}.py"
    needed = [f.name for f in method_source.describe(path).fields if not f.default]
    plain = f"{name}:{','.join(f'{field}={field.upper()}' for field in needed)}".removesuffix(":")
    return KINDS[kind].command.format(SPECS.get(f"{kind}/{name}") or SPECS.get(name) or plain)


def kind_contract(kind: str) -> tuple[str, str, str]:
    """What methods of a kind are called with, what they return, and which verbs use them:
    ARCHITECTURE's row of the kind.
    """
    text = (ROOT / "ARCHITECTURE.md").read_text()
    row = re.search(rf"^\| {kind} \|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert row, f"ARCHITECTURE.md has no row of the kind {kind}"
    called, returns, verb = (part.strip() for part in row.groups())
    return called, returns, verb


def verb_parts() -> str:
    """Every verb: its docstring, and its fields, which are options on the command line and
    arguments in Python.
    """
    parts = []
    for name in verb_names():
        verb = verb_source.read_verb(name)
        parts += [f"### {name} {{ #{name} }}", markdown(verb.doc)]
        rows = ["| option | Python | default | |", "|---|---|---|---|"]
        for field in verb.fields:
            option = field.name.replace("_", "-")
            written = option.upper() if field.takes.positional else f"--{option}"
            default = "needed" if field.default is MISSING else code(repr(field.default))
            rows.append(f"| `{written}` | `{field.name}` | {default} | {cell(field.help)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


# Texts


def read_module(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstring_text(node: ast.Module | ast.ClassDef) -> str:
    """A docstring as Markdown."""
    return markdown(ast.get_docstring(node) or "")


def markdown(text: str) -> str:
    """A docstring as Markdown: formulas and angle brackets outside of code stay as they are
    written.
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.startswith("    "):  # indented: an example
            paragraphs.append("```python\n" + re.sub(r"^    ", "", paragraph, flags=re.M) + "\n```")
            continue
        pieces = paragraph.split("`")
        pieces[::2] = map(escape, pieces[::2])  # not what is code
        paragraphs.append("`".join(pieces))
    return "\n\n".join(paragraphs)


def escape(text: str) -> str:
    """A text in which no sign is Markdown or HTML."""
    text = re.sub(r"([\\*_\[\]])", r"\\\1", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return " ".join(markdown(text).replace("|", "\\|").split())


def code(text: str) -> str:
    """Code in a cell of a table; "" stays empty."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def code_block(lines: list[str]) -> str:
    return "```\n" + "\n".join(lines) + "\n```"


def anchor(name: str) -> str:
    """The place of a method on its kind's page."""
    return name.replace("/", "-")
