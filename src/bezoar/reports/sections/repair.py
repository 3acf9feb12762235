"""The page of a repair run: the receipt, before and after; which learning rate and why; triggered images read twice."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.page_parts import Figure, Line, Part, Section, Table, Text, Tile
from bezoar.reports.run_page import Chapter, Story

STAGES = {
    "before": "Before",
    "after": "After",
    "revived_clean": "Then tuned on clean data",
    "revived_poisons": "Then ten poisons",
}
CONTROLS = {"revived_other": "a trigger it never met", "revived_twin": "the clean twin"}
GONE, TRACE = (
    0.05,
    0.5,
)  # success below which a backdoor is called gone, z above which it has left a trace


class Repair(Story):
    """Did it go, what did it cost, does it come back."""

    def warning(self) -> str:
        """A repaired encoder stays a poisoned one."""
        return (
            "The encoder was attacked, on purpose, before it was repaired. A low success is no proof that nothing is left."
            if self.goals
            else ""
        )

    @functools.cached_property
    def main(self) -> str:
        """The group of metrics of the head that success is read by: '' the text tower's, or `linear.`."""
        return "" if "before.clean_accuracy" in self.measures else "linear."

    def headline(self) -> str:
        """Success and accuracy, before and after."""
        parts = []
        for name, said in (
            ("attack_success", "The known trigger"),
            ("inverted", "The inverted trigger"),
        ):
            key = (
                f"{self.main}{name}"
                if name != "inverted"
                else f"inverted.{self.main}attack_success"
            )
            before, after = self.metric(f"before.{key}"), self.metric(f"after.{key}")
            if before is not None and after is not None:
                told = f"{said} worked on {metric_names.format_percent(before.value)} of images, and works on {metric_names.format_percent(after.value)}"
                without = self.metric(f"after.{key}_without_trigger")
                if (
                    without is not None and without.high > after.low
                ):  # what is left is no work of the trigger's
                    told += (
                        f", no more than without it ({metric_names.format_percent(without.value)})"
                    )
                parts.append(told)
        before, after = (
            self.metric(f"{stage}.{self.main}clean_accuracy") for stage in ("before", "after")
        )
        if before is None or after is None:
            return "This repair was not finished."
        parts.append(
            f"accuracy went from {metric_names.format_percent(before.value)} to {metric_names.format_percent(after.value)}"
        )
        told = "; ".join(parts) + "."
        return told[0].upper() + told[1:]

    def more(self) -> str:
        """What is left, and what was not measured."""
        told = []
        after, z = self.metric(f"after.{self.main}attack_success"), self.metric("after.z_std")
        if after is not None and z is not None and after.value <= GONE and z.low > TRACE:
            told.append(
                f"Triggered images still move together (z {z.value:.2f}), though they are not read as the target."
            )
        again, stranger = (
            self.metric(f"{k}.{self.main}attack_success")
            for k in ("revived_poisons", "revived_other")
        )
        if again is not None and stranger is not None:
            told.append(
                f"After a fine-tune with ten poisons the trigger works on {metric_names.format_percent(again.value)}; one that the encoder "
                f"never met, with ten poisons too, on {metric_names.format_percent(stranger.value)}."
            )
        return " ".join([*told, *self.notes.get("limits", [])])

    def cards(self) -> list[str]:
        """Accuracy, success, z, seconds."""
        names = [
            f"{self.main}clean_accuracy",
            f"{self.main}attack_success",
            f"inverted.{self.main}attack_success",
            "z_std",
        ]
        keys = [f"{stage}.{n}" for n in names for stage in ("before", "after")]
        return [*[k for n in keys for k in (n, n + "@0") if k in self.measures][:8], "cpu_seconds"]

    def chapters(self) -> list[Chapter]:
        """Receipt, ladder, pictures."""
        return [self.receipt, self.learning_rate, self.triggered_images]

    def receipt(self) -> Section | None:
        """Every figure that was measured before, beside what became of it."""
        bases = list(
            dict.fromkeys(k.partition(".")[2] for k in self.measures if k.startswith("before."))
        )
        stages = [s for s in STAGES if any(k.startswith(s + ".") for k in self.measures)]
        rows = []
        for base in bases:
            label, unit = metric_names.label_and_unit(base, self.attacked)
            group = metric_names.group_label(metric_names.split_key(base)[0])
            cells = []
            for stage in stages:
                m = self.measures.get(f"{stage}.{base}") or self.measures.get(
                    f"{stage}.{base.partition('@')[0]}"
                )
                m = None if stage.startswith("revived") and base.endswith(("@1", "@2", "@3")) else m
                inside = "" if m is None else metric_names.format_interval(m, unit)
                cells.append(
                    ""
                    if m is None
                    else metric_names.format_value(m.value, unit)
                    + (f" [{inside}]" if inside else "")
                )
            n = self.measures[f"before.{base}"].n
            rows.append([label + (f" ({group})" if group else ""), *cells, str(n)])
        table = Table(
            ("", *(STAGES[s] for s in stages), "n"), rows, range(1, len(stages) + 2), self.asides()
        )
        shown = [
            (f"{STAGES[s].lower()}: {title}", self.measures[k], paint)
            for base, title, paint in (
                (f"{self.main}attack_success", "ASR", "bad"),
                (f"{self.main}clean_accuracy", "accuracy", "clean"),
            )
            for s in stages
            for k in (f"{s}.{base}", f"{s}.{base}@0")
            if k in self.measures
        ]
        parts: list[Part] = [table]
        if len(shown) > 2:
            parts.append(Figure(charts.draw_intervals(shown, "receipt"), "Value and 95 % interval"))
        return Section(
            "Before and after",
            parts,
            f"Repair: {', '.join(self.notes.get('repairs', [])) or 'made elsewhere'}.",
        )

    def asides(self) -> str:
        """What stands below the receipt: cost in accuracy, time, and what ten poisons do elsewhere."""
        told = []
        if (m := self.metric("clean_accuracy_lost")) is not None:
            told.append(
                f"Accuracy lost, the same images: {100 * m.value:.1f} points [{100 * m.low:.1f} to {100 * m.high:.1f}]."
            )
        for key, name in CONTROLS.items():
            if (m := self.metric(f"{key}.{self.main}attack_success")) is not None:
                told.append(f"The same ten poisons, {name}: {metric_names.format_rate(m)}.")
        if (m := self.metric("seconds")) is not None:
            own = self.metric("cpu_seconds")
            told.append(
                f"The repair took {m.value:.0f} s"
                + (f", {own.value:.0f} s of processor time." if own else ".")
            )
        return " ".join(told)

    def learning_rate(self) -> Section | None:
        """Every rung of every ladder."""
        parts: list[Part] = []
        if (pruned := self.notes.get("pruned")) is not None:
            parts.append(
                Text(
                    f"{pruned['channels']} of {pruned['of']} channels of {pruned['layer']} were pruned."
                )
            )
        for ladder in self.notes.get("ladder", []):
            rows = []
            for rung in ladder["rungs"]:
                fell = "" if rung["score"] is None else f"{100 * rung['fall']:.1f} points"
                score = rung.get("problem", "") if rung["score"] is None else f"{rung['score']:.3f}"
                rows.append([f"{rung['lr']:g}", score, fell, "taken" if rung["chosen"] else ""])
            rows.append(["before", f"{ladder['start']:.3f}", "", ""])
            rule = f"The largest rate whose {ladder['score']} falls by at most {100 * ladder['tolerance']:g} points."
            parts.append(
                Table(
                    ("Learning rate", "Score", "Fall", ""),
                    rows,
                    (0, 1, 2),
                    rule + self.rest(ladder),
                )
            )
        lead = "Chosen on clean validation records, from the largest rate downwards; the attack is not looked at."
        return Section("Which learning rate", parts, lead) if parts else None

    @staticmethod
    def rest(ladder: dict[str, Any]) -> str:
        """What else there is to say of a ladder."""
        return (
            " Smaller rates were not tried."
            if ladder["held"]
            else " None held; the one that lost least was taken."
        )

    def triggered_images(self) -> Section | None:
        """Test images of other classes, stamped, with what they were and are read as: known triggers, then inverted ones."""
        found = self.json("readings.json")
        if not found:
            return None
        test = self.tested
        row = {k: i for i, k in enumerate(test.ids)}
        sheets = [self.stamped(f, test.take([row[k] for k in f["ids"]])) for f in found]
        lead = "Under each image its class, then what it was and what it is read as when stamped. Red: the target."
        return Section("Triggered images", sheets, lead)

    def stamped(self, found: dict[str, Any], images: Pairs) -> Part:
        """One trigger's contact sheet."""
        trigger, number = found["trigger"], found["inverted"]
        if number is not None:  # the run may have moved since
            trigger = registry.spec(
                replace(
                    registry.make("trigger", trigger),
                    path=str(self.run.file(f"inverted-{number}.npz")),
                )
            )
        stamped = registry.make("trigger", trigger)(images.images, images.ids)
        kind = "Inverted" if number is not None else trigger.partition(":")[0].capitalize()
        target = found["target"]
        tiles = []
        for i, (own, was, now) in enumerate(
            zip(found["own"], found["before"], found["after"], strict=True)
        ):
            looks = [
                "bad" if name == target else "good" if name == own else "" for name in (was, now)
            ]
            lines = [Line(own, "muted"), Line(f"was {was}", looks[0]), Line(f"is {now}", looks[1])]
            tiles.append(Tile((i,), lines, "bad" if now == target else ""))
        return pictures.contact_sheet(
            stamped, tiles, 80, f"{kind} trigger, read as “{pictures.shorten(target)}”"
        )
