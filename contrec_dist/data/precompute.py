"""Stage precompute: catalog, embeddings, tokenizer -> tokens/ (Ray).

Writes   item_latents.npy (N, K, Z) float32, mu of every item as the tokenizer gives it; user_latents.npy (U, K, Z)
         float32 when there are user embeddings and a user tokenizer; new_item_latents.npy (N, K, Z) float32, mu of every item
         without its collaborative part, where head.residual_drop asks for it; latent_mean.npy and latent_std.npy (K, Z)
         float32 over items with training interactions; shards/*.tar and index.parquet (see sharding/token_writer.py).
Promise  Ranges of items and users are fixed by the config, each is one exactly-once part (sharding/ray_jobs.py):
         the bytes depend neither on the number of workers nor on interruptions. Every value is finite.
Cost     Memory of a process: the latents of items_per_part items or the users of one shard, plus the index
         (88 bytes a user) at the end. The encoder runs at the speed of a plain torch loop of one thread a worker.
"""

import os
import shutil
from pathlib import Path
from typing import Callable, Iterable, Iterator

import numpy as np
import polars as pl

from contrec_dist.config import Config
from contrec_dist.data.latents import encodes_new_items
from contrec_dist.embeddings.layout import read_layout
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, run_stage
from sharding.partition import part_ranges
from sharding.ray_jobs import Part, ray_session, read_part_hashes, remove_part_records, run_parts
from sharding.token_writer import TokenSample, shard_name, write_shard

STAGE = "precompute"
INDEX_PARTS = ".index_parts"
LATENT_PARTS = ".latent_parts"
MIN_STD = 1e-6
TABLES = {"item": "item", "user": "user", "new_item": "item"}
"what is encoded: the embeddings and the tokenizer of which table"
CHUNK_ROWS = 65536
ROW_GROUP_ROWS = 262144


def run(config: Config) -> Manifest:
    """Run the stage; returns the manifest of tokens/."""
    return run_stage(
        config,
        stage=STAGE,
        folder="tokens",
        sections=("precompute",),
        inputs=("catalog", "embeddings", "tokenizer"),
        build=_build,
        extra_identity={"new_item_latents": True} if encodes_new_items(config) else {},
    )


def _build(config: Config, work: Path) -> dict:
    """Write everything into `work`. A product under its final name is complete and is not made again."""
    num_items = _check_rows(config, "items")
    num_users = _check_rows(config, "users")
    has_user_tokens = _has_user_tokens(config)
    with ray_session(config.ray):
        kinds = {"item": True, "user": has_user_tokens, "new_item": encodes_new_items(config)}
        num_rows = {kind: num_users if kind == "user" else num_items for kind, wanted in kinds.items() if wanted}
        _encode_tables(config, work, num_rows)
        _write_statistics(config, work)
        parts = _cut_users(num_users, config.precompute.users_per_shard)
        _write_shards(config, work, parts)
    hashes = read_part_hashes(work, parts)
    remove_part_records(work)
    return _describe(work, num_rows, hashes)


class LatentEncoder:
    """Ray worker: rows of an embedding table -> their latents (rows, K, Z) float32 in one .npy file.

    `kind` of a payload is "item" or "user": {kind}s.npy is encoded with {kind}_tokenizer, loaded at its first part; or
    "new_item": items as if nobody had met them, their collaborative columns at 0.
    """

    def __init__(self, embeddings_folder: Path, tokenizer_folder: Path, batch_rows: int, device: str):
        self.embeddings_folder, self.tokenizer_folder = embeddings_folder, tokenizer_folder
        self.batch_rows, self.device = batch_rows, device
        self.tokenizers = {}

    def process(self, payload: dict, path: Path) -> dict:
        """Encode rows start..stop in batches that begin at start, so the bits are the same on every worker."""
        kind, start, stop = payload["kind"], payload["start"], payload["stop"]
        if kind not in self.tokenizers:
            self.tokenizers[kind] = self._load(TABLES[kind])
        firsts = range(start, stop, self.batch_rows)
        batches = [self._encode(kind, first, min(first + self.batch_rows, stop)) for first in firsts]
        with open(path, "wb") as file:
            np.save(file, np.concatenate(batches))
        return {"rows": stop - start}

    def _load(self, kind: str):
        """The tokenizer. Imported here: this stage's other processes need no torch, which takes seconds to load."""
        import torch

        from contrec_dist.tokenizer.sigma_vae import SigmaVAE

        torch.set_num_threads(1)
        return SigmaVAE.load(self.tokenizer_folder, f"{kind}_tokenizer").to(self.device).eval()

    def _encode(self, kind: str, start: int, stop: int) -> np.ndarray:
        import torch

        path = self.embeddings_folder / f"{TABLES[kind]}s.npy"
        rows = np.array(np.load(path, mmap_mode="r")[start:stop], dtype=np.float32)
        if kind == "new_item":
            rows[:, read_layout(self.embeddings_folder)["collaborative"]] = 0.0
        with torch.no_grad():
            encoded = self.tokenizers[kind].encode(torch.from_numpy(rows).to(self.device))  # (B, E) -> (B, K, Z)
        latents = encoded.float().cpu().numpy()
        finite = np.isfinite(latents).all(axis=(1, 2))
        if not finite.all():
            got = f"row {start + np.argmin(finite)}, whose latents are not finite"
            raise ArtifactError(path, got, "finite latents")
        return latents


