"""The page of an audit: the verdict, values beside the bank's, and inverted triggers."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bezoar.auditing import image_changes
from bezoar.auditing.findings import VERDICT_FILE
from bezoar.auditing.verdict_text import EVIDENCE, UNKNOWN
from bezoar.evaluation.scores import Measure
from bezoar.evaluation.verdict import Inversion
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import Mark, Series
from bezoar.reports.metric_names import format_measure, format_percent, quantity
from bezoar.reports.page_parts import Figure, Gallery, Line, Part, Section, Step, Table, Text, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import encoder_strips
from bezoar.runs.run import Run
from bezoar.verbs.audit import DEFAULT_AUDITS, TEXT_AUDITS

INVERSIONS = 3  # shown of each audit
TARGETS = 20  # listed of each audit; all are drawn
VERDICT_LOOKS = {
    **dict.fromkeys(EVIDENCE, "bad"),
    **dict.fromkeys(UNKNOWN, "warn"),
    "some evidence": "warn",
}
TRIGGERED = 6  # clean images that each inversion is shown on


class AuditView(RunView):
    """An audit run."""

    @functools.cached_property
    def verdict(self) -> dict[str, Any]:
        """The contents of the verdict's file."""
        verdict: dict[str, Any] = self.read_json(VERDICT_FILE)
        return verdict


def build_page(run: Run) -> Page:
    """Return the page of an audit."""
    view = AuditView(run)
    warning = (
        "The encoder that is audited here was attacked on purpose: "
        f"{metric_names.describe_goals(view.goals)}. The audits did not know."
    )
    suffixes = (".statistic", ".least_norm", ".p_value", ".sensitivity", ".value")
    return Page(
        str(view.notes.get("verdict") or "This audit was not finished."),
        lead(view) if (run.path / VERDICT_FILE).exists() else "",
        warning if view.goals else "",
        [key for suffix in suffixes for key in view.measures if key.endswith(suffix)][:8],
        {
            "What each audit says": partial(audit_section, view),
            "Inverted triggers": partial(inversion_section, view),
            "What was not tested": partial(limit_section, view),
        },
        look=VERDICT_LOOKS.get(str(view.notes.get("words")), ""),
        steps=next_steps(view) if (run.path / VERDICT_FILE).exists() else (),
    )


def has_accused_trigger(view: AuditView) -> bool:
    """Whether an audit that found evidence inverted a trigger, which a repair can unlearn."""
    accusers = [
        audit["name"]
        for audit in view.verdict["audits"]
        if {audit["words"], (audit.get("unaided") or {}).get("grade")} & set(EVIDENCE)
    ]
    return any(facts["audit"] in accusers for facts in view.verdict["inversions"])


def next_steps(view: AuditView) -> list[Step]:
    """List the next steps after an audit, by its verdict."""
    encoder, data, words = (
        view.input_text("encoder"),
        view.input_text("data"),
        view.notes.get("words"),
    )
    if words in EVIDENCE and set(audits_asked(view)) <= set(TEXT_AUDITS):
        check = view.command(f"check {encoder} TEXTS --clean {data} --check drop_token")
        steps = [
            Step("Do not serve this encoder. Look at the words below."),
            Step("Ask of texts that come in (`TEXTS`) whether they hold such a word.", check),
        ]
    elif words in EVIDENCE:
        triggers = f" --audit {view.run.name}" if has_accused_trigger(view) else ""
        repair = view.command(f"repair {encoder} --data {data}{triggers}")
        steps = [
            Step("Do not serve this encoder. Look below at what leads to the class."),
            Step(f"Repair a copy with clean data{' and these triggers' * bool(triggers)}.", repair),
        ]
    elif words in UNKNOWN:
        others = " ".join(name for name in DEFAULT_AUDITS if name not in audits_asked(view))
        steps = [Step("Nothing could be told. Ask more audits, or more clean images (`--images`).")]
        if others:
            steps[0] = replace(
                steps[0], command=view.command(f"audit {encoder} --data {data} --audit {others}")
            )
    else:
        steps = [Step("No evidence is no proof: read below what was not tested.")]
    if any(audit["words"] == "no calibration" for audit in view.verdict["audits"]):
        text = (
            "A value alone becomes a verdict with a bank of encoders that you know to be clean, of "
            "the same network and recipe (`CLEAN`)."
        )
        steps.append(Step(text, view.command(f"calibrate CLEAN --data {data}")))
    return steps


