import copy
import functools
import zipfile

import h5py
import jax
import keras
import keras_rs
import numpy as np
import pytest
import reference
from conftest import DISTRIBUTIONS, data_parallel, first_devices, model_parallel
from models import DIMENSION, RetrievalModel, brute_force, predictions

from keras_rs_contrib import ShardedBruteForceRetrieval, ShardedEmbedding, shard_candidates
from keras_rs_contrib.scores import SIMILARITIES

NUM_USERS, NUM_MOVIES = 24, 40


def fitted_model(epochs=2, **arguments):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.integers(0, NUM_USERS, 96).astype("int32")
    y = {"movie_id": rng.integers(1, NUM_MOVIES, 96).astype("int32"), "rating": rng.random(96).astype("float32")}
    # The number of rows is divisible by every tested axis only with padding.
    model = RetrievalModel(NUM_USERS, NUM_MOVIES, is_sharded=arguments.get("mesh_axis") is not None, **arguments)
    model.compile(keras.optimizers.Adagrad(0.5))
    model.history = model.fit(x, y, batch_size=24, epochs=epochs, verbose=0, shuffle=False)
    return model


def expected_predictions(model, k=5):
    users = np.asarray(model.user_embedding.embeddings.value)
    return reference.top_k(users, np.asarray(model.the_tower.embeddings.value)[:NUM_MOVIES], k, exclude_ids=[0])[1]


# Results.


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("return_scores", [False, True])
def test_the_index_returns_the_best_rows_of_the_tower(rng, similarity, return_scores):
    tower = keras.layers.Embedding(30, 4, embeddings_initializer="normal")
    index = shard_candidates(brute_force(return_scores=return_scores), tower, similarity=similarity)
    queries = rng.normal(size=(6, 4)).astype("float32")
    result = index(queries)
    expected_scores, expected_ids = reference.top_k(
        queries, np.asarray(tower.embeddings.value), 5, similarity=similarity
    )
    ids = result[1] if return_scores else result
    assert ids.dtype == "int32"
    np.testing.assert_array_equal(ids, expected_ids)
    if return_scores:
        assert result[0].dtype == "float32"
        np.testing.assert_allclose(result[0], expected_scores, rtol=1e-5, atol=1e-7)


def test_results_are_candidate_ids(rng):
    tower = keras.layers.Embedding(10, 4)
    ids = rng.permutation(10) * 1000 - 5000
    index = shard_candidates(brute_force(k=3), tower, candidate_ids=ids, exclude_ids=ids[[2, 7]])
    queries = rng.normal(size=(6, 4)).astype("float32")
    result = index(queries)
    table = np.asarray(tower.embeddings.value)
    np.testing.assert_array_equal(
        result, reference.top_k(queries, table, 3, ids=ids.tolist(), exclude_ids=ids[[2, 7]].tolist())[1]
    )


def test_an_excluded_candidate_is_not_returned_even_if_no_other_score_is_finite():
    tower = keras.layers.Embedding(3, 1, weights=np.array([[1.0], [np.inf], [np.inf]]))
    index = shard_candidates(brute_force(k=2, return_scores=True), tower, exclude_ids=[0])
    scores, ids = index(np.array([[-1.0]]))
    np.testing.assert_array_equal(scores, [[-np.inf, -np.inf]])
    assert 0 not in np.asarray(ids)


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_scores_are_float32_for_any_precision_of_the_tower(rng, policy):
    tower = keras.layers.Embedding(30, 4, dtype=policy, embeddings_initializer="normal")
    keras.config.set_dtype_policy(policy)
    index = shard_candidates(brute_force(return_scores=True), tower)
    queries = jax.numpy.asarray(rng.normal(size=(6, 4)), "bfloat16")
    scores, ids = index(queries)
    table = np.asarray(tower.embeddings.value).astype("float64")
    expected_scores, expected_ids = reference.top_k(np.asarray(queries).astype("float64"), table, 5)
    assert scores.dtype == "float32"
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-7)


def test_k_may_change_up_to_the_size_of_the_corpus(rng):
    index = shard_candidates(brute_force(), keras.layers.Embedding(10, 4))
    index.k = 7
    assert index(np.ones((2, 4))).shape == (2, 7)
    for k in (0, -1, 11):
        index.k = k
        with pytest.raises(ValueError, match=f"k={k}"):
            index(np.ones((2, 4)))


# Exclusions and ranks.


@pytest.mark.parametrize(
    ("name", "num_excluded", "with_ids", "mesh_axis"),
    [
        ("1 device", 1, True, None),
        ("1 device", 20, False, None),
        ("DataParallel(3)", 20, False, None),
        ("DataParallel(8)", 20, True, "batch"),
        ("ModelParallel(2x4)", 0, False, "batch"),
        ("ModelParallel(2x4)", 1, True, None),
    ],
)
def test_exclusions_apply_to_top_k_and_ranks(rng, name, num_excluded, with_ids, mesh_axis):
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    tower = ShardedEmbedding(43, 4, embeddings_initializer="normal", name="movie_tower")
    ids = rng.permutation(43) * 3 - 20 if with_ids else np.arange(43)
    own = ids[rng.permutation(43)[:num_excluded]]
    index = shard_candidates(
        brute_force(k=7), tower, candidate_ids=ids if with_ids else None, exclude_ids=own, mesh_axis=mesh_axis
    )
    queries = rng.normal(size=(24, 4)).astype("float32")
    exclude_ids = np.concatenate([rng.choice(ids, (24, 5)), np.full((24, 2), -1), np.full((24, 1), 10**6)], axis=1)
    table = tower.embeddings.numpy()[:43] if tower.built else None
    for exclude in (None, exclude_ids):
        found = np.asarray(index(queries, exclude_ids=exclude))
        table = tower.embeddings.numpy()[:43]
        arguments = {"ids": ids.tolist(), "exclude_ids": own.tolist(), "exclude_ids_by_query": exclude}
        np.testing.assert_array_equal(found, reference.top_k(queries, table, 7, **arguments)[1])
        wanted = ids[rng.integers(0, 43, 24)]
        ranks = index.ranks(queries, wanted, exclude_ids=exclude)
        assert ranks.dtype == "int32"
        np.testing.assert_array_equal(ranks, reference.ranks(queries, table, wanted.tolist(), **arguments))
        np.testing.assert_array_equal(index.ranks(queries, found[:, 4], exclude_ids=exclude), [4] * 24)