class ShardWriter:
    """Ray worker: a range of users -> one WebDataset shard and its part of the index."""

    def __init__(self, catalog_folder: Path, latents_path: Path):
        self.histories_path = catalog_folder / "histories.parquet"
        self.histories = pl.scan_parquet(self.histories_path).drop("timestamps")
        self.users = pl.scan_parquet(catalog_folder / "users.parquet")
        self.latents = np.load(latents_path, mmap_mode="r")

    def process(self, payload: dict, shard_path: Path, index_path: Path) -> dict:
        start, num_users = payload["start"], payload["stop"] - payload["start"]
        histories = self.histories.slice(start, num_users).collect()
        user_ids = self.users.slice(start, num_users).select("user_id").collect()["user_id"].to_list()
        _check_histories(self.histories_path, histories, payload, len(self.latents))
        index = write_shard(shard_path, payload["shard"], zip(user_ids, self._samples(histories), strict=True))
        index.write_parquet(index_path)
        return {"rows": num_users}

    def _samples(self, histories: pl.DataFrame) -> Iterator[TokenSample]:
        """Gather the latents of all histories at once, in item order so that the file is read front to back."""
        items = histories["items"].explode(empty_as_null=False).to_numpy()
        unique, places = np.unique(items, return_inverse=True)
        with np.errstate(over="ignore"):  # an overflow becomes infinite, which write_shard refuses by name
            table = self.latents[unique].astype(np.float16)
        stops = np.cumsum(histories["items"].list.len().to_numpy(), dtype=np.int64)
        places_of_users, items_of_users = np.split(places, stops[:-1]), np.split(items.astype(np.int32), stops[:-1])
        facts = histories.select("user_idx", "num_train", "validation_pos", "test_pos").rows()
        for (user_idx, *positions), user_items, rows in zip(facts, items_of_users, places_of_users, strict=True):
            yield TokenSample(user_idx, user_items, table[rows], *positions)


def _encode_tables(config: Config, work: Path, num_rows: dict[str, int]) -> None:
    """Encode embeddings/{kind}s.npy into {kind}_latents.npy; a kind's parts are removed once they are joined."""
    missing = [kind for kind in num_rows if not (work / f"{kind}_latents.npy").is_file()]
    parts = {kind: _cut_table(kind, num_rows[kind], config.precompute.items_per_part) for kind in missing}
    arguments = {
        "embeddings_folder": config.folder("embeddings").absolute(),
        "tokenizer_folder": config.folder("tokenizer").absolute(),
        "batch_rows": config.precompute.batch_rows,
        "device": "cuda" if config.ray.gpus_per_worker > 0 else "cpu",
    }
    all_parts, folder, workers = sum(parts.values(), []), work / LATENT_PARTS, config.ray
    run_parts(all_parts, LatentEncoder, arguments, output_folder=folder, workers=workers, stage=STAGE, unit="parts")
    for kind in missing:
        _join_arrays([folder / part.name for part in parts[kind]], work / f"{kind}_latents.npy", num_rows[kind])
    shutil.rmtree(folder, ignore_errors=True)


def _cut_table(kind: str, num_rows: int, rows_per_part: int) -> list[Part]:
    """Parts of an embedding table."""
    ranges = enumerate(part_ranges(num_rows, rows_per_part))
    return [Part(name=f"{kind}/{i:06d}.npy", payload={"kind": kind, "start": a, "stop": b}) for i, (a, b) in ranges]


def _join_arrays(paths: list[Path], target: Path, num_rows: int) -> None:
    """Write the arrays one after another as one .npy file."""
    first = np.load(paths[0], mmap_mode="r")
    header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, *first.shape[1:])}

    def write(file):
        np.lib.format.write_array_header_1_0(file, header)
        for path in paths:
            np.load(path).tofile(file)

    _write_and_rename(target, write)


def _write_statistics(config: Config, work: Path) -> None:
    """Mean and standard deviation of the latents of items with training interactions (of all items if none has any)."""
    latents = np.load(work / "item_latents.npy", mmap_mode="r")
    counts = pl.scan_parquet(config.folder("catalog") / "items.parquet").select("num_train").collect()["num_train"]
    trained = counts.to_numpy() > 0
    rows = np.flatnonzero(trained) if trained.any() else np.arange(len(latents))
    mean = _mean_of(latents, rows, lambda values: values)
    std = np.sqrt(_mean_of(latents, rows, lambda values: (values - mean) ** 2))
    for name, values in (("latent_mean", mean), ("latent_std", np.maximum(std, MIN_STD))):
        _write_and_rename(work / f"{name}.npy", lambda file: np.save(file, values.astype(np.float32)))


