"""The page of an evaluate run: accuracy, and whether backdoor and targeted attack work."""

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bezoar import registry
from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Goal
from bezoar.data.files.artefacts import read_facts
from bezoar.data.pairs import Pairs, distinct_image_rows
from bezoar.data.stored_pairs import class_name
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.probes.zero_shot import ZeroShot
from bezoar.evaluation.scores import Measure
from bezoar.reports import charts, dose_charts, metric_names, pictures
from bezoar.reports.charts import IntervalRow, Series
from bezoar.reports.dose_charts import Curve
from bezoar.reports.metric_names import format_measure, format_percent, variants
from bezoar.reports.page_parts import Figure, Gallery, Line, Section, Step, Tile
from bezoar.reports.run_page import Page, RunView, metrics_page
from bezoar.reports.shared_parts import measure_table, triggered_texts
from bezoar.runs import inputs
from bezoar.runs.run import Run

SAMPLE = 500  # test images that are embedded again
SMALL_SAMPLE = 48  # the same for encoders whose input is larger than SMALL_INPUT pixels
SMALL_INPUT = 64
SHOWN = 24  # triggered images of a goal
RATES = {
    "clean_accuracy": "accuracy on clean images",
    "baseline.clean_accuracy": "clean twin: accuracy",
    "attack_success": "ASR",
    "attack_success_without_trigger": "the same images, no trigger",
    "attack_success_baseline": "clean twin: ASR-B",
    "poisoned_accuracy": "accuracy on triggered images",
}


class EvaluateView(RunView):
    """An evaluate run. Heads are groups of metrics: '' of the text tower, `few_shot.10` ..."""

    @functools.cached_property
    def encoder_facts(self) -> dict[str, Any]:
        """The encoder's `about`; empty if there is no encoder.json."""
        run = self.run.input_run("encoder")
        path = run.path / "encoder.json" if run else None
        if path is None or not path.exists():
            return {}
        return read_facts(path)

    @functools.cached_property
    def poisoned(self) -> bool:
        """Whether the encoder was poisoned; a clean twin measured against an attack was not."""
        if not self.encoder_facts:
            return bool(self.goals) and self.ask.get("attack") is None
        return bool(self.encoder_facts.get("poisoned"))

    @functools.cached_property
    def heads(self) -> list[str]:
        """The heads that were measured."""
        keys = [metric_names.split_key(key) for key in self.measures]
        groups = dict.fromkeys(
            g for g, base, _ in keys if base in ("clean_accuracy", "attack_success")
        )
        return [g for g in groups if not g.startswith((*metric_names.TWIN_GROUPS, "branch_swap"))]

    @functools.cached_property
    def main_head(self) -> str:
        """The head of headline and cards: the text tower's, else one fitted to all labels."""
        return min(
            self.heads, key=lambda g: (g != "", "few_shot" in g, g != "few_shot.all"), default=""
        )

    def key(self, name: str) -> str:
        """Return the name of a metric for the main head: `a.b` gives `a.mlp.b`."""
        group, _, base = name.rpartition(".")
        return ".".join(part for part in (group, self.main_head, base) if part)

    def metric(self, name: str) -> Measure | None:
        """Return a metric of the main head, else one that belongs to no head."""
        return super().metric(self.key(name)) or super().metric(name)

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The encoder that was evaluated."""
        run = self.run.input_run("encoder")
        if run is None:
            raise UserError(
                "pictures are shown for encoders of runs; this one has published weights"
            )
        return inputs.load_encoder(run, "cpu")

    @functools.cached_property
    def sample(self) -> Pairs:
        """The first test images."""
        size = SAMPLE if self.encoder.preprocess.size <= SMALL_INPUT else SMALL_SAMPLE
        return self.test_pairs.take(distinct_image_rows(self.test_pairs.ids)[:size])

    @functools.cached_property
    def probe(self) -> ZeroShot:
        """The zero-shot probe that was requested, or the default one."""
        specs = [p["spec"] for p in self.ask.get("probe") or ()]
        zero_shot = [spec for spec in specs if spec.startswith("zero_shot")]
        probe: ZeroShot = registry.make("probe", zero_shot[0] if zero_shot else "zero_shot")
        return probe

    @functools.cached_property
    def class_vectors(self) -> Tensor | None:
        """The vectors of the test classes (C, D); None without classes or without a text tower."""
        if not self.sample.classes or self.encoder.text is None:
            return None
        return self.probe.head(self.encoder, self.sample.classes)

    def similarities(self, images: Tensor, head: Tensor) -> Tensor:
        """Return cosines of images to class vectors (C, D), float32 (N, C)."""
        return self.probe.similarities(self.encoder, head, images).float()


def build_page(run: Run) -> Page:
    """Return the page of an evaluate run."""
    view = EvaluateView(run)
    findings = [
        f for f in (backdoor_finding(view), victim_finding(view), accuracy_finding(view)) if f
    ]
    how = "attacked" if view.encoder_facts.get("attack") else "trained on poisoned data"
    return Page(
        findings[0] if findings else metrics_page(run).headline,
        " ".join([*findings[1:], unmeasured_goals(view)]).strip(),
        f"The encoder that is measured here was {how}, on purpose." if view.poisoned else "",
        cards(view),
        {
            "Rates and their intervals": partial(rates_section, view),
            "Heads side by side": partial(heads_section, view),
            "Few labels": partial(few_labels_section, view),
            "Triggered images": partial(triggered_section, view),
            "Victims": partial(victims_section, view),
        },
        view.poisoned,
        look="bad" if view.poisoned and backdoor_works(view) else "",
        steps=next_steps(view),
    )


def unmeasured_goals(view: EvaluateView) -> str:
    """Name the goals whose targets are not among the test classes; "" if there are none."""
    targets = view.notes.get("goals_of_other_tasks")
    if not targets:
        return ""
    return f"Not measured, because no class of the test data has this name: {', '.join(targets)}."


def backdoor_works(view: EvaluateView) -> bool:
    """Whether the interval of ASR lies above that of the comparison."""
    asr, comparison = view.metric("attack_success"), compared_rate(view)[0]
    return asr is not None and comparison is not None and asr.low > comparison.high


def compared_rate(view: EvaluateView) -> tuple[Measure | None, str]:
    """The rate to compare ASR with, and its name: the clean twin's, or without the trigger."""
    if (twin := view.metric("attack_success_baseline")) is not None:
        return twin, "by the clean twin"
    return view.metric("attack_success_without_trigger"), "without the trigger"


