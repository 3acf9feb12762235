"""Trains an encoder on a data set, poisoned or not."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.attacks.plan import Goal, Plan
from bezoar.data.files.artefacts import read_lines
from bezoar.data.files.tensors import write_tensors
from bezoar.data.files.writing import write_whole
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders import locked_towers
from bezoar.encoders.encoder import Encoder, precision_for, tokenize_captions
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, success
from bezoar.evaluation.scores import Measure, average
from bezoar.runs import inputs
from bezoar.runs.execute import Job
from bezoar.runs.inputs import Dataset
from bezoar.runs.run import CHECKPOINT, Run
from bezoar.runs.verb import Input, Takes
from bezoar.terminal import warn
from bezoar.training import collectives, loop, prefetch, selfsupervised
from bezoar.training.loop import TrainingLog
from bezoar.verbs import evaluate

# The kNN that follows trainings on images: number of voters a query, and labelled records at most.
NEIGHBOURS, VOTERS = 200, 10_000
FOLLOWED = 1000  # records that are measured after every epoch, at most
FOLLOWED_METRICS = ("clean_acc", "attack_success", "targeted_s")  # starts of their names


@dataclass(frozen=True)
class Train:
    """Train an encoder. A checkpoint is kept: a run that was cut off goes on to the same bits."""

    main_files: ClassVar[tuple[str, ...]] = ("encoder.safetensors", "encoder.json")

    joint: ClassVar[bool] = True  # under torchrun every rank does this verb's work

    data: Annotated[Input, Takes("data", positional=True), "data set, or a poison run"]
    network: Annotated[Input, Takes("network"), "see `bezoar list network`"] = "clip_small"
    objective: Annotated[
        Input, Takes("objective"), "loss and recipe: see `bezoar list objective`"
    ] = "clip"
    keep: Annotated[Input, Takes("run"), "scan run whose keep-list chooses the records"] = None
    follow: Annotated[
        Input, Takes("data"), "measure success on these data after every epoch, zero-shot or by kNN"
    ] = None

    def work(self, job: Job) -> dict[str, Measure]:
        """Train the encoder.

        Writes encoder.json, encoder.safetensors, log.jsonl, and ledger.safetensors: losses, and how
        often each record was drawn.
        """
        dataset = inputs.open_dataset(job.inputs["data"])
        records = select_kept(job, dataset.records)
        torch.manual_seed(job.seed)
        objective = job.inputs["objective"]
        encoder = new_encoder(job, records)
        if getattr(objective, "labels", False):
            records = label_records(records, dataset.plan)
            attach_head(encoder, records)
            tokens = classifiers.head_labels(encoder, records)
        else:
            tokens = tokenize_records(encoder, objective, records.captions, len(records))
        mark_encoder(encoder, objective, dataset.plan)
        on_vectors = getattr(objective, "as_stored", False) and locked_towers.is_locked(encoder)
        learner = locked_towers.Maps(encoder) if on_vectors else encoder
        loss = objective(learner).to(job.device)
        follow = make_follower(job, encoder, dataset)
        rank, world = collectives.rank_and_world()

        def order(epoch: int) -> Tensor:
            batches = loop.epoch_batches(job.seed, epoch, len(records), objective.batch)
            return collectives.local_rows(batches)

        def report(step: int, steps: int, value: float) -> None:
            job.progress.step(step, steps, f"loss {value:.3f}")

        opened: AbstractContextManager[Any]
        if on_vectors:
            vectors = locked_towers.embed_trunks(encoder, records, job.progress.step)
            tokens, opened = vectors.captions, nullcontext(vectors)
        else:
            opened = prefetch.training_data(records, job.device, order, objective.epochs)
        with opened as data:
            log = loop.fit(
                loss, objective, data, tokens, job.seed, job.folder / CHECKPOINT, report, follow
            )
        if rank > 0:
            return {}
        encoder.save(job.folder)
        ledger = {"exposures": log.exposures, "losses": torch.tensor(log.losses)}
        write_tensors(job.folder / "ledger.safetensors", ledger)
        finish_log(job.folder, log)
        speed = len(log.losses) * objective.batch / max(log.seconds, 1e-9)
        job.notes = dataset.reading_notes() | {
            "records": len(records),
            "steps": len(log.losses),
            "pairs_per_second": round(speed),
            "precision": encoder.precision,
            "ranks": world,
            "images": describe_images(data),
        }
        return training_metrics(log, dataset.plan, records.ids)


def select_kept(job: Job, records: Any) -> Any:
    """The records of the keep-list; all without one, with a warning if they are a scan's."""
    data, scan = job.inputs["data"], job.inputs["keep"]
    if scan is not None:
        return records.select(records.find_rows(set(read_lines(scan.file("keep.txt")))))
    if isinstance(data, Run) and data.verb == "scan":
        warn(
            f"train: trains on all records that {data.name} scanned; to leave out what it "
            f"removed, add --keep {data.name}"
        )
    return records


