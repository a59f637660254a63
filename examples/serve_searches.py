"""Searches for requests that wait at the same time: as many as fit into one search share it."""

import asyncio
import collections
import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from serve_requests import Request, refusal
from starlette.exceptions import HTTPException

from keras_rs_contrib import TwoTowerModel

# More requests are refused, rather than answered late.
MAX_WAITING = 4096


class Searches:
    """Gathers requests, and searches for them in a thread of its own.

    Args:
        model: the model that recommends.
        max_users: the largest number of users of a search.
        max_wait: how long a request waits for others, in seconds.
        refuses_unknown: whether a request with a user that the model does not know is an error.

    Attributes:
        is_ready: whether all sizes are compiled.
        counts: numbers of requests and searches.
    """

    def __init__(self, model: TwoTowerModel, max_users: int, max_wait: float, refuses_unknown: bool) -> None:
        self.model, self.max_users, self.max_wait = model, max_users, max_wait
        self.refuses_unknown = refuses_unknown
        self.is_ready = False
        self.counts = {"requests": 0, "searches": 0}
        self._waiting: collections.deque[Request] = collections.deque()
        self._num_waiting = 0
        self._arrived, self._filled = asyncio.Event(), asyncio.Event()

    async def answer(self, request: Request) -> list[dict]:
        """Returns the answer to a request, once it has been searched for."""
        if len(self._waiting) >= MAX_WAITING:
            raise refusal("Requests wait for a search.", f"{MAX_WAITING} that wait already", "Try again later.", 503)
        self._waiting.append(request)
        self._count(len(request))
        return await request.answer

    def _count(self, number: int) -> None:
        """Notes that a number of users wait, or, if it is negative, no longer do."""
        self._num_waiting += number
        for event, least in ((self._arrived, 1), (self._filled, self.max_users)):
            event.set() if self._num_waiting >= least else event.clear()

    async def run(self, max_k: int, max_exclude_ids: int) -> None:
        """Compiles for requests up to these sizes, and then answers them until it is cancelled."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        warm_up = functools.partial(self.model.warm_up, self.max_users, max_exclude_ids, k=max_k, verbose=1)
        await loop.run_in_executor(thread, warm_up)
        self.is_ready = True
        print("Ready.", flush=True)
        while True:
            await self._arrived.wait()
            with contextlib.suppress(TimeoutError):
                # Those that have waited for another search do not wait again.
                async with asyncio.timeout_at(self._waiting[0].time + self.max_wait):
                    await self._filled.wait()
            requests = [self._next()]
            while self._waiting and sum(map(len, requests)) + len(self._waiting[0]) <= self.max_users:
                requests.append(self._next())
            self.counts["requests"] += len(requests)
            answers = await loop.run_in_executor(thread, self._search, requests)
            for request, answer in zip(requests, answers, strict=True):
                if request.answer.done():
                    # It was cancelled, too long after SIGTERM.
                    continue
                if isinstance(answer, Exception):
                    request.answer.set_exception(answer)
                else:
                    request.answer.set_result(answer)

    def _next(self) -> Request:
        self._count(-len(self._waiting[0]))
        return self._waiting.popleft()

    def _search(self, requests: list[Request]) -> list[list[dict] | Exception]:
        """Returns the answers to requests, or their errors. An error halves them, until it is that of one."""
        self.counts["searches"] += 1
        features = {name: np.concatenate([each.features[name] for each in requests]) for name in requests[0].features}
        exclude_ids = [ids for each in requests for ids in each.exclude_ids]
        k = max(each.k for each in requests)
        try:
            found = self.model.recommend(features, k, exclude_ids=exclude_ids if any(exclude_ids) else None, verbose=0)
        except (TypeError, ValueError) as error:
            if len(requests) == 1:
                return [HTTPException(400, str(error))]
            middle = len(requests) // 2
            return self._search(requests[:middle]) + self._search(requests[middle:])
        except Exception as error:
            return [error] * len(requests)
        # What comes after the last candidate is padding.
        lengths = np.isfinite(found.scores).cumprod(axis=1).sum(axis=1)
        users = zip(found.ids.tolist(), found.scores.tolist(), lengths, found.are_popular, strict=True)
        return [self._as_json(each.k, [next(users) for _ in range(len(each))]) for each in requests]

    def _as_json(self, k: int, users: list[tuple]) -> list[dict] | Exception:
        """Returns the answer to a request, of users: ids, scores, number of ids, and whether they are unknown."""
        unknown = [place for place, user in enumerate(users) if user[3]]
        if unknown and self.refuses_unknown:
            return refusal("The model must know all users.", f"an unknown user in place {unknown[0]}", "Drop it.", 404)
        return [
            {"ids": ids[: min(k, length)], "scores": scores[: min(k, length)], "is_popular": bool(is_popular)}
            for ids, scores, length, is_popular in users
        ]
