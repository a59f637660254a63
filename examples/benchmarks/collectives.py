"""The collectives of a compiled program, and the bytes that each device sends for them.

XLA compiles one program for all devices of a mesh. Its text names each collective with the shape of its result on one
device, and the groups of devices that take part.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}

# Bytes that a device sends, by the bytes of its result and the number of devices in its group. It receives as many.
# These are the costs of algorithms that use the least bandwidth, such as rings.
# Reference: Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 2005.
SENT: dict[str, Callable[[float, int], float]] = {
    "all-reduce": lambda result, size: 2 * (size - 1) / size * result,
    "all-gather": lambda result, size: (size - 1) / size * result,
    "reduce-scatter": lambda result, size: (size - 1) * result,
    "all-to-all": lambda result, size: (size - 1) / size * result,
    "collective-permute": lambda result, size: result,
}

# Any operation that moves data between devices. One that is not in `SENT` is an error, not free.
OPERATION = re.compile(r"= (.*?) ((?:all|collective|ragged)-[\w-]+|reduce-scatter[\w-]*|send|recv)\(")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|[%\w.-]+)")
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """A collective of a compiled program.

    Attributes:
        operation: a key of `SENT`.
        shapes: the dtype and the dimensions of each array of the result on one device.
        group_size: the number of devices that exchange data with each other.
        count: how often the program runs it.
    """

    operation: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    group_size: int
    count: int = 1

    def bytes_sent(self) -> float:
        """Returns the bytes that each device sends, without those of scalars."""
        result = sum(BYTES[dtype] * math.prod(dimensions) for dtype, dimensions in self.shapes if dimensions)
        return self.count * SENT[self.operation](result, self.group_size)

    def num_scalars(self) -> int:
        """Returns the number of scalars, such as losses, in all runs."""
        return self.count * sum(not dimensions for _, dimensions in self.shapes)

    def __str__(self) -> str:
        shapes = ", ".join(f"{dtype}[{','.join(map(str, dimensions))}]" for dtype, dimensions in self.shapes)
        times = f"{self.count:,} x " if self.count > 1 else ""
        return f"{times}{self.operation} of {shapes} among {self.group_size}"


def collectives_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Collective]:
    """Returns the collectives of a function, compiled but not run.

    Args:
        function: a function of arrays.
        *arguments: arrays, or `jax.ShapeDtypeStruct`s with shardings.
        **options: arguments of `jax.jit`.
    """
    import jax

    return list(collectives(jax.jit(function, **options).lower(*arguments).compile().as_text()))


def collectives(text: str) -> Iterator[Collective]:
    """Yields the collectives of a compiled program.

    Those in the body of a loop count as often as the loop runs. XLA derives this number where it can, and writes it
    next to the loop.

    Args:
        text: the program after optimization, as `as_text` of a compiled function returns it.

    Raises:
        ValueError: if a collective is unknown, or it is unknown how often it runs.
    """
    computations: dict[str, list[str]] = {}
    entry = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        start = COMPUTATION.match(line)
        if start:
            name = start[2]
            computations[name] = []
            entry = name if start[1] else entry
        elif computations and line.startswith(" "):
            computations[name].append(line)
    if not entry:
        raise ValueError("A program must have an entry. Received: none. Pass the text of a compiled function.")
    yield from _in_computation(computations, entry, 1)


def _in_computation(computations: dict[str, list[str]], name: str, count: int) -> Iterator[Collective]:
    for line in computations[name]:
        found = OPERATION.search(line)
        if found:
            yield _collective(line, *found.groups(), count)
        called = [other for names in CALLED.findall(line) for other in re.findall(r"[\w.-]+", names)]
        inner = [each for other in called for each in _in_computation(computations, other, count)]
        if not inner:
            continue
        if " conditional(" in line:
            raise ValueError(
                "A program must run its collectives in any case. Received: some in a branch, which may be skipped: "
                f"{line.strip()[:200]}. Count each branch by hand."
            )
        trips = TRIP_COUNT.search(line)
        if " while(" in line and trips is None:
            raise ValueError(
                "The number of runs of a loop with collectives must be known. Received: "
                f"{line.strip()[:200]}. Compile a function whose loops have a fixed length."
            )
        times = int(trips[1]) if trips else 1
        yield from (each._replace(count=each.count * times) for each in inner)


def _collective(line: str, result: str, operation: str, count: int) -> Collective:
    if operation not in SENT:
        raise ValueError(
            f"A collective must be one of {sorted(SENT)}. Received: {operation!r}. Add what it sends to `SENT`."
        )
    shapes = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    return Collective(operation, tuple(shapes), _group_size(line), count)


def _group_size(line: str) -> int:
    """Returns the size of the groups of devices, which XLA writes in one of four forms."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return 2 if any(a != b for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0])) else 1
    lists = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if lists:
        return len(lists[1].split(","))
    grid = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if grid:
        return int(grid[1])
    mesh = re.search(r"replica_groups=mesh\[(.*?)\].*? \{([^}]*)\}", line)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"('[^']+')=(\d+)", mesh[1])}
        axes = mesh[2].split(",")
        if all(axis.strip() in sizes for axis in axes):
            return math.prod(sizes[axis.strip()] for axis in axes)
    raise ValueError(
        "A collective must name its groups of devices in a known form. Received: "
        f"{line.strip()[:300]}. Teach `_group_size` this form."
    )
