"""A clipping strategy of your own: the rule is one method, which sees the norm and the rule's statistics.

python examples/own_strategy.py
python -m zclip replay runs/main/NAME/metrics.jsonl clip=own_strategy.FollowMean factor=1.5,2   # in this folder
"""

import torch
from torch import Tensor

from zclip import ClippingStrategy, Decision


class FollowMean(ClippingStrategy):
    """Clip to `factor` times the running mean of the clipped norms."""

    nonnegative = ("mean",)  # a saved state with a negative mean is refused

    def __init__(self, factor: float = 1.5, max_grad_norm: float | None = None, **policy) -> None:
        super().__init__(max_grad_norm, **policy)  # policy: on_nonfinite, max_consecutive_nonfinite, scope
        self.factor = factor  # arguments are attributes of the same name: a saved state records them

    def initial_state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the statistics before the first step; infinity means that there is no mean yet."""
        return {"mean": torch.full_like(like, torch.inf)}

    def decide(self, norm: Tensor, state: dict[str, Tensor]) -> Decision:
        """Return the bound on this step's norm, and the statistics after the step."""
        mean, target = state["mean"], self.factor * state["mean"]
        follow = 0.97 * mean + 0.03 * norm.minimum(target)
        return Decision(target, {"mean": torch.where(mean.isinf(), norm, follow)}, telemetry={"mean": mean.clone()})


if __name__ == "__main__":
    from toy import TinyLM, make_batches

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, strategy = TinyLM(), FollowMean(factor=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    strategy.attach(optimizer)  # every optimizer.step() clips first
    for step, batch in enumerate(make_batches()):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        row = strategy.read_telemetry()
        if row["clipped"]:
            print(f"step {step}: norm {row['grad_norm']:.2f} -> {row['clipped_norm']:.2f}, mean {row['mean']:.2f}")
    resumed = FollowMean(factor=2.0)
    resumed.load_state_dict(strategy.state_dict())
    print(f"{resumed} continues at mean {resumed.state['mean']:.2f}")
