"""What runs say of the paper's claims: each verdict with runs that give it, and with runs that give another."""

import numpy as np
import pytest

from experiments.paper.claims import CLAIMS, NOT_SUPPORTED, NOT_TESTABLE, SUPPORTED, verdicts
from experiments.paper.claims import verdict as judged
from experiments.paper.collect import Found
from experiments.paper.judging import by_seed
from experiments.paper.measures import last_loss_reached
from experiments.paper.statistics import TOO_FEW, NotTestable, paired, rate
from experiments.paper.suites import ALPHAS, FIGURES, STRATEGIES, THRESHOLDS, VARIANTS
from tests.experiments.conftest import SEEDS
from tests.experiments.modified_runs import RATES, changed, with_loss, with_result, without

LEAVES, _, HIGHER, FEWER, RECIPROCAL, THRESHOLD, ALPHA, NORMAL, OVERHEAD = CLAIMS


def test_verdicts_need_three_seeds_and_one_text_and_never_fail(everything):
    two = everything._replace(runs={key: run for key, run in everything.runs.items() if key[1] < 2})
    assert {verdict.verdict for verdict in verdicts(two)} == {NOT_TESTABLE}
    torn = everything._replace(runs={key: run for at, (key, run) in enumerate(everything.runs.items()) if at % 3})
    assert len(verdicts(torn)) == 9, "whatever is missing"
    all_gone = everything._replace(diverged={*everything.runs})
    assert len(verdicts(all_gone)) == 9 and all(
        each.verdict != SUPPORTED for each in verdicts(all_gone) if each.claim not in (LEAVES, OVERHEAD)
    )
    runs = dict(everything.runs)
    odd = next(iter(runs))
    runs[odd] = runs[odd]._replace(result={**runs[odd].result, "data_fingerprint": "ffff"})
    assert {each.verdict for each in verdicts(everything._replace(runs=runs))} == {NOT_TESTABLE}


def test_a_run_that_cannot_be_read_supports_nothing(everything):
    """And each that is lacking is named."""
    assert judged(everything, OVERHEAD).verdict == SUPPORTED
    key = (STRATEGIES["AutoClip"], 1)
    torn = without(everything, key)
    for lacking, said in (
        (torn._replace(refused=frozenset({key})), "left out: AutoClip (seed 1)"),
        (torn._replace(unfinished={key: 7}), "unfinished: AutoClip (seed 1 after 7 steps)"),
    ):
        found = judged(lacking, OVERHEAD)
        assert found.verdict == NOT_TESTABLE and found.numbers[-1] == said
        assert found.numbers[-2] == "supported, but for runs that are unfinished or left out"
        assert judged(lacking, RECIPROCAL).numbers == judged(everything, RECIPROCAL).numbers, "it is none of its runs"
    found = judged(torn, OVERHEAD)
    assert found.verdict == SUPPORTED and found.numbers[-1] == "not run: AutoClip (seed 1)"
    never = without(everything, *((setting, seed) for setting in STRATEGIES.values() for seed in SEEDS))
    assert judged(never, OVERHEAD).numbers == [TOO_FEW, "none of its runs has begun"]


def test_a_mean_over_settings_is_of_seeds_that_have_all(everything):
    settings = [(RATES[lr]["fixed"], None) for lr in (1e-3, 3e-3, 5e-3)]
    numbers = {
        setting: {"train_loss": [each, each + 1, each + 2]}
        for (setting, _), each in zip(settings, (1.0, 2.0, 6.0), strict=True)
    }
    found = without(with_result(everything, numbers), (RATES[3e-3]["fixed"], 1))
    assert by_seed(found, "train_loss", settings) == {0: 3.0, 2: 5.0}


def rates_are_best(found: Found, fixed: list[float], zclip: list[float]) -> Found:
    """The runs with the best learning rates of each by seed."""
    best = {"fixed": fixed, "zclip": zclip}
    return with_result(
        found,
        {
            row[group]: {"train_loss": [4.0 if rates[seed] == lr else 5.0 for seed in range(len(rates))]}
            for lr, row in RATES.items()
            for group, rates in best.items()
        },
    )


