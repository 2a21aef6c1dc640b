"""From run folders to tables, figures, verdicts and the report; folders that are not what they should be."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.catalogue import ALPHAS, FIGURES, STRATEGIES, TABLES, THRESHOLDS, ZCLIP, sets
from experiments.claims import NOT_TESTABLE, SUPPORTED, Untestable, paired, verdicts
from experiments.collection import Expected, Found, collect
from experiments.distributions import norm_windows
from experiments.drawing import NothingToDraw
from experiments.figures import DRAWN, draw
from experiments.measures import MEASURES
from experiments.report import report
from experiments.tables import as_csv, fill, latex, markdown, paper_numbers
from tests.conftest import CHECKOUT, train
from tests.scripts.test_data_scripts import script
from training.config import identity, run_path

BAD = [80, 100, 120]
SMALL = ("trainer.max_steps=140", f"evidence.bad_batches={BAD}", f"evidence.lab={BAD}")
SEEDS = (0, 1, 2)


def overrides(setting, runs: Path) -> list[str]:
    return ["experiment=evidence", "scale=micro", *SMALL, *setting.overrides, f"paths.runs={runs}"]


def expected(settings, runs: Path, seeds=SEEDS) -> dict:
    found = {}
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        for setting in dict.fromkeys(settings):
            cfg = compose("train", overrides(setting, runs))
            for seed in seeds:
                one = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
                one.seed = seed
                found[setting, seed] = Expected(run_path(one), identity(one)), one
    return found


def write_run(path: Path, cfg, seed: int, bump: float = 0.0, done: bool = True, **result) -> None:
    """Write a run whose loss falls from 6 to 5, and is higher by `bump` for five steps after bad batches."""
    path.mkdir(parents=True)
    OmegaConf.save(cfg, path / "config.yaml")
    rng = np.random.default_rng(seed)
    steps = cfg.trainer.max_steps
    bad = set(cfg.data.bad_batches.steps)
    loss = np.linspace(6, 5, steps) + rng.normal(0, 0.02, steps)
    norm = rng.normal(0.36, 0.02, steps)
    for step in bad:
        loss[step - 1], norm[step - 1] = 9.0, 5.0
        loss[step : step + 5] += bump
    rows = [
        {
            "step": i + 1, "tokens": 2048 * (i + 1), "loss": loss[i], "grad_norm": norm[i], "clipped": 0.0,
            "clipped_norm": min(norm[i], 1.0), "tokens_per_second": 1e4, "z": 0.0, "mean": 0.4, "std": 0.1,
            "spike": 0.0,
        }
        for i in range(steps)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"commit": "0123456789abcdef", "uncommitted_changes": False, "versions": {"torch": "2"}, "device": "a CPU"}
    (path / "environment.json").write_text(json.dumps({"starts": [start]}))
    if done:
        numbers = {
            "steps": steps, "tokens": 2048 * steps, "train_loss": 5.0 + bump, "test_loss": 4.9 + bump + seed / 100,
            "parameters": 640_000, "data_fingerprint": "abcd", "clipped_share": 0.1, "clipped_by_z": 7,
            "tokens_per_second": 1e4, "step_seconds": {"data": 0.0, "forward_backward": 0.98, "clip": 0.02},
        }  # fmt: skip
        (path / "result.json").write_text(json.dumps(numbers | result))


def score(path: Path, task: str, items: int, **metrics: float) -> None:
    file = path / "eval.json"
    scores = json.loads(file.read_text())["scores"] if file.exists() else []
    scores.append({"task": task, "shots": 0, "step": 140, "items": items, **metrics})
    file.write_text(json.dumps({"scores": scores}))


BUMPS = {"No clipping": 2.0, "Fixed 1.0": 0.3, "AutoClip": 0.1, "ZClip": 0.0}


@pytest.fixture(scope="module")
def table3(tmp_path_factory) -> tuple[Path, dict]:
    """The runs of Table 3 with three seeds."""
    runs = tmp_path_factory.mktemp("runs")
    places = expected(STRATEGIES.values(), runs)
    for label, setting in STRATEGIES.items():
        for seed in SEEDS:
            place, cfg = places[setting, seed]
            write_run(place.path, cfg, seed, BUMPS[label])
            score(place.path, "winogrande", 100, acc=0.5 + seed / 100)
            score(place.path, "winogrande", 50, acc=0.1)
            score(place.path, "hellaswag", 100, acc=0.3, acc_norm=0.25)
    return runs, {key: place for key, (place, _) in places.items()}


def test_table_3_to_the_letter(table3):
    _, places = table3
    filled = fill(TABLES["table3"], collect(places, identity))
    assert markdown(filled) == Path(__file__).with_name("table3.md").read_text()
    assert "No clipping & 3.0 $\\pm$ 0.0 & 12 &" in latex(filled) and "\\textbf{4.910 $\\pm$ 0.010}" in latex(filled)
    rows = as_csv(filled).splitlines()
    assert rows[0] == "table,row,column,paper,mean,std,runs,diverged"
    assert "table3,No clipping,test loss,2.9,6.91,0.01,3,0" in rows


def test_runs_that_are_not_what_they_should_be_are_named(table3, tmp_path):
    labels = list(STRATEGIES)
    places = expected(STRATEGIES.values(), tmp_path, seeds=(0, 1))
    folders = {(label, seed): places[STRATEGIES[label], seed] for label in labels for seed in (0, 1)}
    for (label, seed), (place, cfg) in folders.items():
        if (label, seed) == ("AutoClip", 1):
            continue
        gone = {"train_loss": None, "test_loss": None} if (label, seed) == ("No clipping", 1) else {}
        write_run(place.path, cfg, seed, done=(label, seed) != ("Fixed 1.0", 1), **gone)
    first, cfg = folders["ZClip", 0]
    for name, change in (("again", {}), ("longer", {"trainer": {"max_steps": 400}}), ("other-seed", {"seed": 7})):
        write_run(first.path.with_name(name), OmegaConf.merge(cfg, change, {"name": name}), 0)
    broken = first.path.with_name("broken")
    broken.mkdir()
    (broken / "config.yaml").write_text("{")
    changed, cfg = folders["ZClip", 1]
    OmegaConf.save(OmegaConf.merge(cfg, {"clip": {"alpha": 0.5}}), changed.path / "config.yaml")
    found = collect({key: place for key, (place, _) in places.items()}, identity)
    text = markdown(fill(TABLES["table3"], found))
    assert "Not run: AutoClip (seed 1), ZClip (seed 1). Unfinished: Fixed 1.0 (seed 1) after 140 steps." in text
    assert "Diverged: No clipping (seed 1)." in text and "4.900 (1 diverged)" in text
    assert sorted(found.others) == sorted(
        [
            f"again is left out: it is {first.path.name} again, under a name of its own",
            "longer is left out: it is no run of these experiments (trainer.max_steps=400, not 140)",
            "broken is left out: its config.yaml cannot be read",
            f"{changed.path.name} is left out: its config.yaml was changed (clip.alpha=0.5, not 0.97)",
        ]
    )


def test_what_was_not_run_is_empty_and_never_guessed(tmp_path):
    places = {key: place for key, (place, _) in expected(STRATEGIES.values(), tmp_path).items()}
    found = collect(places, identity)
    for table in TABLES.values():
        text = markdown(fill(table, found))
        assert text.endswith("\n\nNo run of this table is done.\n")
        assert all(not cell.values for row in fill(table, found).cells for cell in row)
    for name in DRAWN:
        with pytest.raises(NothingToDraw):
            draw(name, found)
    assert {verdict.verdict for verdict in verdicts(found)} == {NOT_TESTABLE}


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Found:
    """The runs of all experiments with three seeds, in which less reaches the weights the better a strategy clips."""
    runs = tmp_path_factory.mktemp("all")
    places = expected(sets()["all"], runs)
    for (setting, seed), (place, cfg) in places.items():
        if not place.path.exists():
            bump = {"none": 0.8, "fixed": 0.3}.get(setting.clip, 0.05)
            write_run(place.path, cfg, seed, bump * (1 + seed / 10) if cfg.data.bad_batches.steps else 0.0)
    return collect({key: place for key, (place, _) in places.items()}, identity)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def test_every_table_is_filled_and_every_figure_drawn(everything, tmp_path):
    for table in TABLES.values():
        for row, cells in zip(table.rows, fill(table, everything).cells, strict=True):
            for column, cell in zip(table.columns, cells, strict=True):
                unscored = column.measure in ("hellaswag", "winogrande")
                assert len(cell.values) == (0 if unscored else 3), (table.name, row.label, column.header)
    figures = {name: draw(name, everything) for name in DRAWN}
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png", dpi=30)
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
    page = report(everything, list(TABLES.values()), figures, ["figure99"], "micro", ["make it so"], "Made today.")
    assert page.count("data:image/svg+xml;base64,") == len(DRAWN) and "figure99" in page
    assert not re.search(r'(src|href)="(?!data:)', page), "it needs nothing else"
    assert "<b>" in page and "&lt;b&gt;" not in page and "norm of 14 times the" in page


def test_figures_name_the_runs_that_are_missing(everything):
    gone = {(STRATEGIES["AutoClip"], 1), (STRATEGIES["ZClip"], 2)}
    found = everything._replace(runs={key: run for key, run in everything.runs.items() if key not in gone})
    said = {name: draw(name, found).get_supxlabel() for name in DRAWN}
    assert "not run: AutoClip (seed 1), ZClip (seed 2)" in said["table3"]
    assert {name for name, line in said.items() if "not run" in line} == {
        "table3", "figure5", "figure7", "figure8", "ema",
    }  # fmt: skip
    assert all("not run" not in draw(name, everything).get_supxlabel() for name in DRAWN)


def test_runs_that_diverged_are_drawn_as_far_as_they_went(everything, tmp_path):
    gone = {}
    for key, run in everything.runs.items():
        metrics = {name: column.copy() for name, column in run.metrics.items()}
        for name in ("loss", "grad_norm", "clipped_norm"):
            metrics[name][60:] = np.nan
        gone[key] = run._replace(metrics=metrics, result={**run.result, "train_loss": None, "test_loss": None})
    found = everything._replace(runs=gone, diverged=set(gone))
    for name in DRAWN:
        draw(name, found).savefig(tmp_path / f"{name}.png", dpi=30)
    table3 = markdown(fill(TABLES["table3"], found))
    assert "| diverged |" in table3 and "Diverged: No clipping (seed 0)" in table3
    assert all(verdict.verdict != SUPPORTED for verdict in verdicts(found)[2:7])


def test_verdicts(everything):
    found = {verdict.claim: verdict for verdict in verdicts(everything)}
    assert found["Fixed clipping leaves spikes."].verdict == SUPPORTED
    assert found["ZClip removes the spikes."].verdict == "not supported", "it leaves a little of the bad batches"
    assert found["z_thresh = 2.5 is best."].verdict == "not supported", "all are the same"
    normal = found["Gradient norms are about normally distributed in short windows."]
    assert normal.verdict == NOT_TESTABLE and "are not short" in normal.numbers[2]
    assert re.fullmatch(r"Shapiro-Wilk rejects a .* of norms in [0-6] of 6 windows \(p < 0.05\)", normal.numbers[0])
    assert found["The overhead is negligible."].verdict == SUPPORTED
    assert "at most 0.00 % of a step" in found["The overhead is negligible."].numbers[1]
    two = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] < 2})
    assert {verdict.verdict for verdict in verdicts(two)} == {NOT_TESTABLE}
    torn = everything._replace(runs={key: run for at, (key, run) in enumerate(everything.runs.items()) if at % 3})
    assert len(verdicts(torn)) == 9, "whatever is missing"


def changed(everything: Found, change) -> dict:
    """The verdicts where losses and losses after bad batches are what `change` makes of (setting, seed, run)."""
    runs = {key: change(*key, run) for key, run in everything.runs.items()}
    return {verdict.claim: verdict for verdict in verdicts(everything._replace(runs=runs))}


def after_bad(run, nats: float):
    loss = run.metrics["loss"].copy()
    for step in run.config["data"]["bad_batches"]["steps"]:
        loss[step : step + 10] += nats
    return run._replace(metrics={**run.metrics, "loss": loss})


def test_spikes_are_removed_where_little_is_left_for_sure(everything):
    """Not where what is left differs so much between seeds that it is no significant difference."""
    lab = next(row.settings for row in TABLES["spike_lab"].rows if row.label == "ZClip")
    clean = {seed: everything.runs[lab["good"], seed].metrics["loss"] for seed in SEEDS}

    def left(by_seed):
        def change(setting, seed, run):
            if setting != lab["bad"]:
                return run
            return after_bad(run._replace(metrics={**run.metrics, "loss": clean[seed]}), by_seed[seed])

        return changed(everything, change)["ZClip removes the spikes."]

    assert left([0.0, 0.001, 0.002]).verdict == SUPPORTED
    assert left([0.1, 0.11, 0.12]).verdict == "not supported"
    noisy = left([0.0, 0.3, 2.5])
    assert noisy.verdict == "not supported" and "p = 0.3" in noisy.numbers[1], noisy


def test_what_diverged_supports_nothing(everything):
    """Each run that has diverged by itself, and all runs of a strategy at other steps."""
    zclip = next(row.settings for row in TABLES["spike_lab"].rows if row.label == "ZClip")["bad"]
    one = everything._replace(diverged={(zclip, 2)})
    said = {verdict.claim: verdict for verdict in verdicts(one)}["ZClip removes the spikes."]
    assert said.verdict == NOT_TESTABLE and said.numbers[0].startswith(
        "a run that is compared has diverged: clip=zclip"
    )
    assert said.numbers[0].endswith("seed=2")
    for group in ("fixed", "zclip"):
        gone = {(row.settings[group], seed) for row in TABLES["table2"].rows for seed in SEEDS}
        for verdict in verdicts(everything._replace(diverged=gone))[1:4]:
            assert verdict.verdict != SUPPORTED, verdict
    everywhere = verdicts(everything._replace(diverged=gone))[2]
    assert everywhere.numbers == ["clip=zclip has diverged at every learning rate with seed 0"]


def test_settings_are_compared_on_the_same_seeds_and_the_same_text(everything):
    def change(setting, seed, run):
        better = 0.0 if setting == THRESHOLDS["2.5"] else (0.5 if setting == THRESHOLDS["1.5"] else -0.03)
        loss = 5.0 + seed + better + seed * seed / 100 * (setting == THRESHOLDS["1.5"])
        return run._replace(result={**run.result, "train_loss": loss})

    runs = {key: change(*key, run) for key, run in everything.runs.items()}
    others = [setting for label, setting in THRESHOLDS.items() if label not in ("1.5", "2.5")]
    fewer = {key: run for key, run in runs.items() if not (key[0] in others and key[1] == 0)}
    verdict = verdicts(everything._replace(runs=fewer))[5]
    assert verdict.verdict == NOT_TESTABLE and "it needs three seeds" in verdict.numbers[0], verdict
    assert verdicts(everything._replace(runs=runs))[5].verdict == "not supported"
    odd = next(iter(runs))
    runs[odd] = runs[odd]._replace(result={**runs[odd].result, "data_fingerprint": "ffff"})
    assert {each.verdict for each in verdicts(everything._replace(runs=runs))} == {NOT_TESTABLE}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.jsonl", "", "metrics.jsonl has no step, tokens"),
        ("metrics.jsonl", "[1]\n", "cannot be read"),
        ("metrics.jsonl", None, "not of one run"),
        ("result.json", '{"steps": 140, "tokens": 1}', "result.json has parameters=None, which is no number"),
        ("result.json", '{"steps": 140, "tokens": 1, "parameters": 1, "test_loss": "4"}', "test_loss='4', which is no"),
        ("environment.json", "[]", "cannot be read"),
        ("environment.json", '{"starts": [null]}', "environment.json holds no list of starts"),
        ("eval.json", '{"scores": null}', "cannot be read"),
        ("eval.json", '{"scores": [{}]}', "eval.json has a score that is none"),
        ("config.yaml", "[1]", "cannot be read"),
        ("config.yaml", "trainer: x", "cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_its_run_left_out(file, text, said, table3, tmp_path):
    runs, places = table3
    shutil.copytree(runs, tmp_path / "runs")
    key = (STRATEGIES["AutoClip"], 1)
    moved = {
        each: place._replace(path=tmp_path / "runs" / place.path.relative_to(runs)) for each, place in places.items()
    }
    damaged = moved[key].path / file
    lines = damaged.read_text().splitlines(keepends=True) if text is None else []
    damaged.write_text("".join([*lines[:-1], lines[0]]) if text is None else text)
    stranger = moved[key].path.with_name("stranger")
    stranger.mkdir()
    (stranger / "config.yaml").write_text("[1]")
    found = collect(moved, identity)
    assert key not in found.runs and len(found.runs) == 11
    assert any(said in line and moved[key].path.name in line for line in found.others), found.others
    assert "stranger is left out: its config.yaml cannot be read" in found.others


def test_paired_differences():
    with pytest.raises(Untestable, match="it needs three seeds"):
        paired([1.0, 2.0], [0.0, 0.0])
    difference = paired([1.0, 2.0, 3.0], [2.0, 2.5, 4.5])
    # Differences -1, -0.5, -1.5: mean -1, standard error 0.5 / sqrt(3), t = -3.4641 with two degrees of freedom.
    assert difference.mean == -1 and difference.p == pytest.approx(0.07418, abs=1e-4)
    assert difference.most == pytest.approx(-1 + 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    for one, p in ((1.0, 1.0), (2.0, 0.25)):
        same = paired([one] * 3, [1.0] * 3)
        assert same.p == p and same.most == same.mean, "the sign test"


def test_the_windows_of_figure_9_are_the_papers_in_a_run_of_its_length(everything):
    run = next(iter(everything.runs.values()))
    long = run._replace(metrics={"step": np.arange(1, 11_901)})
    assert norm_windows(long) == [(500, 634), (3050, 3184)]
    assert norm_windows(run) == [(50, 99), (100, 140)]


def test_the_catalogue_is_whole():
    known = sets()
    assert {path.stem for path in (CHECKOUT / "configs" / "experiment").glob("*.yaml")} == {*known, "main", "evidence"}
    for name, settings in known.items():
        text = (CHECKOUT / "configs" / "experiment" / f"{name}.yaml").read_text()
        assert f"of: {name}\n" in text and settings
    assert {*TABLES, *FIGURES} < {*known}
    for name, rows in paper_numbers().items():
        table = TABLES[name]
        assert set(rows) == {row.label for row in table.rows}
        headers = {column.header for column in table.columns}
        assert all(set(numbers) <= headers for numbers in rows.values())
    for table in TABLES.values():
        assert all(column.measure in MEASURES for column in table.columns)
        assert all(column.group in row.settings for row in table.rows for column in table.columns)
    clip = OmegaConf.load(CHECKOUT / "configs" / "clip" / "zclip.yaml")
    assert {key: clip[key] for key in ZCLIP} == ZCLIP, "what is not set on top is what the option sets"
    assert THRESHOLDS["2.5"] == ALPHAS["0.97"] == STRATEGIES["ZClip"], "runs that are shared are the same"


def test_a_set_is_run_and_read_from_its_name(tmp_path, corpus, cache):
    """The real thing, small: a sweep over a declared set, its table, and its mistakes."""
    tiny = ("model.vocab_size=512", "model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=64")
    tiny += ("trainer.max_steps=12", "trainer.global_batch_size=4", "trainer.micro_batch_size=4", f"data.path={corpus}")
    tiny += (f"paths.cache={cache}", "evidence.bad_batches=[6]", "data.max_test_tokens=2048", "evidence.lab=[6]")
    done = train("-m", "experiment=table5", "scale=micro", *tiny, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = sorted(path.name.split("-seed")[0] for path in (tmp_path / "runs" / "evidence-micro").iterdir())
    assert folders == ["nano-zclip-lr0.01", "nano-zclip_max-lr0.01", "nano-zclip_mean-lr0.01"]
    again = train("-m", "experiment=figure7", "scale=micro", *tiny, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("finished already") == 1, "it is shared with Table 5"
    also = "also=[" + ",".join(f"'{setting}'" for setting in tiny) + "]"
    made = script("make_tables.py", "experiment=table5", also, "out=here", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    text = (tmp_path / "here" / "tables" / "table5.md").read_text()
    assert "seed 0, text embedded" in text and "bad batches of kind repeat put in at steps 6" in text
    assert all((tmp_path / "here" / "tables" / f"table5.{ending}").is_file() for ending in ("tex", "csv"))
    other = script("make_tables.py", "experiment=table5", "out=there", cwd=tmp_path)
    assert other.returncode == 2 and "nothing is written; nano-" in other.stderr
    assert "is left out: it is no run of these experiments (" in other.stderr and not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("experiment=table3",), "experiment=table3 is a set of runs: add -m, and name one set at a time, or"),
        (("-m", "experiment=table3"), "scale is not set: experiment=table3 is run at scale=micro, scale=proxy or"),
        (("-m", "experiment=table3", "scale=micro", "++evidence.lr=1"), "evidence.lr is not yours to set with"),
        (("-m", "experiment=table3", "clip=none"), "clip is not yours to set with experiment=table3, which sets clip,"),
        (("-m", "experiment=table3", "lr=1e-3"), "lr is not yours to set with experiment=table3, which sets clip,"),
        (
            ("-m", "experiment=table3", "scale=micro", "seed=-1"),
            "seed=-1 is not allowed: it must be an integer from 0 to",
        ),
        (("-m", "experiment=table2,table3"), "experiment=table2 is a set of runs: add -m, and name one set at a time"),
    ],
)
def test_mistakes_are_one_sentence(given, said, tmp_path):
    done = train(*given, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"train.py: error: {said}"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_plan_of_a_set_says_what_it_takes(tmp_path):
    done = train("-m", "experiment=table3", "scale=paper", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm/train.sbatch") == 4
    assert "199.6B" in done.stdout and "plan=" not in done.stdout.lower()


def test_a_plan_of_a_set_is_checked(tmp_path):
    done = train("-m", "experiment=table3", "scale=paper", "plan=true", "data.sequence_length=4096", cwd=tmp_path)
    assert done.returncode == 2 and "data.sequence_length=4096 is longer than the model's context" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_nothing_is_written_where_no_run_is_done(tmp_path):
    """What was made of earlier runs stays."""
    kept = tmp_path / "runs" / "results-micro" / "tables" / "table3.md"
    kept.parent.mkdir(parents=True)
    kept.write_text("numbers")
    for name in ("make_tables.py", "make_report.py"):
        done = script(name, "seeds=[7]", cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "paths.runs=runs has no finished run of scale=micro with seeds=[7]: nothing is written" in done.stderr
    assert kept.read_text() == "numbers" and [*kept.parent.parent.rglob("*.*")] == [kept]


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("make_tables.py", "experiment=figure10", "experiment=figure10 is not known here: it must be of table2,"),
        ("make_figures.py", "windows=[[9,8]]", "windows=[[9, 8]] is not allowed: it must be pairs of steps, as"),
        ("make_tables.py", "also=[3]", "also=[3] is not allowed: it must be a list of settings in quotes, as"),
        ("make_tables.py", "seeds=[-1]", "seeds=[-1] is not allowed: it must be a list of integers from 0, as"),
        ("make_report.py", "seeds=3", "seeds=3 is not allowed: it must be a list of integers from 0, as [0,1,2]"),
        ("make_tables.py", "scale=huge", "scale=huge is not known: it must be one of micro, paper, proxy"),
        (
            "make_report.py",
            "paths.runs=gone",
            "paths.runs=gone is not there: it must be the folder with evidence-micro/",
        ),
    ],
)
def test_mistakes_of_the_readers_are_one_sentence(name, given, said, tmp_path):
    (tmp_path / "runs").mkdir()
    done = script(name, given, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"{name}: error: {said}"), done.stderr