def test_missing_candidates_have_id_minus_one_and_score_minus_infinity(rng):
    tower = keras.layers.Embedding(6, 4, embeddings_initializer="normal")
    index = shard_candidates(brute_force(k=4, return_scores=True), tower)
    scores, ids = index(rng.normal(size=(2, 4)), exclude_ids=[[0, 1, 2, 3], [0, 1, 2, 3]])
    assert set(np.asarray(ids)[:, :2].ravel()) == {4, 5}
    np.testing.assert_array_equal(np.asarray(ids)[:, 2:], -1)
    np.testing.assert_array_equal(np.asarray(scores)[:, 2:], -np.inf)
    assert np.isfinite(np.asarray(scores)[:, :2]).all()


@pytest.mark.parametrize("name", ["1 device", "DataParallel(3)", "ModelParallel(2x4)"])
def test_exclude_ids_may_be_an_input_of_a_functional_model(rng, name):
    distribution = DISTRIBUTIONS[name]()
    keras.distribution.set_distribution(distribution)
    tower = ShardedEmbedding(43, 4, embeddings_initializer="normal", name="movie_tower")
    queries, exclude_ids = keras.Input((4,)), keras.Input((None,), dtype="int32")
    index = shard_candidates(brute_force(), tower, mesh_axis=None if distribution is None else "batch")
    model = keras.Model([queries, exclude_ids], index(queries, exclude_ids=exclude_ids))
    assert model.output.shape == (None, 5)
    x = [rng.normal(size=(24, 4)).astype("float32"), rng.integers(-1, 43, (24, 3)).astype("int32")]
    _, expected = reference.top_k(x[0], tower.embeddings.numpy()[:43], 5, exclude_ids_by_query=x[1])
    np.testing.assert_array_equal(model.predict(x, batch_size=24, verbose=0), expected)


def test_ranks_of_excluded_and_unknown_candidates_and_nan_queries(rng):
    tower = keras.layers.Embedding(10, 4, embeddings_initializer="normal")
    index = shard_candidates(brute_force(), tower, exclude_ids=[3])
    queries = rng.normal(size=(3, 4)).astype("float32")
    queries[2] = np.nan
    np.testing.assert_array_equal(index.ranks(queries, [3, 4, 5], exclude_ids=[[-1], [4], [-1]]), [2**31 - 1] * 3)
    with pytest.raises(ValueError, match="10 in row 1, which is none of the 10"):
        index.ranks(queries, [1, 10, 2])
    compiled = jax.jit(index.ranks)
    np.testing.assert_array_equal(compiled(queries, jax.numpy.array([1, 10, -2]))[1:], [2**31 - 1] * 2)


@pytest.mark.parametrize("name", ["1 device", "DataParallel(3)", "ModelParallel(2x4)"])
def test_ranks_of_several_candidates_match_ranks_of_each_candidate(rng, name):
    """Covers duplicate and missing ids, and a number of queries that is not divisible by the devices."""
    distribution = DISTRIBUTIONS[name]()
    keras.distribution.set_distribution(distribution)
    tower = ShardedEmbedding(43, 4, embeddings_initializer="normal", name="movie_tower")
    names = rng.permutation(43) * 3 - 21
    own = names[[4, 30]]
    # The table's own layout splits its rows over the other axis.
    mesh_axis = "batch" if isinstance(distribution, keras.distribution.DataParallel) else None
    index = shard_candidates(brute_force(), tower, candidate_ids=names, exclude_ids=own, mesh_axis=mesh_axis)
    queries = rng.normal(size=(22, 4)).astype("float32")
    exclude_ids = np.concatenate([rng.choice(names, (22, 3)), np.full((22, 1), -1)], axis=1)
    ids = rng.choice(names, (22, 9))
    ids[rng.random(ids.shape) < 0.2] = -1
    ids[0] = ids[0, 0]
    # Excluded candidates: one by the index, and one by its query.
    ids[1, 0], ids[2, 0] = own[1], exclude_ids[2, 1]
    ranks = index.ranks(queries, ids, exclude_ids=exclude_ids)
    assert (ranks.dtype, ranks.shape) == ("int32", (22, 9))
    ranks = np.asarray(ranks)
    arguments = {"ids": names.tolist(), "exclude_ids": own.tolist(), "exclude_ids_by_query": exclude_ids}
    for column, wanted in enumerate(ids.T):
        expected = reference.ranks(queries, tower.embeddings.numpy()[:43], wanted.tolist(), **arguments)
        np.testing.assert_array_equal(ranks[:, column], np.where(wanted == -1, -1, expected))
        np.testing.assert_array_equal(index.ranks(queries, wanted, exclude_ids=exclude_ids), ranks[:, column])
    np.testing.assert_array_equal(ranks == -1, ids == -1)
    np.testing.assert_array_equal(ranks[[1, 2], 0], [2**31 - 1] * 2)


