"""The section `eval` of a configuration: which tasks of lm-eval a model is scored on, and how."""

from typing import Annotated

from pydantic import Field

from common.settings import Allowed, Count, Folder, Settings

_NumFewshot = Annotated[int, Field(ge=0)]


class EvalConfig(Settings):
    """Tasks, and what their scores depend on."""

    tasks: Annotated[list[str], Allowed("a list of tasks, as [hellaswag]")] = Field(
        ["hellaswag", "winogrande"], min_length=1
    )
    """Names of tasks or groups in lm-eval, or `last_word`: the loss of last words of held-out passages."""
    num_fewshot: Annotated[
        _NumFewshot | Annotated[list[_NumFewshot], Field(min_length=1)], Allowed("integers from 0, as 0 or [0,5]")
    ] = 0
    """Number of solved examples before each item, or a list of numbers, as [0,5]."""
    limit: Count | None = None
    """Items of each task, drawn at random, the same for every model; null: all."""
    seed: int = 0
    """Seed of the draw."""
    data_dir: Folder | None = None
    """Folder with the sets of HellaSwag and WinoGrande that `tasks` need; null: from `make eval-data`, or the hub."""
    batch_tokens: Count | None = None
    """Tokens computed at once; null: 1,024 on a CPU, 65,536 on a GPU."""

    @property
    def requested(self) -> list[tuple[str, int]]:
        """Each task with each number of solved examples, once."""
        numbers = self.num_fewshot if isinstance(self.num_fewshot, list) else [self.num_fewshot]
        return list(dict.fromkeys((name, number) for name in self.tasks for number in numbers))
