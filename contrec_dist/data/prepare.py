"""Stage prepare: raw logs to the catalogue, the one canonical form that every later stage reads.

Writes catalog/: items.parquet, users.parquet, histories.parquet (columns: see contrec_dist/data/catalog.py).
Guarantees: the same config and source files give the same bytes; the source files' sha256 are part of the stage's
identity, so a changed file is noticed; every row left out is counted by reason in the manifest's facts.
Cost: one pass in memory, seconds for a million interactions.
"""

from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.catalog import HISTORIES_FILE, ITEMS_FILE, USERS_FILE, Histories
from contrec_dist.data.interactions import BadRows, CleanLogs, clean_logs
from contrec_dist.data.sources import read_source, source_files
from contrec_dist.data.sources.raw import ITEM_COLUMNS
from contrec_dist.data.split import NO_TARGET, draw_cold_items, hold_out, split_histories
from contrec_dist.manifest import Manifest, hash_file, run_stage
from contrec_dist.progress import get_logger

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}
ROW_GROUP_ROWS = 16_384  # readers take a range of users and decode whole row groups


def run(config: Config) -> Manifest:
    """Write catalog/ from the source that the config names."""
    hashes = {key: hash_file(path) for key, path in source_files(config).items()}
    return run_stage(
        config,
        stage="prepare",
        folder="catalog",
        sections=("source", "split"),
        inputs=(),
        build=_build,
        extra_identity={"source_files": hashes},
    )


def _build(config: Config, work: Path) -> dict:
    logs = clean_logs(read_source(config), config.source)
    histories = build_histories(config, logs)
    items = build_items(logs, histories, keep_unseen=config.source.keep_unseen_items)
    user_ids, histories = _number_users(logs, histories)
    users = user_ids.alias("user_id").to_frame().with_row_index("user_idx").cast({"user_idx": pl.Int64})
    frames = {ITEMS_FILE: items, USERS_FILE: users, HISTORIES_FILE: histories}
    for name, frame in frames.items():
        write_frame(frame, work / name)
    facts = describe(logs, items, histories)
    log_facts(facts, logs.bad)
    files = {name: {"rows": len(frame), "columns": frame.columns} for name, frame in frames.items()}
    return {**facts, "files": files}


def write_frame(frame: pl.DataFrame, path: Path) -> None:
    """Write a table of the catalogue."""
    frame.rechunk().write_parquet(path, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def build_histories(config: Config, logs: CleanLogs) -> pl.DataFrame:
    """One row a user: items and unix seconds in the user's order, and where the split cuts them."""
    rows = logs.interactions
    lengths = np.bincount(rows["user_idx"].to_numpy(), minlength=len(logs.user_ids)).astype(np.int64)
    split = split_histories(config.split, lengths, rows["time_ms"].to_numpy(), rows["time_known"].to_numpy())
    if config.split.cold_items:
        cold = draw_cold_items(len(logs.item_ids), config.split.cold_items, config.seed)
        stays, split = hold_out(split, lengths, cold[rows["item_idx"].to_numpy()])
        rows = rows.filter(pl.Series(stays))
    seconds = pl.when("time_known").then(pl.col("time_ms") // 1000).otherwise(0)
    frame = (
        rows.with_columns(seconds.cast(pl.Int64).alias("timestamps"))
        .group_by("user_idx", maintain_order=True)
        .agg(pl.col("item_idx").alias("items"), pl.col("timestamps"))
    )
    cuts = {"num_train": split.num_train, "validation_pos": split.validation_pos, "test_pos": split.test_pos}
    users = pl.DataFrame({name: values.astype(np.int64) for name, values in cuts.items()}).with_row_index("user_idx")
    users = users.cast({"user_idx": pl.Int64})
    return frame.join(users, on="user_idx", how="left", maintain_order="left")


def _number_users(logs: CleanLogs, histories: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame]:
    """Without users whom `cold_items` has left nothing, who are counted."""
    gone = len(logs.user_ids) - len(histories)
    if gone:
        logs.drops["users of held out items alone"] = gone
    number = pl.int_range(pl.len(), dtype=pl.Int64).alias("user_idx")
    return logs.user_ids.gather(histories["user_idx"]), histories.with_columns(number)


def build_items(logs: CleanLogs, histories: pl.DataFrame, *, keep_unseen: bool) -> pl.DataFrame:
    """One row an item: those with interactions by number, then, if kept, the item file's others in its order.

    An item without a title is titled by its id.
    """
    items = logs.item_ids.alias("item_id").to_frame()
    if logs.items is not None:
        if keep_unseen:
            unseen = logs.items.select("item_id").join(items, on="item_id", how="anti", maintain_order="left")
            items = pl.concat([items, unseen])
        items = items.join(logs.items, on="item_id", how="left", maintain_order="left")
    else:
        items = items.with_columns(pl.lit("").alias(name) for name in ITEM_COLUMNS)
    items = items.with_columns(pl.when(pl.col("title") != "").then("title").otherwise("item_id").alias("title"))
    _, edges = Histories.from_frame(histories).training_edges()
    num_train = pl.Series("num_train", np.bincount(edges, minlength=len(items)).astype(np.int64))
    number = pl.int_range(pl.len(), dtype=pl.Int64).alias("item_idx")
    return items.select(number, "item_id", *(pl.col(name).fill_null("") for name in ITEM_COLUMNS), num_train)


def describe(logs: CleanLogs, items: pl.DataFrame, histories: pl.DataFrame) -> dict:
    """The stage's figures for the manifest."""
    lengths = histories["items"].list.len()
    num_users, num_seen, num_rows = len(histories), len(logs.item_ids), int(lengths.sum())
    return {
        "num_users": num_users,
        "num_items": len(items),
        "num_items_seen": num_seen,
        "num_items_untrained": int((items["num_train"] == 0).sum()),
        "num_interactions": num_rows,
        "num_train": int(histories["num_train"].sum()),
        "num_validation": int((histories["validation_pos"] != NO_TARGET).sum()),
        "num_test": int((histories["test_pos"] != NO_TARGET).sum()),
        "density": num_rows / (num_users * len(items)),
        "length_mean": num_rows / num_users,
        "length_quantiles": {name: int(lengths.quantile(q, "nearest")) for name, q in QUANTILES.items()},
        "unknown_times": int((~logs.interactions["time_known"]).sum()),
        "untitled_items": int((items["title"] == items["item_id"]).sum()),
        "drops": logs.drops,
        "bad_rows": {
            name: {"rows": bad.num_rows, "wrong": bad.total, "examples": bad.examples} for name, bad in logs.bad.items()
        },
    }


def log_facts(facts: dict, bad: dict[str, BadRows]) -> None:
    """Print what was read, what was left out and why."""
    log = get_logger("prepare")
    log.info("users %d, items %d, interactions %d", facts["num_users"], facts["num_items"], facts["num_interactions"])
    quantiles = ", ".join(f"{name} {value}" for name, value in facts["length_quantiles"].items())
    log.info("density %.5f%%, history length: mean %.2f, %s", 100 * facts["density"], facts["length_mean"], quantiles)
    log.info("targets: %d validation, %d test", facts["num_validation"], facts["num_test"])
    for reason, number in facts["drops"].items():
        log.info("left out: %d x %s", number, reason)
    for name, rows in bad.items():
        for example in rows.examples:
            log.warning("wrong row of %s: %s", name, example)
