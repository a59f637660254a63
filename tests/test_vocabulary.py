"""`Vocabulary`: names as rows of a table, and back."""

import json
import zipfile

import keras
import numpy as np
import pandas as pd
import pytest

from keras_rs_contrib import Vocabulary

NAMES = ["Alien", "Heat", "Up", "Ä ö", "a\nb", 'q"uote']
LARGE = [f"name {i}" for i in range(1_500)]
INTEGERS = [7, -3, 0, 2**40, 10**30]


def forms(values):
    """Yields a column of names in the forms that data comes in."""
    yield values
    yield tuple(values)
    yield np.array(values, object)
    yield np.array([values, values], object)
    yield pd.Series(values, index=range(5, 5 + len(values)), dtype=object)
    if isinstance(values[0], str):
        yield np.array(values)
        yield np.array([value.encode() for value in values], object)
        yield np.array([value.encode() for value in values])
        yield pd.Series(values)
        yield pd.Series(values, dtype="string")
        yield pd.Series(values, dtype="category")
        yield pd.Index(values)


@pytest.mark.parametrize("names", [NAMES, INTEGERS, LARGE, [0]], ids=["strings", "integers", "large", "single"])
def test_names_get_the_rows_from_1_on_and_come_back(names):
    vocabulary = Vocabulary(names)
    assert len(vocabulary) == len(names) + 1
    assert vocabulary.names == names
    for values in forms(names):
        rows = vocabulary.encode(values)
        expected = np.broadcast_to(np.arange(1, len(names) + 1), np.shape(values))
        np.testing.assert_array_equal(rows, expected)
        assert rows.dtype == "int32"
        decoded = vocabulary.decode(rows)
        assert decoded.tolist() == np.broadcast_to(np.array(names, object), expected.shape).tolist()
        assert {type(name) for name in decoded.ravel()} == {type(names[0])}


def test_single_names_and_numpy_integers():
    movies, users = Vocabulary(NAMES), Vocabulary([5, 2**40])
    assert movies.encode("Heat") == 2
    assert movies.encode(b"Heat") == 2
    assert movies.decode(2) == "Heat"
    assert users.encode(np.int64(2**40)) == 2
    assert users.encode(np.array([5, 2**40, 6], "uint64")).tolist() == [1, 2, 0]
    assert "Heat" in movies
    assert "Solaris" not in movies
    assert np.int8(5) in users


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_integers_of_any_dtype_are_found(dtype):
    for names in ([3, 1, 120], [-100, 90, 2], [1_000, 5], [2**40, 7], [2**63 + 1, 4]):
        vocabulary = Vocabulary(names)
        limits = np.iinfo(dtype)
        values = np.array(
            [limits.min, limits.max, *(name for name in names if limits.min <= name <= limits.max)], dtype
        )
        expected = [names.index(value) + 1 if value in names else 0 for value in values.tolist()]
        assert vocabulary.encode(values).tolist() == expected
        with pytest.raises(ValueError, match=f"Received: {limits.min}, which"):
            vocabulary.encode(values, unknown="error")


def test_tensors_of_strings_are_names():
    tf = pytest.importorskip("tensorflow")
    vocabulary = Vocabulary(tf.constant(NAMES))
    assert vocabulary.names == NAMES
    assert vocabulary.encode(tf.constant([["Up", "?"]])).tolist() == [[3, 0]]


def test_unknown_names_get_row_0_or_are_an_error():
    vocabulary = Vocabulary(NAMES, name="movies")
    assert vocabulary.encode(["Up", "Solaris", "Alien"]).tolist() == [3, 0, 1]
    with pytest.raises(ValueError, match=r"Received: 'Solaris', which 'movies' does not have, with 2 such names"):
        vocabulary.encode(["Up", "Solaris", "Solaris", "Stalker"], unknown="error")
    assert vocabulary.encode(["Up"], unknown="error").tolist() == [3]
    with pytest.raises(ValueError, match=r"must be 'row' or 'error'. Received: 'skip'"):
        vocabulary.encode(["Up"], unknown="skip")
    assert vocabulary.decode([0, -1, 2]).tolist() == [None, None, "Heat"]