def describe_images(data: Any) -> str:
    """For the manifest: where a training read images from, or what it read in their place."""
    if isinstance(data, locked_towers.TrunkVectors):
        return "vectors of the locked trunks, computed once"
    return data.describe() if isinstance(data, prefetch.Prefetcher) else "in memory"


def new_encoder(job: Job, records: Pairs | StoredPairs) -> Encoder:
    """An untrained encoder for the records. Raises UserError if the network does not fit them."""
    network = job.inputs["network"]
    try:
        encoder: Encoder = network(records.size, network.vocabulary(records.captions))
    except ValueError as error:
        raise UserError(str(error)) from error
    if line := inputs.describe_weights(encoder):
        warn(line)
    return encoder.to(job.device)


def mark_encoder(encoder: Encoder, objective: Any, plan: Plan) -> None:
    """Set the precision, and note the objective and the poisoning of the data in the encoder."""
    encoder.precision = precision_for(encoder.device)
    poisoned = bool(plan.edits) or encoder.about.get("poisoned", False)  # by its trunks' training
    encoder.about |= {"objective": registry.spec(objective), "poisoned": poisoned}
    if plan.edits:
        encoder.about |= {"plan": plan.digest(), "goals": [vars(goal) for goal in plan.goals]}


def label_records(records: Pairs | StoredPairs, plan: Plan) -> Pairs | StoredPairs:
    """The labelled records; poisons have the label of their goal's target.

    Raises UserError for records without labels.
    """
    if records.labels is None or not records.classes:
        raise UserError("objective supervised needs data with labels and the names of classes")
    targets = {edit.id: plan.goals[edit.goal].target for edit in plan.edits}
    labels = records.labels.clone()
    for row, key in enumerate(records.ids if targets else ()):
        if targets.get(key, "") in records.classes:
            labels[row] = records.classes.index(targets[key])
    labelled = dataclasses.replace(records, labels=labels)
    if bool((labels < 0).any()):
        return labelled.select((labels >= 0).nonzero()[:, 0].tolist())
    return labelled


def attach_head(encoder: Encoder, records: Pairs | StoredPairs) -> None:
    """Give an encoder a linear head of the records' classes, unless its network has one.

    Raises UserError for a network whose head has another number of classes, or that reads text.
    """
    if encoder.text is not None:
        raise UserError(
            "objective supervised trains images alone; take a network without a text tower"
        )
    count = len(records.classes)
    if encoder.head is None:
        width = selfsupervised.measure_width(encoder)
        encoder.head = nn.Linear(width, count).to(encoder.device)
    elif len(encoder.about["classes"]) != count:
        raise UserError(
            f"the network's head has {len(encoder.about['classes'])} classes, the data {count}"
        )
    encoder.about["classes"] = list(records.classes)


