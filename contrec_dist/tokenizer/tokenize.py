"""Stage tokenize: embeddings -> tokenizer/.

Trains the items' sigma-VAE, and where users have embeddings a smaller run of the same for users, on the rows that have
training interactions (where there are more, MAX_FIT_ROWS drawn by the seed); measures what the items' kept (probes.py).

Writes       item_tokenizer.{safetensors,json}, user_tokenizer.* when users have embeddings, probes.json, losses.json
Guarantees   the probes are measured on the tokenizer as it was read back from the files that precompute will load.
Cost         see fit.py and probes.py.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from contrec_dist.config import Config
from contrec_dist.data.catalog import load_items
from contrec_dist.embeddings.layout import read_layout
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import Manifest, run_stage, write_json
from contrec_dist.progress import get_logger
from contrec_dist.tokenizer.fit import fit_tokenizer
from contrec_dist.tokenizer.probes import measure_tokenizer
from contrec_dist.tokenizer.sigma_vae import SigmaVAE

ITEM_TOKENIZER = "item_tokenizer"
USER_TOKENIZER = "user_tokenizer"
USER_STEPS_DIVISOR = 4
MAX_FIT_ROWS = 262_144
TABLE_COLUMNS = ("bits", "relative_mse", "neighbour_overlap", "neighbour_overlap_decoded", "effective_rank", "collision_rate")


def run(config: Config) -> Manifest:
    """Run the stage; see the module."""
    return run_stage(
        config, stage="tokenize", folder="tokenizer", sections=("tokenizer",), inputs=("catalog", "embeddings"), build=_build
    )


def _build(config: Config, work_dir: Path) -> dict:
    items, users = _read_training_rows(config)
    collaborative = _find_collaborative(config)
    curves = {ITEM_TOKENIZER: _fit_and_save(items, config, work_dir, ITEM_TOKENIZER, config.tokenizer.num_steps, collaborative)}
    if users.shape[1] > 0:
        steps = max(1, config.tokenizer.num_steps // USER_STEPS_DIVISOR)
        curves[USER_TOKENIZER] = _fit_and_save(users, config, work_dir, USER_TOKENIZER, steps)
    write_json(work_dir / "losses.json", curves)
    tokenizer = SigmaVAE.load(work_dir, ITEM_TOKENIZER)
    probes = measure_tokenizer(tokenizer, items, config.tokenizer, config.seed)
    write_json(work_dir / "probes.json", probes)
    _print_probes(probes)
    final = {name: curve[-1] for name, curve in curves.items()}
    return {"training_items": len(items), "training_users": len(users), "final_losses": final, "probes": probes["methods"]}


def _read_training_rows(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the items and of the users that have training interactions. Shapes   (n, E), (u, E_u) float32"""
    folder = config.folder("embeddings")
    names = ("items.npy", "users.npy", "user_known.npy")
    items, users, user_known = (np.load(folder / name, mmap_mode="r") for name in names)
    num_train = load_items(config.folder("catalog"))["num_train"].to_numpy()
    if len(num_train) != len(items):
        raise ArtifactError(folder / "items.npy", f"{len(items)} rows", f"the catalogue's {len(num_train)}")
    return _draw_rows(items, num_train > 0, config.seed), _draw_rows(users, user_known, config.seed)


def _draw_rows(table: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """The rows that `known` marks, at most MAX_FIT_ROWS of them, in their order."""
    rows = np.flatnonzero(known)
    if len(rows) > MAX_FIT_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_FIT_ROWS, replace=False))
    return np.array(table[rows])


def _find_collaborative(config: Config) -> slice | None:
    """The items' collaborative columns, where they have text beside them: without it nothing is left when they are dropped."""
    if config.tokenizer.collaborative_drop == 0:
        return None
    layout = read_layout(config.folder("embeddings"))
    both = all(part.stop > part.start for part in layout.values())
    if not both:
        get_logger("tokenize").info("tokenizer.collaborative_drop has no effect: items have one part only")
    return layout["collaborative"] if both else None


def _fit_and_save(
    rows: np.ndarray, config: Config, folder: Path, name: str, num_steps: int, collaborative: slice | None = None
) -> list[dict]:
    """Train and save one tokenizer; returns its loss curve."""
    what = name.split("_")[0]
    tokenizer, curve = fit_tokenizer(
        rows, config.tokenizer, config.seed, num_steps=num_steps, what=what, collaborative=collaborative
    )
    tokenizer.save(folder, name)
    return curve


def _print_probes(probes: dict) -> None:
    table = Table(title="What the tokenizer kept")
    table.add_column("tokens")
    for column in TABLE_COLUMNS:
        table.add_column(column.replace("_", " "), justify="right")
    for record in probes["methods"]:
        table.add_row(record["method"], *("-" if record[name] is None else f"{record[name]:.4g}" for name in TABLE_COLUMNS))
    Console(stderr=True).print(table)
