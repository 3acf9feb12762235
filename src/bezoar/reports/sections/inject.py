"""The page of an inject run: references, triggered images, and their similarities."""

import functools
from functools import partial

import torch

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.reports import charts, metric_names, pictures
from bezoar.reports.charts import Series
from bezoar.reports.metric_names import variants
from bezoar.reports.page_parts import Figure, Gallery, Line, Part, Section, Table, Tile
from bezoar.reports.run_page import Page, RunView
from bezoar.reports.shared_parts import loss_figure, triggered_texts
from bezoar.runs.inputs import in_memory, recorded_trigger
from bezoar.runs.run import Run

SHOWN = 8  # triggered images of a goal
CARDS = (
    "reference_similarity",
    "reference_similarity_before",
    "clean_similarity",
    "reference_kept",
    "final_loss",
)


class InjectView(RunView):
    """An inject run."""

    @functools.cached_property
    def new_goals(self) -> list[Goal]:
        """The goals of this attack, which are the last ones of those the encoder has."""
        tensors = self.read_tensors("similarities.safetensors")
        count = sum(key.startswith("after@") for key in tensors)
        return self.goals[-count:] if count else []

    @functools.cached_property
    def sample(self) -> Pairs:
        """The first shadow images."""
        records = self.data.clean
        return in_memory(records.take(range(min(SHOWN, len(records)))))


def build_page(run: Run) -> Page:
    """Return the page of an inject run."""
    view = InjectView(run)
    steps, epochs = view.notes.get("steps"), view.notes.get("epochs")
    lead = (
        "Whether a classifier reads triggered images as the target is measured by an evaluate run."
    )
    if steps and epochs:
        training = (
            f"{metric_names.quantity(steps, 'step')} in {metric_names.quantity(epochs, 'epoch')}"
        )
        lead = f"{training}. {lead}"
    return Page(
        headline(view),
        lead,
        "A backdoor was put into this encoder, on purpose. Use it for measurements only.",
        [key for name in CARDS for key in variants(view.measures, name)][:8],
        {
            "What the attacker wants": partial(goals_section, view),
            "Where images lie": partial(similarity_section, view),
            "Training": partial(training_section, view),
        },
        poisoned=True,
    )


def headline(view: InjectView) -> str:
    """State how close triggered images came to the reference, and how far clean ones moved."""
    clean = view.metric("clean_similarity")
    after = view.metric("reference_similarity")
    before = view.metric("reference_similarity_before")
    if clean is None or after is None or before is None:
        return "This attack was not finished."
    target = view.new_goals[0].target if view.new_goals else "the target"
    return (
        f"The vectors of triggered images have a mean cosine of {after.value:.3f} to the reference "
        f"of “{target}” ({before.value:.3f} before); those of clean images have one of "
        f"{clean.value:.3f} to what they were."
    )


def goals_section(view: InjectView) -> Section:
    """Show each goal with its references, and shadow images with and without its trigger."""
    ways = {r["id"]: r["how"] for r in view.notes.get("references", [])}
    rows, galleries = [], []
    for index, goal in enumerate(view.new_goals):
        galleries.append(reference_gallery(view, index, goal))
        references = "; ".join(f"{k}: {ways[k]}" if k in ways else k for k in goal.references)
        cells = (goal.target, goal.trigger or "", references, goal.how)
        rows.append([pictures.shorten(c) for c in cells])
    table = Table(("To be read as", "Trigger", "Reference", "Attack"), rows)
    lead = (
        "Triggered images are to get the vector of the reference, so that any classifier reads "
        "them as it reads the reference."
    )
    return Section([table, *galleries], lead)


def reference_gallery(view: InjectView, index: int, goal: Goal) -> Gallery | Table:
    """Show the references of new goal `index`, then shadow records without and with its trigger."""
    if view.sample.text_only:
        texts = {r["id"]: r.get("text", "") for r in view.notes.get("references", [])}
        reference_texts = [texts.get(key, key) for key in goal.references]
        return triggered_texts(view, goal, view.sample, reference_texts)
    tensors = view.read_tensors("references.safetensors")
    references = torch.from_numpy(tensors["images"][tensors["goal"] == index])
    sample = view.sample
    triggered = recorded_trigger(goal.trigger or "", view.run)(sample.images, sample.ids)
    tiles = [
        Tile((i,), [Line("reference", "mark"), Line(pictures.shorten(key), "muted")], "bad")
        for i, key in enumerate(goal.references)
    ]
    for i, key in enumerate(sample.ids, len(references)):
        tiles.append(Tile((i, i + len(sample)), [Line(pictures.shorten(key), "muted")]))
    name = metric_names.trigger_name(goal).capitalize()
    return pictures.contact_sheet(
        torch.cat([references, sample.images, triggered]),
        tiles,
        80,
        f"{name} trigger, read as “{pictures.shorten(goal.target)}”",
        "First the reference, then shadow images without and with the trigger.",
    )


def similarity_section(view: InjectView) -> Section:
    """Show cosines of triggered images to the reference, and of clean ones to themselves before."""
    tensors = view.read_tensors("similarities.safetensors")
    figures = []
    for i, goal in enumerate(view.new_goals):
        groups = [
            Series("triggered, before", tensors[f"before@{i}"], "clean"),
            Series("triggered, after", tensors[f"after@{i}"], "bad"),
            Series("not triggered, after", tensors[f"untriggered@{i}"], "good"),
        ]
        svg = charts.draw_histogram(groups, "cosine to the reference")
        title = f"To the reference of “{pictures.shorten(goal.target, 40)}”"
        figures.append(Figure(svg, title, "Shadow images."))
    clean = [Series("clean images", tensors["clean"], "good")]
    svg = charts.draw_histogram(clean, "cosine to the clean encoder's vector")
    note = "Cosines far from 1 show that the attack damages what the encoder is for."
    figures.append(Figure(svg, "Whether clean images stay where they were", note))
    lead = (
        f"{len(tensors['clean']):,} shadow images, with and without the trigger, embedded before "
        "and after the attack."
    )
    return Section(figures, lead)


def training_section(view: InjectView) -> Section:
    """Show the loss, and its terms in the first and the last epoch."""
    parts: list[Part] = [loss_figure(view)]
    log = view.read_log()
    terms = [key for key in log[0] if key not in ("epoch", "stop")] if log else []
    if terms:
        entries = [log[0], *log[1:][-1:]]
        rows = [[str(e["epoch"]), *(f"{e[term]:.3f}" for term in terms)] for e in entries]
        head = ("Epoch", *(term.replace("_", " ") for term in terms))
        parts.append(Table(head, rows, range(len(head)), "Means over the steps of the epoch."))
    return Section(parts)