def six(found: Found) -> Found:
    """The runs with three more seeds, which are the first ones again."""
    return found._replace(runs=found.runs | {(setting, seed + 3): run for (setting, seed), run in found.runs.items()})


def test_higher_learning_rates(everything):
    """Three seeds cannot show it by signs, six can; where it is lower once, or the same, it is not."""
    higher = rates_are_best(everything, [1e-4] * 3, [5e-3] * 3)
    said = judged(higher, HIGHER)
    assert said.verdict == NOT_TESTABLE and "fewer than 6 seeds" in said.numbers[-1]
    assert "higher with 3 of 3 seeds, lower with 0 (sign test, p = 0.25)" in said.numbers[1]
    assert judged(rates_are_best(six(everything), [1e-4] * 6, [5e-3] * 6), HIGHER).verdict == SUPPORTED
    assert judged(rates_are_best(six(everything), [5e-3] * 6, [1e-4] * 6), HIGHER).verdict == NOT_SUPPORTED
    assert judged(rates_are_best(everything, [1e-3] * 3, [1e-3] * 3), HIGHER).verdict == NOT_SUPPORTED
    assert judged(rates_are_best(everything, [1e-3] * 3, [3e-3, 3e-3, 7e-4]), HIGHER).verdict == NOT_SUPPORTED
    gone = {(row["fixed"], seed) for lr, row in RATES.items() for seed in SEEDS if lr > 1e-4}
    said = judged(rates_are_best(everything, [5e-3] * 3, [5e-3] * 3)._replace(diverged=gone), HIGHER)
    assert "higher with 3 of 3" in said.numbers[1], "a run that diverged is the worst"
    gone = {(row["zclip"], seed) for row in RATES.values() for seed in SEEDS}
    said = judged(higher._replace(diverged=gone), HIGHER)
    assert said.verdict == NOT_SUPPORTED and "ZClip none, none, none" in said.numbers[0]
    assert "lower with 3" in said.numbers[1], "it allows no rate"
    said = judged(without(higher, (RATES[1e-3]["zclip"], 1)), HIGHER)
    assert said.verdict == NOT_TESTABLE and "it needs three seeds" in said.numbers[0], "a rate that was not run"
    low = with_result(everything, {RATES[lr]["zclip"]: {"train_loss": [4.0, 4.1, 4.2]} for lr in (1e-3, 3e-3, 5e-3)})
    assert "ZClip minus fixed: -" in judged(low, HIGHER).numbers[2]
    said = judged(without(six(low), *((RATES[1e-3]["zclip"], seed) for seed in range(4))), HIGHER)
    assert said.numbers == [TOO_FEW, "not run: 1e-3, ZClip (seeds 0, 1, 2, 3)"]
    said = judged(low._replace(diverged={(RATES[3e-3]["fixed"], 2)}), HIGHER)
    assert "others are measured by has diverged: clip=fixed" in said.numbers[2]