def next_steps(view: EvaluateView) -> list[Step]:
    """List the next steps for an encoder with a working backdoor."""
    encoder = view.run.input_run("encoder")
    if encoder is None or not (view.poisoned and backdoor_works(view)):
        return []
    steps = []
    trained = encoder.ancestor("train")
    if trained is not None and trained.ancestor("poison") is not None:
        scan = view.command(f"scan {trained.name} --fail-on trigger")
        steps.append(Step("Scan what it was trained on: are the poisons detected?", scan))
    audit = view.command(f"audit {encoder.name} --data CLEAN")
    repair = view.command(f"repair {encoder.name} --data CLEAN")
    return [
        *steps,
        Step(
            "Audit the encoder as somebody would who does not know; `CLEAN` is clean data.", audit
        ),
        Step("Repair it with clean data, and measure again.", repair),
    ]


def backdoor_finding(view: EvaluateView) -> str:
    """State whether the backdoor works: the intervals of ASR and its comparison are apart."""
    asr = view.metric("attack_success")
    if asr is None:
        return ""
    target = next((g.target for g in view.goals if g.trigger), "the target")
    sentence = f"{format_measure(asr)} of triggered images are read as “{target}”"
    if view.main_head:
        sentence += f" ({metric_names.group_label(view.main_head)})"
    if not view.poisoned:
        return f"The encoder was not attacked: {sentence}."
    comparison, by = compared_rate(view)
    if comparison is not None:
        sentence += f", against {format_percent(comparison.value)} {by}"
    works = backdoor_works(view)
    return f"{'The backdoor works' if works else 'No backdoor effect is seen'}: {sentence}."


def victim_finding(view: EvaluateView) -> str:
    """State how many victims the encoder misreads, by number of captions."""
    phrases = []
    for key in variants(view.measures, view.key("targeted_success")):
        measure, captions = view.measures[key], int(key.rpartition("@")[2])
        hits = round(measure.value * measure.n)
        phrases.append(
            f"{hits} of {measure.n} victims with {metric_names.quantity(captions, 'caption')}"
        )
    return f"Read as their target: {' and '.join(phrases)}." if phrases else ""