def test_ranks_of_several_candidates_with_an_unknown_one(rng):
    index = shard_candidates(brute_force(), keras.layers.Embedding(10, 4, embeddings_initializer="normal"))
    queries = rng.normal(size=(3, 4)).astype("float32")
    ids = np.array([[1, -1], [2, 2], [-1, -1]])
    expected = np.asarray(index.ranks(queries, ids))
    assert (expected[ids == -1] == -1).all()
    compiled = jax.jit(index.ranks)
    for unknown in (10, -2, 2**31 - 1):
        wrong = ids.copy()
        wrong[1, 1] = unknown
        with pytest.raises(ValueError, match=f"{unknown} in row 1, which is none of the 10"):
            index.ranks(queries, wrong)
        # A compiled program cannot raise, so an unknown id is in no list.
        ranks = compiled(queries, wrong.astype("int32"))
        np.testing.assert_array_equal(ranks, np.where(ids == wrong, expected, 2**31 - 1))
    for shape in [(2, 2), (3, 2, 1), ()]:
        with pytest.raises(ValueError, match="for 3 queries"):
            index.ranks(queries, np.ones(shape, int))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"candidate_ids": [1, 2]}, ValueError, r"shape \(2,\) for 3 queries"),
        ({"candidate_ids": [1.0, 2.0, 3.0]}, TypeError, "float64"),
        ({"candidate_ids": jax.numpy.ones(3)}, TypeError, "float32"),
        ({"candidate_ids": [1, 2, 2**32]}, ValueError, "4294967296"),
        ({"candidate_ids": jax.numpy.full(3, 2**32 - 5, "uint32")}, ValueError, "4294967291"),
        ({"exclude_ids": [1, 2, 3]}, ValueError, r"shape \(3,\) for query embeddings of shape \(3, 4\)"),
        ({"exclude_ids": [[1], [2]]}, ValueError, r"shape \(2, 1\)"),
        ({"exclude_ids": [[1], [2], [2**32 + 5]]}, ValueError, r"`exclude_ids` must be in \[-2147483648, 2147483647\]"),
        ({"exclude_ids": [["a"], ["b"], ["c"]]}, TypeError, "`exclude_ids` must be integers"),
        ({"exclude_ids": [[1], [2, 3], []]}, TypeError, "Pass rows of equal length"),
        ({"query_embeddings": np.ones((3, 5))}, ValueError, r"\(batch, 4\)"),
    ],
)
def test_invalid_arguments_of_a_search_raise(arguments, error, words):
    index = shard_candidates(brute_force(), keras.layers.Embedding(10, 4))
    queries = np.ones((3, 4), "float32")
    with pytest.raises(error, match=words):
        index.ranks(**{"query_embeddings": queries, "candidate_ids": [1, 2, 3], **arguments})
    if "candidate_ids" not in arguments:
        with pytest.raises(error, match=words):
            index(**{"query_embeddings": queries, **arguments})


# The shared table.


def test_the_index_and_the_tower_share_one_table():
    model = fitted_model(epochs=0)
    predictions(model)
    assert model.the_index.candidate_embeddings is model.the_tower.embeddings
    assert len(model.weights) == 2
    assert len(model.trainable_weights) == 2


def test_each_prediction_uses_the_current_weights():
    model = fitted_model(epochs=1)
    before = predictions(model)
    np.testing.assert_array_equal(before, expected_predictions(model))
    model.the_tower.embeddings.assign(-model.the_tower.embeddings.value)
    after = predictions(model)
    np.testing.assert_array_equal(after, expected_predictions(model))
    assert not np.array_equal(before, after)


def test_training_between_predictions_does_not_recompile_prediction():
    model = fitted_model(epochs=1)
    predictions(model)
    compiled = model.predict_function
    x, y = np.arange(24, dtype="int32"), {"movie_id": np.arange(24, dtype="int32"), "rating": np.ones(24, "float32")}
    first = predictions(model)
    model.fit(x, y, batch_size=24, epochs=30, verbose=0)
    assert not np.array_equal(predictions(model), first)
    np.testing.assert_array_equal(predictions(model), expected_predictions(model))
    assert model.predict_function is compiled


def test_the_table_of_a_tower_cannot_be_overwritten_through_the_index():
    tower = keras.layers.Embedding(10, 4)
    tower.build((None,))
    index = shard_candidates(brute_force(), tower)
    before = np.asarray(tower.embeddings.value)
    with pytest.raises(ValueError, match="`update_candidates` would overwrite the trained table"):
        index.update_candidates(np.zeros((10, 4)))
    with pytest.raises(AttributeError, match="`candidate_embeddings` belongs to the candidate tower"):
        index.candidate_embeddings = tower.embeddings
    index.refresh()
    np.testing.assert_array_equal(tower.embeddings.value, before)
    assert len(index.weights) == 1


