"""ZClip in a loop with Accelerate, with accumulated gradients; the statistics are saved by `save_state`.

python examples/accelerate_loop.py
"""

from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from toy import TinyLM, make_batches

from zclip import ZClip

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = TinyLM()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True))
    zclip = ZClip()
    accelerator.register_for_checkpointing(zclip)
    for step, batch in enumerate(make_batches()):
        for micro_batch in batch.chunk(2):
            with accelerator.accumulate(model):
                accelerator.backward(model(micro_batch))
                if accelerator.sync_gradients:  # the last micro-batch of a step
                    zclip.step(model, optimizer=optimizer)
                optimizer.step()
                optimizer.zero_grad()
        row = zclip.read_telemetry()
        if row["z"] > 10:
            print(f"step {step}: norm {row['grad_norm']:.2f} -> {row['clipped_norm']:.2f}, z-score {row['z']:.1f}")
    with TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        zclip.load_state_dict(ZClip().state_dict())  # as if this were a new process
        accelerator.load_state(folder)
    print(f"restored statistics: mean norm {zclip.state['mean']:.2f}")
