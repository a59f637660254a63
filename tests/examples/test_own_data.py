"""The example for own data, as a user runs it. Its flags have the names of another example's, so it has a process."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PLAIN_MODEL = pathlib.Path(__file__).parents[1] / "files" / "plain.keras"
sys.path.insert(0, str(EXAMPLES))

import item_titles  # noqa: E402

# The program is the same on all versions of Keras; the package is tested on each.
pytestmark = pytest.mark.slow

# Runs the program several times, and returns for each its exit code or message, and what it has printed.
RUNS = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import own_data
from absl import flags
from absl.testing import flagsaver
results = []
for arguments in json.load(sys.stdin):
    printed = io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stdout(printed):
        try:
            code = own_data.main(flags.FLAGS(["own_data", *arguments]))
        except SystemExit as end:
            code = end.code
    results.append([code, printed.getvalue()])
print(json.dumps(results))
"""
COLUMNS = ("--user_column=user", "--item_column=movie")
TINY = ("--interactions=tiny.csv", *COLUMNS, "--time_column=time")
NUM_USERS, NUM_MOVIES, NUM_TASTES = 48, 40, 4


def environment():
    inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "KERAS_BACKEND")}
    return {**inherited, "JAX_NUM_CPU_DEVICES": "2", "NPROC": "16"}


def outcomes_of(folder, *runs):
    result = subprocess.run(
        [sys.executable, "-c", RUNS, EXAMPLES], input=json.dumps(runs), capture_output=True, text=True, check=False,
        cwd=folder, env=environment(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def rows_of_users():
    """Users who choose movies of their taste, one a day: `(user, movie, day)`."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(NUM_USERS):
        own = np.arange(user % NUM_TASTES, NUM_MOVIES, NUM_TASTES)
        rows += [(f"u{user}", f"m{movie}", 1 + day) for day, movie in enumerate(rng.permutation(own)[:8])]
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with files of interactions and titles."""
    folder = tmp_path_factory.mktemp("own_data")
    lines = [f"{user},{movie},2024-01-{day:02}T00:00:00,{1 + day % 5}" for user, movie, day in rows_of_users()]
    header = "user,movie,time,stars"
    later = [f"late,m{movie},2024-02-01T00:00:00,5" for movie in (1, 5, 9)]
    files = {
        "tiny.csv": [header, *lines],
        "faulty.csv": [header, *lines, ",m1,2024-01-01,3", "u1,m2,yesterday,3"],
        "later.csv": [header, *lines, *later],
        "titles.csv": ["movie,Title,year", *(f'm{movie},"Film, {movie}",2000' for movie in range(1, NUM_MOVIES))],
        "ambiguous.csv": ["movie,a,b", "m1,x,y"],
        "new_items.csv": ["user,movie,time", "ann,Heat,1", "bob,Up,1", "ann,Alien,2"],
        "same_time.csv": ["user,movie,time", "ann,Heat,1", "bob,Up,1"],
        "one.csv": ["user,movie", "ann,Heat"],
        "header.csv": ["user,movie"],
        "not_a_model.keras": ["text"],
    }
    for name, content in files.items():
        (folder / name).write_text("\n".join(content) + "\n")
    (folder / "empty.csv").write_text("")
    return folder


ERRORS = [
    ((), "--interactions: it must name a file to learn from"),
    (("tiny.csv",), "Unknown argument 'tiny.csv': flags start with --."),
    (("--interactions=tiny.csv", "--user_column=user"), "--item_column: it must name a column"),
    (("--interactions=tny.csv", *COLUMNS), "Did you mean 'tiny.csv' or"),
    (("--interactions=tiny.csv", "--user_column=usr", "--item_column=movie"), "Did you mean 'user'?"),
    (("--interactions=empty.csv", *COLUMNS), "which is empty"),
    (("--interactions=header.csv", *COLUMNS), "which has a header and no rows"),
    (("--interactions=one.csv", *COLUMNS), "Both parts of a split must have rows."),
    (
        ("--interactions=same_time.csv", *COLUMNS, "--time_column=time"),
        "all rows have the same time. Use --split=random.",
    ),
    (
        ("--interactions=new_items.csv", *COLUMNS, "--time_column=time"),
        "none of the rows for testing can be tested",
    ),
    (("--interactions=tiny.csv", *COLUMNS, "--split=time"), "--split=time: it needs the times of rows."),
    (("--interactions=tiny.csv", *COLUMNS, "--tower=history"), "--tower=history: it needs the times of rows."),
    ((*TINY, "--rating_column=stars"), "Pass both, or neither."),
    ((*TINY, "--rating_column=stars", "--minimum_rating=6"), "--minimum_rating=6.0: A row must have a rating"),
    ((*TINY, "--min_item=100"), "--min_item=100: Users with 1 rows and items with 100 rows must remain."),
    ((*TINY, "--users=u1,u99"), "--users: user 'u99' does not exist. There are 48 users, such as u"),
    ((*TINY, "--users="), "--users: the list is empty."),
    ((*TINY, "--k=41"), "--k=41: there are only 40 items. Use a smaller k."),
    ((*TINY, "--num_devices=1000"), "--num_devices=1000: JAX has only"),
    ((*TINY, "--titles=title.csv"), "--titles=title.csv: No such file or directory. Use another path."),
    ((*TINY, "--titles=ambiguous.csv"), "Name it with --title_column."),
    ((*TINY, "--titles=titles.csv", "--title_column=name"), "the columns ['movie', 'Title', 'year']"),
    ((*TINY, "--titles=titles.csv", "--titles_item_column=id"), "Received: 'id', and a file with the columns ['movie'"),
    ((*TINY, "--title_column=name"), "--title_column: it has no effect without --titles."),
    ((*TINY, "--model_path=model.h5"), "must end in .keras"),
    ((*TINY, "--model_path=nowhere/model.keras"), "no file can be written there"),
    ((*TINY, "--plots=tiny.csv"), "--plots=tiny.csv: "),
    ((*TINY, "--notrain"), "--recommend_for: a saved model needs users"),
    (("--recommend_for=u1",), "--model_path=recommender.keras: no such file. Train a model first"),
    (("--recommend_for=u1", "--model_path=not_a_model.keras"), "it cannot be loaded"),
    (("--recommend_for=u1", f"--model_path={PLAIN_MODEL}"), "it is not a model that this program has saved"),
    (("--recommend_for=",), "--recommend_for: the list is empty."),
    ((*TINY, "--recommend_for="), "--recommend_for: the list is empty."),
    (("--recommend_for=u1", "--epochs=2"), "--epochs: it has no effect without training."),
    (("--recommend_for=u1", "--sep=,"), "--sep: it has no effect without --interactions."),
]


@pytest.fixture(scope="module")
def errors(folder):
    return outcomes_of(folder, *(arguments for arguments, _ in ERRORS))


@pytest.mark.parametrize("number", range(len(ERRORS)), ids=lambda number: ERRORS[number][1][:40])
def test_errors_of_users_are_one_line_before_training(number, errors):
    message, printed = errors[number]
    assert isinstance(message, str), printed
    assert ERRORS[number][1] in message
    assert "\n" not in message
    assert "Epoch" not in printed


def test_an_error_is_an_exit_status(folder):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "own_data.py", "--interactions=tny.csv", *COLUMNS], capture_output=True, text=True,
        check=False, cwd=folder, env=environment(),
    )  # fmt: skip
    assert result.returncode == 1
    # Old versions of Keras warn when they are imported.
    assert result.stderr.splitlines()[-1].startswith("--interactions=tny.csv: `path` must be a file.")
    assert "Traceback" not in result.stderr


