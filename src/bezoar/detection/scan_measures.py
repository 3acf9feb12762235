"""The metrics of a scan: what was raised, and how well known poisons were detected."""

from collections.abc import Mapping

import torch

from bezoar.attacks.plan import Plan
from bezoar.detection import merging
from bezoar.detection.ranking import Ranking
from bezoar.evaluation.scores import Measure, Scores, detection_measures, proportion

OF_EACH_GOAL = ("auroc", "recall_at_1.5n", "precision_at_n")


def plan_metrics(plan: Plan, ranking: Ranking) -> dict[str, Measure]:
    """Return how well the poisons of a known plan were detected and removed, if it has any."""
    if not plan.edits:
        return {}
    return (
        detection_metrics(plan, ranking)
        | goal_metrics(plan, ranking)
        | removal_metrics(plan, ranking)
    )


def detection_metrics(plan: Plan, ranking: Ranking) -> dict[str, Measure]:
    """Return how well the poisons of a plan were detected by all detectors and by each."""
    truth = torch.from_numpy(plan.mask(ranking.merged.ids))
    metrics = detection_measures(ranking.merged, truth)
    if len(ranking.by_detector) == 1:
        return metrics
    for name, scores in ranking.by_detector.items():
        measures = detection_measures(scores, torch.from_numpy(plan.mask(scores.ids)))
        metrics |= {f"{name}.{key}": measure for key, measure in measures.items()}
    return metrics


def goal_metrics(plan: Plan, ranking: Ranking) -> dict[str, Measure]:
    """Measure each backdoor's poisons against the clean records.

    Returns:
        `poisons_raised`, the share of the poisons that a detector raised. With several backdoors
        the measures of number i, these and OF_EACH_GOAL, end in `@i`, as those of their success.
    """
    merged = ranking.merged
    backdoors = [i for i, goal in enumerate(plan.goals) if goal.trigger]
    aligned = [
        merging.align(s, merged) for s in ranking.by_detector.values() if s.raised is not None
    ]
    raised = torch.from_numpy(merging.raised_rows(aligned, len(merged)))
    goal_of = {edit.id: edit.goal for edit in plan.edits}
    goals = torch.tensor([goal_of.get(record_id, -1) for record_id in merged.ids])
    measures: dict[str, Measure] = {}
    for number, goal in enumerate(backdoors):
        suffix = f"@{number}" if len(backdoors) > 1 else ""
        is_poison = goals == goal
        hits, count = int((raised & is_poison).sum()), int(is_poison.sum())
        if not count or not (goals < 0).any():
            continue
        how = "poisons of this backdoor that a detector has raised"
        measures[f"poisons_raised{suffix}"] = proportion(hits, count, how)
        if suffix:
            rows = (is_poison | (goals < 0)).nonzero()[:, 0]
            part = Scores([merged.ids[row] for row in rows.tolist()], merged.values[rows])
            of_goal = detection_measures(part, is_poison[rows])
            measures |= {f"{name}{suffix}": of_goal[name] for name in OF_EACH_GOAL}
    return measures


def removal_metrics(plan: Plan, ranking: Ranking) -> dict[str, Measure]:
    """Return how many of the poisons the keep-list leaves out."""
    removed_ids = {ranking.merged.ids[row] for row in ranking.leaving}
    hits = sum(edit.id in removed_ids for edit in plan.edits)
    how = "poisons that the keep-list leaves out"
    return {"poisons_removed": proportion(hits, len(plan.edits), how)}


def decision_metrics(by_detector: Mapping[str, Scores]) -> dict[str, Measure]:
    """The share of records that detectors say show a trigger. On clean data all of these are false
    alarms.

    What shows no trigger, copies of a picture whose captions diverge, is a metric of another name.
    """
    metrics = {}
    for name, scores in by_detector.items():
        if scores.raised is None:
            continue
        how = "share of the records that are said to show a trigger; of clean data, false alarms"
        key = f"{name}.raised"
        if scores.groups is not None:
            how = "share of the records that are copies of a picture with many captions"
            key = f"{name}.copies"
        metrics[key] = proportion(int(scores.raised.sum()), len(scores), how)
    return metrics