def test_fewer_tokens(everything):
    """Fixed clipping is at its last loss after 140 steps; ZClip after as many as it takes a straight line."""
    fixed, zclip = RATES[5e-4]["fixed"], RATES[3e-3]["zclip"]

    def saves(steps_by_seed):
        straight = {
            fixed: lambda seed, steps, own: 6 - steps / 139,
            zclip: lambda seed, steps, own: 6 - steps / steps_by_seed[seed],
        }
        return with_loss(everything, straight)

    faster = saves([69.5, 60, 50])
    said = judged(faster, FEWER)
    # 20 steps of 6 - s / 139 end with a mean of 6 - 129.5 / 139. That of 20 steps of 6 - s / 69.5, the last of them
    # number e, is as low from e = 75 on, after 76 of 140 steps; with 60 and 50 for 69.5 after 67 and 58.
    assert said.verdict == SUPPORTED and "52% fewer tokens (46%, 52%, 59% by seed" in said.numbers[0]
    said = judged(saves([69.5, 60, 30]), FEWER)
    assert said.verdict == NOT_SUPPORTED and "57% fewer" in said.numbers[0], "or as few as 16 %"
    assert judged(saves([60, 60, 60]), FEWER).verdict == NOT_SUPPORTED, "three seeds alike have p = 0.25"
    assert judged(saves([110, 111, 112]), FEWER).verdict == NOT_SUPPORTED, "fewer, but not 35 %"
    assert judged(saves([30, 139, 139]), FEWER).verdict == NOT_SUPPORTED, "not by chance"
    assert "0% fewer tokens (0%, 0%, 0% by seed" in judged(saves([139, 139, 139]), FEWER).numbers[0]
    said = judged(saves([139, 145, 69.5]), FEWER)
    assert "15% fewer tokens (0%, never, 46% by seed" in said.numbers[0], "never is no better than late"
    said = judged(without(faster, (RATES[5e-3]["zclip"], 1)), FEWER)
    assert "5e-03 6% (2 of 3 seeds), 3e-03 56%" in said.numbers[1], said
    gone = judged(faster._replace(diverged={(zclip, seed) for seed in SEEDS}), FEWER)
    assert gone.verdict == NOT_SUPPORTED and "(never, never, never by seed" in gone.numbers[0]
    gone = judged(faster._replace(diverged={(fixed, 0)}), FEWER)
    assert gone.verdict == NOT_TESTABLE and "others are measured by has diverged: clip=fixed" in gone.numbers[0]


def test_reciprocal(everything):
    def losses(reciprocal, mean, most):
        shown = zip(("Reciprocal", "Mean", "Max"), (reciprocal, mean, most), strict=True)
        return with_result(everything, {VARIANTS[name]: {"test_loss": loss} for name, loss in shown})

    best = losses([4.0, 4.1, 4.2], [4.2, 4.31, 4.4], [4.5, 4.61, 4.7])
    said = judged(best, RECIPROCAL)
    assert said.verdict == SUPPORTED and said.numbers[1].startswith("reciprocal minus mean: -0.2033 (p = 0.00027")
    assert said.numbers[0] == "mean test loss: reciprocal 4.100, mean 4.303, max 4.603"
    half = losses([4.0, 4.1, 4.2], [4.2, 4.31, 4.4], [4.0, 4.1, 4.21])
    assert judged(half, RECIPROCAL).verdict == NOT_SUPPORTED, "below both"
    nothing = judged(losses([4.0, 4.1, None], [4.2, 4.31, 4.4], [4.5, 4.61, 4.7]), RECIPROCAL)
    assert nothing.verdict == NOT_TESTABLE and "has no finite test_loss: clip=zclip" in nothing.numbers[0]
    assert judged(losses([4.0, 4.1, 4.2], [4.0, 4.1, 4.21], [4.5, 4.61, 4.7]), RECIPROCAL).verdict == NOT_SUPPORTED
    assert judged(losses([4.5, 4.61, 4.7], [4.2, 4.31, 4.4], [4.0, 4.1, 4.2]), RECIPROCAL).verdict == NOT_SUPPORTED
    said = judged(best._replace(diverged={(VARIANTS["Reciprocal"], 1)}), RECIPROCAL)
    assert said.verdict == NOT_SUPPORTED and said.numbers[0].startswith("reciprocal has diverged: clip=zclip")
    assert judged(best._replace(diverged={(VARIANTS["Max"], 1)}), RECIPROCAL).verdict == SUPPORTED, "it is beaten"


