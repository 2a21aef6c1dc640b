"""ZClip in Hugging Face's Trainer: one callback. Its statistics are saved in the Trainer's checkpoints.

python examples/transformers_trainer.py
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from toy import SEQUENCES, TinyLM, make_batches
from transformers import Trainer, TrainerCallback, TrainingArguments

from zclip import TrainerClippingCallback, ZClip


class Model(TinyLM):
    """The model, with the arguments and the result that the Trainer expects."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss of (sequences, length + 1) tokens."""
        return {"loss": super().forward(input_ids)}


class InOrder(Trainer):
    """The Trainer with its sequences in order, so that bad sequences share a batch."""

    def _get_train_sampler(self, *_: object) -> None:
        return None


class PrintSpikes(TrainerCallback):
    """Print the steps whose norm is a clear outlier."""

    def __init__(self, strategy: ZClip) -> None:
        self.strategy = strategy

    def on_step_end(self, args, state, control, **_) -> None:
        """Read the telemetry, in one transfer from the device."""
        row = self.strategy.read_telemetry()
        if row["z"] > 10:
            norms = f"norm {row['grad_norm']:.2f} -> {row['clipped_norm']:.2f}"
            print(f"step {state.global_step - 1}: {norms}, z-score {row['z']:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    zclip = ZClip()
    sequences = [{"input_ids": sequence} for sequence in make_batches().flatten(0, 1)]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=SEQUENCES, learning_rate=3e-3, lr_scheduler_type="constant",
            num_train_epochs=1, use_cpu=True, report_to=[], logging_strategy="no", disable_tqdm=True,
            max_grad_norm=0.0,  # or the Trainer would clip as well
        )  # fmt: skip
        callbacks = [TrainerClippingCallback(zclip), PrintSpikes(zclip)]
        trainer = InOrder(Model(), arguments, train_dataset=sequences, callbacks=callbacks)
        trainer.train()
        (saved,) = Path(folder).glob("checkpoint-*/trainer_state.json")
        state = json.loads(saved.read_text())["stateful_callbacks"]["TrainerClippingCallback"]["args"]["strategy"]
    print(f"saved statistics: mean norm {state['state']['mean']['values']:.2f}")