@pytest.mark.parametrize("mesh_axis", [None, "batch"])
def test_the_search_includes_the_lora_update_of_a_table(rng, mesh_axis):
    keras.distribution.set_distribution(data_parallel(8))
    tower = keras.layers.Embedding(40, 4, lora_rank=2)
    index = shard_candidates(brute_force(), tower, mesh_axis=mesh_axis)
    queries = rng.normal(size=(8, 4)).astype("float32")
    index(queries)
    tower.lora_embeddings_b.assign(rng.normal(size=(2, 4)))
    np.testing.assert_array_equal(index(queries), reference.top_k(queries, np.asarray(tower.embeddings), 5)[1])


# Distributions.


@functools.cache
def of_one_device():
    model = fitted_model()
    return model.history.history["loss"], predictions(model)


@pytest.mark.parametrize(
    ("name", "mesh_axis"),
    [
        ("DataParallel(1)", None),
        ("DataParallel(3)", "batch"),
        ("DataParallel(8)", None),
        ("ModelParallel(2x4)", None),
        ("ModelParallel(2x4)", "batch"),
    ],
)
def test_fit_and_predict_match_one_device(name, mesh_axis):
    keras.distribution.set_distribution(None)
    expected_losses, expected_ids = of_one_device()
    keras.distribution.set_distribution(DISTRIBUTIONS[name]())
    model = fitted_model(mesh_axis=mesh_axis)
    np.testing.assert_allclose(model.history.history["loss"], expected_losses, rtol=1e-5)
    np.testing.assert_array_equal(predictions(model), expected_ids)
    np.testing.assert_array_equal(predictions(model), expected_predictions(model))


def test_the_layout_of_the_tower_is_kept():
    keras.distribution.set_distribution(model_parallel())
    model = fitted_model()
    predictions(model)
    assert model.the_tower.embeddings.value.sharding.spec[0] == "model"
    assert model.the_tower.embeddings.value.addressable_shards[0].data.shape == (10, DIMENSION)


@pytest.mark.parametrize("built_before", [False, True])
def test_mesh_axis_splits_the_table_and_its_optimizer_slots(built_before):
    keras.distribution.set_distribution(data_parallel(8))
    tower = keras.layers.Embedding(40, 4)
    if built_before:
        tower.build((None,))
    index = shard_candidates(brute_force(), tower, mesh_axis="batch")
    index(np.ones((8, 4), "float32"))
    optimizer = keras.optimizers.Adagrad()
    optimizer.build([tower.embeddings])
    for variable in (tower.embeddings, optimizer.variables[-1]):
        assert variable.value.addressable_shards[0].data.shape == (5, 4)


@pytest.mark.parametrize("pattern", ["model/movie_table/embeddings", ".*movie_table/embeddings"])
def test_a_layout_map_matches_the_same_table_path_with_and_without_an_index(pattern):
    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="model")
            self.movies = keras.layers.Embedding(40, 4, name="movie_table")
            self.index = shard_candidates(brute_force(), self.movies)

        def call(self, queries):
            return self.index(queries)

    keras.distribution.set_distribution(model_parallel(pattern=pattern))
    model = Model()
    model(np.ones((8, 4), "float32"))
    assert model.movies.embeddings.path == "model/movie_table/embeddings"
    assert model.movies.embeddings.value.sharding.spec[0] == "model"


def test_a_standalone_index_does_not_change_the_path_of_its_tower():
    tower = keras.layers.Embedding(40, 4, name="movie_table")
    shard_candidates(brute_force(), tower)(np.ones((8, 4), "float32"))
    assert tower.embeddings.path == "movie_table/embeddings"


def test_a_change_of_layout_keeps_the_values(rng):
    values = rng.normal(size=(40, 4)).astype("float32")
    keras.distribution.set_distribution(data_parallel(8))
    tower = keras.layers.Embedding(40, 4, weights=values)
    shard_candidates(brute_force(), tower, mesh_axis="batch")
    np.testing.assert_array_equal(tower.embeddings.value, values)


def test_an_unknown_mesh_axis_raises():
    keras.distribution.set_distribution(data_parallel(8))
    with pytest.raises(ValueError, match=r"mesh_axis='model' for a mesh with axes \['batch'\]"):
        shard_candidates(brute_force(), keras.layers.Embedding(40, 4), mesh_axis="model")


def test_mesh_axis_is_ignored_on_one_device(rng):
    tower = keras.layers.Embedding(40, 4)
    index = shard_candidates(brute_force(), tower, mesh_axis="model")
    queries = rng.normal(size=(3, 4)).astype("float32")
    np.testing.assert_array_equal(index(queries), reference.top_k(queries, np.asarray(tower.embeddings.value), 5)[1])


def test_a_table_split_over_its_embedding_dimension_raises():
    distribution = model_parallel(pattern="none")
    distribution._layout_map[".*embedding.*"] = (None, "model")
    keras.distribution.set_distribution(distribution)
    tower = keras.layers.Embedding(40, 4, name="embedding")
    tower.build((None,))
    index = shard_candidates(brute_force(), tower)
    with pytest.raises(ValueError, match="split over its rows"):
        index(np.ones((8, 4), "float32"))


def test_queries_may_be_on_one_device_and_indivisible(rng):
    keras.distribution.set_distribution(model_parallel())
    tower = keras.layers.Embedding(40, 4, name="movie")
    tower.build((None,))
    index = shard_candidates(brute_force(), tower)
    queries = jax.device_put(rng.normal(size=(3, 4)).astype("float32"), first_devices(6)[5])
    np.testing.assert_array_equal(index(queries), reference.top_k(queries, np.asarray(tower.embeddings.value), 5)[1])


