"""The plots of the report, each an SVG string that goes into the page as it is; one is drawn as a PNG file too.

Deterministic: no date, a fixed salt for the ids, text left as text (the browser's fonts). Drawn without pyplot, so there is no
state that is shared with a caller.
"""

import io
import math
import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2733", "#5d6878", "#e4e8ee"
COLOURS = {"contrec": "#2563c9", "popularity": "#9aa4b2", "oracle": "#c98a1b"}
OTHER_COLOURS = ("#1b8a6b", "#a2418f", "#b5482f", "#5a5fc7")
STYLE = {
    "svg.hashsalt": "contrec_dist",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#c5ccd6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.frameon": False,
}
LEGEND_COLUMNS = 4  # more names take another line
LOSS_TITLES = {
    "loss": "weighted sum",
    "negative": "catalogue cross-entropy (nats)",
    "diffusion": "denoising",
    "lm": "reasoning text (nats a token)",
    "dispersive": "dispersive",
}


def plot_losses(lines: list[dict]) -> str:
    """Every loss term against optimizer steps, one panel each; what is not finite leaves a gap."""
    terms = [term for term in LOSS_TITLES if any(term in line for line in lines)]
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(terms))
        figure, grid = _make_figure(9.6, 2.5 * math.ceil(len(terms) / columns), math.ceil(len(terms) / columns), columns)
        for axes, term in zip(grid, terms):
            points = [(line["step"], line[term]) for line in lines if math.isfinite(line.get(term, math.nan))]
            axes.plot(*zip(*points) if points else ([], []), color=COLOURS["contrec"], linewidth=1.6)
            axes.set_title(LOSS_TITLES[term])
            axes.set_xlabel("step")
            axes.grid(axis="y")
        for axes in grid[len(terms) :]:
            axes.set_visible(False)
        return _to_svg(figure, "Training losses")


def plot_loss_and_probe(lines: list[dict], probes: list[dict]) -> str:
    """The training loss and the validation probe's HR, by query and by sampler, over optimizer steps."""
    with matplotlib.rc_context(STYLE):
        return _to_svg(_draw_loss_and_probe(lines, probes), "Loss and validation probe")


def loss_and_probe_png(lines: list[dict], probes: list[dict]) -> bytes:
    """The same as a PNG file."""
    with matplotlib.rc_context(STYLE):
        figure, data = _draw_loss_and_probe(lines, probes), io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
        return data.getvalue()


def _draw_loss_and_probe(lines: list[dict], probes: list[dict]) -> Figure:
    rates = sorted(key for key in probes[0] if "_hr@" in key)
    figure, (axes,) = _make_figure(9.6, 3.4)
    points = [(line["step"], line["loss"]) for line in lines if math.isfinite(line.get("loss") or math.nan)]
    axes.plot(*zip(*points) if points else ([], []), color=COLOURS["popularity"], linewidth=1.4, label="loss")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    beside = axes.twinx()
    for number, key in enumerate(rates):
        rule, _, cut = key.partition("_hr@")
        values = [line[key] for line in probes]
        colour = (COLOURS["contrec"], *OTHER_COLOURS)[number]
        beside.plot([line["step"] for line in probes], values, color=colour, marker="o", markersize=4, linewidth=1.6,
                    label=f"HR@{cut} by {rule}")  # fmt: skip
    beside.set_ylim(bottom=0)
    beside.set_ylabel(f"HR on {probes[-1]['num_users']:,} validation users")
    beside.grid(axis="y")
    handles = [*axes.get_lines(), *beside.get_lines()]
    axes.legend(handles, [line.get_label() for line in handles], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles))
    return figure


def plot_buckets(rates: dict[str, list[dict]]) -> str:
    """HR@10 by the popularity bucket of the held-out item, one group of bars a bucket, one bar a recommender."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _make_figure(9.6, 3.2)
        num_buckets = len(next(iter(rates.values())))
        width = 0.8 / len(rates)
        for number, (name, rows) in enumerate(rates.items()):
            places = [bucket - 0.4 + width * (number + 0.5) for bucket in range(num_buckets)]
            heights = [row["hr@10"] or 0.0 for row in rows]
            axes.bar(places, heights, width * 0.92, label=name, color=_colour(name, number))
        first = next(iter(rates.values()))
        axes.set_xticks(range(num_buckets), [_bucket_label(row) for row in first], fontsize=8)
        axes.set_xlabel("training interactions of the held-out item (rare to popular), and users in the bucket")
        axes.set_ylabel("HR@10")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="upper left", ncols=min(len(rates), LEGEND_COLUMNS))
        return _to_svg(figure, "HR@10 by popularity of the held-out item")


def plot_spectrum(eigenvalues: list[float]) -> str:
    """Share of variance by principal direction, largest first, on a log scale: a steep fall is a collapse."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _make_figure(6.0, 3.0)
        total = sum(eigenvalues) or 1.0
        shares = [value / total if value > 0 else math.nan for value in eigenvalues]
        axes.plot(range(1, len(shares) + 1), shares, color=COLOURS["contrec"], linewidth=1.6)
        axes.set_yscale("log")
        axes.set_xlabel("principal direction")
        axes.set_ylabel("share of variance")
        axes.grid(axis="y")
        return _to_svg(figure, "Spectrum of the latents")


def plot_sampler_curve(curve: dict[int, dict]) -> str:
    """HR@10 of the sampled latents' neighbours against the number of sampler steps."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _make_figure(6.0, 3.0)
        steps = sorted(curve)
        axes.plot(steps, [curve[step]["hr@10"] for step in steps], color=COLOURS["contrec"], marker="o", linewidth=1.6)
        axes.set_xscale("log")
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sampler steps")
        axes.set_ylabel("HR@10 (validation users)")
        axes.grid(axis="y")
        return _to_svg(figure, "HR@10 against sampler steps")


def plot_seconds(seconds: dict[str, float]) -> str:
    """Seconds of every stage, in the order of the pipeline."""
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _make_figure(6.0, 0.6 + 0.32 * len(seconds))
        names, values = list(seconds), list(seconds.values())
        bars = axes.barh(names, values, color=COLOURS["contrec"], height=0.62)
        axes.bar_label(bars, [f"{value:,.1f} s" for value in values], padding=4, color=MUTED)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(values, default=1.0) or 1.0)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
        return _to_svg(figure, "Seconds of every stage")


def _bucket_label(row: dict) -> str:
    low, high = row["min_train"], row["max_train"]
    span = "–" if low is None else str(low) if low == high else f"{low}–{high}"
    return f"{span}\n{row['num_users']:,} users"


def _colour(name: str, number: int) -> str:
    return COLOURS.get(name, OTHER_COLOURS[number % len(OTHER_COLOURS)])


def _make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def _to_svg(figure: Figure, label: str) -> str:
    """The <svg> element alone, scaled by the page, with a label for screen readers."""
    figure.patch.set_alpha(0)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)
