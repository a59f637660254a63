"""The formulas of the package as NumPy loops in float64. Does not import the package."""

import math

import numpy as np

# The rank of a candidate that is not in the list.
NOT_IN_LIST = 2**31 - 1


def similarity_score(query, candidate, similarity="dot"):
    query, candidate = np.asarray(query, np.float64), np.asarray(candidate, np.float64)
    bias = 0.0
    if similarity == "biased_cosine":
        bias, query, candidate = candidate[-1], query[:-1], candidate[:-1]
    if similarity != "dot":
        query, candidate = query / np.linalg.norm(query), candidate / np.linalg.norm(candidate)
    with np.errstate(invalid="ignore", over="ignore"):
        return float(query @ candidate + bias)


def best_head_score(query, candidate, similarity="dot"):
    heads = [query] if np.ndim(query) == 1 else query
    return max(similarity_score(head, candidate, similarity) for head in heads)


def softmax_rows(
    queries,
    candidates,
    *,
    similarity="dot",
    temperature=None,
    candidate_sampling_probability=None,
    candidate_ids=None,
    remove_accidental_hits=False,
    score_mask=None,
    candidate_mask=None,
    num_hard_negatives=None,
    positive_ids=None,
    negative_embeddings=None,
    negative_ids=None,
    negative_sampling_probability=None,
):
    """The logits of each query, its positive first, without those of excluded candidates and negatives.

    A sampling probability of 0 counts as one draw of the candidates that are present. -1 is the id of none.
    """
    rows = []
    num_present = len(candidates) if candidate_mask is None else int(np.sum(candidate_mask))

    def corrected(logit, probability):
        logit /= temperature or 1.0
        if probability is None:
            return logit
        return logit - math.log(min(max(float(probability) or 1 / max(num_present, 1), 1e-6), 1.0))

    for i, query in enumerate(queries):
        positive, kept = None, []
        for j, candidate in enumerate(candidates):
            probability = None if candidate_sampling_probability is None else candidate_sampling_probability[j]
            logit = corrected(best_head_score(query, candidate, similarity), probability)
            if i == j:
                positive = logit
                continue
            if remove_accidental_hits and candidate_ids[i] == candidate_ids[j]:
                continue
            if positive_ids is not None and candidate_ids[j] != -1 and candidate_ids[j] in positive_ids[i]:
                continue
            if score_mask is not None and not score_mask[i][j]:
                continue
            if candidate_mask is not None and not candidate_mask[j]:
                continue
            kept.append(logit)
        for k, negative in enumerate(() if negative_embeddings is None else negative_embeddings[i]):
            negative_id = None if negative_ids is None else negative_ids[i][k]
            if negative_id == -1 or (remove_accidental_hits and negative_id == candidate_ids[i]):
                continue
            if positive_ids is not None and negative_id is not None and negative_id in positive_ids[i]:
                continue
            probability = None if negative_sampling_probability is None else negative_sampling_probability[i][k]
            kept.append(corrected(best_head_score(query, negative, similarity), probability))
        kept.sort(reverse=True)
        rows.append([positive, *kept[:num_hard_negatives]])
    return rows


def softmax_loss(queries, candidates, *, sample_weight=None, candidate_mask=None, **arguments):
    """Mean cross-entropy over the valid rows."""
    total, count = 0.0, 0
    for i, logits in enumerate(softmax_rows(queries, candidates, candidate_mask=candidate_mask, **arguments)):
        if candidate_mask is not None and not candidate_mask[i]:
            continue
        largest = max(logits)
        log_sum = largest + math.log(sum(math.exp(logit - largest) for logit in logits))
        total += (log_sum - logits[0]) * (1.0 if sample_weight is None else float(sample_weight[i]))
        count += 1
    return total / max(count, 1)


def local_softmax_loss(queries, candidates, num_parts, *, sample_weight=None, **arguments):
    """`softmax_loss` if a query's negatives are the candidates of its own part of the batch, and the extra ones."""
    size, extra = len(queries) // num_parts, range(len(queries), len(candidates))
    total, count = 0.0, 0
    for part in range(num_parts):
        own = [*range(part * size, (part + 1) * size)]
        columns = [*own, *extra]
        given = {name: np.asarray(value)[columns] for name, value in arguments.items() if name in BY_CANDIDATE}
        given.update({name: np.asarray(value)[own] for name, value in arguments.items() if name in BY_QUERY})
        settings = {name: value for name, value in arguments.items() if name not in given}
        if "score_mask" in settings:
            settings["score_mask"] = np.asarray(settings["score_mask"])[np.ix_(own, columns)]
        weight = None if sample_weight is None else sample_weight[own]
        valid = int(np.sum(given["candidate_mask"][:size])) if "candidate_mask" in given else size
        mean = softmax_loss(queries[own], candidates[columns], sample_weight=weight, **given, **settings)
        total, count = total + mean * valid, count + valid
    return total / max(count, 1)


