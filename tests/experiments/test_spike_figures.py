"""The figures of labs on spikes."""

import matplotlib.pyplot as plt
import numpy as np

from experiments.labs.declaration import LABS
from experiments.labs.spike_figures import draw_areas, draw_losses, draw_spike, first_spike
from experiments.labs.spike_numbers import spike_numbers
from experiments.labs.spike_tables import ArmResult
from tests.experiments.test_lab_styles import made_run, of_runs


def spiking(height, start=900, steps=1200, rises=0):
    loss = np.full(steps, 0.1)
    loss[start : start + 100] = 0.3
    loss[start + rises : start + 100] = 0.1 * height
    norm = np.where(np.arange(steps) >= start - 10, 5.0, 1.0)
    return made_run(steps, loss=loss, grad_norm=norm, update_norm=norm, clipped=np.zeros(steps))


def test_shown_spike_is_the_first_that_is_clear_to_see():
    assert first_spike([spiking(4), spiking(20, rises=60), spiking(20, start=500)]) is None
    run, spike = first_spike([spiking(4), clear := spiking(20)])
    assert run is clear and spike.start == 900
    figure = draw_spike(run, spike)
    said = [ax.get_title(loc="left") for ax in figure.axes]
    assert said == [
        "leaves its usual level at step 891, 10 before the spike",
        "leaves its usual level at step 891, 10 before the spike",
        "leaves its usual level at step 901, with the spike",
    ]
    plt.close(figure)


def drawn_areas(areas):
    """Return the figure of areas by label and seed."""
    lab = LABS["adam_lag"]
    calm = spike_numbers(spiking(1))
    results = [
        ArmResult(lab.arm(label), {seed: calm._replace(area=area) for seed, area in by_seed.items()}, None, None)
        for label, by_seed in areas.items()
    ]
    return draw_areas(lab, results)


def test_areas_name_other_seeds_and_mark_no_level_below_their_floor():
    low = drawn_areas(
        {"no clipping": {0: 4.0, 1: 4.0, 2: 4.0}, "ZClip": {0: 1.0, 1: 1.0}, "brake": dict.fromkeys(range(3), 0.0)}
    )
    (ax,) = low.axes
    assert {text.get_text().strip() for text in ax.texts} == {"no clipping", "half of it"}
    assert [text.get_text() for text in ax.get_yticklabels()] == ["no clipping", "ZClip (seeds 0, 1)", "brake"]
    high = drawn_areas({"no clipping": {0: 400.0}})
    assert {text.get_text().strip() for text in high.axes[0].texts} == {"no clipping", "half of it", "a tenth"}
    for figure in (low, high):
        figure.draw_without_rendering()
        box = figure.axes[0].xaxis.label.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
        plt.close(figure)


def test_losses_name_each_seed_and_cut_no_title():
    lab = LABS["adam_lag"]
    labels = ["no clipping", "fixed 1.0", "ZClip", "ZClip and brake on gradient norms"]
    runs = {(lab.arm(label), seed): spiking(20) for label in labels for seed in (0, 2)}
    runs[lab.arm("ZClip"), 1] = spiking(20)
    found = [
        ArmResult(
            lab.arm(label), {s: spike_numbers(run) for (arm, s), run in runs.items() if arm.label == label}, None, None
        )
        for label in labels
    ]
    figure = draw_losses(lab, found, of_runs(runs))
    figure.draw_without_rendering()
    for ax in figure.axes:
        box = ax.title.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, ax.get_title()
    legend = {line.get_label(): line.get_color() for line in figure.legends[0].get_lines()}
    assert [*legend] == ["seed 0", "seed 1", "seed 2"]
    for ax in figure.axes:
        colors = [line.get_color() for line in ax.lines]
        assert colors[:2] == [legend["seed 0"], legend["seed 2"]]
    assert len({line.get_linestyle() for line in figure.axes[2].lines}) >= 2
    plt.close(figure)
