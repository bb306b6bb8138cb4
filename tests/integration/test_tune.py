"""`contrec tune contrec` on the toy catalogue: trials by the real stages, which train nothing where only the scores change."""

import json
import logging
from dataclasses import replace

import pytest
from launched import copy_run, write_config

from contrec_dist.__main__ import main
from contrec_dist.manifest import WRITTEN_BY, Manifest
from contrec_dist.progress import get_logger

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def test_the_model_is_tuned_from_its_own_settings_on_validation_lists(reference, tmp_path):
    config = copy_run(reference[0], replace(reference[0], run_dir=str(tmp_path / "run")), *WRITTEN_BY)
    path, messages = write_config(config, tmp_path / "base.yaml"), []
    (tmp_path / "space.yaml").write_text("score:\n  transition_weights: [[0.5], [8.0]]\n")
    handler, log = logging.Handler(), get_logger("tune").parent
    handler.emit = lambda line: messages.append(f"{line.name} {line.getMessage()}")
    log.addHandler(handler)
    try:
        assert main(["tune", "contrec", "--trials", "2", "--space", str(tmp_path / "space.yaml"), "--config", str(path)]) == 0
    finally:
        log.removeHandler(handler)

    assert not any("contrec.train start" in message for message in messages)
    first, second = json.loads((config.folder("tuning/contrec") / "trials.json").read_text())["trials"]
    assert first["values"]["score.transition_weights"] == config.score.transition_weights != second["values"]["score.transition_weights"]
    own = json.loads((config.folder("report") / "metrics.json").read_text())["validation"]
    assert first["ndcg@10"] == pytest.approx(own["ndcg@10"], abs=1e-9) and first["hr@10"] == pytest.approx(own["hr@10"], abs=1e-9)
    for number in range(2):
        lists = Manifest.load(config.folder(f"tuning/contrec/trials/{number:03d}/recommendations"))
        assert {file.partition("/")[0] for file in lists.files if file.startswith("split=")} == {"split=validation"}
        assert not (config.folder(f"tuning/contrec/trials/{number:03d}") / "report").exists()