BY_CANDIDATE = ("candidate_sampling_probability", "candidate_ids", "candidate_mask")
BY_QUERY = ("positive_ids", "negative_embeddings", "negative_ids", "negative_sampling_probability")


def squared_error_loss(
    queries, candidates, labels, *, sample_weight=None, candidate_mask=None, similarity="dot", temperature=None
):
    """Mean squared error between labels and the scores of each query and its own candidate, over the valid rows."""
    total, count = 0.0, 0
    for i, label in enumerate(labels):
        if candidate_mask is not None and not candidate_mask[i]:
            continue
        score = best_head_score(queries[i], candidates[i], similarity) / (temperature or 1.0)
        total += (float(label) - score) ** 2 * (1.0 if sample_weight is None else float(sample_weight[i]))
        count += 1
    return total / max(count, 1)


def gradient(function, values, step=1e-5):
    """Central differences of a scalar function of one array."""
    values = np.array(values, np.float64)
    result = np.zeros_like(values)
    for index in np.ndindex(values.shape):
        saved = values[index]
        values[index] = saved + step
        above = function(values)
        values[index] = saved - step
        below = function(values)
        values[index] = saved
        result[index] = (above - below) / (2 * step)
    return result


def order_key(score):
    """NaN ranks as -inf."""
    return -math.inf if math.isnan(score) else score


def top_k(queries, table, k, *, similarity="dot", ids=None, exclude_ids=(), exclude_ids_by_query=None):
    """The scores and ids of the k best rows of each query. Equal scores rank by lower row.

    If fewer than k rows remain, the rest are -inf and -1. The results of a query with NaN are all NaN and -1.
    """
    ids = range(len(table)) if ids is None else ids
    all_scores, all_ids = [], []
    for number_of_query, query in enumerate(queries):
        if np.isnan(np.asarray(query, np.float64)).any():
            all_scores.append([math.nan] * k)
            all_ids.append([-1] * k)
            continue
        left_out = set(exclude_ids)
        if exclude_ids_by_query is not None:
            left_out |= set(np.asarray(exclude_ids_by_query[number_of_query]).tolist())
        scored = [
            (-order_key(similarity_score(query, row, similarity)), number, candidate_id)
            for number, (row, candidate_id) in enumerate(zip(table, ids, strict=True))
            if candidate_id not in left_out
        ]
        best = sorted(scored)[:k]
        missing = k - len(best)
        all_scores.append([-score for score, _, _ in best] + [-math.inf] * missing)
        all_ids.append([candidate_id for _, _, candidate_id in best] + [-1] * missing)
    return np.array(all_scores), np.array(all_ids)


def ranks(queries, table, candidate_ids, *, ids=None, exclude_ids=(), exclude_ids_by_query=None, similarity="dot"):
    """The rank of one candidate in the whole list of each query, or `NOT_IN_LIST`."""
    _, lists = top_k(
        queries,
        table,
        len(table),
        similarity=similarity,
        ids=ids,
        exclude_ids=exclude_ids,
        exclude_ids_by_query=exclude_ids_by_query,
    )
    return [
        row.tolist().index(wanted) if wanted in row else NOT_IN_LIST
        for row, wanted in zip(lists, candidate_ids, strict=True)
    ]


def recall(ranks, k):
    """The share of a query's positives with a rank below k. Ranks of -1 are padding."""
    positives = [int(rank) for rank in ranks if rank >= 0]
    return sum(rank < k for rank in positives) / len(positives)


def ndcg(ranks, k):
    """The discounted gain of the positives among the first k, divided by that of the ideal list."""
    positives = [int(rank) for rank in ranks if rank >= 0]
    gain = sum(1 / math.log2(rank + 2) for rank in positives if rank < k)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(k, len(positives))))


def reciprocal_rank(ranks):
    """`1 / (1 + rank)` of the best positive."""
    best = min(int(rank) for rank in ranks if rank >= 0)
    return 0.0 if best == NOT_IN_LIST else 1 / (1 + best)


