"""`contrec repeat` end to end on the toy catalogue: a second seed by the real stages with a baseline, and a start that finds all done."""

import json
import logging
from dataclasses import replace

import pytest
from launched import copy_run, write_config

from contrec_dist.__main__ import main
from contrec_dist.manifest import MANIFEST_NAME, WRITTEN_BY, Manifest
from contrec_dist.progress import get_logger
from contrec_dist.report.evaluate import user_leads

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


def test_two_seeds_with_a_baseline_and_once_more(reference, tmp_path):
    config = copy_run(reference[0], replace(reference[0], run_dir=str(tmp_path / "run")), *WRITTEN_BY)
    config = replace(config, launch=replace(config.launch, num_ranks=1))
    before = Manifest.load(config.folder("model")).content_hash
    path = write_config(config, tmp_path / "base.yaml")
    command = ["repeat", "--config", str(path), "--seeds", "0,1", "--baselines", "text_knn"]
    assert main(["repeat", "--config", str(path), "--baselines", "nothing"]) == 1
    assert main(command) == 0

    assert Manifest.load(config.folder("model")).content_hash == before, "the run's own seed was trained again"
    other = replace(config, seed=1, run_dir=str(tmp_path / "run/seeds/1"))
    assert Manifest.load(other.folder("model")).content_hash != before
    told = json.loads((config.folder("seeds") / "seeds.json").read_text())
    assert told["seeds"] == [0, 1]
    figures = [json.loads((one.folder("report") / "metrics.json").read_text()) for one in (config, other)]
    for name, block in {"contrec": "test", "text_knn": None, "popularity": None}.items():
        values = [one[block]["hr@10"] if block else one["baselines"][name]["hr@10"] for one in figures]
        assert told["views"]["masked"][name]["hr@10"]["values"] == values
    assert told["views"]["masked"]["contrec"]["hr@10"]["std"] > 0

    leads = [user_leads(one)["text_knn"] for one in (config, other)]
    paired = told["paired"]["text_knn"]
    for key in ("hr@10", "ndcg@10"):
        values = [one["test"][key] - one["baselines"]["text_knn"][key] for one in figures]
        assert [frame[key].mean() for frame in leads] == pytest.approx(values, abs=1e-6)
        assert paired[key]["mean"] == pytest.approx(sum(values) / 2, abs=1e-6)
        assert paired[key]["low"] < paired[key]["mean"] < paired[key]["high"]
    assert list(told["paired"]) == ["text_knn"] and "- text_knn: HR@10 " in (config.folder("seeds") / "seeds.md").read_text()

    stamps = {one.run_dir: (one.folder("report") / MANIFEST_NAME).read_bytes() for one in (config, other)}
    messages, log = [], get_logger("repeat").parent
    handler = logging.Handler()
    handler.emit = lambda line: messages.append(line.getMessage())
    log.addHandler(handler)
    try:
        assert main(command) == 0
    finally:
        log.removeHandler(handler)
    assert not any(message.startswith("started") for message in messages)
    assert stamps == {one.run_dir: (one.folder("report") / MANIFEST_NAME).read_bytes() for one in (config, other)}