def lists_of(printed):
    """The recommended items, and what is said about the user, by user."""
    lists = {}
    for block in printed.split("\nRecommended to ")[1:]:
        heading, *lines = block.splitlines()
        user, _, note = heading.removesuffix(":").partition(",")
        ranked = [line.split(". ", 1)[1] for line in lines if ". " in line[:6]]
        lists[user] = (ranked, note)
    return lists


def tastes_of(ranked):
    return [int(item.split("  *")[0].removeprefix("Film, ").removeprefix("m")) % NUM_TASTES for item in ranked]


def test_a_recommender_learns_tastes_is_saved_and_answers(folder):
    training = ("--epochs=30", "--batch_size=32", "--embedding_dim=16", "--learning_rate=0.01")
    names_of_plots = ["epochs.png", "items.png", "recall_by_popularity.png"]
    has_matplotlib = True
    try:
        from matplotlib import pyplot
    except ImportError:
        has_matplotlib = False
    faulty = ("--interactions=faulty.csv", *TINY[1:])
    later = ("--notrain", "--interactions=later.csv", *TINY[1:])
    history = "--model_path=history.keras"
    (ids, asked, without_matplotlib, trained, alone, answered) = outcomes_of(
        folder,
        (*faulty, *training, "--users=u1,u2", "--k=2", "--titles=titles.csv", *(["--plots=plots"] * has_matplotlib)),
        ("--recommend_for=u1,nobody", "--k=2"),
        (*TINY, "--plots=plots") if not has_matplotlib else (),
        (*TINY, *training, "--tower=history", "--split=leave_last_out", history, "--k=2", "--num_devices=1"),
        ("--recommend_for=late", history, "--k=3"),
        (*later, "--recommend_for=late,u1", history, "--k=3"),
    )
    code, printed = ids
    assert code is None, code
    assert "Training on 2 cpu device(s), testing on 48 users." in printed
    assert "Invalid rows were skipped. 2 of 386 rows" in printed
    assert "384 rows, 48 users, 40 items, times 2024-01-01 00:00:00 to 2024-01-08 00:00:00." in printed
    assert "39 titles in titles.csv; 1 of 40 items have none." in printed
    # The last 2 of 8 days are closest to a fifth.
    assert "For testing (--split=time): 96 rows, 48 users" in printed
    epochs = [line for line in printed.splitlines() if line.startswith("Epoch")]
    assert len(epochs) == 30
    assert max(map(len, epochs)) <= 80
    values = {line.split()[0]: [float(x) for x in line.split()[-3:]] for line in printed.splitlines()
              if line.startswith(("  popularity ", "  this model "))}  # fmt: skip
    assert all(ours > 1.5 * theirs for ours, theirs in zip(values["this"], values["popularity"], strict=True))
    shown = lists_of(printed)
    last = {user: {f"Film, {movie[1:]}" for each, movie, day in rows_of_users() if each == user and day > 6}
            for user in ("u1", "u2")}  # fmt: skip
    for user, (ranked, note) in shown.items():
        assert note == ""
        assert tastes_of(ranked) == [int(user[1:]) % NUM_TASTES] * 2
        assert [item.endswith("  *") for item in ranked] == [item.split("  *")[0] in last[user] for item in ranked]
    if has_matplotlib:
        assert sorted(path.name for path in (folder / "plots").iterdir()) == names_of_plots
        assert {pyplot.imread(folder / "plots" / name).shape[1] for name in names_of_plots} == {1200}
    else:
        assert "it needs matplotlib" in without_matplotlib[0]

    code, printed = asked
    assert code is None, code
    answers = lists_of(printed)
    titled = [f"Film, {movie[1:]}" for movie in answers["u1"][0]]
    assert titled == [item.split("  *")[0] for item in shown["u1"][0]]
    assert answers["nobody"][1] == " who is unknown to the model: the most popular items"

    assert trained[0] is None, trained[0]
    assert "Training on 1 cpu device(s)" in trained[1]
    assert alone[0] is None, alone[0]
    assert lists_of(alone[1])["late"][1] == " who is unknown to the model: the most popular items"
    assert answered[0] is None, answered[0]
    answers = lists_of(answered[1])
    ranked, note = answers["late"]
    assert note == " who is unknown to the model: by its history"
    assert tastes_of(ranked) == [1, 1, 1]
    assert not {"m1", "m5", "m9"} & set(ranked)
    used = {movie for user, movie, _ in rows_of_users() if user == "u1"}
    assert not used & set(answers["u1"][0])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('movie,title\n1,"Heat, the film"\n2,Up\n', {}),
        ("year\tTITLE\tmovie\n1995\tHeat, the film\t1\n2009\tUp\t2\n", {}),
        ("movie:token\tmovie_title:token_seq\tclass:token_seq\n1\tHeat, the film\tCrime\n2\tUp\tFun\n", {}),
        ("movie;what\n1;Heat, the film\n2;Up\n3;\n", {}),
        ("movie|a|b\n1|x|Heat, the film\n2|y|Up\n", {"title_column": "b"}),
        ("1::Heat, the film::Crime\n2::Up::Fun\n", {"column_names": ["movie", "title", "genres"]}),
    ],
    ids=["CSV", "tabs", "RecBole", "only other column", "named", "no header"],
)
def test_titles_are_found(text, arguments, tmp_path):
    (tmp_path / "titles").write_text(text)
    assert item_titles.read_titles(tmp_path / "titles", "movie", **arguments) == {"1": "Heat, the film", "2": "Up"}


def test_titles_keep_quotes_and_encodings(tmp_path):
    (tmp_path / "titles").write_bytes('movie\tname\n1\t"Crocodile" Dundee\n2\tAm\xe9lie\n'.encode("latin-1"))
    titles = item_titles.read_titles(tmp_path / "titles", "movie", encoding="latin-1")
    assert titles == {"1": '"Crocodile" Dundee', "2": "Am\xe9lie"}


def test_principal_components_keep_the_distances_of_a_plane():
    pytest.importorskip("matplotlib")
    import own_data_plots

    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, 20)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    turned = circle @ np.linalg.qr(rng.normal(size=(5, 5)))[0][:2]
    points, shares = own_data_plots.principal_components(turned * rng.uniform(1, 2, (20, 1)))

    def distances(x):
        return np.linalg.norm(x[:, None] - x[None], axis=2)

    np.testing.assert_allclose(distances(points), distances(circle), atol=1e-12)
    assert shares.sum() == pytest.approx(1)
