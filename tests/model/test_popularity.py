"""Lists and ranks by popularity, compared with loops."""

import numpy as np
import pytest

from keras_rs_contrib.model.popularity import Popularity

INDEX_IDS = np.array([40, 7, 3, 12, 9, 25, 2])
COUNTED, COUNTS = np.array([2, 3, 9, 12, 99]), np.array([4, 1, 4, 6, 50])
POPULARITY = Popularity.of_candidates(INDEX_IDS, [3], COUNTED, COUNTS)
# The most rows first, equal numbers by row; 3 is never returned, and 99 is not in the index.
ORDER = [12, 9, 2, 40, 7, 25]


def limits_of(rng, name):
    exclude = rng.choice([*INDEX_IDS, -1, 77], (5, 3)) if "exclude" in name else None
    include = {"include": rng.choice([*INDEX_IDS, -1, 77], 4), "includes": rng.choice(INDEX_IDS, (5, 4))}.get(
        name.split()[-1]
    )
    mask = {"mask": rng.random(7) < 0.5, "masks": rng.random((5, 7)) < 0.5}.get(name.split()[-1])
    return {"exclude_ids": exclude, "include_ids": include, "include_mask": mask}


def naive_list(query, exclude_ids, include_ids, include_mask):
    excluded = [] if exclude_ids is None else exclude_ids[query].tolist()
    result = [each for each in ORDER if each not in excluded]
    if include_ids is not None:
        result = [each for each in result if each in (include_ids if include_ids.ndim == 1 else include_ids[query])]
    if include_mask is not None:
        mask = include_mask if include_mask.ndim == 1 else include_mask[query]
        result = [each for each in result if mask[INDEX_IDS.tolist().index(each)]]
    return result


@pytest.mark.parametrize(
    "name",
    ["none", "exclude", "include", "includes", "mask", "masks", "exclude include", "exclude includes", "exclude masks"],
)
@pytest.mark.parametrize("k", [1, 4, 7])
def test_lists_and_ranks_match_loops(rng, name, k):
    for _ in range(20):
        limits = limits_of(rng, name)
        lists = [naive_list(query, **limits) for query in range(5)]
        ids, counts = POPULARITY.find(k, 5, **limits)
        assert ids.tolist() == [(row + [-1] * k)[:k] for row in lists]
        expected = [[dict(zip(COUNTED, COUNTS, strict=True)).get(each, 0) for each in row] for row in lists]
        assert counts.tolist() == [(row + [-np.inf] * k)[:k] for row in expected]
        targets = rng.choice([*INDEX_IDS, -1, 77], (5, 3))
        ranks = POPULARITY.ranks(targets, **limits)
        for row, ids_of_row, ranks_of_row in zip(lists, targets.tolist(), ranks.tolist(), strict=True):
            expected = [row.index(each) if each in row else 2**31 - 1 for each in ids_of_row]
            expected = [-1 if each == -1 else rank for each, rank in zip(ids_of_row, expected, strict=True)]
            assert ranks_of_row == expected


def test_no_queries_have_no_lists_and_ranks():
    assert POPULARITY.find(3, 0)[0].shape == (0, 3)
    assert POPULARITY.ranks(np.empty((0, 2), int)).shape == (0, 2)
    assert POPULARITY.ranks(np.empty((0, 2), int), exclude_ids=np.empty((0, 1), int)).shape == (0, 2)
