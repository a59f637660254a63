"""Plots of a recommender: its metrics by epoch, a map of its items, and its recall by the popularity of items."""

import pathlib

import matplotlib
import numpy as np
from matplotlib import patheffects, pyplot

# No window is needed, nor a display.
matplotlib.use("agg")

# Rare items have hardly moved from their random initial embeddings.
MAX_ITEMS = 500
MAX_LABELS = 50
MAX_TITLE = 32
STYLE = {"font.size": 13, "axes.titlesize": 15, "axes.spines.top": False, "axes.spines.right": False}
OURS, POPULARITY = "C0", "C1"


def plot_epochs(path: pathlib.Path, history: dict[str, list[float]], popularity: dict[str, float]) -> None:
    """Plots metrics by epoch, with a line for popularity.

    Args:
        path: PNG file to write.
        history: the values of all epochs, by the title of each metric.
        popularity: the value of each metric for popularity, by title.
    """
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(history), figsize=(12, 5), layout="constrained")
        for axis, (title, values) in zip(panels, history.items(), strict=True):
            axis.plot(np.arange(1, len(values) + 1), values, color=OURS, marker="o", label="this model")
            axis.axhline(popularity[title], color=POPULARITY, linestyle="--", label="popularity")
            axis.set(title=f"{title} by epoch", xlabel="epoch", ylabel=f"{title}, mean over test users")
            axis.set_ylim(0, 1.1 * max(*values, popularity[title], 1e-3))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
            axis.legend(loc="lower right", frameon=False)
        _save(figure, path)


def plot_items(path: pathlib.Path, embeddings: np.ndarray, titles: list[str], counts: np.ndarray) -> None:
    """Plots a map of the items with the most rows in training, and names as many of them as there is room for.

    Args:
        path: PNG file to write.
        embeddings: `[num_items, embedding_dim]` float.
        titles: the title of each item.
        counts: `[num_items]` ints, the rows of each item in training.
    """
    # The best known items last, on top of the others.
    order = np.argsort(counts, kind="stable")[-MAX_ITEMS:]
    points, shares = principal_components(embeddings[order])
    what = "the items" if len(order) == len(counts) else f"the {len(order)} items with the most rows in training"
    with pyplot.rc_context({**STYLE, "font.size": 12}):
        figure, axis = pyplot.subplots(figsize=(12, 9), layout="constrained")
        drawn = axis.scatter(*points.T, c=counts[order], s=18, cmap="viridis_r", norm="log", linewidths=0, alpha=0.8)
        bar = figure.colorbar(drawn, ax=axis, label="rows in training", shrink=0.7, pad=0.01)
        ticks = [first * 10**zeros for zeros in range(10) for first in (1, 2, 5)]
        ticks = [tick for tick in ticks if counts[order].min() <= tick <= counts[order].max()]
        bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
        bar.ax.minorticks_off()
        axis.margins(0.06)
        axis.set(
            title=f"Map of {what}: near each other if the same users choose them",
            xlabel=f"first principal component of the embeddings ({shares[0]:.0%} of their variance)",
            ylabel=f"second principal component ({shares[1]:.0%})",
        )
        # The layout decides where the labels are.
        figure.canvas.draw()
        _label(figure, axis, points[::-1], [titles[item] for item in order[::-1]])
        _save(figure, path)


