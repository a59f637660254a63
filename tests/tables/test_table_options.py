"""Options of `keras.layers.Embedding` that tables follow, or reject before anything is created."""

import warnings

import keras
import keras_rs
import numpy as np
import pytest
from conftest import data_parallel

from keras_rs_contrib import RowSparseEmbedding, ShardedEmbedding, TwoTowerModel, shard_candidates

LAYERS = [ShardedEmbedding, RowSparseEmbedding]
QUANTIZED = ["int8_from_float32", "int4_from_float32", "float8_from_float32", "int8_from_mixed_bfloat16"]
QUANTIZED_MESSAGE = r"(?s)cannot be quantized\. Received: .*keras\.layers\.Embedding"
DTYPE_MESSAGE = r"(?s)must be float16, bfloat16 or float32\. Received: .*'{}'.*\. Pass"


def quantized(name):
    return keras.dtype_policies.get(name)


def policy_map(default, **policies):
    result = keras.dtype_policies.DTypePolicyMap(default_policy=quantized(default))
    for path, name in policies.items():
        result[path] = quantized(name)
    return result


# Quantization.


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("policy", QUANTIZED)
def test_a_quantized_policy_raises_in_the_constructor(layer, policy):
    for dtype in (
        policy,
        quantized(policy),
        keras.saving.serialize_keras_object(quantized(policy)),
        policy_map(policy),
    ):
        with pytest.raises(ValueError, match=QUANTIZED_MESSAGE):
            layer(10, 4, dtype=dtype)
    keras.config.set_dtype_policy(policy)
    with pytest.raises(ValueError, match=QUANTIZED_MESSAGE):
        layer(10, 4)
    layer(10, 4, dtype="float32")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["table", ".*ble"])
def test_a_policy_map_that_quantizes_the_table_raises_before_it_is_built(layer, name):
    table = layer(10, 4, name="table", dtype=policy_map("float32", **{name: "int8_from_float32"}))
    with pytest.raises(ValueError, match=QUANTIZED_MESSAGE):
        table.build()
    assert not table.built
    assert table.variables == []


@pytest.mark.parametrize("layer", LAYERS)
def test_a_policy_map_for_other_layers_is_accepted(layer):
    table = layer(10, 4, name="table", dtype=policy_map("float32", dense="int8_from_float32"))
    assert table(np.arange(3)).dtype == "float32"
    table = layer(10, 4, name="table", dtype=policy_map("int8_from_float32", table="bfloat16"))
    assert table(np.arange(3)).dtype == "bfloat16"
    assert table.embeddings.dtype == "bfloat16"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("is_built", [False, True])
def test_assigning_a_quantized_policy_raises_and_changes_nothing(layer, is_built):
    table = layer(10, 4, name="table")
    if is_built:
        expected = np.asarray(table(np.arange(10)))
    for policy in ("int8_from_float32", policy_map("int8_from_float32")):
        with pytest.raises(ValueError, match=QUANTIZED_MESSAGE):
            table.dtype_policy = policy
    assert table.dtype_policy.name == "float32"
    if is_built:
        np.testing.assert_array_equal(table(np.arange(10)), expected)
    table.dtype_policy = "mixed_bfloat16"
    assert table(np.arange(10)).dtype == "bfloat16"
    assert table.embeddings.dtype == "float32"


