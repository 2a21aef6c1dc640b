"""Responses of a language model, saved in a file as they are computed: an interrupted evaluation resumes after them."""

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from common.files import open_append, refuse_folder
from common.reading import read_lines
from evaluation.tasks import TaskError

if TYPE_CHECKING:  # training without tasks does not need lm-eval
    from lm_eval.api.instance import Instance

Number = Annotated[float, Field(allow_inf_nan=False)]
#: A line of the file: a request's key, and its response.
_CACHED: TypeAdapter[tuple[str, Any]] = TypeAdapter(
    tuple[str, Number | str | tuple[Number, bool]], config=ConfigDict(strict=True)
)

#: Requests between two saves.
REQUESTS_PER_SAVE = 512


class EvaluationInterrupted(Exception):
    """An evaluation was asked to stop. The responses so far are saved."""


class ResponseCache:
    """A file of responses by request. Damaged lines are ignored, and so is the file of a model with another name."""

    def __init__(self, path: Path, model: str) -> None:
        refuse_folder(path)
        self.path = path
        self.model = model
        self.responses: dict[str, Any] = {}
        lines = read_lines(path) if path.is_file() else iter(())
        if next(lines, None) == _line({"model": model}).rstrip(b"\n"):
            for line in lines:
                with suppress(ValueError):  # the process was killed while it wrote the line
                    key, response = _CACHED.validate_json(line)
                    self.responses[key] = response
        self.delete()
        if self.responses:
            self.add(self.responses)

    def add(self, responses: Mapping[str, Any]) -> None:
        """Append responses to the file."""
        with open_append(self.path) as raw, io.BufferedWriter(raw) as file:
            header = b"" if file.tell() else _line({"model": self.model})
            file.write(header + b"".join(map(_line, responses.items())))

    def delete(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _line(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


@dataclass(eq=False)
class CachedLM:
    """A language model of lm-eval that computes only responses that are not cached.

    Attributes:
        model: lm-eval's `LM`.
        responses: cached responses by request; new ones are added.
        save: called with new responses.
        progress: called with the number of responses so far and the number of requests.
        should_stop: called before each chunk of requests; whether to raise `EvaluationInterrupted`.
        model_error: what the model has raised, as opposed to the task's own code.
        cached_texts: texts of the requests that were cached, for models with `count_texts`.
        cached_truncated: those of them that are longer than the model's context.
    """

    model: Any
    responses: dict[str, Any]
    save: Callable[[Mapping[str, Any]], None]
    progress: Callable[[int, int], None]
    should_stop: Callable[[], bool] = lambda: False
    model_error: Exception | None = None
    cached_texts: int = 0
    cached_truncated: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """See lm-eval's `LM`."""
        return [(number, greedy) for number, greedy in self._respond("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """See lm-eval's `LM`."""
        return self._respond("loglikelihood_rolling", requests)

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """See lm-eval's `LM`."""
        return self._respond("generate_until", requests)

    def _respond(self, kind: str, requests: "list[Instance]") -> list[Any]:
        keys = [hashlib.sha256(json.dumps([kind, *request.args]).encode()).hexdigest()[:32] for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        missing = [(key, r) for key, r in unique.items() if not _is_response(kind, self.responses.get(key))]
        if count := getattr(self.model, "count_texts", None):
            texts, truncated = count(kind, [unique[key] for key in unique.keys() - dict(missing).keys()])
            self.cached_texts, self.cached_truncated = self.cached_texts + texts, self.cached_truncated + truncated
        for start in range(0, len(missing), REQUESTS_PER_SAVE):
            self.progress(len(requests) - len(missing) + start, len(requests))
            if self.should_stop():
                raise EvaluationInterrupted
            chunk = dict(missing[start : start + REQUESTS_PER_SAVE])
            try:
                computed = getattr(self.model, kind)(list(chunk.values()), disable_tqdm=True)
            except Exception as error:
                self.model_error = error
                raise
            if not all(map(_is_finite, computed)):
                raise TaskError("the model's answers are not numbers: it has diverged, and has no score")
            new = dict(zip(chunk, computed, strict=True))
            self.save(new)
            self.responses.update(new)
        self.progress(len(requests), len(requests))
        return [self.responses[key] for key in keys]


def _is_response(kind: str, response: Any) -> bool:
    """Whether a cached response is one to this kind of request."""
    kinds = {"loglikelihood": list | tuple, "loglikelihood_rolling": int | float, "generate_until": str}
    return isinstance(response, kinds[kind])


def _is_finite(response: Any) -> bool:
    number = response[0] if isinstance(response, tuple) else response
    return isinstance(number, str) or math.isfinite(number)
