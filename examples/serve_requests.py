"""Requests for recommendations, read from URLs and JSON, with an error for each that a model cannot answer."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Iterable
from reprlib import repr as shortened
from typing import Any

import numpy as np
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException

from keras_rs_contrib import TwoTowerModel

KINDS = {str: "strings", int: "integers of 64 bits", float: "numbers", bool: "bools"}
ONE_VALUE = ((), (1,))


def refusal(rule: str, received: str, fix: str, status: int = 400) -> HTTPException:
    """Returns the error that answers a request."""
    return HTTPException(status, f"{rule} Received: {received}. {fix}")


def parse(text: str | bytes) -> Any:
    """Returns the value of JSON. Raises `ValueError` for all that is not JSON, such as NaN, which Python reads."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@dataclasses.dataclass
class Request:
    """A request that has been read.

    Attributes:
        features: `[num_users, ...]` arrays by name.
        k: how many candidates to return.
        exclude_ids: a list of ids or names for each user.
        time: when it was read, in seconds of the event loop.
        answer: the future of its answer, a dict for each user.
    """

    features: dict[str, np.ndarray]
    k: int
    exclude_ids: list[list]
    time: float
    answer: asyncio.Future

    def __len__(self) -> int:
        """The number of users."""
        return len(self.exclude_ids)


@dataclasses.dataclass
class Values:
    """The values that a parameter takes.

    Attributes:
        name: the name of the parameter.
        types: the types of its values. Arrays have the last one.
        shape: the shape for one user.
        padding: what fills up short lists from the left, or nothing.
    """

    name: str
    types: tuple[type, ...]
    shape: tuple[int, ...] = ()
    padding: tuple[int | None, ...] = ()

    @classmethod
    def of_feature(cls, model: TwoTowerModel, name: str, feature: str, shape: tuple, dtype: str) -> "Values":
        """Returns the values of a feature of a model: names if it has a vocabulary, and otherwise of a dtype."""
        if feature in model.vocabularies:
            kind = type(model.vocabularies[feature].names[0])
            # With a vocabulary, lists of names may be padded.
            return cls(name, (kind,), shape, () if shape in ONE_VALUE else (None if kind is str else -1,))
        return cls(name, (int,) if "int" in dtype else (bool,) if dtype == "bool" else (int, float), shape)

    def read(self, text: str) -> Any:
        """Returns a value in a URL, or the text if it is not one."""
        if str in self.types:
            return text
        with contextlib.suppress(ValueError):
            value = parse(text)
            return value if type(value) in self.types else text
        return text

    def array(self, values: list) -> np.ndarray:
        """Returns the values of users as an array, `[num_users, *shape]`."""
        rows = values
        if self.padding:
            rows = [[*self.padding * (self.shape[0] - len(x)), *x] if isinstance(x, list) else x for x in values]
        array = np.array(rows, object)
        if self.shape == (1,) and array.ndim == 1:
            array = array[:, None]
        types = {type(each) for each in array.flat}
        if array.shape[1:] == self.shape and types <= {*self.types, *map(type, self.padding)}:
            with contextlib.suppress(OverflowError):
                return array if str in self.types else array.astype(self.types[-1])
        kind, length = KINDS[self.types[-1]], f"up to {self.shape[0]}" if self.padding else str(list(self.shape))
        kind = kind if self.shape in ONE_VALUE else f"lists of {length} {kind}"
        raise refusal(f"`{self.name}` must hold {kind}.", shortened(values), "Change it, or leave the user out.")


