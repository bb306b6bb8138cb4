"""Inputs of stage precompute at a chosen size, without the stages before it: what benchmarks/precompute.py measures on.

Histories follow the streamed catalogue's law, embeddings are random, the sigma-VAE is fitted on some of them.
Cost         seconds for 100,000 items and users; memory for the histories of all users as numbers (120 bytes a user).
"""

from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.config import Config, TokenizerConfig
from contrec_dist.data.catalog import HISTORIES_FILE, ITEMS_FILE, USERS_FILE
from contrec_dist.data.prepare import write_frame
from contrec_dist.data.sources.streamed_law import StreamedLaw
from contrec_dist.data.sources.streamed_settings import StreamSettings
from contrec_dist.data.sources.streamed_titles import user_ids
from contrec_dist.data.split import leave_one_out
from contrec_dist.manifest import run_stage
from contrec_dist.tokenizer.fit import fit_tokenizer
from contrec_dist.tokenizer.tokenize import ITEM_TOKENIZER
from sharding.partition import part_ranges

EMBEDDING_DIM = 192
FIT_ROWS = 10_000
FIT_STEPS = 50
CHUNK_ROWS = 65_536


def make_inputs(config: Config, num_rows: int) -> None:
    """catalog/, embeddings/ and tokenizer/ of `num_rows` items and as many users, with their manifests."""
    builds = {
        "catalog": lambda _, work: _write_catalog(config, num_rows, work),
        "embeddings": lambda _, work: _write_embeddings(config, num_rows, work),
        "tokenizer": lambda _, work: _write_tokenizer(config, work),
    }
    for folder, build in builds.items():
        run_stage(config, stage=folder, folder=folder, sections=(), inputs=(), build=build)


def _write_catalog(config: Config, num_rows: int, work: Path) -> dict:
    law = StreamedLaw(StreamSettings(num_items=num_rows, num_users=num_rows, seed=config.seed))
    lengths, items = law.draw_histories(0, num_rows)
    split = leave_one_out(lengths)
    users = np.arange(num_rows)
    history = pl.DataFrame({"user_idx": np.repeat(users, lengths), "items": items, "timestamps": np.zeros_like(items)})
    histories = history.group_by("user_idx", maintain_order=True).agg("items", "timestamps")
    cuts = {"num_train": split.num_train, "validation_pos": split.validation_pos, "test_pos": split.test_pos}
    write_frame(histories.with_columns(pl.Series(name, values) for name, values in cuts.items()), work / HISTORIES_FILE)
    write_frame(pl.DataFrame({"user_idx": users, "user_id": user_ids(users)}), work / USERS_FILE)
    counts = np.bincount(items, minlength=num_rows)
    write_frame(pl.DataFrame({"item_idx": users, "num_train": counts}), work / ITEMS_FILE)
    return {}


def _write_embeddings(config: Config, num_rows: int, work: Path) -> dict:
    generator = np.random.default_rng(config.seed)
    shape = (num_rows, EMBEDDING_DIM)
    with open(work / "items.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start, stop in part_ranges(num_rows, CHUNK_ROWS):
            generator.standard_normal((stop - start, EMBEDDING_DIM), dtype=np.float32).tofile(file)
    np.save(work / "users.npy", np.zeros((num_rows, 0), np.float32))
    return {}


def _write_tokenizer(config: Config, work: Path) -> dict:
    rows = np.array(np.load(config.folder("embeddings") / "items.npy", mmap_mode="r")[:FIT_ROWS])
    tokenizer, _ = fit_tokenizer(rows, TokenizerConfig(), config.seed, num_steps=FIT_STEPS, what="item")
    tokenizer.save(work, ITEM_TOKENIZER)
    return {}
