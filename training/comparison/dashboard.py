"""W&B's workspace and report of a comparison, as code (package wandb-workspaces).

``panels``, ``workspace`` and ``report`` are pure: they make objects that a test can inspect and
need neither login nor network. ``save`` is the only step that talks to the server.
"""

from collections.abc import Sequence
from typing import Any

from training.loggers.wandb import STEP

GROUP, JOB = "Group", "JobType"
CURVES = {  # metric -> title; the same keys that train.py logs
    "train/error": "Unweighted error",
    "train/loss": "Loss",
    "train/dudt_rms": "du/dt RMS",
    "train/grad_norm": "Gradient norm",
    "train/v_loss": "Velocity error",
}
SPEED = {
    "perf/step_ms": "Step time, median (ms)",
    "perf/samples_per_s": "Samples per second",
    "perf/mfu": "MFU",
}
BY_TIMESTEP = "^error_t/"
LOSS_MEDIA = ("comparison/curves", "comparison/pairs", "comparison/lockstep")
SPEED_MEDIA = tuple(
    f"comparison/{name}" for name in ("speedup", "time", "memory", "mfu", "split", "distribution")
)


def _need() -> Any:
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the dashboard needs the package wandb-workspaces: pip install -e '.[dashboard]'"
        ) from error
    return reports, workspaces


def panels() -> dict[str, list[Any]]:
    """Section -> its panels: curves grouped by attention, speed, the comparison's own plots."""
    wr, _ = _need()
    by_attention = {"groupby": JOB, "groupby_rangefunc": "minmax", "x": STEP}
    lines = [
        wr.LinePlot(title=title, y=[name], log_y=name == "train/error", **by_attention)
        for name, title in CURVES.items()
    ]
    by_timestep = wr.LinePlot(title="Error by time t", metric_regex=BY_TIMESTEP, x=STEP, log_y=True)
    bars = [wr.BarPlot(title=t, metrics=[name], groupby=JOB) for name, t in SPEED.items()]
    over = wr.LinePlot(title="Step time over the run", y=["perf/step_ms"], **by_attention)
    scatter = wr.ScatterPlot(title="Error over step time", x="perf/step_ms", y="train/error")
    return {
        "Loss matching": [*lines, by_timestep],
        "Speed": [*bars, over, scatter],
        "Comparison": [
            wr.MediaBrowser(title="Curves, floors, lock-step", media_keys=list(LOSS_MEDIA)),
            wr.MediaBrowser(title="Over tokens", media_keys=list(SPEED_MEDIA)),
            wr.WeavePanelSummaryTable(table_name="comparison/verdicts"),
        ],
        "Samples": [wr.MediaBrowser(title="Samples from the same noise", media_keys=["samples"])],
    }


def _only(pair: str) -> str:
    return f"Metric('{GROUP}') == '{pair}'"


def workspace(entity: str, project: str, pair: str | None = None) -> Any:
    """A saved view of the project: the runs of one pair (all, if None), grouped by attention."""
    _, ws = _need()
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"flash-jvp: {pair or 'all pairs'}",
        sections=[
            ws.Section(name=name, panels=parts, is_open=True) for name, parts in panels().items()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, smoothing_type="gaussian", smoothing_weight=5),
        runset_settings=ws.RunsetSettings(
            filters=_only(pair) if pair else "", groupby=[ws.Metric(JOB)]
        ),
    )


def report(entity: str, project: str, pair: str, verdicts: Sequence[tuple[str, str]]) -> Any:
    """The pair as a document: its verdicts in words, then every section over its runs."""
    wr, _ = _need()
    runs = wr.Runset(
        entity=entity,
        project=project,
        name=pair,
        filters=_only(pair),
        groupby=[JOB],
    )
    blocks: list[Any] = [wr.H1(text="Verdict")]
    blocks += [wr.P(text=f"{title}: {words}") for title, words in verdicts]
    for name, parts in panels().items():
        blocks += [wr.H1(text=name), wr.PanelGrid(runsets=[runs], panels=parts)]
    return wr.Report(
        entity=entity,
        project=project,
        title=f"Attentions compared: {pair}",
        description="Same initial weights, same batches, same noise; only the attention differs.",
        blocks=blocks,
    )


def save(thing: Any) -> str:
    """Send a workspace or report to the server; its address."""
    thing.save()
    return thing.url


def entity_or_raise(entity: str | None) -> str:
    """The entity to save under; nothing is asked for on the terminal."""
    import wandb

    try:
        found = entity or wandb.Api().default_entity
    except Exception as error:  # of several kinds: not logged in, no network
        raise ValueError(
            "W&B cannot be reached as a logged-in user: run 'wandb login' and upload the offline"
            f" runs with 'wandb sync' first; save=false only shows what would be saved ({error})"
        ) from error
    if not found:
        raise ValueError("entity: the account has no default entity; give entity=NAME")
    return found


def verdicts(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, words) of every verdict of results.json."""
    if "verdicts" in results:
        return [
            (f"Speed against {arm}", found["words"]) for arm, found in results["verdicts"].items()
        ]
    titles = {"free_run": "Free run", "lockstep": "Lock-step"}
    return [(title, results[name]["words"]) for name, title in titles.items()]


def title_of(panel: Any) -> str:
    return getattr(panel, "title", None) or getattr(panel, "table_name", None) or ""
