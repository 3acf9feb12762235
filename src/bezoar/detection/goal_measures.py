"""Detection rates of each backdoor's poisons, where the plan is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bezoar.attacks.plan import Plan
from bezoar.detection import merging
from bezoar.evaluation.scores import Measure, Scores, detection_measures, proportion

OF_EACH_GOAL = ("auroc", "recall_at_1.5n", "precision_at_n")


def measure_goals(
    plan: Plan, merged: Scores, by_detector: Mapping[str, Scores]
) -> dict[str, Measure]:
    """Measure each backdoor's poisons against the clean records.

    Args:
        by_detector: what each detector said.

    Returns:
        `poisons_raised`, the share of the poisons that a detector raised. With several backdoors
        the measures of number i, these and OF_EACH_GOAL, end in `@i`, as those of their success.
    """
    backdoors = [i for i, goal in enumerate(plan.goals) if goal.trigger]
    aligned = [merging.align(s, merged) for s in by_detector.values() if s.raised is not None]
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