def principal_components(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two principal components of normalized embeddings.

    Args:
        embeddings: `[num_items, embedding_dim]` float.

    Returns:
        `(points, shares)`: `[num_items, 2]`, and the shares of the variance that the components have, `[2]`.
    """
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    normalized = embeddings / np.maximum(norms, np.finfo("float32").tiny)
    centered = normalized - normalized.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    points, variances = np.zeros((len(embeddings), 2)), np.zeros(2)
    points[:, : len(sizes)] = left[:, :2] * sizes[:2]
    variances[: len(sizes)] = sizes[:2] ** 2
    return points, variances / max((sizes**2).sum(), np.finfo("float32").tiny)


def plot_recall_by_popularity(
    path: pathlib.Path, counts: np.ndarray, items: np.ndarray, hits: dict[str, np.ndarray], k: int
) -> None:
    """Plots which share of the test rows is recommended, for groups of items, from rare to popular ones.

    Each group has about a tenth of the training rows: many rare items, or a few popular ones.

    Args:
        path: PNG file to write.
        counts: `[num_items]` ints, the rows of each item in training.
        items: `[num_test_rows]` ints, the item of each test row, from 0.
        hits: whether the item of each test row is recommended, `[num_test_rows]` bools, by method.
        k: the number of items in a list.
    """
    order = np.argsort(counts, kind="stable")
    middles = np.cumsum(counts[order]) - counts[order] / 2
    # Groups without an item are left out.
    _, group_of_ordered = np.unique(np.floor(10 * middles / counts.sum()), return_inverse=True)
    group_of = np.empty(len(counts), int)
    group_of[order] = group_of_ordered
    num_rows = np.bincount(group_of[items], minlength=group_of.max() + 1)
    labels = []
    for group, rows in enumerate(num_rows):
        members = counts[group_of == group]
        span = f"{members.min():,}" if members.min() == members.max() else f"{members.min():,}-{members.max():,}"
        labels.append(f"{span}\n{len(members):,} item{'s'[: len(members) > 1]}\n{rows:,} tested")
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(12, 6), layout="constrained")
        width = 0.8 / len(hits)
        for number, (method, is_hit) in enumerate(hits.items()):
            num_hits = np.bincount(group_of[items[is_hit]], minlength=len(num_rows))
            recall = num_hits / np.maximum(num_rows, 1)
            places = np.arange(len(num_rows)) + (number - (len(hits) - 1) / 2) * width
            bars = axis.bar(places, recall, width, label=method, color=(OURS, POPULARITY)[number % 2])
            axis.bar_label(bars, [f"{value:.2f}" if value >= 0.005 else "" for value in recall], fontsize=10, padding=2)
        axis.set_xticks(np.arange(len(num_rows)), labels, fontsize=11)
        axis.set_title(f"Recall@{k} by the popularity of items", loc="left")
        axis.set(
            xlabel="rows of an item in training, in groups with a tenth of all training rows each",
            ylabel=f"share of test rows in the {k} recommended",
        )
        axis.margins(x=0.02)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        # Above the bars, which may fill the axes.
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(hits), frameon=False)
        _save(figure, path)


def _label(figure, axis, points, titles) -> None:
    """Writes titles next to points, in this order, where no other title or named point is."""
    renderer = figure.canvas.get_renderer()
    frame = axis.get_window_extent(renderer)
    places = axis.transData.transform(points)
    sides = {(7, 0): ("left", "center"), (-7, 0): ("right", "center"), (0, 7): ("center", "bottom"),
             (0, -7): ("center", "top")}  # fmt: skip
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    taken = np.empty((0, 4))
    num_named = 0

    def is_free(box) -> bool:
        x0, y0, x1, y1 = taken.T
        is_apart = (x1 < box[0]) | (x0 > box[2]) | (y1 < box[1]) | (y0 > box[3])
        is_within = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
        return is_within and is_apart.all()

    for point, place, title in zip(points, places, titles, strict=True):
        own = np.concatenate([place - 5, place + 5])
        if num_named == MAX_LABELS or not is_free(own):
            continue
        title = title if len(title) <= MAX_TITLE else title[: MAX_TITLE - 3] + "..."
        for offset, (horizontal, vertical) in sides.items():
            # A dollar sign would begin a formula.
            text = axis.annotate(
                title, point, offset, textcoords="offset points", ha=horizontal, va=vertical, fontsize=10,
                parse_math=False, path_effects=halo,
            )  # fmt: skip
            box = text.get_window_extent(renderer).padded(2).extents
            if is_free(box):
                taken = np.concatenate([taken, [own, box]])
                num_named += 1
                axis.scatter(*point, s=30, facecolors="none", edgecolors="black", linewidths=0.8)
                break
            text.remove()


def _save(figure, path: pathlib.Path) -> None:
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
