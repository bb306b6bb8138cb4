"""The rows that scoring writes: one file a range of users and view, users in the order of the input, then by rank.

    user_id str, rank int64 (from 1), item_id str, score float32, reason str, model_version str, index_version str
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.retrieval.pairing import Versions
from contrec_dist.retrieval.ranking import combine_scores

SCHEMA = {
    "user_id": pl.String, "rank": pl.Int64, "item_id": pl.String, "score": pl.Float32, "reason": pl.String,
    "model_version": pl.String, "index_version": pl.String,
}  # fmt: skip


@dataclass(frozen=True)
class HybridWeights:
    """What the other scores of a candidate count beside the model's."""

    texts: float = 0.0
    "pi: similarity of the text that the LLM wrote and the item's"
    transitions: float = 0.0
    "rho: what followed the newest items in training histories"
    new_items: float = 0.0
    "the bonus of items that training did not see"


def rerank(frame: pl.DataFrame, view: str, weights: HybridWeights, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of CandidateFinder's candidates by the model's score + pi * text similarity + rho * transition score + the bonus
    of items that training did not see.

    Shapes   -> scores (B, k), item_idx (B, k)
    """
    scores, item_idx = (frame[f"{view}_{name}"].to_numpy() for name in ("scores", "items"))
    used = {name: weight for name, weight in asdict(weights).items() if weight}
    if not used:  # already in order
        return scores[:, :k], item_idx[:, :k]
    others = {name: (weight, frame[f"{view}_{name}"].to_numpy()) for name, weight in used.items()}
    return combine_scores(scores, item_idx, others, k)


def list_rows(
    frame: pl.DataFrame, scores: np.ndarray, item_idx: np.ndarray, item_ids: pl.Series, versions: Versions
) -> pl.DataFrame:
    """Lists as rows. frame: user_id and reason of B users; scores, item_idx (B, k), -1 past a list's end."""
    row, column = np.nonzero(item_idx >= 0)
    users = frame.select("user_id", "reason")[row]
    rows = pl.DataFrame({
        "user_id": users["user_id"],
        "rank": column.astype(np.int64) + 1,
        "item_id": item_ids.gather(item_idx[row, column]),
        "score": scores[row, column].astype(np.float32),
        "reason": users["reason"],
    })  # fmt: skip
    versions = {"model_version": pl.lit(versions.model), "index_version": pl.lit(versions.index)}
    return rows.with_columns(**versions).select(list(SCHEMA))


def write_rows(
    frame: pl.DataFrame, view: str, path: Path, *, weights: HybridWeights, k: int, item_ids: pl.Series, versions: Versions
) -> int:
    """Re-rank the candidates of a range, write their lists, and return how many rows that are."""
    if len(frame) == 0:
        pl.DataFrame(schema=SCHEMA).write_parquet(path)
        return 0
    rows = list_rows(frame, *rerank(frame, view, weights, k), item_ids, versions)
    rows.write_parquet(path)
    return len(rows)
