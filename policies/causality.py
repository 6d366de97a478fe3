"""Refuses policies that would bias sampling: the check, made at load, that speculation stays lossless.

Rejection sampling is exact only if whether draft token x_j is offered was settled by what was known before x_j was
drawn. The confidence of position j + 1 reads x_j, so a search that looks at it before deciding on x_j selects among the
tokens themselves.

The paper's counter-example: steps per second 1.0, 0.5, 0.45 for 1, 2, 3 rows; first confidence 0.8; target (0.7, 0.3)
and draft (0.5, 0.5) over {A, B}; second confidence 0.9 after A and 0 after B. Looking back, it is best to offer two
tokens after A and none after B, and A comes out with 0.85 instead of 0.7. Deciding in order gives 0.7.

    early_stop   admits in order of survival, stops where the objective does not grow: each token before the next
    lagged       takes the budget from an earlier step's confidences
    global       searches all budgets on this step's confidences: exact under `match` only, where a draft token is
                 accepted if it equals a token drawn without looking at it
"""

from .language import Accept, Schedule, SloSchedule, ThroughputSchedule

OBJECTION = (
    "causality 'global' decides on a token after looking at confidences that were computed from it, which biases "
    "rejection sampling; use early_stop or lagged, or set accept.method: match"
)


def objection(schedule: Schedule, accept: Accept) -> str | None:
    """Why this schedule would change the output distribution, or None. `auto` acceptance may mean rejection."""
    looks_ahead = isinstance(schedule, (ThroughputSchedule, SloSchedule)) and schedule.causality == "global"
    return OBJECTION if looks_ahead and accept.method != "match" else None
