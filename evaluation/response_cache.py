"""Answers of a language model, kept in a file as they come: an evaluation that was interrupted goes on after them."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from evaluation.tasks import TaskError

#: Requests that are answered between two times of writing.
AT_ONCE = 512


class EvaluationInterrupted(Exception):
    """An evaluation was told to stop; what was answered is kept."""


class Answers:
    """A file of answers. What cannot be read of it, or is of another model, is as if it were not there.

    Args:
        path: of the file.
        of: tells the model, and with which weights, from any other.

    Attributes:
        known: answers by request.
    """

    def __init__(self, path: Path, of: str) -> None:
        self.path = path
        self.of = of
        self.known: dict[str, Any] = {}
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        if lines[:1] == [_line({"of": of})]:
            for line in lines[1:]:
                try:
                    key, answer = json.loads(line)
                except (ValueError, TypeError):  # it was killed while writing
                    continue
                self.known[key] = answer
        self.forget()
        if self.known:
            self.add(self.known)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep answers."""
        with self.path.open("ab") as file:
            file.write(b"".join([] if file.tell() else [_line({"of": self.of})]) + b"".join(map(_line, found.items())))

    def forget(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


def _line(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


class CachedLM:
    """A language model of lm-eval that looks first among its answers of before.

    Args:
        model: lm-eval's `LM`.
        known: answers of before, by request; new ones are added.
        keep: called with new answers.
        told: called with how many of how many requests are answered.
        stop: asked now and then whether to stop.
    """

    def __init__(
        self,
        model: Any,
        known: dict[str, Any],
        keep: Callable[[Mapping[str, Any]], None],
        told: Callable[[int, int], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.known = known
        self.keep = keep
        self.told = told
        self.stop = stop

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
        """Return the answers to requests.

        Raises:
            TaskError: one is not a number.
            EvaluationInterrupted: it was told to stop.
        """
        keys = [hashlib.sha256(json.dumps([kind, *request.args]).encode()).hexdigest()[:32] for request in requests]
        new: dict[str, Instance] = {}
        for key, request in zip(keys, requests, strict=True):
            if key not in self.known:
                new.setdefault(key, request)
        left = list(new.items())
        for first in range(0, len(left), AT_ONCE):
            self.told(len(requests) - len(left) + first, len(requests))
            if self.stop():
                raise EvaluationInterrupted
            some = left[first : first + AT_ONCE]
            answers = getattr(self.model, kind)([request for _, request in some], disable_tqdm=True)
            if not all(map(_is_answer, answers)):
                raise TaskError("the model's answers are not numbers: it has diverged, and has no score")
            found = dict(zip((key for key, _ in some), answers, strict=True))
            self.keep(found)
            self.known.update(found)
        self.told(len(requests), len(requests))
        return [self.known[key] for key in keys]


def _is_answer(answer: Any) -> bool:
    number = answer[0] if isinstance(answer, tuple) else answer
    return isinstance(number, str) or math.isfinite(number)