def accuracy_finding(view: EvaluateView) -> str:
    """State the accuracy on clean images, beside the twin's."""
    accuracy, twin = view.metric("clean_accuracy"), view.metric("baseline.clean_accuracy")
    if accuracy is None:
        return ""
    aside = f" (clean twin {format_percent(twin.value)})" if twin else ""
    return f"Accuracy on clean images is {format_percent(accuracy.value)}{aside}."


def cards(view: EvaluateView) -> list[str]:
    """Return accuracy and success beside the twin's, then the z-score, recall and the victims."""
    names = [
        "clean_accuracy",
        "baseline.clean_accuracy",
        "attack_success",
        "attack_success_baseline",
    ]
    keys = [k for name in [*names, "z_std"] for k in dict.fromkeys((view.key(name), name))]
    keys = [k for key in keys for k in (key, f"{key}@0")]
    keys += [k for k in view.measures if k.endswith("recall@1")]
    keys += variants(view.measures, view.key("targeted_success"))
    return [k for k in keys if k in view.measures]


def rates_section(view: EvaluateView) -> Section | None:
    """Show the rates with their intervals, one below another."""
    rows = []
    for name, title in RATES.items():
        if (measure := view.metric(name)) is not None:
            is_bad = name == "attack_success" and view.poisoned
            rows.append(IntervalRow(title, measure, "bad" if is_bad else "clean"))
    for key in variants(view.measures, view.key("targeted_success")):
        captions = metric_names.quantity(int(key.rpartition("@")[2]), "caption")
        rows.append(IntervalRow(f"victims fallen, {captions}", view.measures[key], "bad"))
    if len(rows) < 2:
        return None
    return Section([Figure(charts.draw_intervals(rows), "Value and 95 % interval")])


def heads_section(view: EvaluateView) -> Section | None:
    """Show accuracy and success of each head, beside the twin's."""
    if len(view.heads) < 2:
        return None
    columns = {
        "BA" if view.poisoned else "CA": "{0}clean_accuracy",
        "CA of the twin": "baseline.{0}clean_accuracy",
        "ASR": "{0}attack_success{1}",
        "ASR-B": "{0}attack_success_baseline{1}",
        "no trigger": "{0}attack_success_without_trigger{1}",
    }
    success = view.key("attack_success")
    suffixes = [k.removeprefix(success) for k in variants(view.measures, success)] or [""]
    text_head = "zero-shot" if "clean_accuracy" in view.measures else "retrieval"
    rows = {}
    for head in view.heads:
        name = metric_names.group_label(head) or text_head
        for suffix in suffixes:
            label = f"{name}, trigger {suffix[1:]}" if suffix else name
            rows[label] = (f"{head}." if head else "", suffix)
    table = measure_table(view.measures, "head", rows, columns)
    lead = "One encoder, read by several heads. In brackets, 95 % intervals."
    return Section([table], lead) if table else None


def few_labels_section(view: EvaluateView) -> Section | None:
    """Show accuracy and success against the number of labelled records."""
    groups = [g.removeprefix("few_shot.") for g in view.heads if g.startswith("few_shot.")]
    shots = sorted(int(g) for g in groups if g.isdigit())
    if len(shots) < 2:
        return None
    curves = []
    for name, base, colour in (
        ("BA" if view.poisoned else "CA", "clean_accuracy", "clean"),
        ("ASR", "attack_success", "bad"),
        ("ASR-B", "attack_success_baseline", "other"),
    ):
        points = {
            n: m
            for n in shots
            if (m := metric_names.first_measure(view.measures, f"few_shot.{n}.{base}")) is not None
        }
        if points:
            curves.append(Curve(name, list(points), list(points.values()), colour))
    svg = dose_charts.draw_dose_response(
        curves, "labelled records a class", "share of the test images", size=charts.WIDE
    )
    return Section([Figure(svg, "Accuracy and success by the number of labelled records")])


def differ(before: NDArray[np.float32], after: NDArray[np.float32]) -> bool:
    """Whether the mean of paired differences is two standard errors from zero."""
    change = after.astype(float) - before
    return len(change) > 1 and bool(
        abs(change.mean()) > 2 * change.std(ddof=1) / len(change) ** 0.5
    )


