"""Plain steps or rounds: the kind that pays, and now and then a few steps of the other.

What a kind takes, only steps of it can tell, and what drafts are worth, only rounds. So a step that pays less is taken
on trial: `TRIAL` in a row, since the first after a change of kind says nothing of the price (`cost.py`). A trial costs

    TRIAL lost + CHANGE       steps,    lost = |tried - paying| / min(tried, paying)

with what a step of either kind is worth now, and comes so rarely that trials take `SHARE` of all steps: often where
both kinds are worth nearly the same, seldom where one is far behind. After a change of mind the first comes `HASTE`
times as soon, and the next half that. Only arithmetic: a turn is a value, and asking for the next one changes nothing.
"""

from dataclasses import dataclass, replace

TRIAL = 3
SHARE = 0.01
HASTE = 4
CHANGE = 0.5
"""What the first step of another kind takes more, in steps: between nothing and a whole one."""
MOST_LOST = 2.0
"""However far behind the other kind is, its trials come as if it lost no more than this."""
NEAR, BETTER = 0.1, 0.02
"""A probe is followed by another at once where it has brought the best round to within `NEAR` of a plain step, and
nearer than before by more than `BETTER`: half of all probes come nearer by chance, and a larger batch by rounding."""


@dataclass(frozen=True)
class Turn:
    """A step's place. drafting: rounds pay; on_trial: this step is of the other kind, and so are `left` more
    waited: steps since the last trial; haste: what the wait for the next one is divided by
    before: the best round's gain when the last probe began
    """

    drafting: bool = False
    on_trial: bool = False
    left: int = 0
    waited: int = 0
    haste: int = HASTE
    before: float = 0.0

    @property
    def is_round(self) -> bool:
        return self.drafting != self.on_trial

    @property
    def is_probe(self) -> bool:
        """A round among plain steps."""
        return self.on_trial and not self.drafting

    def next(self, best: float, probe: float, plain: float, margin: float, promised: bool) -> "Turn":
        """The turn after this one. best, probe, plain: what the best round, a probe and a plain step are worth

        Plain steps are left for a round that is worth the margin more, and rounds only for plain steps worth more.
        promised: some drafts must be made
        """
        margin = min(margin, 0.0) if self.drafting else margin
        drafting = promised or best > plain + margin * abs(plain)
        if drafting != self.drafting:
            return Turn(drafting, waited=1)
        if promised:
            return replace(self, on_trial=False, left=0)
        if self.left:
            return replace(self, left=self.left - 1)
        gain = _ahead(best, plain)
        again = self.is_probe and gain > max(-NEAR, self.before + BETTER)
        lost = min(abs(gain if drafting else _ahead(probe, plain)), MOST_LOST)
        if again or self.waited * self.haste >= (TRIAL * lost + CHANGE) / SHARE:
            return Turn(drafting, True, TRIAL - 1, 0, self.haste if again else max(1, self.haste // 2), gain)
        return replace(self, on_trial=False, waited=self.waited + 1)


def _ahead(one: float, other: float) -> float:
    """By what share of the lesser one is worth more than the other; a score below 0 is a promise that is not kept."""
    return (one - other) / max(min(abs(one), abs(other)), 1e-9)
