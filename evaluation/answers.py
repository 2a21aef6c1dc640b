"""Answers of a language model, kept in a file as they come: an evaluation that was interrupted goes on after them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

#: Requests that are answered between two times of writing.
AT_ONCE = 1024


class Remembering:
    """A language model of lm-eval that looks first among its answers of before.

    Args:
        model: lm-eval's `LM`.
        path: file of the answers, which are of this model alone.
        told: called with how many of how many requests are answered.
    """

    def __init__(self, model: Any, path: Path, told: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.model = model
        self.path = path
        self.told = told
        self._known: dict[str, Any] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:  # it was killed while writing
                os.truncate(path, len(whole))
            for line in whole.splitlines():
                key, answer = json.loads(line)
                self._known[key] = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See lm-eval's `LM`."""
        return [(number, greedy) for number, greedy in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See lm-eval's `LM`."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See lm-eval's `LM`."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        keys = [hashlib.sha256(json.dumps([kind, *request.args]).encode()).hexdigest()[:32] for request in requests]
        new: dict[str, Instance] = {}
        for key, request in zip(keys, requests, strict=True):
            if key not in self._known:
                new.setdefault(key, request)
        left = list(new.items())
        for first in range(0, len(left), AT_ONCE):
            self.told(len(requests) - len(left) + first, len(requests))
            some = left[first : first + AT_ONCE]
            answers = getattr(self.model, kind)([request for _, request in some], disable_tqdm=True)
            found = dict(zip((key for key, _ in some), answers, strict=True))
            with self.path.open("a") as file:
                file.write("".join(json.dumps(pair) + "\n" for pair in found.items()))
            self._known.update(found)
        self.told(len(requests), len(requests))
        return [self._known[key] for key in keys]
