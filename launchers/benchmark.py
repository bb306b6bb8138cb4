"""Measure a part of the system: its floor, what it does, and the ratio.

    python launchers/benchmark.py train --output runs/benchmark/train.json

Each part is a module of contrec_dist/benchmarks. It prints a table and, with --output, writes its figures as JSON
together with the machine, the versions and the command. Figures that are compared are taken in one run, as medians of several.
"""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two spinning processes on two cores slow each other tenfold
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BENCHMARKS: dict[str, tuple[str, str]] = {
    "precompute": ("contrec_dist.benchmarks.precompute", "rows/s a core against a bare loop, memory, cost against size"),
    "index": ("contrec_dist.benchmarks.index", "queries/s and recall of the FAISS index against exact search, in one and in several shards"),
    "score": ("contrec_dist.benchmarks.score", "users/s, memory and growth of batch scoring over Ray; beside TIGER with --tiger"),
    "sampler": ("contrec_dist.benchmarks.sampler", "HR@10 and seconds of few solver steps against 200 ancestral ones, on a finished run"),
    "tiger_decoder": ("contrec_dist.benchmarks.tiger_decoder", "users/s of TIGER's beam search over any number of items"),
    "train": ("contrec_dist.benchmarks.train", "tokens/s, MFU, memory and waiting of training; the paper's scheme; the head's cost"),
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 measured, 1 a named error."""
    from contrec_dist.errors import ContRecError
    from contrec_dist.manifest import write_json
    from contrec_dist.progress import get_logger

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, (module, summary) in BENCHMARKS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if arguments[:1] == [name]:  # the others' packages need not be loaded
            import_module(module).add_arguments(command)
        command.add_argument("--output", type=Path, help="JSON file for the figures")
    parsed = parser.parse_args(arguments)
    try:
        figures = import_module(BENCHMARKS[parsed.benchmark][0]).run(parsed)
    except ContRecError as error:
        get_logger("benchmark").error("%s", error)
        return 1
    if parsed.output:
        from contrec_dist.benchmarks.machine import describe_machine

        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python launchers/benchmark.py", *arguments])
        write_json(parsed.output, {"command": command, "machine": describe_machine(), "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
