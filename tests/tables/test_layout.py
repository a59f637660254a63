import keras
import numpy as np
import pytest
from conftest import data_parallel, model_parallel

from keras_rs_contrib import distribution
from keras_rs_contrib.tables import layout


def table(num_rows=8, name="movie"):
    layer = keras.layers.Embedding(num_rows, 4, name=name)
    layer.build((None,))
    return layer.embeddings


def test_a_table_on_one_device_has_no_layout():
    assert layout.table_layout(table()) is None
    keras.distribution.set_distribution(data_parallel(1))
    assert layout.table_layout(table()) is None


def test_the_layout_names_the_axes_of_queries_and_rows():
    keras.distribution.set_distribution(data_parallel(8))
    replicated = layout.table_layout(table())
    assert (replicated.batch_axis, replicated.row_axis, replicated.num_batch_shards) == ("batch", None, 8)
    keras.distribution.set_distribution(model_parallel())
    split = layout.table_layout(table())
    assert (split.batch_axis, split.row_axis, split.num_batch_shards) == ("batch", "model", 2)
    assert layout.table_layout(table(name="user")).row_axis is None


def test_a_table_keeps_its_layout_after_the_scope():
    with data_parallel(8).scope():
        variable = table()
    assert layout.table_layout(variable).batch_axis == "batch"


def test_split_rows_changes_the_layout_but_not_the_values():
    keras.distribution.set_distribution(data_parallel(8))
    variable = table()
    values = np.asarray(variable.value)
    layout.split_rows(variable, "batch")
    assert variable.value.addressable_shards[0].data.shape == (1, 4)
    np.testing.assert_array_equal(variable.value, values)
    variable.assign(values + 1)
    assert variable.value.addressable_shards[0].data.shape == (1, 4)


def test_split_rows_raises_for_an_indivisible_number_of_rows():
    keras.distribution.set_distribution(data_parallel(8))
    variable = table(9)
    with pytest.raises(ValueError, match=r"9 rows of .* for 8 devices.*ShardedEmbedding"):
        layout.split_rows(variable, "batch")
    assert variable.value.addressable_shards[0].data.shape == (9, 4)


def test_split_rows_warns_for_an_indivisible_number_of_rows_during_loading(monkeypatch):
    keras.distribution.set_distribution(data_parallel(8))
    variable = table(9)
    monkeypatch.setattr(layout._keras, "is_loading", lambda: True)
    with pytest.warns(UserWarning, match=r"9 rows of .* for 8 devices.*ShardedEmbedding"):
        layout.split_rows(variable, "batch")
    assert variable.value.addressable_shards[0].data.shape == (9, 4)


def test_an_unknown_mesh_axis_raises():
    layout.check_mesh_axis("model")
    keras.distribution.set_distribution(data_parallel(8))
    layout.check_mesh_axis("batch")
    layout.check_mesh_axis(None)
    with pytest.raises(ValueError, match=r"'model' for a mesh with axes \['batch'\]"):
        layout.check_mesh_axis("model")


def test_the_axis_of_rows_is_the_requested_axis_or_follows_the_layout_map():
    assert layout.axis_of_rows("batch", "table") is None
    assert distribution.axis_size(None) == 1
    keras.distribution.set_distribution(data_parallel(8))
    assert layout.axis_of_rows("batch", "table") == "batch"
    assert distribution.axis_size("batch") == 8
    # The axis of a loaded model may belong to another mesh.
    assert layout.axis_of_rows("model", "table") is None
    assert layout.axis_of_rows(None, "table") is None
    keras.distribution.set_distribution(model_parallel((2, 3), pattern="tab.*"))
    assert layout.axis_of_rows(None, "table") == "model"
    assert layout.axis_of_rows("another", "table") == "model"
    assert layout.axis_of_rows("batch", "table") == "batch"
    assert layout.axis_of_rows(None, "another") is None
    assert distribution.axis_size("model") == 3
