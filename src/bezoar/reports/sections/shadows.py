"""The page of a shadows run: logits of encoders that each bank had not seen, the learnt queries, every shadow encoder."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bezoar.auditing.audits import mntd
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.page_parts import Figure, Line, Section, Table, Tile
from bezoar.reports.run_page import Chapter, Story
from bezoar.reports.sections.audit import strip_rows
from bezoar.verbs.shadows import SHADOWS_FILE


class Shadows(Story):
    """A strip chart, pictures, a table."""

    @functools.cached_property
    def shadows(self) -> list[dict[str, Any]]:
        """Every shadow encoder, as `shadows.json` holds it."""
        return list(self.json(SHADOWS_FILE)["shadows"])

    @property
    def attacked(self) -> bool:
        """The artefact is a meta-classifier."""
        return False

    def headline(self) -> str:
        """What it is worth."""
        area = self.measures.get("auroc")
        if area is None:
            return "This meta-classifier was not finished."
        bad, clean = (
            metric_names.quantity(int(self.notes[k]), noun)
            for k, noun in (("attacked", "attacked encoder"), ("clean", "clean one"))
        )
        told = f"MNTD over {bad} and {clean}, told apart by cross-validation with an AUROC of {area.value:.2f}"
        chance = "; that is not shown to be better than chance" if area.low <= 0.5 else ""
        return f"{told} (95 % interval {area.low:.2f} – {area.high:.2f}){chance}."

    def more(self) -> str:
        """What was not seen by whom, and who may not be judged."""
        if "auroc" not in self.measures:
            return ""
        lineages = metric_names.quantity(int(self.notes["lineages"]), "lineage")
        return (
            f"{metric_names.quantity(int(self.notes['folds']), 'fold')}, {lineages}: an encoder and what was tuned from it stay in one "
            f"fold. What is held out carries attacks that the rest carries too; of others this says nothing. `bezoar audit "
            f"--audit mntd:bank=RUN`, with the path of this run, asks it of other encoders; these it refuses to judge."
        )

    def cards(self) -> list[str]:
        """AUROC first."""
        return list(self.measures)

    def chapters(self) -> list[Chapter]:
        """Logits, queries, encoders."""
        return [self.logits, self.queries, self.encoders]

    def logits(self) -> Section | None:
        """A dot an encoder."""
        clean = [s["logit"] for s in self.shadows if not s["attacked"]]
        bad = [[s["attack"], s["logit"]] for s in self.shadows if s["attacked"]]
        svg = charts.draw_strips(
            strip_rows(clean, bad),
            [(0.0, "chance", "muted")],
            "logit of a bank that was fitted without it",
        )
        figure = Figure(
            svg,
            "Clean and attacked encoders, each held out",
            "A dot an encoder; higher is more suspicious.",
        )
        return Section("What the meta-classifier says of encoders it has not seen", [figure])

    def queries(self) -> Section | None:
        """The images that all are asked."""
        images = torch.from_numpy(self.tensors(mntd.FILE)["queries"]).byte()
        tiles = [
            Tile((i,), [Line("from an image" if i % 2 else "from noise", "muted")])
            for i in range(len(images))
        ]
        lead = "Learnt together with the meta-classifier, which reads the cosines of their vectors with one another."
        return Section("Queries", [pictures.contact_sheet(images, tiles, 88)], lead)

    def encoders(self) -> Section | None:
        """Every encoder with its fold and its logit."""
        rows = []
        for s in sorted(self.shadows, key=lambda s: -s["logit"]):
            names = [
                pictures.shorten(s[k], most)
                for k, most in (("name", 60), ("attack", 40), ("trigger", 80), ("lineage", 60))
            ]
            rows.append(
                [names[0], names[1] or "clean", *names[2:], str(s["fold"] + 1), f"{s['logit']:.3g}"]
            )
        return Section(
            "Encoders",
            [Table(("Encoder", "Attack", "Trigger", "Lineage", "Fold", "Logit"), rows, (4, 5))],
        )
