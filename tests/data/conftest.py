"""CSV sources made inside a test."""

import pytest

from contrec_dist.config import Config
from contrec_dist.data.interactions import clean_logs
from contrec_dist.data.sources import read_source

HEADER = "user_id,item_id,timestamp"


@pytest.fixture
def make_csv_config(tmp_path):
    """make(rows, ...) -> a config of kind 'table' over tmp_path/interactions.csv; no k-core unless asked.

    `items` writes items.csv too: an id a line, or a whole row of item_id,title,category,brand,text.
    """

    def make(rows, header=HEADER, items=None, **source):
        (tmp_path / "interactions.csv").write_text("\n".join([header, *rows]) + "\n")
        if items is not None:
            lines = [item if "," in item else f"{item},title of {item},,," for item in items]
            (tmp_path / "items.csv").write_text("\n".join(["item_id,title,category,brand,text", *lines]) + "\n")
        config = Config(name="test", run_dir=str(tmp_path / "run"))
        files = {"interactions_file": "interactions.csv", "items_file": "" if items is None else "items.csv"}
        values = {"path": str(tmp_path), "min_user_interactions": 1, "min_item_interactions": 1, **files, **source}
        for name, value in values.items():
            setattr(config.source, name, value)
        return config

    return make


@pytest.fixture
def clean_csv(make_csv_config):
    """clean(rows, ...) -> the clean logs of such a source."""

    def clean(*args, **kwargs):
        config = make_csv_config(*args, **kwargs)
        return clean_logs(read_source(config), config.source)

    return clean
