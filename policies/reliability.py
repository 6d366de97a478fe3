"""How far predicted chances are from what happened: reliability bins, expected calibration error, AUC.

    ECE = sum over bins of share * |mean predicted - share observed|

Bins hold equally many samples: survival of deep positions lies close to 0, where bins of equal width would be one.
Even a perfect prediction has an ECE above 0 on finitely many samples; `floor` says which. A `Tally` counts as samples
come, keeps none, and so has bins of equal width.
"""

from dataclasses import dataclass

import numpy as np

from .batch import Bools, Floats, Ints

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Bins, least chance first. predicted: mean chance; observed: share that happened; count: samples; all `[b]`"""

    predicted: Floats
    observed: Floats
    count: Ints

    @classmethod
    def of(cls, chance: Floats, happened: Bools, bins: int = BINS) -> "Reliability":
        """chance, happened: `[n]`, n > 0; fewer than `bins` samples make as many bins"""
        order, bins = np.argsort(chance, kind="stable"), min(bins, len(chance))
        starts = np.arange(bins) * len(chance) // bins
        count = np.diff(starts, append=len(chance))
        predicted = np.add.reduceat(chance[order], starts) / count
        return cls(predicted, np.add.reduceat(happened[order].astype(np.float64), starts) / count, count)

    @property
    def ece(self) -> float:
        """The expected calibration error, 0 to 1."""
        return float((self.count * np.abs(self.predicted - self.observed)).sum() / self.count.sum())

    @property
    def floor(self) -> float:
        """The ECE to expect on as many samples if every chance were exactly right.

        The share observed in a bin of m samples is then off by a nearly normal error of variance p (1 - p) / m, and the
        mean size of a normal error is sqrt(2 / pi) of its deviation.
        """
        error = np.sqrt(2 / np.pi * self.predicted * (1 - self.predicted) / self.count)
        return float((self.count * error).sum() / self.count.sum())


def auc(chance: Floats, happened: Bools) -> float:
    """The chance that one that happened was predicted above one that did not, ties half; NaN without both."""
    yes = int(happened.sum())
    no = len(happened) - yes
    if not yes or not no:
        return float("nan")
    _, place, count = np.unique(chance, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]  # from 1; those that tie share their mean
    return float((rank[happened].sum() - yes * (yes + 1) / 2) / (yes * no))


class Tally:
    """Chances and outcomes of a running server: what came between two reports is their difference."""

    def __init__(self, bins: int = BINS) -> None:
        self._predicted, self._happened, self._count = np.zeros((3, bins))

    def add(self, chance: Floats, happened: Bools) -> None:
        """chance, 0 to 1, and happened: `[n]`"""
        bins = len(self._count)
        place = np.minimum((chance * bins).astype(np.int64), bins - 1)
        self._predicted += np.bincount(place, chance, bins)
        self._happened += np.bincount(place, happened, bins)
        self._count += np.bincount(place, minlength=bins)

    @property
    def report(self) -> dict[str, list[float]]:
        """Sums per bin, least chance first: predicted, happened, count."""
        sums = {"predicted": self._predicted, "happened": self._happened, "count": self._count}
        return {name: values.round(3).tolist() for name, values in sums.items()}
