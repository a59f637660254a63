"""Which features of a batch a tower looks up in its tables, and checks of these ids."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from keras_rs_contrib import _keras
from keras_rs_contrib.batch_padding import batch_length, padded_size
from keras_rs_contrib.columns import names_in, select
from keras_rs_contrib.index.candidate_store import is_table
from keras_rs_contrib.index.sizes import common_size
from keras_rs_contrib.model.feature_checks import AllowedIds
from keras_rs_contrib.model.id_origins import Change, Lookup, MarkedTable, Origin, Program, narrowest


class TowerLookups:
    """The lookups of towers, determined once for each tower.

    Args:
        towers: layers or models, each with the names of its features.
        build: builds the towers, called with the shapes and dtypes of a batch.
    """

    def __init__(
        self,
        towers: Sequence[tuple[keras.layers.Layer, str | list[str]]],
        build: Callable[[dict[str, keras.KerasTensor]], Any],
    ) -> None:
        self._towers = towers
        self._build = build
        self._known: dict[int, TracedTower] = {}

    def find(self, features: dict[str, Any]) -> list[TracedTower | PlainTable]:
        """Returns the towers whose features are in a batch, traced.

        Args:
            features: a batch, as arrays.

        Raises:
            ValueError: if a tower rounds the ids of a feature.
        """
        result: list[Any] = []
        for number, (tower, names) in enumerate(self._towers):
            if keras.backend.backend() != "jax":
                # Only JAX shows what a tower computes. TensorFlow raises errors for ids outside of other tables.
                if is_table(tower) and names in features:
                    result.append(PlainTable([(str(names), AllowedIds(tower.input_dim, repr(tower.name)))]))
                continue
            if not all(name in features for name in names_in(names)):
                continue
            if number not in self._known:
                if not all(layer.built for layer in _keras.sublayers(tower)):
                    self._build({name: keras.KerasTensor(x.shape, _jax_dtype(x)) for name, x in features.items()})
                self.trace(number, features)
            result.append(self._known[number])
        return result

    @property
    def are_built(self) -> bool:
        """Whether the towers have their weights."""
        return all(layer.built for tower, _ in self._towers for layer in _keras.sublayers(tower))

    def build(self, features: dict[str, Any]) -> None:
        """Builds the towers whose features are given.

        Args:
            features: arrays of a batch, which may have no rows.
        """
        # Any size of the batch will do that the devices divide.
        size = padded_size(1)
        self._build({name: keras.KerasTensor((size, *x.shape[1:]), _jax_dtype(x)) for name, x in features.items()})

    def trace(self, number: int, features: dict[str, Any]) -> None:
        """Traces a tower, if it is built and that has not been done.

        Args:
            number: the position of the tower.
            features: arrays of a batch, or anything with their shapes and dtypes.
        """
        if keras.backend.backend() != "jax":
            return
        tower, names = self._towers[number]
        is_known = number in self._known or any(None in features[name].shape for name in names_in(names))
        if not is_known and all(layer.built for layer in _keras.sublayers(tower)):
            used = {name: features[name] for name in names_in(names)}
            shapes = {name: jax.ShapeDtypeStruct(x.shape, _jax_dtype(x)) for name, x in used.items()}
            self._known[number] = TracedTower(tower, names, shapes)

    def traced(self, number: int, features: dict[str, Any]) -> TracedTower | None:
        """Returns a tower, traced, or `None` if it is not built, or features are missing.

        Args:
            number: the position of the tower.
            features: as in `trace`.
        """
        if all(name in features for name in names_in(self._towers[number][1])):
            self.trace(number, features)
        return self._known.get(number)


@dataclasses.dataclass(frozen=True)
class PlainTable:
    """A tower that is a table, on backends other than JAX.

    Attributes:
        allowed: as in `TracedTower`.
    """

    allowed: list[tuple[str, AllowedIds]]

    def check_computed(self, batch: int, features: dict[str, Any]) -> None:
        """Does nothing: a table computes no ids."""


class TracedTower:
    """A tower whose lookups are known.

    Args:
        tower: a built layer or model.
        names: the feature that it receives, or a list of features, of which it receives a dict.
        features: shapes and dtypes of its features.

    Attributes:
        allowed: the ids that features may have, for features that reach a table unchanged: pairs of a name and
            `AllowedIds`.
        lookups: the lookups whose ids depend on features.

    Raises:
        ValueError: if the tower rounds ids.
    """

    def __init__(
        self, tower: keras.layers.Layer, names: str | list[str], features: dict[str, jax.ShapeDtypeStruct]
    ) -> None:
        self._tower = tower
        self._names = names
        _, lookups = self._trace(features)
        self.lookups = lookups
        integers = {name for name, x in features.items() if jnp.issubdtype(x.dtype, jnp.integer)}
        smallest: dict[str, AllowedIds] = {}
        # The largest integer that a feature may have, if the tower computes with it as a float.
        self._exact: dict[str, tuple[Any, float]] = {}
        self._has_computed = False
        # Ids may come from a table of the other features of the corpus, such as the genre of each film.
        needed: frozenset[int] = frozenset().union(*(lookup.ids.variables for lookup in lookups))
        self._integers = {
            number: variable
            for number, variable in enumerate(tower.variables)
            if number in needed and jnp.issubdtype(variable.dtype, jnp.integer)
        }
        self._integer_values: dict[int, Any] = {}
        self._note_integers()
        for lookup in lookups:
            # The dtype in which a feature comes does not round it.
            dtype, limit = narrowest(lookup.ids.dtypes - {features[name].dtype for name in lookup.ids.features})
            if lookup.ids.change == Change.MOVED:
                if lookup.num_rows - 1 > limit:
                    raise ValueError(_rounded(lookup, dtype, limit, features))
                for name in lookup.ids.features:
                    if name not in smallest or lookup.num_rows < smallest[name].num_rows:
                        smallest[name] = AllowedIds(lookup.num_rows, repr(lookup.table))
                continue
            self._has_computed = self._has_computed or self._is_computable(lookup)
            for name in lookup.ids.features & integers if jnp.issubdtype(dtype, jnp.floating) else ():
                if limit < self._exact.get(name, (None, np.inf))[1]:
                    self._exact[name] = (dtype, limit)
        self.allowed = list(smallest.items())
        self._compute = jax.jit(self._computed_ids)
        self._computed: list[Lookup] = []

    def check_computed(self, batch: int, features: dict[str, Any]) -> None:
        """Raises `ValueError` if the tower computes ids that their table does not have, or rounds ids before.

        Args:
            batch: the number of the batch, for the error.
            features: the batch, as arrays.
        """
        features = {name: np.asarray(features[name]) for name in names_in(self._names)}
        size = batch_length(features)
        if not size:
            return
        for name, (dtype, limit) in self._exact.items():
            largest = max(int(features[name].max()), -int(features[name].min()))
            if largest > limit:
                raise ValueError(
                    "A tower must compute ids from integers, or from floats that hold each of them. Received: "
                    f"{largest} in the feature {name!r}, as {dtype}, which holds integers up to {int(limit)}. "
                    f"{_fix(features[name])}"
                )
        if not self._has_computed:
            return
        self._note_integers()
        # Few sizes, because each is compiled.
        num_rows = padded_size(common_size(size))
        rows = np.minimum(np.arange(num_rows), size - 1)
        features = {name: x[rows].astype(_jax_dtype(x)) for name, x in features.items()}
        results = self._compute(features, self._integer_values)
        for lookup, ids in zip(self._computed, map(np.asarray, results), strict=True):
            wrong = (ids < 0) | (ids >= lookup.num_rows)
            if wrong.any():
                place = tuple(np.argwhere(wrong)[0])
                where = f"for row {place[0]} of batch {batch}" if ids.shape[0] == num_rows else f"in batch {batch}"
                raise ValueError(
                    f"The ids that a tower computes from {_listed(lookup)} must be in [0, {lookup.num_rows - 1}], the "
                    f"rows of {lookup.table!r}. Received: {ids[place]} {where}. "
                    "Leave such rows out, or make the table larger."
                )

    def _trace(self, features: dict[str, Any]) -> tuple[Program, list[Lookup]]:
        variables = self._tower.variables
        marked: dict[str, MarkedTable] = {}

        def run(values: list[Any], tensors: dict[str, Any]) -> Any:
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping), marking_ids(self._tower, marked):
                outputs = self._tower(select(tensors, self._names), training=False)
            return [output for output in jax.tree.leaves(outputs) if isinstance(output, jax.Array)]

        values = [jax.ShapeDtypeStruct(tuple(variable.shape), variable.dtype) for variable in variables]
        program = Program.of(jax.make_jaxpr(run)(values, features))
        origins = [Origin(variables=frozenset({number})) for number in range(len(variables))]
        # JAX flattens a dict in the order of its keys.
        origins += [Origin(frozenset({name}), dtypes=frozenset({features[name].dtype})) for name in sorted(features)]
        return program, program.find_lookups(origins, marked, [variable.path for variable in variables])

    def _note_integers(self) -> None:
        """Copies the integer weights, which have no values while Keras trains."""
        for number, variable in self._integers.items():
            if _keras.has_value(variable) and not isinstance(variable.value, jax.core.Tracer):
                self._integer_values[number] = np.array(variable.value)

    def _is_computable(self, lookup: Lookup) -> bool:
        """Returns whether the ids of a lookup can be computed without the rest of the tower."""
        return lookup.slot is not None and lookup.ids.variables <= self._integer_values.keys()

    def _computed_ids(self, features: dict[str, Any], integers: dict[int, Any]) -> list[Any]:
        program, lookups = self._trace({name: jax.typeof(x) for name, x in features.items()})
        self._computed = [each for each in lookups if each.ids.change != Change.MOVED and self._is_computable(each)]
        # No id depends on another variable.
        values = [
            integers[number] if number in integers else jnp.zeros(tuple(variable.shape), variable.dtype)
            for number, variable in enumerate(self._tower.variables)
        ]
        inputs = [*values, *(features[name] for name in sorted(features))]
        return program.values(inputs, [lookup.slot for lookup in self._computed if lookup.slot is not None])


@contextlib.contextmanager
def marking_ids(tower: keras.layers.Layer, marked: dict[str, MarkedTable]) -> Iterator[None]:
    """Marks in the trace of a tower which ids its embeddings look up, before the embeddings change them.

    Args:
        tower: a layer or model.
        marked: where to note the tables, by the name of the mark.
    """
    numbers = {id(variable): number for number, variable in enumerate(tower.variables)}

    def marking(embedding: keras.layers.Embedding, mark: str) -> Callable[..., Any]:
        call = embedding.call

        def call_and_mark(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return call(checkpoint_name(inputs, mark) if isinstance(inputs, jax.Array) else inputs, *args, **kwargs)

        variables = frozenset(numbers[id(variable)] for variable in embedding.variables if id(variable) in numbers)
        marked[mark] = MarkedTable(embedding.name, embedding.input_dim, variables, embedding)
        return call_and_mark

    embeddings = [layer for layer in _keras.sublayers(tower) if is_table(layer)]
    for number, embedding in enumerate(embeddings):
        # Hidden from Keras's attribute tracking.
        object.__setattr__(embedding, "call", marking(embedding, f"ids of embedding {number}"))
    try:
        yield
    finally:
        for embedding in embeddings:
            object.__delattr__(embedding, "call")


def _rounded(lookup: Lookup, dtype: Any, limit: float, features: dict[str, Any]) -> str:
    name = min(lookup.ids.features)
    return (
        "Ids must reach a table as integers, or as floats that hold each of its rows. Received: "
        f"{_listed(lookup)} as {dtype}, which holds integers up to {int(limit)}, for the {lookup.num_rows} rows of "
        f"{lookup.table!r}. {_fix(features[name])}"
    )


def _fix(feature: Any) -> str:
    return (
        f'Begin the tower with `keras.Input({tuple(feature.shape[1:])}, dtype="int32")`, or use the policy "float32".'
    )


def _listed(lookup: Lookup) -> str:
    names = sorted(lookup.ids.features)
    return f"the feature {names[0]!r}" if len(names) == 1 else f"the features {names}"


def _jax_dtype(array: Any) -> Any:
    # JAX warns of dtypes that it would truncate.
    return jax.dtypes.canonicalize_dtype(keras.backend.standardize_dtype(array.dtype))
