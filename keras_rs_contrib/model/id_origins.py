"""Where the ids that a tower looks up come from: an analysis of the traced tower.

The jaxpr of a tower shows every lookup, whichever layer makes it, and whatever Keras does to ids on their way there:
a `Sequential` casts them to floats, a functional model casts and expands them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

# Primitives that compute what their inner jaxpr computes.
CALLS = frozenset({
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat", "remat2",
})  # fmt: skip

# Every element of the result is an element of an operand, and every element of the operands is in the result.
MOVES = frozenset({
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "device_put", "name",
    "optimization_barrier", "reshape", "rev", "sharding_constraint", "squeeze", "stop_gradient", "transpose",
})  # fmt: skip

# Computes ids from ids: an id that was rounded before gives a wrong one.
ARITHMETIC = frozenset({
    "abs", "add", "and", "clamp", "dynamic_slice", "gather", "max", "min", "neg", "not", "or", "pad", "rem", "select_n",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "slice", "sort", "sub", "xor",
})  # fmt: skip


class Change(enum.IntEnum):
    """What has happened to the elements of features on their way to a value."""

    MOVED = 0
    ARITHMETIC = 1
    OTHER = 2


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a value in a traced tower depends on.

    Attributes:
        features: the names of the features that it depends on.
        change: how its elements differ from those of the features.
        dtypes: the dtypes that have held them.
        variables: the positions of the variables that it depends on.
    """

    features: frozenset[str] = frozenset()
    change: Change = Change.MOVED
    dtypes: frozenset[Any] = frozenset()
    variables: frozenset[int] = frozenset()

    @staticmethod
    def merge(origins: Sequence[Origin], change: Change = Change.MOVED) -> Origin:
        """Returns the origin of a value that depends on values with these origins."""
        change = max([change, *(origin.change for origin in origins if origin.features)])
        return Origin(
            frozenset().union(*(origin.features for origin in origins)),
            change,
            # Rounding no longer matters once an element is more than an id.
            frozenset().union(*(origin.dtypes for origin in origins)) if change < Change.OTHER else frozenset(),
            frozenset().union(*(origin.variables for origin in origins)),
        )


