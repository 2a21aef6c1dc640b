"""The paper's tables and figures: which runs each is made of, and which number of which run stands where.

Declared here only: `python train.py -m experiment=table3` runs what `sets()` says, and tables and figures read the same
runs. A run is named by what it sets on top of `experiment=paper`; runs that several share are the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

#: The paper's learning rates (Table 2).
LEARNING_RATES = (5e-3, 3e-3, 1e-3, 7e-4, 5e-4, 3e-4, 1e-4)
#: Of which the paper's text calls these high: Figure 5 shows them, and Figure 6 the others.
HIGH_RATES = (5e-3, 3e-3, 1e-3)
#: That of all other tables.
RATE = 1e-3
#: What configs/clip/zclip.yaml sets, and a run need not.
ZCLIP = {"z_thresh": 2.5, "alpha": 0.97}
#: The paper's ZClip never starts its statistics anew; the library's does, see `help(ZClip)`.
NO_RECOVERY = ("clip.recovery_window", "null")
#: What the paper says of its thresholds (Section 4). The caption of Figure 1 says 2.5, of a run of Table 2.
THRESHOLD_SAYS = "ZClip's z_thresh is 2.0 at 3e-3 and 5e-3, and 2.5 at the others (the paper's Section 4)"


class Setting(NamedTuple):
    """What one run sets; over seeds, several runs.

    Attributes:
        clip: option of the group `clip`.
        lr: the paper's learning rate; what a scale makes of it is its `paper.lr_scale`.
        others: further keys and values.
    """

    clip: str
    lr: float = RATE
    others: tuple[tuple[str, str], ...] = ()

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return [f"clip={self.clip}", f"paper.lr={self.lr:g}", *(f"{key}={value}" for key, value in self.others)]


def _zclip(lr: float = RATE, **changes: float) -> Setting:
    """Return the paper's ZClip, whose threshold is 2.0 at the two highest rates (Section 4)."""
    if lr >= 3e-3:
        changes.setdefault("z_thresh", 2.0)
    others = {key: value for key, value in changes.items() if value != ZCLIP[key]}
    return Setting("zclip", lr, (NO_RECOVERY, *((f"clip.{key}", f"{value:g}") for key, value in others.items())))


def _written(lr: float) -> str:
    return f"{lr:.0e}".replace("e-0", "e-")


#: What the runs of a row are called, by its groups.
GROUPS = {"fixed": "fixed", "zclip": "ZClip", "bad": "with bad batches", "good": "without bad batches"}


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        header: as printed.
        measure: name of the number, see `measures.py`.
        group: whose run of the row it is; empty if a row has one.
    """

    header: str
    measure: str
    group: str = ""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        label: as printed; also the row's name among the paper's numbers.
        settings: by the columns' groups.
    """

    label: str
    settings: Mapping[str, Setting]


class Table(NamedTuple):
    """A table.

    Attributes:
        name: `table2` and so on.
        title: what it shows.
        stub: header of the labels.
        rows, columns: in order.
        across: whether the best of a measure is one of its row, as in Table 2, or one of its column.
        says: what else a reader must know, for the line below it.
    """

    name: str
    title: str
    stub: str
    rows: Sequence[Row]
    columns: Sequence[Column]
    across: bool = False
    says: str = ""

    def labelled(self) -> Iterator[tuple[str, Setting]]:
        """Yield the settings of each row with what they are called, as "ZClip, with bad batches"."""
        for row in self.rows:
            for group, setting in row.settings.items():
                yield (f"{row.label}, {GROUPS[group]}" if group else row.label), setting


SCORES = (Column("HellaSwag", "hellaswag"), Column("WinoGrande", "winogrande"))
TRAINED = (Column("train loss", "train_loss"), Column("spikes", "spikes"), Column("spike score %", "spike_score"))
TESTED = (Column("spikes", "spikes"), Column("spike score %", "spike_score"), Column("test loss", "test_loss"))


def _rows(settings: Mapping[str, Setting]) -> list[Row]:
    """Return a row for each of some settings, by their labels."""
    return [Row(label, {"": setting}) for label, setting in settings.items()]


STRATEGIES = {
    "No clipping": Setting("none"),
    "Fixed 1.0": Setting("fixed"),
    "AutoClip": Setting("autoclip"),
    "ZClip": _zclip(),
}
OTHERS = {
    "AdaGC": Setting("adagc"),
    "GradientStabilizer": Setting("gradient_stabilizer"),
    "Skip-step": Setting("skip_step"),
    "AGC": Setting("agc"),
    "No clipping, QK-norm": Setting("none", others=(("model.qk_norm", "true"),)),
    "ZClip with recovery": Setting("zclip"),
}
VARIANTS = {
    "Max": Setting("zclip_max", others=(NO_RECOVERY,)),
    "Mean": Setting("zclip_mean", others=(NO_RECOVERY,)),
    "Reciprocal": _zclip(),
}
THRESHOLDS = {f"{z:.1f}": _zclip(z_thresh=z) for z in (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)}
ALPHAS = {f"{alpha:.2f}": _zclip(alpha=alpha) for alpha in (0.90, 0.93, 0.95, 0.97, 0.98, 0.99)}


