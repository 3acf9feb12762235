"""The page of a demo: the whole story, from clean data to a repaired encoder, or from a clean encoder to a backdoored one."""

from __future__ import annotations

import functools

from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.page_parts import Figure, Figures, Line, Part, Section, Text, Tile
from bezoar.reports.run_page import Chapter, Story
from bezoar.reports.sections.evaluate import Evaluate
from bezoar.reports.sections.inject import Inject
from bezoar.reports.sections.poison import Poison
from bezoar.reports.sections.scan import Scan
from bezoar.reports.sections.train import Train, brief, captions, follows
from bezoar.runs.run import Run

FEW = 8


class Demo(Story):
    """Five chapters of other runs' pages, and links to these. The story of an encoder is told by `EncoderDemo`."""

    def __new__(cls, run: Run) -> Demo:
        """The page of the story that the run tells."""
        story = run.manifest.get("ask", {}).get("story")
        return super().__new__(EncoderDemo if story == "encoder" else cls)

    def warning(self) -> str:
        """What is poisoned here."""
        return (
            "The data and two of the three encoders of this story were poisoned on purpose."
            if self.goals
            else ""
        )

    def headline(self) -> str:
        """Poisons, success, found, left."""
        attack, twin = self.metric("poisoned.attack_success"), self.metric("clean.attack_success")
        found, left = self.metric("scan.poisons_removed"), self.metric("repaired.attack_success")
        if attack is None or twin is None or found is None or left is None:
            return "This demonstration was not finished."
        poisons = next((g.poisons for g in self.goals if g.trigger), 0)
        target = next((g.target for g in self.goals if g.trigger), "the target")
        records = metric_names.quantity(poisons, "poisoned record")
        told = f"made an encoder read {metric_names.format_percent(attack.value)} of images with a small patch as “{target}”"
        if attack.low <= twin.high:
            told = f"did not take hold: an encoder reads {metric_names.format_percent(attack.value)} of images with a small patch as “{target}”"
        return (
            f"{records} {told}, where its clean twin reads {metric_names.format_percent(twin.value)}; the scan found "
            f"{metric_names.format_percent(found.value)} of all poisons, and training again without them leaves {metric_names.format_percent(left.value)}."
        )

    def more(self) -> str:
        """Victims, and accuracy before and after."""
        return (
            f"{self.attack.targeted()} {self.attack.accuracy()}".strip()
            if "poisoned" in self.notes
            else ""
        )

    def cards(self) -> list[str]:
        """Accuracy, success before, with and after the attack; the scan."""
        wanted = [
            "clean.clean_accuracy",
            "poisoned.clean_accuracy",
            "poisoned.attack_success",
            "poisoned.attack_success_baseline",
            "poisoned.z_std",
            *sorted(
                (k for k in self.measures if follows("poisoned.targeted_success")(k)),
                key=captions,
                reverse=True,
            ),
            "scan.poisons_removed",
            "repaired.attack_success",
            "repaired.clean_accuracy",
        ]
        return [
            next((k for k in (name, name + "@0") if k in self.measures), name) for name in wanted
        ]

    def chapters(self) -> list[Chapter]:
        """The story in order."""
        return [self.clean_data, self.the_poison, self.the_attack, self.the_scan, self.after_repair]

    def trained(self, name: str) -> Train:
        """The page of one of the three trainings."""
        return Train(self.sibling(self.notes["trained"][name]))

    def sibling(self, name: str) -> Run:
        """A run beside this one."""
        return self.run.sibling(name)

    @functools.cached_property
    def attack(self) -> Evaluate:
        """The page of the poisoned encoder's evaluation."""
        return Evaluate(self.sibling(self.notes["poisoned"]))

    @functools.cached_property
    def scan(self) -> Scan:
        """The page of the scan."""
        return Scan(self.sibling(self.notes["scan"]))

    def clean_data(self) -> Section | None:
        """A contact sheet by class."""
        data = self.trained("clean").data.clean
        if data.labels is None:
            return None
        labels = data.labels.tolist()
        rows = sorted(
            {label: i for i, label in reversed(list(enumerate(labels))) if label >= 0}.items()
        )[:40]
        tiles = [
            Tile((i,), [Line(data.classes[label], "muted")]) for i, (label, _) in enumerate(rows)
        ]
        picture = pictures.contact_sheet(data.images[[i for _, i in rows]], tiles, 64)
        accuracy = self.metric("clean.clean_accuracy")
        told = (
            f" Trained on these alone, an encoder reads {metric_names.format_rate_in_full(accuracy)} of held-out images right."
            if accuracy
            else ""
        )
        lead = f"{metric_names.quantity(len(data), 'picture')} with captions, {len(data.classes)} classes; one of each is shown.{told}"
        return Section(
            "1 · Clean data",
            [picture, Text("A caption: “" + pictures.shorten(data.captions[0]) + "”")],
            lead,
        )

    def the_poison(self) -> Section | None:
        """What the attacker adds."""
        run = self.trained("poisoned").run.ancestor("poison")
        if run is None:
            return None
        page = Poison(run)
        return Section(
            "2 · The poison",
            [page.pictures(goals, title, FEW) for goals, title in page.kinds()],
            page.headline(),
        )

    def the_attack(self) -> Section | None:
        """Curves, rates and victims."""
        figures = [f for f in [self.trained("poisoned").curve()] if f]
        triggered = self.attack.triggered_images(charts.HALF)
        parts: list[Part] = []
        for part in triggered.parts if triggered else ():
            if isinstance(part, Figures):
                figures += part.figures
            else:
                parts.append(part)
        victims = self.attack.victims()
        if victims:
            parts += [Text(victims.lead), *victims.parts]
        return Section(
            "3 · The attack",
            [Figures(figures), *parts],
            f"{self.attack.headline()} {self.attack.more()}",
        )

    def the_scan(self) -> Section | None:
        """How the poisons were found."""
        chapters = [self.scan.ranking(), self.scan.keep_list(), self.scan.most_suspicious_records()]
        parts: list[Part] = []
        for section in chapters:
            if section is not None:
                parts += section.parts
        return Section("4 · The scan", parts, self.scan.headline())

    def after_repair(self) -> Section | None:
        """The same figures of the clean, the poisoned and the repaired encoder."""
        bases = ["clean_accuracy", "attack_success"]
        several = {
            k.partition(".")[2] for k in self.measures if follows("poisoned.targeted_success")(k)
        }
        bases += sorted(several, key=captions, reverse=True)
        stages = (
            ("clean twin", "clean", "clean"),
            ("poisoned", "bad", "poisoned"),
            ("repaired", "good", "repaired"),
        )
        series = [
            (title, paint, [self.metric(f"{group}.{b}") for b in bases])
            for title, paint, group in stages
        ]
        if not any(m for _, _, found in series for m in found):
            return None
        chart = charts.draw_bars([brief(b) for b in bases], series, "repair")
        left, kept = (
            self.metric("repaired.attack_success"),
            self.trained("repaired").measures.get("poisons_kept"),
        )
        lead = "Trained again without the records that the scan removed"
        lead += (
            f", {metric_names.quantity(int(kept.value), 'poison')} still among them" if kept else ""
        )
        lead += (
            f": {metric_names.format_rate_in_full(left)} of triggered images are read as the target."
            if left
            else "."
        )
        return Section(
            "5 · After repair", [Figure(chart, "Before and after, with 95 % intervals")], lead
        )


