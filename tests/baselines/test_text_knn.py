"""baselines/text_knn.py: nearest texts, those of items without interactions too."""

import numpy as np
import pytest

from contrec_dist.baselines.stage import run_baseline
from contrec_dist.baselines.text_knn import TextKnn, fit
from contrec_dist.config import TextKnnConfig
from contrec_dist.errors import ConfigError


def test_lists_are_those_of_a_loop_over_the_formula():
    draw = np.random.default_rng(0)
    text = draw.normal(size=(30, 5)).astype(np.float32)
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    histories = [draw.integers(0, 30, length) for length in (1, 2, 7)] + [np.array([], dtype=np.int64)]
    items, scores = TextKnn(7 * text, TextKnnConfig(num_recent=3, recency_decay=0.5)).recommend(histories, 4, np.arange(4))
    for history, row, found in zip(histories[:3], items, scores):
        query = sum(unit[item] / (age + 1) ** 0.5 for age, item in enumerate(list(history)[::-1][:3]))
        order = np.argsort(-(unit @ query), kind="stable")[:4]
        assert row.tolist() == order.tolist()
        np.testing.assert_allclose(found, (unit @ query)[order], rtol=1e-5)
    assert items.shape == (4, 4) and np.isfinite(scores).all()


def test_it_is_a_stage_and_needs_text(toy_runs, tmp_path):
    make_config, make_run = toy_runs
    manifest = run_baseline(make_run(tmp_path), "text_knn")
    assert manifest.facts["validation"]["masked"]["hr@10"] >= 0 and "embeddings" in manifest.inputs
    with pytest.raises(ConfigError, match="num_recent"):
        TextKnnConfig(num_recent=0)
