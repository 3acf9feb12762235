"""The page of a calibration: values of clean and attacked encoders by audit."""

import functools
from functools import partial

from bezoar.auditing.bank import FILE, MIN_ATTACK_SUCCESS, Bank
from bezoar.reports import charts, pictures
from bezoar.reports.charts import Mark
from bezoar.reports.metric_names import RATE, format_interval, format_percent, quantity
from bezoar.reports.page_parts import Figure, Section, Table
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import encoder_strips
from bezoar.runs.run import Run


class CalibrateView(RunView):
    """A calibrate run."""

    @functools.cached_property
    def bank(self) -> Bank:
        """The bank that was made."""
        return Bank.read(self.run.file(FILE))

    @property
    def rate(self) -> float:
        """The false-positive rate that thresholds and sensitivities are for."""
        return float(self.ask.get("rate", 0.05))


def build_page(run: Run) -> Page:
    """Return the page of a calibration."""
    view = CalibrateView(run)
    suffixes = (".auroc", ".sensitivity", ".false_positive_rate")
    return Page(
        headline(view),
        lead(view) if (run.path / FILE).exists() else "",
        cards=[k for suffix in suffixes for k in view.measures if k.endswith(suffix)][:8],
        sections={
            "What audits say about clean and attacked encoders": partial(value_section, view),
            "Sensitivity": partial(sensitivity_section, view),
            "Encoders": partial(encoder_section, view),
        },
        poisoned=bool(view.goals),
    )


def headline(view: CalibrateView) -> str:
    """State the contents of the bank."""
    if view.manifest["status"] != "done":
        return "This calibration was not finished; the same command goes on with it."
    sentence = f"A bank of {quantity(int(view.notes.get('clean', 0)), 'clean encoder')}"
    if attacked := int(view.notes.get("attacked", 0)):
        sentence += f" and {quantity(attacked, 'attacked one')}"
    areas = [
        f"{key.removesuffix('.auroc')} {m.value:.2f}"
        for key, m in view.measures.items()
        if key.endswith(".auroc")
    ]
    return f"{sentence}; AUROC {', '.join(areas)}." if areas else f"{sentence}."


def lead(view: CalibrateView) -> str:
    """State the uses of the bank."""
    family, sample = view.bank.family, view.bank.sample
    least = format_percent(1 / (int(view.notes.get("clean", 0)) + 1))
    network = family.network.partition(":")[0]
    training = family.data or "unknown data"
    return (
        f"For encoders like these only: {network} at {family.size} px, trained on {training}, "
        f"audited on {quantity(sample.images, 'image')} of {sample.data}. It supports "
        f"false-positive rates of {least} and above."
    )


def value_section(view: CalibrateView) -> Section:
    """Show the values of each audit as a strip chart."""
    figures = []
    for calibration in view.bank.audits:
        threshold = calibration.threshold(view.rate)
        label = f"threshold at false-positive rate {view.rate:g}"
        marks = [] if threshold is None else [Mark(threshold, label, "muted")]
        strips = encoder_strips(
            [e.value for e in calibration.clean],
            [(e.attack, e.value) for e in calibration.attacked],
        )
        svg = charts.draw_strips(strips, marks, f"value of {calibration.name}")
        figures.append(Figure(svg, calibration.audit, "A dot for each encoder."))
    return Section(figures, "Higher values are more suspicious.")


def sensitivity_section(view: CalibrateView) -> Section | None:
    """Show the share of each attack's encoders above the threshold."""
    rows = [
        [
            calibration.name,
            attack or "all",
            format_percent(m.value),
            format_interval(m, RATE),
            str(m.n),
        ]
        for calibration in view.bank.audits
        for attack, m in calibration.sensitivity(view.rate).items()
    ]
    if not rows:
        return None
    note = (
        f"Attacks whose success is known to be below {MIN_ATTACK_SUCCESS:g} are left out, since "
        "there is little to find."
    )
    head = ("Audit", "Attack", "Above the threshold", "95 % interval", "n")
    return Section([Table(head, rows, (2, 3, 4), note)])


def encoder_section(view: CalibrateView) -> Section:
    """List the encoders with their values."""
    audits = view.bank.audits
    values = [{e.name: e.value for e in (*audit.clean, *audit.attacked)} for audit in audits]
    rows = []
    for encoder in (*audits[0].clean, *audits[0].attacked):
        success = "–" if encoder.success is None else format_percent(encoder.success)
        rows.append(
            [
                pictures.shorten(encoder.name, 60),
                encoder.attack or "clean",
                pictures.shorten(encoder.trigger, 80),
                success,
                *(f"{by_name[encoder.name]:.4g}" for by_name in values),
            ]
        )
    head = ("Encoder", "Attack", "Trigger", "Success", *(audit.name for audit in audits))
    return Section([Table(head, rows, range(3, len(head)))])
