"""The example server, in a process of its own, as a client sees it; and how it reads requests."""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

from keras_rs_contrib import HistoryTower, TwoTowerModel, Vocabulary

for package in ("starlette", "uvicorn", "httpx"):
    pytest.importorskip(package, reason=f'the server needs {package}: pip install ".[test]"')

import httpx  # noqa: E402
from starlette.datastructures import QueryParams  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from serve_requests import Reader  # noqa: E402
from serve_searches import Searches  # noqa: E402

# The program is the same on all versions of Keras; the package is tested on each.
pytestmark = pytest.mark.slow

NUM_USERS, NUM_ITEMS, LENGTH = 20, 30, 3
MAX_BATCH, MAX_EXCLUDED = 8, 4
LIMITS = (f"--max_batch={MAX_BATCH}", "--max_k=10", f"--max_exclude_ids={MAX_EXCLUDED}", "--max_body_bytes=2000")


@pytest.fixture(scope="module")
def model():
    """A model of users with histories, all of them names."""
    keras.utils.set_random_seed(0)
    users, items = Vocabulary([f"u{i}" for i in range(NUM_USERS)]), Vocabulary([f"i{i}" for i in range(NUM_ITEMS)])
    table, user_table = keras.layers.Embedding(NUM_ITEMS + 1, 8), keras.layers.Embedding(NUM_USERS + 1, 8)
    tower = HistoryTower(table, "history", query_table=user_table, query_feature="user", mask_zero=True)
    names = {"user": users, "history": items, "item": items}
    model = TwoTowerModel(tower, table, ["user", "history"], "item", query_id="user", vocabularies=names)
    model.compile("adam")
    rows = np.arange(60)
    histories = [[f"i{(row + each) % NUM_ITEMS}" for each in range(LENGTH)] for row in rows]
    # The popularity of items differs.
    watched = [f"i{int(row**0.8)}" for row in rows]
    model.fit(
        {"user": [f"u{row % NUM_USERS}" for row in rows], "history": histories, "item": watched},
        seen="training",
        verbose=0,
    )
    return model


class Server:
    """The server in a process."""

    def __init__(self, model, folder):
        model.save(folder / "model.keras")
        inherited = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "KERAS_BACKEND")}
        self.log = folder / "stderr"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, EXAMPLES / "serve.py", f"--model_path={folder / 'model.keras'}", "--port=0", *LIMITS,
                 "--max_wait_ms=200"],
                stdout=subprocess.PIPE, stderr=log, text=True, env={**inherited, "JAX_LOG_COMPILES": "1"},
            )  # fmt: skip

    def wait(self):
        """Waits until the server is ready, and notes what it answers before."""
        self.port = int(re.search(r"http://127.0.0.1:(\d+)\.", self.line_with("Warming up"))[1])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        # The compilations take seconds.
        self.first_answers = [self.client.get(path) for path in ("/healthz", "/recommend?user=u1&history=i1")]
        self.line_with("Ready.")
        self.num_compiled = self.count_compilations()

    def line_with(self, text):
        for line in self.process.stdout:
            # The bar is drawn over itself, in colours.
            assert len(re.sub(r"\x1b\[\d*m", "", re.split("[\b\r]", line)[-1])) <= 80
            if text in line:
                return line
        raise AssertionError(self.log.read_text())

    def count_compilations(self):
        return self.log.read_text().count("Finished XLA compilation")

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        if hasattr(self, "client"):
            self.client.close()


@pytest.fixture(scope="module")
def servers(model, tmp_path_factory):
    """The running server, or nothing."""
    running = []

    def start():
        if not running or running[-1].process.poll() is not None:
            running.append(Server(model, tmp_path_factory.mktemp("server")))
            running[-1].wait()
        return running[-1]

    yield start
    for server in running:
        server.end()


@pytest.fixture
def server(servers):
    return servers()


def strict(response):
    """The JSON of a response, which holds neither NaN nor infinities."""

    def refuse(text):
        raise AssertionError(text)

    return json.loads(response.text, parse_constant=refuse)


def expected(model, user, history, k, exclude_ids=()):
    """What the model recommends, without padding."""
    history = [None] * (LENGTH - len(history)) + history
    found = model.recommend({"user": [user], "history": [history]}, k, exclude_ids=[list(exclude_ids)])
    number = int(np.isfinite(found.scores[0]).sum())
    return found.ids[0].tolist()[:number], found.scores[0][:number], bool(found.are_popular[0])


