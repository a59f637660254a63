import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import data_parallel, model_parallel

from keras_rs_contrib import PaddedBatches, pad_batches
from keras_rs_contrib.batches import padded_batches


def sizes_of(batches):
    return [len(sample_weight) for _, _, sample_weight in batches]


def kept(batches):
    """The rows of all batches whose weight is not 0, concatenated for each array, and their weights."""
    batches = list(batches)
    rows = [
        keras.tree.map_structure(
            lambda array, w=w: np.asarray(array)[np.asarray(w) != 0], (x, y, w), none_is_leaf=False
        )
        for x, y, w in batches
    ]
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *rows, none_is_leaf=False)


def assert_equal(found, expected):
    keras.tree.assert_same_structure(found, expected)
    for array, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(array, other, strict=True)


def data_of(num_rows):
    x = {"user": np.arange(num_rows, dtype="int32"), "vector": np.arange(2 * num_rows, dtype="float32").reshape(-1, 2)}
    y = np.arange(num_rows, dtype="float32") * 10
    sample_weight = np.arange(1, num_rows + 1, dtype="float32")
    return x, y, sample_weight


class Batches(keras.utils.PyDataset):
    """Consecutive batches of given sizes."""

    def __init__(self, sizes, data=None, **kwargs):
        super().__init__(**kwargs)
        self.sizes, self.stops = sizes, np.cumsum(sizes)
        self.data = data_of(self.stops[-1]) if data is None else data
        self.num_epochs = 0

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, number):
        rows = slice(self.stops[number] - self.sizes[number], self.stops[number])
        return keras.tree.map_structure(lambda array: array[rows], self.data)

    def on_epoch_end(self):
        self.num_epochs += 1


def dataset_of(sizes, num_parts=3):
    batches = list(Batches(sizes, data_of(sum(sizes))[:num_parts]))
    signature = keras.tree.map_structure(lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), batches[0])
    return tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=signature)


# Arrays.


@pytest.mark.parametrize(
    ("x", "num_rows"),
    [
        (np.arange(5), 5),
        ({"a": np.arange(5), "b": np.ones((5, 2, 3), "uint8")}, 5),
        ({"a": {"b": np.arange(7)}, "c": (np.arange(7, dtype="float32"), np.arange(7) > 3)}, 7),
        (np.arange(8), 8),
    ],
)
def test_arrays_are_batched_and_padded(x, num_rows):
    batches = list(pad_batches(x, 4, batch_size=6))
    assert all(isinstance(batch, tuple) and len(batch) == 3 for batch in batches)
    assert sizes_of(batches) == ([8] if num_rows <= 6 else [8, 4])
    found_x, found_y, sample_weight = kept(batches)
    assert_equal(found_x, x)
    assert found_y is None
    np.testing.assert_array_equal(sample_weight, np.ones(num_rows, "float32"), strict=True)


def test_padding_rows_repeat_the_last_row():
    ((x, y, sample_weight),) = pad_batches((np.array([3, 1, 2]), np.array([[5.0], [6.0], [7.0]])), 5)
    np.testing.assert_array_equal(x, [3, 1, 2, 2, 2])
    np.testing.assert_array_equal(y, [[5.0], [6.0], [7.0], [7.0], [7.0]])
    np.testing.assert_array_equal(sample_weight, np.array([1, 1, 1, 0, 0], "float32"), strict=True)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 3, 8, 100])