# Saving.


@pytest.mark.parametrize(
    ("tower_name", "index_name"),
    [("candidate_embedding", "retrieval"), ("movie_tower", "index"), ("a", "b"), ("zz", "aa")],
)
def test_a_loaded_model_shares_its_tower(tmp_path, tower_name, index_name):
    model = fitted_model(tower_name=tower_name, index_name=index_name)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.the_index.candidate_tower is loaded.the_tower
    assert loaded.the_index.k == 5
    assert loaded.the_index.return_scores is False
    np.testing.assert_array_equal(predictions(loaded), predictions(model))
    loaded.the_tower.embeddings.assign(-loaded.the_tower.embeddings.value)
    np.testing.assert_array_equal(predictions(loaded), expected_predictions(loaded))


def saved_arrays(path, tmp_path):
    with zipfile.ZipFile(path) as file:
        file.extract("model.weights.h5", tmp_path)
    shapes = []
    with h5py.File(tmp_path / "model.weights.h5") as weights:
        weights.visititems(lambda _, item: shapes.append(item.shape) if isinstance(item, h5py.Dataset) else None)
    return shapes


def test_the_file_contains_the_table_once(tmp_path):
    model = RetrievalModel(NUM_USERS, NUM_MOVIES)
    predictions(model)
    model.save(tmp_path / "model.keras")
    shapes = saved_arrays(tmp_path / "model.keras", tmp_path)
    assert shapes.count((NUM_MOVIES, DIMENSION)) == 1


SAVED_ON = {"DataParallel(8)": lambda: data_parallel(8), "ModelParallel(2x4)": model_parallel}
LOADED_ON = {
    "1 device": lambda: None,
    "DataParallel(3)": lambda: data_parallel(3),
    "DataParallel(8)": lambda: data_parallel(8),
    "ModelParallel(2x4)": model_parallel,
}


@pytest.fixture(scope="module", params=SAVED_ON)
def saved(request, tmp_path_factory):
    """Returns a file of a model that was trained on 8 devices, and its predictions."""
    path = tmp_path_factory.mktemp("saved") / "model.keras"
    keras.distribution.set_distribution(SAVED_ON[request.param]())
    model = fitted_model()
    expected = predictions(model)
    model.save(path)
    keras.distribution.set_distribution(None)
    return path, expected


@pytest.mark.parametrize("loaded_on", LOADED_ON)
def test_a_model_saved_on_8_devices_predicts_the_same_on_others(saved, loaded_on):
    path, expected = saved
    keras.distribution.set_distribution(LOADED_ON[loaded_on]())
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(predictions(loaded), expected)


@pytest.mark.parametrize("loaded_on", LOADED_ON)
def test_an_index_split_by_mesh_axis_loads_on_a_mesh_without_this_axis(tmp_path, loaded_on):
    keras.distribution.set_distribution(model_parallel(pattern="none"))
    tower = keras.layers.Embedding(NUM_MOVIES, DIMENSION)
    users = keras.Input((), dtype="int32")
    index = shard_candidates(brute_force(), tower, mesh_axis="model")
    model = keras.Model(users, index(keras.layers.Embedding(NUM_USERS, DIMENSION)(users)))
    ids = np.arange(NUM_USERS, dtype="int32")
    expected = model.predict(ids, batch_size=NUM_USERS, verbose=0)
    assert tower.embeddings.value.sharding.spec[0] == "model"
    model.save(tmp_path / "model.keras")
    keras.distribution.set_distribution(LOADED_ON[loaded_on]())
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(ids, batch_size=NUM_USERS, verbose=0), expected)


def functional_model(index_first):
    users, movies = keras.Input((), dtype="int32", name="user"), keras.Input((), dtype="int32", name="movie")
    user_tower = keras.layers.Embedding(NUM_USERS, DIMENSION, name="user_tower")
    movie_tower = keras.layers.Embedding(NUM_MOVIES, DIMENSION, name="movie_tower")
    index = shard_candidates(brute_force(return_scores=True, name="index"), movie_tower)
    queries = user_tower(users)
    if index_first:
        scores, ids = index(queries)
        rating = keras.layers.Dot(1)([queries, movie_tower(movies)])
    else:
        rating = keras.layers.Dot(1)([queries, movie_tower(movies)])
        scores, ids = index(queries)
    return keras.Model([users, movies], {"rating": rating, "scores": scores, "ids": ids})


def test_an_index_before_its_tower_in_the_layer_order_shares_it_after_loading(tmp_path, rng):
    """Without support by the index, Keras would load the shared tower as two layers."""
    queries, movies = keras.Input((DIMENSION,), name="query"), keras.Input((), dtype="int32", name="movie")
    tower = keras.layers.Embedding(NUM_MOVIES, DIMENSION, name="movie_tower")
    model = keras.Model([queries, movies], [shard_candidates(brute_force(name="index"), tower)(queries), tower(movies)])
    names = [layer.name for layer in model.layers]
    assert names.index("index") < names.index("movie_tower")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("index").candidate_tower is loaded.get_layer("movie_tower")
    inputs = [rng.normal(size=(3, DIMENSION)).astype("float32"), np.arange(3)]
    jax.tree.map(np.testing.assert_array_equal, loaded(inputs), model(inputs))


