"""What queries have seen: collected or passed to `fit`, saved, and left out of the lists."""

import keras
import numpy as np
import pandas as pd
import pytest
import reference
from conftest import data_parallel

from keras_rs_contrib import NDCGAtK, RecallAtK, TwoTowerModel, Vocabulary, group_candidate_ids
from keras_rs_contrib.model.training_data import TrainingData

NUM_USERS, NUM_MOVIES = 12, 20
RNG = np.random.default_rng(1)
PAIRS = np.unique(RNG.integers(0, (NUM_USERS, NUM_MOVIES), (110, 2)), axis=0)
RNG.shuffle(PAIRS)
TRAIN = {"user": PAIRS[:60, 0], "movie": PAIRS[:60, 1]}
TEST = {"user": PAIRS[60:, 0], "movie": PAIRS[60:, 1]}
SEEN = [set(TRAIN["movie"][TRAIN["user"] == user].tolist()) for user in range(NUM_USERS)]


def make_model(**kwargs):
    keras.utils.set_random_seed(0)
    model = TwoTowerModel(
        keras.layers.Embedding(NUM_USERS, 4),
        keras.layers.Embedding(NUM_MOVIES, 4),
        "user",
        "movie",
        corpus_metrics=[RecallAtK(5), NDCGAtK(5)],
        **kwargs,
    )
    model.compile("adam")
    return model


def scores_of(model):
    normalized = [
        np.asarray(x) / np.linalg.norm(np.asarray(x), axis=1, keepdims=True)
        for x in (model.query_tower.embeddings, model.candidate_tower.embeddings)
    ]
    return normalized[0] @ normalized[1].T


def naive_ranks(scores, pairs, seen):
    """The rank of each pair's candidate among those that the user has not seen."""
    ranks = []
    for user, movie in zip(pairs["user"], pairs["movie"], strict=True):
        others = [j for j in range(scores.shape[1]) if j == movie or j not in seen[user]]
        ranks.append(sum(scores[user, j] > scores[user, movie] for j in others))
    return np.array(ranks)


def naive_recall(ranks, k=5):
    return float((ranks < k).mean())


def as_tf_data(data):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(data).batch(16)


FORMS = {
    "arrays": dict,
    "frame": pd.DataFrame,
    "tf_data": as_tf_data,
    "generator": lambda data: (({name: x[i : i + 20] for name, x in data.items()},) for i in range(0, 60, 20)),
}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("form", FORMS)
def test_what_a_query_has_seen_in_training_is_left_out(form):
    model = make_model()
    history = model.fit(FORMS[form](TRAIN), validation_data=TEST, seen="training", shuffle=False, verbose=0).history
    scores = scores_of(model)
    expected = naive_recall(naive_ranks(scores, TEST, SEEN))
    assert history["val_recall_at_5"][-1] == pytest.approx(expected)
    assert model.evaluate(TEST, return_dict=True, verbose=0)["recall_at_5"] == pytest.approx(expected)
    ids, _ = model.recommend(np.arange(NUM_USERS), k=NUM_MOVIES)
    for user, row in enumerate(ids.tolist()):
        unseen = [movie for movie in np.argsort(-scores[user]).tolist() if movie not in SEEN[user]]
        assert row == unseen + [-1] * (NUM_MOVIES - len(unseen))
    # The candidate that is ranked stays in the list, although it was seen.
    metrics = model.evaluate(TRAIN, return_dict=True, verbose=0)
    assert metrics["recall_at_5"] == pytest.approx(naive_recall(naive_ranks(scores, TRAIN, SEEN)))


def test_seen_candidates_stay_in_the_lists_if_asked():
    model = make_model()
    model.fit(TRAIN, seen="training", verbose=0)
    everything = naive_recall(naive_ranks(scores_of(model), TEST, [set()] * NUM_USERS))
    unseen = model.evaluate(TEST, return_dict=True, verbose=0)["recall_at_5"]
    assert unseen != pytest.approx(everything)
    assert model.evaluate(TEST, exclude_seen=False, return_dict=True, verbose=0)["recall_at_5"] == pytest.approx(
        everything
    )
    assert (model.recommend([3], k=NUM_MOVIES, exclude_seen=False).ids >= 0).all()
    model.exclude_seen = False
    assert model.evaluate(TEST, return_dict=True, verbose=0)["recall_at_5"] == pytest.approx(everything)
    assert (model.recommend([3], k=NUM_MOVIES).ids >= 0).all()
    assert model.evaluate(TEST, exclude_seen=True, return_dict=True, verbose=0)["recall_at_5"] == unseen


