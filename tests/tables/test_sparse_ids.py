"""Sparse tensors of ids, which a plain embedding looks up as dense ones: id 0 where no value is stored."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import scipy.sparse
from conftest import data_parallel, model_parallel
from jax.experimental import sparse

from keras_rs_contrib import RowSGD, RowSparseEmbedding, ShardedEmbedding, lookup_together

DENSE = np.array([[3, 0, 0, 2], [0, 0, 0, 0], [0, 1, 0, 9], [5, 0, 9, 0]], "int32")
MESHES = {
    "1 device": (lambda: None, None),
    "DataParallel(4), by axis": (lambda: data_parallel(4), "batch"),
    "ModelParallel(2x4), by axis": (lambda: model_parallel((2, 4), "none"), "model"),
}
KINDS = {"ShardedEmbedding": ShardedEmbedding, "RowSparseEmbedding": RowSparseEmbedding}


def sparse_forms(dense):
    """Returns the same ids in all sparse forms of JAX that Keras accepts, and with duplicates, which are summed."""
    tensor = sparse.BCOO.fromdense(dense)
    twice = jnp.concatenate([tensor.data - 1, jnp.ones_like(tensor.data)])
    return {
        "BCOO": tensor,
        "BCOO with a batch dimension": sparse.BCOO.fromdense(dense, n_batch=1),
        "BCOO with padding": sparse.BCOO.fromdense(dense, nse=16),
        "BCOO with duplicates": sparse.BCOO(
            (twice, jnp.concatenate([tensor.indices, tensor.indices])), shape=dense.shape
        ),
        "BCOO of floats": sparse.BCOO.fromdense(dense.astype("float32")),
        "BCSR": sparse.BCSR.fromdense(dense),
    }


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def table(rng):
    return rng.normal(size=(10, 4)).astype("float32")


@pytest.mark.parametrize("mesh", MESHES)
def test_sparse_ids_give_the_embeddings_of_a_plain_embedding(kind, mesh, table):
    # Also out of range, and negative.
    dense = np.where(DENSE == 1, 12, np.where(DENSE == 3, -2, DENSE)).astype("int32")
    plain = keras.layers.Embedding(10, 4, weights=table)
    distribution, mesh_axis = MESHES[mesh]
    keras.distribution.set_distribution(distribution())
    ours = kind(10, 4, mesh_axis=mesh_axis, weights=table)
    for name, ids in sparse_forms(dense).items():
        expected = np.asarray(plain(ids))
        np.testing.assert_array_equal(expected, np.asarray(plain(dense)), err_msg=name)
        np.testing.assert_array_equal(ours(ids), expected, err_msg=name)


def gradient(layer, ids, weights):
    """Returns the gradient of a weighted sum of the embeddings with respect to the table, without padding rows."""
    variables = layer.trainable_variables

    def loss(values):
        embeddings, _ = layer.stateless_call(values, [v.value for v in layer.non_trainable_variables], ids)
        return jnp.sum(embeddings * weights)

    return np.asarray(jax.jit(jax.grad(loss))([v.value for v in variables])[0])[:10]


@pytest.mark.parametrize("mesh", MESHES)
def test_sparse_ids_give_the_gradients_of_a_plain_embedding(kind, mesh, table, rng):
    weights = rng.normal(size=(4, 4, 4)).astype("float32")
    plain = keras.layers.Embedding(10, 4, weights=table)
    distribution, mesh_axis = MESHES[mesh]
    keras.distribution.set_distribution(distribution())
    arguments = {"optimizer": RowSGD(1.0)} if kind is RowSparseEmbedding else {}
    ours = kind(10, 4, mesh_axis=mesh_axis, weights=table, **arguments)
    for name, ids in sparse_forms(DENSE).items():
        expected = gradient(plain, ids, weights)
        assert (expected[[0, 2, 3, 5, 9]] != 0).all()
        found = gradient(ours, ids, weights)
        if kind is RowSparseEmbedding:
            # Its gradient is the table after the step.
            found = table - found
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("form", ["BCOO", "SciPy"])
def test_fit_on_sparse_ids_matches_dense_ids(kind, form, table):
    dense = np.concatenate([DENSE] * 4)
    x = {"BCOO": sparse.BCOO.fromdense, "SciPy": scipy.sparse.csr_matrix}[form](dense)

    def trained(x, is_sparse):
        keras.utils.set_random_seed(0)
        tower = kind(10, 4, weights=table, mask_zero=True)
        inputs = keras.Input((4,), dtype="int32", sparse=is_sparse)
        hidden = keras.layers.GlobalAveragePooling1D()(tower(inputs))
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        model.compile("sgd", "mse")
        history = model.fit(x, np.ones((16, 1)), batch_size=8, epochs=2, shuffle=False, verbose=0)
        return history.history["loss"], np.asarray(tower.embeddings), model.predict(x, batch_size=8, verbose=0)

    jax.tree.map(np.testing.assert_array_equal, trained(x, True), trained(dense, False))


def test_the_mask_of_sparse_ids_is_that_of_dense_ids(kind):
    for name, ids in sparse_forms(DENSE).items():
        layer = kind(10, 4, mask_zero=True)
        np.testing.assert_array_equal(layer.compute_mask(ids), DENSE != 0, err_msg=name)
        np.testing.assert_array_equal(keras.layers.Masking()(layer(ids)), layer(DENSE), err_msg=name)
    assert kind(10, 4).compute_mask(sparse.BCOO.fromdense(DENSE)) is None


@pytest.mark.parametrize("other", [np.arange(4), sparse.BCOO.fromdense(np.arange(4)), sparse.BCSR.fromdense(DENSE - 1)])
def test_lookup_together_takes_sparse_ids(kind, table, other):
    tower = kind(10, 4, weights=table)
    found = lookup_together(tower, {"many": sparse.BCOO.fromdense(DENSE), "other": other})
    np.testing.assert_array_equal(found["many"], table[DENSE])
    np.testing.assert_array_equal(found["other"], tower(keras.ops.convert_to_tensor(other, sparse=False)))
