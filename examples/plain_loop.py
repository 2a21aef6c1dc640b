"""ZClip in a plain PyTorch loop: what three bad batches do to the loss, with and without clipping.

python examples/plain_loop.py
"""

import torch
from toy import BAD_STEPS, TinyLM, make_batches

from zclip import ClippingStrategy, FixedNorm, NoClipping, ZClip


def train(strategy: ClippingStrategy, bad_steps: tuple[int, ...] = BAD_STEPS) -> list[float]:
    """Return the loss of each step."""
    torch.manual_seed(0)
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for step, batch in enumerate(make_batches(bad_steps)):
        loss = model(batch)
        loss.backward()
        strategy.step(model, optimizer=optimizer)  # after backward, before the optimizer
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == BAD_STEPS[0]:
            norm, clipped_norm = (strategy.read_telemetry()[key] for key in ("grad_norm", "clipped_norm"))
    print(f"{type(strategy).__name__:12}  {norm:11.2f}  {clipped_norm:7.2f}", end="")
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)  # the model is small: more threads would only wait for each other
    print(f"norms are those of step {BAD_STEPS[0]}; excess is that of the next ten losses after the bad batches")
    print("strategy      norm before    after  mean excess loss")
    undisturbed = train(NoClipping(), bad_steps=())
    print("  without bad batches")
    for strategy in (NoClipping(), FixedNorm(max_norm=1.0), ZClip()):
        losses = train(strategy)
        first = BAD_STEPS[-1] + 1
        excess = [losses[i] - undisturbed[i] for i in range(first, first + 10)]
        print(f"  {sum(excess) / len(excess):.3f} nats")