def test_nothing_is_left_out_unless_it_is_known():
    model = make_model()
    model.fit(TRAIN, verbose=0)
    assert (model.recommend(np.arange(NUM_USERS), k=NUM_MOVIES).ids >= 0).all()


@pytest.mark.parametrize("frame", [False, True])
def test_what_a_query_has_seen_is_passed_once(frame):
    model = make_model()
    others = {"user": np.array([3, 3, 5, 99]), "movie": np.array([1, 2, 1, 7])}
    model.fit(TRAIN, seen=pd.DataFrame(others) if frame else others, verbose=0)
    ids = model.recommend([3, 5, 6], k=NUM_MOVIES).ids
    assert [set(range(NUM_MOVIES)) - set(row.tolist()) for row in ids] == [{1, 2}, {1}, set()]
    # It adds up.
    model.fit(TRAIN, seen={"user": [5, 6], "movie": [4, 4]}, verbose=0)
    model.fit(TRAIN, verbose=0)
    ids = model.recommend([3, 5, 6], k=NUM_MOVIES).ids
    assert [set(range(NUM_MOVIES)) - set(row.tolist()) for row in ids] == [{1, 2}, {1, 4}, {4}]


def test_rows_of_weight_0_are_not_seen():
    model = make_model()
    weight = np.ones(60)
    weight[:30] = 0
    model.fit(TRAIN, sample_weight=weight, seen="training", verbose=0)
    seen = {name: x[30:] for name, x in TRAIN.items()}
    expected = group_candidate_ids(seen["user"], seen["movie"], np.arange(NUM_USERS))
    ids = model.recommend(np.arange(NUM_USERS), k=NUM_MOVIES).ids
    for row, excluded in zip(ids.tolist(), expected.tolist(), strict=True):
        assert set(row) - {-1} == set(range(NUM_MOVIES)) - set(excluded)


def test_the_part_for_validation_is_not_seen():
    model = make_model()
    model.fit(TRAIN, validation_split=0.5, seen="training", verbose=0)
    model_without = make_model()
    model_without.fit({name: x[:30] for name, x in TRAIN.items()}, seen="training", verbose=0)
    for user in range(NUM_USERS):
        ids = [each.recommend([user], k=NUM_MOVIES).ids[0] for each in (model, model_without)]
        assert set(ids[0]) == set(ids[1])


def test_excluded_ids_add_to_what_was_seen():
    model = make_model(exclude_feature="excluded")
    model.fit(TRAIN, seen="training", verbose=0)
    free = [[movie for movie in range(NUM_MOVIES) if movie not in seen] for seen in SEEN]
    excluded = np.array([row[:2] for row in free])
    ids = model.recommend({"user": np.arange(NUM_USERS)}, exclude_ids=excluded, k=NUM_MOVIES).ids
    for row, expected in zip(ids.tolist(), free, strict=True):
        assert sorted(set(row) - {-1}) == expected[2:]
    data = {**TEST, "excluded": np.full((len(TEST["user"]), 1), 7)}
    metrics = model.evaluate(data, return_dict=True, verbose=0)
    # An excluded candidate does not count as found, although a seen one would.
    ranks = naive_ranks(scores_of(model), TEST, [seen | {7} for seen in SEEN])
    ranks[TEST["movie"] == 7] = NUM_MOVIES
    assert metrics["recall_at_5"] == pytest.approx(naive_recall(ranks))


def test_queries_are_evaluated_without_what_they_have_seen():
    model = make_model()
    model.fit(TRAIN, seen="training", verbose=0)
    positives = group_candidate_ids(TEST["user"], TEST["movie"], np.arange(NUM_USERS))
    seen = group_candidate_ids(TRAIN["user"], TRAIN["movie"], np.arange(NUM_USERS))
    expected = model.evaluate_queries(np.arange(NUM_USERS), positives, seen, exclude_seen=False)
    assert model.evaluate_queries(np.arange(NUM_USERS), positives) == pytest.approx(expected)
    # Positives that were seen stay.
    assert model.evaluate_queries([3], [sorted(SEEN[3])[:1]])["recall_at_5"] in (0.0, 1.0)
    scores = scores_of(model)[3]
    best = max(SEEN[3], key=lambda movie: scores[movie])
    rank = sum(scores[j] > scores[best] for j in range(NUM_MOVIES) if j not in SEEN[3])
    assert model.evaluate_queries([3], [[best]])["recall_at_5"] == float(rank < 5)


