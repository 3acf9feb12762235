"""The page of a calibration: what each audit says of clean and of attacked encoders, and what its threshold is worth."""

from __future__ import annotations

import functools

from bezoar.auditing import bank
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.page_parts import Figure, Part, Section, Table
from bezoar.reports.run_page import Chapter, Story
from bezoar.reports.sections.audit import strip_rows


class Calibrate(Story):
    """Values by audit, thresholds, encoders."""

    @functools.cached_property
    def bank(self) -> bank.Bank:
        """What was made."""
        return bank.Bank.read(self.run.file(bank.FILE))

    @property
    def rate(self) -> float:
        """The false-positive rate that figures are for."""
        return float(self.ask.get("rate", 0.05))

    def headline(self) -> str:
        """What the bank holds."""
        if self.manifest["status"] != "done":
            return "This calibration was not finished; the same command goes on with it."
        clean, bad = int(self.notes.get("clean", 0)), int(self.notes.get("attacked", 0))
        told = f"A bank of {metric_names.quantity(clean, 'clean encoder')}" + (
            f" and {metric_names.quantity(bad, 'attacked one')}" if bad else ""
        )
        areas = [
            f"{k.removesuffix('.auroc')} {m.value:.2f}"
            for k, m in self.measures.items()
            if k.endswith(".auroc")
        ]
        return told + (f"; AUROC {', '.join(areas)}." if areas else ".")

    def more(self) -> str:
        """What it may be used for."""
        if not (self.run.path / bank.FILE).exists():
            return ""
        f, s = self.bank.family, self.bank.sample
        least = metric_names.format_percent(1 / (int(self.notes.get("clean", 0)) + 1))
        kind = (
            f"{f.network.partition(':')[0]} at {f.size} px, trained on {f.data or 'data not known'}"
        )
        clean = f"audited on {metric_names.quantity(s.images, 'image')} of {s.data}"
        return f"For encoders like these alone: {kind}, {clean}. It supports false-positive rates from {least} on."

    def cards(self) -> list[str]:
        """AUROC, then sensitivity, then what the threshold is worth."""
        return [
            n
            for k in ("auroc", "sensitivity", "false_positive_rate")
            for n in self.measures
            if n.endswith(f".{k}")
        ][:8]

    def chapters(self) -> list[Chapter]:
        """Values, sensitivities, encoders."""
        return [self.values, self.sensitivity_by_attack, self.encoders]

    def values(self) -> Section | None:
        """A strip chart an audit."""
        parts: list[Part] = []
        for i, c in enumerate(self.bank.audits):
            t, name = c.threshold(self.rate), c.name
            marks = (
                [(t, f"threshold at false-positive rate {self.rate:g}", "muted")]
                if t is not None
                else []
            )
            rows = strip_rows([e.value for e in c.clean], [[e.attack, e.value] for e in c.attacked])
            parts.append(
                Figure(
                    charts.draw_strips(rows, marks, f"value of {name}", f"strip{i}"),
                    c.audit,
                    "A dot an encoder.",
                )
            )
        return Section(
            "What audits say of clean and of attacked encoders",
            parts,
            "Higher values are more suspicious.",
        )

    def sensitivity_by_attack(self) -> Section | None:
        """Share of each attack's encoders above the threshold."""
        rows = []
        for c in self.bank.audits:
            for attack, m in c.sensitivity(self.rate).items():
                rows.append(
                    [
                        c.name,
                        attack or "all",
                        metric_names.format_percent(m.value),
                        metric_names.format_interval(m, metric_names.RATE),
                        str(m.n),
                    ]
                )
        if not rows:
            return None
        note = f"Attacks whose success is known to be below {bank.MIN_ATTACK_SUCCESS:g} are left out: there is little to be found."
        head = ("Audit", "Attack", "Above the threshold", "95 % interval", "n")
        return Section("Sensitivity", [Table(head, rows, (2, 3, 4), note)])

    def encoders(self) -> Section | None:
        """Every encoder with its values."""
        first, rows = self.bank.audits[0], []
        by = [{e.name: e.value for e in (*c.clean, *c.attacked)} for c in self.bank.audits]
        for e in (*first.clean, *first.attacked):
            known = "–" if e.success is None else metric_names.format_percent(e.success)
            values = [f"{own[e.name]:.4g}" for own in by]
            rows.append(
                [
                    pictures.shorten(e.name, 60),
                    e.attack or "clean",
                    pictures.shorten(e.trigger, 80),
                    known,
                    *values,
                ]
            )
        head = ("Encoder", "Attack", "Trigger", "Success", *(c.name for c in self.bank.audits))
        return Section("Encoders", [Table(head, rows, tuple(range(3, len(head))))])
