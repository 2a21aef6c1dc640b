"""The equations of every strategy in plain Python floats (float64), from the papers and the docstrings.

Each class makes the decisions of one run. `clip` takes a `Step` with a finite norm and returns the factors on its
gradients. It leaves what `read_telemetry` must return in `telemetry`, and statistics in `statistics`.
"""

import math
import statistics
from typing import Any, NamedTuple

import numpy as np

NAN = math.nan


class Step(NamedTuple):
    """One step: the norm of each gradient, 0 where it is missing, and what is behind the norms."""

    norms: list[float]
    loss: float | None = None
    weights: list[np.ndarray] | None = None
    gradients: list[np.ndarray | None] | None = None

    @property
    def norm(self) -> float:
        return math.hypot(*self.norms)


class Equations:
    """A rule: factors on each tensor, or one for all, and whether the optimizer must skip the step."""

    skip = False
    telemetry: dict[str, float]

    def clip(self, step: Step) -> Any:
        raise NotImplementedError

    @property
    def statistics(self) -> dict[str, Any]:
        return {}


class GlobalEquations(Equations):
    """A rule over the global norm: `target` returns the bound on it."""

    max_grad_norm = None

    def target(self, x: float) -> tuple[float, dict[str, float]]:
        """Return the bound on the norm after clipping, and the telemetry of the rule."""
        raise NotImplementedError

    def observe(self, x: float) -> float:
        """Return the coefficient of a finite norm."""
        rule_target, own = self.target(x)
        self.bound = rule_target if self.max_grad_norm is None else min(rule_target, self.max_grad_norm)
        clipped = x > self.bound
        coefficient = self.bound / (x + 1e-6) if clipped else 1.0
        self.telemetry = {
            "grad_norm": x, "clipped_norm": x * coefficient, "clipped": clipped,
            "clipped_by_max": clipped and self.bound < rule_target, **own,
        }  # fmt: skip
        return coefficient

    def clip(self, step: Step) -> float:
        return self.observe(step.norm)


def of_tensors(step: Step, factors: list[float]) -> dict[str, float]:
    """Return the telemetry of a rule with a factor for each tensor."""
    clipped = sum(h < 1 for h in factors)
    after = math.hypot(*(h * n for h, n in zip(factors, step.norms, strict=True)))
    return {"grad_norm": step.norm, "clipped_norm": after, "clipped": clipped > 0, "clipped_by_max": 0,
            "clipped_tensors": clipped}  # fmt: skip


class NoClippingEquations(GlobalEquations):
    def target(self, x):
        return math.inf, {}


class FixedNormEquations(GlobalEquations):
    def __init__(self, max_norm=1.0):
        self.max_norm = max_norm

    def target(self, x):
        return self.max_norm, {}


class AutoClipEquations(GlobalEquations):
    """Algorithm 1 of arXiv 2007.14469, over those of the latest `window` norms that are not 0."""

    def __init__(self, percentile=10.0, window=None):
        self.percentile, self.window, self.history = percentile, window, []

    def target(self, x):
        self.history.append(x)
        ordered = sorted(norm for norm in (self.history[-self.window :] if self.window else self.history) if norm)
        if not ordered:
            return math.inf, {"threshold": math.inf}
        rank = (len(ordered) - 1) * (self.percentile / 100)
        low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
        target = low + (high - low) * (rank - math.floor(rank))
        return target, {"threshold": target}

    @property
    def statistics(self):
        return {"count": len(self.history)}


class ZClipEquations(GlobalEquations):
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

    def target(self, x):
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
        return target, {"z": z, "mean": mean, "std": std, "spike": spike, "recovered": recovered}

    @property
    def statistics(self):
        return {"mean": self.mean, "var": self.var}

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