def assert_answer(answer, of_model):
    ids, scores, is_popular = of_model
    assert answer["ids"] == ids
    np.testing.assert_allclose(answer["scores"], scores, rtol=1e-4)
    assert answer["is_popular"] is is_popular


def test_until_all_is_compiled_the_server_is_not_healthy(server):
    assert [each.status_code for each in server.first_answers] == [503, 503]
    assert server.first_answers[0].json()["status"] == "warming up"
    assert "Received: a request during the warm-up." in server.first_answers[1].json()["error"]
    health = server.client.get("/healthz")
    assert (health.status_code, health.json()["status"]) == (200, "ready")


def test_requests_at_once_share_searches_and_get_the_answers_of_the_model(server, model):
    rng = np.random.default_rng(0)
    requests = []
    for number in range(32):
        history = [f"i{each}" for each in rng.integers(0, NUM_ITEMS, 1 + number % LENGTH)]
        excluded = [f"i{each}" for each in rng.integers(0, NUM_ITEMS, number % (MAX_EXCLUDED + 1))]
        # Some users are unknown, with a history and without.
        user, history = ("nobody", ["nothing"]) if number % 9 == 8 else (f"u{number % (NUM_USERS + 2)}", history)
        requests.append((user, history, 1 + number % 10, excluded))
    before = server.client.get("/healthz").json()

    def ask(request):
        user, history, k, excluded = request
        return server.client.get(
            "/recommend", params={"user": user, "history": history, "k": k, "exclude": ",".join(excluded)}
        )

    with ThreadPoolExecutor(33) as threads:
        # The model refuses an empty name, and the other users of that search get their answers.
        bad = threads.submit(ask, ("", ["i1"], 3, []))
        answers = list(threads.map(ask, requests))
    assert bad.result().status_code == 400
    assert "A name must not be empty." in bad.result().json()["error"]
    for answer, request in zip(answers, requests, strict=True):
        assert answer.status_code == 200, answer.text
        assert_answer(strict(answer), expected(model, *request))
    assert any(answer.json()["is_popular"] for answer in answers)
    after = server.client.get("/healthz").json()
    assert after["requests"] - before["requests"] == 33
    assert after["searches"] - before["searches"] < 32
    assert server.count_compilations() == server.num_compiled > 0


def test_one_request_for_many_users_gets_the_answers_of_the_model(server, model):
    users, histories = ["u1", "nobody", "u3"], [["i1", "i2", "i3"], [], ["i7"]]
    excluded = [["i4", "i5"], ["i0"], []]
    answer = server.client.post(
        "/recommend", json={"user": users, "history": histories, "k": 7, "exclude_ids": excluded}
    )
    assert answer.status_code == 200, answer.text
    for each, *request in zip(strict(answer)["recommendations"], users, histories, [7] * 3, excluded, strict=True):
        assert_answer(each, expected(model, *request))
    assert server.count_compilations() == server.num_compiled


