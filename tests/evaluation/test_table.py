"""Scores in the terminal: percent with standard errors, one model or several."""

import io
import itertools
import math
import re

import pytest
from rich.console import Console

from evaluation.table import print_scores


def row(run: str = "main/one", task: str = "hellaswag", shots: int = 0, **results) -> dict:
    key = {"task": task, "num_fewshot": shots, "limit": 100, "seed": 0, "step": 20, "dtype": "float32", "model": None}
    return {"run": run, **key, "items": 1267, "seconds": 1.0, "versions": {}, "date": "", **results}


def printed(*rows: dict, width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_scores(list(rows), console)
    return console.file.getvalue().splitlines()


def cells(lines: list[str], begin: str) -> list[str]:
    """Return the cells of the only line of a table whose first cell is `begin`."""
    table = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    (found,) = [line for line in table if line[0] == begin]
    return found


def test_scores_of_one_model_are_rows():
    lines = printed(
        row(acc=0.25, acc_stderr=0.0123, acc_norm=0.5, acc_norm_stderr=0.02, drawn=True),
        row(task="wikitext", shots=2, word_perplexity=12.345, truncated_fraction=0.126),
    )
    assert lines[0] == "main/one, ± standard error"
    assert cells(lines, "task") == ["task", "shots", "items", "acc %", "acc_norm %", "word_perplexity"]
    assert cells(lines, "hellaswag") == ["hellaswag", "0", "1,267 drawn", "25.00 ± 1.23", "50.00 ± 2.00", ""]
    assert cells(lines, "wikitext") == ["wikitext", "2", "1,267", "", "", "12.35"]
    assert lines[-1] == "up to 13% of a task's texts exceed the model's context, and lost their beginnings"


def test_several_models_are_rows_with_a_column_for_each_task_and_metric():
    lines = printed(
        row(acc=0.25, acc_stderr=0.01, drawn=True),
        row(shots=5, acc=0.3, f1=0.4, drawn=True),
        row("main/two", acc=0.75, acc_stderr=0.02, drawn=True),
    )
    assert cells(lines, "main/one") == ["main/one", "25.00 ± 1.00", "30.00", "40.00"]
    assert cells(lines, "main/two") == ["main/two", "75.00 ± 2.00", "", ""]
    header = "\n".join(lines)
    assert header.count("hellaswag") == 4 and "5 shots" in header and header.count("acc %") == 2
    assert lines[-1] == "± standard error; items: hellaswag 1,267 drawn"


def test_models_whose_names_have_no_room_are_numbered():
    names = [f"paper-micro/pico-tied-zclip-lr0.01-seed{seed}-061311ca" for seed in (0, 1)]
    rows = [row(name, task, acc=0.25, acc_stderr=0.01) for name in names for task in ("hellaswag", "winogrande")]
    assert cells(printed(*rows), names[1]) == [names[1], "25.00 ± 1.00", "25.00 ± 1.00"]
    lines = printed(*rows, width=80)
    assert lines[:2] == [f" 1  {names[0]}", f" 2  {names[1]}"]
    assert cells(lines, "2") == ["2", "25.00 ± 1.00", "25.00 ± 1.00"]
    assert all(len(line) <= 80 for line in lines)


def read(lines: list[str]) -> dict[tuple[str, str], str]:
    """Return the cells of all tables by the name of the row, and by the header without its spaces."""
    titles = dict(match.groups() for line in lines if (match := re.match(r" ?(\d+)  (.*)", line)))
    found, header, body = {}, [], []
    for line in lines:
        if line[0] == "┃":
            header.append([cell.strip() for cell in line.strip("┃").split("┃")])
        elif line[0] == "│":
            body.append([cell.strip() for cell in line.strip("│").split("│")])
        elif line[0] == "└":
            columns = ["".join(parts).replace(" ", "") for parts in zip(*header, strict=True)]
            names = 3 if columns[0] == "task" else 1
            for row in body:
                name = "{}, {} shots, {} items".format(*row[:3]) if names == 3 else titles.get(row[0], row[0])
                found |= {(name, column): cell for column, cell in zip(columns[names:], row[names:], strict=True)}
            header, body = [], []
    return found


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("width", [40, 60, 80, 81, 120, 400])
def test_no_width_cuts_or_loses_anything(models, tasks, width):
    names = [f"paper-micro/pico-tied-zclip-lr0.01-seed{seed}-061311ca" for seed in range(models)]
    task_names = ["hellaswag", "mmlu_flan_n_shot_generative_high_school_geography", "a", "winogrande"][:tasks]
    rows, expected = [], {}
    for name, task, shots in itertools.product(names, task_names, (0, 5)):
        acc, big = 0.01 * len(rows), float(f"{len(rows)}e300")
        results = {"acc": acc, "acc_stderr": acc / 2, "perplexity": big}
        results |= {"exact_match,flexible-extract": acc, "exact_match_stderr,flexible-extract": 0.02}
        rows.append(row(name, task, shots, drawn=True, **results))
        cells = [f"{100 * acc:.2f} ± {50 * acc:.2f}", f"{big:.4g}" if big else "0.00", f"{100 * acc:.2f} ± 2.00"]
        for column, cell in zip(("acc%", "perplexity", "exact_match,flexible-extract%"), cells, strict=True):
            if models == 1:
                expected[f"{task}, {shots} shots, 1,267 drawn items", column] = cell
            else:
                expected[name, f"{task}{shots}shots{column}"] = cell
    lines = printed(*rows, width=width)
    assert read(lines) == expected
    assert max(len(line) for line in lines if line[0] in "┏┃┡│├└") <= width


def test_no_scores_print_nothing():
    assert printed() == []


def test_what_is_no_number_is_no_metric():
    """A file of scores may come from somebody else."""
    lines = printed(row(acc="[b]x", acc_stderr=[1], f1=0.5, f1_stderr="x", other={"a": 1}, truncated_fraction="y"))
    assert cells(lines, "task") == ["task", "shots", "items", "f1 %"]
    assert cells(lines, "hellaswag") == ["hellaswag", "0", "1,267", "50.00"]
    for number in (10**400, -(10**400), math.nan, math.inf):
        lines = printed(row(acc=number, f1=0.5, f1_stderr=number, truncated_fraction=number))
        assert cells(lines, "hellaswag") == ["hellaswag", "0", "1,267", "50.00"] and "exceed" not in lines[-1]