@pytest.mark.parametrize("layer", LAYERS)
def test_quantizing_a_model_leaves_the_table_as_it_is(layer):
    model = keras.Sequential([keras.Input((), dtype="int32"), layer(10, 4, name="table"), keras.layers.Dense(2)])
    table = model.get_layer("table")
    expected = np.asarray(table(np.arange(10)))
    with pytest.raises(
        NotImplementedError, match=r"cannot be quantized\. Received: .*'table'.*keras\.layers\.Embedding"
    ):
        table.quantize("int8")
    with warnings.catch_warnings(record=True) as caught:
        # Keras also warns of the input layer.
        warnings.simplefilter("always")
        model.quantize("int8")
    assert any("cannot be quantized" in str(warning.message) for warning in caught)
    assert model.layers[-1].quantization_mode == "int8"
    assert table.quantization_mode is None
    np.testing.assert_array_equal(table(np.arange(10)), expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_quantization_config_raises(layer):
    with pytest.raises(ValueError, match=r"Received: .*quantization_config.*keras\.layers\.Embedding"):
        layer(10, 4, quantization_config=object())


def test_a_quantized_table_can_be_made_as_the_error_says():
    table = RowSparseEmbedding(10, 4)
    values = np.asarray(table(np.arange(10)))
    plain = keras.layers.Embedding(10, 4, weights=table.embeddings[: table.input_dim])
    plain.quantize("int8")
    np.testing.assert_allclose(plain(np.arange(10)), values, atol=1e-3)


def test_the_index_of_a_quantized_tower_raises():
    tower = keras.layers.Embedding(10, 4, dtype="int8_from_float32")
    index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower)
    with pytest.raises(ValueError, match=r"floating-point table.*quantized to int8.*unquantized"):
        index(np.ones((3, 4), "float32"))
    tower = keras.layers.Embedding(10, 4)
    model = TwoTowerModel(keras.layers.Embedding(10, 4), tower, "user", "movie")
    model.compile("sgd")
    model.fit({"user": np.arange(8), "movie": np.arange(8)}, verbose=0)
    tower.quantize("int8")
    with pytest.raises(ValueError, match=r"floating-point table.*quantized to int8.*unquantized"):
        model.recommend({"user": np.arange(3)}, k=2)


# Other dtypes.


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64", "string", "float64", "float8_e4m3fn"])
def test_a_row_sparse_table_that_cannot_be_trained_raises(dtype):
    policy = keras.DTypePolicy(dtype)
    for given in (policy, keras.dtype_policies.DTypePolicyMap(default_policy=policy)):
        with pytest.raises(ValueError, match=DTYPE_MESSAGE.format(dtype)):
            RowSparseEmbedding(10, 4, embeddings_initializer="zeros", dtype=given)
    table = RowSparseEmbedding(10, 4, name="table")
    with pytest.raises(ValueError, match=DTYPE_MESSAGE.format(dtype)):
        table.dtype_policy = policy
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32", policy_map={"table": policy})
    table = RowSparseEmbedding(10, 4, name="table", dtype=policies)
    with pytest.raises(ValueError, match=DTYPE_MESSAGE.format(dtype)):
        table.build()
    assert table.variables == []


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "float32", "mixed_bfloat16", "mixed_float16"])
def test_floating_point_policies_train_the_rows(policy):
    table = RowSparseEmbedding(10, 4, "sgd", dtype=policy)
    model = keras.Sequential([keras.Input((), dtype="int32"), table])
    model.compile(keras.optimizers.SGD(), "mse", auto_scale_loss=False)
    before = np.asarray(table.embeddings, "float32")
    model.fit(np.array([3, 5]), 100 * np.ones((2, 4)), verbose=0)
    after = np.asarray(table.embeddings, "float32")
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [3, 5]


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_a_sharded_table_of_any_dtype_matches_a_plain_embedding(dtype):
    table = np.arange(40).reshape(10, 4).astype(dtype)
    ids = np.array([0, 9, -1, 3])
    plain = keras.layers.Embedding(10, 4, "zeros", dtype=dtype, weights=table)
    for distribution in (None, data_parallel(8)):
        keras.distribution.set_distribution(distribution)
        ours = ShardedEmbedding(10, 4, mesh_axis="batch", embeddings_initializer="zeros", dtype=dtype, weights=table)
        found = ours(ids)
        assert found.dtype == plain(ids).dtype
        np.testing.assert_array_equal(found, plain(ids))


# LoRA.


def test_lora_before_build_raises_with_the_fix():
    with pytest.raises(ValueError, match=r"must be built.*Received: .*'table'.*Call `build\(\)`"):
        ShardedEmbedding(10, 4, name="table").enable_lora(2)


