"""What a user sees first: the README, the examples in docstrings, another backend."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import keras
import keras_rs
import numpy as np
import pytest

import keras_rs_contrib

ROOT = pathlib.Path(__file__).parent.parent


def python_blocks(text):
    return re.findall(r"```python\n(.*?)```", textwrap.dedent(text), flags=re.DOTALL)


@pytest.mark.slow
def test_the_quick_start_runs_as_printed(tmp_path):
    section = (ROOT / "README.md").read_text().split("## Quick start")[1]
    script = tmp_path / "quick_start.py"
    script.write_text(python_blocks(section)[0] + "print(scores.shape, movie_ids.shape)\n")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("(2, 3) (2, 3)\n")


@pytest.mark.parametrize("path", ["README.md", "examples/benchmarks/README.md"])
def test_the_python_blocks_run_in_order(path, tmp_path, monkeypatch):
    """Fragments, which contain `...`, are only parsed. Another test runs the quick start as a program."""
    monkeypatch.chdir(tmp_path)
    rows = [f"u{row % 47},film {row * row % 13},2024-01-{1 + row // 25:02d}" for row in range(500)]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,movie,time", *rows]))
    namespace = {}
    for block in python_blocks((ROOT / path).read_text()):
        ast.parse(block)
        if "..." not in block:
            exec(compile(block, path, "exec"), namespace)


PUBLIC = [
    "CrossBatchMemory",
    "DistributedTwoTowerTask",
    "EvaluateQueries",
    "HistoryTower",
    "MeanReciprocalRank",
    "MixedNegatives",
    "NDCGAtK",
    "RecallAtK",
    "RefreshCandidates",
    "RowSparseEmbedding",
    "ShardedEmbedding",
    "StreamingSamplingProbability",
    "TrainingCheckpoint",
    "TwoTowerModel",
    "Vocabulary",
    "group_candidate_ids",
    "load_model",
    "lookup_together",
    "pad_batches",
    "shard_candidates",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = python_blocks(getattr(keras_rs_contrib, name).__doc__.split("Example:")[1])
    exec(example, {"keras": keras, "keras_rs": keras_rs, "np": np, **vars(keras_rs_contrib)})


def test_every_public_name_is_documented_and_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for name in PUBLIC:
        assert name in readme
    for name in keras_rs_contrib.__all__:
        assert getattr(keras_rs_contrib, name).__doc__


@pytest.mark.slow
def test_another_backend_does_what_needs_no_devices():
    script = """
        import keras, keras_rs, numpy as np, sys
        from keras_rs_contrib import DistributedTwoTowerTask, NDCGAtK, StreamingSamplingProbability, TwoTowerModel
        from keras_rs_contrib import RowSparseEmbedding, pad_batches, shard_candidates
        assert keras.backend.backend() == "tensorflow"
        queries = np.eye(3, 4, dtype="float32")
        loss = DistributedTwoTowerTask(num_hard_negatives=2, remove_accidental_hits=True)(
            queries, queries, candidate_ids=np.array([1, 2, 1]), candidate_mask=np.array([True, True, False])
        )
        table = keras.layers.Embedding(3, 4, weights=queries)
        index = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), table, exclude_ids=[0])
        print(float(loss), index(queries)[1].numpy().tolist())
        wide = keras.layers.Embedding(30, 4, weights=np.ones((30, 4)))
        many = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), wide, exclude_ids=range(20))
        assert many(queries[:1])[1].numpy().tolist() == [[20, 21]]
        tower = keras.Sequential([keras.layers.Dense(4)])
        live = shard_candidates(keras_rs.layers.BruteForceRetrieval(k=2), tower, candidates=np.ones((5, 2)))
        try:
            live.refresh(np.ones((7, 2)))
        except NotImplementedError as error:
            assert "JAX" in str(error) and live.candidate_embeddings.shape == (5, 4)
        else:
            raise AssertionError
        assert index(queries, exclude_ids=[[1], [-1], [2]])[1].numpy().tolist() == [[2, -1], [1, 2], [1, -1]]
        for ranks in ([0, 3], [[1, -1], [0, 7]]):
            metric = NDCGAtK(3)
            metric.update_state(ranks)
            print(float(metric.result()), file=sys.stderr)
        sampling = StreamingSamplingProbability(4)
        assert sampling(np.array([3, 0, 3, 1]), training=True).numpy().tolist() == [0.5, 0.25, 0.5, 0.25]
        assert np.isnan(sampling(np.array([4]), candidate_mask=np.array([False])).numpy()[0])
        assert [len(sample_weight) for _, _, sample_weight in pad_batches(np.arange(5), 4)] == [8]
        model = TwoTowerModel(keras.layers.Embedding(3, 4), keras.layers.Embedding(3, 4), "a", "b")
        model.compile("adam")
        batch = {"a": np.arange(3), "b": np.arange(3)}
        for train in (model.fit, model.train_on_batch):
            try:
                train(batch)
            except NotImplementedError as error:
                assert "Training needs the JAX backend" in str(error)
            else:
                raise AssertionError
        assert index.ranks(queries, [1, 2, 0], exclude_ids=[[-1], [1], [-1]]).numpy().tolist() == [0, 0, 2**31 - 1]
        for limits in ({"include_ids": [2, 1]}, {"include_mask": [False, True, True]}):
            ranks = index.ranks(queries, [[1, -1], [1, 2], [1, 2]], **limits)
            assert ranks.numpy().tolist() == [[0, -1], [0, 1], [1, 0]]
        rows = keras.Sequential([RowSparseEmbedding(3, 4), keras.layers.Dense(1)])
        rows.compile("sgd", "mse")
        try:
            rows.fit(np.arange(3), np.ones(3), verbose=0)
        except NotImplementedError as error:
            assert "Training needs the JAX backend" in str(error)
        else:
            raise AssertionError
    """
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    loss, ids = result.stdout.split(" ", 1)
    # The third row is padding: each of the other two has one negative of score 0 and a positive of score 1.
    np.testing.assert_allclose(float(loss), np.log1p(np.exp(-1.0)), rtol=1e-5)
    assert ids.strip() == "[[1, 2], [1, 2], [2, 1]]"


@pytest.mark.slow
def test_importing_without_a_backend_says_what_to_set(tmp_path):
    script = """
        import importlib.abc, sys

        class NoTensorFlow(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] == "tensorflow":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTensorFlow())
        import keras_rs_contrib
    """
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment["KERAS_HOME"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False, env=environment
    )
    assert "ImportError: Keras needs its backend" in result.stderr
    assert "KERAS_BACKEND=jax" in result.stderr