def audits_asked(view: AuditView) -> list[str]:
    """The names of the audits that were asked."""
    return [audit["name"].partition(":")[0] for audit in view.verdict["audits"]]


def lead(view: AuditView) -> str:
    """State the basis of the verdict."""
    sample, family, few = (view.verdict[key] for key in ("sample", "family", "few"))
    network = family["network"].partition(":")[0]
    images = quantity(sample["images"], "clean record")
    side = f", {family['size']} px" if family["size"] > 1 else ""
    name = view.input_text("encoder") or view.verdict["encoder"]
    text = (
        f"{name} ({network}{side}) was examined with {images}. No verdict says that an encoder is "
        "clean."
    )
    return f"{text} {few}." if few else text


def audit_section(view: AuditView) -> Section:
    """Show each audit's result, and its value beside those of the bank or of its own classes."""
    audits = view.verdict["audits"]
    rows = [[*audit_row(audit), took(view, audit["name"])] for audit in audits]
    parts: list[Part] = []
    for audit in audits:
        if audit["words"] != "no calibration":
            parts.append(Text(f"{audit['name']}: {audit['sentence']}"))
        unaided = audit.get("unaided")
        if unaided and unaided["sentence"] not in str(view.notes.get("verdict")):  # the headline
            parts.append(Text(f"{audit['name']}, without a bank: {unaided['sentence']}"))
        if reference := audit.get("reference"):
            parts.append(Text(f"{audit['name']}: {reference}"))
        parts += [*bank_figure(audit), *target_parts(audit)]
    head = (
        "Audit",
        "Verdict",
        "Finding",
        "Value",
        "Threshold",
        "p",
        "False positives of this threshold",
        "Took",
    )
    note = (
        "Higher values are more suspicious; a value above the threshold is evidence. In brackets, "
        "95 % intervals."
    )
    remarks = dict.fromkeys(a["sentence"] for a in audits if a["words"] == "no calibration")
    return Section([Table(head, rows, (3, 4, 5, 6, 7), " ".join([note, *remarks])), *parts])


def audit_row(audit: Mapping[str, Any]) -> list[str | Line]:
    """Return the row of an audit, but for how long it took."""
    threshold, p = audit["threshold"], audit["p"]
    unaided = audit.get("unaided")
    words = "a value alone" if audit["words"] == "no calibration" else audit["words"]
    if unaided and audit["words"] == "no calibration":
        words, p = unaided["grade"], unaided.get("p")
    false_positives = audit["false_positives"]
    return [
        audit["name"],
        Line(words, VERDICT_LOOKS.get(words, "")),
        describe_finding(audit),
        f"{audit['value']:.4g}",
        "–" if threshold is None else f"{threshold:.4g}",
        "–" if p is None else f"{p:.2g}",
        format_measure(Measure(**false_positives)) if false_positives else "–",
    ]


def took(view: AuditView, name: str) -> str:
    """How long an audit took; "–" if that is unknown."""
    seconds = view.measures.get(f"{name}.seconds")
    return "–" if seconds is None else f"{seconds.value:.1f} s"


def describe_finding(audit: Mapping[str, Any]) -> str:
    """The target of the least trigger, and its size; "–" where an audit has none."""
    unaided = audit.get("unaided") or {}
    if unaided.get("size"):
        return f"{pictures.shorten(unaided['target'], 40)}, {unaided['size']}"
    target, least = audit["notes"].get("target"), audit["evidence"].get("least_norm")
    if not target or not least:
        return "–"
    return f"{pictures.shorten(target, 40)}, {least['value']:.3g} px"


