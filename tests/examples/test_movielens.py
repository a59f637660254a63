import os
import pathlib
import sys
import time

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import movielens

prepared = pytest.mark.skipif(
    not list(pathlib.Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")).glob("movielens/100k-ratings/*")),
    reason="MovieLens 100K is not prepared under TFDS_DATA_DIR",
)


def test_synthetic_data_have_the_shape_of_movielens():
    ratings = movielens.synthetic(0)
    assert (ratings.source, ratings.num_users, ratings.num_movies) == ("synthetic", 943, 1682)
    assert ratings.user_ids.shape == ratings.movie_ids.shape == ratings.ratings.shape == (100_000,)
    pairs = ratings.user_ids.astype("int64") * 10_000 + ratings.movie_ids
    assert np.unique(pairs).size == 100_000
    assert (ratings.user_ids.min(), ratings.movie_ids.min()) == (1, 1)
    assert np.bincount(ratings.user_ids)[1:].min() >= 20
    assert set(np.unique(ratings.ratings)) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert (ratings.timestamps.shape, ratings.timestamps.dtype) == ((100_000,), np.int64)
    # From September 1997 to April 1998.
    assert (ratings.timestamps.min() // 86_400, ratings.timestamps.max() // 86_400) == (10_124, 10_338)
    popularity = np.sort(np.bincount(ratings.movie_ids, minlength=1683)[1:])[::-1]
    assert popularity[:168].sum() > 0.35 * 100_000
    assert popularity[841:].sum() < 0.25 * 100_000


def test_synthetic_data_have_planted_tastes():
    ratings = movielens.synthetic(0)
    match = ratings.user_tastes[ratings.user_ids] == ratings.movie_tastes[ratings.movie_ids]
    assert match.mean() > 0.4
    assert ratings.ratings[match].mean() - ratings.ratings[~match].mean() > 0.25


def test_synthetic_data_are_determined_by_the_seed():
    first, again, other = movielens.synthetic(3), movielens.synthetic(3), movielens.synthetic(4)
    np.testing.assert_array_equal(first.movie_ids, again.movie_ids)
    np.testing.assert_array_equal(first.timestamps, again.timestamps)
    np.testing.assert_array_equal(first.ratings, again.ratings)
    assert not np.array_equal(first.movie_ids, other.movie_ids)


def test_the_split_is_a_partition_determined_by_the_seed():
    ratings = movielens.synthetic(0)
    train, validation = movielens.split(ratings, 1)
    assert (len(train.ratings), len(validation.ratings)) == (80_000, 20_000)
    pairs = [r.user_ids.astype("int64") * 10_000 + r.movie_ids for r in (train, validation, ratings)]
    np.testing.assert_array_equal(np.sort(np.concatenate(pairs[:2])), np.sort(pairs[2]))
    times = np.concatenate([train.timestamps, validation.timestamps])[np.argsort(np.concatenate(pairs[:2]))]
    np.testing.assert_array_equal(times, ratings.timestamps[np.argsort(pairs[2])])
    np.testing.assert_array_equal(movielens.split(ratings, 1)[0].movie_ids, train.movie_ids)
    assert not np.array_equal(movielens.split(ratings, 2)[0].movie_ids, train.movie_ids)


def test_without_data_and_network_auto_continues_and_movielens_raises(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(movielens, "MOVIELENS_HOST", "http://127.0.0.1:9/")
    assert movielens.load("auto", str(tmp_path), seed=0).source == "synthetic"
    assert "Continuing with synthetic data." in capsys.readouterr().out
    with pytest.raises(movielens.MovieLensUnavailableError, match=f"not prepared in {tmp_path}"):
        movielens.load("movielens", str(tmp_path))


@pytest.mark.filterwarnings("default")
def test_damaged_files_raise(tmp_path):
    for name in movielens.DATASETS:
        directory = tmp_path / "movielens" / name / "0.1.1"
        directory.mkdir(parents=True)
        (directory / "dataset_info.json").write_text("{}")
    with pytest.raises(movielens.MovieLensUnavailableError, match=f"could not be read from {tmp_path}"):
        movielens.load("movielens", str(tmp_path))
    assert movielens.load("auto", str(tmp_path)).source == "synthetic"


def test_a_host_that_hangs_counts_as_unreachable(monkeypatch):
    def hang(*_, **__):
        time.sleep(1)
        raise OSError

    monkeypatch.setattr(movielens, "PROBE_SECONDS", 0.05)
    monkeypatch.setattr(movielens.urllib.request, "urlopen", hang)
    assert movielens._host_answers() is False


def test_the_latest_prepared_version_is_used(tmp_path):
    for version in ("0.1.9", "0.1.10", "0.2.0", "0.3.0.incomplete"):
        (tmp_path / version).mkdir()
    for version in ("0.1.9", "0.1.10", "0.3.0.incomplete"):
        (tmp_path / version / "dataset_info.json").touch()
    assert movielens._prepared_version(tmp_path).name == "0.1.10"
    assert movielens._prepared_version(tmp_path / "nothing") is None


@prepared
@pytest.mark.movielens
@pytest.mark.filterwarnings("default")
def test_movielens_is_read_completely():
    ratings = movielens.load("auto")
    assert (ratings.source, ratings.num_users, ratings.num_movies) == ("movielens", 943, 1682)
    assert len(ratings.ratings) == 100_000
    np.testing.assert_allclose(ratings.ratings.mean() * 4 + 1, 3.52986, atol=1e-5)
    assert ratings.titles[50] == "Star Wars (1977)"
    assert np.bincount(ratings.movie_ids)[50] == 583
    assert (ratings.timestamps.min(), ratings.timestamps.max()) == (874_724_710, 893_286_638)
    first_row = (ratings.user_ids == 196) & (ratings.movie_ids == 242)
    assert ratings.timestamps[first_row].tolist() == [881_250_949]
