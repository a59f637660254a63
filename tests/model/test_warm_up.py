"""Requests without compilation after a warm-up, and from several threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import keras
import numpy as np
import pytest
from conftest import compilations, data_parallel

from keras_rs_contrib import HistoryTower, TwoTowerModel, Vocabulary

NUM_USERS, NUM_ITEMS = 30, 50


def make_model(**arguments):
    model = TwoTowerModel(
        keras.layers.Embedding(NUM_USERS + 1, 8),
        keras.layers.Embedding(NUM_ITEMS + 1, 8),
        query_features="user",
        candidate_features="item",
        **arguments,
    )
    model.compile("adam")
    return model


def pairs(number=64):
    return {"user": np.arange(number) % NUM_USERS, "item": np.arange(number) * 7 % NUM_ITEMS}


def test_after_a_warm_up_no_request_compiles(rng):
    model = make_model()
    model.fit(pairs(), verbose=0)
    # Queries of 1, 2, 4, 8 and 16 rows; no excluded id, 8 or 16; k of the index, 16 and 32.
    assert model.warm_up(num_queries=9, num_exclude_ids=10, k=20, verbose=0) == 5 * 3 * 3
    with compilations() as found:
        for num_queries in range(17):
            for num_excluded, k in [(0, None), (1, 3), (9, 10), (16, 20)]:
                excluded = rng.integers(0, NUM_ITEMS, (num_queries, num_excluded)) if num_excluded else None
                users = rng.integers(0, NUM_USERS, num_queries)
                ids, _ = model.recommend({"user": users}, k, exclude_ids=excluded)
                assert ids.shape == (num_queries, k or 10)
        model.recommend([3], exclude_ids=[1, 2, 3])
        model.recommend({"user": 3})
        model.recommend({"user": np.array([3, 4], "uint8")})
        model.recommend({"user": [[3], [4], [5]]})
        model.recommend({"user": jax.device_put(np.array([3, 4, 5]))})
    assert not found


def test_a_warm_up_covers_names_and_what_queries_have_seen():
    users = Vocabulary([f"u{i}" for i in range(NUM_USERS)])
    items = Vocabulary([f"i{i}" for i in range(NUM_ITEMS)])
    model = make_model(vocabularies={"user": users, "item": items})
    data = {"user": [f"u{i // 9}" for i in range(90)], "item": [f"i{i * 7 % NUM_ITEMS}" for i in range(90)]}
    model.fit(data, seen="training", verbose=0)
    # Up to 9 seen and 4 excluded ids: none, 8 or 16.
    assert model.warm_up(num_queries=4, num_exclude_ids=4, verbose=0) == 3 * 3
    with compilations() as found:
        model.recommend(["u1", "u2", "nobody"])
        model.recommend("u1", exclude_ids=["i1", "i2", "i3", "i4"])
        model.recommend(["u29", "u28"])
    assert not found


def test_a_warm_up_covers_the_checks_of_ids_that_a_tower_computes(rng):
    items, users = keras.layers.Embedding(NUM_ITEMS + 1, 8), keras.layers.Embedding(NUM_USERS + 1, 8)
    tower = HistoryTower(items, "history", query_table=users, query_feature="user")
    # Zeros are not ids of this table.
    shifted = keras.layers.Lambda(lambda x: x - 1)
    ids = keras.Input((), dtype="int32", name="user")
    for query_tower, features in [
        (tower, {"user": pairs()["user"], "history": rng.integers(0, NUM_ITEMS, (64, 3))}),
        (keras.Model({"user": ids}, users(shifted(ids))), {"user": 1 + pairs()["user"]}),
    ]:
        model = TwoTowerModel(query_tower, items, list(features), "item", query_id="user")
        model.compile("adam")
        model.fit({**features, "item": pairs()["item"]}, verbose=0)
        model.warm_up(num_queries=4, num_exclude_ids=0, verbose=0)
        with compilations() as found:
            for number in range(1, 5):
                model.recommend({name: values[:number] for name, values in features.items()})
        assert not found
        with pytest.raises(ValueError, match=r"must be (in|a whole number in) .0, 30."):
            model.recommend({**{name: values[:1] for name, values in features.items()}, "user": [NUM_USERS + 9]})


def test_a_warm_up_needs_sizes_and_features():
    model = make_model()
    with pytest.raises(ValueError, match=r"has not seen .'user'.*Call it on a batch first"):
        model.warm_up()
    model.fit(pairs(), verbose=0)
    with pytest.raises(ValueError, match=r"`num_queries` must be a positive int. Received: num_queries=0"):
        model.warm_up(0)
    with pytest.raises(ValueError, match=r"`num_exclude_ids` must be an int of at least 0. Received.*-1"):
        model.warm_up(1, -1)
    with pytest.raises(ValueError, match=r"`k` must not exceed the number of candidates. Received: k=52"):
        model.warm_up(1, 0, k=52)


@pytest.mark.parametrize("replicas", [1, 4])
def test_threads_get_the_answers_of_serial_calls(rng, replicas):
    if replicas > 1:
        keras.distribution.set_distribution(data_parallel(replicas))
    model = make_model()
    model.fit(pairs(), verbose=0)
    methods = [
        lambda batch: model.recommend({"user": batch["user"]}),
        lambda batch: model.predict({"user": batch["user"]}, verbose=0),
        lambda batch: model.evaluate(batch, verbose=0),
        lambda batch: model({"user": batch["user"]}),
        lambda batch: model.get_weights(),
        lambda batch: list(model.evaluate_queries({"user": batch["user"]}, batch["item"][:, None]).values()),
    ]
    jobs = [(methods[i % 6], {name: rng.integers(0, 30, 1 + i % 7) for name in ("user", "item")}) for i in range(48)]
    expected = [method(batch) for method, batch in jobs]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda job: job[0](job[1]), jobs))
    for result, each in zip(results, expected, strict=True):
        for found, values in zip(keras.tree.flatten(result), keras.tree.flatten(each), strict=True):
            np.testing.assert_allclose(found, values, rtol=1e-6)
    model.fit(pairs(), verbose=0)


def test_threads_build_a_model_once():
    model = make_model()
    start = threading.Barrier(8)

    def recommend(_):
        start.wait()
        return model.recommend({"user": [1, 2]}).ids

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(recommend, range(8)))
    for ids in results:
        np.testing.assert_array_equal(ids, model.recommend({"user": [1, 2]}).ids)


@pytest.mark.parametrize("method", ["recommend", "predict", "evaluate_queries", "fit", "call", "score"])
def test_while_a_thread_trains_a_model_others_get_an_error(method):
    model = make_model()
    model.fit(pairs(), verbose=0)
    before = model.recommend({"user": [1]}).ids
    users = {"user": np.arange(3)}
    calls = {
        "recommend": lambda: model.recommend(users),
        "predict": lambda: model.predict(users, verbose=0),
        "evaluate_queries": lambda: model.evaluate_queries(users, [[1], [2], [3]]),
        "fit": lambda: model.fit(pairs(), verbose=0),
        "call": lambda: model(users),
        "score": lambda: model.score(pairs()),
    }
    errors = []

    def call():
        try:
            calls[method]()
        except RuntimeError as error:
            errors.append(str(error))

    class Disturb(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

    model.optimizer.learning_rate = 0.0
    model.fit(pairs(), callbacks=[Disturb()], batch_size=64, verbose=0)
    assert len(errors) == 1
    assert "cannot be used while another thread trains it. Received: " in errors[0]
    np.testing.assert_array_equal(model.recommend({"user": [1]}).ids, before)


def test_a_callback_may_use_the_model():
    model = make_model()
    found = []
    callback = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: found.append(model.recommend({"user": [1, 2]})))
    model.fit(pairs(), callbacks=[callback], verbose=0)
    np.testing.assert_array_equal(found[0].ids, model.recommend({"user": [1, 2]}).ids)


def test_between_the_batches_of_an_epoch_the_model_has_no_weights():
    model = make_model()
    model.fit(pairs(), verbose=0)
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: model.recommend({"user": [1, 2]}))
    with pytest.raises(RuntimeError, match=r"Received: `recommend` between them. Call it in `on_epoch_end`"):
        model.fit(pairs(), callbacks=[callback], verbose=0)
    assert model.recommend({"user": [1, 2]}).ids.shape == (2, 10)
