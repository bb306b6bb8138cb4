"""A finished run of any size made up from numpy: what the score stage reads, without training anything.

Items lie in clusters of the latent space and are popular by Zipf's law; histories are drawn from it. The model is the
config's own with random weights, spread so that users ask for different items. All folders have real manifests, and the
index is built by the real stage, so scoring meets what it meets after training.
"""

import gc
from pathlib import Path

import numpy as np
import polars as pl
import torch

from contrec_dist.config import Config
from contrec_dist.manifest import Manifest, run_stage
from contrec_dist.model.backbone import train_text_tokenizer
from contrec_dist.model.export import build_model, save_export
from contrec_dist.retrieval import index

ROW_GROUP_ROWS = 262_144
NUM_CLUSTERS = 1000
NUM_TITLES = 2000
SCORE_SPREAD = 4.0
"standard deviation over items of what a query adds to the items' bias, as in trained models"


def write_world(config: Config, *, num_items: int, num_users: int, mean_history: float) -> None:
    """catalog/, embeddings/, tokenizer/, tokens/, model/ and index/ under config.run_dir; what is there already stays."""
    sizes = {"num_items": num_items, "num_users": num_users, "mean_history": mean_history}
    builders = {
        "catalog": (lambda config, work: _write_catalog(config, work, **sizes), ()),
        "embeddings": (lambda config, work: _write_embeddings(work, num_items), ("catalog",)),
        "tokenizer": (_write_nothing, ("catalog", "embeddings")),
        "tokens": (lambda config, work: _write_tokens(config, work, num_items), ("catalog", "embeddings", "tokenizer")),
        "model": (_write_model, ("catalog", "tokenizer", "tokens")),
    }
    for folder, (build, inputs) in builders.items():
        sections = {"model": ("backbone", "head", "prompt"), "tokens": ("tokenizer",)}.get(folder, ())
        run_stage(
            config, stage=folder, folder=folder, sections=sections, inputs=inputs, build=build, extra_identity=sizes
        )
        gc.collect()
    index.run(config)


def _write_nothing(config: Config, work: Path) -> dict:
    return {}


def _write_embeddings(work: Path, num_items: int) -> dict:
    """A column of zeros: what is scored without reasoning texts asks for none."""
    np.save(work / "items.npy", np.zeros((num_items, 1), np.float32))
    return {}


def _write_catalog(config: Config, work: Path, num_items: int, num_users: int, mean_history: float) -> dict:
    draw = np.random.default_rng(config.seed)
    lengths = 4 + draw.geometric(1 / max(1.0, mean_history - 3), num_users)
    popularity = 1 / np.arange(1, num_items + 1)
    ends = np.cumsum(popularity / popularity.sum())
    items = np.minimum(np.searchsorted(ends, draw.random(lengths.sum())), num_items - 1).astype(np.int64)
    counts = np.bincount(items, minlength=num_items)
    numbers = pl.int_range(num_items, eager=True)
    texts = {name: pl.repeat("", num_items, eager=True) for name in ("category", "brand", "text")}
    title = "Thing " + (numbers % NUM_TITLES).cast(pl.String)
    frame = {"item_idx": numbers, "item_id": "i" + numbers.cast(pl.String), "title": title, **texts, "num_train": counts}
    pl.DataFrame(frame).with_columns(category=pl.lit("Goods")).write_parquet(work / "items.parquet")
    users = pl.int_range(num_users, eager=True)
    pl.DataFrame({"user_idx": users, "user_id": "u" + users.cast(pl.String)}).write_parquet(
        work / "users.parquet", row_group_size=ROW_GROUP_ROWS
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pl.DataFrame({"user_idx": np.repeat(np.arange(num_users), lengths), "items": items})
    histories = column.group_by("user_idx", maintain_order=True).agg("items")
    cuts = {"num_train": lengths - 2, "validation_pos": lengths - 2, "test_pos": lengths - 1}
    histories = histories.with_columns(pl.Series(name, values.astype(np.int64)) for name, values in cuts.items())
    histories = histories.with_columns(timestamps=pl.col("items").list.eval(pl.element() * 0))
    histories.write_parquet(work / "histories.parquet", compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return {"interactions": int(offsets[-1])}


def _write_tokens(config: Config, work: Path, num_items: int) -> dict:
    draw = np.random.default_rng([config.seed, 1])
    shape = (config.tokenizer.num_item_tokens, config.tokenizer.latent_dim)
    centres = draw.standard_normal((NUM_CLUSTERS, *shape), dtype=np.float32)
    latents = np.lib.format.open_memmap(work / "item_latents.npy", "w+", np.float32, (num_items, *shape))
    for start in range(0, num_items, ROW_GROUP_ROWS):
        rows = min(ROW_GROUP_ROWS, num_items - start)
        own = draw.standard_normal((rows, *shape), dtype=np.float32)
        latents[start : start + rows] = 0.8 * centres[draw.integers(NUM_CLUSTERS, size=rows)] + 0.6 * own
    latents.flush()
    np.save(work / "latent_mean.npy", np.zeros(shape, np.float32))
    np.save(work / "latent_std.npy", np.ones(shape, np.float32))
    return {}


def _write_model(config: Config, work: Path) -> dict:
    from contrec_dist.training.rank import write_retrieval_inputs

    tokens = config.folder("tokens")
    items = pl.read_parquet(config.folder("catalog") / "items.parquet")
    tokenizer = train_text_tokenizer([config.prompt.instruction, *items["title"].head(NUM_TITLES)], config.backbone.shape.vocab_size)
    latents = torch.from_numpy(np.load(tokens / "item_latents.npy"))
    popularity = torch.log(torch.from_numpy(items["num_train"].to_numpy().astype(np.float32)) + 1)
    torch.manual_seed(config.seed)
    model = build_model(
        config, vocab_size=len(tokenizer), item_latents=latents, num_items=len(latents), latent_mean=torch.zeros(latents.shape[1:]),
        latent_std=torch.ones(latents.shape[1:]), log_popularity=popularity - popularity.max(), latent_noise=0.1,
    )  # fmt: skip
    _spread(model.eval())
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hashes = {f"{name}_hash": Manifest.load(config.folder(name)).content_hash for name in ("catalog", "tokens")}
    save_export(model, {name: value.detach() for name, value in state.items()}, tokenizer, work, hashes)
    write_retrieval_inputs(config, work)
    return {}


@torch.no_grad()
def _spread(model) -> None:
    """Let attention say more than a fresh model's does, and queries spread the items' scores as trained ones do."""
    for name, parameter in model.backbone.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.mul_(3.0)
    sample = torch.arange(min(4096, model.num_items))
    vectors, _ = model.items(model.normalise(model._catalogue[sample]).flatten(1), sample)
    condition = model.head.norm(torch.randn(256, model.head.norm.normalized_shape[0]))
    spread = (model.head.direct_query(condition) @ vectors.T).std(dim=1).mean()
    for parameter in model.head.direct_query.parameters():
        parameter.mul_(SCORE_SPREAD / spread)
    if model.average is not None:  # which is what is exported
        model.average.update(dict(model.head.named_parameters()))
        for name, value in model.head.named_parameters():
            getattr(model.average, name.replace(".", "__")).copy_(value)
