"""What a draft model returned that is no number: counted, and named in the log. Decides nothing."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dspark_sgl.policies.calibration import Calibration

logger = logging.getLogger(__name__)


class BadDrafts:
    """calibrations: all that read confidences, and count those that are NaN or outside 0 to 1."""

    def __init__(self, calibrations: Sequence[Calibration]) -> None:
        self._calibrations = calibrations
        self.unsound = 0
        """Drafts drawn from a distribution of NaN."""
        self._named = 0

    @property
    def confidences(self) -> int:
        return sum(calibration.bad for calibration in self._calibrations)

    @property
    def total(self) -> int:
        return self.unsound + self.confidences

    def name(self) -> None:
        """The log says so the first time, and whenever there are ten times as many."""
        if self.total >= max(1, 10 * self._named):
            self._named = self.total
            logger.warning(
                "dspark: the draft has returned NaN, or a confidence outside 0 to 1, for %d drafts: none is accepted, "
                "and answers stay exact; check its checkpoint",
                self._named,
            )
