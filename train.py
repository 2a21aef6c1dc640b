"""Train one language model, or with -m several: a sweep. Settings are KEY=VALUE; all have defaults.

Groups and their options:
  clip     zclip zclip_mean zclip_max log_z_score lagged_z_score none fixed autoclip tensor_autoclip
           adagc global_adagc agc gradient_stabilizer skip_step
  update   none monitor update_clip stable_adamw spam spam_reset brake
  optim    adamw sgd muon custom
  model    pico nano micro 60m 150m 350m 1b 7b hf
  data     sotu smollm
  trainer  cpu gpu ddp fsdp hsdp
  scale    main micro proxy_short proxy paper
  logger   jsonl wandb
Keys: lr seed name trainer.max_steps trainer.global_batch_size data.path paths.runs ...
      (docs/reference/config.md explains all)

    python train.py clip=zclip lr=3e-3
    python train.py -m clip=none,fixed,zclip lr=1e-3,3e-3
    python train.py model=1b trainer=fsdp plan=true
    python train.py clip=agc --cfg job

The last two train nothing: they print memory and time, and all settings. A run leaves a folder in
runs/. The same command again continues an unfinished run, and shows the result of a finished one.
A sweep ends with a table, and up to seven runs with a picture.
"""

import sys

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
    print(__doc__, end="")
    sys.exit()

from common.missing_packages import report_missing_packages
from training.runtime.signals import install_handlers

