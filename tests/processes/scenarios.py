"""What several processes do together, and one process alone: as a program, one of the several."""

import functools
import os
import pathlib
import pickle
import resource
import signal
import sys
import traceback

if __name__ == "__main__":
    import jax

    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))

import keras
import keras_rs
import numpy as np

from keras_rs_contrib import (
    CrossBatchMemory,
    MixedNegatives,
    RowSparseEmbedding,
    StreamingSamplingProbability,
    TrainingCheckpoint,
    TwoTowerModel,
    load_model,
    shard_candidates,
)

# Batches of all sizes are padded to the same size, which compiles once.
NUM_USERS, NUM_MOVIES, NUM_ROWS, BATCH_SIZE = 20, 24, 94, 32
# Rows of the data of each of four processes: one has none, and one most of them.
PARTS = [0, 0, 10, 74, NUM_ROWS]
PART_BATCH_SIZE = 16
QUERIES = {"user": np.arange(7, dtype="int32")}
POSITIVES = [[0], [1, 5], [2], [3, 9], [4], [5], []]


def make_data():
    rng = np.random.default_rng(0)
    users, movies = rng.integers(0, NUM_USERS, NUM_ROWS), rng.integers(0, NUM_MOVIES, NUM_ROWS)
    return {"user": users.astype("int32"), "movie": movies.astype("int32")}


