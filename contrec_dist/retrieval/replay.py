"""The changes of a living index, made again on the index that was built in its place (another model, other data).

What was asked stands in index_live/changes/: the last word on every item counts. An item that was added and is in the
new catalogue by now stays as that describes it; one that was replaced is replaced again; one that was removed is
removed again. The old versions are kept under the name of the index that they belong to, index_live-<hash>.
"""

import shutil
from pathlib import Path

import polars as pl

from contrec_dist.config import Config
from contrec_dist.progress import get_logger
from contrec_dist.retrieval.current_index import LIVE_FOLDER, load_item_table, open_store
from contrec_dist.retrieval.live_index import LiveIndex
from sharding.faiss_versions import CURRENT_NAME, ForeignVersion, VersionStore

MAKING = f".{LIVE_FOLDER}.replay"


def replay_changes(config: Config) -> None:
    """Replay where the changes belong to another index; otherwise say that there is nothing to do.

    The caller holds lock_folder(config, LIVE_FOLDER). Killed, it starts again from the old versions, which are renamed
    last.
    """
    log, store = get_logger("index"), open_store(config)
    making = VersionStore(
        config.folder(MAKING),
        store.base_folder,
        store.version_0.base_hash,
        store.version_0.num_items,
        store.kept_versions,
    )
    if not store.folder.exists() and (making.folder / CURRENT_NAME).is_file():  # killed between the two renames
        making.folder.rename(store.folder)
    try:
        log.info("nothing to replay: version %d belongs to the index that is there", store.current().number)
        return
    except ForeignVersion as error:
        log.info("replaying on the new index: %s", error)
    shutil.rmtree(making.folder, ignore_errors=True)
    apply_changes(LiveIndex(config, making), last_words(store.folder / "changes"))
    log.info("the old versions are kept in %s", store.set_aside())
    if making.folder.exists():
        making.folder.rename(store.folder)


def last_words(folder: Path) -> pl.DataFrame:
    """[item_id, title, category, brand, text, kind]: the last change of every item, in the order of the changes."""
    changes = pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("[0-9]*.parquet"))])
    return changes.unique("item_id", keep="last", maintain_order=True)


def apply_changes(live: LiveIndex, changes: pl.DataFrame) -> None:
    """Up to three versions: what joins, what is replaced, what leaves."""
    known = load_item_table(live.config, live.store, live.store.current()).select("item_id")
    wanted = changes.filter(pl.col("kind") != "remove")
    joins = wanted.join(known, on="item_id", how="anti", maintain_order="left").drop("kind")
    replaced = (
        wanted.filter(pl.col("kind") == "replace")
        .join(known, on="item_id", how="semi", maintain_order="left")
        .drop("kind")
    )
    removed = changes.filter(pl.col("kind") == "remove").join(known, on="item_id", how="semi", maintain_order="left")
    stay = len(wanted) - len(joins) - len(replaced)
    if stay:
        get_logger("index").info(
            "%d items that were added are in the new catalogue: they stay as it describes them", stay
        )
    if len(joins):
        live.add(joins)
    if len(replaced):
        live.replace(replaced)
    if len(removed):
        live.remove(removed["item_id"].to_list())
