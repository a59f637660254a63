"""The bytes that devices exchange, as `examples/benchmarks/traffic.py` counts and predicts them."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import first_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples" / "benchmarks"))

from cluster import PROCESSORS, Cluster
from collectives import Collective, collectives, collectives_of
from traffic_cases import CASES, Case, Sizes

from keras_rs_contrib.index import retrieval

SIZES = Sizes()


def name_of(case):
    return " ".join(filter(None, (case.program, case.embedding, case.layout, case.negatives)))


ROWS = [Case("training"), Case("evaluation"), Case("search")]
# A few at 2 and 4 devices, because each takes a second to compile, and none that sends what another one sends.
CASES_BY_DEVICES = {
    2: ROWS[:2],
    4: [ROWS[0], ROWS[2], Case("training", layout="grid")],
    8: [
        *ROWS,
        Case("ranks"),
        Case("training", "Embedding", "whole"),
        Case("training", layout="whole"),
        Case("training", "ShardedEmbedding"),
        Case("training", layout="grid"),
        Case("training", negatives="log-q"),
        Case("training", negatives="mixed"),
        Case("evaluation", "ShardedEmbedding"),
        Case("evaluation", layout="grid"),
        Case("search", layout="grid"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "num_devices"),
    [(case, num_devices) for num_devices, cases in CASES_BY_DEVICES.items() for case in cases],
    ids=lambda value: name_of(value) if isinstance(value, Case) else str(value),
)
def test_the_compiled_program_sends_what_the_formula_says(case, num_devices):
    found = case.compiled(num_devices, SIZES)
    assert sum(each.bytes_sent() for each in found) == pytest.approx(case.bytes_sent(num_devices, SIZES), rel=1e-12)
    # Losses, metrics and flags, which the formulas leave out.
    assert sum(each.num_scalars() for each in found) < 20


@pytest.mark.slow
def test_a_memory_sends_at_most_one_more_transfer_of_all_candidates_than_the_formula_says():
    """XLA splits the candidates of batch and memory, and joins them again, in ways that depend on its version."""
    case = Case("training", negatives="memory")
    more = sum(each.bytes_sent() for each in case.compiled(8, SIZES)) - case.bytes_sent(8, SIZES)
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


@pytest.mark.slow
def test_a_host_scores_as_many_queries_at_once_as_predicted(monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK_SIZE", 2**18)
    (in_loop,) = [each for each in Case("ranks").compiled(2, SIZES) if each.count > 1]
    ((_, (at_once, _)),) = in_loop.shapes
    assert at_once == Cluster(2, 100.0, SIZES).queries_at_once(2**18) == 2**18 // (SIZES.R // 2) == 7
    assert in_loop.count == -(-SIZES.B // at_once)


def test_a_cluster_by_hand():
    cluster = Cluster(64, 100.0, Sizes(R=10**9, d=128))
    assert cluster.seconds(12.5e9) == 1.0
    gigabytes = [cluster.table_bytes(name) / 1e9 for name in (None, "RowWiseAdagrad", "RowAdagrad", "LazyAdam")]
    assert gigabytes == pytest.approx([8, 8 * 129 / 128, 16, 24])
    # 15,625,000 rows: 2**26 scores are those of 4 queries, 2**30 those of 68, of which 64 are enough.
    assert [cluster.queries_at_once(2**power) for power in (26, 30, 20)] == [4, 64, 1]
    gpu = PROCESSORS[0]
    reads, scores = 10**6 / 4 * 8e9, 8 * 10**6 * 15_625_000
    assert cluster.scoring_seconds(10**6, 2**26, gpu) == pytest.approx((reads + scores) / 2e12)
    # Larger blocks are limited by arithmetic.
    assert cluster.scoring_seconds(10**6, 2**30, gpu) == pytest.approx(2 * 10**6 * 15_625_000 * 128 / 20e12)


# Reading programs.


SPLIT = PartitionSpec("a", "b")


def collectives_on_mesh(function, out_spec=SPLIT):
    """Returns the collectives of a function of each device's 8 x 8 part of an array, on a mesh of 2 x 4 devices."""
    mesh = Mesh(np.array(first_devices(8)).reshape(2, 4), ("a", "b"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=SPLIT, out_specs=out_spec, check_vma=False)
    return collectives_of(mapped, jax.ShapeDtypeStruct((16, 32), "float32", sharding=NamedSharding(mesh, SPLIT)))


@pytest.mark.parametrize(
    ("function", "out_spec", "sent"),
    [
        # Each device has 8 x 8 numbers of 4 bytes.
        (lambda x: jax.lax.psum(x, "b"), PartitionSpec("a", None), 2 * 3 / 4 * 256),
        (lambda x: jax.lax.psum(x, ("a", "b")), PartitionSpec(None, None), 2 * 7 / 8 * 256),
        (lambda x: jax.lax.all_gather(x, "a", tiled=True), PartitionSpec(None, "b"), 256),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), PartitionSpec(("a", "b"), None), 3 / 4 * 256),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True), SPLIT, 3 / 4 * 256),
        (lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), SPLIT, 256),
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
    lines = ["HloModule m", "ENTRY %main (x: f32[2]) -> f32[8] {", "  %x = f32[2]{0} parameter(0)"]
    return "\n".join([*lines, f"  ROOT %y = {instruction}", "}"])