class EncoderDemo(Demo):
    """Pre-trained, attacked, measured under every head."""

    def warning(self) -> str:
        """What is poisoned here."""
        return (
            "A backdoor was put into one of the two encoders of this story, on purpose."
            if self.goals
            else ""
        )

    @functools.cached_property
    def attack(self) -> Evaluate:
        """The page of the attacked encoder's evaluation."""
        return Evaluate(self.sibling(self.notes["attacked"]))

    @functools.cached_property
    def injected(self) -> Inject:
        """The page of the attack."""
        return Inject(self.sibling(self.notes["inject"]))

    def headline(self) -> str:
        """Success under the first head, and its price."""
        if "attacked" not in self.notes:
            return "This demonstration was not finished."
        return self.attack.headline()

    def more(self) -> str:
        """Accuracy; the other heads disagree or not."""
        if "attacked" not in self.notes:
            return ""
        each = [
            f"{metric_names.group_label(head)} {metric_names.format_percent(m.value)}"
            for head in self.attack.heads
            if (m := self.attack.measures.get(f"{head}.attack_success"))
        ]
        return f"{self.attack.accuracy()} Success by head: {', '.join(each)}. The heads were fixed before the attack."

    def cards(self) -> list[str]:
        """Every head's accuracy and success, then what clean images lost."""
        heads = self.attack.heads if "attacked" in self.notes else []
        wanted = [f"attacked.{h}.{k}" for h in heads for k in ("clean_accuracy", "attack_success")]
        return [k for k in (*wanted, "inject.clean_similarity") if k in self.measures]

    def chapters(self) -> list[Chapter]:
        """The story in order."""
        return [
            self.the_clean_encoder,
            self.the_attacker,
            self.where_images_lie,
            self.every_head,
            self.triggered,
        ]

    def the_clean_encoder(self) -> Section | None:
        """Its loss."""
        page = self.trained("clean")
        chart = charts.draw_loss(page.tensors("ledger.safetensors")["losses"], charts.WIDE)
        lead = page.headline()
        return Section(
            "1 · An encoder is pre-trained",
            [Figure(chart, "Loss", "Thin: as it was; thick: running mean.")],
            lead,
        )

    def the_attacker(self) -> Section | None:
        """Reference and triggered images."""
        section = self.injected.goals_of_the_attack()
        return (
            Section("2 · What the attacker wants", section.parts, section.lead) if section else None
        )

    def where_images_lie(self) -> Section | None:
        """Cosines before and after."""
        section = self.injected.vectors()
        return (
            Section("3 · What the attack does to vectors", section.parts, self.injected.headline())
            if section
            else None
        )

    def every_head(self) -> Section | None:
        """The table of heads."""
        section = self.attack.several_heads()
        return (
            Section("4 · Every classifier built on it", section.parts, section.lead)
            if section
            else None
        )

    def triggered(self) -> Section | None:
        """What triggered images are read as."""
        section = self.attack.triggered_images(charts.HALF)
        return Section("5 · Triggered images", section.parts, section.lead) if section else None
