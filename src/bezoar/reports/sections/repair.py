"""The page of a repair run: figures and readings before and after, and learning rates."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from bezoar import registry
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import IntervalRow
from bezoar.reports.metric_names import format_measure, format_percent
from bezoar.reports.page_parts import Figure, Gallery, Line, Part, Section, Step, Table, Text, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.runs.inputs import recorded_trigger
from bezoar.runs.run import Run

STAGES = {
    "before": "Before",
    "after": "After",
    "revived_clean": "Then tuned on clean data",
    "revived_poisons": "Then ten poisons",
}
CONTROLS = {"revived_other": "a trigger it never met", "revived_twin": "the clean twin"}
GONE = 0.05  # largest success of a backdoor that counts as removed
TRACE = 0.5  # z-score above which it has left a trace


class RepairView(RunView):
    """A repair run."""

    @functools.cached_property
    def head(self) -> str:
        """The metrics' group for success: `own.`, '' for the text tower's, or `linear.`."""
        if "before.own.clean_accuracy" in self.measures:
            return "own."
        return "" if "before.clean_accuracy" in self.measures else "linear."

    @property
    def stages(self) -> list[str]:
        """The stages that were measured."""
        return [s for s in STAGES if any(key.startswith(f"{s}.") for key in self.measures)]


def build_page(run: Run) -> Page:
    """Return the page of a repair run."""
    view = RepairView(run)
    warning = (
        "The encoder was attacked on purpose before it was repaired. A low success does not prove "
        "that nothing is left."
    )
    return Page(
        headline(view),
        lead(view),
        warning if view.goals else "",
        cards(view),
        {
            "Before and after": partial(receipt_section, view),
            "Which learning rate": partial(rate_section, view),
            "Triggered images": partial(triggered_section, view),
        },
        bool(view.goals),
        look=success_look(view),
        steps=next_steps(view),
    )


def success_look(view: RepairView) -> str:
    """'good' where the known trigger is gone, 'bad' where it is not, '' where none is known."""
    after = view.metric(f"after.{view.head}attack_success")
    return "" if after is None else "good" if after.high <= GONE else "bad"


def next_steps(view: RepairView) -> list[Step]:
    """List the next steps after a repair."""
    if not view.stages:
        return []
    name, data = view.run.name, view.input_text("data")
    steps = []
    if success_look(view) == "bad":
        used = {spec.partition(":")[0] for spec in view.notes.get("repairs", [])}
        others = [name for name in registry.method_names("repair") if name not in used]
        encoder = view.input_text("encoder")
        if others:
            text = f"The trigger still works. Try another repair, such as {', '.join(others)}."
            command = view.command(f"repair {encoder} --data {data} --repair {others[0]}")
            steps.append(Step(text, command))
    audit = view.command(f"audit {name} --data {data}")
    steps.append(Step("Audit what is left: a backdoor that no trigger shows may come back.", audit))
    if view.goals:
        text = "Or train again without what a scan of the training data ranks highest."
        trained = view.run.ancestor("train")
        if trained is not None:
            steps.append(Step(text, view.command(f"scan {trained.name} --fail-on trigger")))
    return steps


def headline(view: RepairView) -> str:
    """State success and accuracy before and after."""
    before, after = (view.metric(f"{s}.{view.head}clean_accuracy") for s in ("before", "after"))
    if before is None or after is None:
        return "This repair was not finished."
    phrases = [
        success_phrase(view, f"{view.head}attack_success", "the known trigger"),
        success_phrase(view, f"inverted.{view.head}attack_success", "the inverted trigger"),
        f"accuracy went from {format_percent(before.value)} to {format_percent(after.value)}",
    ]
    sentence = "; ".join(filter(None, phrases))
    return f"{sentence[0].upper()}{sentence[1:]}."


def success_phrase(view: RepairView, key: str, trigger: str) -> str:
    """State the success of a trigger before and after; empty if it was not measured."""
    before, after = view.metric(f"before.{key}"), view.metric(f"after.{key}")
    if before is None or after is None:
        return ""
    phrase = (
        f"{trigger} worked on {format_percent(before.value)} of images and now works on "
        f"{format_percent(after.value)}"
    )
    without = view.metric(f"after.{key}_without_trigger")
    if without is not None and without.high > after.low:
        # The images that are left are read as the target without the trigger too.
        phrase += f", no more than without it ({format_percent(without.value)})"
    return phrase


def lead(view: RepairView) -> str:
    """Describe the rest of the backdoor, how easily it returns, and the limits."""
    sentences = []
    after, z = view.metric(f"after.{view.head}attack_success"), view.metric("after.z_std")
    if after is not None and z is not None and after.value <= GONE and z.low > TRACE:
        sentences.append(
            f"Triggered images still move together (z {z.value:.2f}), though they are not read as "
            "the target."
        )
    revived, other = (
        view.metric(f"{stage}.{view.head}attack_success")
        for stage in ("revived_poisons", "revived_other")
    )
    if revived is not None and other is not None:
        sentences.append(
            "After a fine-tune with ten poisons the trigger works on "
            f"{format_percent(revived.value)} of images; a trigger that the encoder never met, "
            f"with ten poisons too, on {format_percent(other.value)}."
        )
    return " ".join([*sentences, *view.notes.get("limits", [])])


def cards(view: RepairView) -> list[str]:
    """Return accuracy, success and z-score before and after, then the cost."""
    names = [
        f"{view.head}clean_accuracy",
        f"{view.head}attack_success",
        f"inverted.{view.head}attack_success",
        "z_std",
    ]
    keys = [f"{stage}.{name}" for name in names for stage in ("before", "after")]
    keys = [k for key in keys for k in (key, f"{key}@0") if k in view.measures]
    return [*keys[:8], "cpu_seconds"]


def receipt_section(view: RepairView) -> Section:
    """Show every metric before the repair beside its values afterwards."""
    names = dict.fromkeys(
        key.removeprefix("before.") for key in view.measures if key.startswith("before.")
    )
    rows = []
    for name in names:
        label, unit = metric_names.label_and_unit(name, bool(view.goals))
        group = metric_names.group_label(metric_names.split_key(name)[0])
        measures = [stage_measure(view, stage, name) for stage in view.stages]
        cells = [format_measure(m, unit) if m else "" for m in measures]
        n = view.measures[f"before.{name}"].n
        rows.append([label + (f" ({group})" if group else ""), *cells, str(n)])
    head = ("", *(STAGES[s] for s in view.stages), "n")
    parts: list[Part] = [Table(head, rows, range(1, len(head)), costs(view))]
    intervals = receipt_intervals(view)
    if len(intervals) > 2:
        svg = charts.draw_intervals(intervals)
        parts.append(Figure(svg, "Value and 95 % interval"))
    repairs = ", ".join(view.notes.get("repairs", [])) or "made elsewhere"
    return Section(parts, f"Repair: {repairs}.")


def stage_measure(view: RepairView, stage: str, name: str) -> Measure | None:
    """Return a metric at a stage. After a relapse only the first trigger was measured."""
    base, _, suffix = name.partition("@")
    if stage.startswith("revived") and suffix not in ("", "0"):
        return None
    return view.measures.get(f"{stage}.{name}") or view.measures.get(f"{stage}.{base}")


def receipt_intervals(view: RepairView) -> list[IntervalRow]:
    """Return success and accuracy at each stage."""
    rows = []
    for name, title, colour in (
        ("attack_success", "ASR", "bad"),
        ("clean_accuracy", "accuracy", "clean"),
    ):
        for stage in view.stages:
            measure = view.metric(f"{stage}.{view.head}{name}")
            if measure is not None:
                rows.append(IntervalRow(f"{STAGES[stage].lower()}: {title}", measure, colour))
    return rows


def costs(view: RepairView) -> str:
    """State the cost in accuracy and time, and the effect of ten poisons in controls."""
    sentences = []
    if (lost := view.metric("clean_accuracy_lost")) is not None:
        value, low, high = (100 * x for x in (lost.value, lost.low, lost.high))
        sentences.append(
            f"Accuracy lost on the same images: {value:.1f} points [{low:.1f} to {high:.1f}]."
        )
    for stage, name in CONTROLS.items():
        if (success := view.metric(f"{stage}.{view.head}attack_success")) is not None:
            sentences.append(f"The same ten poisons, {name}: {format_measure(success)}.")
    if (seconds := view.metric("seconds")) is not None:
        cpu = view.metric("cpu_seconds")
        aside = f", {cpu.value:.0f} s of processor time" if cpu else ""
        sentences.append(f"The repair took {seconds.value:.0f} s{aside}.")
    return " ".join(sentences)


def rate_section(view: RepairView) -> Section | None:
    """Show every learning rate that was tried."""
    parts: list[Part] = []
    if (pruned := view.notes.get("pruned")) is not None:
        parts.append(
            Text(
                f"{pruned['channels']} of {pruned['of']} channels of {pruned['layer']} were pruned."
            )
        )
    parts += [ladder_table(ladder) for ladder in view.notes.get("ladder", [])]
    lead = (
        "Chosen on clean validation records, from the largest rate downwards, without looking at "
        "the attack."
    )
    return Section(parts, lead) if parts else None


def ladder_table(ladder: Mapping[str, Any]) -> Table:
    """Show the rates of one training with their scores."""
    rows = []
    for rung in ladder["rungs"]:
        score, fall = rung.get("problem", ""), ""
        if rung["score"] is not None:
            score, fall = f"{rung['score']:.3f}", f"{100 * rung['fall']:.1f} points"
        rows.append([f"{rung['lr']:g}", score, fall, "chosen" if rung["chosen"] else ""])
    rows.append(["before", f"{ladder['start']:.3f}", "", ""])
    rule = (
        f"The largest rate whose {ladder['score']} falls by at most {100 * ladder['tolerance']:g} "
        "points."
    )
    if ladder["held"]:
        rule += " Smaller rates were not tried."
    else:
        rule += " No rate did so; the one that lost least was chosen."
    return Table(("Learning rate", "Score", "Fall", ""), rows, (0, 1, 2), rule)


def triggered_section(view: RepairView) -> Section | None:
    """Show triggered test images of other classes with their readings before and after."""
    readings = view.read_json("readings.json")
    if not readings:
        return None
    galleries = [triggered_gallery(view, reading) for reading in readings]
    lead = (
        "Under each image its class, then what it was and what it is read as with the trigger. "
        "Red: the target."
    )
    return Section(galleries, lead)


def triggered_gallery(view: RepairView, reading: Mapping[str, Any]) -> Gallery:
    """Show the images of one known or inverted trigger."""
    row_of = {k: i for i, k in enumerate(view.test_pairs.ids)}
    images = view.test_pairs.take([row_of[k] for k in reading["ids"]])
    trigger, number, target = reading["trigger"], reading["inverted"], reading["target"]
    kind = trigger.partition(":")[0].capitalize()
    if number is not None:
        # The run may have been moved since, so the path in the spec may be outdated.
        path = str(view.run.file(f"inverted-{number}.npz"))
        stamp = replace(registry.make("trigger", "file:x.npz"), path=path)
        kind = "Inverted"
    else:
        stamp = recorded_trigger(trigger, view.run)
    triggered = stamp(images.images, images.ids)
    tiles = []
    for i, (label, before, after) in enumerate(
        zip(reading["own"], reading["before"], reading["after"], strict=True)
    ):
        looks = {label: "good", target: "bad"}
        lines = [
            Line(label, "muted"),
            Line(f"was {before}", looks.get(before, "")),
            Line(f"is {after}", looks.get(after, "")),
        ]
        tiles.append(Tile((i,), lines, "bad" if after == target else ""))
    title = f"{kind} trigger, read as “{pictures.shorten(target)}”"
    return pictures.contact_sheet(triggered, tiles, 80, title)