class Reader:
    """Reads requests for a model.

    Args:
        model: the model.
        max_users: the largest number of users of a request.
        max_k: the largest k.
        max_exclude_ids: the largest number of excluded ids of a user.
    """

    def __init__(self, model: TwoTowerModel, max_users: int, max_k: int, max_exclude_ids: int) -> None:
        known = (model.get_build_config() or {}).get("features", {})
        names = [model.query_features] if isinstance(model.query_features, str) else list(model.query_features)
        names += [] if model.query_id in (None, *names) else [model.query_id]
        kinds = {name: known.get(name, ((), "int32")) for name in names}
        self.features = {
            name: Values.of_feature(model, name, name, tuple(shape), dtype) for name, (shape, dtype) in kinds.items()
        }
        self.excluded = Values.of_feature(model, "exclude_ids", model.candidate_id, (), "int32")
        self.k, self.max_k = min(model.retrieval.k, max_k), max_k
        self.max_users, self.max_exclude_ids = max_users, max_exclude_ids
        reserved = {"k", "exclude", "exclude_ids"} & set(names)
        if reserved:
            raise ValueError(f"Features must not be named {sorted(reserved)}, as parameters are. Rename them.")

    def from_url(self, query: QueryParams) -> Request:
        """Returns the request for one user in the parameters of a URL."""
        self._check_names(query, "exclude")
        parameters: dict[str, Any] = {}
        for name in query:
            texts, values = query.getlist(name), self.features.get(name)
            if name == "exclude":
                texts = [each for text in texts for each in text.split(",") if each]
                parameters["exclude_ids"] = [[self.excluded.read(text) for text in texts]]
            elif values is not None and values.shape not in ONE_VALUE:
                parameters[name] = [[values.read(text) for text in texts]]
            elif len(texts) > 1:
                raise refusal(f"A URL takes `{name}` once.", f"{len(texts)} of them", "Use POST for several users.")
            elif name == "k":
                parameters[name] = Values(name, (int,)).read(texts[0])
            elif values is not None:
                parameters[name] = [values.read(texts[0])]
        return self._request(parameters)

    def from_body(self, body: bytes) -> Request:
        """Returns the request in a body of JSON."""
        try:
            parameters = parse(body)
        except ValueError as error:
            raise refusal("A body must be JSON.", str(error), "Correct it.") from error
        if not isinstance(parameters, dict):
            fix = f'Pass {{"{next(iter(self.features))}": [...]}}.'
            raise refusal("A body must be an object.", shortened(parameters), fix)
        self._check_names(parameters, "exclude_ids")
        for name in self.features:
            if not isinstance(parameters[name], list):
                rule = f"`{name}` must be a list, with a value for each user."
                raise refusal(rule, shortened(parameters[name]), "Pass a list, also for one user.")
        return self._request(parameters)

    def _check_names(self, names: Iterable[str], exclude: str) -> None:
        """Raises the error of names that are unknown or missing. That of excluded ids depends."""
        allowed = [*self.features, "k", exclude]
        for name in names:
            if name not in allowed:
                raise refusal(f"Parameters must be among {allowed}.", shortened(name), "Drop it, or correct its name.")
        for name in self.features:
            if name not in names:
                raise refusal(f"A request needs the features {list(self.features)}.", f"no {name!r}", "Add it.")

    def _request(self, given: dict[str, Any]) -> Request:
        """Returns the request of parameters whose features are lists, with a value for each user."""
        k = given.get("k", self.k)
        if type(k) is not int or not 1 <= k <= self.max_k:
            raise refusal(f"`k` must be an integer from 1 to {self.max_k}.", f"k={shortened(k)}", "Change it.")
        sizes = {name: len(given[name]) for name in self.features}
        number = max(sizes.values())
        if len(set(sizes.values())) > 1:
            raise refusal("Each feature needs a value for each user.", f"numbers of values {sizes}", "Add the others.")
        if not 1 <= number <= self.max_users:
            rule = f"A request must be for 1 to {self.max_users} users."
            raise refusal(rule, f"{number} users", "Send several requests, or none.")
        features = {name: values.array(given[name]) for name, values in self.features.items()}
        rows = given.get("exclude_ids", [[]] * number)
        if not isinstance(rows, list) or len(rows) != number or not all(isinstance(row, list) for row in rows):
            rule = f"`exclude_ids` must be a list of {number} lists, one for each user."
            raise refusal(rule, shortened(rows), "Pass [] for a user without any.")
        longest = max(map(len, rows))
        if longest > self.max_exclude_ids:
            rule = f"A request may exclude up to {self.max_exclude_ids} ids for each user."
            raise refusal(rule, f"{longest} ids", "Pass fewer.")
        rows = [self.excluded.array(row).tolist() for row in rows]
        loop = asyncio.get_running_loop()
        return Request(features, k, rows, loop.time(), loop.create_future())
