"""The command line: `contrec STAGE --config FILE [key=value ...]`, and the commands around the stages.

A command is a module of contrec_dist/commands with `add_arguments(parser)`, `run(config, parsed) -> exit code` and, where it
needs no config, NEEDS_CONFIG = False (run then gets None). It is named in COMMANDS, with a space where it belongs to a stage.
"""

import argparse
import os
import sys
from importlib import import_module
from typing import Callable

from rich.console import Console

from contrec_dist.config import Config, load_config
from contrec_dist.errors import ContRecError, StageStopped
from contrec_dist.manifest import Manifest
from contrec_dist.progress import get_logger
from contrec_dist.training.stop import remove_stop_file

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two spinning processes on two cores slow each other tenfold

STAGES = {
    "prepare": ("contrec_dist.data.prepare", "raw logs -> catalog/"),
    "embed": ("contrec_dist.embeddings.embed", "catalog -> embeddings/: LightGCN and text"),
    "tokenize": ("contrec_dist.tokenizer.tokenize", "embeddings -> tokenizer/: trains the sigma-VAE"),
    "precompute": ("contrec_dist.data.precompute", "tokenizer -> tokens/: latents and WebDataset shards (Ray)"),
    "train": ("contrec_dist.training.train", "tokens -> model/: DeepSpeed ZeRO-3"),
    "index": ("contrec_dist.retrieval.index", "model -> index/: FAISS shards"),
    "score": ("contrec_dist.retrieval.score", "model, index -> recommendations/ (Ray)"),
    "evaluate": ("contrec_dist.report.evaluate", "recommendations -> report/"),
}
COMMANDS: dict[str, tuple[str, str]] = {
    "index add": ("contrec_dist.commands.index_add", "new items join the index, encoded with the trained model"),
    "index remove": ("contrec_dist.commands.index_remove", "items leave the index: no search returns them again"),
    "index replace": ("contrec_dist.commands.index_replace", "items of the index get another text, in one version"),
    "index compact": ("contrec_dist.commands.index_compact", "write segments of the index again without what left"),
    "index replay": ("contrec_dist.commands.index_replay", "make the changes of an index again on the one built in its place"),
    "estimate": ("contrec_dist.commands.estimate", "memory of a training rank, by part and ZeRO stage, before anything runs"),
    "export": ("contrec_dist.commands.export", "the trained model as a folder of its own, its adapters merged or separate"),
    "verify": ("contrec_dist.commands.verify", "every file of a run against what was written down of it; all that is broken is named"),
    "env": ("contrec_dist.commands.env", "versions and machine as Markdown for a bug report, and what is missing for what"),
    "baseline": ("contrec_dist.commands.baseline", "fit a baseline and write its recommendations beside the model's"),
    "ablate": ("contrec_dist.commands.ablate", "one change at a time: rows of configs/ablation, each judged against the base"),
    "tune": ("contrec_dist.commands.tune", "settings of the model or a baseline, tried one after another on validation users"),
    "repeat": ("contrec_dist.commands.repeat", "the whole run, baselines too, under several seeds: mean and spread"),
    "generate": ("contrec_dist.commands.generate", "a catalogue of any size as files, and the config that runs on it"),
}

STAGE_OPTIONS = {  # options that stand for a config value: stage -> option -> (section, field, help)
    "score": {
        "--histories": ("score", "histories_file", "score these users from a history alone; see score.histories_file"),
        "--users": ("score", "users_file", "score these users alone; see score.users_file"),
        "--output": ("score", "output", "folder for the lists; see score.output"),
    },
}


def run_stage_by_name(name: str, config: Config) -> Manifest:
    """Run one stage. Errors   ContRecError of that stage."""
    return import_module(STAGES[name][0]).run(config)


def run_pipeline(config: Config, before_stage: Callable[[str], object] = str) -> None:
    """All stages in order; the complete ones are skipped. The last one prints the table of results.

    `before_stage(name)` is called in front of each.
    Errors   StageStopped when training was asked to stop, or when a stop-file lies there between two stages
    """
    for name in STAGES:
        if remove_stop_file(config):
            raise StageStopped(f"stopped before {name}; run the same command again to go on", config.launch.requeue_exit_code)
        before_stage(name)
        run_stage_by_name(name, config)


def build_parser() -> argparse.ArgumentParser:
    """One sub-command a stage, `pipeline` for all, and the commands around them."""
    parser = argparse.ArgumentParser(
        prog="contrec",
        description="Generative recommendation with continuous tokens, one stage at a time.",
        epilog="example: contrec pipeline --config configs/demo.yaml train.num_epochs=3",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="STAGE")
    summaries = {name: summary for name, (_, summary) in STAGES.items()}
    for name, summary in {**summaries, "pipeline": "all stages in order; complete ones are skipped"}.items():
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=f"example: contrec {name} --config configs/demo.yaml seed=1"
        )
        _add_config_arguments(command)
        for option, (section, field, explanation) in STAGE_OPTIONS.get(name, {}).items():
            command.add_argument(option, dest=f"{section}.{field}", metavar="PATH", help=explanation)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, prog=f"contrec {name}", help=summary, description=summary)
        imported = import_module(module)
        imported.add_arguments(command)
        if getattr(imported, "NEEDS_CONFIG", True):
            _add_config_arguments(command)
    return parser


def _add_config_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="config values, for example seed=1")


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 a named error, launch.requeue_exit_code after a stop that was asked for;
    a command may have others.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if " ".join(arguments[:2]) in COMMANDS:  # "index add" is one name
        arguments[:2] = [" ".join(arguments[:2])]
    parsed = _parse(arguments)
    try:
        return _execute(parsed)
    except StageStopped as stopped:
        get_logger(parsed.command).warning("%s", stopped)
        return stopped.exit_code
    except ContRecError as error:
        get_logger(parsed.command).error("%s", error)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """argparse gives up on key=value after an option where a positional argument stood before it; here they may stand anywhere."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    wrong = [one for one in rest if one.startswith("-") or "=" not in one or not hasattr(parsed, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def _execute(parsed: argparse.Namespace) -> int:
    config = load_config(parsed.config, parsed.overrides) if hasattr(parsed, "overrides") else None
    if parsed.command in COMMANDS:
        return import_module(COMMANDS[parsed.command][0]).run(config, parsed)
    if parsed.command == "pipeline":
        run_pipeline(config)
    else:
        for section, field, _ in STAGE_OPTIONS.get(parsed.command, {}).values():
            given = getattr(parsed, f"{section}.{field}")
            if given is not None:
                setattr(getattr(config, section), field, given)
        manifest = run_stage_by_name(parsed.command, config)
        Console().print(f"{parsed.command}: {config.folder(manifest.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
