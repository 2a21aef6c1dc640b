"""The equations of every strategy in plain Python floats (float64), from the papers and the docstrings.

Each class makes the decisions of one run. `step` takes the norms of the tensors and returns the factor on each of them;
`telemetry` is what `read_telemetry` must return after it.
"""

import math
import statistics

NAN = math.nan


class ZClipEquations:
    """Section 3 of arXiv 2504.02507, with the recovery rule and the bound on the deviation of `zclip.ZClip`."""

    def __init__(
        self, alpha=0.97, z_thresh=2.5, max_grad_norm=None, eps=1e-6, warmup_steps=25, mode="zscore",
        clip_option="adaptive_scaling", clip_factor=1.0, skip_update_on_spike=False, recovery_window=40,
    ):  # fmt: skip
        self.alpha, self.z_thresh, self.max_grad_norm, self.eps = alpha, z_thresh, max_grad_norm, eps
        self.option = "max" if mode == "percentile" else clip_option
        self.clip_factor, self.skip_update_on_spike = clip_factor, skip_update_on_spike
        self.warmup_steps, self.recovery_window = warmup_steps, recovery_window
        self.first: list[float] = []
        self.mean = self.var = 0.0
        self.block: list[tuple[float, bool]] = []
        self.block_means = [0.0, 0.0, 0.0]  # newest first

    def observe(self, x: float) -> float:
        """Return the coefficient of a finite norm."""
        mean, std = self.mean, max(math.sqrt(self.var), 1e-4 * self.mean)
        z, spike, recovered, target = NAN, False, False, math.inf
        if len(self.first) < self.warmup_steps:
            self.first.append(x)
            self.mean, self.var = statistics.fmean(self.first), statistics.pvariance(self.first)
            self.block_means = [self.mean, 0.0, 0.0]
        else:
            z = (x - mean) / (std + self.eps)
            spike = z > self.z_thresh and mean > 0
            if spike:
                xi = {"adaptive_scaling": self.z_thresh**2 / z, "mean": 0.0, "max": self.z_thresh}[self.option]
                target = (mean + xi * std) * (self.clip_factor if self.option == "adaptive_scaling" else 1.0)
            if not (spike and self.skip_update_on_spike):
                y = target if spike else x
                self.mean = self.alpha * mean + (1 - self.alpha) * y
                self.var = self.alpha * self.var + (1 - self.alpha) * (y - self.mean) ** 2
            self.block.append((x, spike))
            if self.recovery_window and len(self.block) == self.recovery_window:
                recovered = self.end_block()
        rule_target = target
        if self.max_grad_norm is not None:
            target = min(target, self.max_grad_norm)
        coefficient = target / (x + 1e-6) if x > target else 1.0
        self.telemetry = {
            "grad_norm": x, "clipped_norm": x * coefficient, "clipped": x > target,
            "clipped_by_max": x > target and target < rule_target,
            "z": z, "mean": mean, "std": std, "spike": spike, "recovered": recovered,
        }  # fmt: skip
        return coefficient

    def end_block(self) -> bool:
        """Reset the statistics to those of the block after a rise or fall; return whether they were reset."""
        norms = [norm for norm, _ in self.block]
        mean, var = statistics.fmean(norms), statistics.pvariance(norms)
        rise = sum(spike for _, spike in self.block) >= 0.75 * len(norms)
        previous, *earlier = self.block_means
        fall = max(earlier) > 2 * max(mean, previous) and math.sqrt(self.var) > 4 * math.sqrt(var)
        self.block, self.block_means = [], [mean, previous, earlier[0]]
        if rise or fall:
            self.mean, self.var, self.block_means = mean, var, [mean, 0.0, 0.0]
        return rise or fall