ERRORS = [
    ("GET", "user=u1", 400, r"needs the features \['user', 'history'\]. Received: no 'history'. Add it."),
    ("GET", "user=u1&history=i1&film=3", 400, r"must be among \['user', 'history', 'k', 'exclude'\]. Received: 'film'"),
    ("GET", "user=u1&user=u2&history=i1", 400, r"A URL takes `user` once. Received: 2 of them. Use POST"),
    ("GET", "user=u1&history=i1&history=i2&history=i3&history=i4", 400, "lists of up to 3 strings. Received"),
    ("GET", "user=u1&history=i1&k=0", 400, "`k` must be an integer from 1 to 10. Received: k=0. Change it."),
    ("GET", "user=u1&history=i1&k=11", 400, "Received: k=11"),
    ("GET", "user=u1&history=i1&k=ten", 400, "Received: k='ten'"),
    ("GET", "user=u1&history=i1&exclude=a,b,c,d,e", 400, "up to 4 ids for each user. Received: 5 ids. Pass fewer."),
    ("GET", "user=u1&history=i1&exclude_ids=i1", 400, "Received: 'exclude_ids'. Drop it"),
    ("POST", b"", 400, "A body must be JSON. Received: Expecting value"),
    ("POST", b"\xff", 400, "A body must be JSON. Received: 'utf-8' codec"),
    ("POST", b"[" * 1999, 400, "A body must be JSON. Received: "),
    ("POST", b'{"user": ["u1"], "k": NaN}', 400, "A body must be JSON. Received: NaN is not JSON."),
    ("POST", b"[1]", 400, r'A body must be an object. Received: \[1\]. Pass {"user": \[...\]}'),
    ("POST", b" " * 2001, 413, "may have up to 2000 bytes. Received: 2001 bytes or more. Send several requests."),
    ("POST", iter([b" " * 1500] * 2), 413, "may have up to 2000 bytes. Received: 3000 bytes or more."),
    ("POST", {"user": "u1"}, 400, "`user` must be a list, with a value for each user. Received: 'u1'."),
    ("POST", {"user": [1]}, 400, r"`user` must hold strings. Received: \[1\]."),
    ("POST", {"user": [None]}, 400, r"Received: \[None\]"),
    ("POST", {"user": ["u1", ["u2"]]}, 400, "`user` must hold strings."),
    ("POST", {"user": {"a": 1}}, 400, "`user` must be a list"),
    ("POST", {"user": [{"a": 1}]}, 400, "`user` must hold strings."),
    ("POST", {"user": []}, 400, "for 1 to 8 users. Received: 0 users."),
    ("POST", {"user": ["u1"] * 9}, 400, "for 1 to 8 users. Received: 9 users. Send several requests"),
    ("POST", {"user": ["u1"], "history": [[], []]}, 400, "Received: numbers of values {'user': 1, 'history': 2}"),
    ("POST", {"user": ["u1"], "history": ["i1"]}, 400, "`history` must hold lists of up to 3 strings."),
    ("POST", {"user": ["u1"], "k": True}, 400, "Received: k=True"),
    ("POST", {"user": ["u1"], "k": 2.0}, 400, "Received: k=2.0"),
    ("POST", {"user": ["u1"], "exclude_ids": ["i1"]}, 400, r"a list of 1 lists, one for each user. Received: \['i1'\]"),
    ("POST", {"user": ["u1"], "exclude_ids": [["i1"], []]}, 400, r"Received: \[\['i1'\], \[\]\]. Pass \[\]"),
    ("POST", {"user": ["u1"], "exclude_ids": [[1]]}, 400, r"`exclude_ids` must hold strings. Received: \[1\]"),
    ("DELETE", None, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize(("method", "content", "status", "message"), ERRORS, ids=range(len(ERRORS)))
def test_what_cannot_be_answered_gets_a_clear_error(server, method, content, status, message):
    if method == "GET":
        answer = server.client.get(f"/recommend?{content}")
    elif isinstance(content, dict):
        users = content["user"] if isinstance(content["user"], list) else []
        answer = server.client.post("/recommend", json={"history": [[]] * len(users), **content})
    else:
        answer = server.client.request(method, "/recommend", content=content)
    assert answer.status_code == status, answer.text
    assert re.search(message, strict(answer)["error"]), answer.text


def test_requests_in_flight_are_answered_after_sigterm(server, model):
    address = ("127.0.0.1", server.port)
    body = json.dumps({"user": ["u1"], "history": [["i2"]], "k": 3}).encode()
    head = f"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head.encode())
        # The server has begun to read the request.
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionError):
            while True:
                socket.create_connection(address, timeout=60).close()
        connection.sendall(body)
        answer = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    found = json.loads(answer.partition(b"\r\n\r\n")[2])["recommendations"]
    assert_answer(found[0], expected(model, "u1", ["i2"], 3))
    assert server.process.wait(60) == 0


def test_a_file_that_is_not_such_a_model_is_an_exit_status(tmp_path):
    (tmp_path / "text.keras").write_text("text")
    keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "plain.keras")
    messages = {"text": "`load_model` needs an intact `.keras` file.", "plain": "It must be a `TwoTowerModel`"}
    commands = {name: [sys.executable, EXAMPLES / "serve.py", f"--model_path={name}.keras"] for name in messages}
    programs = {name: subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
                for name, command in commands.items()}  # fmt: skip
    for name, program in programs.items():
        _, errors = program.communicate(timeout=300)
        assert program.returncode == 1
        assert errors.splitlines()[-1].startswith(f"--model_path={name}.keras: {messages[name]}")
        assert "Traceback" not in errors


