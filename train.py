"""Train one language model: `python train.py clip=zclip lr=3e-3`, or `-m` with comma-separated values for a sweep.

Composes the configuration, checks it, and leaves a run folder. The same command again continues an unfinished
run and shows the result of a finished one.
"""

from training.runtime.signals import install_handlers, reraise_pending

install_handlers()  # first: what follows takes seconds to load

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common.errors import UserError
from common.files import write_atomic
from common.text import overrides_dict
from training.checkpoint.fork import ForkSource, origin
from training.config.checks import check, corpus_of, run_path
from training.config.parallelism import world_size
from training.launch.cli import command_line, reporting
from training.launch.sweep import config_search_overrides, finished
from training.run_dir import RunDir
from training.runtime.distributed import is_distributed, launch, rank
from training.runtime.slurm import has_local_launcher


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run the job that the configuration describes."""
    with reporting():
        check(cfg)
        hydra_cfg = HydraConfig.get()
        launcher = hydra_cfg.runtime.choices["hydra/launcher"]
        if hydra_cfg.mode == RunMode.RUN and launcher != "basic" and not is_distributed():
            raise UserError(f"hydra/launcher={launcher} is for sweeps, of one run or many: add -m")
        if cfg.plan:
            Console().print(plan_of(cfg))
            return
        console = Console(soft_wrap=True, highlight=False, markup=False, quiet=rank() > 0)
        folder = RunDir(run_path(cfg))
        if cfg.print_run_dir:
            print(folder.path)
            return
        folder.check_same_run(cfg)
        start = None if folder.result.exists() else origin(cfg)
        if (result := folder.read_result()) is not None:
            console.print(f"finished already: {folder.path} (remove the folder to train it again)")
            if folder.data_folder() not in (None, corpus_of(cfg).folder(Path(cfg.paths.cache)).name):
                console.print(
                    "its text or tokenizer may have changed since, or have moved: this is the result from then"
                )
            if cfg.trainer.val_every or cfg.trainer.eval_every:
                console.print("evaluations while it trained are those of then; scripts/evaluate.py scores it now")
            if not folder.picture.exists() and rank() == 0:
                draw(folder)
        elif world_size(cfg) > 1 and not is_distributed():
            result = run_in_processes(cfg, folder, console)
        else:
            result = run(cfg, folder, console, start)
        if has_local_launcher() or rank() > 0:
            return
        show(result, folder, console)
        finished.append((overrides_dict(HydraConfig.get().overrides.task), result))


def plan_of(cfg: DictConfig) -> Table:
    """Return what a run needs, as a table."""
    from training.launch.plan import show

    return show(cfg)


def draw(folder: RunDir) -> None:
    """Draw a run that is finished."""
    from experiments.run.plot import plot_run
    from experiments.run.read import read_run

    plot_run(read_run(folder.path))


def run_in_processes(cfg: DictConfig, folder: RunDir, console: Console) -> dict:
    """Prepare the tokens, and have several processes do the run."""
    from training.run import prepare_tokens

    if cfg.trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={cfg.trainer.nodes} is more than this machine: start each node's processes with torchrun"
        )
    prepare_tokens(cfg, console)
    launch(world_size(cfg), [*HydraConfig.get().overrides.task, *config_search_overrides(HydraConfig.get())])
    result = folder.read_result()
    assert result is not None
    return result


def run(cfg: DictConfig, folder: RunDir, console: Console, start: ForkSource | None) -> dict:
    """Train, from the start of another run if one is given, evaluate, summarise and draw; `result.json` comes last."""
    from experiments.run.plot import plot_run
    from experiments.run.read import read_run
    from experiments.run.summary import summarise
    from training.run import prepare_tokens, train

    tokens = prepare_tokens(cfg, console)
    with folder.owned(cfg, tokens) if rank() == 0 else nullcontext():
        try:
            evaluation = train(cfg, folder, tokens, console, start=start)
        except Exception as error:
            reraise_pending()
            if not isinstance(error, UserError):  # no mistake of the user's
                folder.write_failure(error)
            raise
        if rank() > 0:
            return evaluation
        unfinished = read_run(folder.path)
        result = summarise(unfinished) | evaluation
        result = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        plot_run(unfinished._replace(result=result))
        write_atomic(folder.result, json.dumps(result, indent=1))
    return result


def show(result: dict, folder: RunDir, console: Console) -> None:
    """Print the final table and where everything is."""
    from experiments.run.summary import table

    console.print(table(result, title="result"), soft_wrap=False)
    console.print(f"picture  {folder.picture}\nfolder   {folder.path}")


if __name__ == "__main__":
    status = command_line(main)
    if len(finished) > 1:
        from experiments.run.summary import comparison

        Console().print(comparison(finished))
    sys.exit(status)
