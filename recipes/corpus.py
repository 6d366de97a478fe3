"""From response files to what training needs: the split, shuffled batches, the hot vocabulary, bigram statistics.

Knows token ids and nothing of the target or the draft; the held-out split is by prompt and never leaks into a batch.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from recipes.data import Record, read_records

# One prompt in this many is held out, and about so many responses of them are scored.
HOLDOUT_SHARE, HOLDOUT_SIZE = 40, 32


def read_corpus(paths: list[str], max_length: int) -> list[Record]:
    """Every response of the files once, but for the longest and those too short to hold a draft."""
    seen: set[bytes] = set()
    kept: list[Record] = []
    for path in paths:
        for record in read_records(path):
            whole = record.prompt_ids + record.response_ids
            key = json.dumps(whole).encode()
            if key in seen or len(record.response_ids) < 4 or len(whole) > max_length:
                continue
            seen.add(key)
            kept.append(record)
    return kept


def split(records: list[Record]) -> tuple[list[int], list[int]]:
    """Which records are trained on and which are held out; by prompt, so no held-out prompt is ever trained on."""
    train: list[int] = []
    held: list[int] = []
    for i, record in enumerate(records):
        out = zlib.crc32(json.dumps(record.prompt_ids).encode()) % HOLDOUT_SHARE == 0
        (held if out else train).append(i)
    step = max(1, len(held) // HOLDOUT_SIZE)
    return train, held[::step][:HOLDOUT_SIZE]


def batches(records: list[Record], size: int, seed: int) -> Iterator[list[int]]:
    """Endless shuffled batches of indices, records of similar lengths together; the same for every draft."""
    if len(records) < size:
        raise SystemExit(f"error: {len(records)} responses to train on are fewer than --sequences {size}; write more")
    rng = random.Random(seed)
    lengths = [len(r) for r in records]
    while True:
        # A little noise on the length keeps neighbours changing from epoch to epoch.
        noisy = [length + rng.uniform(0, 12) for length in lengths]
        order = sorted(range(len(records)), key=noisy.__getitem__)
        starts = list(range(0, len(order) - size + 1, size))
        rng.shuffle(starts)
        for at in starts:
            yield order[at : at + size]


def hot_vocabulary(records: list[Record], coverage: float) -> Tensor:
    """Sorted ids of the most frequent response tokens: the smallest multiple of 1024 that covers `coverage`."""
    counts = Counter(token for r in records for token in r.response_ids)
    wanted, covered, n = coverage * sum(counts.values()), 0, 0
    ordered = [token for token, _ in counts.most_common()]
    while covered < wanted:
        covered, n = covered + counts[ordered[n]], n + 1
    n = min(len(ordered), math.ceil(n / 1024) * 1024)
    return torch.tensor(sorted(ordered[:n]))


def bigram_factors(records: list[Record], hot: Tensor, vocab: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """W1 [vocab, rank], W2 [v, rank], log unigram [v]: truncated SVD of smoothed, positive log p(b|a) / p(b)."""
    column = torch.full((vocab,), -1, dtype=torch.long)
    column[hot] = torch.arange(len(hot))
    text = torch.cat([torch.tensor(r.response_ids) for r in records])
    a, b = text[:-1], column[text[1:]]
    a, b = a[b >= 0], b[b >= 0]
    pair, count = torch.unique(a * len(hot) + b, return_counts=True)
    a, b, count = pair // len(hot), pair % len(hot), count.double()
    row_sum = torch.zeros(vocab, dtype=torch.double).index_add_(0, a, count)
    col_sum = torch.zeros(len(hot), dtype=torch.double).index_add_(0, b, count)
    unigram = (col_sum + 0.5) / (col_sum + 0.5).sum()
    # Shrink towards the unigram by 20 pseudo counts, so that rare pairs say little.
    ratio = ((count + 20 * unigram[b]) / (row_sum[a] + 20) / unigram[b]).log().clamp(min=0)
    weight = ratio * (row_sum[a] / (row_sum[a] + 20)).sqrt()
    matrix = torch.sparse_coo_tensor(torch.stack([a, b]), weight.float(), (vocab, len(hot))).coalesce()
    u, s, v = torch.svd_lowrank(matrix, q=rank, niter=4)
    return u * s.sqrt(), v * s.sqrt(), unigram.log().float()