def target_parts(audit: Mapping[str, Any]) -> list[Part]:
    """Show the trigger of every target that an audit inverted, or the words or changes of images
    that it tried.
    """
    if changes := audit["notes"].get("changes"):
        return [change_table(audit, changes)]
    if words := audit["notes"].get("words"):
        rows = [
            [pictures.shorten(word, 40), f"{share:.3f}", f"{agreement:.3f}"]
            for word, share, agreement in words
        ]
        head = ("Word", "Disagreement taken away", "Mean cosine of the texts with it")
        return [Table(head, rows, (1, 2))]
    targets = audit["notes"].get("targets")
    if not targets:
        return []
    reached = [t["norm"] for t in targets if t["reached"]]
    unreached = [t["norm"] for t in targets if not t["reached"]]
    strips = [Series(f"reached ({len(reached)})", reached, "clean")] if reached else []
    if unreached:
        strips.append(Series(f"not reached ({len(unreached)})", unreached, "muted"))
    least = audit["evidence"]["least_norm"]["value"]
    mark = Mark(least, f"least: {pictures.shorten(audit['notes']['target'], 32)}", is_dashed=False)
    svg = charts.draw_strips(strips, [mark], "pixels that a target's trigger covers")
    title = f"{audit['name']}: the smallest trigger of every target"
    rows = [
        [
            pictures.shorten(t["target"], 40),
            f"{t['norm']:.3g}",
            format_percent(t["success"]),
            "yes" if t["reached"] else "no",
        ]
        for t in targets[:TARGETS]
    ]
    note = f"The {TARGETS} smallest of {len(targets)}." if len(targets) > TARGETS else ""
    columns = ("Target", "Trigger, px", "Success on all clean images", "Reached")
    return [Figure(svg, title, "A dot for each target."), Table(columns, rows, (1, 2), note)]


def change_table(audit: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]) -> Table:
    """List the least change of each family, and what the median class takes."""
    rows = []
    changes = changes[: len(image_changes.FAMILIES)]  # the file may be a stranger's
    for facts in changes:
        family, evidence = facts["family"], audit["evidence"]
        is_reached = facts["targets"][0]["reached"]
        rows.append(
            [
                facts["family"],
                pictures.shorten(facts["target"], 40) if is_reached else "none reached",
                f"{evidence[f'{family}_least']['value']:.3g}" if is_reached else "–",
                format_percent(evidence[f"{family}_success"]["value"]) if is_reached else "–",
                f"{evidence[f'{family}_median']['value']:.3g}",
                f"{sum(t['reached'] for t in facts['targets'])} of {len(facts['targets'])}",
            ]
        )
    head = ("Change", "Least for", "Size", "Success", "Median size", "Classes reached")
    limits = ", ".join(f"{facts['family']} {facts['limit']:g}" for facts in changes)
    units = "; ".join(f"{facts['family']}: {facts['unit']}" for facts in changes)
    note = (
        f"A class that is not reached counts with the largest size allowed: {limits}. "
        f"Sizes are, of {units}."
    )
    return Table(head, rows, (2, 3, 4, 5), note)


def bank_figure(audit: Mapping[str, Any]) -> list[Figure]:
    """Show an audit's value beside the bank's; nothing if the bank has no clean encoders."""
    clean, attacked = audit["bank"]["clean"], audit["bank"]["attacked"]
    if not clean:
        return []
    marks = [Mark(audit["value"], "this encoder", is_dashed=False)]
    if audit["threshold"] is not None:
        label = f"threshold at false-positive rate {audit['rate']:g}"
        marks.append(Mark(audit["threshold"], label, "muted"))
    name = audit["name"]
    svg = charts.draw_strips(encoder_strips(clean, attacked), marks, f"value of {name}")
    return [Figure(svg, f"{name}: this encoder among those of the bank", "A dot for each encoder.")]


def inversion_section(view: AuditView) -> Section | None:
    """Show the inverted triggers, alone and on clean images."""
    inversions = view.verdict["inversions"]
    images = torch.from_numpy(view.read_tensors("examples.safetensors")["images"])[:TRIGGERED]
    galleries = change_galleries(view.verdict["audits"], images)
    if not inversions and not galleries:
        return None
    tensors = view.read_tensors("inversions.safetensors")
    shown: dict[str, int] = {}
    for i, facts in enumerate(inversions):
        shown[facts["audit"]] = shown.get(facts["audit"], 0) + 1
        if shown[facts["audit"]] > INVERSIONS:
            continue
        mask, pattern = (torch.from_numpy(tensors[f"{name}@{i}"]) for name in ("mask", "pattern"))
        inversion = Inversion(mask, pattern, facts["target"], facts["norm"], facts["success"])
        galleries.append(inversion_gallery(inversion, facts, images))
    lead = (
        "An inverted trigger moves clean images as a backdoor would. Every encoder has some. It is "
        "a finding if it is far smaller than those of the encoder's other classes, or, with a "
        "bank, than those of clean encoders: the values above say which."
    )
    return Section(galleries, lead)