def mean_over_queries(value, ranks, sample_weight=None):
    """The weighted mean of a value over the queries that have a positive, or 0 if none has."""
    total, count = 0.0, 0.0
    for number, row in enumerate(np.reshape(ranks, (len(ranks), -1)).tolist()):
        if max(row) < 0:
            continue
        weight = 1.0 if sample_weight is None else float(sample_weight[number])
        total += weight * value(row)
        count += weight
    return total / count if count else 0.0


def sampling_probability(batches, num_candidates, window, masks=None):
    """The exponential moving average of each candidate's share of the examples, `[num_batches, num_candidates]`.

    Row i is the average after batch i. A batch of n examples multiplies the weight of earlier ones by
    `exp(-n / window)`.
    """
    share, results = np.zeros(num_candidates), []
    for number, batch in enumerate(batches):
        mask = [True] * len(batch) if masks is None else masks[number]
        counts = np.zeros(num_candidates)
        for candidate, is_counted in zip(batch, mask, strict=True):
            counts[candidate] += bool(is_counted)
        if counts.sum():
            kept = math.exp(-counts.sum() / window)
            share = kept * share + (1 - kept) * counts / counts.sum()
        results.append(share / share.sum() if share.sum() else share)
    return np.array(results)


def group_candidate_ids(query_ids, candidate_ids, queries):
    """The unique candidates of each query, in the order of the pairs, in rows padded with -1."""
    pairs = list(zip(query_ids, candidate_ids, strict=True))
    rows = [list(dict.fromkeys(c for q, c in pairs if q == query)) for query in queries]
    width = max([1, *map(len, rows)])
    return np.array([row + [-1] * (width - len(row)) for row in rows]).reshape(len(rows), width)


def cross_batch_memory(batches, capacity, masks=None):
    """The rows in the memory before each batch and after the last, by place; `None` for empty places.

    A batch is a list of rows of any kind.
    """
    held, place, results = [None] * capacity, 0, []
    for number, batch in enumerate(batches):
        results.append(list(held))
        for row_number, row in enumerate(batch):
            if masks is None or masks[number][row_number]:
                held[place % capacity] = row
                place += 1
    return [*results, held]


def mixed_sampling_probability(ids, in_batch_probability, num_candidates, num_in_batch, num_negatives, exclude_ids=()):
    """The expected number of draws of each id, divided by the number of all draws."""
    num_drawn_from = len(set(range(num_candidates)) - set(exclude_ids))
    results = []
    for candidate in ids:
        expected = num_in_batch * float(in_batch_probability[candidate])
        if candidate not in exclude_ids:
            expected += num_negatives / num_drawn_from
        results.append(expected / (num_in_batch + num_negatives))
    return np.array(results)


def row_optimizer_step(
    kind,
    table,
    slots,
    ids,
    gradients,
    *,
    learning_rate,
    step,
    clipnorm=None,
    epsilon=1e-7,
    beta_1=0.9,
    beta_2=0.999,
):
    """The table and its slots after a step. Negative ids count from the end. An id out of range prevents the step."""
    table, slots = np.array(table, np.float64), {name: np.array(slot, np.float64) for name, slot in slots.items()}
    sums = {}
    for row, gradient in zip(np.ravel(ids).tolist(), np.reshape(gradients, (-1, table.shape[1])), strict=True):
        row += len(table) if row < 0 else 0
        if not 0 <= row < len(table):
            return table, slots
        sums[row] = sums.get(row, 0.0) + np.asarray(gradient, np.float64)
    for row, gradient in sums.items():
        if clipnorm is not None:
            gradient = gradient * min(1.0, clipnorm / max(np.linalg.norm(gradient), 1e-300))
        change = learning_rate * gradient
        if kind in ("adagrad", "rowwise_adagrad"):
            squares = gradient**2
            slots["accumulator"][row] += squares if kind == "adagrad" else squares.mean()
            change = change / np.sqrt(slots["accumulator"][row] + epsilon)
        if kind == "lazy_adam":
            slots["momentum"][row] = beta_1 * slots["momentum"][row] + (1 - beta_1) * gradient
            slots["velocity"][row] = beta_2 * slots["velocity"][row] + (1 - beta_2) * gradient**2
            # As in Keras, epsilon is added to the root before bias correction.
            rate = learning_rate * math.sqrt(1 - beta_2**step) / (1 - beta_1**step)
            change = rate * slots["momentum"][row] / (np.sqrt(slots["velocity"][row]) + epsilon)
        table[row] -= change
    return table, slots
