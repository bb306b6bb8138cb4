"""Training: throughput, MFU, memory and waiting of every ZeRO stage; packing; the paper's own scheme; the diffusion head.

    python launchers/benchmark.py train --config configs/beauty.yaml run_dir=runs/beauty \\
        --packing configs/ml1m.yaml,run_dir=runs/ml1m --packing configs/lastfm.yaml,run_dir=runs/lastfm
    python launchers/benchmark.py train --config configs/llama3_1b.yaml run_dir=runs/beauty --random_backbone llama-3.2-1b \\
        --micro_batch auto --stages 2,3 --ranks 1 --only train --variant lora:backbone.lora.rank=16 \\
        --variant full:backbone.lora.rank=0

Reads catalog/ and tokens/ of a run whose precompute stage is complete, and trains in a temporary folder: the run is left as
it is. One start of the real `deepspeed` launcher per number of ranks trains all configs one after the other.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from contrec_dist.benchmarks.train_tables import print_tables, summarise
from contrec_dist.config import Config, HeadConfig, load_config
from contrec_dist.errors import ArtifactError, ConfigError, ContRecError
from contrec_dist.manifest import write_json
from contrec_dist.progress import get_logger
from contrec_dist.training.starter import run_launcher

PARTS = ("train", "packing", "peer", "head")
READ_FOLDERS = ("catalog", "embeddings", "tokenizer", "tokens")
ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, which configs of it, and for how long."""
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    add("overrides", nargs="*", metavar="key=value", help="config values, for example run_dir=runs/beauty")
    add("--stages", type=numbers, default=[0, 1, 2, 3], help="ZeRO stages (default 0,1,2,3)")
    add("--ranks", type=numbers, default=[1, 2], help="numbers of ranks (default 1,2)")
    add("--variant", action="append", default=[], metavar="NAME:key=value,..", help="a further config that is trained; may be repeated")
    add("--packing", action="append", default=[], metavar="FILE,key=value,..", help="a further data set whose padding is counted")
    add("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"parts to measure (default {','.join(PARTS)})")
    add("--steps", type=int, default=10, help="optimizer steps of a repeat")
    add("--repeats", type=int, default=5, help="repeats, of which the median is told")
    add("--warmup", type=int, default=3, help="steps that count for nothing, at least 1")
    add("--peer_batches", type=numbers, default=[2, 4, 10, 16], help="batch sizes of the peer; its best one counts")
    add("--peer_steps", type=int, default=3, help="steps of a repeat of the peer")
    add("--micro_batch", default="", metavar="ROWS", help="rows of a forward pass; 'auto': as many as memory carries")
    add("--max_micro_batch", type=int, default=256, help="where 'auto' ends")
    add("--random_backbone", default="", metavar="SHAPE", help="llama-3.2-1b, qwen2.5-0.5b or a config.json, random weights")


def run(parsed: argparse.Namespace) -> dict:
    """Measure what is asked, print the tables, and return all figures.

    Errors   ConfigError for arguments that cannot be, ArtifactError when the run has no tokens/,
             ContRecError when a start of the ranks fails
    """
    _check_arguments(parsed)
    with tempfile.TemporaryDirectory(prefix="contrec-benchmark-") as name:
        folder = Path(name)
        variants = _variants(parsed, folder)
        single = _single_jobs(parsed, folder, next(iter(variants.values())))
        records: dict[str, list[dict]] = {}
        for num_ranks in _possible_ranks(parsed.ranks) if "train" in parsed.only else []:
            jobs = _training_jobs(parsed, folder, variants, num_ranks)
            if num_ranks == 1:
                jobs, single = jobs + single, []
            records |= _start_ranks(jobs, num_ranks, folder)
        if single:
            records |= _start_ranks(single, 1, folder)
        figures = summarise(records, next(iter(variants.values())))
    print_tables(figures)
    return figures


def _check_arguments(parsed: argparse.Namespace) -> None:
    unknown = [name for name in parsed.only if name not in PARTS]
    if unknown:
        raise ConfigError("--only", unknown, f"some of {PARTS}")
    for name, least in (("steps", 1), ("repeats", 1), ("warmup", 1), ("peer_steps", 1), ("max_micro_batch", 1)):
        if getattr(parsed, name) < least:
            raise ConfigError(f"--{name}", getattr(parsed, name), f"at least {least}")
    if parsed.micro_batch not in ("", "auto") and not parsed.micro_batch.isdigit():
        raise ConfigError("--micro_batch", parsed.micro_batch, "a number of rows, or auto")


def _variants(parsed: argparse.Namespace, folder: Path) -> dict[str, Config]:
    """The configs that are trained, by name; without --variant the one of --config."""
    extra = list(parsed.overrides)
    if parsed.micro_batch.isdigit():
        extra.append(f"train.micro_batch_rows={parsed.micro_batch}")
    if parsed.random_backbone:
        from contrec_dist.benchmarks.backbones import write_random_backbone

        base = _checked(load_config(parsed.config, extra))
        extra.append(f"backbone.path={write_random_backbone(parsed.random_backbone, base, folder / 'backbone')}")
    variants = {}
    for variant in parsed.variant or [":"]:
        name, _, overrides = variant.partition(":")
        config = load_config(parsed.config, [*extra, *filter(None, overrides.split(","))])
        variants[name or config.name] = _checked(config)
    return variants


def _checked(config: Config) -> Config:
    for name in ("catalog/items.parquet", "tokens/index.parquet"):
        if not config.folder(name).is_file():
            raise ArtifactError(config.folder(name), "nothing", f"a run prepared by `contrec precompute` (run_dir={config.run_dir})")
    return config


def _training_jobs(parsed: argparse.Namespace, folder: Path, variants: dict[str, Config], num_ranks: int) -> list[dict]:
    jobs = []
    for name, config in variants.items():
        for stage in parsed.stages:
            settings = {
                "num_steps": parsed.steps, "num_repeats": parsed.repeats, "warmup_steps": parsed.warmup,
                "max_rows": parsed.max_micro_batch if parsed.micro_batch == "auto" else None,
            }  # fmt: skip
            staged = replace(config, zero=replace(config.zero, stage=stage))
            jobs.append(_job("train", f"train:{name}:{stage}:{num_ranks}", staged, folder, settings))
    return jobs


def _single_jobs(parsed: argparse.Namespace, folder: Path, config: Config) -> list[dict]:
    """Jobs of one process: packing of all data sets, the peer, the head at the config's size and at the default one."""
    jobs = []
    timing = {"num_repeats": parsed.repeats, "num_warmup": parsed.warmup}
    if "packing" in parsed.only:
        others = [one.partition(",") for one in parsed.packing]
        configs = [_checked(load_config([file], list(filter(None, rest.split(","))))) for file, _, rest in others]
        jobs += [_job("packing", f"packing:{one.dataset}", one, folder, {}) for one in [config, *configs]]
    if "peer" in parsed.only:
        settings = {"batch_sizes": parsed.peer_batches, "num_steps": parsed.peer_steps, **timing}
        jobs.append(_job("peer", "peer", config, folder, settings))
    if "head" in parsed.only:
        for name, head in {"config": config.head, "default": HeadConfig()}.items():
            jobs.append(_job("head", f"head:{name}", replace(config, head=head), folder, {"num_steps": parsed.steps, **timing}))
    return jobs


def _job(kind: str, name: str, config: Config, folder: Path, settings: dict) -> dict:
    """A job in a run folder of its own that only borrows what the real run has prepared."""
    safe = name.replace(":", "-").replace("/", "-")
    run_dir = folder / "runs" / safe
    run_dir.mkdir(parents=True)
    for one in READ_FOLDERS:
        if config.folder(one).is_dir():
            (run_dir / one).symlink_to(config.folder(one).resolve())
    path = folder / f"{safe}.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(replace(config, run_dir=str(run_dir)))))
    return {"kind": kind, "name": safe, "key": name, "config": str(path), "settings": settings}


def _possible_ranks(asked: list[int]) -> list[int]:
    """Without more ranks than GPUs, where there are GPUs."""
    import torch

    num_gpus = torch.cuda.device_count()
    left_out = [ranks for ranks in asked if 0 < num_gpus < ranks]
    if left_out:
        get_logger("benchmark").warning("ranks %s left out: this machine has %d GPU(s)", left_out, num_gpus)
    return [ranks for ranks in asked if ranks not in left_out]


def _start_ranks(jobs: list[dict], num_ranks: int, folder: Path) -> dict[str, list[dict]]:
    """One start of DeepSpeed for all jobs. -> key of the job: figures of every rank

    Errors   ContRecError when the start or a job fails
    """
    path = folder / f"jobs-{num_ranks}.json"
    write_json(path, jobs)
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), "--master_port", str(_free_port()),
        "--log_level", "warning", str(Path(__file__).with_name("train_ranks.py")), "--jobs", str(path),
    ]  # fmt: skip
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    code, _ = run_launcher(command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    if code != 0:
        raise ContRecError(f"the benchmark's {num_ranks} rank(s) ended with exit code {code}; the log is above")
    return {job["key"]: [_read_record(folder, job, rank) for rank in range(num_ranks)] for job in jobs}


def _read_record(folder: Path, job: dict, rank: int) -> dict:
    record = json.loads((folder / f"{job['name']}-rank{rank}.json").read_text())
    if "error" in record:
        raise ContRecError(f"{job['key']}: {record['error']}")
    return record["figures"]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
