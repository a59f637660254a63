"""Retrieval in native TensorFlow operations, which TensorFlow runs alone and converters to other formats know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rs_contrib.export.retrieval import ExportedFeature, ExportedRetrieval, ExportedTower
from keras_rs_contrib.ids import NO_CANDIDATE
from keras_rs_contrib.index.score_blocks import BLOCK_SIZE, LOWEST
from keras_rs_contrib.index.top_k import group_size
from keras_rs_contrib.names import NO_ROW
from keras_rs_contrib.scores import comparable_queries
from keras_rs_contrib.vocabulary import UNKNOWN_ROW

# The smallest number of candidates for which two levels are faster than one.
MIN_TWO_LEVEL_SIZE = 2**12


class Retrieval(tf.Module):  # type: ignore[misc]
    """Finds candidates for queries.

    Args:
        retrieval: what is exported.
        tower: maps a dict of features to `[batch, embedding_dim]` float32.
        by_name: whether queries and candidates have names, where there are vocabularies, or rows.
    """

    def __init__(self, retrieval: ExportedRetrieval, tower: ExportedTower, by_name: bool) -> None:
        super().__init__(name="retrieval")
        self.retrieval = retrieval
        self.by_name = by_name
        # Not the tower itself, for which Keras would write a signature of its own.
        self.embed: Callable[[dict[str, Any]], Any] = lambda features: tower(features)
        self.tower_variables = [variable.value for variable in tower.variables]
        arrays = dict(retrieval.arrays)
        ids = arrays.pop("ids")
        self.num_candidates = len(ids)
        # The rows that follow stand for no candidate: they fill the last group, with at least one.
        table = arrays.pop("table")
        self.group_size = group_size(len(ids), retrieval.k) if len(ids) >= MIN_TWO_LEVEL_SIZE else 1
        num_added = self.group_size - len(ids) % self.group_size
        # One more number of each row decides: 0 of a candidate, which changes no score, or a score below all others.
        bias = np.repeat(np.array([0, LOWEST], "float32"), [len(ids), num_added])
        order = np.argsort(ids)
        arrays.update(
            table=np.column_stack([np.pad(table, ((0, num_added), (0, 0))), bias]),
            ids=np.pad(ids, (0, num_added), constant_values=NO_CANDIDATE),
            sorted_ids=ids[order],
            rows=order.astype("int32"),
        )
        self.num_rows = len(ids) + num_added
        self.arrays = {name: tf.Variable(array, trainable=False, name=name) for name, array in arrays.items()}
        self.candidate_names = self.row_of_candidate = None
        self.row_of_name: dict[str, Any] = {}
        if by_name:
            self.row_of_name = {each.name: _lookup(each.names) for each in retrieval.features if each.names is not None}
            if retrieval.candidate_names is not None:
                names = _as_array(retrieval.candidate_names)
                # By id: of no candidate, of row 0, and of the names.
                no_name = names[:1].astype(names.dtype, copy=True)
                no_name[:] = NO_CANDIDATE if names.dtype.kind == "i" else b""
                self.candidate_names = tf.Variable(np.concatenate([no_name, no_name, names]), trainable=False)
                self.row_of_candidate = _lookup(retrieval.candidate_names)

    def features(self) -> dict[str, Any]:
        """Returns the `tf.TensorSpec` of each feature, by name."""
        return {each.name: self._spec(each) for each in self.retrieval.features}

    def exclude_ids(self) -> Any:
        """Returns the `tf.TensorSpec` of excluded ids, `[batch, m]`."""
        dtype = tf.int32 if self.candidate_names is None else self.candidate_names.dtype
        return tf.TensorSpec((None, None), dtype, name="exclude_ids")

    def find(self, features: dict[str, Any], exclude_ids: Any = None) -> dict[str, Any]:
        """Returns `ids` and `scores` of the best candidates, both `[batch, k]`.

        Args:
            features: tensors by name, with names where the feature has a lookup.
            exclude_ids: `[batch, m]` ids or names, -1 or "" for none; or `None`.
        """
        rows = {name: self._rows(name, values) for name, values in features.items()}
        queries = self.embed({each.name: rows[each.name] for each in self.retrieval.features if each.is_of_tower})
        queries = comparable_queries(queries, self.retrieval.similarity)
        batch = tf.shape(queries)[0]
        places = []
        if exclude_ids is not None:
            if self.row_of_candidate is not None:
                exclude_ids = self.row_of_candidate.lookup(exclude_ids)
            found = self._places(exclude_ids)
            # A single row is for all queries.
            places.append(found + tf.zeros((batch, 1), tf.int32))
        if "seen_ids" in self.arrays:
            places.append(self._places(self._seen(rows[str(self.retrieval.query_id)])))
        unknown = self._are_unknown(rows)
        parts = {"queries": queries, "unknown": unknown, "excluded": tf.concat(places, axis=1) if places else None}
        return self._in_blocks({name: part for name, part in parts.items() if part is not None})

    def _in_blocks(self, parts: dict[str, Any]) -> dict[str, Any]:
        num_queries = tf.shape(parts["queries"])[0]
        most = max(1, BLOCK_SIZE // self.num_rows)

        def at_once() -> tuple[Any, Any]:
            return self._search(**parts)

        def by_block() -> tuple[Any, Any]:
            num_blocks = (num_queries + most - 1) // most
            missing = num_blocks * most - num_queries

            def to_blocks(array: Any) -> Any:
                padding = [[0, missing], *[[0, 0]] * (array.shape.rank - 1)]
                return tf.reshape(tf.pad(array, padding), tf.concat([[num_blocks, most], tf.shape(array)[1:]], 0))

            scores, ids = tf.map_fn(
                lambda block: self._search(**block),
                {name: to_blocks(part) for name, part in parts.items()},
                fn_output_signature=(tf.float32, tf.int32),
            )
            shape = (-1, self.retrieval.k)
            return tf.reshape(scores, shape)[:num_queries], tf.reshape(ids, shape)[:num_queries]

        # Converters do not know all of TensorFlow's control flow.
        scores, ids = tf.cond(num_queries <= most, at_once, by_block) if self.by_name else at_once()
        scores, ids = (tf.ensure_shape(each, (None, self.retrieval.k)) for each in (scores, ids))
        return {
            "ids": ids if self.candidate_names is None else tf.gather(self.candidate_names, ids + 1),
            "scores": scores,
        }

    def _search(self, queries: Any, excluded: Any = None, unknown: Any = None) -> tuple[Any, Any]:
        """Returns the best scores and their ids. Equal scores rank by row, as `tf.math.top_k` does.

        Args:
            queries: `[batch, embedding_dim]` float32.
            excluded: `[batch, m]` int32 rows of the table, `num_candidates` for none; or `None`.
            unknown: `[batch]` bool, queries that get the most popular candidates; or `None`.
        """
        ones = tf.ones_like(queries[:, :1])
        scores = tf.matmul(tf.concat([queries, ones], axis=1), self.arrays["table"], transpose_b=True)
        if unknown is not None:
            counts = self.arrays.get("counts")
            popular = tf.fill((self.num_candidates,), -np.inf) if counts is None else counts
            popular = tf.pad(popular, [[0, self.num_rows - self.num_candidates]], constant_values=-np.inf)

            def with_popular() -> Any:
                return tf.where(unknown[:, None], popular[None], scores)

            scores = tf.cond(tf.reduce_any(unknown), with_popular, lambda: scores) if self.by_name else with_popular()
        if excluded is not None:
            columns = tf.broadcast_to(tf.range(tf.shape(scores)[0])[:, None], tf.shape(excluded))
            places = tf.reshape(tf.stack([columns, excluded], axis=2), (-1, 2))
            scores = tf.tensor_scatter_nd_update(scores, places, tf.fill((tf.shape(places)[0],), np.float32(-np.inf)))
        scores, rows = self._top_k(scores)
        ids = tf.gather(self.arrays["ids"], rows)
        is_found = tf.logical_and(scores > -np.inf, ids != NO_CANDIDATE)
        scores, ids = tf.where(is_found, scores, np.float32(-np.inf)), tf.where(is_found, ids, NO_CANDIDATE)
        has_nan = tf.reduce_any(tf.math.is_nan(queries), axis=1, keepdims=True)
        if unknown is not None:
            has_nan = tf.logical_and(has_nan, tf.logical_not(unknown[:, None]))
        return tf.where(has_nan, np.float32(np.nan), scores), tf.where(has_nan, NO_CANDIDATE, ids)

    def _top_k(self, scores: Any) -> tuple[Any, Any]:
        """Returns the best scores and their rows, in two levels: the best groups of rows, and the rows of these.

        Exact, and for equal scores too: groups are of consecutive rows, and the lower row is first in each level.
        """
        k, size = self.retrieval.k, self.group_size
        if size == 1:
            return tf.math.top_k(scores, k)  # type: ignore[no-any-return]
        in_groups = tf.reshape(scores, (tf.shape(scores)[0], self.num_rows // size, size))
        _, groups = tf.math.top_k(tf.reduce_max(in_groups, axis=2), k)
        groups = -tf.math.top_k(-groups, k).values
        members = tf.reshape(tf.gather(in_groups, groups, batch_dims=1), (-1, k * size))
        scores, places = tf.math.top_k(members, k)
        return scores, tf.gather(groups, places // size, batch_dims=1) * size + places % size

    def _places(self, ids: Any) -> Any:
        """Returns the rows of ids in the table, and the last row for ids that no candidate has."""
        return _find(self.arrays["sorted_ids"], self.num_candidates, ids, self.arrays["rows"])

    def _seen(self, query_ids: Any) -> Any:
        """Returns what queries have seen, `[batch, most]` ids, padded with -1."""
        starts = self.retrieval.arrays["seen_starts"]
        most = int(np.diff(starts).max())
        num_queries = len(starts) - 1
        query_ids = tf.cast(tf.reshape(query_ids, (-1,)), tf.int32)
        place = _find(self.arrays["seen_queries"], num_queries, query_ids)
        starts = tf.concat([self.arrays["seen_starts"], self.arrays["seen_starts"][-1:]], axis=0)
        first, end = tf.gather(starts, place), tf.gather(starts, place + 1)
        columns = first[:, None] + tf.range(most)[None]
        seen = tf.gather(self.arrays["seen_ids"], tf.minimum(columns, len(self.retrieval.arrays["seen_ids"]) - 1))
        return tf.where(columns < end[:, None], seen, NO_CANDIDATE)

    def _are_unknown(self, rows: dict[str, Any]) -> Any:
        """Returns which queries have no known name, `[batch]`, or `None` if no feature has a vocabulary."""
        known = []
        for feature in self.retrieval.features:
            if feature.names is None or not feature.is_of_tower:
                continue
            is_known = rows[feature.name] > UNKNOWN_ROW
            if feature.name == self.retrieval.query_id and "is_trained" in self.arrays:
                is_known = tf.logical_and(
                    is_known, tf.gather(self.arrays["is_trained"], tf.maximum(rows[feature.name], 0))
                )
            known.append(tf.reduce_any(tf.reshape(is_known, (tf.shape(is_known)[0], -1)), axis=1))
        return tf.logical_not(tf.reduce_any(tf.stack(known), axis=0)) if known else None

    def _rows(self, name: str, values: Any) -> Any:
        lookup = self.row_of_name.get(name)
        if lookup is None:
            return values
        rows = lookup.lookup(values)
        feature = next(each for each in self.retrieval.features if each.name == name)
        if feature.shape:
            # Rows of several names, such as histories, have padding.
            missing = tf.equal(values, "" if values.dtype == tf.string else tf.constant(NO_ROW, values.dtype))
            rows = tf.where(tf.logical_and(missing, tf.equal(rows, UNKNOWN_ROW)), NO_ROW, rows)
        return tf.cast(rows, feature.dtype)

    def _spec(self, feature: ExportedFeature) -> Any:
        lookup = self.row_of_name.get(feature.name)
        dtype = feature.dtype if lookup is None else lookup.key_dtype
        return tf.TensorSpec((None, *feature.shape), dtype, name=feature.input_name)


def _find(ordered: Any, size: int, values: Any, result: Any = None) -> Any:
    """Returns the places of values in `[size]` ascending ones, or of these in `result`; `size` for those not there.

    A binary search by gathers, because converters do not know `tf.searchsorted`.
    """
    place = tf.zeros_like(values)
    for step in (1 << i for i in reversed(range(max(1, (size - 1).bit_length())))):
        other = tf.minimum(place + step, size - 1)
        place = tf.where(tf.gather(ordered, other) <= values, other, place)
    is_found = tf.equal(tf.gather(ordered, place), values)
    return tf.where(is_found, place if result is None else tf.gather(result, place), size)


def _lookup(names: list[Any]) -> Any:
    """Returns a table from names to rows, which begin with 1; 0 for other names."""
    keys = tf.constant(_as_array(names))
    rows = tf.range(1, len(names) + 1, dtype=tf.int32)
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, rows), UNKNOWN_ROW)


def _as_array(names: list[Any]) -> np.ndarray[Any, Any]:
    if isinstance(names[0], str):
        return np.array([name.encode() for name in names], object)
    return np.array(names, "int64")
