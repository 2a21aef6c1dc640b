"""One page with what the runs say: `python scripts/make_report.py scale=micro [seeds=[0,1,2]]` writes report.html.

It needs no network, and no other file.
"""

import sys
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.pop(1)

from experiments.figures import DRAWN
from experiments.report import report
from scripts.evidence import chosen, drawn, gather, out_folder, step_windows
from training.cli import command_line, reporting
from training.folder import environment, write_whole


@hydra.main(version_base="1.3", config_path="../configs/evidence", config_name="results")
def main(cfg: DictConfig) -> None:
    """Write the report, and say where it is."""
    with reporting():
        console = Console(soft_wrap=True, highlight=False, markup=False)
        wanted = chosen(cfg, ["figure3", *DRAWN])
        windows = step_windows(cfg)
        folder = out_folder(cfg)
        found = gather(cfg)
        figures, undrawn = drawn(wanted, found, windows)
        here = environment()
        seeds = ",".join(map(str, found.seeds or cfg.seeds))
        where, also = f"paths.runs={cfg.paths.runs}", " ".join(cfg.also)
        limit = " eval.limit=100" if cfg.scale == "micro" else ""
        readers = f"scale={cfg.scale} seeds=[{seeds}] {where}" + (f" also=[{','.join(cfg.also)}]" if cfg.also else "")
        commands = [
            f"python train.py -m experiment=all scale={cfg.scale} seed={seeds} {where} {also}".strip(),
            f"python scripts/evaluate.py run={cfg.paths.runs}/evidence-{cfg.scale}{limit}",
            f'make tables figures report ARGS="{readers}"',
        ]
        made = f"Made {time.strftime('%Y-%m-%d')} at commit {str(here['commit'])[:8]}, on {here['device']}."
        write_whole(folder / "report.html", report(found, figures, undrawn, cfg.scale, commands, made))
        for said in found.others:
            console.print(said, style="yellow")
        console.print(f"report   {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(command_line(main))
