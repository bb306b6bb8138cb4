"""The trials of a search: every setting is a run of its own, judged by NDCG@10 of validation users, seen items masked.

    <run_dir>/tuning/NAME/trials/<number>/   a run like any other, without lists of test users
    <run_dir>/tuning/NAME/trials.json        {"identity", "space", "trials": [record, ...]}, written after every trial

NAME is a baseline, or `contrec` for the model. The stages are the pipeline's own; what a trial does not change is taken over from the
base's run or from an earlier trial.

Guarantees   stopped at any point, the same command goes on, and tries what it would have tried. Settings that fail are told and count.
             Nothing reads a test item.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Sequence

from contrec_dist.__main__ import STAGES, run_stage_by_name
from contrec_dist.ablation.figures import judge_lists
from contrec_dist.ablation.rows import refuse_other_lists
from contrec_dist.ablation.sharing import take_over
from contrec_dist.baselines.registry import baseline_folder, load_baseline
from contrec_dist.baselines.stage import run_baseline
from contrec_dist.baselines.views import CHOICE_CUT
from contrec_dist.config import Config, load_config
from contrec_dist.errors import ArtifactError, ConfigError, ContRecError, DataError, StageStopped
from contrec_dist.hyperparameters.proposal import propose
from contrec_dist.hyperparameters.space import SearchSpace, as_override
from contrec_dist.manifest import WRITTEN_BY, stage_identity, write_json
from contrec_dist.progress import get_logger
from contrec_dist.training.stop import remove_stop_file

MODEL = "contrec"
GOAL = f"ndcg@{CHOICE_CUT}"
JSON_NAME = "trials.json"
NO_PART = {"name", "run_dir", "seed", "launch", "shards", "monitor", "ray", "evaluate"}
"fields of a config that decide no figure; the seed is in every identity"


def tuning_folder(name: str) -> str:
    """Folder of a search inside the run."""
    return f"tuning/{name}"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is tuned: NAME, over a space, for the config of files and arguments."""

    name: str
    space: SearchSpace
    files: Sequence[str]
    overrides: Sequence[str]

    @cached_property
    def config(self) -> Config:
        """The base's run."""
        return load_config(self.files, self.overrides)

    @cached_property
    def identity(self) -> str:
        """What the records of two searches must have in common."""
        sections = [field.name for field in dataclasses.fields(Config) if field.name not in NO_PART]
        space = json.loads(json.dumps(dict(self.space.choices)))
        return stage_identity(self.config, sections, (), {"name": self.name, "space": space})[0]

    @property
    def folder(self) -> Path:
        return self.config.folder(tuning_folder(self.name))

    def trial_config(self, number: int, values: dict[str, object]) -> Config:
        """The run of a trial. Errors   ConfigError for settings that no run can have"""
        config = load_config(self.files, [*self.overrides, *(as_override(key, value) for key, value in values.items())])
        refuse_other_lists(config, {"validation"})
        return dataclasses.replace(
            config,
            run_dir=str(self.folder / "trials" / f"{number:03d}"),
            score=dataclasses.replace(config.score, splits=["validation"]),
            shards=dataclasses.replace(config.shards, url=""),  # a copy of the base's shards may hold other latents
        )


def run_search(search: Search, num_trials: int, after_trial=lambda records: None) -> list[dict]:
    """Try settings until so many were tried, or all; the records. `after_trial(records)` is called after each.

    Errors   ArtifactError where the folder holds trials of another config or space; StageStopped when asked to stop; those of
             trial 0, the config as it is
    """
    base, records = search.config, load_records(search)
    donors = [base, *(search.trial_config(one["number"], one["values"]) for one in records if GOAL in one)]
    search.folder.mkdir(parents=True, exist_ok=True)
    while len(records) < num_trials:
        if remove_stop_file(base):
            raise StageStopped(f"stopped before trial {len(records)}; run the same command again to go on", base.launch.requeue_exit_code)
        values = propose(search.space, [(one["values"], one.get(GOAL)) for one in records], base.seed)
        if values is None:
            get_logger("tune").info("all %d settings of the space were tried", search.space.size)
            break
        get_logger("tune").info("trial %d of %d: %s", len(records), num_trials, json.dumps(values))
        records.append(_run_trial(search, len(records), values, donors))
        write_json(search.folder / JSON_NAME, {"identity": search.identity, "space": search.space.choices, "trials": records})
        after_trial(records)
    return records


def load_records(search: Search) -> list[dict]:
    """Trials that are done. Errors   ArtifactError where they are of another config or space"""
    path = search.folder / JSON_NAME
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    if found["identity"] != search.identity:
        raise ArtifactError(path, "trials of another config, seed or space", "the same ones; or move the folder away")
    return found["trials"]


def best_record(records: Sequence[dict]) -> dict | None:
    """The trial with the highest figure, the earlier one on a tie; None where none came to an end."""
    return max((one for one in records if GOAL in one), key=lambda one: (one[GOAL], -one["number"]), default=None)


def _run_trial(search: Search, number: int, values: dict[str, object], donors: list[Config]) -> dict:
    """Run a setting to its end; its record, with the error where it failed. A run that came to its end joins the donors."""
    record, started = {"number": number, "values": values}, time.monotonic()
    try:
        config = search.trial_config(number, values)
        record |= _judge(search.name, config, donors)
        donors.append(config)
    except (StageStopped, ArtifactError):  # the latter is of the runs, not of the settings
        raise
    except ContRecError as error:
        if number == 0:  # the config itself: nothing of it can be tuned
            raise
        get_logger("tune").error("trial %d: %s", number, error)
        record["error"] = " ".join(str(error).split())
    return record | {"seconds": round(time.monotonic() - started, 1)}


def _judge(name: str, config: Config, donors: Sequence[Config]) -> dict[str, float]:
    """Build what a trial needs and measure it. -> {"hr@10", "ndcg@10"}"""
    for folder in _needed_folders(name):
        take_over(config, folder, donors)
        if folder in WRITTEN_BY:
            run_stage_by_name(WRITTEN_BY[folder], config)
    if name == MODEL:
        return {key: float(values.mean()) for key, values in judge_lists(config, "validation").values.items()}
    figures = run_baseline(config, name).facts["validation"].get("masked")
    if not figures:
        raise DataError(str(config.folder("catalog")), "no validation user", "some to judge a setting by")
    return figures


def _needed_folders(name: str) -> list[str]:
    """Folders of the stages that the model or a baseline is made from, in order; of baselines that come first; its own."""
    stages = [folder for folder in WRITTEN_BY if WRITTEN_BY[folder] in STAGES]
    if name == MODEL:
        return stages[: stages.index("recommendations") + 1]
    module = load_baseline(name)
    read = [stages.index(folder) for folder in module.INPUTS if folder in stages]
    return [*stages[: max(read, default=0) + 1], *map(baseline_folder, (*getattr(module, "NEEDS", ()), name))]


def check_name(name: str) -> None:
    """Errors   ConfigError for what is neither the model nor a baseline"""
    if name != MODEL:
        try:
            load_baseline(name)
        except ConfigError as error:
            raise ConfigError("tune", error.got, f"{MODEL}, or {error.expected}") from None