@pytest.mark.parametrize("index_first", [False, True])
def test_a_functional_model_shares_its_tower_after_loading(tmp_path, index_first):
    model = functional_model(index_first)
    assert model.output["ids"].shape == (None, 5)
    model.save(tmp_path / "model.keras")
    shapes = saved_arrays(tmp_path / "model.keras", tmp_path)
    assert shapes.count((NUM_MOVIES, DIMENSION)) == 1
    loaded = keras.models.load_model(tmp_path / "model.keras")
    index, tower = loaded.get_layer("index"), loaded.get_layer("movie_tower")
    assert index.candidate_tower is tower
    assert (index.k, index.return_scores) == (5, True)
    inputs = [np.arange(24, dtype="int32"), np.arange(24, dtype="int32")]
    expected = model.predict(inputs, verbose=0)
    for name, value in loaded.predict(inputs, verbose=0).items():
        np.testing.assert_array_equal(value, expected[name])


def test_weights_can_be_saved_without_the_model(tmp_path):
    model = fitted_model()
    predictions(model)
    model.save_weights(tmp_path / "model.weights.h5")
    other = fitted_model(epochs=0)
    predictions(other)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(predictions(other), predictions(model))


@pytest.mark.parametrize("return_scores", [False, True])
@pytest.mark.parametrize("how", ["serialize", "deepcopy"])
def test_a_standalone_index_round_trips(rng, return_scores, how):
    tower = keras.layers.Embedding(30, 4)
    index = shard_candidates(
        brute_force(k=7, return_scores=return_scores, name="the_index"), tower, exclude_ids=[3], similarity="cosine"
    )
    queries = rng.normal(size=(6, 4)).astype("float32")
    expected = index(queries)
    if how == "serialize":
        other = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(index))
        other.set_weights(index.get_weights())
    else:
        other = copy.deepcopy(index)
    assert isinstance(other, ShardedBruteForceRetrieval)
    assert other.candidate_tower is not tower
    configs = [{**i.get_config(), "candidate_tower": None} for i in (other, index)]
    assert configs[0] == configs[1]
    assert (other.k, other.return_scores, other.name) == (7, return_scores, "the_index")
    jax.tree.map(np.testing.assert_array_equal, other(queries), expected)


def test_candidate_ids_are_saved(tmp_path, rng):
    users = keras.Input((DIMENSION,))
    ids = rng.permutation(NUM_MOVIES) + 100
    index = shard_candidates(
        brute_force(), keras.layers.Embedding(NUM_MOVIES, DIMENSION), candidate_ids=ids, exclude_ids=[101]
    )
    model = keras.Model(users, index(users))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    queries = rng.normal(size=(6, DIMENSION)).astype("float32")
    np.testing.assert_array_equal(loaded(queries), model(queries))
    assert int(np.min(loaded(queries))) >= 100


# Feature towers.


def feature_tower():
    return keras.Sequential(
        [keras.layers.Embedding(48, 8), keras.layers.Dense(DIMENSION, activation="tanh")], name="movie_tower"
    )


def test_the_index_of_a_feature_tower_changes_with_refresh_only(rng):
    tower, candidates = feature_tower(), np.arange(10, 40)
    index = shard_candidates(brute_force(), tower, candidates=candidates)
    queries = rng.normal(size=(6, DIMENSION)).astype("float32")

    def expected():
        return reference.top_k(queries, np.asarray(tower(candidates)), 5)[1]

    first = index(queries)
    np.testing.assert_array_equal(first, expected())
    tower.layers[-1].kernel.assign(-tower.layers[-1].kernel.value)
    with pytest.warns(UserWarning, match="results are those of the old tower"):
        np.testing.assert_array_equal(index(queries), first)
    index.refresh()
    np.testing.assert_array_equal(index(queries), expected())
    assert not np.array_equal(index(queries), first)


def test_refresh_computes_embeddings_in_blocks(rng, monkeypatch):
    monkeypatch.setattr("keras_rs_contrib.index.corpus.REFRESH_BLOCK_SIZE", 7)
    genre, year = keras.Input((), dtype="int32", name="genre"), keras.Input((2,), name="year")
    merged = keras.layers.Concatenate()([keras.layers.Embedding(5, 3)(genre), year])
    tower = keras.Model({"genre": genre, "year": year}, keras.layers.Dense(DIMENSION)(merged))
    features = {"genre": rng.integers(0, 5, 30), "year": rng.normal(size=(30, 2)).astype("float32")}
    index = shard_candidates(brute_force(), tower, candidates=features, candidate_ids=np.arange(30) + 7)
    queries = rng.normal(size=(6, DIMENSION)).astype("float32")
    expected = reference.top_k(queries, np.asarray(tower(features)), 5)[1] + 7
    np.testing.assert_array_equal(index(queries), expected)
    tower.layers[-1].kernel.assign(-tower.layers[-1].kernel.value)
    index.refresh()
    expected = reference.top_k(queries, np.asarray(tower(features)), 5)[1] + 7
    np.testing.assert_array_equal(index(queries), expected)