def _lab(setting: Setting, steps: str) -> Setting:
    return setting._replace(others=(*setting.others, ("data.corruption.steps", steps)))


TABLES = {
    table.name: table
    for table in (
        Table(
            "table2",
            "fixed clipping and ZClip at each learning rate",
            "learning rate",
            [Row(_written(lr), {"fixed": Setting("fixed", lr), "zclip": _zclip(lr)}) for lr in LEARNING_RATES],
            [
                Column(f"{header}, {label}", measure, group)
                for header, measure in (
                    ("train loss", "train_loss"),
                    ("HellaSwag", "hellaswag"),
                    ("WinoGrande", "winogrande"),
                )
                for label, group in (("fixed", "fixed"), ("ZClip", "zclip"))
            ],
            across=True,
            says=THRESHOLD_SAYS,
        ),
        Table(
            "table3",
            "clipping strategies",
            "strategy",
            _rows(STRATEGIES),
            [*TESTED, *SCORES],
        ),
        Table(
            "table5",
            "variants of the clipping function",
            "variant",
            _rows(VARIANTS),
            [*TESTED, *SCORES],
        ),
        Table(
            "table6",
            "the threshold of the z-score",
            "z_thresh",
            _rows(THRESHOLDS),
            [*TRAINED, *SCORES],
        ),
        Table(
            "table7",
            "the smoothing of mean and variance",
            "alpha",
            _rows(ALPHAS),
            [*TRAINED, *SCORES],
        ),
        Table(
            "throughput",
            "speed of training",
            "strategy",
            _rows(STRATEGIES),
            [Column("million tokens/hour", "tokens_per_hour"), Column("clipping, % of a step", "clip_share")],
            says="runs that share a machine slow each other down: benchmarks of clipping say what it costs",
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
            _rows(STRATEGIES | OTHERS),
            [Column("train loss", "train_loss"), *TESTED, *SCORES],
        ),
        Table(
            "spike_lab",
            "beyond the paper: bad batches put in, against the same seed undisturbed",
            "strategy",
            [
                Row(label, {"bad": _lab(setting, "${paper.lab_steps}"), "good": _lab(setting, "[]")})
                for label, setting in (STRATEGIES | OTHERS).items()
            ],
            [
                Column("excursion (nats)", "excursion", "bad"),
                Column("ignoring them costs", "lost_batches", "bad"),
                Column("steps to recover", "recovery", "bad"),
                Column("test loss, disturbed", "test_loss", "bad"),
                Column("undisturbed", "test_loss", "good"),
                Column("difference", "lost", "bad"),
            ],
        ),
    )
}


#: What Figures 5 and 6 compare.
COMPARED = ("Fixed 1.0", "ZClip")


def _compared(rates: Sequence[float]) -> dict[str, Setting]:
    """Return both at some learning rates."""
    return {
        f"{label} at {_written(lr)}": setting
        for lr in rates
        for label, setting in zip(COMPARED, (Setting("fixed", lr), _zclip(lr)), strict=True)
    }


#: The runs that each figure shows, by their labels; Figure 3 is of none.
FIGURES: dict[str, dict[str, Setting]] = {
    "figure1": {"No clipping": Setting("none", 3e-3), "Fixed 1.0": Setting("fixed", 3e-3), "ZClip": _zclip(3e-3)},
    "figure2": {"Fixed 1.0": Setting("fixed")},
    "figure4": {"Fixed 1.0 at 5e-4": Setting("fixed", 5e-4), "ZClip at 3e-3": _zclip(3e-3)},
    "figure5": _compared(HIGH_RATES),
    "figure6": _compared([lr for lr in LEARNING_RATES if lr not in HIGH_RATES]),
    "figure7": {"ZClip": _zclip()},
    "figure8": VARIANTS,
    "figure9": {"ZClip": _lab(_zclip(), "[]")},
    "ema": {f"alpha {label}": setting for label, setting in ALPHAS.items()},
}


def sets() -> dict[str, list[Setting]]:
    """Return the runs of each table and figure, by the name that `experiment=` takes; `all` is all of them, once."""
    found = {
        name: [setting for row in table.rows for setting in row.settings.values()] for name, table in TABLES.items()
    }
    found |= {name: list(shown.values()) for name, shown in FIGURES.items()}
    found["all"] = list(dict.fromkeys(setting for some in found.values() for setting in some))
    return found
