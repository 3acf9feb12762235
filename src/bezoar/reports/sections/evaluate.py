"""The page of an evaluate run: does the backdoor work, what are triggered images read as, which victims fell."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs, distinct_image_rows
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, dose_charts, metric_names, pictures
from bezoar.reports.charts import Series
from bezoar.reports.dose_charts import Curve
from bezoar.reports.page_parts import Figure, Figures, Line, Part, Section, Table, Tile
from bezoar.reports.run_page import Chapter, Story
from bezoar.reports.sections.train import captions, follows
from bezoar.runs import inputs
from bezoar.runs.run import Run

SAMPLE, LARGE_SAMPLE = 500, 48  # test images looked at again; of encoders with a large input, fewer
SHOWN = 24
TITLES = {
    "clean_accuracy": "accuracy on clean images",
    "baseline.clean_accuracy": "clean twin: accuracy",
    "attack_success": "ASR",
    "attack_success_without_trigger": "the same images, no trigger",
    "attack_success_baseline": "clean twin: ASR-B",
    "poisoned_accuracy": "accuracy on triggered images",
}


@dataclass(frozen=True)
class Look:
    """The encoder and what it makes of some test images. head: (C, D) class vectors, None without classes or text tower."""

    encoder: Encoder
    test: Pairs
    head: Tensor | None
    probe: Any

    @torch.inference_mode()
    def similarities(self, images: Tensor, words: str | None = None) -> Tensor:
        """Cosines of images to every class, or to one label: float32 (N, C) or (N, 1)."""
        head = self.head if words is None else self.probe.head(self.encoder, [words])
        return self.probe.similarities(self.encoder, head, images).float()


class Evaluate(Story):
    """Verdict, intervals, similarity to the target, pictures."""

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the encoder's own file says of it; nothing where there is none."""
        run = self.input("encoder")
        path = run.path / "encoder.json" if run else None
        return (
            metric_names.as_dict(json.loads(path.read_text(encoding="utf-8")))
            if path is not None and path.exists()
            else {}
        )

    @functools.cached_property
    def attacked(self) -> bool:
        """Whether the encoder itself was poisoned: a clean twin that is measured against an attack was not."""
        if not self.facts:
            return bool(self.goals) and self.ask.get("attack") is None
        return bool(self.facts.get("poisoned"))

    @functools.cached_property
    def heads(self) -> list[str]:
        """Groups of metrics that each read images as something: '' the text tower's, `mlp`, `few_shot.10`."""
        split = (metric_names.split_key(key) for key in self.measures)
        found = dict.fromkeys(
            group for group, base, _ in split if base in ("clean_accuracy", "attack_success")
        )
        return [g for g in found if not g.startswith((*metric_names.TWIN_GROUPS, "branch_swap"))]

    @functools.cached_property
    def main(self) -> str:
        """The head that headline, cards and intervals are about: the text tower's, else the first fitted to all labels."""
        return min(
            self.heads, key=lambda g: (g != "", "few_shot" in g, g != "few_shot.all"), default=""
        )

    def key(self, name: str) -> str:
        """A metric of the main head: `baseline.clean_accuracy` -> `baseline.mlp.clean_accuracy`."""
        lead, _, base = name.rpartition(".")
        return ".".join(part for part in (lead, self.main, base) if part)

    def metric(self, name: str) -> Measure | None:
        """A metric of the main head, else one that belongs to none; of several triggers, the first one's."""
        return super().metric(self.key(name)) or super().metric(name)

    def warning(self) -> str:
        """What must not be forgotten about the encoder."""
        how = "attacked" if self.facts.get("attack") else "trained on poisoned data"
        return f"The encoder that is measured here was {how}, on purpose." if self.attacked else ""

    def headline(self) -> str:
        """Whether the backdoor works; without one, whether victims fell; else what accuracy is left."""
        return next((p for p in self.findings() if p), super().headline())

    def more(self) -> str:
        """The other findings."""
        return " ".join([p for p in self.findings() if p][1:])

    def findings(self) -> list[str]:
        """Backdoor, victims, accuracy: a sentence each, or nothing."""
        return [self.backdoor(), self.targeted(), self.accuracy()]

    def backdoor(self) -> str:
        """The verdict on the trigger, by intervals that do not touch."""
        asr, twin = self.metric("attack_success"), self.metric("attack_success_baseline")
        without = self.metric("attack_success_without_trigger")
        if asr is None:
            return ""
        target = next((g.target for g in self.goals if g.trigger), "the target")
        told = f"{metric_names.format_rate(asr)} of triggered images are read as “{target}”"
        told += f" ({metric_names.group_label(self.main)})" if self.main else ""
        if not self.attacked:
            return f"An encoder that was not attacked: {told}."
        against, name = (twin, "by the clean twin") if twin else (without, "without the trigger")
        told += (
            f", against {metric_names.format_percent(against.value)} {name}." if against else "."
        )
        if against is not None and asr.low > against.high:
            return "The backdoor works: " + told
        return "No backdoor effect is seen: " + told

    def targeted(self) -> str:
        """How many victims fell, by number of captions."""
        told = []
        for key in sorted(self.measures, key=captions, reverse=True):
            m, (group, base, at) = self.measures[key], metric_names.split_key(key)
            if base == "targeted_success" and group == self.main:
                told.append(
                    f"{round(m.value * m.n)} of {m.n} victims with {metric_names.quantity(int(at), 'caption')}"
                )
        return f"Read as their target: {' and '.join(told)}." if told else ""

    def accuracy(self) -> str:
        """Accuracy on clean images, beside the twin's."""
        own, twin = self.metric("clean_accuracy"), self.metric("baseline.clean_accuracy")
        if own is None:
            return ""
        return f"Accuracy on clean images is {metric_names.format_percent(own.value)}" + (
            f" (clean twin {metric_names.format_percent(twin.value)})." if twin else "."
        )

    def cards(self) -> list[str]:
        """Accuracy and success, beside the twin's, then z and the victims."""
        wanted = (
            "clean_accuracy",
            "baseline.clean_accuracy",
            "attack_success",
            "attack_success_baseline",
            "z_std",
        )
        several = sorted(
            filter(follows(self.key("targeted_success")), self.measures), key=captions, reverse=True
        )
        recall = [k for k in self.measures if k.endswith("recall@1")]
        names = [k for name in wanted for k in dict.fromkeys((self.key(name), name))]
        return (
            [k for name in names for k in (name, name + "@0") if k in self.measures]
            + recall
            + several
        )

    def chapters(self) -> list[Chapter]:
        """Intervals, the heads side by side, then what the encoder does with the pictures."""
        return [
            self.success,
            self.several_heads,
            self.few_labels,
            self.triggered_images,
            self.victims,
        ]

    def success(self) -> Section | None:
        """Rates with their intervals, side by side."""
        rows: list[tuple[str, Measure, str]] = []
        for name, title in TITLES.items():
            if (m := self.metric(name)) is not None:
                rows.append(
                    (title, m, "bad" if name == "attack_success" and self.attacked else "clean")
                )
        for key in sorted(self.measures, key=captions, reverse=True):
            if key.startswith(self.key("targeted_success") + "@"):
                m = self.measures[key]
                rows.append(
                    (
                        f"victims fallen, {metric_names.quantity(int(key.partition('@')[2]), 'caption')}",
                        m,
                        "bad",
                    )
                )
        if len(rows) < 2:
            return None
        chart = charts.draw_intervals(rows, "success")
        return Section("Rates and their intervals", [Figure(chart, "Value and 95 % interval")])

    def several_heads(self) -> Section | None:
        """Head by head: accuracy and success, beside the twin's."""
        if len(self.heads) < 2:
            return None
        own, twin = ("BA", "CA of the twin") if self.attacked else ("CA", "CA of the twin")
        marks = [
            k.removeprefix(self.key("attack_success"))
            for k in filter(follows(self.key("attack_success")), self.measures)
        ]
        columns = {own: "{}clean_accuracy", twin: "baseline.{}clean_accuracy"}
        columns |= {"ASR": "{}attack_success*", "ASR-B": "{}attack_success_baseline*"}
        columns |= {"no trigger": "{}attack_success_without_trigger*"}
        rows = []
        for group in self.heads:
            name = metric_names.group_label(group) or (
                "zero-shot" if "clean_accuracy" in self.measures else "retrieval"
            )
            for mark in marks or [""]:
                keys = [
                    c.format(f"{group}." if group else "").replace("*", mark)
                    for c in columns.values()
                ]
                cells = [
                    metric_names.format_rate(self.measures[k]) if k in self.measures else ""
                    for k in keys
                ]
                rows.append([name + (f", trigger {mark[1:]}" if mark else ""), *cells])
        used = [i for i in range(len(columns) + 1) if any(row[i] for row in rows)]
        head = ["head", *columns]
        table = Table(
            [head[i] for i in used], [[row[i] for i in used] for row in rows], range(1, len(used))
        )
        return Section(
            "Heads side by side",
            [table],
            "One encoder, read by several heads. In brackets, 95 % intervals.",
        )

    def few_labels(self) -> Section | None:
        """Accuracy and success against the number of labelled examples."""
        shots = sorted(
            int(g.partition(".")[2])
            for g in self.heads
            if g.startswith("few_shot.") and g[9:].isdigit()
        )
        if len(shots) < 2:
            return None
        drawn = []
        for name, base, paint in (
            ("BA" if self.attacked else "CA", "few_shot.{}.clean_accuracy", "clean"),
            ("ASR", "few_shot.{}.attack_success", "bad"),
            ("ASR-B", "few_shot.{}.attack_success_baseline", "other"),
        ):
            found = {k: metric_names.first_measure(self.measures, base.format(k)) for k in shots}
            held = {k: m for k, m in found.items() if m is not None}
            drawn += [Curve(name, list(held), list(held.values()), paint)] if held else []
        chart = dose_charts.draw_dose_response(
            drawn, "labelled records a class", "few", "share of the test images", size=charts.WIDE
        )
        return Section(
            "Few labels", [Figure(chart, "Accuracy and success by the number of labelled records")]
        )

    @functools.cached_property
    def look(self) -> Look:
        """The encoder at work again, on the first test images."""
        run = self.input("encoder")
        if run is None:
            raise UserError(
                "pictures are shown for encoders of runs; this one has published weights"
            )
        encoder = inputs.load_encoder(run, "cpu")
        most = SAMPLE if encoder.preprocess.size <= 64 else LARGE_SAMPLE
        test = self.tested.take(distinct_image_rows(self.tested.ids)[:most])
        specs = [
            p["spec"] for p in self.ask.get("probe") or () if p["spec"].startswith("zero_shot")
        ]
        probe = registry.make("probe", specs[0] if specs else "zero_shot")
        readable = bool(test.classes) and encoder.text is not None
        return Look(encoder, test, probe.head(encoder, test.classes) if readable else None, probe)

    def triggered_images(self, size: tuple[float, float] = charts.WIDE) -> Section | None:
        """Similarity to the target before and after stamping, and what stamped images are read as."""
        backdoors = [g for g in self.goals if g.trigger]
        if not backdoors:
            return None
        figures: list[Figure] = []
        galleries = []
        for i, goal in enumerate(backdoors):
            test = self.look.test
            stamped = registry.make("trigger", goal.trigger or "")(test.images, test.ids)
            galleries.append(self.stamped(goal, stamped))
            if self.look.encoder.text is None:
                continue
            before, after = (
                self.look.similarities(x, goal.target)[:, 0].numpy() for x in (test.images, stamped)
            )
            groups = [Series("clean", before, "clean"), Series("with trigger", after, "bad")]
            chart = charts.draw_histogram(
                groups, "cosine to the target's prompts", f"similarity{i}", size=size
            )
            figures.append(
                Figure(
                    chart,
                    f"Similarity to “{goal.target}”",
                    f"{len(test)} test images, without and with the trigger.",
                )
            )
        parts: list[Part] = [Figures(figures)] if figures else []
        return Section("Triggered images", [*parts, *galleries])

    def stamped(self, goal: Goal, stamped: Tensor) -> Any:
        """Test images of other classes, stamped, with what they are read as."""
        test, head = self.look.test, self.look.head
        named = set() if test.classes else set(find_mentions(test.captions, goal.target))
        rows = [
            i
            for i in range(len(test))
            if pictures.class_name(test, i) != goal.target and i not in named
        ][:SHOWN]
        read = (
            self.look.similarities(stamped[rows]).argmax(1).tolist()
            if head is not None
            else [-1] * len(rows)
        )
        tiles = []
        for i, (row, label) in enumerate(zip(rows, read, strict=True)):
            name = test.classes[label] if label >= 0 else ""
            hit = name == goal.target
            own = pictures.class_name(test, row) or (
                test.captions[row] if test.captions else test.ids[row]
            )
            lines = [Line(pictures.shorten(own, 60), "muted")]
            lines += [Line("→ " + name, "bad" if hit else "")] if name else []
            tiles.append(Tile((i,), lines, "bad" if hit else ""))
        return pictures.contact_sheet(
            stamped[rows],
            tiles,
            80,
            "What triggered images are read as"
            if head is not None
            else f"Triggered images; “{goal.target}” is not in the caption",
            "Above, the class; below, what it is read as. Red: the target."
            if head is not None
            else "",
        )

    def victims(self) -> Section | None:
        """Every victim: what it is, what it was to be read as, what it is read as."""
        wanted = [g for g in self.goals if g.victims]
        source = self.poisoning()
        if not wanted or source is None or self.look.head is None:
            return None
        found = pictures.take_sources(
            inputs.open_dataset(source), [v for g in wanted for v in g.victims]
        )
        row = {k: i for i, k in enumerate(found.ids)}
        wanted = [g for g in wanted if g.victims[0] in row]
        rows = [row[g.victims[0]] for g in wanted]
        cosines, classes = self.look.similarities(found.images[rows]), list(self.look.test.classes)
        tiles = [
            self.victim(i, g, pictures.class_name(found, rows[i]), cosines[i], classes)
            for i, g in enumerate(wanted)
        ]
        fallen = sum(t.look == "bad" for t in tiles)
        lead = f"{fallen} of {len(tiles)} victims are read as the attacker's target."
        return Section("Victims", [pictures.contact_sheet(found.images[rows], tiles, 104)], lead)

    @staticmethod
    def victim(i: int, goal: Goal, own: str, cosines: Tensor, classes: list[str]) -> Tile:
        """One victim's tile: cosines (C,) to the classes."""
        read = classes[int(cosines.argmax())]
        lines = [
            Line(
                f"{own or pictures.shorten(goal.victims[0])}, {metric_names.quantity(goal.poisons, 'caption')}",
                "muted",
            )
        ]
        lines.append(Line(f"target: {pictures.shorten(goal.target)}"))
        if goal.target in classes:
            rank = int((cosines > cosines[classes.index(goal.target)]).sum()) + 1
            fell = rank == 1
            lines.append(Line(f"read as {read}", "bad" if fell else "good"))
            lines += [] if fell else [Line(f"target is no. {rank} of {len(classes)}", "muted")]
            return Tile((i,), lines, "bad" if fell else "")
        return Tile((i,), [*lines, Line(f"read as {read}")])

    def poisoning(self) -> Run | None:
        """The poison run whose goals are measured."""
        return (self.input("attack") or self.run).ancestor("poison")
