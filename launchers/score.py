"""Batch Top-K on a Ray cluster: what `ray job submit` starts.

    ray job submit -- python launchers/score.py --config configs/ml1m.yaml score.k=100
    RAY_ADDRESS=auto python launchers/score.py --config configs/ml1m.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contrec_dist.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
