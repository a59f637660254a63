"""The simple methods with which `quality.py` compares towers. Each returns `[num_queries, num_items]` scores."""

import warnings

import numpy as np


def popularity(split, seed):
    """The number of interactions in training."""
    counts = np.bincount(split.train.items, minlength=split.train.num_items)
    return np.broadcast_to(counts, (len(split.users), len(counts)))


def item_knn(split, seed, neighbors, shrink):
    """The sum of the similarities of an item to the items that a user has chosen.

    Formula: `s[i, j] = n[i, j] / (sqrt(n[i] * n[j]) + shrink)`, where `n` counts users, for the `neighbors` most
    similar items of each item. Source: M. Ferrari Dacrema et al., "Are we really making much progress?", RecSys 2019.
    """
    matrix = split.train.matrix()
    together = matrix.T @ matrix
    counts = np.diag(together).copy()
    similarity = together / (np.sqrt(np.outer(counts, counts)) + shrink + 1e-9)
    np.fill_diagonal(similarity, 0)
    if neighbors < len(counts):
        # Of each column, the similarities to the items that a user may have chosen.
        smallest = np.partition(similarity, -neighbors, axis=0)[-neighbors]
        similarity[similarity < smallest] = 0
    return split.matrix() @ similarity


def ease(split, seed, regularization):
    """EASE: H. Steck, "Embarrassingly shallow autoencoders for sparse data", WWW 2019, in closed form."""
    matrix = split.train.matrix()
    gram = matrix.T @ matrix
    gram[np.diag_indices_from(gram)] += regularization
    inverse = np.linalg.inv(gram)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return split.matrix() @ weights


def als(split, seed, factors, regularization, alpha):
    """ALS: Y. Hu et al., "Collaborative filtering for implicit feedback datasets", ICDM 2008, from `implicit`."""
    from implicit.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    with warnings.catch_warnings():
        # It would be faster if NumPy had one thread.
        warnings.filterwarnings("ignore", "OpenBLAS is configured", RuntimeWarning)
        model = AlternatingLeastSquares(factors, regularization=regularization, alpha=alpha, random_state=seed)
    model.fit(csr_matrix(split.train.matrix()), show_progress=False)
    if split.are_new:
        known = csr_matrix(split.matrix())
        users = model.recalculate_user(np.arange(len(split.users)), known)
    else:
        users = model.user_factors[split.users]
    return np.asarray(users) @ np.asarray(model.item_factors).T


def ranks_of(scores, split):
    """Returns the ranks of the held-out items, as `index.ranks` does: `[num_queries, m]` int32, -1 for none."""
    scores = scores.astype("float64")
    seen = split.seen()
    rows, columns = np.nonzero(seen >= 0)
    scores[rows, seen[rows, columns]] = -np.inf
    # A stable sort ranks equal scores by lower row, as the package does.
    order = np.argsort(-scores, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
    own = np.take_along_axis(ranks, np.maximum(split.held_out, 0), axis=1)
    return np.where(split.held_out < 0, -1, own).astype("int32")
