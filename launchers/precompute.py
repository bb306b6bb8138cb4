"""Encode the catalogue and lay out the training samples, on this machine or on a Ray cluster.

    python launchers/precompute.py --config configs/demo.yaml ray.num_workers=2
    ray job submit --working-dir . -- python launchers/precompute.py --config configs/demo.yaml ray.num_workers=64

A submitted job joins the cluster it was submitted to; run_dir must be an absolute path that all nodes share.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a source tree as well

from contrec_dist.__main__ import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["precompute", *sys.argv[1:]]))
