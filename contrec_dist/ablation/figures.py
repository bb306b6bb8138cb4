"""What the rows of an ablation measure: HR@10, NDCG@10 and diversity of their lists, and how sure their difference to the base is.

Seen items masked, every user with a held-out item counts, as in the stage evaluate. Intervals are percentile bootstraps over
users; a difference is resampled in pairs, the same users on both sides, which is what makes small ones visible.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np

from contrec_dist.ablation.rows import BASE_ROW, NEEDED_CUT, AblationRow
from contrec_dist.ablation.sharing import fits
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories, Part, load_items, load_users
from contrec_dist.embeddings.layout import read_text_part
from contrec_dist.manifest import MANIFEST_NAME, WRITTEN_BY, Manifest
from contrec_dist.report.evaluate import Held
from contrec_dist.report.lists import list_matrix, load_lists
from contrec_dist.retrieval import metrics as m

LEVEL = 0.95
DONE, FAILED, NOT_RUN = "done", "failed", "not run"
TIMED = {"train": "model", "score": "recommendations"}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Every user's figures in one split.

    Shapes   users, targets (B,) ids as text; values: name -> (B,) float64
    """

    users: list[str]
    targets: list[str]
    values: dict[str, np.ndarray]


def judge_lists(config: Config, part: Part, text: np.ndarray | None = None) -> Judged:
    """Figures of a run's lists; diversity where there are text vectors (N, E) of its catalogue's items.

    Errors   ArtifactError for lists that are missing or of another catalogue
    """
    catalog = config.folder("catalog")
    items, users = load_items(catalog), load_users(catalog)
    held = Held.load(Histories.load(catalog), part)
    frame = load_lists(config.folder("recommendations"), part, "masked", users, items)
    lists = list_matrix(frame, held.users, NEEDED_CUT)
    ranks = m.rank_targets(lists, held.targets)
    hits, gains = m.hits_at(ranks, NEEDED_CUT), m.gains_at(ranks, NEEDED_CUT)
    values = {f"hr@{NEEDED_CUT}": hits, f"ndcg@{NEEDED_CUT}": gains}
    if text is not None:
        values[f"diversity@{NEEDED_CUT}"] = m.diversity_at(lists, text, NEEDED_CUT)
    return Judged(
        users=users["user_id"].gather(held.users).to_list(),
        targets=items["item_id"].gather(held.targets).to_list(),
        values=values,
    )


def describe_figures(own: Judged, base: Judged | None, seed: int) -> dict:
    """Means with intervals, and differences to the base with theirs; None without a base of the same users and targets."""
    comparable = base is not None and (own.users, own.targets) == (base.users, base.targets)
    figures = {}
    for name, values in own.values.items():
        difference = _mean_with_interval(values - base.values[name], seed) if comparable and name in base.values else None
        figures[name] = {**_mean_with_interval(values, seed), "difference": difference}
    return {"num_users": len(own.users), **figures}


def _mean_with_interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """Paired where `values` are differences: a resampled user brings both sides of its own."""
    low, high = m.bootstrap_interval(values, seed, level=LEVEL)
    return {"value": float(values.mean()), "low": low, "high": high}


def collect_rows(
    rows: Sequence[AblationRow], base_run: Config, errors: Mapping[str, str], *, with_test: bool
) -> list[dict]:
    """A record a row, in their order: what it changes, whether it is done, its figures, seconds, and what others built."""
    parts: list[Part] = ["validation", "test"] if with_test else ["validation"]
    done = [row for row in rows if row.name not in errors and is_complete(row.config)]
    text = _read_text(base_run, done)
    bases = {part: judge_lists(row.config, part, text) for row in done if row.name == BASE_ROW for part in parts}
    records = []
    for row in rows:
        record = {"row": row.name, "about": row.about, "change": row.change, "rank_by": row.config.score.rank_by}
        record["status"] = FAILED if row.name in errors else DONE if row in done else NOT_RUN
        record |= {"error": errors[row.name]} if row.name in errors else {}
        if row in done:
            for part in parts:
                record[part] = describe_figures(judge_lists(row.config, part, text), bases.get(part), row.config.seed)
            record |= _describe_cost(row, rows, base_run)
        records.append(record)
    return records


def _read_text(base_run: Config, done: Sequence[AblationRow]) -> np.ndarray | None:
    """The same text vectors for all rows, whatever they read: the base's, else of the first row that has some."""
    folders = [row.config.folder("embeddings") for row in sorted(done, key=lambda row: row.name != BASE_ROW)]
    for folder in [base_run.folder("embeddings"), *folders]:
        if (folder / MANIFEST_NAME).is_file() and (text := read_text_part(folder)) is not None:
            return text
    return None


def is_complete(config: Config) -> bool:
    """Whether every stage of a run is complete for its config."""
    return all(fits(config, config.folder(folder)) for folder in WRITTEN_BY)


def _describe_cost(row: AblationRow, rows: Sequence[AblationRow], base_run: Config) -> dict:
    """Seconds to train and to score as the manifests have them, and the run that built each folder that was taken over."""
    places = {"the base's run": Path(base_run.run_dir)} | {one.name: Path(one.config.run_dir) for one in rows}
    taken = {}
    for folder in WRITTEN_BY:
        own = (row.config.folder(folder) / MANIFEST_NAME).read_bytes()  # it holds the seconds: no two builds write the same
        builder = next(name for name, place in places.items() if _read_bytes(place / folder / MANIFEST_NAME) == own)
        taken |= {folder: builder} if builder != row.name else {}
    seconds = {stage: Manifest.load(row.config.folder(folder)).seconds for stage, folder in TIMED.items()}
    return {"seconds": seconds, "taken_over": taken}


def _read_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
