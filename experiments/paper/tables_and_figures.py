"""The paper's tables and figures: the runs that each needs, and the number of each cell.

This is the only declaration: `python train.py -m experiment=table3` trains the runs of `SUITES["table3"]`, and tables
and figures read the same runs. A run is identified by its overrides on top of `experiment=paper`. Suites share runs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

#: The paper's learning rates (Table 2).
LEARNING_RATES = (5e-3, 3e-3, 1e-3, 7e-4, 5e-4, 3e-4, 1e-4)
#: The rates that the paper's text calls high. Figure 5 shows them, Figure 6 the others.
HIGH_RATES = (5e-3, 3e-3, 1e-3)
#: Learning rate of all other tables.
RATE = 1e-3
#: Settings of configs/clip/zclip.yaml, which runs need not override.
ZCLIP_DEFAULTS = {"z_thresh": 2.5, "alpha": 0.97}
#: The paper's ZClip never resets its statistics; the library's does, see `help(ZClip)`.
NO_RECOVERY = ("clip.recovery_window", "null")
#: The paper's thresholds (Section 4). The caption of its Figure 1 says 2.5, for a run of Table 2.
THRESHOLD_NOTE = "ZClip's z_thresh is 2.0 at 3e-3 and 5e-3, and 2.5 at the others (the paper's Section 4)"


class RunSpec(NamedTuple):
    """The overrides of one run; with several seeds, of several runs."""

    clip: str  # option of the group `clip`
    lr: float = RATE  # the paper's learning rate, which a scale multiplies by its `paper.lr_scale`
    extra: tuple[tuple[str, str], ...] = ()  # further keys and values

    @property
    def overrides(self) -> list[str]:
        """The overrides, as on the command line."""
        return [f"clip={self.clip}", f"paper.lr={self.lr:g}", *(f"{key}={value}" for key, value in self.extra)]


#: Runs by label.
Specs = Mapping[str, RunSpec]


def _zclip(lr: float = RATE, **changes: float) -> RunSpec:
    """Return the paper's ZClip, whose threshold is 2.0 at the two highest rates (Section 4)."""
    if lr >= 3e-3:
        changes.setdefault("z_thresh", 2.0)
    overrides = {key: value for key, value in changes.items() if value != ZCLIP_DEFAULTS[key]}
    return RunSpec("zclip", lr, (NO_RECOVERY, *((f"clip.{key}", f"{value:g}") for key, value in overrides.items())))


def _with_corruption(spec: RunSpec, steps: str) -> RunSpec:
    return spec._replace(extra=(*spec.extra, ("data.corruption.steps", steps)))


def _scientific(lr: float) -> str:
    """Format a learning rate like `5e-3`."""
    return f"{lr:.0e}".replace("e-0", "e-")


#: Labels of the runs of a row, by group.
GROUPS = {"fixed": "fixed", "zclip": "ZClip", "corrupted": "with corrupted batches", "baseline": "baseline"}

#: The runs of Table 2, by learning rate and group.
RATES = {lr: {"fixed": RunSpec("fixed", lr), "zclip": _zclip(lr)} for lr in LEARNING_RATES}
STRATEGIES = {
    "No clipping": RunSpec("none"),
    "Fixed 1.0": RunSpec("fixed"),
    "AutoClip": RunSpec("autoclip"),
    "ZClip": _zclip(),
}
ALL_STRATEGIES = STRATEGIES | {
    "AdaGC": RunSpec("adagc"),
    "GradientStabilizer": RunSpec("gradient_stabilizer"),
    "Skip-step": RunSpec("skip_step"),
    "AGC": RunSpec("agc"),
    "No clipping, QK-norm": RunSpec("none", extra=(("model.qk_norm", "true"),)),
    "ZClip with recovery": RunSpec("zclip"),
}
VARIANTS = {
    "Max": RunSpec("zclip_max", extra=(NO_RECOVERY,)),
    "Mean": RunSpec("zclip_mean", extra=(NO_RECOVERY,)),
    "Reciprocal": _zclip(),
}
THRESHOLDS = {f"{z:.1f}": _zclip(z_thresh=z) for z in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)}
ALPHAS = {f"{alpha:.2f}": _zclip(alpha=alpha) for alpha in (0.90, 0.93, 0.95, 0.97, 0.98, 0.99)}
#: The runs of the spike lab, by strategy and group. A baseline run has no corrupted batches.
SPIKE_LAB = {
    label: {"corrupted": _with_corruption(spec, "${paper.lab_steps}"), "baseline": _with_corruption(spec, "[]")}
    for label, spec in ALL_STRATEGIES.items()
}


class Column(NamedTuple):
    """A column of a table."""

    header: str
    measure: str  # key of `measures.MEASURES`
    group: str = ""  # of the run within the row; empty if each row has one run


class Table(NamedTuple):
    """A table."""

    name: str
    title: str
    row_header: str  # header of the column of labels
    rows: Mapping[str, Specs]  # runs by label, which is also the row's name in published.yaml, and group
    columns: Sequence[Column]
    best_per_row: bool = False  # whether the best values of a measure are those of a row, as in Table 2, or of a column
    note: str = ""  # sentence for the footnote

    def labelled_specs(self) -> list[tuple[str, RunSpec]]:
        """Return each run with its label, such as "ZClip, with corrupted batches"."""
        return [
            (f"{label}, {GROUPS[group]}" if group else label, spec)
            for label, specs in self.rows.items()
            for group, spec in specs.items()
        ]


