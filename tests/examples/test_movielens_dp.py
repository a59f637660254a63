"""The example as a user runs it: its own process, its flags, its files. What needs no process of its own runs here."""

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
    """The program as a function of its arguments, which returns what it exits with; its devices are those of here."""
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
def test_it_trains_recommends_saves_and_reports_and_more_devices_change_no_figure(main, tmp_path):
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
    # On devices over which the batches do not divide.
    again = tmp_path / "3 devices.json"
    assert main(*SYNTHETIC, "--epochs=2", "--num_devices=3", "--users=5", "--k=1682", f"--metrics_json={again}") is None
    on_three = json.loads(again.read_text())
    for name in ("loss", "val_loss"):
        assert on_three["history"][name] == pytest.approx(metrics["history"][name], abs=1e-4)
    # What a user has rated is left out.
    data = movielens.synthetic(42)
    rated = set(data.movie_ids[data.user_ids == 5].tolist())
    assert sorted(on_three["recommendations"][0]["movie_ids"]) == sorted(set(range(1, 1683)) - rated)


@pytest.mark.slow
def test_trained_long_enough_it_recommends_films_of_ones_taste(main, tmp_path, capsys):
    file = tmp_path / "metrics.json"
    users = ",".join(str(user) for user in range(1, 101))
    code = main(
        "--dataset=synthetic", "--epochs=20", "--learning_rate=1", "--num_devices=1", f"--users={users}",
        "--include_seen", f"--metrics_json={file}",
    )  # fmt: skip
    assert code is None
    own = capsys.readouterr().out.split("Recommended to user")[1:]
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
def test_retrieval_recommends_better_than_popularity_and_ratings(main, tmp_path):
    """With probabilities known beforehand, and learned on several devices."""
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
        (("--users=944",), "no user '944'. Users are numbered 1 to 943."),
        (("--users=",), "no user is named"),
        (("--k=1683",), "there are 1682 films"),
        (("--model_path=model.h5",), "must end in .keras"),
        (("--model_path=/nowhere/model.keras",), "no file can be written there"),
        (("--model_path=same.keras", "--metrics_json=same.keras"), "Name two files"),
        (("--sampling_correction=counts",), "it has no effect with --objective=rating"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(arguments, words, main, capsys):
    assert words in main(*SYNTHETIC, *arguments)
    assert "Epoch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--learning_rate=nan", "must be positive and finite"), ("--temperature=0", "must be positive and finite")],
)
def test_values_that_are_none_are_refused(argument, words, main):
    with pytest.raises(flags.IllegalFlagValueError, match=words):
        main(*SYNTHETIC, argument)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "words"),
    [("--num_devices=100000", "--num_devices=100000"), ("epochs=3", "Unknown argument 'epochs=3'")],
)
def test_a_refusal_is_a_line_and_a_status(argument, words):
    """Of a flag's own check, and of the program's."""
    result = run(*SYNTHETIC, argument)
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Epoch" not in result.stdout


@pytest.mark.slow
def test_training_that_diverges_ends_after_the_epoch(main, tmp_path):
    file = tmp_path / "metrics.json"
    message = main(*SYNTHETIC, "--epochs=9", "--learning_rate=1e30", "--num_devices=2", f"--metrics_json={file}")
    assert "The loss must be finite. Received: loss=" in message
    assert "in epoch 1" in message
    assert "--learning_rate=1e+30" in message
    assert not file.exists()


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_costs_the_metrics_alone_and_8_devices_on_fewer_cores_go_through():
    """800 steps, in each of which 8 devices wait for one another on the threads of a few cores."""
    result = run(*SYNTHETIC, "--epochs=1", "--num_devices=8", "--batch_size=100", "--metrics_json=/dev/full")
    assert result.returncode == 1, result.stderr
    assert "--metrics_json=/dev/full: No space left on device. All else is done." in result.stderr
    assert result.stdout.count("Recommended to user") == 3
    assert result.stdout.count("SYNTHETIC") == 2


def test_movielens_that_is_not_to_be_had_is_an_error(main, monkeypatch, tmp_path):
    monkeypatch.setattr(movielens, "MOVIELENS_HOST", "http://127.0.0.1:9/")
    message = main("--dataset=movielens", f"--data_dir={tmp_path}")
    assert f"not prepared in {tmp_path}" in message
    assert "--dataset=auto goes on without it" in message


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