@pytest.mark.parametrize("arguments", [{"lora_rank": 2}, {"lora_alpha": 3}])
def test_lora_of_a_row_sparse_table_raises(arguments):
    with pytest.raises(ValueError, match=rf"only the rows of the batch.*`{next(iter(arguments))}`"):
        RowSparseEmbedding(10, 4, **arguments)
    for is_built in (False, True):
        table = RowSparseEmbedding(10, 4)
        if is_built:
            table.build()
        for call in (lambda table: table.enable_lora(2), lambda table: table.enable_lora(rank=None)):
            with pytest.raises(ValueError, match="lora_rank"):
                call(table)


def test_lora_alpha_scales_the_update(tmp_path):
    table = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    ids = np.arange(10)

    def check(layer, scale):
        a, b = layer.lora_embeddings_a.numpy()[:10], layer.lora_embeddings_b.numpy()
        np.testing.assert_allclose(layer(ids), table + scale * (a @ b), rtol=1e-5)

    given = ShardedEmbedding(10, 4, weights=table, lora_rank=2, lora_alpha=3)
    given.lora_embeddings_b.assign(np.ones((2, 4)))
    check(given, 3 / 2)
    copy = ShardedEmbedding.from_config(given.get_config())
    copy.build()
    copy.set_weights(given.get_weights())
    check(copy, 3 / 2)
    later = ShardedEmbedding(10, 4, weights=table)
    later.enable_lora(2, b_initializer="ones")
    check(later, 1)
    later = ShardedEmbedding(10, 4, weights=table)
    later.enable_lora(2, 8, b_initializer="ones")
    check(later, 4)


# `trainable`.


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_table_and_its_slots_are_frozen_together(number):
    table = RowSparseEmbedding(10, 4, "lazy_adam")
    model = keras.Sequential([keras.Input((), dtype="int32"), table, keras.layers.Dense(1)])
    # One of them alone would be a table whose slots stand still, or the reverse.
    table.trainable_variables[number].trainable = False
    assert table.trainable_variables == []
    before = table.get_weights()
    model.compile("sgd", "mse")
    model.fit(np.arange(10), np.ones((10, 1)), verbose=0)
    for weight, expected in zip(table.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    table.embeddings.trainable = True
    assert len(table.trainable_variables) == 3


def test_a_table_whose_slot_is_frozen_in_a_copy_of_the_model_is_trained():
    ids = keras.Input((), dtype="int32")
    model = keras.Model(ids, RowSparseEmbedding(10, 4, name="table")(ids))
    copy = keras.models.clone_model(model)
    copy.get_layer("table").trainable_variables[1].trainable = False
    assert len(model.trainable_variables) == 2
    assert copy.trainable_variables == []


# Before `build`.


def test_the_number_of_steps_before_build_raises_with_the_fix():
    with pytest.raises(AttributeError, match=r"once the layer is built.*Received: .*'table'.*`build\(\)`"):
        _ = RowSparseEmbedding(10, 4, name="table").iterations


class WithUnusedTable(keras.Model):
    """A model with an embedding that is never called, and so never built."""

    def __init__(self, unused):
        super().__init__()
        self.unused, self.dense = unused, keras.layers.Dense(1)

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


@pytest.mark.parametrize("layer", [keras.layers.Embedding, *LAYERS])
def test_a_model_with_an_embedding_that_is_never_built_can_be_loaded(tmp_path, layer):
    models = [WithUnusedTable(layer(10, 4)) for _ in range(2)]
    expected, other = (np.asarray(model(np.ones((2, 3)))) for model in models)
    assert (expected != other).any()
    models[0].save_weights(tmp_path / "model.weights.h5")
    models[1].load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(models[1](np.ones((2, 3))), expected)


@pytest.mark.parametrize("layer", [keras.layers.Embedding, *LAYERS])
def test_loading_weights_into_an_embedding_that_is_not_built_raises(layer):
    with pytest.raises(ValueError, match="was never built"):
        layer(10, 4).load_own_variables({"0": np.ones((10, 4))})