@pytest.mark.parametrize(("claim", "settings", "own"), [(THRESHOLD, THRESHOLDS, "2.5"), (ALPHA, ALPHAS, "0.97")])
def test_the_best_setting(claim, settings, own, everything):
    def losses(own_losses, **others):
        numbers = {setting: {"train_loss": [4.2, 4.31, 4.4]} for setting in settings.values()}
        numbers |= {settings[own]: {"train_loss": own_losses}}
        return with_result(
            everything, numbers | {settings[label]: {"train_loss": loss} for label, loss in others.items()}
        )

    best = losses([4.0, 4.1, 4.2])
    assert judged(best, claim).verdict == SUPPORTED
    assert judged(losses([4.3, 4.4, 4.5]), claim).verdict == NOT_SUPPORTED, "worse"
    assert judged(losses([4.2, 4.31, 4.4]), claim).verdict == NOT_SUPPORTED, "the same"
    rival = next(label for label in settings if label != own)
    said = judged(losses([4.0, 4.1, 4.2], **{rival: [4.01, 4.1, 4.2]}), claim)
    assert said.verdict == NOT_SUPPORTED and f"{own} minus {rival}: -0.0033 (p = 0.42" in said.numbers[1], said
    wild = losses([4.0, 4.1, 4.2], **{rival: [3.6, 4.1, 5.4]})
    assert judged(wild, claim).verdict == NOT_SUPPORTED, "below each, also those that are worse on the mean"
    said = judged(best._replace(diverged={(settings[own], 0)}), claim)
    assert said.verdict == NOT_SUPPORTED and f"{own} has diverged" in said.numbers[0]
    said = judged(best._replace(diverged={(settings[rival], 0)}), claim)
    assert said.verdict == SUPPORTED and f"{rival} has diverged" in said.numbers[-2], "it is beaten"
    alone = {(setting, 0) for label, setting in settings.items() if label != own}
    two = without(best, (settings[own], 1))._replace(diverged=alone)
    assert judged(two, claim).verdict == NOT_TESTABLE, "two seeds beat nobody"
    gone = two._replace(diverged={(settings[own], 0)})
    assert judged(gone, claim).verdict == NOT_TESTABLE, "and are beaten by nobody"
    lost = best._replace(runs=best.runs | {(settings[rival], 3): best.runs[settings[rival], 0]})
    better = with_result(lost, {settings[rival]: {"train_loss": [3.0, 3.1, 3.2, 3.3]}})
    said = judged(better._replace(diverged={(settings[rival], 3)}), claim)
    assert said.verdict == NOT_SUPPORTED, "with a seed that the others lack it beats nobody, and is not beaten"
    others = {(setting, seed) for label, setting in settings.items() if label != own for seed in (1, 2)}
    said = judged(without(best, *others)._replace(diverged={(s, 0) for s, _ in others}), claim)
    assert said.verdict == NOT_TESTABLE and said.numbers[0] == TOO_FEW, "nothing is compared with three seeds"
    fewer = without(best, *((setting, 0) for label, setting in settings.items() if label not in (own, rival)))
    said = judged(fewer, claim)
    assert said.verdict == NOT_TESTABLE and "it needs three seeds" in said.numbers[0], "the same seeds for all"


def test_normal_norms(everything):
    """In windows that are short; whether there are more rejections than of normal distributions."""

    def norms(draw, steps=4000):
        def change(setting, seed, run):
            if setting != FIGURES["figure9"]["ZClip"]:
                return run
            column = draw(np.random.default_rng(seed), steps)
            return run._replace(metrics={"step": np.arange(1, steps + 1), "grad_norm": column})

        return judged(changed(everything, change), NORMAL)

    short = judged(everything, NORMAL)
    assert short.verdict == NOT_TESTABLE and "are not short" in short.numbers[2]
    gone = everything._replace(diverged={(FIGURES["figure9"]["ZClip"], 1)})
    assert "others are measured by has diverged" in judged(gone, NORMAL).numbers[0]
    long = norms(lambda rng, steps: rng.normal(1, 0.1, steps), steps=800)
    assert long.verdict == NOT_TESTABLE and "up to 6% of a run" in long.numbers[2], long
    normal = norms(lambda rng, steps: rng.normal(1, 0.1, steps))
    assert normal.verdict == SUPPORTED and "of norms in 0 of 6 windows" in normal.numbers[0], normal
    skew = norms(lambda rng, steps: rng.exponential(1, steps))
    assert skew.verdict == NOT_SUPPORTED and "of norms in 6 of 6 windows" in skew.numbers[0], skew
    lognormal = norms(lambda rng, steps: np.exp(rng.normal(0, 1, steps)))
    assert "of norms in 6 of 6" in lognormal.numbers[0] and "of log norms in 0 of 6" in lognormal.numbers[1], lognormal


