"""How far predicted chances are from what happened: reliability bins, expected calibration error, AUC.

    ECE = sum over bins of share * |mean predicted - share observed|

Bins hold equally many samples: survival of deep positions lies close to 0, where bins of equal width would be one.
Even a perfect prediction has an ECE above 0 on finitely many samples; `ece_floor` says which.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BINS = 10


def reliability(chance: Floats, happened: Bools, bins: int = BINS) -> tuple[Floats, Floats, Floats]:
    """float64 `[bins]` each: mean predicted, share observed and share of all samples, from the least chance up.

    chance, happened: `[n]`; fewer than `bins` samples make as many bins
    """
    parts = _bins(chance, bins)
    predicted = np.array([chance[part].mean() for part in parts])
    observed = np.array([happened[part].mean() for part in parts])
    return predicted, observed, np.array([len(part) / len(chance) for part in parts])


def _bins(chance: Floats, bins: int) -> list[NDArray[np.int64]]:
    """The samples of each bin."""
    return np.array_split(np.argsort(chance, kind="stable"), max(1, min(bins, len(chance))))


def ece(chance: Floats, happened: Bools, bins: int = BINS) -> float:
    """The expected calibration error, 0 to 1."""
    predicted, observed, share = reliability(chance, happened, bins)
    return float((share * np.abs(predicted - observed)).sum())


def ece_floor(chance: Floats, bins: int = BINS) -> float:
    """The ECE to expect on as many samples if every chance were exactly right.

    A bin's share observed is then off by a nearly normal error of variance sum p (1 - p) / m^2, m samples, and the mean
    of a normal error's size is sqrt(2 / pi) of its deviation.
    """
    spread = np.array([(chance[part] * (1 - chance[part])).sum() for part in _bins(chance, bins)])
    return float(np.sqrt(2 / np.pi * spread).sum() / len(chance))


def auc(chance: Floats, happened: Bools) -> float:
    """The chance that one that happened was predicted above one that did not, ties half; NaN without both."""
    yes = int(happened.sum())
    no = len(happened) - yes
    if not yes or not no:
        return float("nan")
    _, place, count = np.unique(chance, return_inverse=True, return_counts=True)
    rank = (count.cumsum() - (count - 1) / 2)[place]  # from 1; those that tie share their mean
    return float((rank[happened].sum() - yes * (yes + 1) / 2) / (yes * no))