@pytest.mark.parametrize("on", SAVED_ON)
def test_the_index_of_a_feature_tower_is_saved(tmp_path, rng, on):
    keras.distribution.set_distribution(SAVED_ON[on]())
    users = keras.Input((DIMENSION,), name="user")
    movies = keras.Input((), dtype="int32", name="movie")
    tower = feature_tower()
    index = shard_candidates(
        brute_force(name="index"), tower, candidates=np.arange(40), candidate_ids=np.arange(40) + 100, mesh_axis="batch"
    )
    model = keras.Model([users, movies], [index(users), tower(movies)])
    queries = rng.normal(size=(8, DIMENSION)).astype("float32")
    expected = np.asarray(index(queries))
    model.save(tmp_path / "model.keras")
    for load_on in LOADED_ON.values():
        keras.distribution.set_distribution(load_on())
        loaded = keras.models.load_model(tmp_path / "model.keras").get_layer("index")
        np.testing.assert_array_equal(loaded(queries), expected)
        with pytest.raises(ValueError, match="inputs are not saved with the index"):
            loaded.refresh()
        loaded.refresh(np.arange(40))
        np.testing.assert_array_equal(loaded(queries), expected)


def test_a_failed_refresh_does_not_change_the_index(rng):
    tower = feature_tower()
    index = shard_candidates(brute_force(), tower, candidates=np.arange(40))
    queries = rng.normal(size=(6, DIMENSION)).astype("float32")
    before = np.asarray(index(queries))
    with pytest.raises(ValueError, match="NaN or infinity for candidate 1"):
        index.refresh(np.r_[3, 99, np.arange(38)])
    with pytest.raises(ValueError, match="k=5 for 3 candidates"):
        index.refresh(np.arange(3))
    with pytest.raises(ValueError, match="An index without ids"):
        index.refresh(np.arange(20), np.arange(20))
    tower.layers[-1].kernel.assign(np.full((8, DIMENSION), np.nan))
    with pytest.raises(ValueError, match="NaN or infinity for candidate 0"):
        index.refresh()
    with pytest.warns(UserWarning, match="a stale index"):
        np.testing.assert_array_equal(index(queries), before)


def test_update_candidates_of_a_feature_tower(rng):
    index = shard_candidates(brute_force(), feature_tower(), candidates=np.arange(40), candidate_ids=np.arange(40))
    table, queries = rng.normal(size=(40, DIMENSION)), rng.normal(size=(3, DIMENSION)).astype("float32")
    index.update_candidates(table, np.arange(40) + 100)
    np.testing.assert_array_equal(index(queries), reference.top_k(queries, table, 5)[1] + 100)
    with pytest.raises(ValueError, match="candidate_ids=None for 20 candidates instead of 40"):
        index.update_candidates(table[:20])
    with pytest.raises(ValueError, match="keeps its dimension"):
        index.update_candidates(np.ones((40, DIMENSION + 1)))
    with pytest.raises(ValueError, match="NaN or infinity for candidate 39"):
        index.update_candidates(np.r_[table[:39], [[np.nan] * DIMENSION]])
    np.testing.assert_array_equal(index(queries), reference.top_k(queries, table, 5)[1] + 100)


@pytest.mark.parametrize(
    ("on", "mesh_axis"), [("1 device", None), ("DataParallel(3)", "batch"), ("ModelParallel(2x4)", None)]
)
def test_a_corpus_may_grow_and_shrink(tmp_path, rng, on, mesh_axis):
    keras.distribution.set_distribution(LOADED_ON[on]())
    inputs = keras.Input((DIMENSION,))
    table = keras.layers.Embedding(40, DIMENSION, embeddings_initializer="normal")
    tower = keras.Sequential([table])
    index = shard_candidates(
        brute_force(name="index"), tower, candidates=np.arange(7), candidate_ids=np.arange(7) + 100, exclude_ids=[106],
        mesh_axis=mesh_axis,
    )  # fmt: skip
    model = keras.Model(inputs, index(inputs))
    queries = rng.normal(size=(24, DIMENSION)).astype("float32")
    for num_candidates in (7, 40, 6):
        index.refresh(np.arange(num_candidates), np.arange(num_candidates) + 100)
        embeddings = np.asarray(table.embeddings.value)[:num_candidates]
        _, expected = reference.top_k(queries, embeddings, 5, ids=range(100, 100 + num_candidates), exclude_ids=[106])
        np.testing.assert_array_equal(model.predict(queries, batch_size=24, verbose=0), expected)
        np.testing.assert_array_equal(index.ranks(queries, expected[:, 3]), [3] * 24)
        assert index.num_candidates == num_candidates
        assert index.candidate_embeddings.shape[0] % 3 == 0 or on != "DataParallel(3)"
    model.save(tmp_path / "model.keras")
    assert (6, DIMENSION) in saved_arrays(tmp_path / "model.keras", tmp_path)
    keras.distribution.set_distribution(data_parallel(8))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(queries, batch_size=24, verbose=0), expected)


def test_a_large_refresh_shows_its_progress(capsys, monkeypatch):
    monkeypatch.setattr("keras_rs_contrib.index.corpus.REFRESH_BLOCK_SIZE", 2)
    index = shard_candidates(brute_force(), feature_tower(), candidates=np.arange(32))
    index.refresh(np.arange(32))
    assert capsys.readouterr().out == ""
    index.refresh(np.arange(33))
    assert "33/33" in capsys.readouterr().out
    index.refresh(np.arange(33), verbose=0)
    assert capsys.readouterr().out == ""


def test_the_constructor_checks_ids():
    with pytest.raises(ValueError, match="`candidate_ids` must be unique"):
        ShardedBruteForceRetrieval(keras.layers.Embedding(10, 4), candidate_ids=[7] * 10)
    with pytest.raises(ValueError, match="99 for 10 candidates"):
        ShardedBruteForceRetrieval(keras.layers.Embedding(10, 4), exclude_ids=[99])


