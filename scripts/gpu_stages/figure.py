"""Figure 1 of the paper with a 60M model: losses without clipping, with fixed clipping and with ZClip."""

from scripts.gpu_stages.context import Context, metrics

CLIPS = ("none", "fixed", "zclip")


def run(context: Context) -> None:
    """Train the three runs, which resume where a call before has left them, and draw their losses."""
    steps, rate = (6, "1e-2") if context.dry_run else (800, "1e-2")
    settings = (*context.model(), f"trainer.max_steps={steps}", f"lr={rate}", "trainer.checkpoint_every=200")
    if not context.dry_run:
        settings = (
            *settings,
            "data.sequence_length=1024",
            "trainer.global_batch_size=64",
            "trainer.micro_batch_size=64",
        )
    rows = {}
    for clip in CLIPS:
        rows[clip] = metrics(context.train(f"figure-{clip}", f"clip={clip}", *settings))
        losses = [row["loss"] for row in rows[clip] if row["loss"] is not None]
        numbers = {
            "final_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
            "highest_of_last_400": round(max(losses[-400:]), 4),
            "steps": len(rows[clip]),
            "tokens_per_second": max(row["tokens_per_second"] for row in rows[clip]),
        }
        context.save(**{clip: numbers})
    _draw(context, rows, rate)


def _draw(context: Context, rows: dict[str, list[dict[str, float]]], rate: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for clip, lines in rows.items():
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=clip, linewidth=0.8)
    axis.set(xlabel="step", ylabel="loss, nats per token", title=f"{len(rows[CLIPS[0]])} steps, learning rate {rate}")
    axis.legend()
    figure.savefig(context.out / "figure1.png", dpi=120, bbox_inches="tight")
    context.save(figure="figure1.png")