def _rows(specs: Specs) -> dict[str, Specs]:
    """Return a row with one run for each label."""
    return {label: {"": spec} for label, spec in specs.items()}


_HELD_OUT = (Column("bits per byte", "bits_per_byte"), Column("last-word loss", "last_word"))
_SCORES = (*_HELD_OUT, Column("HellaSwag", "hellaswag"), Column("WinoGrande", "winogrande"))
_SPIKES = (Column("spikes", "spikes"), Column("spike score %", "spike_score"))
_TRAIN_LOSS, _TEST_LOSS = Column("train loss", "train_loss"), Column("test loss", "test_loss")
_TESTED = (*_SPIKES, _TEST_LOSS, *_SCORES)
_TRAINED = (_TRAIN_LOSS, *_SPIKES, *_SCORES)

_TABLES = (
    Table(
        "table2",
        "fixed clipping and ZClip at each learning rate",
        "learning rate",
        {_scientific(lr): specs for lr, specs in RATES.items()},
        [
            Column(f"{column.header}, {GROUPS[group]}", column.measure, group)
            for column in (_TRAIN_LOSS, *_SCORES)
            for group in ("fixed", "zclip")
        ],
        best_per_row=True,
        note=THRESHOLD_NOTE,
    ),
    Table("table3", "clipping strategies", "strategy", _rows(STRATEGIES), _TESTED),
    Table("table5", "variants of the clipping function", "variant", _rows(VARIANTS), _TESTED),
    Table("table6", "the threshold of the z-score", "z_thresh", _rows(THRESHOLDS), _TRAINED),
    Table("table7", "the smoothing of mean and variance", "alpha", _rows(ALPHAS), _TRAINED),
    Table(
        "throughput",
        "speed of training",
        "strategy",
        _rows(STRATEGIES),
        [Column("million tokens/hour", "tokens_per_hour"), Column("clipping, % of a step", "clip_share")],
        note="runs that share a machine slow each other down: the cost of clipping is measured by benchmarks",
    ),
    Table(
        "clip_rate",
        "share of steps that are clipped, by threshold",
        "z_thresh",
        _rows(THRESHOLDS),
        [Column("clipped by z-score %", "clipped_by_z"), Column("clipped at all %", "clipped")],
    ),
    Table(
        "strategies",
        "beyond the paper: more strategies, and none with QK-norm",
        "strategy",
        _rows(ALL_STRATEGIES),
        [_TRAIN_LOSS, *_TESTED],
    ),
    Table(
        "spike_lab",
        "beyond the paper: injected corrupted batches, compared with the baseline run of the same seed",
        "strategy",
        SPIKE_LAB,
        [
            Column("excess loss (nats)", "excess_loss", "corrupted"),
            Column("cost of skipping", "skip_cost", "corrupted"),
            Column("steps to recover", "recovery_steps", "corrupted"),
            Column("test loss, corrupted", "test_loss", "corrupted"),
            Column("test loss, baseline", "test_loss", "baseline"),
            Column("difference", "test_loss_increase", "corrupted"),
        ],
    ),
)
TABLES = {table.name: table for table in _TABLES}


def _compared(rates: Sequence[float]) -> dict[str, RunSpec]:
    """Return the runs of fixed clipping and of ZClip at some learning rates, by label."""
    labels = {"fixed": "Fixed 1.0", "zclip": "ZClip"}
    return {f"{label} at {_scientific(lr)}": RATES[lr][group] for lr in rates for group, label in labels.items()}


#: The runs that each figure shows, by label. Figure 3 shows none.
FIGURE_RUNS: dict[str, dict[str, RunSpec]] = {
    "figure1": {"No clipping": RunSpec("none", 3e-3), "Fixed 1.0": RATES[3e-3]["fixed"], "ZClip": RATES[3e-3]["zclip"]},
    "figure2": {"Fixed 1.0": RATES[1e-3]["fixed"]},
    "figure4": {"Fixed 1.0 at 5e-4": RATES[5e-4]["fixed"], "ZClip at 3e-3": RATES[3e-3]["zclip"]},
    "figure5": _compared(HIGH_RATES),
    "figure6": _compared([lr for lr in LEARNING_RATES if lr not in HIGH_RATES]),
    "figure7": {"ZClip": _zclip()},
    "figure8": VARIANTS,
    "figure9": {"ZClip": SPIKE_LAB["ZClip"]["baseline"]},
    "table3": STRATEGIES,
    "ema": {f"alpha {label}": spec for label, spec in ALPHAS.items()},
}

#: The runs of each table and figure, by the name that `experiment=` takes; `all` has every run once.
SUITES = {name: [spec for _, spec in table.labelled_specs()] for name, table in TABLES.items()}
SUITES |= {name: list(runs.values()) for name, runs in FIGURE_RUNS.items()}
SUITES |= {"all": list(dict.fromkeys(spec for specs in SUITES.values() for spec in specs))}
