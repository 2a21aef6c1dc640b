"""Every reader of the project, with the files that it is given."""

from common.errors import RunError, UserError
from tests.fuzz.attempts import Reader
from tests.fuzz.command_lines import run_command_line
from tests.fuzz.data_readers import (
    read_model,
    read_prepared_tokens,
    read_state,
    read_texts,
    read_tokenizer,
    read_tokens,
    replay_traces,
)
from tests.fuzz.run_readers import (
    RUN,
    RUN_FILES,
    export_run,
    fork_run,
    print_status,
    read_checkpoint,
    read_finished_run,
    read_run_dir,
    read_scores,
    read_tables,
    repeat_command,
    resume_run,
)

#: Files that a run makes in its folder.
MADE = [
    str(RUN / name)
    for name in (".lock", "plots", "plots/run.png", "failure.txt", "result.json", ".task_scores.json.lock", "wandb",
                 "checkpoints/step-00000024.ckpt", "checkpoints/.saving-x-step-00000024.ckpt", "val_metrics.jsonl")
]  # fmt: skip
EVERYTHING = [str(RUN / "*"), str(RUN / "**/*")]
RECORDS = [str(RUN / name) for name in RUN_FILES]
CHECKPOINT = RUN / "checkpoints" / "step-00000016.ckpt"

READERS = {
    "status": Reader(print_status, "finished", RECORDS, share=1.5, in_process=False),
    "run folder": Reader(read_run_dir, "stopped", EVERYTHING, MADE, share=1.5),
    "run, read": Reader(
        read_finished_run, "finished", RECORDS, refusals=(UserError, RunError, ValueError, FileNotFoundError), share=1.5
    ),
    "tables": Reader(read_tables, "tables", ["runs/paper-micro/*/*"], share=1.5),
    "scores": Reader(read_scores, "scores", ["*", ".task*"], [".task_scores.json.lock"], share=1.5),
    "resume": Reader(resume_run, "stopped", EVERYTHING, MADE, in_process=False),
    "same command": Reader(repeat_command, "stopped", EVERYTHING, MADE, share=0.5, in_process=False),
    "fork": Reader(fork_run, "stopped", EVERYTHING, share=0.5, in_process=False),
    "checkpoint": Reader(read_checkpoint, "stopped", [str(CHECKPOINT)], share=2),
    "sharded checkpoint": Reader(
        read_checkpoint, "sharded", [str(CHECKPOINT), str(CHECKPOINT / "*"), str(CHECKPOINT / ".metadata")], share=2
    ),
    "export": Reader(export_run, "sharded", EVERYTHING, share=0.5, in_process=False),
    "model": Reader(read_model, "model", share=1.5),
    "model with index": Reader(read_model, "indexed"),
    "tokenizer": Reader(read_tokenizer, "tokenizer", share=1.5),
    "tokens": Reader(read_tokens, "tokens", share=1.5),
    "tokens, prepared": Reader(read_prepared_tokens, "tokens"),
    "tokens, journal": Reader(read_prepared_tokens, "journal"),
    "texts": Reader(read_texts, "texts", share=3),
    "clipper state": Reader(read_state, "states", refusals=(ValueError,), share=2),
    "replay": Reader(replay_traces, "traces", refusals=(), share=1.5),
    "command line": Reader(run_command_line, share=3, in_process=False),
}