def rows_of(data, rows):
    return {name: values[rows] for name, values in data.items()}


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    @property
    def num_batches(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.batches[number]


def batches_of(data, size):
    return [rows_of(data, slice(start, start + size)) for start in range(0, len(data["user"]), size)]


def batches_of_all_parts(data):
    """The batches that four processes feed together, each with its own part, with rows of weight 0."""
    parts = [batches_of(rows_of(data, slice(*PARTS[i : i + 2])), PART_BATCH_SIZE) for i in range(4)]
    batches = []
    for step in range(max(map(len, parts))):
        together = [part[step] for part in parts if step < len(part)]
        x = {name: np.concatenate([each[name] for each in together]) for name in data}
        missing = 4 * PART_BATCH_SIZE - len(x["user"])
        weight = np.pad(np.ones(len(x["user"]), "float32"), (0, missing))
        batches.append(({name: np.pad(values, (0, missing)) for name, values in x.items()}, None, weight))
    return batches


def split_model():
    """Row-sparse tables, split over all devices, with a log-q correction and a cross-batch memory."""
    keras.utils.set_random_seed(1)
    towers = [RowSparseEmbedding(size, 8, mesh_axis="batch") for size in (NUM_USERS, NUM_MOVIES)]
    memory = CrossBatchMemory(64)
    model = TwoTowerModel(*towers, query_features="user", candidate_features="movie", cross_batch_memory=memory)
    model.compile(keras.optimizers.SGD(0.1))
    return model


def feature_model():
    """Replicated dense towers, the index of one of which is split, with mixed negatives."""
    keras.utils.set_random_seed(1)
    users, movies = (
        keras.Sequential([keras.layers.Embedding(size, 8), keras.layers.Dense(8)]) for size in (NUM_USERS, NUM_MOVIES)
    )
    index = keras_rs.layers.BruteForceRetrieval(k=5)
    index = shard_candidates(index, movies, candidates=np.arange(NUM_MOVIES), mesh_axis="batch")
    model = TwoTowerModel(
        users,
        movies,
        query_features="user",
        candidate_features="movie",
        candidate_id="movie",
        retrieval=index,
        mixed_negatives=MixedNegatives(StreamingSamplingProbability(NUM_MOVIES), 16, seed=3),
    )
    # Adam would make large steps of gradients that are rounding errors.
    model.compile(keras.optimizers.SGD(0.1))
    return model


def same_for_all(folder):
    """Trains on data that all processes have, and uses and saves the model."""
    import pandas as pd
    import tensorflow as tf

    data, model = make_data(), split_model()
    result = {
        "history": model.fit(data, batch_size=BATCH_SIZE, epochs=2, validation_data=data, seen="training").history
    }
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(BATCH_SIZE)
    datas = (data, pd.DataFrame(data), dataset, Batches(batches_of(data, BATCH_SIZE)))
    result["evaluate"] = [model.evaluate(each, batch_size=BATCH_SIZE, return_dict=True) for each in datas]
    scores, ids = model.predict(QUERIES)
    result["lists"] = [ids, model.recommend(QUERIES, exclude_seen=False).ids]
    result["scores"] = [scores, model.score(rows_of(data, slice(5)))]
    result["evaluate_queries"] = model.evaluate_queries(QUERIES, POSITIVES)
    result["train_on_batch"] = model.train_on_batch(rows_of(data, slice(30)), return_dict=True)
    path = folder / "several.keras"
    model.save(path)
    after = model.recommend(QUERIES).ids
    result["lists"] += [after, load_model(path).recommend(QUERIES).ids]
    result["weights"] = {weight.path: value for weight, value in zip(model.weights, model.get_weights(), strict=True)}
    return model, data, result


def own_for_each(folder, process=None):
    """Trains on a part of the data for each process, and uses the model. Without `process`, on all parts."""
    data, model = make_data(), feature_model()
    if process is None:
        batches, queries, positives = Batches(batches_of_all_parts(data)), QUERIES, POSITIVES
    else:
        data = rows_of(data, slice(*PARTS[process : process + 2]))
        rows = slice(2 * process, 2 * process + 2)
        batches, queries, positives = data, rows_of(QUERIES, rows), POSITIVES[rows]
    how = {"batch_size": PART_BATCH_SIZE, "shuffle": False} if process is not None else {"shuffle": False}
    result = {"history": model.fit(batches, epochs=2, validation_data=batches, seen="training", **how).history}
    result["evaluate"] = [model.evaluate(batches, batch_size=how.get("batch_size"), return_dict=True)]
    if process is not None:
        batches = Batches(batches_of(data, PART_BATCH_SIZE))
    result["evaluate"].append(model.evaluate(batches, return_dict=True))
    scores, ids = model.predict(queries)
    result["lists"] = [ids, model.recommend(queries).ids, model.recommend(queries, exclude_ids=positives).ids]
    result["scores"] = [scores, model.score({"user": queries["user"], "movie": queries["user"]})]
    result["evaluate_queries"] = model.evaluate_queries(queries, positives)
    # What the model knows of the data of all.
    result["known"] = [*model._training_data.counts, model._training_data.seen(np.arange(NUM_USERS))]
    return model, data, result


class Die(keras.callbacks.Callback):
    """Ends the last process as a signal that cannot be caught does, in the middle of an epoch."""

    def on_train_batch_begin(self, batch, logs=None):
        if self.model.optimizer.built and batch == 2 and self.epoch == 1 and jax.process_index():
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


def with_checkpoints(folder, dies):
    """Trains with checkpoints in each step, on shuffled data."""
    data, model = make_data(), split_model()
    callbacks = [TrainingCheckpoint(folder / "checkpoints", every_steps=1), *([Die()] if dies else [])]
    history = model.fit(data, batch_size=BATCH_SIZE, epochs=3, callbacks=callbacks, verbose=0).history
    return {"history": history, "weights": model.get_weights()}


class Fail(keras.callbacks.Callback):
    """Raises an error in a hook, in one process."""

    def __init__(self, hook, is_failing):
        super().__init__()
        self.is_failing = is_failing
        setattr(self, hook, self.fail)

    def fail(self, number, logs=None):
        if self.is_failing and number == 1:
            raise ValueError("A callback has failed.")


def errors_of(calls):
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
    return found


def with_errors(folder, model, data, process, num_processes):
    """What is raised if only one process does something wrong, and whether training goes on."""
    is_last, is_first = process == num_processes - 1, process == 0
    wrong = {**data, "movie": data["movie"].copy()}
    if is_last:
        wrong["movie"][-1] = NUM_MOVIES
    users = np.array([NUM_USERS if is_last else 1])
    calls = {
        "id": lambda: model.fit(wrong, batch_size=BATCH_SIZE, shuffle=False),
        "first id": lambda: split_model().fit(rows_of(wrong, slice(-3, None)), shuffle=False),
        "feature": lambda: model.evaluate({"user": data["user"], "film" if is_last else "movie": data["movie"]}),
        "predict": lambda: model.predict({"user": users}),
        "recommend": lambda: model.recommend({"user": users}),
        "save": lambda: model.save("/no/such/folder/model.keras"),
        "queries": lambda: model.recommend({"user": np.array([int(is_first)])}),
        "k": lambda: model.recommend(QUERIES, k=NUM_MOVIES + 1 if is_last else 1),
        "load": lambda: load_model(folder / ("no.keras" if is_last else "one.keras")),
        "methods": lambda: model.score(rows_of(data, slice(5))) if is_last else model.recommend(QUERIES),
    }
    for hook in ("on_train_batch_end", "on_epoch_begin", "on_test_batch_begin"):
        fit = functools.partial(model.fit, data, batch_size=BATCH_SIZE, epochs=2, validation_data=data)
        calls[hook] = functools.partial(fit, callbacks=[Fail(hook, is_last)])
    return errors_of(calls), model.fit(data, batch_size=BATCH_SIZE, shuffle=False).history


def with_failed_writes(folder, model, data, is_last):
    """How many checkpoints there are after a training in which the last process cannot write, and after another one."""
    counts, (limit, highest) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0 if is_last else limit, limit):
        # In bytes, of any file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, highest))
        checkpoints = TrainingCheckpoint(folder / "checkpoints", every_epochs=1)
        model.fit(data, batch_size=BATCH_SIZE, epochs=2, callbacks=[checkpoints])
        counts.append(len(list((folder / "checkpoints").glob("epoch-*"))))
    return counts


def main(folder):
    keras.distribution.initialize()
    process, num_processes = jax.process_index(), jax.process_count()
    own = sys.argv[3] == "own"
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=not own))
    if sys.argv[3] in ("dies", "resumes"):
        result = with_checkpoints(folder, sys.argv[3] == "dies")
    elif own:
        _, _, result = own_for_each(folder, process)
    else:
        # Another state of the generators by which Keras shuffles.
        np.random.seed(process)  # noqa: NPY002
        model, data, result = same_for_all(folder)
        result["lists"].append(load_model(folder / "one.keras").recommend(QUERIES).ids)
        result["errors"], result["after"] = with_errors(folder, model, data, process, num_processes)
        result["checkpoints"] = with_failed_writes(folder, model, data, process == num_processes - 1)
    (folder / f"{process}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    try:
        main(pathlib.Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        # At its end, JAX would wait for the other processes, which wait for this one.
        os._exit(1)