class AdaGCEquations(Equations):
    """Algorithm 1 of arXiv 2502.11034; a tensor without an average after the warm-up starts one.

    `recovery_window` is the rule of `zclip.AdaGC`.
    """

    def __init__(self, lambda_rel=1.04, beta=0.99, warmup_steps=100, lambda_abs=1.0, recovery_window=None):
        self.lambda_rel, self.beta, self.warmup_steps, self.lambda_abs = lambda_rel, beta, warmup_steps, lambda_abs
        self.recovery_window, self.count, self.gamma = recovery_window, 0, None

    def factors(self, norms: list[float], global_norm: float) -> list[float]:
        """Return the factor on each norm, and update its average."""
        self.gamma = self.gamma or [math.inf] * len(norms)
        self.blocks = self.blocks if self.count else [[] for _ in norms]
        factors = []
        for i, (n, gamma) in enumerate(zip(norms, self.gamma, strict=True)):
            bound = self.lambda_abs / global_norm if global_norm and self.count < self.warmup_steps else None
            h = min(1.0, (bound if bound is not None else self.lambda_rel * gamma / n) if n else 1.0)
            factors.append(h)
            if n and (self.count < self.warmup_steps or gamma == math.inf):
                self.gamma[i] = min(gamma, h * n)
            elif n:
                self.gamma[i] = self.beta * gamma + (1 - self.beta) * h * n
            if n and self.count >= self.warmup_steps and self.recovery_window:
                self.blocks[i].append((n, h < 1))
                if len(self.blocks[i]) == self.recovery_window:
                    if sum(clipped for _, clipped in self.blocks[i]) >= 0.75 * self.recovery_window:
                        self.gamma[i] = statistics.fmean(norm for norm, _ in self.blocks[i])
                    self.blocks[i] = []
        self.count += 1
        return factors

    def clip(self, step):
        factors = self.factors(step.norms, step.norm)
        self.telemetry = of_tensors(step, factors)
        return factors

    @property
    def statistics(self):
        return {"count": self.count, "gamma": self.gamma}


class GlobalAdaGCEquations(AdaGCEquations):
    """The same over the global norm."""

    def clip(self, step):
        (h,) = self.factors([step.norm], step.norm)
        self.telemetry = {"grad_norm": step.norm, "clipped_norm": h * step.norm, "clipped": h < 1, "clipped_by_max": 0}
        return h

    @property
    def statistics(self):
        return {"count": self.count, "gamma": self.gamma and self.gamma[0]}


class LogZScoreEquations(GlobalEquations):
    """Weighted mean and variance of all log norms so far, by their weights alpha^age, not by a recursion."""

    def __init__(self, alpha=0.97, z_thresh=3.0, max_grad_norm=None, warmup_steps=10, min_std=0.02):
        self.alpha, self.z_thresh, self.max_grad_norm = alpha, z_thresh, max_grad_norm
        self.warmup_steps, self.min_std, self.logs = warmup_steps, min_std, []

    def moments(self) -> tuple[float, float]:
        if not self.logs:
            return 0.0, 0.0
        weights = [self.alpha ** (len(self.logs) - 1 - i) for i in range(len(self.logs))]
        mean = sum(w * y for w, y in zip(weights, self.logs, strict=True)) / sum(weights)
        return mean, sum(w * (y - mean) ** 2 for w, y in zip(weights, self.logs, strict=True)) / sum(weights)

    def target(self, x):
        mean, var = self.moments()
        std, target, z, spike, low = max(math.sqrt(var), self.min_std), math.inf, NAN, False, False
        if x > 0 and len(self.logs) >= self.warmup_steps:
            z = (math.log(x) - mean) / std
            spike, low = z > self.z_thresh, z < -self.z_thresh
            target = math.exp(mean + self.z_thresh * std) if spike else math.inf
            self.logs.append(mean + max(-self.z_thresh, min(self.z_thresh, z)) * std)
        elif x > 0:
            self.logs.append(math.log(x))
        return target, {"z": z, "mean": math.exp(mean), "std": std, "spike": spike, "low": low}

    @property
    def statistics(self):
        mean, var = self.moments()
        return {"count": len(self.logs), "mean": mean, "var": var}


