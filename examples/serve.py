r"""Serves a saved `TwoTowerModel` over HTTP. Requests that arrive at about the same time share one search.

    python examples/serve.py --model_path=model.keras --port=8000
    curl 'localhost:8000/recommend?user_id=42&k=10&exclude=1,2'
    curl localhost:8000/recommend --data '{"user_id": [42, 7], "k": 10, "exclude_ids": [[1, 2], []]}'

Parameters have the names of the features that the model knows, here `user_id`. A feature that is a list, such as a
history, repeats its parameter in a URL. Names with commas are excluded by POST. `/healthz` answers 503 until all sizes
of searches are compiled, and then 200 with the numbers of requests and searches.
"""

import asyncio
import os
import signal
import socket
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import movielens
from absl import app, flags, logging

from keras_rs_contrib import TwoTowerModel, load_model

try:
    import uvicorn
    from serve_requests import Reader, refusal
    from serve_searches import Searches
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request as HttpRequest
    from starlette.responses import JSONResponse
    from starlette.routing import Route
except ImportError as error:
    sys.exit(f'{error}. This example needs more packages: pip install ".[serve]".')

# For clients that do not send the rest of their request after SIGTERM.
SECONDS_TO_FINISH = 20

FLAGS = flags.FLAGS
flags.DEFINE_string("model_path", None, "The .keras file of the model.", required=True)
flags.DEFINE_string("host", "127.0.0.1", "Address to listen on, such as 0.0.0.0 for all networks.")
flags.DEFINE_integer("port", 8000, "Port to listen on; 0 for a free one.", lower_bound=0, upper_bound=65535)
flags.DEFINE_float("max_wait_ms", 2.0, "How long a request waits for others to share a search.", lower_bound=0.0)
flags.DEFINE_integer("max_batch", 64, "The largest number of users of a request, and of a search.", lower_bound=1)
flags.DEFINE_integer("max_k", 50, "The largest k of a request.", lower_bound=1)
flags.DEFINE_integer("max_exclude_ids", 32, "The largest number of ids to exclude for a user.", lower_bound=0)
flags.DEFINE_integer("max_body_bytes", 1 << 20, "The largest size of a body.", lower_bound=1)
flags.DEFINE_enum(
    "unknown", "popular", ["popular", "404"], "What users get that the model does not know: popular items, or a 404."
)


async def read_body(request: HttpRequest) -> bytes:
    """Returns the body of a request, or raises its error as soon as it is too large."""
    body, most = b"", FLAGS.max_body_bytes
    size = request.headers.get("content-length", "0")
    stream = request.stream()
    while len(body) <= most and int(size) <= most and (chunk := await anext(stream, b"")):
        body += chunk
    if max(len(body), int(size)) > most:
        received = f"{max(len(body), int(size))} bytes or more"
        raise refusal(f"A body may have up to {most} bytes.", received, "Send several requests.", 413)
    return body


def make_app(searches: Searches, reader: Reader) -> Starlette:
    """Returns the application."""

    async def health(_: HttpRequest) -> JSONResponse:
        status = "ready" if searches.is_ready else "warming up"
        return JSONResponse({"status": status, **searches.counts}, 200 if searches.is_ready else 503)

    async def recommend(request: HttpRequest) -> JSONResponse:
        if not searches.is_ready:
            raise refusal("The server must be ready.", "a request during the warm-up", "Wait for /healthz.", 503)
        if request.method == "POST":
            body = await read_body(request)
            return JSONResponse({"recommendations": await searches.answer(reader.from_body(body))})
        return JSONResponse((await searches.answer(reader.from_url(request.query_params)))[0])

    async def explain(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    routes = [Route("/healthz", health), Route("/recommend", recommend, methods=["GET", "POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: explain})


async def serve(server: uvicorn.Server, listening: socket.socket, searches: Searches, max_k: int) -> None:
    """Answers requests until a signal, or raises what makes searches fail, such as an error of the warm-up."""
    searching = asyncio.create_task(searches.run(max_k, FLAGS.max_exclude_ids))
    searching.add_done_callback(lambda _: setattr(server, "should_exit", True))
    await server.serve([listening])
    await searching


def main(argv: list[str]) -> None:
    """Loads the model, and serves it until SIGTERM."""
    if len(argv) > 1:
        sys.exit(f"Unknown argument {argv[1]!r}: flags start with --.")
    if not FLAGS["verbosity"].present:
        # At the default level of absl, JAX logs many messages that do not help here.
        logging.set_verbosity(logging.WARNING)
    # uvicorn handles SIGTERM first, and raises it again once all requests are answered. A warm-up cannot be cancelled.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    movielens.import_tensorflow_quietly()
    try:
        model = load_model(FLAGS.model_path)
        if not isinstance(model, TwoTowerModel) or model.retrieval is None:
            raise ValueError(
                f"It must be a `TwoTowerModel` with an index. Received: {model.name!r}. Save such a model."
            )
        max_k = min(FLAGS.max_k, model.retrieval.num_candidates)
        reader = Reader(model, FLAGS.max_batch, max_k, FLAGS.max_exclude_ids)
        searches = Searches(model, FLAGS.max_batch, FLAGS.max_wait_ms / 1000, FLAGS.unknown == "404")
        config = uvicorn.Config(
            make_app(searches, reader),
            FLAGS.host,
            FLAGS.port,
            log_level="warning",
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
        listening = config.bind_socket()
        # From here on, clients wait instead of being refused.
        listening.listen(config.backlog)
        print(f"Warming up, on http://{FLAGS.host}:{listening.getsockname()[1]}.", flush=True)
        asyncio.run(serve(uvicorn.Server(config), listening, searches, max_k))
    except (TypeError, ValueError) as error:
        sys.exit(f"--model_path={FLAGS.model_path}: {error}")


if __name__ == "__main__":
    try:
        app.run(main)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