def test_update_candidates_checks_ids_before_the_first_table(rng):
    index = ShardedBruteForceRetrieval(feature_tower(), k=2)
    table = rng.normal(size=(5, DIMENSION))
    with pytest.raises(ValueError, match="2147483648"):
        index.update_candidates(table, np.arange(5) + 2**31)
    index.update_candidates(table, np.arange(5) + 7)
    queries = rng.normal(size=(3, DIMENSION)).astype("float32")
    _, ids = index(queries)
    np.testing.assert_array_equal(ids, reference.top_k(queries, table, 2)[1] + 7)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"k": 11}, ValueError, "k=11 for 10 candidates"),
        ({"k": 9, "exclude_ids": [0, 1]}, ValueError, "k=9 for 10 candidates, 2 of them excluded.*at most 8"),
        ({"k": 0}, ValueError, "k=0"),
        ({"k": 2.0}, ValueError, "k=2.0"),
        ({"exclude_ids": 0}, TypeError, "`exclude_ids` must be flat"),
        ({"exclude_ids": [10]}, ValueError, "10 for 10 candidates with ids 0 to 9"),
        ({"exclude_ids": ["a"]}, TypeError, "`exclude_ids` must be integers"),
        ({"candidate_ids": np.arange(9)}, ValueError, r"shape \(9,\) for 10 candidates"),
        ({"candidate_ids": np.arange(10) + 2**31}, ValueError, "2147483648"),
        ({"candidate_ids": list("abcdefghij")}, TypeError, "StringLookup"),
        ({"candidate_ids": np.arange(10.0)}, TypeError, "float64"),
        ({"candidate_ids": np.zeros(10, int)}, ValueError, "0 for 10 candidates"),
        ({"similarity": "euclidean"}, ValueError, "euclidean"),
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"recall_target": 1.5}, ValueError, "recall_target=1.5"),
        ({"recall_target": "high"}, ValueError, "recall_target='high'"),
        ({"recall_target": True}, ValueError, "recall_target=True"),
        ({"candidates": np.arange(10)}, ValueError, "Drop `candidates`"),
        ({"tower": keras.layers.Dense(4)}, ValueError, "a Dense and candidates=None"),
        ({"tower": lambda x: x}, TypeError, "must be a Keras layer"),
        ({"retrieval": keras.layers.Dense(4)}, TypeError, "must be a `keras_rs.layers.BruteForceRetrieval`"),
    ],
)
def test_invalid_arguments_raise(arguments, error, words):
    arguments = dict(arguments)
    tower = arguments.pop("tower", None) or keras.layers.Embedding(10, 4)
    retrieval = arguments.pop("retrieval", None) or brute_force(k=arguments.pop("k", 5))
    with pytest.raises(error, match=words):
        shard_candidates(retrieval, tower, **arguments)


def test_a_retrieval_layer_with_candidates_raises(rng):
    retrieval = keras_rs.layers.BruteForceRetrieval(rng.normal(size=(10, 4)), k=5)
    with pytest.raises(ValueError, match="a layer with 10 candidates"):
        shard_candidates(retrieval, keras.layers.Embedding(10, 4))


def test_a_retrieval_layer_with_its_own_score_raises():
    class Euclidean(keras_rs.layers.BruteForceRetrieval):
        def compute_score(self, query_embedding, candidate_embedding):
            return None

    with pytest.raises(TypeError, match="Euclidean, which overrides `compute_score`"):
        shard_candidates(Euclidean(), keras.layers.Embedding(10, 4))


def test_an_embedding_with_its_own_call_needs_candidates():
    class Normalised(keras.layers.Embedding):
        def call(self, inputs):
            return keras.ops.normalize(super().call(inputs))

    with pytest.raises(ValueError, match="a Normalised and candidates=None"):
        shard_candidates(brute_force(), Normalised(10, 4))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 3)])
def test_queries_of_the_wrong_shape_raise(shape):
    index = shard_candidates(brute_force(), keras.layers.Embedding(10, 4))
    with pytest.raises(ValueError, match=r"shape \(batch, 4\)"):
        index(np.ones(shape, "float32"))


def test_a_quantized_tower_raises():
    tower = keras.layers.Embedding(16, 8)
    tower.build((None,))
    index = shard_candidates(brute_force(), tower)
    index(np.ones((2, 8), "float32"))
    tower.quantize("int8")
    with pytest.raises(ValueError, match="quantized to int8"):
        index(np.ones((2, 8), "float32"))


@pytest.mark.parametrize("candidates", [np.zeros((0,), int), {"a": np.zeros(3), "b": np.zeros(4)}])
def test_candidates_must_have_equal_nonzero_numbers_of_rows(candidates):
    with pytest.raises(ValueError, match="one row for each candidate"):
        shard_candidates(brute_force(), feature_tower(), candidates=candidates)


@pytest.mark.parametrize("candidates", [3, [1, 2, 3], {"a": [1, 2]}])
def test_candidates_must_be_arrays(candidates):
    with pytest.raises(TypeError, match="`candidates` must be an array or a nested structure of arrays"):
        shard_candidates(brute_force(), feature_tower(), candidates=candidates)


def test_a_tower_must_return_one_row_for_each_candidate():
    with pytest.raises(ValueError, match=r"shape \(40, 4, 1\)"):
        shard_candidates(
            brute_force(),
            keras.Sequential([keras.layers.Embedding(40, 4), keras.layers.Reshape((4, 1))]),
            candidates=np.arange(40),
        )