def test_what_was_seen_is_saved_and_loaded(tmp_path):
    model = make_model()
    model.fit(TRAIN, seen="training", verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.recommend(np.arange(NUM_USERS), k=NUM_MOVIES)
    np.testing.assert_array_equal(loaded.recommend(np.arange(NUM_USERS), k=NUM_MOVIES).ids, expected.ids)
    model.save_weights(tmp_path / "model.weights.h5")
    again = make_model()
    again({name: x[:1] for name, x in TRAIN.items()})
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again.recommend(np.arange(NUM_USERS), k=NUM_MOVIES).ids, expected.ids)


def test_seen_names_are_left_out():
    users, movies = Vocabulary(["ann", "bob"]), Vocabulary(["Alien", "Heat", "Up"])
    model = TwoTowerModel(
        keras.layers.Embedding(3, 2), keras.layers.Embedding(4, 2), "user", "movie",
        vocabularies={"user": users, "movie": movies},
    )  # fmt: skip
    model.compile("adam")
    data = {"user": ["ann", "bob"], "movie": ["Heat", "Up"]}
    model.fit(data, verbose=0, seen={"user": ["ann", "bob", "ann"], "movie": ["Alien", "unknown", "Up"]})
    assert model.recommend("ann", k=3).ids.tolist() == [["Heat", None, None]]
    assert set(model.recommend("bob", k=3).ids[0]) == {"Alien", "Heat", "Up"}