def test_overhead(everything):
    def shares(fixed, zclip):
        parts = {STRATEGIES["Fixed 1.0"]: fixed, STRATEGIES["ZClip"]: zclip}
        seconds = {
            setting: {"step_seconds": [{"forward_backward": 1 - share, "clip": share} for share in by_seed]}
            for setting, by_seed in parts.items()
        }
        return with_result(everything, seconds)

    little = shares([0.01, 0.011, 0.012], [0.012, 0.0131, 0.0139])
    said = judged(little, OVERHEAD)
    assert said.verdict == SUPPORTED and "fixed clipping: +0.20 (p = 0.00083" in said.numbers[1], said
    assert judged(shares([0.01] * 3, [0.0199] * 3), OVERHEAD).verdict == SUPPORTED
    slower = with_result(
        everything,
        {
            STRATEGIES[label]: {"step_seconds": [{"forward_backward": step - clip, "clip": clip}] * 3}
            for label, clip, step in (("Fixed 1.0", 0.01, 1.0), ("ZClip", 0.022, 2.0))
        },
    )
    assert judged(slower, OVERHEAD).verdict == NOT_SUPPORTED, "1.2 % of a step with fixed clipping"
    assert judged(shares([0.01] * 3, [0.0201] * 3), OVERHEAD).verdict == NOT_SUPPORTED
    assert judged(shares([0.01, 0.011, 0.012], [0.04, 0.042, 0.041]), OVERHEAD).verdict == NOT_SUPPORTED
    assert judged(shares([0.01, 0.01, 0.01], [0.01, 0.01, 0.03]), OVERHEAD).verdict == NOT_SUPPORTED, "not for sure"
    gone = little._replace(diverged={(STRATEGIES["No clipping"], 0)})
    assert judged(gone, OVERHEAD).verdict == SUPPORTED, "it is not compared"


def test_paired_differences():
    with pytest.raises(NotTestable, match="it needs three seeds"):
        paired([1.0, 2.0], [0.0, 0.0])
    difference = paired([1.0, 2.0, 3.0], [2.0, 2.5, 4.5])
    # Differences -1, -0.5, -1.5: mean -1, standard error 0.5 / sqrt(3), t = -3.4641 with two degrees of freedom.
    assert difference.mean == -1 and difference.p == pytest.approx(0.07418, abs=1e-4)
    assert difference.most == pytest.approx(-1 + 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    assert difference.least == pytest.approx(-1 - 4.3027 * 0.5 / 3**0.5, abs=1e-4)
    for one, p in ((1.0, 1.0), (2.0, 0.25)):
        same = paired([one] * 3, [1.0] * 3)
        assert same.p == p and same.least == same.most == same.mean, "the sign test"


def test_rates():
    """Garwood's intervals of Poisson counts: of none 0 to 3.69, of five 1.62 to 11.67."""
    assert rate(0, 10) == (0, 10, 0.0, pytest.approx(0.3689, abs=1e-4))
    assert rate(5, 10) == (5, 10, pytest.approx(0.1623, abs=1e-4), pytest.approx(1.1668, abs=1e-4))


def test_bad_batches_count_towards_no_loss_that_is_reached(everything):
    """A batch that is easy, or hard, on purpose."""
    key = (RATES[1e-3]["fixed"], 0)
    run = everything.runs[key]
    bad = run.config["data"]["corruption"]["steps"]
    loss = 6 - np.arange(140) / 139
    easy = loss.copy()
    easy[np.array(bad) - 1] = -100.0
    one, other = (run._replace(metrics={**run.metrics, "loss": each}) for each in (loss, easy))
    assert last_loss_reached(one, other).saved == 0 and last_loss_reached(other, one).saved == 0
    late = run._replace(config={**run.config, "data": {"corruption": {"steps": [139]}}})
    hard = loss.copy()
    hard[138] = 900.0
    reached = last_loss_reached(late._replace(metrics={**run.metrics, "loss": hard}), one)
    assert reached.loss == pytest.approx(6 - 129.5 / 139) and reached.above == pytest.approx(0, abs=1e-9)