def test_the_most_frequent_names_of_data_come_first():
    values = ["c", "b", "a", "b", "c", "b", "d"]
    assert Vocabulary.from_data(values).names == ["b", "c", "a", "d"]
    assert Vocabulary.from_data(values, min_count=2).names == ["b", "c"]
    assert Vocabulary.from_data(values, max_size=1, name="x").names == ["b"]
    assert Vocabulary.from_data(pd.Series([3, 1, 1])).names == [1, 3]
    assert Vocabulary.from_data(np.array([["u", "v"], ["v", "w"]])).names == ["v", "u", "w"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b", "a"], ValueError, "must occur once. Received: 'a' 2 times.*from_data"),
        (["a", b"a"], ValueError, "must occur once"),
        ([3, np.int32(3)], ValueError, "must occur once. Received: 3 2 times"),
        (["a", ""], ValueError, "must not be empty. Received: '' in row 1"),
        (["a", None], ValueError, "must not be missing. Received: None in row 1"),
        ([None, "a"], ValueError, "must not be missing. Received: None in row 0"),
        ([float("nan"), "a"], ValueError, "must not be missing. Received: nan in row 0"),
        (pd.Series(["a", pd.NA], dtype="string"), ValueError, "must not be missing. Received: <NA> in row 1"),
        (pd.Series(["a", None]), ValueError, "must not be missing.*in row 1"),
        (pd.Series([1, None], dtype="Int64"), ValueError, "must not be missing. Received: <NA> in row 1"),
        (["a", 1], TypeError, "all strings or all integers. Received: 1 in row 1 beside names of type str"),
        ([1, "a"], TypeError, "Received: 'a' in row 1 beside names of type int"),
        ([1.5], TypeError, "Received: 1.5 in row 0.*astype"),
        ([1, 2.0], TypeError, "Received: 2.0 in row 1"),
        ([True, False], TypeError, "Received: True in row 0"),
        (np.array([True]), TypeError, "Received: True in row 0"),
        (np.array([1.0, 2.0]), TypeError, "Received: 1.0 in row 0"),
        (pd.Series(pd.to_datetime(["2020-01-01"])), TypeError, "Received: .*2020.* in row 0"),
        ([["a"], "b"], ValueError, "must form an array"),
        ([["a"], ["b", "c"]], ValueError, "must form an array"),
        ([{}], TypeError, "Received: {} in row 0"),
        ([], ValueError, "must have a name. Received: none"),
    ],
)
def test_invalid_names_raise(names, error, message):
    for create in (Vocabulary, Vocabulary.from_data):
        if create is Vocabulary or "occur once" not in message:
            with pytest.raises(error, match=message):
                create(names)
    vocabulary = Vocabulary(["b"])
    if "must occur once" not in message and len(names):
        with pytest.raises(error):
            vocabulary.encode(names)


def test_invalid_arguments_raise():
    for arguments, message in (
        ({"min_count": 0}, "`min_count` must be a positive int"),
        ({"max_size": -1}, "`max_size` must be a positive int"),
        ({"min_count": 3}, "must have a name. Received: none.*smaller `min_count`"),
    ):
        with pytest.raises(ValueError, match=message):
            Vocabulary.from_data(["a", "b", "a"], **arguments)
    vocabulary = Vocabulary(["a", "b"], name="letters")
    with pytest.raises(TypeError, match=r"kind of the vocabulary's names. Received: 1, and 'a' in 'letters'"):
        vocabulary.encode([1])
    for wrong in ([1.0], [True], np.array([1.0])):
        with pytest.raises(TypeError, match=r"all strings or all integers. Received: (1.0|True) in row 0"):
            Vocabulary([1, 2]).encode(wrong)
    with pytest.raises(ValueError, match=r"A row must be in \[-1, 2\]. Received: 3"):
        vocabulary.decode([3])
    with pytest.raises(ValueError, match=r"A row must be in \[-1, 2\]. Received: -2"):
        vocabulary.decode([-2, 0])
    with pytest.raises(TypeError, match=r"Rows must be integers. Received: dtype float"):
        vocabulary.decode([0.5])
    with pytest.raises(TypeError, match=r"not within a model. Received: a call"):
        vocabulary(np.array([1]))


def test_empty_columns_are_allowed():
    vocabulary = Vocabulary(["a"])
    assert vocabulary.encode([]).shape == vocabulary.decode([]).shape == (0,)
    assert vocabulary.encode(np.zeros((0, 3), object)).shape == (0, 3)


@keras.saving.register_keras_serializable("tests")
class Model(keras.Model):
    def __init__(self, users, movies):
        super().__init__()
        self.users, self.movies, self.dense = users, movies, keras.layers.Dense(1)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {"users": serialize(self.users), "movies": serialize(self.movies)}

    @classmethod
    def from_config(cls, config):
        return cls(**{name: keras.saving.deserialize_keras_object(value) for name, value in config.items()})