class LaggedZScoreEquations(GlobalEquations):
    """Mean and deviation of norms that lie `lag` steps back, or of the older half of the norms so far."""

    def __init__(self, z_thresh=3.0, lag=500, window=500, warmup_steps=100, max_grad_norm=None):
        self.z_thresh, self.lag, self.window, self.warmup_steps = z_thresh, lag, window, warmup_steps
        self.max_grad_norm, self.norms = max_grad_norm, []

    def target(self, x):
        kept = self.norms[-(self.lag + self.window) :]
        compared = kept[: len(kept) - min(self.lag, len(self.norms) // 2)]
        mean = statistics.fmean(compared) if compared else 0.0
        std = max(statistics.pstdev(compared) if compared else 0.0, 1e-4 * mean)
        warm = len(self.norms) >= self.warmup_steps and mean > 0
        self.norms.append(x)
        target, z = (mean + self.z_thresh * std, (x - mean) / std) if warm else (math.inf, NAN)
        return target, {"z": z, "mean": mean, "std": std, "spike": x > target}

    @property
    def statistics(self):
        return {"count": len(self.norms)}


class TensorAutoClipEquations(Equations):
    """Algorithm 1 of arXiv 2007.14469 for each tensor, over its latest `window` norms, once there are so many."""

    def __init__(self, percentile=95.0, window=128):
        self.percentile, self.window, self.norms = percentile, window, None

    def clip(self, step):
        self.norms = self.norms or [[] for _ in step.norms]
        factors = []
        for n, norms in zip(step.norms, self.norms, strict=True):
            norms.extend([n] if n else [])
            bound = np.percentile(norms[-self.window :], self.percentile) if len(norms) >= self.window else math.inf
            factors.append(min(1.0, bound / n) if n else 1.0)
        self.telemetry = of_tensors(step, factors)
        return factors

    @property
    def statistics(self):
        return {"count": self.norms and [len(norms) for norms in self.norms]}


class GradientStabilizerEquations(Equations):
    """arXiv 2502.17055; a tensor's moments do not change on a step with a zero gradient."""

    def __init__(self, gamma1=0.7, gamma2=0.9, eps=1e-8):
        self.gamma1, self.gamma2, self.eps = gamma1, gamma2, eps
        self.t = self.m = self.v = None

    def clip(self, step):
        if self.t is None:
            self.t, self.m, self.v = ([0.0] * len(step.norms) for _ in range(3))
        factors = []
        for i, n in enumerate(step.norms):
            if not n:
                factors.append(1.0)
                continue
            self.t[i] += 1
            self.m[i] = self.gamma1 * self.m[i] + (1 - self.gamma1) * n
            self.v[i] = self.gamma2 * self.v[i] + (1 - self.gamma2) * n * n
            m, v = self.m[i] / (1 - self.gamma1 ** self.t[i]), self.v[i] / (1 - self.gamma2 ** self.t[i])
            factors.append(m / (math.sqrt(v) + self.eps) / n)
        after = math.hypot(*(h * n for h, n in zip(factors, step.norms, strict=True)))
        self.telemetry = {"grad_norm": step.norm, "clipped_norm": after, "clipped": after < step.norm,
                          "clipped_by_max": 0}  # fmt: skip
        return factors

    @property
    def statistics(self):
        return {"steps": self.t, "m": self.m, "v": self.v}


class SkipStepEquations(Equations):
    """The rule of OLMo-core's `SkipStepAdamW`."""

    def __init__(self, sigma=6.0, window=128):
        self.sigma, self.window, self.losses, self.norms = sigma, window, [], []

    def is_outlier(self, value, history):
        if not math.isfinite(value):
            return True
        latest = history[-self.window :]
        enough = len(history) >= max(2, self.window // 2) - 1 and len(latest) > 1
        outlier = enough and value - statistics.fmean(latest) > self.sigma * statistics.stdev(latest)
        history.append(value)
        return outlier

    def clip(self, step):
        self.skip = self.is_outlier(step.norm, self.norms)
        if step.loss is not None:
            self.skip |= self.is_outlier(step.loss, self.losses)
        self.telemetry = {"grad_norm": step.norm, "clipped_norm": 0.0 if self.skip else step.norm,
                          "clipped": self.skip, "clipped_by_max": 0, "skipped": self.skip}  # fmt: skip
        return 1.0

    @property
    def statistics(self):
        return {"norm_count": len(self.norms), "loss_count": len(self.losses)}


class AGCEquations(Equations):
    """Equation 3 of arXiv 2102.06171."""

    def __init__(self, ratio=0.01, eps=1e-3):
        self.ratio, self.eps = ratio, eps

    def clip(self, step):
        factors, clipped, squares = [], 0, 0.0
        for weight, gradient in zip(step.weights, step.gradients, strict=True):
            factor = np.ones(weight.shape[:1] + (1,) * (weight.ndim - 1) if weight.ndim > 1 else ())
            if gradient is not None:
                for unit in np.ndindex(*weight.shape[:1]) if weight.ndim > 1 else [()]:
                    g, w = np.linalg.norm(gradient[unit]), np.linalg.norm(weight[unit])
                    h = min(1.0, self.ratio * max(w, self.eps) / g) if g else 1.0
                    factor[unit], clipped, squares = h, clipped + (h < 1), squares + (h * g) ** 2
            factors.append(factor)
        self.telemetry = {"grad_norm": step.norm, "clipped_norm": math.sqrt(squares), "clipped": clipped > 0,
                          "clipped_by_max": 0, "clipped_units": clipped}  # fmt: skip
        return factors


class UpdateClipEquations:
    """Levanter's `clip_update_norm`, over norms without the decoupled weight decay; `scale` takes finite norms."""

    def __init__(self, sigmas=3.0, window=128):
        self.sigmas, self.window, self.norms = sigmas, window, []

    def scale(self, norm: float) -> float:
        recent, bound = self.norms[-self.window :], math.inf
        if len(recent) >= max(2, self.window // 2):
            bound = statistics.fmean(recent) + self.sigmas * max(statistics.pstdev(recent), 1e-6)
        self.norms.append(norm)
        self.bound, self.clipped = bound, norm > bound
        return bound / norm if self.clipped else 1.0


class UpdateBrakeEquations:
    """The docstring of `zclip.updates.UpdateBrake`, with norms and scales as they are instead of their logarithms."""

    def __init__(
        self,
        margin=1.6,
        release=0.999,
        sigmas=5.0,
        rise_steps=1000,
        fall_steps=30,
        warmup_steps=20,
        recovery_window=500,
    ):
        self.margin, self.release, self.rise_steps, self.fall_steps = margin, release, rise_steps, fall_steps
        self.sigmas, self.warmup_steps, self.recovery_window = sigmas, warmup_steps, recovery_window
        self.begin()

    def begin(self):
        self.s, self.level, self.norms, self.mean = 1.0, 0.0, 0, 0.0
        self.squares, self.variance, self.lag, self.in_a_row = [], 0.0, 1.0, 0

    def scale(self, norm: float) -> float:
        self.norms += 1
        factor = max(self.margin, math.exp(self.sigmas * math.sqrt(self.variance)))
        self.bound = self.level * factor if self.norms > self.warmup_steps else math.inf
        self.s **= self.release
        self.clipped = self.s * norm > self.bound
        if self.clipped:
            self.s = self.bound / norm
        if self.norms <= self.warmup_steps:
            self.level, self.mean = max(self.level, norm), norm
            return self.s
        self.in_a_row = self.in_a_row + 1 if norm > self.bound else 0
        if self.in_a_row == self.recovery_window:
            scale = self.s
            self.begin()
            self.s = scale
            return scale
        expected = self.mean * min(self.lag, 1.0)
        bounded = max(min(norm, self.bound), expected / max(math.exp(2 * math.sqrt(self.variance)), math.e))
        ratio = bounded / self.level
        self.level *= ratio ** (1 / (self.rise_steps if ratio > 1 else self.fall_steps))
        below = bounded / expected
        self.squares.append(2 * math.log(below) ** 2 if below < 1 else 0.0)
        if len(self.squares) <= 300:
            self.variance = statistics.fmean(self.squares)
        else:
            self.variance = 299 / 300 * self.variance + self.squares[-1] / 300
        self.lag *= (bounded / self.mean / self.lag) ** 0.02
        self.mean *= (bounded / self.mean) ** 0.02
        return self.s
