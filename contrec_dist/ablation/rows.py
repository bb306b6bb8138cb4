"""The rows of an ablation: each a YAML file that changes one thing of a base config, run in a folder of its own.

    <run_dir>/ablation/<row>/    a run like any other: `contrec STAGE` on the row's config finds it finished

The file opens with a comment that says what is changed and what is claimed of it; reports repeat it.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from omegaconf import OmegaConf

from contrec_dist.config import Config, flatten_keys, load_config
from contrec_dist.errors import ConfigError
from contrec_dist.report.evaluate import WORKED_OUT

BASE_ROW = "base"
ABLATION_FOLDER = "ablation"
NEEDED_CUT = 10
"the lists of every row are judged at this cut-off"


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One row: what it changes, and the config that this makes."""

    name: str
    about: str
    "the comment at the top of its file"
    change: dict[str, object]
    "the keys that its file sets, dotted"
    config: Config


def load_rows(folder: Path, files: Sequence[str], overrides: Sequence[str]) -> list[AblationRow]:
    """The rows of a folder, the base first, numbers in names in their order.

    A row's file is read after the base's files and the key=value arguments, so its change always stands.
    Errors   ConfigError for a folder without a base, a value that does not fit, or a setting that rows cannot share
    """
    paths = sorted(Path(folder).glob("*.yaml"), key=_reading_order)
    if BASE_ROW not in [path.stem for path in paths]:
        raise ConfigError("--configs", str(folder), f"a folder of YAML files, {BASE_ROW}.yaml among them")
    return [_load_row(path, files, overrides) for path in paths]


def pick_rows(rows: Sequence[AblationRow], names: str) -> list[AblationRow]:
    """The rows of a list of names separated by commas, in the order of `rows`; empty: all.

    Errors   ConfigError naming those that are unknown
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = sorted(set(wanted) - {row.name for row in rows})
    if unknown:
        raise ConfigError("--rows", ", ".join(unknown), f"some of {', '.join(row.name for row in rows)}")
    return [row for row in rows if not wanted or row.name in wanted]


def _load_row(path: Path, files: Sequence[str], overrides: Sequence[str]) -> AblationRow:
    base, config = load_config(files, overrides), load_config(files, [*overrides, path])
    refuse_other_lists(config, {"validation", "test"})  # where rows are compared, and what evaluate judges too
    # Other baselines belong to the base's run.
    baselines = [name for name in config.evaluate.baselines if name in WORKED_OUT]
    config = dataclasses.replace(
        config,
        run_dir=str(Path(base.run_dir) / ABLATION_FOLDER / path.stem),
        evaluate=dataclasses.replace(config.evaluate, baselines=baselines),
        shards=dataclasses.replace(config.shards, url=""),  # a copy of the base's shards holds other latents
    )
    change = flatten_keys(OmegaConf.to_container(OmegaConf.load(path)))
    return AblationRow(name=path.stem, about=_opening_comment(path), change=change, config=config)


def refuse_other_lists(config: Config, splits: set[str]) -> None:
    """Errors   ConfigError where a run's lists would not be of all users of these splits, or too short to be judged"""
    for name in ("output", "users_file", "histories_file"):
        if getattr(config.score, name):
            raise ConfigError(f"score.{name}", getattr(config.score, name), "nothing: every run has lists of all users of its own")
    if config.score.k < NEEDED_CUT or not splits <= set(config.score.splits):
        got = f"k={config.score.k}, splits={config.score.splits}"
        raise ConfigError("score", got, f"lists of at least {NEEDED_CUT} for {' and '.join(map(repr, sorted(splits)))}")


def _reading_order(path: Path) -> tuple:
    """The base first, then by name, numbers as numbers: steps_2 before steps_10."""
    pieces = [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", path.stem)]
    return path.stem != BASE_ROW, pieces


def _opening_comment(path: Path) -> str:
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