def tokenize_records(
    encoder: Encoder, objective: Any, captions: Sequence[str], count: int
) -> Tensor:
    """The captions as tokens, int64 (count, L); L is 0 for an objective without captions.

    Raises UserError if the objective, the data and the encoder do not fit together.
    """
    objective_name = registry.method_name(type(objective))
    network_name = encoder.about["network"].partition(":")[0]
    if getattr(objective, "captions", True):
        if not captions:
            raise UserError(
                f"these data have no captions to train on, and objective {objective_name} needs "
                "them"
            )
        if encoder.text is None:
            raise UserError(
                f"objective {objective_name} reads captions, and network {network_name} has no "
                "text tower"
            )
        return tokenize_captions(encoder, captions)
    if encoder.text is not None:
        raise UserError(
            f"objective {objective_name} trains images alone, and network {network_name} has a "
            "text tower; take one without"
        )
    return torch.zeros(count, 0, dtype=torch.long, device=encoder.device)


def make_follower(
    job: Job, encoder: Encoder, dataset: Dataset
) -> Callable[[int], dict[str, float]] | None:
    """A function for the end of each epoch: it measures accuracy and success on `follow`.

    It uses the network's own head, zero-shot classification, or kNN if the encoder reads no text.
    None without data to follow.
    """
    if job.inputs["follow"] is None:
        return None
    followed = inputs.open_dataset(job.inputs["follow"])
    goals = [goal for goal in dataset.plan.goals if not goal.is_cover]
    if getattr(job.inputs["objective"], "labels", False):
        test, voters = inputs.in_memory(followed.clean), None
        probe = registry.make("probe", "own")
    elif encoder.text is None:
        test, voters = split_voters(followed, goals)
        k = min(NEIGHBOURS, max(1, len(voters) // 10))
        probe = registry.make("probe", f"knn:k={k},temperature=0.5")
    else:
        test, voters = inputs.in_memory(followed.clean), None
        probe = registry.make("probe", "zero_shot")
    test = test.take(range(min(FOLLOWED, len(test))))

    def follow(epoch: int) -> dict[str, float]:
        measures = probe(encoder, voters, test, goals, dataset.victims)
        values = {
            key.removeprefix("knn.").removeprefix("own."): m.value for key, m in measures.items()
        }
        return {key: v for key, v in values.items() if key.startswith(FOLLOWED_METRICS)}

    return follow


def split_voters(followed: Dataset, goals: Sequence[Goal]) -> tuple[Pairs, Pairs]:
    """Test records and labelled voters for a kNN. All are clean.

    Voters come from the training split of the same data. Without one, a fixed fifth of the data
    (1000 at most) is tested, and the rest votes.

    Raises:
        UserError: if there are no such records; before anything is trained.
    """
    test = inputs.in_memory(followed.clean)
    if getattr(followed.method, "split", None) not in (None, "train"):
        train = inputs.read_pairs(evaluate.training_split(followed.method))
    else:
        rows = sample_rows(test.ids, len(test), 0)
        count = min(FOLLOWED, len(test) // 5)
        train = test.take(rows[count:])
        test = test.take(rows[:count])
    return test, success.select_labelled(train, test, goals, VOTERS)


def finish_log(folder: Path, log: TrainingLog) -> None:
    """Write log.jsonl, a line an epoch, and remove the checkpoint, which is not needed any more."""
    lines = [json.dumps(epoch) + "\n" for epoch in log.epochs]
    write_whole(folder / "log.jsonl", "".join(lines))
    (folder / CHECKPOINT).unlink(missing_ok=True)


def training_metrics(log: TrainingLog, plan: Plan, ids: Sequence[str]) -> dict[str, Measure]:
    """The last loss; for a poisoned set also the number of poisons, and their draws."""
    tail = torch.tensor(log.losses[-max(1, len(log.losses) // 20) :])
    metrics = {"final_loss": average(tail, "mean loss of the last twentieth of the steps")}
    if plan.edits:
        is_poison = torch.from_numpy(plan.mask(ids))
        poisons = int(is_poison.sum())
        exposures = int(log.exposures[is_poison].sum())
        metrics["poisons_kept"] = Measure.exact(
            poisons, len(ids), "poisons among the records trained on, counted"
        )
        metrics["poison_exposures"] = Measure.exact(
            exposures, poisons, "times that training drew a poison, counted"
        )
    return metrics