@pytest.mark.parametrize("names", [NAMES, [*LARGE, *NAMES, "\ud800"], INTEGERS, [-5, *range(5_000), 10**30]])
def test_a_model_saves_its_vocabularies(names, tmp_path):
    model = Model(Vocabulary(names), Vocabulary(["a"]))
    model(np.zeros((1, 2)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.users.names == names
    assert loaded.movies.names == ["a"]
    assert loaded.users.encode(names[-1:]) == len(names)
    # A loaded model is saved again.
    loaded.save(tmp_path / "again.keras")
    assert keras.saving.load_model(tmp_path / "again.keras").users.names == names
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        size = len(file.read("config.json"))
    assert size < 20_000


@pytest.mark.parametrize("names", [NAMES, LARGE], ids=["small", "large"])
def test_a_config_outside_of_a_file_has_all_names(names):
    copy = Vocabulary.from_config(Vocabulary(names, name="x").get_config())
    assert (copy.names, copy.name) == (names, "x")
    model = Model(Vocabulary(names), Vocabulary(["a"]))
    assert Model.from_config(model.get_config()).users.names == names


def test_a_vocabulary_whose_names_are_not_loaded_says_so(tmp_path):
    model = Model(Vocabulary(LARGE, name="users"), Vocabulary(["a"]))
    model(np.zeros((1, 2)))
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        config = file.read("config.json").decode()
    lacking = keras.saving.deserialize_keras_object(json.loads(config)).users
    assert len(lacking) == 1_501
    for use in (lambda: lacking.encode(["a"]), lambda: lacking.decode([1]), lambda: lacking.names):
        with pytest.raises(ValueError, match=r"must be loaded before it is used. Received: 'users', whose 1500 names"):
            use()


@pytest.mark.parametrize(
    "names",
    [
        [["Up"], ["Heat", "?", "Up"], []],
        [("Up",), ("Heat", "?", "Up"), ()],
        [[None, None, "Up"], ["Heat", "?", "Up"], [None, None, None]],
        np.array([["", "", "Up"], ["Heat", "?", "Up"], ["", "", ""]]),
        np.array([[b"", b"", b"Up"], [b"Heat", b"?", b"Up"], [b"", b"", b""]], object),
        pd.Series([["Up"], ["Heat", "?", "Up"], []]),
        np.array([[np.nan, None, "Up"], ["Heat", "?", "Up"], [pd.NA, "", None]], object),
    ],
    ids=["lists", "tuples", "padded", "numpy", "bytes", "series", "missing"],
)
def test_padded_names_are_rows_with_the_last_name_in_the_last_column(names):
    vocabulary = Vocabulary(["Heat", "Up"])
    np.testing.assert_array_equal(vocabulary.encode(names, padded=True), [[-1, -1, 2], [1, 0, 2], [-1, -1, -1]])


@pytest.mark.parametrize("dtype", ["int64", "int16", object])
def test_padded_integers_have_minus_one_as_padding(dtype):
    vocabulary = Vocabulary([30, 10])
    rows = vocabulary.encode(np.array([[-1, 10], [30, 5]], dtype), padded=True)
    np.testing.assert_array_equal(rows, [[-1, 2], [1, 0]])
    assert rows.dtype == "int32"


def test_padded_names_that_are_unknown_or_no_names_are_errors():
    vocabulary = Vocabulary(["Heat", "Up"])
    with pytest.raises(ValueError, match="Received: 'Alien'"):
        vocabulary.encode([["Up"], ["Alien", "Heat"]], unknown="error", padded=True)
    with pytest.raises(TypeError, match="Received: 3"):
        vocabulary.encode([["Up"], [3]], padded=True)
    with pytest.raises(ValueError, match="rows of different lengths, or lists beside names"):
        vocabulary.encode(["Up", ["Heat"]], padded=True)


def test_padded_names_of_no_rows_are_empty():
    vocabulary = Vocabulary(["Heat", "Up"])
    assert vocabulary.encode([[], []], padded=True).shape == (2, 0)
    assert vocabulary.encode([], padded=True).shape == (0,)


@pytest.mark.parametrize("num_names", [3, 30_000])
def test_strings_of_a_series_encode_as_those_of_a_list(num_names):
    generator = np.random.default_rng(0)
    values = [f"name {i}" for i in generator.integers(0, num_names, 20_000)]
    vocabulary = Vocabulary.from_data(values[1:])
    series = pd.Series(values, dtype="str")
    np.testing.assert_array_equal(vocabulary.encode(series), vocabulary.encode(values))
    with pytest.raises(ValueError, match="must not be missing"):
        vocabulary.encode(pd.concat([series, pd.Series([None], dtype="str")]))


@pytest.mark.parametrize("dtype", ["str", "string", "object", "category", "string[pyarrow]", "large_string[pyarrow]"])
def test_unknown_strings_of_a_series(dtype):
    vocabulary = Vocabulary(["Heat", "Up", "\xe9"])
    series = pd.Series(["Up", "Alien", "Heat", "\xe9"], index=[3.5, 2, 1, 0], dtype=dtype)
    np.testing.assert_array_equal(vocabulary.encode(series), [2, 0, 1, 3])
    assert vocabulary.encode(series).dtype == "int32"
    np.testing.assert_array_equal(vocabulary.encode(pd.concat([series, series])[::2]), [2, 1, 2, 1])
    assert vocabulary.encode(series[:0]).shape == (0,)
    with pytest.raises(ValueError, match="Received: 'Alien'"):
        vocabulary.encode(series, unknown="error")
    with pytest.raises(ValueError, match="must not be empty"):
        vocabulary.encode(pd.Series(["Up", ""], dtype=dtype))
    with pytest.raises(TypeError, match="Received: 'Up', and 3"):
        Vocabulary([3, 4]).encode(series)
    np.testing.assert_array_equal(Vocabulary(["Up", "\ud800"]).encode(series), [1, 0, 0, 0])