@pytest.mark.parametrize(
    ("seen", "error", "message"),
    [
        ("train", TypeError, "`seen` must be 'training', or a dict or DataFrame"),
        ([1, 2], TypeError, "`seen` must be 'training', or a dict or DataFrame"),
        ({"user": [1]}, ValueError, "without 'movie'"),
        ({"user": [1], "movie": [1, 2]}, ValueError, "Received: 1 queries and 2 candidates"),
        ({"user": 1, "movie": 1}, ValueError, "The feature 'user' of `seen` must have a row"),
        ({"user": [1], "movie": [[1, 2]]}, ValueError, r"The feature 'movie' of `seen` must be flat.*shape \(1, 2\)"),
        ({"user": [1.5], "movie": [1]}, ValueError, "The feature 'user' of `seen` must hold ids"),
        ({"user": [2**40], "movie": [1]}, ValueError, "The feature 'user' of `seen` must hold ids"),
        ({"user": ["u1"], "movie": [1]}, ValueError, "must hold numbers"),
    ],
)
def test_invalid_seen_raises_before_training(seen, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        model.fit(TRAIN, seen=seen, verbose=0)
    assert not model.optimizer.iterations.numpy()


def test_seen_needs_the_ids_of_queries():
    towers = keras.layers.Embedding(NUM_USERS, 4), keras.layers.Embedding(NUM_MOVIES, 4)
    inputs = {"user": keras.Input((), dtype="int32", name="user"), "age": keras.Input((1,), name="age")}
    query_tower = keras.Model(inputs, towers[0](inputs["user"]) + keras.layers.Dense(4)(inputs["age"]))
    data = {**TRAIN, "age": np.ones((60, 1), "float32")}
    model = TwoTowerModel(query_tower, towers[1], ["user", "age"], "movie")
    model.compile("adam")
    with pytest.raises(ValueError, match="query_id=None"):
        model.fit(data, seen="training", verbose=0)
    model = TwoTowerModel(query_tower, towers[1], ["user", "age"], "movie", query_id="user")
    model.compile("adam")
    model.fit(data, seen="training", verbose=0)
    ids = model.recommend({"user": 3, "age": [1.0]}, k=NUM_MOVIES).ids[0]
    assert set(ids.tolist()) - {-1} == set(range(NUM_MOVIES)) - SEEN[3]


@pytest.mark.parametrize("num_devices", [2, 8])
def test_seen_candidates_are_left_out_on_many_devices(num_devices):
    keras.distribution.set_distribution(data_parallel(num_devices))
    model = make_model()
    history = model.fit(TRAIN, validation_data=TEST, seen="training", batch_size=13, verbose=0).history
    expected = naive_recall(naive_ranks(scores_of(model), TEST, SEEN))
    assert history["val_recall_at_5"][-1] == pytest.approx(expected)


def test_the_first_validation_says_once_that_it_ranks_seen_candidates(capsys):
    model = make_model()
    for _ in range(2):
        model.fit(TRAIN, validation_data=TEST, verbose=2)
    assert capsys.readouterr().out.count("Validation also ranks what a query has seen") == 1
    for arguments, verbose in (({"seen": "training"}, 2), ({}, 0)):
        model = make_model()
        model.fit(TRAIN, validation_data=TEST, verbose=verbose, **arguments)
        assert "Validation also ranks" not in capsys.readouterr().out


# Popularity.


def naive_popularity_ranks(pairs, seen):
    counts = np.bincount(TRAIN["movie"], minlength=NUM_MOVIES)
    order = sorted(range(NUM_MOVIES), key=lambda movie: (-counts[movie], movie))
    ranks = []
    for user, movie in zip(pairs["user"], pairs["movie"], strict=True):
        ranks.append([each for each in order if each == movie or each not in seen[user]].index(movie))
    return np.array(ranks)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("form", FORMS)
def test_popularity_is_printed_next_to_the_last_validation(form, capsys):
    model = make_model()
    history = model.fit(FORMS[form](TRAIN), validation_data=TEST, seen="training", shuffle=False, verbose=2).history
    header, ours, popularity = capsys.readouterr().out.splitlines()[-3:]
    assert header.split() == ["Last", "validation", "recall_at_5", "ndcg_at_5"]
    assert ours.split() == ["this", "model", *(f"{history[f'val_{name}'][-1]:.4f}" for name in header.split()[2:])]
    ranks = naive_popularity_ranks(TEST, SEEN)
    ndcg = np.mean([1 / np.log2(rank + 2) if rank < 5 else 0 for rank in ranks])
    assert popularity.split() == ["popularity", f"{naive_recall(ranks):.4f}", f"{ndcg:.4f}"]


def test_a_model_worse_than_popularity_is_warned_of():
    data = {"user": np.arange(200) % NUM_USERS, "movie": np.where(np.arange(200) % 10, 7, 3)}
    model = make_model()
    model.candidate_tower.build(None)
    # Film 7 is opposite to all users.
    model.query_tower.build(None)
    model.query_tower.set_weights([np.ones((NUM_USERS, 4))])
    model.candidate_tower.set_weights([np.where(np.arange(NUM_MOVIES)[:, None] == 7, -1.0, 1.0) * np.ones(4)])
    model.compile(keras.optimizers.SGD(0.0))
    with pytest.warns(UserWarning, match=r"The model ranks worse than the popularity.*val_ndcg_at_5="):
        model.fit(data, validation_data=data, verbose=0)


def test_queries_are_evaluated_by_popularity():
    model = make_model()
    model.fit(TRAIN, seen="training", verbose=0)
    ranks = naive_popularity_ranks(TEST, SEEN)
    users = np.unique(TEST["user"])
    positives = group_candidate_ids(TEST["user"], TEST["movie"], users)
    expected = np.mean([reference.recall(ranks[TEST["user"] == user], 5) for user in users])
    assert model.evaluate_queries(users, positives, by_popularity=True)["recall_at_5"] == pytest.approx(expected)


def test_evaluation_by_popularity_needs_a_trained_model():
    with pytest.raises(ValueError, match="not trained by `fit`"):
        make_model().evaluate_queries([1], [[1]], by_popularity=True)


# What is known of the training data.


def add(data, number, queries, candidates, present=None, positive=None, unknown=None):
    everything, nothing = np.ones(len(candidates), bool), np.zeros(len(candidates), bool)
    data.add(
        number,
        queries,
        candidates,
        everything if present is None else np.array(present, bool),
        everything if positive is None else np.array(positive, bool),
        nothing if unknown is None else np.array(unknown, bool),
    )


def test_the_longest_pass_counts():
    data = TrainingData()
    data.begin(seen=True)
    # Keras looks at the first batch, and starts again.
    add(data, 0, [1, 2], [5, 6])
    add(data, 0, [1, 2], [5, 6])
    add(data, 1, [1], [7])
    assert [x.tolist() for x in data.counts] == [[5, 6, 7], [1, 1, 1]]
    # A second epoch that has just begun.
    add(data, 0, [2], [6])
    assert [x.tolist() for x in data.counts] == [[5, 6, 7], [1, 1, 1]]
    data.end()
    add(data, 0, [9], [9])
    assert data.seen([1, 2, 9]).tolist() == [[5, 7], [6, -1], [-1, -1]]
    assert data.trained_queries.tolist() == [1, 2]
    assert data.seen([]).shape == (0, 1)


def test_later_trainings_add_to_what_is_known():
    data = TrainingData()
    for candidates in ([5, 6, 6], [6, 4], []):
        data.begin(seen=True)
        add(data, 0, list(range(len(candidates))), candidates)
        data.end()
    assert [x.tolist() for x in data.counts] == [[4, 5, 6], [1, 1, 3]]
    assert data.trained_queries.tolist() == [0, 1, 2]
    loaded = TrainingData()
    loaded.take_arrays(data.to_arrays())
    assert [x.tolist() for x in loaded.counts] == [[4, 5, 6], [1, 1, 3]]
    loaded.take_arrays({})
    assert not loaded.has_seen
    assert not loaded.counts[0].size


def test_absent_rows_unknown_queries_and_other_labels_are_left_out():
    data = TrainingData()
    data.begin(seen=True)
    add(data, 0, [1, 2, 3, 0], [5, 6, 7, 8], present=[1, 0, 1, 1], positive=[0, 1, 1, 1], unknown=[0, 0, 0, 1])
    data.end()
    assert [x.tolist() for x in data.counts] == [[7, 8], [1, 1]]
    assert data.trained_queries.tolist() == [1, 3]
    assert data.seen([0, 1, 2, 3]).tolist() == [[-1], [5], [-1], [7]]


def test_widths_of_seen_candidates_are_powers_of_two():
    data = TrainingData()
    data.add_seen(np.repeat([1, 2], [5, 1]), [1, 2, 3, 4, 5, 9])
    assert data.seen([1, 2]).shape == (2, 8)
    assert data.seen([2]).shape == (1, 1)
    assert data.seen([1], kept_ids=[[4, -1]]).tolist() == [[1, 2, 3, -1, 5, -1, -1, -1]]
    assert data.seen([-(2**31), 2**31 - 1]).tolist() == [[-1], [-1]]


def test_negative_and_extreme_ids_are_kept():
    data = TrainingData()
    data.add_seen([-(2**31), 2**31 - 1, -5], [2**31 - 1, -(2**31), -7])
    assert data.seen([-5, 2**31 - 1, -(2**31)]).tolist() == [[-7], [-(2**31)], [2**31 - 1]]


def test_all_rows_of_weight_0_leave_nothing_known():
    model = make_model()
    model.fit(TRAIN, sample_weight=np.zeros(60), seen="training", verbose=0)
    assert (model.recommend(np.arange(NUM_USERS), k=NUM_MOVIES).ids >= 0).all()
    with pytest.raises(ValueError, match="not trained by `fit`"):
        model.evaluate_queries([1], [[1]], by_popularity=True)


def test_weights_of_another_model_come_with_what_it_knows(tmp_path):
    fresh, model = make_model(), make_model()
    fresh.train_on_batch(TRAIN)
    fresh.save_weights(tmp_path / "fresh.weights.h5")
    model.fit(TRAIN, seen="training", verbose=0)
    model.load_weights(tmp_path / "fresh.weights.h5")
    assert (model.recommend(np.arange(NUM_USERS), k=NUM_MOVIES).ids >= 0).all()


def test_popularity_counts_positives():
    data = {**TRAIN, "rating": np.where(TRAIN["movie"] == 3, 0.0, 1.0)}
    model = make_model(label="rating")
    model.fit(data, verbose=0)
    ids, counts = model.model_inputs.training_data.counts
    assert 3 in TRAIN["movie"]
    assert 3 not in ids
    assert counts.sum() == (TRAIN["movie"] != 3).sum()
