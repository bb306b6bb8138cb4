"""`contrec repeat --config FILE --seeds 0,1,2 [--baselines tiger,sasrec_text] [key=value ...]`: the whole run under several seeds.

The config's own seed is the run itself, the others are runs of their own in run_dir/seeds/<seed>; all by the pipeline's own stages:
what is complete is skipped, a killed training resumes. Baselines are fitted under each seed too. Ends with mean and spread over
seeds and the lead over every baseline, users paired: run_dir/seeds/seeds.md.
"""

import argparse
import dataclasses
from pathlib import Path

from contrec_dist.config import Config
from contrec_dist.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which seeds, and which baselines beside the model."""
    parser.add_argument("--seeds", default="0,1,2", metavar="NUMBERS", help="seeds, separated by commas (default: 0,1,2)")
    parser.add_argument("--baselines", default="", metavar="NAMES", help="baselines that are fitted too, separated by commas")


def run(config: Config, parsed: argparse.Namespace) -> int:
    """Exit code 0. Prints the table.

    Errors   ConfigError for seeds or baselines that cannot be read, before anything runs; those of the stages
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from contrec_dist.__main__ import run_pipeline
    from contrec_dist.baselines.registry import BASELINES
    from contrec_dist.baselines.stage import run_baseline
    from contrec_dist.manifest import lock_folder
    from contrec_dist.progress import get_logger
    from contrec_dist.report.seeds import MARKDOWN_NAME, SEEDS_FOLDER, pair_users, read_metrics, render_markdown, summarize_seeds, write_summary

    seeds, baselines = read_seeds(parsed.seeds), [name.strip() for name in parsed.baselines.split(",") if name.strip()]
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise ConfigError("--baselines", ", ".join(unknown), f"some of {', '.join(sorted(BASELINES))}")
    runs = {seed: config_of(config, seed) for seed in seeds}
    title = f"{config.dataset}: {len(seeds)} seeds"
    with lock_folder(config, SEEDS_FOLDER):
        for seed, one in runs.items():
            get_logger("repeat").info("seed %d: %s", seed, one.run_dir)

            def before_stage(stage: str, one: Config = one) -> None:
                for name in baselines if stage == "evaluate" else ():
                    run_baseline(one, name)

            run_pipeline(one, before_stage=before_stage)
        summary = summarize_seeds(read_metrics(runs)) | {"paired": pair_users(runs)}
        write_summary(summary, config.folder(SEEDS_FOLDER), title)
    console = Console()
    console.print(Markdown(render_markdown(summary, title)))
    console.print(f"table: {config.folder(SEEDS_FOLDER) / MARKDOWN_NAME}", soft_wrap=True, highlight=False)
    return 0


def read_seeds(text: str) -> list[int]:
    """"0,1,2" -> [0, 1, 2]. Errors   ConfigError for what is no list of different numbers"""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError("--seeds", text, "different numbers from 0, separated by commas")
    return seeds


def config_of(config: Config, seed: int) -> Config:
    """The run itself for its own seed, else a run of its own inside."""
    if seed == config.seed:
        return config
    return dataclasses.replace(config, seed=seed, run_dir=str(Path(config.run_dir) / "seeds" / str(seed)))