def _mean_of(latents: np.ndarray, rows: np.ndarray, transform: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Mean of transform(latents[rows]) in float64, by chunks. Shapes (N, K, Z) -> (K, Z)."""
    chunks = (rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS))
    return sum(transform(latents[chunk].astype(np.float64)).sum(axis=0) for chunk in chunks) / len(rows)


def _cut_users(num_users: int, users_per_shard: int) -> list[Part]:
    """A shard and its piece of the index are one part."""
    parts = []
    for shard, (start, stop) in enumerate(part_ranges(num_users, users_per_shard)):
        payload = {"shard": shard, "start": start, "stop": stop}
        files = (shard_name(shard), f"{INDEX_PARTS}/{shard:06d}.parquet")
        parts.append(Part(name=shard_name(shard), payload=payload, files=files))
    return parts


def _write_shards(config: Config, work: Path, parts: list[Part]) -> None:
    """Lay the users out in shards; index.parquet comes last, so where it is all shards are."""
    if not (work / "index.parquet").is_file():
        arguments = {
            "catalog_folder": config.folder("catalog").absolute(),
            "latents_path": work.absolute() / "item_latents.npy",
        }
        run_parts(parts, ShardWriter, arguments, output_folder=work, workers=config.ray, stage=STAGE, unit="shards")
        index = pl.concat([pl.read_parquet(work / part.files[1]) for part in parts])
        _write_and_rename(
            work / "index.parquet", lambda file: index.write_parquet(file, row_group_size=ROW_GROUP_ROWS)
        )
    shutil.rmtree(work / INDEX_PARTS, ignore_errors=True)


def _write_and_rename(path: Path, write: Callable) -> None:
    """Let `write` fill a file under a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _check_rows(config: Config, kind: str) -> int:
    """Rows of embeddings/{kind}.npy, which must be those of catalog/{kind}.parquet (and of histories.parquet)."""
    path = config.folder("embeddings") / f"{kind}.npy"
    num_rows = len(np.load(path, mmap_mode="r"))
    for name in {"items": ["items"], "users": ["users", "histories"]}[kind]:
        table = config.folder("catalog") / f"{name}.parquet"
        expected = pl.scan_parquet(table).select(pl.len()).collect().item()
        if num_rows != expected or not num_rows:
            raise ArtifactError(path, f"{num_rows} rows", f"the {expected} rows of {table}, at least one")
    return num_rows


def _has_user_tokens(config: Config) -> bool:
    """Whether users have embeddings and a tokenizer of their own."""
    has_embeddings = np.load(config.folder("embeddings") / "users.npy", mmap_mode="r").shape[1] > 0
    return has_embeddings and (config.folder("tokenizer") / "user_tokenizer.safetensors").is_file()


def _check_histories(path: Path, histories: pl.DataFrame, payload: dict, num_items: int) -> None:
    """The rows must be those users', their items in the catalogue, their positions in the history."""
    expected = pl.arange(payload["start"], payload["stop"], eager=True)
    if not histories["user_idx"].equals(expected, check_dtypes=False):
        got = f"other users in rows {payload['start']}..{payload['stop'] - 1}"
        raise ArtifactError(path, got, "user_idx = row number")
    length = pl.col("items").list.len().cast(pl.Int64)
    known = pl.col("items").list.eval(pl.element().is_between(0, num_items - 1)).list.all()
    positions = [pl.col(name).is_between(-1, length - 1) for name in ("validation_pos", "test_pos")]
    good = pl.all_horizontal(known, *positions, pl.col("num_train").is_between(0, length))
    wrong = histories.filter(~good.fill_null(False))
    if len(wrong):
        got = f"{wrong.row(0, named=True)}"
        raise ArtifactError(path, got, f"items in 0..{num_items - 1} and positions inside the history")


def _describe(work: Path, kinds: Iterable[str], hashes: dict[str, str]) -> dict:
    """Facts for the manifest. `hashes`: the sha256 of shards that were taken when they were written."""
    index = pl.read_parquet(work / "index.parquet")
    names = ["item_latents", "latent_mean", "latent_std", *(f"{kind}_latents" for kind in kinds if kind != "item")]
    arrays = {f"{name}.npy": np.load(work / f"{name}.npy", mmap_mode="r") for name in names}
    files = {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}
    files["index.parquet"] = {"rows": len(index)}
    for shard, rows in index.group_by("shard").len().rows():
        name = shard_name(shard)
        files[name] = {"rows": rows, **({"sha256": hashes[name]} if name in hashes else {})}
    num_items, num_item_tokens, latent_dim = arrays["item_latents.npy"].shape
    return {
        "files": files,
        "num_items": num_items,
        "num_item_tokens": num_item_tokens,
        "latent_dim": latent_dim,
        "num_users": len(index),
        "num_shards": index["shard"].n_unique(),
        "num_interactions": index["num_items"].sum(),
        "user_tokens": "user" in kinds,
    }
