"""Layouts against their definition, on random forests."""

import pytest
import torch

from dspark_sgl.kernels.layout import ROOT, TreeLayout, chain_layout, tree_layout


def random_tree(bs: int, nodes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Anchors, tokens and parents; some nodes are absent."""
    g = torch.Generator().manual_seed(seed)
    anchors = torch.randint(100, (bs,), generator=g)
    tokens = torch.randint(100, (bs, nodes), generator=g)
    parents = torch.stack([torch.randint(0, n + 1, (bs,), generator=g) for n in range(nodes)], dim=1)
    # Absent nodes at the end only: nothing may hang from them.
    keep = torch.randint(1, nodes + 1, (bs, 1), generator=g)
    return anchors, tokens, parents.where(torch.arange(nodes) < keep, ROOT)


def paths(layout: TreeLayout, request: int) -> set[tuple[int, ...]]:
    """Every root-to-row token sequence of one request."""
    found = set()
    for row in range(layout.widths[request]):
        tokens = []
        while row != ROOT:
            tokens.append(int(layout.tokens[request, row]))
            row = int(layout.parents[request, row])
        found.add(tuple(reversed(tokens)))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_chain_is_a_tree_of_width_one(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    bs, depth = 1 + seed % 4, 1 + seed % 6
    depths = torch.randint(0, depth + 1, (bs,), generator=g).tolist()
    anchors, drafts = torch.arange(bs), torch.randint(100, (bs, depth), generator=g)
    chain = chain_layout(anchors, drafts, depths)
    parents = torch.arange(depth).expand(bs, depth)
    tree = tree_layout(anchors, drafts, parents, parents < torch.tensor(depths)[:, None])
    assert chain.widths == tree.widths
    assert torch.equal(chain.tokens, tree.tokens)
    assert torch.equal(chain.parents, tree.parents)
    assert torch.equal(chain.ancestor_mask(), tree.ancestor_mask())


@pytest.mark.parametrize("seed", range(30))
def test_tree_keeps_exactly_the_chosen_paths(seed: int) -> None:
    bs, nodes = 1 + seed % 3, 1 + seed % 9
    anchors, tokens, parents = random_tree(bs, nodes, seed)
    g = torch.Generator().manual_seed(1000 + seed)
    keep = torch.rand(bs, nodes, generator=g) < 0.7
    for node in range(nodes):
        up = parents[:, node]
        keep[:, node] &= (up <= 0) | keep.gather(1, (up - 1).clamp(min=0)[:, None])[:, 0]
    layout = tree_layout(anchors, tokens, parents, keep)
    for i in range(bs):
        wanted = {(int(anchors[i]),)}
        for node in range(nodes):
            path, row = [], node + 1
            if parents[i, node] == ROOT:
                continue
            while row > 0:
                path.append(int(tokens[i, row - 1]))
                row = int(parents[i, row - 1])
            if keep[i, node]:
                wanted.add((int(anchors[i]), *reversed(path)))
        assert paths(layout, i) == wanted
        for row in range(1, layout.widths[i]):
            parent = int(layout.parents[i, row])
            assert parent < row and layout.depths[i, row] == layout.depths[i, parent] + 1


@pytest.mark.parametrize("seed", range(20))
def test_ancestor_mask_is_the_transitive_closure(seed: int) -> None:
    bs, nodes = 1 + seed % 3, 1 + seed % 9
    anchors, tokens, parents = random_tree(bs, nodes, seed)
    layout = tree_layout(anchors, tokens, parents, torch.ones_like(tokens, dtype=torch.bool))
    mask, start = layout.ancestor_mask(), 0
    for i, width in enumerate(layout.widths):
        for row in range(width):
            seen, at = set(), row
            while at != ROOT:
                seen.add(at)
                at = int(layout.parents[i, at])
            assert set(mask[start + row].nonzero().flatten().tolist()) == seen
        start += width


def test_pack_and_pad_are_inverse() -> None:
    layout = chain_layout(torch.arange(3), torch.ones(3, 4, dtype=torch.int64), [4, 0, 2])
    packed = torch.arange(sum(layout.widths))
    assert torch.equal(layout.pack(layout.pad(packed)), packed)
    assert layout.qo_indptr.tolist() == [0, 5, 6, 9]
    assert layout.owner.tolist() == [0] * 5 + [1] + [2] * 3


@pytest.mark.parametrize(
    ("parents", "keep", "complaint"),
    [
        ([2, 0], [True, True], "precede"),
        ([-1, 1], [True, True], "absent"),
        ([0, 1], [False, True], "absent"),
    ],
)
def test_a_tree_that_does_not_hang_together_is_refused(parents: list[int], keep: list[bool], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tree_layout(torch.tensor([1]), torch.tensor([[2, 3]]), torch.tensor([parents]), torch.tensor([keep]))
