"""report/seeds.py: mean, spread and lead by hand, and what the table says."""

import json

import polars as pl
import pytest

from contrec_dist.commands.repeat import config_of, read_seeds
from contrec_dist.config import load_config
from contrec_dist.errors import ArtifactError, ConfigError
from contrec_dist.report import seeds
from contrec_dist.report.seeds import pair_users, read_metrics, summarize_seeds, write_summary


def metrics_of(own: float, tiger: float, **more) -> dict:
    """metrics.json of one seed, of the figures that matter."""
    block = {"hr@10": own, "ndcg@10": own / 2}
    others = {"tiger": {"hr@10": tiger, "ndcg@10": tiger / 2}, **more}
    return {"test": block, "test_unmasked": {key: value / 2 for key, value in block.items()}, "baselines": others, "baselines_unmasked": others}


def test_mean_spread_and_lead_by_hand():
    """Leads are taken seed by seed: .2 / .1 - 1 = 1 and .4 / .1 - 1 = 3; their sample deviation is sqrt(2)."""
    summary = summarize_seeds({7: metrics_of(0.4, 0.1), 3: metrics_of(0.2, 0.1)})
    assert summary["seeds"] == [3, 7]
    own = summary["views"]["masked"]["contrec"]["hr@10"]
    assert own["values"] == [0.2, 0.4] and own["mean"] == pytest.approx(0.3) and own["std"] == pytest.approx(0.02**0.5)
    assert summary["views"]["kept"]["contrec"]["ndcg@10"]["mean"] == pytest.approx(0.075)
    lead = summary["lead"]["masked"]["tiger"]["hr@10"]
    assert lead["values"] == pytest.approx([1, 3]) and lead["std"] == pytest.approx(2**0.5)


def test_what_one_seed_lacks_is_left_out_and_nothing_is_divided_by_zero():
    summary = summarize_seeds({0: metrics_of(0.4, 0.0, sasrec={"hr@10": 0.1, "ndcg@10": 0.1}), 1: metrics_of(0.2, 0.1)})
    assert set(summary["views"]["masked"]) == {"contrec", "tiger"} and summary["lead"]["masked"]["tiger"] == {}


def test_one_seed_has_no_spread(tmp_path):
    summary = summarize_seeds({0: metrics_of(0.4, 0.1)})
    assert summary["views"]["masked"]["tiger"]["hr@10"]["std"] is None
    write_summary(summary, tmp_path / "seeds", "toy: 1 seeds")
    text = (tmp_path / "seeds/seeds.md").read_text()
    assert "| contrec | 0.4000 | 0.2000 | 0.2000 | 0.1000 | – | – |" in text and "| +300.0% |" in text and "±" not in text.split("\n\n")[1]
    assert json.loads((tmp_path / "seeds/seeds.json").read_text())["title"] == "toy: 1 seeds"


def test_the_table_shows_mean_and_deviation(tmp_path):
    write_summary(summarize_seeds({0: metrics_of(0.4, 0.1), 1: metrics_of(0.2, 0.1)}), tmp_path, "toy")
    text = (tmp_path / "seeds.md").read_text()
    assert "| 0.3000 ± 0.1414 |" in text and "| +200.0% ± 141.4% |" in text and "seeds 0, 1" in text


def frame_of(first: str, *hits: float) -> pl.DataFrame:
    return pl.DataFrame({"user_id": [first, *"bcdefghij"[: len(hits) - 1]], "hr@10": hits, "ndcg@10": [hit / 2 for hit in hits]})


def test_a_users_lead_is_its_mean_over_seeds(monkeypatch):
    """Leads (1, 0) and (-1, 0) of two users and seeds cancel for every user; (1, 1) and (0, 0) leave .5 to both."""
    config = load_config([], ["name=toy", "run_dir=runs/toy"])
    leads = {
        "none": [frame_of("a", 1.0, 0.0), frame_of("a", -1.0, 0.0)], "some": [frame_of("a", 1.0, 1.0), frame_of("a", 0.0, 0.0)],
        "one": [frame_of("a", 1.0, 1.0)],
    }  # fmt: skip
    by_seed = [{name: frames[seed] for name, frames in leads.items() if seed < len(frames)} for seed in (0, 1)]
    told = iter(by_seed)
    monkeypatch.setattr(seeds, "user_leads", lambda _: next(told))
    paired = pair_users({0: config, 1: config})
    assert paired["none"]["hr@10"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert paired["some"]["hr@10"] == {"mean": 0.5, "low": 0.5, "high": 0.5} and paired["some"]["ndcg@10"]["mean"] == 0.25
    assert set(paired) == {"none", "some"}
    leads["none"][1] = frame_of("z", -1.0, 0.0)
    told = iter([{"none": leads["none"][0]}, {"none": leads["none"][1]}])
    with pytest.raises(ArtifactError, match="other test users"):
        pair_users({0: config, 1: config})


@pytest.mark.parametrize("text", ["", "0,0", "a", "-1", "0,,1", "0;1"])
def test_wrong_seeds_are_refused(text):
    with pytest.raises(ConfigError, match="--seeds"):
        read_seeds(text)


def test_the_runs_own_seed_is_the_run_itself():
    config = load_config([], ["name=toy", "run_dir=runs/toy", "seed=2"])
    assert config_of(config, 2) is config
    other = config_of(config, 0)
    assert (other.seed, other.run_dir) == (0, "runs/toy/seeds/0") and other.train == config.train


def test_a_seed_without_figures_is_named(tmp_path):
    config = load_config([], ["name=toy", f"run_dir={tmp_path}"])
    with pytest.raises(ArtifactError, match="metrics.json"):
        read_metrics({0: config})
