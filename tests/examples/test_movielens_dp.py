"""The example as a user runs it, with its flags and files. Tests that need no separate process call `main`."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from test_movielens import movielens, prepared

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "movielens_dp.py"
SYNTHETIC = ("--dataset=synthetic", "--embedding_dim=4")


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "KERAS_BACKEND")}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture
def main(monkeypatch):
    """A function that runs the program in this process, and returns its exit code or message."""
    import movielens_dp

    def call(*arguments):
        with flagsaver.flagsaver():
            remaining = flags.FLAGS(["movielens_dp", *arguments])
            with pytest.raises(SystemExit) as end:
                movielens_dp.main(remaining)
        return end.value.code

    monkeypatch.setattr(sys, "argv", ["movielens_dp"])
    monkeypatch.setattr(movielens_dp, "choose_devices", lambda: jax.devices()[: flags.FLAGS.num_devices])
    return call


@pytest.mark.slow
def test_it_trains_recommends_saves_and_reports_the_same_losses_on_2_and_3_devices(main, tmp_path):
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
    assert "predicting the mean rating for every pair gives 0.1" in result.stdout
    assert "The loaded model recommends the same films." in result.stdout
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
    # On 3 devices, over which the batches do not divide.
    again = tmp_path / "3 devices.json"
    assert main(*SYNTHETIC, "--epochs=2", "--num_devices=3", "--users=5", "--k=1682", f"--metrics_json={again}") is None
    on_three = json.loads(again.read_text())
    for name in ("loss", "val_loss"):
        assert on_three["history"][name] == pytest.approx(metrics["history"][name], abs=1e-4)
    # Films that the user has rated are excluded.
    data = movielens.synthetic(42)
    rated = set(data.movie_ids[data.user_ids == 5].tolist())
    assert sorted(on_three["recommendations"][0]["movie_ids"]) == sorted(set(range(1, 1683)) - rated)


@pytest.mark.slow
def test_after_enough_epochs_it_recommends_films_of_the_users_taste(tmp_path):
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
    # With --include_seen, as in the tutorial, films that the user has rated are included.
    data = movielens.synthetic(42)
    rated = set(zip(data.user_ids.tolist(), data.movie_ids.tolist(), strict=True))
    recommendations = json.loads(file.read_text())["recommendations"]
    assert any((each["user"], movie) in rated for each in recommendations for movie in each["movie_ids"])


@pytest.mark.slow
def test_retrieval_is_better_than_popularity(main, tmp_path):
    """With sampling probabilities from counts, and with probabilities learned on two devices."""
    files = [tmp_path / "1.json", tmp_path / "2.json"]
    retrieval = ("--dataset=synthetic", "--objective=retrieval", "--epochs=2", "--embedding_dim=32")
    result = run(*retrieval, "--num_devices=1", f"--metrics_json={files[0]}")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "this model (retrieval)" in result.stdout
    code = main(*retrieval, "--sampling_correction=streaming", "--num_devices=2", f"--metrics_json={files[1]}")
    assert code is None
    for file in files:
        metrics = json.loads(file.read_text())
        assert metrics["user_metrics"]["ndcg_at_10"] > 1.5 * metrics["popularity_metrics"]["ndcg_at_10"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--users=944",), "--users: user '944' does not exist. Users are numbered 1 to 943."),
        (("--users=",), "--users: the list is empty. Users are numbered 1 to 943."),
        (("--k=1683",), "--k=1683: there are only 1682 films. Use a smaller k."),
        (("--model_path=model.h5",), "must end in .keras"),
        (
            ("--model_path=/nowhere/model.keras",),
            "no file can be written there. Use a path in an existing, writable directory.",
        ),
        (("--model_path=same.keras", "--metrics_json=same.keras"), "both are same.keras. Use two different files."),
        (("--sampling_correction=counts",), "it has no effect with --objective=rating. Drop it"),
    ],
)
def test_invalid_flags_end_the_program_before_training(arguments, words, main, capsys):
    assert words in main(*SYNTHETIC, *arguments)
    assert "Epoch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--learning_rate=nan", "must be positive and finite"), ("--temperature=0", "must be positive and finite")],
)
def test_flags_that_must_be_positive_and_finite_are_checked(argument, words, main):
    with pytest.raises(flags.IllegalFlagValueError, match=words):
        main(*SYNTHETIC, argument)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "words"),
    [("--num_devices=100000", "--num_devices=100000"), ("epochs=3", "Unknown argument 'epochs=3'")],
)
def test_an_error_is_one_line_and_an_exit_status(argument, words):
    """For an error of a flag's own check, and for one of the program."""
    result = run(*SYNTHETIC, argument)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Epoch" not in result.stdout


@pytest.mark.slow
def test_diverging_training_stops_after_the_epoch(main, tmp_path):
    file = tmp_path / "metrics.json"
    message = main(*SYNTHETIC, "--epochs=9", "--learning_rate=1e30", "--num_devices=2", f"--metrics_json={file}")
    assert "The loss must be finite. Received: loss=" in message
    assert "in epoch 1" in message
    assert "--learning_rate=1e+30" in message
    assert not file.exists()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_8_devices_on_fewer_cores_complete_and_a_full_disk_loses_only_the_metrics():
    """In each of 400 steps, 8 devices wait for each other on the threads of a few cores."""
    result = run(*SYNTHETIC, "--epochs=1", "--num_devices=8", "--batch_size=200", "--metrics_json=/dev/full")
    assert result.returncode == 1, result.stderr
    assert "--metrics_json=/dev/full: No space left on device. Everything else is complete." in result.stderr
    assert result.stdout.count("Recommended to user") == 3
    assert result.stdout.count("SYNTHETIC") == 2


def test_unavailable_movielens_is_an_error(main, monkeypatch, tmp_path):
    monkeypatch.setattr(movielens, "MOVIELENS_HOST", "http://127.0.0.1:9/")
    message = main("--dataset=movielens", f"--data_dir={tmp_path}")
    assert f"not prepared in {tmp_path}" in message
    assert "Use --dataset=auto to continue with synthetic data." in message


@prepared
@pytest.mark.movielens
@pytest.mark.slow
def test_movielens_trains_like_the_tutorial(tmp_path):
    """The first loss is that of the tutorial: scores are near 0, and the mean of the squared ratings is 0.478."""
    file = tmp_path / "metrics.json"
    result = run("--epochs=2", "--num_devices=2", f"--metrics_json={file}")
    assert result.returncode == 0, result.stderr
    metrics = json.loads(file.read_text())
    assert metrics["dataset"] == "movielens"
    assert metrics["history"]["loss"][0] == pytest.approx(0.478, abs=0.002)
    assert metrics["history"]["loss"] == sorted(metrics["history"]["loss"], reverse=True)


@prepared
@pytest.mark.movielens
@pytest.mark.slow
def test_movielens_has_a_high_ndcg_after_a_few_epochs(tmp_path):
    """NDCG@10 of popularity is 0.21 to 0.22, of EASE 0.44, and of all epochs 0.45."""
    file = tmp_path / "metrics.json"
    result = run("--objective=retrieval", "--epochs=5", "--num_devices=1", "--seed=0", f"--metrics_json={file}")
    assert result.returncode == 0, result.stderr
    assert json.loads(file.read_text())["user_metrics"]["ndcg_at_10"] > 0.43
