"""The labs: small experiments that show one instability each, and what prevents it.

This is the only declaration: `python train.py -m experiment=adam_lag_lab seed=0,1,2,3,4` trains the runs of a lab, and
`scripts/make_lab.py` reads the same runs. A run is identified by its overrides on top of `experiment=adam_lag`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Fork(NamedTuple):
    """Where a run begins: after the last step of another, in whose length it goes on.

    Attributes:
        overrides: settings of the other run on top of the lab's. Its seed, and what the user sets, are the same.
        times: length of the whole run, in multiples of that of the other.
    """

    overrides: tuple[str, ...]
    times: int = 2


class Arm(NamedTuple):
    """Runs of a lab that differ only in their seed.

    Attributes:
        label: how tables and figures name them.
        overrides: settings on top of the lab's.
        is_control: whether the arm is no strategy, but tests the explanation of the instability.
        fork: where the run begins; `None`: at its first step.
    """

    label: str
    overrides: tuple[str, ...]
    is_control: bool = False
    fork: Fork | None = None


def arm_of(arms: Sequence[Arm], label: str) -> Arm:
    """Return the arm that has a label."""
    return next(arm for arm in arms if arm.label == label)


class SpikeLab(NamedTuple):
    """Spikes that come by themselves, and the arms that are compared.

    Attributes:
        name: file in configs/experiment/ with the settings that all arms share.
        title: the instability.
        reference: label of the arm with which all others are compared.
        arms: all arms. Runs of the same seed see the same batches and begin with the same weights.
        cures: labels of the controls that must cure if the explanation holds.
        example: label of the arm with a rule over updates that one figure shows next to the reference.
    """

    name: str
    title: str
    reference: str
    arms: Sequence[Arm]
    cures: Sequence[str] = ()
    example: str | None = None

    @property
    def runs(self) -> list[Arm]:
        """What each run is, but for its seed."""
        return [*self.arms]

    def arm(self, label: str) -> Arm:
        """Return an arm by its label."""
        return arm_of(self.arms, label)


class RateLab(NamedTuple):
    """The loss at each of several learning rates, and the arms that are compared.

    Attributes:
        name, title, reference, arms: as in `SpikeLab`.
        rates: peak learning rates, in ascending order.
    """

    name: str
    title: str
    reference: str
    arms: Sequence[Arm]
    rates: Sequence[float]

    @property
    def runs(self) -> list[Arm]:
        """What each run is, but for its seed."""
        return [self.at(arm, rate) for arm in self.arms for rate in self.rates]

    def at(self, arm: Arm, rate: float) -> Arm:
        """Return an arm at one learning rate."""
        return Arm(f"{arm.label} at {rate:g}", (*arm.overrides, f"lr={rate:g}"), arm.is_control)


class BadDataLab(NamedTuple):
    """Bad batches at random steps, and the arms that are compared after them.

    Each arm also has runs without bad batches. They show what bad batches cost the arm, and what the arm itself costs.

    Attributes:
        name, title, reference, arms: as in `SpikeLab`. The steps and kinds of bad batches differ by seed.
        without_bad: the setting that leaves out the bad batches.
    """

    name: str
    title: str
    reference: str
    arms: Sequence[Arm]
    without_bad: str

    @property
    def runs(self) -> list[Arm]:
        """What each run is, but for its seed."""
        return [each for arm in self.arms for each in (arm, self.clean(arm))]

    def clean(self, arm: Arm) -> Arm:
        """Return an arm without bad batches."""
        return Arm(f"{arm.label} without bad batches", (*arm.overrides, self.without_bad), arm.is_control)


class ContinuedLab(NamedTuple):
    """Runs in which something changes in the middle, and the arms that are compared after that.

    Attributes:
        name, title, reference, arms: as in `SpikeLab`. A run of each arm is the base of its forks.
        changes: what changes at the fork, by its name in tables: settings on top of the arm's.
        rises: those changes after which norms rise for a good reason, so that no rule is needed.
        only_rises: arms that are compared after `rises` only. Those with a `fork` begin there, the others have bases.
        by_hand: arms that go on from the base of the reference arm, and are compared with its unchanged run.
        unchanged: the name of the change that changes nothing.
    """

    name: str
    title: str
    reference: str
    arms: Sequence[Arm]
    changes: Mapping[str, tuple[str, ...]]
    rises: Sequence[str]
    only_rises: Sequence[Arm]
    by_hand: Sequence[Arm]
    unchanged: str

    @property
    def runs(self) -> list[Arm]:
        """What each run is, but for its seed: those from which others go on come first."""
        continued = [arm for name in self.changes for arm in self.continued_arms(name).values()]
        bases = [*self.arms, *(arm for arm in self.only_rises if arm.fork is None)]
        return [*bases, *continued, *(self.from_reference(arm) for arm in self.by_hand)]

    def continued_arms(self, name: str) -> dict[str, Arm]:
        """Return the arms after one change, by the labels of the arms themselves."""
        arms = (*self.arms, *(self.only_rises if name in self.rises else ()))
        return {arm.label: self.continued(arm, name) for arm in arms}

    def continued(self, arm: Arm, name: str) -> Arm:
        """Return an arm after one change."""
        overrides = (*arm.overrides, *self.changes[name])
        return Arm(f"{arm.label}, {name}", overrides, arm.is_control, arm.fork or Fork(arm.overrides))

    def from_reference(self, arm: Arm) -> Arm:
        """Return an arm that goes on from the base of the reference arm."""
        return arm._replace(fork=Fork(arm_of(self.arms, self.reference).overrides))


Lab = SpikeLab | RateLab | BadDataLab | ContinuedLab


def _batches_of(sequences: int) -> tuple[str, ...]:
    return (f"trainer.global_batch_size={sequences}", f"trainer.micro_batch_size={sequences}")


def _own_class(group: str, name: str, place: str) -> tuple[str, str]:
    """Return the settings that put a class of this package into a group of the configuration."""
    return f"{group}.name={name}", f"{group}._target_=experiments.labs.{place}"


#: Every strategy, with the arguments of its file.
STRATEGIES = (
    Arm("no clipping", ("clip=none",)),
    Arm("fixed 1.0", ("clip=fixed",)),
    Arm("ZClip", ("clip=zclip",)),
    Arm("AutoClip", ("clip=autoclip",)),
    Arm("AdaGC", ("clip=adagc",)),
    Arm("GlobalAdaGC", ("clip=global_adagc",)),
    Arm("AGC", ("clip=agc",)),
    Arm("log z-score", ("clip=log_z_score",)),
    Arm("lagged z-score", ("clip=lagged_z_score",)),
    Arm("TensorAutoClip", ("clip=tensor_autoclip",)),
    Arm("GradientStabilizer", ("clip=gradient_stabilizer",)),
    Arm("skip-step", ("clip=skip_step",)),
)

#: Rules over the optimizer's updates, which act on the learning rate.
UPDATE_RULES = (
    Arm("update clipping", ("clip=none", "update=update_clip")),
    Arm("brake", ("clip=none", "update=brake")),
    Arm("ZClip and brake", ("clip=zclip", "update=brake")),
)

#: Two rules at once that may replace ZClip: experiments/notes/own-strategy.md says what they must show.
SKIPPING = Arm(
    "skipping log z-score and brake",
    (
        "clip=log_z_score",
        *_own_class("clip", "skipping_log_z_score", "skipping_log_z_score.SkippingLogZScore"),
        "+clip.skip_thresh=5.0",
        "update=brake",
    ),
)
#: All that were tried. On bad batches none of them is shown to be better than ZClip.
CANDIDATES = (
    Arm("log z-score and brake", ("clip=log_z_score", "update=brake")),
    Arm("skip-step and brake", ("clip=skip_step", "update=brake")),
    SKIPPING,
)

#: Setting of a brake that never begins again, however many norms in a row are above its bound.
_NO_RECOVERY = "update.recovery_window=null"

#: The brake with other settings. With little memory, norms stay above the bound for more steps than the recovery waits.
BRAKES = tuple(
    Arm(f"brake, {name} {value}", ("clip=none", "update=brake", f"update.{name}={value}", *more))
    for name, value, more in (
        ("release", "0", (_NO_RECOVERY,)),
        ("release", "0.99", (_NO_RECOVERY,)),
        ("release", "0.9997", ()),
        ("margin", "1.3", ()),
        ("margin", "2.5", ()),
    )
)

#: The scales that the brake has chosen in a recorded run, for runs of other seeds. Those of seed 4 begin first.
REPLAYED = tuple(
    Arm(
        f"the brake's scales of seed {seed}",
        (
            "clip=none",
            "update=monitor",
            *_own_class("update", "replayed", "replayed_scales.ReplayedScales"),
            f"+update.archive=experiments/results/runs/adam-lag/pico-none-brake-lr0.01-{run}.json.xz",
        ),
        is_control=True,
    )
    for seed, run in ((0, "seed0-10fe4415"), (4, "seed4-72c26e60"))
)

#: A lower rate from step 1,250 on, before the first spikes, as people set it by hand.
LATER_RATES = tuple(
    Arm(
        f"{scale} of the rate after step 1,250",
        (
            "clip=none",
            "update=monitor",
            *_own_class("update", "later_rate", "later_rate.LaterRate"),
            "+update.after=1250",
            f"+update.scale={scale}",
        ),
        is_control=True,
    )
    for scale in ("0.3", "0.1")
)

#: The brake's rule over gradient norms. If it cures too, the brake does not need the norm of the update.
GRADIENT_BRAKES = tuple(
    Arm(
        label,
        (
            f"clip={clip}",
            "update=brake",
            *_own_class("update", "gradient_brake", "gradient_brake.GradientBrake"),
        ),
        is_control=True,
    )
    for label, clip in (("brake on gradient norms", "none"), ("ZClip and brake on gradient norms", "zclip"))
)

#: AdaMod in place of AdamW, whose settings it shares. Its memory, beta3, is about that of the brake.
ADAMOD = (
    "optim=custom",
    *_own_class("optim", "adamod", "adamod.AdaMod"),
    "+optim.betas=[0.9,0.999]",
    "+optim.beta3=0.999",
    "+optim.eps=1e-7",
    "+optim.weight_decay=0.01",
)

ADAM_LAG = SpikeLab(
    "adam_lag",
    "Adam's second moment lags behind gradients that shrink",
    reference="no clipping",
    arms=(
        Arm("no clipping", ("clip=none", "update=monitor")),  # records the norms of updates, and changes nothing
        *STRATEGIES[1:],
        *UPDATE_RULES,
        SKIPPING,
        *BRAKES,
        *REPLAYED,
        *LATER_RATES,
        *GRADIENT_BRAKES,
        Arm("beta2 0.95", ("clip=none", "optim.betas=[0.9,0.95]"), is_control=True),
        Arm("beta2 0.99", ("clip=none", "optim.betas=[0.9,0.99]"), is_control=True),
        Arm("AMSGrad", ("clip=none", "optim.amsgrad=true"), is_control=True),
        Arm("AdaMod", ("clip=none", *ADAMOD), is_control=True),
        Arm("StableAdamW", ("clip=none", "update=stable_adamw"), is_control=True),
        Arm("SPAM", ("clip=none", "update=spam"), is_control=True),
        Arm("eps 1e-3", ("clip=none", "optim.eps=1e-3"), is_control=True),
        Arm("half the rate", ("clip=none", "lr=5e-3"), is_control=True),
        Arm("0.3 of the rate", ("clip=none", "lr=3e-3"), is_control=True),
        Arm(
            "batches of 8", ("clip=none", "trainer.global_batch_size=8", "trainer.micro_batch_size=8"), is_control=True
        ),
    ),
    cures=("beta2 0.95",),
    example="brake",
)

#: Arms of the Adam-lag lab that are compared under other conditions too.
MAIN_ARMS = tuple(
    ADAM_LAG.arm(label)
    for label in ("no clipping", "fixed 1.0", "ZClip", "brake", "ZClip and brake", "half the rate", "beta2 0.95")
)
ADAM_LAG_WIDE = ADAM_LAG._replace(
    name="adam_lag_wide", title="Adam's second moment lags, in a model twice as wide", arms=MAIN_ARMS
)
ADAM_LAG_COSINE = ADAM_LAG._replace(
    name="adam_lag_cosine", title="Adam's second moment lags, with a cosine schedule", arms=MAIN_ARMS
)

RATE = RateLab(
    "rate",
    "learning rates that are too high",
    reference="no clipping",
    arms=(
        *STRATEGIES[:5],
        *UPDATE_RULES[1:],
        Arm("QK-norm", ("clip=none", "model.qk_norm=true"), is_control=True),
        Arm("z-loss 1e-4", ("clip=none", "optim.z_loss=1e-4"), is_control=True),
        Arm("QK-norm and ZClip", ("clip=zclip", "model.qk_norm=true")),
    ),
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
)

#: sqrt(2 / 5d) for a width d of 64: the initial weights of arXiv 2312.16903, which has embeddings of 1.
_SMALL = "0.0791"

DEPTH = RateLab(
    "depth",
    "a deep model that starts without a warm-up",
    reference="no clipping",
    arms=(
        *STRATEGIES[:5],
        *UPDATE_RULES[1:],
        Arm("warm-up of 10 %", ("clip=none", "optim.warmup_fraction=0.1"), is_control=True),
        Arm("beta2 0.95", ("clip=none", "optim.betas=[0.9,0.95]"), is_control=True),
        Arm("embeddings of 0.079", ("clip=none", f"model.embedding_initializer_range={_SMALL}"), is_control=True),
        Arm("embeddings of 1", ("clip=none", "model.embedding_initializer_range=1"), is_control=True),
    ),
    rates=(1e-3, 3e-3, 1e-2),
)

#: Each run has four bad batches of each kind, so that one set of runs shows all kinds.
BAD_DATA = BadDataLab(
    "bad_data",
    "bad batches at random steps",
    reference="no clipping",
    arms=(
        *STRATEGIES,
        *UPDATE_RULES[1:],
        *CANDIDATES,
        *GRADIENT_BRAKES,
        Arm("instance filter", ("clip=none", "data.instance_filter.enabled=true"), is_control=True),
    ),
    without_bad="data.corruption.random_steps=0",
)

_MONITORED = Arm("no clipping", ("clip=none", "update=monitor"))
#: A brake without statistics of the steps before the fork.
_BRAKE_FROM_FORK = Arm(
    "brake from the fork on", ("clip=none", "update=brake"), is_control=True, fork=Fork(_MONITORED.overrides)
)

#: Up to the fork the brake has not acted, so its base is that of no clipping to the last bit.
CONTINUED = ContinuedLab(
    "continued",
    "a change of text, context or rate in the middle of a run",
    reference="no clipping",
    arms=(
        _MONITORED,
        Arm("ZClip", ("clip=zclip", "update=monitor")),
        *UPDATE_RULES[1:],
    ),
    changes={
        "nothing changes": (),
        "new text": ("fork_data=new", "data.max_tokens=null"),
        "longer context": ("fork_data=new", "data.sequence_length=64"),
        "decay of the rate": ("optim.warmup_fraction=0.5", "optim.final_lr_fraction=0.1"),  # begins at the fork
    },
    rises=("new text", "longer context"),
    only_rises=(
        _BRAKE_FROM_FORK,
        Arm("brake without recovery", ("clip=none", "update=brake", _NO_RECOVERY), is_control=True),
    ),
    by_hand=(
        Arm("half the rate by hand", ("clip=none", "update=monitor", "lr=5e-3"), is_control=True),
        Arm("a tenth of the rate by hand", ("clip=none", "update=monitor", "lr=1e-3"), is_control=True),
        _BRAKE_FROM_FORK,
    ),
    unchanged="nothing changes",
)

LABS: dict[str, Lab] = {
    lab.name: lab for lab in (ADAM_LAG, ADAM_LAG_WIDE, ADAM_LAG_COSINE, RATE, DEPTH, BAD_DATA, CONTINUED)
}
