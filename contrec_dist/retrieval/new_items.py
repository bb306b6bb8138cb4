"""Items that join after training: read from a file, judged row by row, encoded with the trained parts.

An item's text becomes its embedding (the collaborative part is the mean), the sigma-VAE makes its continuous tokens,
and the model's item table its vector: a function of the tokens alone, with no residual and the bias of new items.

Cost     the text encoder, the tokenizer and the item table are loaded; neither the LLM nor any known item is read.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.fields import clean_category, clean_text
from contrec_dist.data.sources import json_lines
from contrec_dist.data.sources.raw import ITEM_COLUMNS, RawTable
from contrec_dist.data.sources.table import JSON_SUFFIXES, item_columns, read_table
from contrec_dist.errors import ArtifactError, ConfigError, DataError

FILE_KEY = "--items"
CHUNK_ITEMS = 4096  # rows an encoder call


@dataclass(frozen=True, slots=True)
class EncodedItems:
    """What the trained parts make of items.

    Shapes   embeddings (n, E), latents (n, K, Z) raw, vectors (n, Q + 1) with the bias last; all float32
    """

    embeddings: np.ndarray
    latents: np.ndarray
    vectors: np.ndarray


def read_new_items(config: Config, path: Path) -> pl.DataFrame:
    """[item_id, title, category, brand, text] of a file, named by the source's columns; all but the id may be missing.

    Text is cleaned as stage prepare does; an item without a title is titled by its id.
    Errors   DataError naming file and line of every row that cannot be read, has no id, or repeats the id of another
    """
    table = _read_table(config, path)
    frame = table.frame.with_columns(_clean_id())
    faults = [
        pl.when(pl.col("item_id").is_null()).then(pl.lit("missing item id")),
        pl.when(~pl.col("item_id").is_first_distinct()).then(pl.lit("the id of a row before")),
    ]
    frame = frame.with_columns(pl.coalesce("fault", *faults).alias("fault"))
    refuse_faults(table, frame)
    cleaners = {"category": clean_category}
    empty = pl.repeat("", len(frame), eager=True)
    texts = {
        name: cleaners.get(name, clean_text)(frame[name] if name in frame.columns else empty) for name in ITEM_COLUMNS
    }
    items = frame.select("item_id").with_columns(**texts)
    if items.is_empty():
        raise DataError(str(path), "no items", "at least one")
    return items.with_columns(pl.when(pl.col("title") != "").then("title").otherwise("item_id").alias("title"))


def read_item_ids(config: Config, path: Path) -> list[str]:
    """The ids of a file. Errors   DataError naming file and line of rows without one, or with one of a row before"""
    return read_new_items(config, path)["item_id"].to_list()


def refuse_faults(table: RawTable, frame: pl.DataFrame) -> None:
    """Raise a DataError that names every row with a fault."""
    wrong = frame.filter(pl.col("fault").is_not_null()).sort("row")
    if wrong.is_empty():
        return
    places = table.locate(wrong["row"].to_list())
    listed = "".join(f"\n  {place}: {fault}" for place, fault in zip(places, wrong["fault"]))
    raise DataError(
        str(table.path), f"{len(wrong)} wrong rows of {len(frame)}", f"none, and nothing was changed:{listed}"
    )


def encode_items(config: Config, items: pl.DataFrame) -> EncodedItems:
    """Encode items of read_new_items, in their order.

    Errors   ArtifactError where embeddings, tokenizer or model are missing, or a value is not finite
    """
    import torch

    from contrec_dist.embeddings.embed import embed_new_items
    from contrec_dist.tokenizer.sigma_vae import SigmaVAE

    columns = [items[name].to_list() for name in ITEM_COLUMNS]
    embeddings = embed_new_items(config.folder("embeddings"), *columns)
    tokenizer = SigmaVAE.load(config.folder("tokenizer"), "item_tokenizer")
    item_table = load_item_table(config.folder("model"))
    latents, vectors = [], []
    with torch.no_grad():
        for rows in torch.from_numpy(embeddings).split(CHUNK_ITEMS):
            latents.append(tokenizer.encode(rows).float())
            vectors.append(item_table(latents[-1]))
    encoded = EncodedItems(embeddings, torch.cat(latents).numpy(), torch.cat(vectors).numpy())
    for array in (encoded.latents, encoded.vectors):
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            name = items["item_id"][int(np.argmin(finite))]
            raise ArtifactError(
                config.folder("model"), f"a value of item '{name}' that is not finite", "finite numbers"
            )
    return encoded


def load_item_table(model_folder: Path):
    """A function of raw latents: (n, K, Z) -> vectors and bias (n, Q + 1) of items that the training did not see."""
    import torch
    from safetensors import safe_open

    from contrec_dist.model.continuous_inputs import ItemTable

    described, weights = Path(model_folder) / "config.json", Path(model_folder) / "head.safetensors"
    if not (described.is_file() and weights.is_file()):
        raise ArtifactError(model_folder, "no exported model", "the complete output of `contrec train`; run that first")
    facts = json.loads(described.read_text())
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("items.")}
        mean, std = file.get_tensor("latent_mean"), file.get_tensor("latent_std")
    table = ItemTable(
        num_items=facts["num_items"],
        latent_width=facts["num_item_tokens"] * facts["latent_dim"],
        query_dim=facts["head"]["query_dim"],
        residual=facts["head"]["item_residual"],
        log_popularity=torch.zeros(facts["num_items"]),
    )
    table.load_state_dict({name.removeprefix("items."): value for name, value in tensors.items()})
    table.new_item_bias = facts.get("new_item_bias")
    table.eval()

    def describe(latents):
        normalised = (latents.float() - mean) / std
        new = torch.full((len(latents),), facts["num_items"], dtype=torch.int64)
        vectors, bias = table(normalised.flatten(1), new)
        return torch.cat([vectors, bias[:, None]], dim=1).float()

    return describe


def _read_table(config: Config, path: Path) -> RawTable:
    """The file's rows by the source's column names; only the id has to be there."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(FILE_KEY, str(path), "a file that exists")
    columns = item_columns(config.source)
    present = _column_names(path)
    kept = {name: pair for name, pair in columns.items() if name == "item_id" or present is None or pair[1] in present}
    return read_table(path, kept, FILE_KEY)


def _column_names(path: Path) -> list[str] | None:
    """Columns of a file; None where the reader will say what is wrong with it."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        if suffix == ".parquet":
            return pl.read_parquet_schema(path).names()
        if suffix in JSON_SUFFIXES:
            return json_lines.first_keys(path)
        if suffix in (".csv", ".tsv"):
            return pl.read_csv(path, n_rows=0, separator="," if suffix == ".csv" else "\t", infer_schema=False).columns
    except pl.exceptions.PolarsError:
        return None
    return None


def _clean_id() -> pl.Expr:
    text = pl.col("item_id").cast(pl.String).str.strip_chars()
    return pl.when(text == "").then(None).otherwise(text).alias("item_id")
