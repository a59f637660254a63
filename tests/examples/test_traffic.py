"""The bytes that devices exchange, as `examples/benchmarks/traffic.py` counts and predicts them."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "benchmarks"))

from collectives import Collective, collectives, collectives_of
from traffic_cases import CASES, Case, Sizes

SIZES = Sizes()


def bytes_sent(case, num_devices):
    return sum(each.bytes_sent() for each in case.compiled(num_devices, SIZES))


def name_of(case):
    return " ".join(filter(None, (case.program, case.embedding, case.layout, case.negatives)))


# At 2 and 4 devices, those whose formula has a term of its own. A grid of 2 devices splits no rows.
FEW = [
    Case("training", "Embedding", "whole"),
    Case("training", "RowSparseEmbedding", "rows"),
    Case("evaluation", "RowSparseEmbedding", "rows"),
    Case("search", layout="rows"),
]
GRID = [Case("training", "RowSparseEmbedding", "grid"), Case("ranks", layout="grid"), Case("search", layout="grid")]
EXACT = [case for case in CASES if case.negatives != "memory"]


@pytest.mark.parametrize(
    ("case", "num_devices"),
    [*((case, 2) for case in FEW), *((case, 4) for case in FEW + GRID), *((case, 8) for case in EXACT)],
    ids=lambda value: name_of(value) if isinstance(value, Case) else str(value),
)
def test_the_compiled_program_sends_what_the_formula_says(case, num_devices):
    found = case.compiled(num_devices, SIZES)
    assert sum(each.bytes_sent() for each in found) == pytest.approx(case.bytes_sent(num_devices, SIZES), rel=1e-12)
    # Losses, metrics and flags, which the formulas leave out.
    assert sum(each.num_scalars() for each in found) < 20


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_a_memory_sends_at_most_one_more_transfer_of_all_candidates_than_the_formula_says(num_devices):
    """XLA splits the candidates of batch and memory, and joins them again, in ways that depend on its version."""
    case = Case("training", negatives="memory")
    more = bytes_sent(case, num_devices) - case.bytes_sent(num_devices, SIZES)
    assert 0 <= more <= 4 * SIZES.d * (SIZES.B + SIZES.C)


def test_formulas_by_hand():
    sizes = Sizes(R=1000, d=10, B=80, k=5, n=2, m=3)
    # Each device sends 7/8 of a gathered array, and twice that of a reduced one.
    loss = 7 / 8 * 80 * (4 * 10 + 4 + 1 + 2 * 4 * 10)
    tables = 2 * 2 * 7 / 8 * 80 * (4 + 4 * 10)
    assert Case("training").bytes_sent(8, sizes) == pytest.approx(loss + tables)
    dense = 2 * 2 * 7 / 8 * 4 * 1000 * 10
    assert Case("training", "Embedding", "whole").bytes_sent(8, sizes) == pytest.approx(loss + dense)
    # On a grid of 2 x 4, each of 40 queries goes to 4 shards.
    assert Case("search", layout="grid").bytes_sent(8, sizes) == 3 * 40 * 5 * (4 + 4)
    assert Case("ranks", layout="grid").bytes_sent(8, sizes) == pytest.approx(2 * 2 * 3 / 4 * 40 * 2 * 4)


def test_a_larger_table_does_not_change_what_a_row_sparse_step_sends():
    small, large = Sizes(), Sizes(R=10**9)
    for case in CASES:
        grows = case.bytes_sent(8, small) != case.bytes_sent(8, large)
        assert grows == (case.program == "training" and case.embedding == "Embedding")


# Reading programs.


def on_mesh(shape, *spec):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    return mesh, jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def collectives_on_mesh(function, out_spec=PartitionSpec("a", "b")):
    mesh, array = on_mesh((16, 32), "a", "b")
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=PartitionSpec("a", "b"), out_specs=out_spec, check_vma=False
    )
    return collectives_of(mapped, array)


@pytest.mark.parametrize(
    ("function", "out_spec", "sent"),
    [
        # Each device has 8 x 8 numbers of 4 bytes.
        (lambda x: jax.lax.psum(x, "b"), PartitionSpec("a", None), 2 * 3 / 4 * 256),
        (lambda x: jax.lax.psum(x, ("a", "b")), PartitionSpec(None, None), 2 * 7 / 8 * 256),
        (lambda x: jax.lax.all_gather(x, "a", tiled=True), PartitionSpec(None, "b"), 256),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), PartitionSpec(("a", "b"), None), 3 / 4 * 256),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True), PartitionSpec("a", "b"), 3 / 4 * 256),
        (lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), PartitionSpec("a", "b"), 256),
    ],
    ids=["all-reduce", "all-reduce of all", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"],
)
def test_bytes_of_each_collective(function, out_spec, sent):
    (found,) = collectives_on_mesh(function, out_spec)
    assert found.bytes_sent() == sent


def test_collectives_in_loops_count_as_often_as_they_run():
    def thrice_five_times(x):
        def inner(x, _):
            return jax.lax.psum(x, "b") / 2, None

        def outer(x, _):
            return jnp.sin(jax.lax.scan(inner, x, length=5)[0]), None

        return jax.lax.scan(outer, x, length=3)[0]

    assert sum(each.count for each in collectives_on_mesh(thrice_five_times)) == 15


def test_a_loop_of_unknown_length_is_an_error():
    def until_small(x):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: jax.lax.pmax(x, "b") / 2, x)

    with pytest.raises(ValueError, match="number of runs of a loop"):
        collectives_on_mesh(until_small)


def test_a_collective_in_a_branch_is_an_error():
    def sometimes(x):
        return jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(jnp.sin(x), "b"), jnp.cos, x)

    with pytest.raises(ValueError, match="branch"):
        collectives_on_mesh(sometimes)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}", 8),
        ("source_target_pairs={{0,0},{1,1}}", 1),
    ],
)
def test_groups_of_devices_in_each_form(groups, size):
    (found,) = collectives(program(f"f32[8]{{0}} all-gather(%x), {groups}, dimensions={{0}}"))
    assert found == Collective("all-gather", (("f32", (8,)),), size)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("f32[8]{0} all-gather(%x), replica_groups=something", "known form"),
        ("f32[8]{0} collective-broadcast(%x), replica_groups={{0,1}}", "collective-broadcast"),
        ("(f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,1}}", "all-gather-start"),
    ],
)
def test_what_is_unknown_is_an_error(instruction, message):
    with pytest.raises(ValueError, match=message):
        list(collectives(program(instruction)))


def test_a_text_without_a_program_is_an_error():
    with pytest.raises(ValueError, match="entry"):
        list(collectives("nothing"))


def program(instruction):
    return f"HloModule m\n\nENTRY %main (x: f32[2]) -> f32[8] {{\n  %x = f32[2]{{0}} parameter(0)\n  ROOT %y = {instruction}\n}}\n"
