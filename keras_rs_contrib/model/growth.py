"""What grows if a model gets new names or rows for some of its features."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import keras

from keras_rs_contrib import columns
from keras_rs_contrib.columns import names_in
from keras_rs_contrib.distribution import num_replicas
from keras_rs_contrib.index.candidate_store import is_table
from keras_rs_contrib.model.id_origins import Change, Lookup, Origin
from keras_rs_contrib.names import check_names, flat_names
from keras_rs_contrib.vocabulary import UNKNOWN_ROW, Vocabulary


@dataclasses.dataclass(frozen=True)
class Growth:
    """What grows, and how far.

    Attributes:
        vocabularies: all vocabularies of the larger model, by feature.
        sizes: the number of rows before and after, by feature, of those that grow.
        tables: the embeddings that grow, each with its new number of rows, by `id`.
        num_ids: the new number of candidate ids, or `None` if it stays.
    """

    vocabularies: dict[str, Vocabulary]
    sizes: dict[str, tuple[int, int]]
    tables: dict[int, tuple[keras.layers.Embedding, int]]
    num_ids: int | None


def growth_of(model: Any, new: Any) -> Growth:
    """Returns what grows, or raises an error.

    Args:
        model: a two-tower model.
        new: as in `TwoTowerModel.extend`.

    Raises:
        TypeError: if it is not a dict, or a value is of the wrong type.
        ValueError: if the model has no such feature, there would be fewer rows than before, or no table is found.
    """
    new = columns.as_dict(new)
    if not isinstance(new, dict):
        raise TypeError(
            f"What is new must be a dict by the names of features. Received: {new!r}. "
            f"Pass {{{model.model_inputs.names.of_query[0]!r}: names}}, for instance."
        )
    names = model.model_inputs.names
    known = [*names.of_query, *names.of_candidate, names.query_id, names.candidate_id]
    known = [name for name in dict.fromkeys(known) if name is not None]
    for name in new:
        if name not in known:
            raise ValueError(
                f"What is new must be of features of the towers, or of ids. Received: {name!r}, and the features "
                f"{known}. Use their names."
            )
    vocabularies = _grown_vocabularies(model.vocabularies, new)
    sizes = {
        name: (len(vocabulary), len(vocabularies[name]))
        for name, vocabulary in model.vocabularies.items()
        if len(vocabularies[name]) > len(vocabulary)
    }
    tables: dict[int, tuple[keras.layers.Embedding, int]] = {}
    for name in [*sizes, *(name for name in new if name not in vocabularies)]:
        found = _tables_of(model, name)
        if name not in sizes:
            before, after = _num_rows(model, name, new[name], found), int(new[name])
            if after == before:
                continue
            sizes[name] = before, after
        for table in found:
            num_rows = max(sizes[name][1], tables.get(id(table), (table, table.input_dim))[1])
            if num_rows > table.input_dim:
                tables[id(table)] = table, num_rows
    num_ids = sizes.get(names.candidate_id, (0, None))[1]
    if num_ids is None and is_table(model.candidate_tower) and id(model.candidate_tower) in tables:
        # Through another feature: the rows of the table are the candidates.
        num_ids = tables[id(model.candidate_tower)][1]
    return Growth(vocabularies, sizes, tables, num_ids)


def _grown_vocabularies(vocabularies: dict[str, Vocabulary], new: dict[str, Any]) -> dict[str, Vocabulary]:
    """Returns vocabularies with new names, by feature. Features that share one before share one after."""
    added: dict[int, list[Any]] = {}
    for name, values in new.items():
        if name not in vocabularies:
            continue
        if isinstance(values, numbers.Integral):
            raise TypeError(
                f"A feature with a vocabulary grows by names. Received: {values!r} for {name!r}. Pass a list of names."
            )
        flat, _ = flat_names(values)
        try:
            check_names(flat)
            rows = vocabularies[name].encode(flat)
        except (TypeError, ValueError) as error:
            raise type(error)(f"The new names of {name!r} must be like those of its vocabulary. {error}") from error
        unknown = [each for each, row in zip(flat, rows, strict=True) if row == UNKNOWN_ROW]
        added.setdefault(id(vocabularies[name]), []).extend(unknown)
    grown = {id(each): _grown(each, added.get(id(each), [])) for each in vocabularies.values()}
    return {name: grown[id(each)] for name, each in vocabularies.items()}


def _grown(vocabulary: Vocabulary, names: list[Any]) -> Vocabulary:
    """Returns a new vocabulary, whose old names keep their rows."""
    return type(vocabulary).from_config(
        {**vocabulary.get_config(), "names": [*vocabulary.names, *dict.fromkeys(names)]}
    )


def _num_rows(model: Any, name: str, after: Any, tables: list[keras.layers.Embedding]) -> int:
    """Returns the number of rows of a feature without a vocabulary, or raises if the new number does not fit."""
    if not isinstance(after, numbers.Integral) or isinstance(after, bool):
        raise TypeError(
            f"A feature without a vocabulary grows to a number of rows. Received: {after!r} for {name!r}. Pass an int."
        )
    probability = model.model_inputs.sampling_probability
    sizes = [table.input_dim for table in tables]
    if not sizes and name == model.candidate_id and probability is not None:
        sizes = [probability.num_candidates]
    if not sizes:
        raise ValueError(
            f"A feature grows if a table has a row for each of its values. Received: {name!r}, whose values are not "
            "the rows of any table. Leave it out."
        )
    before = int(min(sizes))
    if after < before:
        raise ValueError(
            f"A feature cannot have fewer rows than before. Received: {after} for {name!r}, which has {before}. "
            "Pass the number of all rows, old and new."
        )
    return before


def _tables_of(model: Any, name: str) -> list[keras.layers.Embedding]:
    """Returns the embeddings that look up a feature as it is. None, if it is only an id, or is hashed."""
    lookups, is_used = _lookups_of(model, name)
    own = [lookup for lookup in lookups if lookup.ids.change == Change.MOVED]
    other = [lookup.table for lookup in own if lookup.layer is None]
    if other or (is_used and not lookups):
        what = f"a lookup in {other[0]!r}, which is not of such a layer" if other else "no lookup of this feature"
        raise ValueError(
            f"The table of {name!r} must be a `keras.layers.Embedding` that a tower calls. Received: {what}. Look up "
            "the feature with an embedding, or create a larger model."
        )
    return list({id(lookup.layer): lookup.layer for lookup in own}.values())


def _lookups_of(model: Any, name: str) -> tuple[list[Lookup], bool]:
    """Returns the lookups whose ids depend on a feature, and whether a tower uses it."""
    result, is_used = [], False
    towers = ((model.query_tower, model.query_features), (model.candidate_tower, model.candidate_features))
    size = num_replicas()
    seen = {
        each: jax.ShapeDtypeStruct((size, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for each, (shape, dtype) in model._seen_features.items()
    }
    for number, (tower, names) in enumerate(towers):
        if name not in names_in(names):
            continue
        is_used = True
        if is_table(tower):
            result.append(Lookup(Origin(frozenset({name})), tower.name, tower.input_dim, None, tower))
            continue
        traced = model.model_inputs.lookups.traced(number, seen)
        if traced is None:
            raise ValueError(
                f"The tables of {name!r} are known once the model has seen its features. Received: a model that has "
                f"seen {sorted(seen)}. Call it on a batch, train it, or load it first."
            )
        result += [lookup for lookup in traced.lookups if name in lookup.ids.features]
    return result, is_used
