import keras
import numpy as np
import pytest
from conftest import data_parallel, model_parallel

from keras_rs_contrib import distribution


def table(num_rows=8, name="movie"):
    layer = keras.layers.Embedding(num_rows, 4, name=name)
    layer.build((None,))
    return layer.embeddings


def test_a_table_on_one_device_has_no_layout():
    assert distribution.table_layout(table()) is None
    keras.distribution.set_distribution(data_parallel(1))
    assert distribution.table_layout(table()) is None


def test_the_layout_names_the_axes_of_queries_and_rows():
    keras.distribution.set_distribution(data_parallel(8))
    replicated = distribution.table_layout(table())
    assert (replicated.batch_axis, replicated.row_axis, replicated.num_batch_shards) == ("batch", None, 8)
    keras.distribution.set_distribution(model_parallel())
    split = distribution.table_layout(table())
    assert (split.batch_axis, split.row_axis, split.num_batch_shards) == ("batch", "model", 2)
    assert distribution.table_layout(table(name="user")).row_axis is None


def test_a_table_keeps_its_layout_after_the_scope():
    with data_parallel(8).scope():
        variable = table()
    assert distribution.table_layout(variable).batch_axis == "batch"


def test_split_rows_changes_the_layout_and_not_the_values():
    keras.distribution.set_distribution(data_parallel(8))
    variable = table()
    values = np.asarray(variable.value)
    distribution.split_rows(variable, "batch")
    assert variable.value.addressable_shards[0].data.shape == (1, 4)
    np.testing.assert_array_equal(variable.value, values)
    variable.assign(values + 1)
    assert variable.value.addressable_shards[0].data.shape == (1, 4)


def test_rows_that_do_not_divide_stay_whole_with_a_warning():
    keras.distribution.set_distribution(data_parallel(8))
    variable = table(9)
    with pytest.warns(UserWarning, match=r"9 rows for 8 devices.*ShardedEmbedding"):
        distribution.split_rows(variable, "batch")
    assert variable.value.addressable_shards[0].data.shape == (9, 4)


def test_an_axis_that_the_mesh_lacks_is_refused_where_a_user_names_it():
    distribution.check_mesh_axis("model")
    keras.distribution.set_distribution(data_parallel(8))
    distribution.check_mesh_axis("batch")
    distribution.check_mesh_axis(None)
    with pytest.raises(ValueError, match=r"'model' for a mesh with axes \['batch'\]"):
        distribution.check_mesh_axis("model")


@pytest.mark.parametrize(("num_rows", "expected"), [(8, 8), (9, 16), (1683, 1688)])
def test_rows_are_rounded_up_to_the_axis_that_splits_them(num_rows, expected):
    assert distribution.rows_on_mesh(num_rows, "batch", "table") == num_rows
    keras.distribution.set_distribution(data_parallel(8))
    assert distribution.rows_on_mesh(num_rows, "batch", "table") == expected
    assert distribution.rows_on_mesh(num_rows, "model", "table") == num_rows
    assert distribution.rows_on_mesh(num_rows, None, "table") == num_rows
    keras.distribution.set_distribution(model_parallel((1, 8), pattern="tab.*"))
    assert distribution.rows_on_mesh(num_rows, None, "table") == expected
    assert distribution.rows_on_mesh(num_rows, None, "another") == num_rows
    keras.distribution.set_distribution(model_parallel((2, 3), pattern="tab.*"))
    assert distribution.rows_on_mesh(num_rows, "batch", "table") == -(-num_rows // 6) * 6