def inversion_gallery(inversion: Inversion, facts: Mapping[str, Any], images: Tensor) -> Gallery:
    """Show mask and pattern of an inverted trigger, then clean images without and with it.

    Args:
        facts: The verdict's facts about it.
        images: uint8 (N, 3, H, W).
    """
    mask, pattern = inversion.mask.clamp(0, 1), inversion.pattern  # (1, H, W), (3, H, W)
    planes = torch.stack([mask.expand(3, -1, -1), pattern, inversion.mask * pattern])
    trigger_images = (planes.clamp(0, 1) * 255).byte()  # (3, 3, H, W)
    tiles = [
        Tile((0,), [Line("mask", "mark"), Line(f"norm {facts['norm']:.1f} px", "muted")]),
        Tile((1,), [Line("pattern", "mark")]),
        Tile((2,), [Line("mask x pattern", "mark")]),
    ]
    before, after = facts.get("before", []), facts.get("after", [])
    for i in range(len(images)):
        lines = []
        if before:
            look = "bad" if after[i] != before[i] else "muted"
            lines = [Line(before[i], "muted"), Line(after[i], look)]
        tiles.append(Tile((3 + i, 3 + len(images) + i), lines))
    title = facts["audit"]
    if facts["target"]:
        title += f", towards “{pictures.shorten(facts['target'], 40)}”"
    note = ""
    if facts.get("turns_into"):
        phrases = [
            f"{format_percent(share)} as “{label}” ({format_percent(earlier)} before)"
            for label, share, earlier in facts["turns_into"]
        ]
        note = (
            f"Of all triggered images a classifier ({facts['reader']}) reads {', '.join(phrases)}."
        )
    if facts.get("reference"):
        after_share, before_share = facts["reference"]
        note += (
            f" The reference reads {format_percent(after_share)} as “{facts['target']}” "
            f"({format_percent(before_share)} before)."
        )
    sheet = torch.cat([trigger_images, images, inversion(images)])
    return pictures.contact_sheet(sheet, tiles, 72, title, note)


def change_galleries(audits: Sequence[Mapping[str, Any]], images: Tensor) -> list[Gallery]:
    """Show clean images uint8 (N, 3, H, W) before and after the least change of each family."""
    galleries = []
    for audit in audits:
        for facts in audit["notes"].get("changes", [])[: len(image_changes.FAMILIES)]:
            family = image_changes.FAMILIES.get(facts["family"])
            if family is None or not facts["targets"][0]["reached"]:
                continue
            numbers = image_changes.restore_numbers(family, facts["numbers"], *images.shape[2:])
            if numbers is None:
                continue
            changed = family.change(numbers, images.float() / 255)[0]  # (N, 3, H, W)
            sheet = torch.cat([images, (changed * 255).round().byte()])
            tiles = [
                Tile(
                    (i, len(images) + i),
                    [
                        Line(pictures.shorten(before, 40), "muted"),
                        Line(pictures.shorten(after, 40), "muted" if before == after else "bad"),
                    ],
                )
                for i, (before, after) in enumerate(
                    zip(facts["before"][: len(images)], facts["after"], strict=False)
                )
            ]
            target = pictures.shorten(facts["target"], 40)
            title = f"{audit['name']}, {facts['family']}, towards “{target}”"
            galleries.append(pictures.contact_sheet(sheet, tiles, 72, title, ""))
    return galleries


def limit_section(view: AuditView) -> Section:
    """List the limits of the verdict."""
    rows = [[line] for line in view.verdict["not_tested"]]
    return Section([Table(("This verdict says nothing about",), rows)])