def in_loop(function, *arguments):
    """The result of a function that needs an event loop."""

    async def run():
        return function(*arguments)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def numbers():
    """A reader for a model of ids and of other numbers."""
    keras.utils.set_random_seed(0)
    inputs = {
        "user": keras.Input((), dtype="int32", name="user"),
        "age": keras.Input((1,), name="age"),
        "taste": keras.Input((2,), name="taste"),
    }
    tower = keras.layers.Concatenate()([keras.layers.Embedding(5, 8)(inputs["user"]), inputs["age"], inputs["taste"]])
    tower = keras.Model(inputs, keras.layers.Dense(4)(tower))
    model = TwoTowerModel(tower, keras.layers.Embedding(9, 4), ["user", "age", "taste"], "item")
    model({"user": np.arange(2), "age": np.ones((2, 1), "float32"), "taste": np.ones((2, 2), "float32"),
           "item": np.arange(2)})  # fmt: skip
    return Reader(model, max_users=4, max_k=5, max_exclude_ids=3)


def test_numbers_are_read_from_urls_and_bodies(numbers):
    url = in_loop(numbers.from_url, QueryParams("user=3&age=41&taste=1&taste=0.5&k=2&exclude=7,8&exclude=1"))
    body = {"user": [3], "age": [41.0], "taste": [[1, 0.5]], "k": 2, "exclude_ids": [[7, 8, 1]]}
    for request in (url, in_loop(numbers.from_body, json.dumps(body).encode())):
        assert (request.k, request.exclude_ids) == (2, [[7, 8, 1]])
        for name, value, dtype in [
            ("user", [3], "int64"),
            ("age", [[41]], "float64"),
            ("taste", [[1, 0.5]], "float64"),
        ]:
            np.testing.assert_array_equal(request.features[name], np.array(value, dtype), strict=True)
    assert in_loop(numbers.from_url, QueryParams("user=3&age=41&taste=1&taste=2")).exclude_ids == [[]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": [1.0]}, r"`user` must hold integers of 64 bits. Received: \[1.0\]."),
        ({"user": [True]}, r"Received: \[True\]."),
        ({"user": ["1"]}, r"Received: \['1'\]."),
        ({"user": [2**70]}, "must hold integers of 64 bits. Received: "),
        ({"age": [10**400]}, "`age` must hold numbers. Received: "),
        ({"age": [[1, 2]]}, "`age` must hold numbers."),
        ({"taste": [[1]]}, r"`taste` must hold lists of \[2\] numbers. Received: \[\[1\]\]."),
        ({"taste": [[1, None]]}, r"lists of \[2\] numbers."),
        ({"exclude_ids": [["i1"]]}, "`exclude_ids` must hold integers of 64 bits."),
    ],
)
def test_values_of_the_wrong_type_are_errors(numbers, changes, message):
    body = {"user": [3], "age": [41], "taste": [[1, 2]], **changes}
    with pytest.raises(HTTPException, match=message):
        in_loop(numbers.from_body, json.dumps(body).encode())


@pytest.mark.parametrize("text", ["3.0", "x", "NaN", "1e999", "[1]", "true", "", "1_0"])
def test_texts_that_are_not_integers_are_errors(numbers, text):
    with pytest.raises(HTTPException, match=f"`user` must hold integers of 64 bits. Received: ..{re.escape(text)}"):
        in_loop(numbers.from_url, QueryParams({"user": text, "age": "1", "taste": "1"}))


def test_features_must_not_have_names_of_other_parameters():
    model = TwoTowerModel(keras.layers.Embedding(5, 4), keras.layers.Embedding(9, 4), "k", "item")
    with pytest.raises(ValueError, match=r"must not be named \['k'\]"):
        Reader(model, max_users=4, max_k=5, max_exclude_ids=3)


def test_unknown_users_may_be_errors(model):
    reader = Reader(model, MAX_BATCH, 10, MAX_EXCLUDED)

    async def ask():
        searches = Searches(model, MAX_BATCH, 0.01, refuses_unknown=True)
        running = asyncio.create_task(searches.run(10, MAX_EXCLUDED))
        bodies = [{"user": users, "history": [[]] * len(users)} for users in (["u1", "nobody"], ["u1"])]
        requests = [reader.from_body(json.dumps(body).encode()) for body in bodies]
        answers = await asyncio.gather(*map(searches.answer, requests), return_exceptions=True)
        running.cancel()
        return answers, searches.counts

    (error, answer), counts = asyncio.run(ask())
    assert error.status_code == 404
    assert "The model must know all users. Received: an unknown user in place 1." in error.detail
    assert_answer(answer[0], expected(model, "u1", [], 10))
    assert counts == {"requests": 2, "searches": 1}
