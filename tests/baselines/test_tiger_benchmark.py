"""benchmarks/tiger_decoder.py: the decoder that is timed is the real one, on synthetic ids."""

import argparse

import numpy as np

from contrec_dist.benchmarks import tiger_decoder
from contrec_dist.config import ShapeConfig


def test_the_timed_decoder_recommends_items_of_a_synthetic_catalogue():
    shape = ShapeConfig(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    decoder = tiger_decoder.synthetic_decoder(20_000, shape, max_history=5, beam_width=10)
    items, scores = decoder.recommend(tiger_decoder.draw_histories(20_000, 7, 5), 10)
    assert items.shape == (7, 10) and items.min() >= 0 and items.max() < 20_000 and np.isfinite(scores).all()
    assert all(len(set(row)) == 10 for row in items)
    again = tiger_decoder.synthetic_decoder(20_000, shape, max_history=5, beam_width=10)
    assert np.array_equal(again.recommend(tiger_decoder.draw_histories(20_000, 7, 5), 10)[0], items)


def test_figures_say_what_was_timed(capsys):
    parser = argparse.ArgumentParser()
    tiger_decoder.add_arguments(parser)
    parsed = parser.parse_args("--items 500 --users 8 --history 3 --beam 4 --repeats 1 --hidden-size 16 --layers 1".split())
    figures = tiger_decoder.run(parsed)
    assert figures["items"] == 500 and figures["beam_width"] == 4 and figures["users"] == 8
    assert figures["users_per_second"] > 0 and figures["floor_users_per_second"] > 0
    assert "users/s" in capsys.readouterr().out
