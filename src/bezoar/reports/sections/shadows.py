"""The page of a shadows run: logits of held-out encoders, queries, shadow encoders."""

import functools
from functools import partial
from typing import Any

import torch

from bezoar.auditing.audits import mntd
from bezoar.reports import charts, pictures
from bezoar.reports.charts import Mark
from bezoar.reports.metric_names import quantity
from bezoar.reports.page_parts import Figure, Line, Section, Table, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import encoder_strips
from bezoar.runs.run import Run
from bezoar.verbs.shadows import SHADOWS_FILE


class ShadowsView(RunView):
    """A shadows run."""

    @functools.cached_property
    def shadows(self) -> list[dict[str, Any]]:
        """The shadow encoders."""
        return list(self.read_json(SHADOWS_FILE)["shadows"])


def build_page(run: Run) -> Page:
    """Return the page of a shadows run."""
    view = ShadowsView(run)
    if "auroc" not in view.measures:
        return Page("This meta-classifier was not finished.")
    return Page(
        headline(view),
        lead(view),
        cards=list(view.measures),
        sections={
            "What the meta-classifier says about encoders it has not seen": partial(
                logit_section, view
            ),
            "Queries": partial(query_section, view),
            "Encoders": partial(encoder_section, view),
        },
    )


def headline(view: ShadowsView) -> str:
    """State how well the meta-classifier separates attacked from clean encoders."""
    area = view.measures["auroc"]
    attacked = quantity(int(view.notes["attacked"]), "attacked encoder")
    clean = quantity(int(view.notes["clean"]), "clean one")
    chance = "; that is not shown to be better than chance" if area.low <= 0.5 else ""
    return (
        f"MNTD over {attacked} and {clean} tells them apart with a cross-validated AUROC of "
        f"{area.value:.2f} (95 % interval {area.low:.2f} – {area.high:.2f}){chance}."
    )


def lead(view: ShadowsView) -> str:
    """State what was held out, and which encoders may be audited."""
    folds = quantity(int(view.notes["folds"]), "fold")
    lineages = quantity(int(view.notes["lineages"]), "lineage")
    return (
        f"{folds}, {lineages}: an encoder and those that were tuned from it are in one fold. The "
        "attacks of held-out encoders occur among the others too; this says nothing about other "
        "attacks. `bezoar audit --audit mntd:bank=RUN`, with the path of this run, audits other "
        "encoders; it refuses to judge these."
    )


def logit_section(view: ShadowsView) -> Section:
    """Show the logit of each encoder."""
    clean = [s["logit"] for s in view.shadows if not s["attacked"]]
    attacked = [(s["attack"], s["logit"]) for s in view.shadows if s["attacked"]]
    svg = charts.draw_strips(
        encoder_strips(clean, attacked),
        [Mark(0.0, "chance", "muted")],
        "logit of a meta-classifier that was fitted without the encoder",
    )
    note = "A dot for each encoder; higher is more suspicious."
    return Section([Figure(svg, "Clean and attacked encoders, each held out", note)])


def query_section(view: ShadowsView) -> Section:
    """Show the images that all encoders embed."""
    images = torch.from_numpy(view.read_tensors(mntd.FILE)["queries"]).byte()
    tiles = [
        Tile((i,), [Line("from an image" if i % 2 else "from noise", "muted")])
        for i in range(len(images))
    ]
    lead = (
        "Learnt together with the meta-classifier, which reads the cosines of their vectors with "
        "one another."
    )
    return Section([pictures.contact_sheet(images, tiles, 88)], lead)


def encoder_section(view: ShadowsView) -> Section:
    """List the encoders with their folds and logits."""
    rows = [
        [
            pictures.shorten(s["name"], 60),
            pictures.shorten(s["attack"], 40) or "clean",
            pictures.shorten(s["trigger"], 80),
            pictures.shorten(s["lineage"], 60),
            str(s["fold"] + 1),
            f"{s['logit']:.3g}",
        ]
        for s in sorted(view.shadows, key=lambda s: -s["logit"])
    ]
    head = ("Encoder", "Attack", "Trigger", "Lineage", "Fold", "Logit")
    return Section([Table(head, rows, (4, 5))])
