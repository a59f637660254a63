"""The example as a user runs it: its own process, its flags, its files."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_movielens import movielens, prepared

SCRIPT = pathlib.Path(__file__).parent.parent / "examples" / "movielens_dp.py"
SYNTHETIC = ("--dataset=synthetic", "--embedding_dim=4")


def run(*flags):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "KERAS_BACKEND")}
    return subprocess.run(
        [sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.slow
def test_it_trains_recommends_saves_and_reports(tmp_path):
    model, metrics_file = tmp_path / "model.keras", tmp_path / "metrics.json"
    result = run(
        *SYNTHETIC, "--epochs=2", "--num_devices=2", "--users=42,7", "--k=3", "--device_mesh",
        f"--model_path={model}", f"--metrics_json={metrics_file}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    beginning, *_, end = result.stdout.split("SYNTHETIC")
    assert "Epoch" not in beginning
    assert "Recommended" not in end
    assert result.stdout.count("SYNTHETIC") == 2
    assert result.stderr == ""
    assert "Recommended to user 42 (taste" in result.stdout
    assert "the mean rating predicted for every pair has 0.1" in result.stdout
    assert "loaded again, it recommends the same" in result.stdout
    assert result.stdout.count("the most popular films") == 2
    assert "this model (rating)" in result.stdout
    assert model.exists()
    metrics = json.loads(metrics_file.read_text())
    assert metrics["dataset"] == "synthetic"
    assert metrics["num_devices"] == 2
    assert (metrics["flags"]["epochs"], metrics["flags"]["users"]) == (2, ["42", "7"])
    assert {"keras", "keras-rs", "jax", "python"} <= set(metrics["versions"])
    assert len(metrics["history"]["loss"]) == 2
    assert metrics["validation_epochs"] == [2]
    assert len(metrics["history"]["val_loss"]) == 1
    for name in ("recall_at_10", "ndcg_at_10", "mean_reciprocal_rank"):
        assert metrics["user_metrics"][name] == metrics["history"][f"val_user_{name}"][-1]
        assert 0 < metrics["popularity_metrics"][name] < 1
    assert set(metrics["seconds"]) == {"data", "training", "recommending", "saving and loading"}
    assert [r["user"] for r in metrics["recommendations"]] == [42, 7]
    for recommendation in metrics["recommendations"]:
        assert len(recommendation["movie_ids"]) == 3
        assert 0 not in recommendation["movie_ids"]
        assert all(title in result.stdout for title in recommendation["titles"])


@pytest.mark.slow
def test_the_number_of_devices_changes_no_figure(tmp_path):
    """Of batches that divide over 1 device, and not over 3."""
    histories = []
    for num_devices in (1, 3):
        file = tmp_path / f"{num_devices}.json"
        result = run(*SYNTHETIC, "--epochs=2", f"--num_devices={num_devices}", f"--metrics_json={file}")
        assert result.returncode == 0, result.stderr
        histories.append(json.loads(file.read_text())["history"])
    for name in ("loss", "val_loss"):
        assert histories[1][name] == pytest.approx(histories[0][name], abs=1e-4)


@pytest.mark.slow
def test_trained_long_enough_it_recommends_films_of_ones_taste(tmp_path):
    file = tmp_path / "metrics.json"
    users = ",".join(str(user) for user in range(1, 101))
    result = run(
        "--dataset=synthetic", "--epochs=20", "--learning_rate=1", "--num_devices=1", f"--users={users}",
        "--include_seen", f"--metrics_json={file}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    own = result.stdout.split("Recommended to user")[1:]
    assert len(own) == 100
    right = 0
    for block in own:
        taste = block.split("(taste ")[1][0]
        right += sum(f"(taste {taste})" in line for line in block.splitlines()[1:])
    assert right > 0.8 * 10 * len(own)
    # As in the tutorial, which it was asked for, what a user has rated is among them.
    data = movielens.synthetic(42)
    rated = set(zip(data.user_ids.tolist(), data.movie_ids.tolist(), strict=True))
    recommendations = json.loads(file.read_text())["recommendations"]
    assert any((each["user"], movie) in rated for each in recommendations for movie in each["movie_ids"])


@pytest.mark.slow
def test_retrieval_recommends_better_than_popularity_and_ratings(tmp_path):
    """With probabilities known beforehand, and learned on several devices."""
    metrics = []
    for flags in (("--num_devices=1",), ("--sampling_correction=streaming", "--num_devices=2")):
        file = tmp_path / "metrics.json"
        result = run(
            "--dataset=synthetic", "--objective=retrieval", "--epochs=4", "--embedding_dim=32", *flags,
            f"--metrics_json={file}",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert "this model (retrieval)" in result.stdout
        metrics.append(json.loads(file.read_text()))
    for each in metrics:
        assert each["user_metrics"]["ndcg_at_10"] > 1.5 * each["popularity_metrics"]["ndcg_at_10"]


@pytest.mark.slow
def test_what_a_user_has_rated_is_left_out(tmp_path):
    file = tmp_path / "metrics.json"
    result = run(*SYNTHETIC, "--epochs=1", "--num_devices=1", "--users=5", "--k=1682", f"--metrics_json={file}")
    assert result.returncode == 0, result.stderr
    recommended = json.loads(file.read_text())["recommendations"][0]["movie_ids"]
    data = movielens.synthetic(42)
    rated = set(data.movie_ids[data.user_ids == 5].tolist())
    assert sorted(recommended) == sorted(set(range(1, 1683)) - rated)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--users=944",), "no user '944'. Users are numbered 1 to 943."),
        (("--users=",), "no user is named"),
        (("--k=1683",), "there are 1682 films"),
        (("--model_path=model.h5",), "must end in .keras"),
        (("--model_path=/nowhere/model.keras",), "no file can be written there"),
        (("--model_path=same.keras", "--metrics_json=same.keras"), "Name two files"),
        (("--num_devices=100000",), "--num_devices=100000"),
        (("--learning_rate=nan",), "must be positive and finite"),
        (("--temperature=0",), "must be positive and finite"),
        (("--sampling_correction=counts",), "it has no effect with --objective=rating"),
        (("epochs=3",), "Unknown argument 'epochs=3'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(flags, words):
    result = run(*SYNTHETIC, *flags)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Epoch" not in result.stdout


@pytest.mark.slow
def test_training_that_diverges_ends_after_the_epoch(tmp_path):
    file = tmp_path / "metrics.json"
    result = run(*SYNTHETIC, "--epochs=9", "--learning_rate=1e30", f"--metrics_json={file}")
    assert result.returncode == 1
    assert "The loss must be a number. Received: loss=" in result.stderr
    assert "in epoch 1" in result.stderr
    assert "--learning_rate=1e+30" in result.stderr
    assert "Traceback" not in result.stderr
    assert not file.exists()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_costs_the_metrics_alone():
    result = run(*SYNTHETIC, "--epochs=1", "--metrics_json=/dev/full")
    assert result.returncode == 1
    assert "--metrics_json=/dev/full: No space left on device. All else is done." in result.stderr
    assert result.stdout.count("Recommended to user") == 3
    assert result.stdout.count("SYNTHETIC") == 2


@pytest.mark.slow
def test_small_batches_on_more_devices_than_cores_go_through():
    """800 steps, in each of which 8 devices wait for one another on the threads of a few cores."""
    result = run(*SYNTHETIC, "--epochs=1", "--num_devices=8", "--batch_size=100")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_movielens_that_is_not_to_be_had_is_an_error(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import movielens;"
        "movielens.MOVIELENS_HOST = 'http://127.0.0.1:9/'; sys.argv[0] = 'movielens_dp.py';"
        "import movielens_dp; movielens_dp.app.run(movielens_dp.main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "--dataset=movielens", f"--data_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"not prepared in {tmp_path}" in result.stderr
    assert "--dataset=auto goes on without it" in result.stderr


@prepared
@pytest.mark.movielens
@pytest.mark.slow
def test_movielens_trains_as_the_tutorial_does(tmp_path):
    """The tutorial's first losses: those of scores near 0, for the mean of the squared ratings is 0.478."""
    file = tmp_path / "metrics.json"
    result = run("--epochs=5", "--num_devices=2", f"--metrics_json={file}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(file.read_text())
    assert metrics["dataset"] == "movielens"
    assert metrics["history"]["loss"][0] == pytest.approx(0.478, abs=0.002)
    assert metrics["history"]["loss"] == sorted(metrics["history"]["loss"], reverse=True)


@prepared
@pytest.mark.movielens
@pytest.mark.slow
def test_movielens_is_recommended_well_after_a_few_epochs(tmp_path):
    """Popularity has 0.21 to 0.22, EASE 0.44, and all the epochs 0.45."""
    file = tmp_path / "metrics.json"
    result = run("--objective=retrieval", "--epochs=5", "--num_devices=1", "--seed=0", f"--metrics_json={file}")
    assert result.returncode == 0, result.stderr
    assert json.loads(file.read_text())["user_metrics"]["ndcg_at_10"] > 0.43
