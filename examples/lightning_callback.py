"""ZClip in Lightning: one callback. Its statistics are saved in Lightning's checkpoints.

python examples/lightning_callback.py
"""

from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from toy import STEPS, TinyLM, make_batches

from zclip import ZClipLightningCallback


class Module(pl.LightningModule):
    """What Lightning trains."""

    def __init__(self) -> None:
        super().__init__()
        self.model = TinyLM()

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the loss, and log what the callback's strategy did in the step before."""
        telemetry = self.trainer.callbacks[0].strategy.telemetry
        self.log_dict({f"clip/{name}": telemetry[name] for name in ("grad_norm", "z", "clipped") if name in telemetry})
        return self.model(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return a fused optimizer, which applies the clip factor inside its step."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3, fused=True)


class PrintSpikes(pl.Callback):
    """Print the steps whose norm is a clear outlier. It runs after the clipping callback."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Read the telemetry, in one transfer from the device."""
        row = trainer.callbacks[0].strategy.read_telemetry()
        if row["z"] > 10:
            norms = f"norm {row['grad_norm']:.2f} -> {row['clipped_norm']:.2f}"
            print(f"step {trainer.global_step - 1}: {norms}, z-score {row['z']:.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, callbacks=[ZClipLightningCallback(), PrintSpikes()],
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(make_batches(), batch_size=None))
        trainer.save_checkpoint(f"{folder}/last.ckpt")
        saved = torch.load(f"{folder}/last.ckpt", weights_only=True)["callbacks"]["ZClipLightningCallback"]
    print(f"saved statistics: mean norm {saved['strategies'][0]['state']['mean']:.2f}")