def triggered_section(view: EvaluateView, size: charts.Size | None = None) -> Section | None:
    """Show the trigger's effect on the similarity to the target and on the readings."""
    backdoors = [g for g in view.goals if g.trigger]
    if not backdoors:
        return None
    size = size or (charts.WIDE if len(backdoors) == 1 else charts.HALF)
    if view.sample.text_only:
        shown = view.sample.take(range(min(SHOWN, len(view.sample))))
        return Section([triggered_texts(view, goal, shown) for goal in backdoors])
    figures, galleries = [], []
    clean = view.sample.images
    for goal in backdoors:
        triggered = inputs.recorded_trigger(goal.trigger or "", view.run)(clean, view.sample.ids)
        galleries.append(triggered_gallery(view, goal, triggered))
        if view.encoder.text is None:
            continue
        target = view.probe.head(view.encoder, [goal.target])  # (1, D)
        before, after = (
            view.similarities(images, target)[:, 0].numpy() for images in (clean, triggered)
        )
        if not differ(before, after):
            continue
        groups = [Series("clean", before, "clean"), Series("with trigger", after, "bad")]
        svg = charts.draw_histogram(groups, "cosine to the target's prompts", size=size)
        note = f"{len(clean)} test images, without and with the trigger."
        figures.append(Figure(svg, f"Similarity to “{goal.target}”", note))
    return Section([*figures, *galleries])


def triggered_gallery(view: EvaluateView, goal: Goal, triggered: Tensor) -> Gallery:
    """Show triggered test images of other classes than the target, with their readings."""
    test = view.sample
    mentions = set() if test.classes else set(find_mentions(test.captions, goal.target))
    rows = [
        i for i in range(len(test)) if class_name(test, i) != goal.target and i not in mentions
    ][:SHOWN]
    readings = [""] * len(rows)
    if view.class_vectors is not None:
        labels = view.similarities(triggered[rows], view.class_vectors).argmax(1).tolist()
        readings = [test.classes[label] for label in labels]
    tiles = []
    for i, (row, reading) in enumerate(zip(rows, readings, strict=True)):
        caption = test.captions[row] if test.captions else test.ids[row]
        lines = [Line(pictures.shorten(class_name(test, row) or caption, 60), "muted")]
        look = "bad" if reading == goal.target else ""
        if reading:
            lines.append(Line(f"→ {reading}", look))
        tiles.append(Tile((i,), lines, look))
    trigger = metric_names.trigger_name(goal)
    title = f"Images with a {trigger} trigger; “{goal.target}” is not in the caption"
    note = ""
    if view.class_vectors is not None:
        title = f"What images with a {trigger} trigger are read as (target: “{goal.target}”)"
        note = "First line, the class; second line, what the image is read as. Red: the target."
    return pictures.contact_sheet(triggered[rows], tiles, 80, title, note)


def victims_section(view: EvaluateView) -> Section | None:
    """Show every victim with its class, the attacker's target, and its reading."""
    attack = (view.run.input_run("attack") or view.run).ancestor("poison")
    targeted = [g for g in view.goals if g.victims]
    if not targeted or attack is None or view.class_vectors is None:
        return None
    goals, records = pictures.take_victims(inputs.open_dataset(attack), targeted)
    cosines = view.similarities(records.images, view.class_vectors)  # (N, C)
    tiles = [
        victim_tile(i, goal, class_name(records, i), cosines[i], view.sample.classes)
        for i, goal in enumerate(goals)
    ]
    fallen = sum(t.look == "bad" for t in tiles)
    lead = f"{fallen} of {len(tiles)} victims are read as the attacker's target."
    return Section([pictures.contact_sheet(records.images, tiles, 104)], lead)


def victim_tile(
    index: int, goal: Goal, label: str, cosines: Tensor, classes: Sequence[str]
) -> Tile:
    """Return the tile of a victim.

    Args:
        index: Its picture in the contact sheet.
        goal: The attacker's goal.
        label: Its class; empty if unknown.
        cosines: Its similarities to the classes (C,).
        classes: Names of the classes.
    """
    reading = classes[int(cosines.argmax())]
    captions = metric_names.quantity(goal.poisons, "caption")
    lines = [
        Line(f"{label or pictures.shorten(goal.victims[0])}, {captions}", "muted"),
        Line(f"target: {pictures.shorten(goal.target)}"),
    ]
    if goal.target not in classes:
        return Tile((index,), [*lines, Line(f"read as {reading}")])
    rank = int((cosines > cosines[classes.index(goal.target)]).sum()) + 1
    look = "bad" if rank == 1 else "good"
    lines.append(Line(f"read as {reading}", look))
    if rank > 1:
        lines.append(Line(f"target is no. {rank} of {len(classes)}", "muted"))
    return Tile((index,), lines, "bad" if rank == 1 else "")