def test_each_row_is_returned_once_and_in_order(num_parts, multiple):
    data = data_of(29)[:num_parts]
    batches = pad_batches(data, multiple, batch_size=7)
    assert isinstance(batches, PaddedBatches)
    for _ in range(2):
        assert sizes_of(batches) == [-(-size // multiple) * multiple for size in (7, 7, 7, 7, 1)]
        x, y, sample_weight = kept(batches)
        assert_equal(x, data[0])
        assert_equal(y, data[1] if num_parts > 1 else None)
        np.testing.assert_array_equal(sample_weight, data[2] if num_parts > 2 else np.ones(29, "float32"), strict=True)


def test_the_default_batch_size_is_32():
    batches = pad_batches(np.arange(70), 5)
    assert sizes_of(batches) == [35, 35, 10]
    assert (batches.num_batches, batches.batch_size) == (3, 32)


def test_given_weights_are_kept_and_padding_rows_have_weight_0():
    for dtype in ("float32", "float64", "int32"):
        ((_, _, sample_weight),) = pad_batches((np.zeros(3), np.zeros(3), np.array([2, 0, 5], dtype)), 4)
        np.testing.assert_array_equal(sample_weight, np.array([2, 0, 5, 0], dtype if dtype != "float64" else None))
    # One weight per step of a sequence, and one weight per output.
    weights = {"a": np.full((3, 2), 4.0), "b": np.full(3, 5.0)}
    y = {"a": np.zeros((3, 2)), "b": np.zeros(3)}
    ((_, _, sample_weight),) = pad_batches((np.zeros(3), y, weights), 4)
    np.testing.assert_array_equal(sample_weight["a"], [[4, 4], [4, 4], [4, 4], [0, 0]])
    np.testing.assert_array_equal(sample_weight["b"], [5, 5, 5, 0])


@pytest.mark.parametrize("shuffle", [True, "batch"])
def test_shuffling_keeps_each_row_and_its_weight_together(shuffle):
    data = data_of(29)
    batches = pad_batches(data, 8, batch_size=10, shuffle=shuffle)
    orders = []
    for _ in range(3):
        x, y, sample_weight = kept(batches)
        orders.append(x["user"].tolist())
        assert_equal((x, y, sample_weight), keras.tree.map_structure(lambda array: array[orders[-1]], data))
        assert sorted(orders[-1]) == list(range(29))
    assert list(range(29)) not in orders
    assert orders[0] != orders[1] != orders[2]


def test_the_distribution_in_force_when_batches_are_read_sets_the_multiple():
    batches = pad_batches(np.arange(5))
    keras.distribution.set_distribution(data_parallel(8))
    assert sizes_of(batches) == [8]
    keras.distribution.set_distribution(data_parallel(3))
    assert sizes_of(batches) == [6]
    # Only the mesh axis that splits batches counts.
    keras.distribution.set_distribution(model_parallel((2, 4)))
    assert sizes_of(batches) == [6]
    assert sizes_of(pad_batches(np.arange(5), 7)) == [7]
    keras.distribution.set_distribution(None)
    assert sizes_of(batches) == [5]


# Datasets.


@pytest.mark.parametrize("drop_remainder", [False, True])
def test_batches_of_a_dataset_are_padded(drop_remainder):
    data = data_of(21)
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(8, drop_remainder=drop_remainder)
    batches = pad_batches(dataset, 3)
    expected = keras.tree.map_structure(lambda array: array[: 16 if drop_remainder else 21], data)
    for _ in range(2):
        assert sizes_of(batches) == [9, 9] + [6] * (not drop_remainder)
        assert_equal(kept(batches), expected)
    assert batches.num_batches == (2 if drop_remainder else 3)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_batches_may_be_short_and_empty_anywhere(num_parts):
    """A filter can leave batches of any size. The shapes of this dataset do not state the batch size."""
    sizes = [5, 0, 8, 1, 0]
    batches = pad_batches(dataset_of(sizes, num_parts), 4)
    data = data_of(14)
    for _ in range(2):
        assert sizes_of(batches) == [8, 4, 8, 4, 4]
        x, y, sample_weight = kept(batches)
        assert_equal(x, data[0])
        assert_equal(y, data[1] if num_parts > 1 else None)
        np.testing.assert_array_equal(sample_weight, data[2] if num_parts > 2 else np.ones(14, "float32"), strict=True)
    x, y, sample_weight = list(batches)[1]
    np.testing.assert_array_equal(sample_weight, np.zeros(4, "float32"), strict=True)
    assert_equal(x, {"user": np.zeros(4, "int32"), "vector": np.zeros((4, 2), "float32")})


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_of_a_py_dataset_are_padded(workers):
    dataset = Batches([5, 8, 3], workers=workers)
    batches = pad_batches(dataset, 4)
    for epoch in range(2):
        batches.on_epoch_begin()
        found = list(batches)
        batches.on_epoch_end()
        assert sizes_of(found) == [8, 8, 4]
        assert_equal(kept(found), data_of(16))
        assert dataset.num_epochs == epoch + 1


def test_batches_of_a_py_dataset_may_be_shuffled():
    batches = pad_batches(Batches([4] * 30), 8, shuffle=True)
    orders = [kept(batches)[0]["user"] for _ in range(2)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(120))
        np.testing.assert_array_equal(order.reshape(30, 4) % 4, np.tile(np.arange(4), (30, 1)))
    assert (orders[0] != orders[1]).any()


def test_batches_of_a_generator_are_padded():
    batches = pad_batches((batch for batch in Batches([5, 8, 3])), 4)
    assert batches.num_batches is None
    found = list(batches)
    assert sizes_of(found) == [8, 8, 4]
    assert_equal(kept(found), data_of(16))


def test_padded_batches_may_be_padded_again():
    batches = pad_batches(pad_batches(data_of(5), 4), 3)
    assert sizes_of(batches) == [6]
    assert_equal(kept(batches), data_of(5))


@pytest.mark.parametrize("data", [tf.data.Dataset.from_tensor_slices(np.zeros(0)).batch(4), np.zeros((0, 2))])
def test_data_without_batches_raise(data):
    batches = pad_batches(data, 4)
    with pytest.raises(ValueError, match="Received: one without any"):
        next(iter(batches))
    with pytest.raises(ValueError, match="at least one batch"):
        pad_batches((batch for batch in ()), 4)


# In a model.


def model_of_two_outputs():
    keras.utils.set_random_seed(0)
    x = {"user": keras.Input((), dtype="int32", name="user"), "vector": keras.Input((2,), name="vector")}
    hidden = keras.layers.Concatenate()([keras.layers.Embedding(64, 3)(x["user"]), x["vector"]])
    model = keras.Model(x, {"a": keras.layers.Dense(1)(hidden), "b": keras.layers.Dense(1)(hidden)})
    model.compile(
        keras.optimizers.SGD(1e-3),
        loss={name: keras.losses.MeanSquaredError(reduction="mean_with_sample_weight") for name in "ab"},
        weighted_metrics={name: keras.metrics.MeanAbsoluteError(name="error") for name in "ab"},
    )
    return model


def random_data(rng, num_rows, is_weighted):
    x = {
        "user": rng.integers(0, 64, num_rows).astype("int32"),
        "vector": rng.normal(size=(num_rows, 2)).astype("float32"),
    }
    y = {name: rng.normal(size=(num_rows, 1)) for name in "ab"}
    weight = rng.random(num_rows) + 0.5
    return (x, y, {"a": weight, "b": weight}) if is_weighted else (x, y)


def results_of(batches, num_epochs=2):
    """The weights, metrics and history of a trained model. Without the loss, which Keras averages by batch length."""
    model = model_of_two_outputs()
    history = model.fit(batches, epochs=num_epochs, verbose=0, shuffle=False).history
    metrics = model.evaluate(batches, return_dict=True, verbose=0)
    errors = {name: value for name, value in metrics.items() if "error" in name}
    assert len(errors) == 2
    histories = {name: value for name, value in history.items() if "error" in name}
    return model.get_weights(), errors, histories


@pytest.mark.parametrize(("kind", "is_weighted"), [("arrays", True), ("dataset", False), ("empty batches", True)])
def test_8_devices_train_like_one(rng, kind, is_weighted):
    data = random_data(rng, 45, is_weighted)
    if kind == "empty batches":
        whole, with_empty = Batches([15, 30], data=data), Batches([0, 15, 0, 30, 0], data=data)
    else:
        # From arrays, Keras makes the same batches.
        whole = with_empty = tf.data.Dataset.from_tensor_slices(data).batch(30)
    expected = results_of(whole)
    keras.distribution.set_distribution(data_parallel(8))
    found = results_of(pad_batches(data, batch_size=30) if kind == "arrays" else pad_batches(with_empty))
    for value, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-5)


def test_validation_and_predictions_ignore_padding(rng):
    x, y = random_data(rng, 21, is_weighted=False)
    model = model_of_two_outputs()
    expected = model.predict(x, verbose=0)
    error = model.evaluate(x, y, return_dict=True, verbose=0)["a_error"]
    keras.distribution.set_distribution(data_parallel(8))
    model = model_of_two_outputs()
    batches = pad_batches((x, y), batch_size=10)
    found = model.predict(batches, verbose=0)
    counts = np.concatenate([sample_weight != 0 for _, _, sample_weight in batches])
    assert_equal(counts, ~batches.is_padding(40))
    assert len(found["a"]) == len(counts) == 40
    np.testing.assert_allclose(found["a"][counts], expected["a"], rtol=1e-5, atol=1e-6)
    model.optimizer.learning_rate = 0.0
    history = model.fit(batches, validation_data=batches, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["val_a_error"], [error] * 2, rtol=1e-5)
    np.testing.assert_allclose(history["a_error"], [error] * 2, rtol=1e-5)


# Errors.


@pytest.mark.parametrize("multiple", [0, -8, 2.0, "8", True])
def test_multiple_must_be_a_positive_int(multiple):
    with pytest.raises(ValueError, match=f"`multiple` must be a positive int. Received: multiple={multiple!r}"):
        pad_batches(np.arange(3), multiple)


def test_arrays_of_different_lengths_raise():
    with pytest.raises(ValueError, match=r"Received: arrays of lengths \[2, 3\]"):
        pad_batches((np.zeros(3), np.zeros(2)), 4)
    for batches in (
        (batch for batch in [(np.zeros(4), np.zeros(4)), (np.zeros(3), np.zeros(2))]),
        tf.data.Dataset.from_tensors((np.zeros(3), np.zeros(2))),
    ):
        with pytest.raises(ValueError, match=r"a row for each example. Received: arrays of lengths \[2, 3\]"):
            list(pad_batches(batches, 4))


@pytest.mark.parametrize("data", [3, "abc"])
def test_unrecognized_data_raise(data):
    with pytest.raises(ValueError, match="Unrecognized data type"):
        pad_batches(data, 4)


def test_padded_batches_keep_their_multiple():
    assert sizes_of(pad_batches(pad_batches(np.arange(3), 4))) == [4]


def test_arrays_of_different_lengths_in_a_dict_raise():
    with pytest.raises(ValueError, match="2"):
        pad_batches({"a": np.zeros(3), "b": np.zeros(2)}, 4)


def test_separate_weights_for_a_dataset_raise():
    """A dataset must hold its own weights."""
    dataset = tf.data.Dataset.from_tensor_slices(np.arange(8.0)).batch(4)
    for data in (dataset, pad_batches(dataset)):
        with pytest.raises(ValueError, match="sample_weight"):
            padded_batches(data, sample_weight=np.ones(8))


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="`batch_size` must be a positive int"):
        pad_batches(np.zeros(3), batch_size=0)


def test_missing_data_raise():
    with pytest.raises(ValueError, match="None"):
        pad_batches(None, 4)


def test_a_generator_can_be_read_only_once():
    batches = pad_batches((batch for batch in Batches([5, 8, 3])), 4)
    list(batches)
    with pytest.raises(ValueError, match="A generator can be read once"):
        list(batches)


def test_batches_of_batches_know_that_they_are_shuffled():
    shuffled = pad_batches({"id": np.arange(5)}, shuffle=True)
    assert all(each.is_shuffled for each in (shuffled, padded_batches(shuffled), pad_batches(shuffled, multiple=4)))
    assert not padded_batches(pad_batches({"id": np.arange(5)})).is_shuffled
