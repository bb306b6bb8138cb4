"""One rank of training, as launchers/train.py, that says at its end how much memory it had at its peak.

    deepspeed measured_rank.py --observe FOLDER --config toy.yaml

The peak resident memory of the process, in bytes, is written to FOLDER/peak-rank<r>.json.
"""

import json
import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from launchers.train import main

    place = sys.argv.index("--observe")
    folder = Path(sys.argv[place + 1])
    del sys.argv[place : place + 2]
    code = main()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    (folder / f"peak-rank{os.environ['RANK']}.json").write_text(json.dumps(peak))
    sys.stdout.flush()
    os._exit(code)