install_handlers()  # first: what follows takes seconds to load
report_missing_packages()

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from common.console import make_console
from common.errors import UserError, one_line
from common.files import write_atomic
from common.text import overrides_dict
from data import corpus_from, read_tokenizer
from experiments.run.read import read_run
from experiments.run.summary import comparison, summarise, table
from training.checkpoint.fork import ForkSource, find_fork_source
from training.checkpoint.fork_data import check_same_tokenizer
from training.checkpoint.saved_config import check_changes, check_same_run, config_of_run
from training.config.checks import check
from training.config.compose import load_config, resumed_config, saved_identity
from training.config.identity import run_path
from training.config.live import under_first_name, with_changes
from training.config.own_rules import exits_as_errors
from training.config.schema import Config
from training.launch.cli import command_line, reporting
from training.launch.plan import plan_table, steps_done
from training.launch.processes import launch
from training.launch.sweep import CompletedJob, completed_jobs, config_search_overrides
from training.run_dir import RunDir
from training.runtime.distributed import end_process, is_distributed, rank
from training.runtime.signals import Interrupted, reraise_pending
from training.runtime.slurm import has_local_launcher


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the job that the configuration describes; return its test loss, for sweepers that minimise it."""
    with reporting():
        hydra_cfg = HydraConfig.get()
        config, run_dir = configured(cfg, list(hydra_cfg.overrides.task))
        check(config, run_dir.path)
        launcher = hydra_cfg.runtime.choices["hydra/launcher"]
        if hydra_cfg.mode == RunMode.RUN and launcher != "basic" and not is_distributed():
            raise UserError(f"hydra/launcher={launcher} is for sweeps, of one run or many: add -m")
        if (config.plan or config.print_run_dir) and hydra_cfg.mode == RunMode.RUN and run_dir.read_result() is None:
            find_fork_source(config, run_dir)  # a sweep has checked its runs, and may train the other run first
        if config.plan:
            make_console(soft_wrap=False).print(plan_table(config, steps_done(config, run_dir)))
        elif config.print_run_dir:
            print(run_dir.path)
        else:
            return run_or_show(config, run_dir)["test_loss"]
    return None


def configured(cfg: DictConfig, overrides: list[str]) -> tuple[Config, RunDir]:
    """Return the configuration and folder of the run that the command line names."""
    begun = None if cfg.get("resume") is None else config_of_run(RunDir(Path(str(cfg.resume))))
    config = load_config(cfg, overrides, begun)
    if config.resume is None:
        run_dir = RunDir(run_path(config))
        check_same_run(run_dir, config)
        return under_first_name(with_changes(config, run_dir.setting_changes()), config), run_dir
    run_dir = RunDir(Path(config.resume))
    if begun is None:
        raise UserError(f"resume={config.resume} is not possible: there is no run in that folder")
    current = with_changes(begun, run_dir.setting_changes())
    resumed = resumed_config(config, current, overrides)
    check_changes(run_dir, current, resumed)
    return under_first_name(resumed, begun), run_dir


def run_or_show(config: Config, run_dir: RunDir) -> dict:
    """Return the result of a run, which is trained unless it is finished, and print it."""
    console = make_console(quiet=rank() > 0)
    result = run_dir.read_result()
    if result is not None:
        report_finished(config, run_dir, console)
    else:
        fork = find_fork_source(config, run_dir)
        if config.trainer.world_size > 1 and not is_distributed():
            result = run_in_processes(config, run_dir, console)
        else:
            result = run(config, run_dir, console, fork)
    if not (has_local_launcher() or rank() > 0):
        if HydraConfig.get().mode == RunMode.RUN:
            console.print(table(result, title="result"), soft_wrap=False)
        console.print(f"picture  {run_dir.plot}\nfolder   {run_dir.path}")
        completed_jobs.append(CompletedJob(overrides_dict(HydraConfig.get().overrides.task), result, run_dir.path))
    return result


def report_finished(config: Config, run_dir: RunDir, console: Console) -> None:
    """Say that a run is finished, and what its result may lack; draw it if its plot is missing."""
    console.print(f"finished already: {run_dir.path} (remove the folder to train it again)")
    with suppress(UserError, OSError):  # the text or the tokenizer may be gone
        if run_dir.data_folder() not in (None, corpus_from(config.data).folder(Path(config.paths.cache)).name):
            console.print("the text or tokenizer differs from this run's: this is the stored result")
    if config.trainer.val_every or config.trainer.eval_every:
        console.print("evaluations during training are not repeated; scripts/evaluate.py scores the run now")
    if not run_dir.plot.exists() and rank() == 0:
        from experiments.run.plot import plot_run

        try:
            plot_run(read_run(run_dir.path))
        except (OSError, ValueError) as error:
            console.print(f"{run_dir.plot} cannot be drawn ({one_line(error)})")


def run_in_processes(config: Config, run_dir: RunDir, console: Console) -> dict:
    """Prepare the tokens, and start the processes of the run on this machine."""
    from training.run import prepare_tokens
    from training.validation.tasks import load_run_tasks

    if config.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={config.trainer.nodes} is more than this machine: start each node's processes with torchrun"
        )
    load_run_tasks(config)  # their data is missing before the text is tokenized, not after
    prepare_tokens(config, console)
    launch(config.trainer.world_size, [*HydraConfig.get().overrides.task, *config_search_overrides(HydraConfig.get())])
    result = run_dir.read_result()
    assert result is not None
    return result


def run(config: Config, run_dir: RunDir, console: Console, fork: ForkSource | None) -> dict:
    """Train, from a step of another run if `fork` is given, evaluate, summarise and draw; `result.json` comes last."""
    from experiments.run.plot import plot_run
    from training.run import prepare_tokens, train
    from training.validation.tasks import load_run_tasks

    tasks = load_run_tasks(config)
    tokens = prepare_tokens(config, console)
    if fork is not None and fork.new_data and not run_dir.checkpoint_steps():
        check_same_tokenizer(config, fork.run_dir, read_tokenizer(tokens.folder))
    with run_dir.acquire(config, tokens) if rank() == 0 else nullcontext():
        try:
            with exits_as_errors(config):
                evaluation = train(config, run_dir, tokens, tasks, console, fork=fork)
        except Exception as error:
            reraise_pending()
            if not isinstance(error, UserError):
                run_dir.write_failure(error)
            raise
        if rank() > 0:
            return evaluation
        unfinished = read_run(run_dir.path)
        result = summarise(unfinished) | evaluation
        result = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        plot_run(unfinished._replace(result=result))
        write_atomic(run_dir.result_file, json.dumps(result, indent=1))
    return result


def report_sweep(jobs: Sequence[CompletedJob]) -> None:
    """Print the table of a sweep, and draw its runs next to each other if they are not too many for a picture."""
    from experiments.run.compare import MAX_RUNS, compared, picture_path, plot_comparison, sentences

    console = make_console()
    rows = [(job.overrides, job.result) for job in jobs]
    console.print(comparison(rows, width=console.width), soft_wrap=False)
    paths = list({job.path.resolve(): job.path for job in jobs})
    target = picture_path(paths)
    if len(paths) > MAX_RUNS:
        console.print(f"no picture of more than {MAX_RUNS} runs: scripts/compare.py run=[A,B] draws some of them")
    if not 1 < len(paths) <= MAX_RUNS:
        return
    try:
        runs = [read_run(path) for path in paths]
        together = compared(runs, [saved_identity(run.config) for run in runs])
        plot_comparison(together, target)
    except (OSError, ValueError) as error:
        console.print(f"{target} cannot be drawn ({one_line(error)})")
    else:
        console.print(f"{sentences(together)}\npicture  {os.path.relpath(target)}")


if __name__ == "__main__":
    status = command_line(main)
    try:
        if len(completed_jobs) > 1:
            report_sweep(completed_jobs)
    except Interrupted as error:
        status = status or 128 + error.signum
    end_process(status)
