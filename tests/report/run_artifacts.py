"""A small run's folders as the stages before `evaluate` leave them, made up but consistent."""

import json

import numpy as np
import polars as pl

from contrec_dist.manifest import run_stage, write_json

NUM_ITEMS, NUM_USERS, LENGTH = 60, 90, 20
FIRST_TARGETLESS_USER = 85  # their histories have two items: all training


def make_histories(seed: int = 0) -> list[list[int]]:
    """Histories without repeats; items 58 and 59 only ever stand last (cold start)."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 59)
    lengths = np.where(np.arange(NUM_USERS) < FIRST_TARGETLESS_USER, draw.integers(4, 9, NUM_USERS), 2)
    rows = [draw.choice(58, size=length, replace=False, p=weights / weights.sum()).tolist() for length in lengths]
    rows[0][-1], rows[1][-1] = 58, 59
    return rows


def write_catalog(work, histories, item_ids, titles):
    cut = [len(row) >= 3 for row in histories]
    num_train = [len(row) - 2 * keep for row, keep in zip(histories, cut)]
    counts = np.bincount([item for row, n in zip(histories, num_train) for item in row[:n]], minlength=NUM_ITEMS)
    text = {name: [""] * NUM_ITEMS for name in ("category", "brand", "text")}
    items = {"item_idx": range(NUM_ITEMS), "item_id": item_ids, "title": titles, **text, "num_train": counts}
    pl.DataFrame(items).write_parquet(work / "items.parquet")
    users = {"user_idx": range(NUM_USERS), "user_id": [f"u{user}" for user in range(NUM_USERS)]}
    pl.DataFrame(users).write_parquet(work / "users.parquet")
    frame = pl.DataFrame(
        {
            "user_idx": range(NUM_USERS),
            "items": histories,
            "timestamps": [[0] * len(row) for row in histories],
            "num_train": num_train,
            "validation_pos": [len(row) - 2 if keep else -1 for row, keep in zip(histories, cut)],
            "test_pos": [len(row) - 1 if keep else -1 for row, keep in zip(histories, cut)],
        }
    )
    frame.write_parquet(work / "histories.parquet")


def write_recommendations(work, histories, item_ids, leak=False):
    """Lists whose rank of the target is user_idx % 25 (0 and beyond LENGTH: absent); the last test user has none."""
    for part, back in (("validation", 2), ("test", 1)):
        for seen in ("masked", "kept"):
            rows = []
            for user in range(FIRST_TARGETLESS_USER - 1):
                history, target = histories[user][:-back], histories[user][-back]
                banned = {target, *(history if seen == "masked" and not leak else ())}
                listed = [item for item in range(NUM_ITEMS) if item not in banned][:LENGTH]
                if 1 <= user % 25 <= LENGTH:
                    listed.insert(user % 25 - 1, target)
                rows += [(f"u{user}", rank, item_ids[item], -float(rank), "leans to <b>tea</b>")
                         for rank, item in enumerate(listed[:LENGTH], start=1)]  # fmt: skip
            folder = work / f"split={part}" / f"seen={seen}"
            folder.mkdir(parents=True)
            schema = {"user_id": pl.String, "rank": pl.Int64, "item_id": pl.String, "score": pl.Float32, "reason": pl.String}
            pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / "part-000000.parquet")


def write_losses(work):
    lines = [
        {"step": step, "loss": 8 - step / 100, "negative": 7 - step / 100, "diffusion": 1.0, "lm": 2.0,
         "dispersive": float("nan") if step == 40 else -1.0, "learning_rate": 1e-3}
        for step in range(20, 400, 20)
    ]  # fmt: skip
    (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_probes(work):
    record = {"bits": 113.5, "relative_mse": 0.2, "neighbour_overlap": 0.61, "effective_rank": 40.2, "collision_rate": 0.0}
    quantised = record | {"bits": 24.0, "neighbour_overlap": 0.2, "effective_rank": None, "collision_rate": 0.03}
    methods = [{"method": "sigma-VAE", **record}, {"method": "RQ 24 bits", **quantised}]
    write_json(work / "probes.json", {"methods": methods, "latent_spectrum": [3.0, 2.0, 1.0, 0.5, 0.0], "num_rows": 58})


def write_embeddings(work):
    """Two collaborative columns, which are zero, and three of text."""
    text = np.random.default_rng(0).normal(size=(NUM_ITEMS, 3))
    np.save(work / "items.npy", np.concatenate([np.zeros((NUM_ITEMS, 2)), text], axis=1).astype(np.float32))
    write_json(work / "layout.json", {"collaborative": [0, 2], "text": [2, 5]})


def write_run(config, *, item_ids=None, titles=None, histories=None, leak=False):
    """Every folder that `evaluate` reads, each with its manifest."""
    histories = histories or make_histories()
    item_ids = item_ids or [f"item{item}" for item in range(NUM_ITEMS)]
    titles = titles or [f"Title {item} & <co>" for item in range(NUM_ITEMS)]
    writers = {
        "prepare": ("catalog", lambda work: write_catalog(work, histories, item_ids, titles)),
        "embed": ("embeddings", write_embeddings),
        "tokenize": ("tokenizer", write_probes),
        "precompute": ("tokens", lambda work: None),
        "train": ("model", write_losses),
        "index": ("index", lambda work: None),
        "score": ("recommendations", lambda work: write_recommendations(work, histories, item_ids, leak)),
    }
    for stage, (folder, write) in writers.items():
        build = lambda _, work, write=write: write(work) or {}  # noqa: E731
        sections = ("score",) if stage == "score" else ()
        run_stage(config, stage=stage, folder=folder, sections=sections, inputs=(), build=build)
    return histories

