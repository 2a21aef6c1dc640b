"""Scoring beside lm-eval's hf backend, on the run of the stage `resume`."""

from scripts.gpu_stages.context import Context


def run(context: Context) -> None:
    """Save the table of bench_eval.py."""
    data = context.carried / "eval"
    if not data.is_dir():
        raise FileNotFoundError(f"there are no validation sets in {data}: see scripts/gpu_carry.py")
    limit, rounds = (4, 1) if context.dry_run else (200, 1)
    arguments = (f"run={context.out / 'runs' / 'main' / 'resume'}", f"data_dir={data}", f"limit={limit}")
    context.call("scripts/bench_eval.py", *arguments, f"rounds={rounds}", log=context.name)
    lines = (context.out / f"{context.name}.log").read_text().splitlines()
    context.save(rows=[line.strip("│ ") for line in lines if line.startswith("│")])
