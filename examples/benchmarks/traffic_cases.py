"""What a training step, an evaluation step and a search send over the network: formulas, and the compiled programs.

The programs are compiled for virtual CPU devices and do not run. In each formula:

| symbol | |
|---|---|
| `D` | devices that split the batch |
| `M` | devices that split the rows of the tables; 1 if each device holds whole tables |
| `v`, `u` | `(D - 1) / D` and `(M - 1) / M` |
| `R`, `d` | rows and dimension of each of the two tables, in float32 |
| `B` | queries in the global batch |
| `k` | candidates that a search returns for each query |
| `n` | positives of each query that an evaluation ranks |
| `m` | candidates that the list of each query leaves out, padding included |
| `N` | candidates that `MixedNegatives` draws in each step |
| `C` | capacity of `CrossBatchMemory` |
"""

import dataclasses
from typing import Any

import jax
import keras
import keras_rs
from collectives import Collective, collectives_of

from keras_rs_contrib import (
    CrossBatchMemory,
    MixedNegatives,
    RowSparseEmbedding,
    ShardedEmbedding,
    StreamingSamplingProbability,
    TwoTowerModel,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes in the formulas, by their symbols.

    The defaults are small, and yet each device has so many logits that the loss is computed in blocks, as in large
    batches. They divide over up to 8 devices, and the blocks of an evaluation need no padding.
    """

    R: int = 192 * 342
    d: int = 24
    B: int = 8192
    k: int = 7
    n: int = 3
    m: int = 5
    N: int = 1024
    C: int = 4096


# How tables are laid out. "rows" splits the rows over the devices that split the batch. "grid" has a mesh of two axes,
# of which a layout map assigns one to the rows. "whole" keeps all rows on each device.
TRAINING = {
    ("Embedding", "whole"): "16*v*R*d",
    ("RowSparseEmbedding", "whole"): "8*v*(d + 1)*B",
    ("RowSparseEmbedding", "rows"): "16*v*(d + 1)*B",
    ("ShardedEmbedding", "rows"): "8*v*(3*d + 1)*B",
    ("RowSparseEmbedding", "grid"): "8*v*(d + 1)*B + 16*u*d*B/D",
    ("Embedding", "grid"): "16*v*R*d/M + 16*u*d*B/D",
}
LOSS = "v*(12*d + 5)*B"
NEGATIVES = {
    "": "0",
    "log-q": "48*v*B",
    # These two are those of tables whose rows are split over the devices that split the batch.
    "mixed": "v*(52*B + 20*(d + 1)*N)",
    "memory": "v*(12*B + (20*d + 9)*C)",
}
LOSS_OF_EVALUATION = "v*(4*d + 5)*B"
NEGATIVES_OF_EVALUATION = {"": "0", "log-q": "4*v*B"}
LOOKUPS = {
    ("Embedding", "whole"): "0",
    ("RowSparseEmbedding", "whole"): "0",
    ("RowSparseEmbedding", "rows"): "8*v*(d + 1)*B",
    ("ShardedEmbedding", "rows"): "8*v*(2*d + 1)*B",
    ("RowSparseEmbedding", "grid"): "16*u*d*B/D",
    ("Embedding", "grid"): "16*u*d*B/D",
}
RANKS = {"whole": "0", "rows": "4*v*(d + 4*n + m)*B", "grid": "16*u*n*B/D"}
# Each row of `evaluate` has one positive. In these programs, it is not known what queries have seen.
RANKS_OF_EVALUATION = {"whole": "0", "rows": "4*v*(d + 4)*B", "grid": "16*u*B/D"}
SEARCH = {"whole": "0", "rows": "4*v*(d + 2*k + m)*B", "grid": "8*(M - 1)*k*B/D"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A compiled program.

    Attributes:
        program: `"training"`, `"evaluation"`, which is a step of `evaluate`, `"ranks"`, which is a batch of
            `evaluate_queries` without the query tower, or `"search"`, a batch of the index.
        embedding: the class of both towers.
        layout: `"whole"`, `"rows"` or `"grid"`.
        negatives: a key of `NEGATIVES`, or, for `"evaluation"`, of `NEGATIVES_OF_EVALUATION`.
    """

    program: str
    embedding: str = "RowSparseEmbedding"
    layout: str = "rows"
    negatives: str = ""

    @property
    def formula(self) -> str:
        """The bytes that each device sends, without those of scalars."""
        tables = (self.embedding, self.layout)
        if self.program == "training":
            parts = [LOSS, TRAINING[tables], NEGATIVES[self.negatives]]
        elif self.program == "evaluation":
            negatives = NEGATIVES_OF_EVALUATION[self.negatives]
            parts = [LOSS_OF_EVALUATION, LOOKUPS[tables], RANKS_OF_EVALUATION[self.layout], negatives]
        else:
            parts = [{"ranks": RANKS, "search": SEARCH}[self.program][self.layout]]
        return " + ".join(part for part in parts if part != "0") or "0"

    def bytes_sent(self, num_devices: int, sizes: Any) -> float:
        """Returns the value of the formula."""
        batch, rows = mesh_shape(self.layout, num_devices)
        symbols = {**dataclasses.asdict(sizes), "D": batch, "M": rows, "v": 1 - 1 / batch, "u": 1 - 1 / rows}
        # The formulas that are printed are those that are computed.
        return float(eval(self.formula, {"__builtins__": {}}, symbols))

    def compiled(self, num_devices: int, sizes: Sizes) -> list[Collective]:
        """Returns the collectives of the compiled program."""
        keras.distribution.set_distribution(distribution(self.layout, num_devices))
        try:
            model = make_model(self, sizes)
            return {
                "training": step_collectives,
                "evaluation": step_collectives,
                "ranks": ranks_collectives,
                "search": search_collectives,
            }[self.program](model, self.program, sizes)
        finally:
            keras.distribution.set_distribution(None)


CASES = [
    *(Case("training", *tables) for tables in TRAINING),
    *(Case("training", negatives=negatives) for negatives in ("log-q", "mixed", "memory")),
    *(Case("evaluation", *tables) for tables in LOOKUPS),
    Case("evaluation", negatives="log-q"),
    *(Case(program, layout=layout) for program in ("ranks", "search") for layout in RANKS),
]


def mesh_shape(layout: str, num_devices: int) -> tuple[int, int]:
    """Returns over how many devices the batch and the rows of the tables are split."""
    return {"whole": (num_devices, 1), "rows": (num_devices, num_devices), "grid": (2, num_devices // 2)}[layout]


def distribution(layout: str, num_devices: int) -> Any:
    """Returns the distribution of a layout over the first devices."""
    devices = jax.devices()[:num_devices]
    if layout != "grid":
        return keras.distribution.DataParallel(devices=devices)
    mesh = keras.distribution.DeviceMesh(mesh_shape(layout, num_devices), ("batch", "model"), devices)
    layout_map = keras.distribution.LayoutMap(mesh)
    layout_map[".*embeddings"] = ("model", None)
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


def make_model(case: Case, sizes: Sizes) -> TwoTowerModel:
    """Returns a compiled model with its weights and those of its optimizer."""
    mesh_axis = {"mesh_axis": "batch"} if case.layout == "rows" else {}
    kind = {
        "Embedding": keras.layers.Embedding,
        "RowSparseEmbedding": RowSparseEmbedding,
        "ShardedEmbedding": ShardedEmbedding,
    }[case.embedding]
    negatives: dict[str, Any] = {"sampling_probability": None}
    if case.negatives == "log-q":
        negatives = {"sampling_probability": StreamingSamplingProbability(sizes.R)}
    elif case.negatives == "mixed":
        negatives = {"mixed_negatives": MixedNegatives(StreamingSamplingProbability(sizes.R), sizes.N)}
    elif case.negatives == "memory":
        negatives["cross_batch_memory"] = CrossBatchMemory(sizes.C)
    towers = [kind(sizes.R, sizes.d, **mesh_axis) for _ in range(2)]
    index = keras_rs.layers.BruteForceRetrieval(k=sizes.k)
    model = TwoTowerModel(*towers, "query", "candidate", retrieval=index, **negatives)
    model.compile("adagrad")
    model.build({"query": (None,), "candidate": (None,)})
    model.optimizer.build(model.trainable_variables)
    return model


def split(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    """Returns an array without values, with rows that are split as Keras splits a batch."""
    layout = keras.distribution.distribution().get_data_layout(shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.backend_layout)


def without_values(variables: list[keras.Variable]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes, dtypes and layouts of variables."""
    return [jax.ShapeDtypeStruct(v.shape, v.value.dtype, sharding=v.value.sharding) for v in variables]


def step_collectives(model: TwoTowerModel, program: str, sizes: Sizes) -> list[Collective]:
    """Returns the collectives of a step of `fit` or `evaluate`, compiled as Keras compiles it."""
    is_training = program == "training"
    groups = [model.trainable_variables, model.non_trainable_variables, model.metrics_variables]
    if is_training:
        groups.insert(2, model.optimizer.variables)
    state = tuple(map(without_values, groups))
    columns = {name: split((sizes.B,), "int32") for name in ("query", "candidate")}
    return collectives_of(
        model.train_step if is_training else model.test_step,
        state,
        # As in `fit`: features, no targets, and the weight of each row, which is 0 for padding.
        (columns, None, split((sizes.B,), "float32")),
        donate_argnums=0,
        out_shardings=(None, jax.tree.map(lambda array: array.sharding, state)),
    )


def search_collectives(model: TwoTowerModel, program: str, sizes: Sizes) -> list[Collective]:
    """Returns the collectives of a search of the index for a batch of query embeddings."""
    index = model.retrieval

    def search(state: Any, queries: Any, exclude_ids: Any) -> Any:
        return index.stateless_call(*state, queries, exclude_ids=exclude_ids)[0]

    state = tuple(map(without_values, (index.trainable_variables, index.non_trainable_variables)))
    return collectives_of(search, state, split((sizes.B, sizes.d), "float32"), split((sizes.B, sizes.m), "int32"))


def ranks_collectives(model: TwoTowerModel, program: str, sizes: Sizes) -> list[Collective]:
    """Returns the collectives of the ranks of several candidates of each query in the whole corpus."""
    index = model.retrieval
    variables = [*index.trainable_variables, *index.non_trainable_variables]

    def ranks(values: Any, queries: Any, candidate_ids: Any, exclude_ids: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return index.ranks(queries, candidate_ids, exclude_ids=exclude_ids)

    arrays = [split((sizes.B, width), dtype) for width, dtype in ((sizes.d, "float32"), (sizes.n, "int32"))]
    return collectives_of(ranks, without_values(variables), *arrays, split((sizes.B, sizes.m), "int32"))