@dataclasses.dataclass(frozen=True)
class MarkedTable:
    """A table whose ids go through a `name` primitive before its layer changes them.

    Attributes:
        name: its name, for errors.
        num_rows: the number of its rows, without padding.
        variables: the positions of the variables of its layer.
        layer: the layer.
    """

    name: str
    num_rows: int
    variables: frozenset[int]
    layer: Any = None


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A lookup of a traced tower.

    Attributes:
        ids: the origin of the ids.
        table: the name of the table, for errors.
        num_rows: the number of its rows, without padding.
        slot: where the ids are in the `Program`, or `None` if the lookup is in a loop within it.
        layer: the embedding that looks up the table, or `None` if it is not an embedding.
    """

    ids: Origin
    table: str
    num_rows: int
    slot: int | None
    layer: Any = None


@dataclasses.dataclass
class Program:
    """A jaxpr without inner calls: a list of steps, whose values are in numbered slots.

    Attributes:
        inputs: the slots of the inputs.
        constants: values by slot.
        steps: primitives, each with the slots of its operands and results, in order.
        num_slots: the number of slots.
    """

    inputs: list[int] = dataclasses.field(default_factory=list)
    constants: dict[int, Any] = dataclasses.field(default_factory=dict)
    steps: list[tuple[JaxprEqn, list[int], list[int]]] = dataclasses.field(default_factory=list)
    num_slots: int = 0

    @classmethod
    def of(cls, jaxpr: Any) -> Program:
        """Returns the program of a jaxpr, open or closed."""
        program = cls()
        program.inputs = [program._slot() for _ in _open(jaxpr).invars]
        program._add(jaxpr, program.inputs)
        return program

    def _slot(self) -> int:
        self.num_slots += 1
        return self.num_slots - 1

    def _constant(self, value: Any) -> int:
        slot = self._slot()
        self.constants[slot] = value
        return slot

    def _add(self, jaxpr: Any, inputs: list[int]) -> list[int]:
        constants = zip(_open(jaxpr).constvars, getattr(jaxpr, "consts", ()), strict=True)
        jaxpr = _open(jaxpr)
        slots = dict(zip(jaxpr.invars, inputs, strict=True))
        slots.update((variable, self._constant(value)) for variable, value in constants)

        def slot_of(variable: Any) -> int:
            return self._constant(variable.val) if isinstance(variable, Literal) else slots[variable]

        for eqn in jaxpr.eqns:
            operands = [slot_of(variable) for variable in eqn.invars]
            inner = _inner(eqn) if eqn.primitive.name in CALLS else None
            if inner is not None and len(_open(inner).invars) == len(operands):
                results = self._add(inner, operands)
            else:
                results = [self._slot() for _ in eqn.outvars]
                self.steps.append((eqn, operands, results))
            slots.update(zip(eqn.outvars, results, strict=True))
        return [slot_of(variable) for variable in jaxpr.outvars]

    def find_lookups(
        self, origins: Sequence[Origin], marked: dict[str, MarkedTable], variable_names: Sequence[str]
    ) -> list[Lookup]:
        """Returns the lookups whose ids depend on features.

        Args:
            origins: the origins of the inputs.
            marked: the tables whose ids are marked, by the name of the mark. Other lookups are gathers along one axis.
            variable_names: the names of the variables by position, for errors.
        """
        known = {slot: Origin() for slot in self.constants}
        known.update(zip(self.inputs, origins, strict=True))
        lookups = []
        in_marked = frozenset().union(*(table.variables for table in marked.values()))
        for eqn, operands, results in self.steps:
            of_operands = [known[slot] for slot in operands]
            if eqn.primitive.name == "name" and eqn.params["name"] in marked:
                table = marked[eqn.params["name"]]
                lookups.append(Lookup(of_operands[0], table.name, table.num_rows, operands[0], table.layer))
            elif (
                (axis := _axis_of_lookup(eqn)) is not None
                and not of_operands[0].features
                and not of_operands[0].variables & in_marked
            ):
                variables = sorted(of_operands[0].variables)
                name = variable_names[variables[0]] if variables else "a constant table"
                ids = self._before_wrapping(operands[1])
                lookups.append(Lookup(known[ids], name, _shape(eqn.invars[0])[axis], ids))
            for body, of_inputs in _bodies(eqn, of_operands):
                found = Program.of(body).find_lookups(of_inputs, marked, variable_names)
                lookups.extend(dataclasses.replace(lookup, slot=None) for lookup in found)
            known.update((slot, _origin(eqn, of_operands, i)) for i, slot in enumerate(results))
        return [lookup for lookup in lookups if lookup.ids.features]

    def _before_wrapping(self, slot: int) -> int:
        """Returns the slot of ids before negative ones count from the end of the table, as in NumPy."""
        producers = {result: (eqn, operands) for eqn, operands, results in self.steps for result in results}
        found = slot
        while found in producers:
            eqn, operands = producers[found]
            if eqn.primitive.name in MOVES and len(operands) == 1:
                found = operands[0]
            elif eqn.primitive.name == "select_n" and len(operands) == 3:
                test, of_test = producers.get(operands[0], (None, []))
                if test is not None and test.primitive.name == "lt" and of_test[0] == operands[1]:
                    return operands[1]
                return slot
            else:
                return slot
        return slot

    def values(self, inputs: Sequence[Any], slots: Sequence[int]) -> list[Any]:
        """Returns the values of slots, and computes nothing that they do not need.

        Args:
            inputs: arrays.
            slots: the slots.
        """
        needed = set(slots)
        for _, operands, results in reversed(self.steps):
            if needed.intersection(results):
                needed.update(operands)
        values = {slot: jnp.asarray(value) for slot, value in self.constants.items() if slot in needed}
        values.update(zip(self.inputs, inputs, strict=True))
        for eqn, operands, results in self.steps:
            if needed.intersection(results):
                params = eqn.primitive.get_bind_params(eqn.params)
                # With the functions that the primitive calls, in older releases of JAX.
                functions, params = params if isinstance(params, tuple) else ((), params)
                result = eqn.primitive.bind(*functions, *(values[slot] for slot in operands), **params)
                values.update(zip(results, result if eqn.primitive.multiple_results else [result], strict=True))
        return [values[slot] for slot in slots]


def narrowest(dtypes: frozenset[Any]) -> tuple[np.dtype[Any], float]:
    """Returns the dtype that holds the fewest consecutive integers from 0, and the last of them."""
    limits: dict[Any, float] = {}
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.floating):
            limits[dtype] = 2.0 ** (jnp.finfo(dtype).nmant + 1)  # type: ignore[no-untyped-call]
        elif jnp.issubdtype(dtype, jnp.integer):
            limits[dtype] = float(jnp.iinfo(dtype).max)  # type: ignore[no-untyped-call]
    dtype = min(limits, key=lambda dtype: limits[dtype], default=np.dtype("int32"))
    return dtype, limits.get(dtype, np.inf)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(eqn: JaxprEqn) -> Any:
    """Returns the jaxpr within a primitive, open or closed, or `None`."""
    inner = [eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params]
    return inner[0] if inner and hasattr(_open(inner[0]), "eqns") else None


def _axis_of_lookup(eqn: JaxprEqn) -> int | None:
    """Returns the axis along which a primitive gathers elements by their number, or `None` if it does not."""
    if eqn.primitive.name != "gather":
        return None
    axes = eqn.params["dimension_numbers"].start_index_map
    return int(axes[0]) if len(axes) == 1 and eqn.params["slice_sizes"][axes[0]] == 1 else None


def _origin(eqn: JaxprEqn, origins: list[Origin], number: int) -> Origin:
    """Returns the origin of a result of a primitive, from those of its operands."""
    dtype = getattr(eqn.outvars[number].aval, "dtype", None)
    name = eqn.primitive.name
    if name in MOVES and dtype not in (bool, None):
        # Rounding that matters is that of the features.
        change = Change.MOVED if all(origin.features for origin in origins) else Change.ARITHMETIC
    elif name in ARITHMETIC and dtype not in (bool, None):
        change = Change.ARITHMETIC
    else:
        change = Change.OTHER
    result = Origin.merge(origins, change)
    if change == Change.OTHER or not result.features:
        return result
    return dataclasses.replace(result, dtypes=result.dtypes | {dtype})


def _bodies(eqn: JaxprEqn, origins: list[Origin]) -> list[tuple[Any, list[Origin]]]:
    """Returns the bodies of a loop or a branch, with the origins of their inputs."""
    params, name = eqn.params, eqn.primitive.name
    # What is carried from step to step may become anything.
    carried = Origin.merge(origins, Change.OTHER)
    if name == "while":
        first, num_consts = params["cond_nconsts"], params["body_nconsts"]
        carry = [carried] * (len(origins) - first - num_consts)
        return [(params["body_jaxpr"], [*origins[first : first + num_consts], *carry])]
    if name == "cond":
        return [(branch, origins[1:]) for branch in params["branches"]]
    inner = _inner(eqn)
    if inner is None or len(_open(inner).invars) != len(origins):
        return []
    if name == "scan":
        # The inputs are constants, what is carried, and arrays of which each step gets a row.
        has_rows = [_rank(outer) > _rank(own) for outer, own in zip(eqn.invars, _open(inner).invars, strict=True)]
        num_carried = sum(
            _rank(outer) == _rank(own) for outer, own in zip(eqn.outvars, _open(inner).outvars, strict=True)
        )
        last = len(origins) - sum(has_rows)
        origins = [*origins[: last - num_carried], *([carried] * num_carried), *origins[last:]]
    return [(inner, origins)]


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _rank(variable: Any) -> int:
    return len(_shape(variable))
