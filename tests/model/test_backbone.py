"""model/backbone.py: small families from a shape, any causal LM from a folder, adapters, the text tokenizer."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from contrec_dist.config import BackboneConfig, LoraConfig, ShapeConfig
from contrec_dist.errors import ConfigError
from contrec_dist.model.backbone import causal_lm, load_backbone, load_text_tokenizer, train_text_tokenizer

SHAPE = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "num_layers": 2}


def shaped(family="llama", **changes) -> BackboneConfig:
    return BackboneConfig(shape=ShapeConfig(family=family, **SHAPE), precision="fp32", **changes)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_both_small_families_have_the_shape_asked_for_and_run(family):
    model = load_backbone(shaped(family), vocab_size=300)
    config = model.config
    assert config.model_type == family and config.use_cache is False
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (300, 32, 2, 2)
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)


def test_heads_that_do_not_divide_the_width_are_a_named_error():
    config = BackboneConfig(shape=ShapeConfig(**{**SHAPE, "num_heads": 3}))
    with pytest.raises(ConfigError, match="backbone.shape.hidden_size.*32.*num_heads=3"):
        load_backbone(config, vocab_size=300)


def test_adapters_without_a_named_base_are_a_named_error():
    """The base would be random, frozen, and lost: only the adapter is exported."""
    with pytest.raises(ConfigError, match="backbone.lora.rank.*backbone.path"):
        load_backbone(shaped(lora=LoraConfig(rank=4)), vocab_size=300)


@pytest.fixture
def saved_llama(tmp_path):
    """Folder of a tiny Llama."""
    load_backbone(shaped(), vocab_size=300).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_a_folder_gives_back_the_weights_that_were_saved(saved_llama):
    torch.manual_seed(1)
    first, again = (load_backbone(BackboneConfig(path=saved_llama), vocab_size=0) for _ in range(2))
    for (name, one), (_, other) in zip(first.named_parameters(), again.named_parameters()):
        assert torch.equal(one, other), name


def test_adapters_freeze_the_base_and_start_as_no_change(saved_llama):
    config = BackboneConfig(path=saved_llama, lora=LoraConfig(rank=4, target_modules=["q_proj", "down_proj"]))
    base, adapted = load_backbone(BackboneConfig(path=saved_llama), vocab_size=0), load_backbone(config, vocab_size=0)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * 2 * 2 and all("lora_" in name for name in trainable)
    assert {parameter.dtype for parameter in adapted.parameters()} == {torch.float32}
    tokens = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(adapted.eval()(input_ids=tokens).logits, base.eval()(input_ids=tokens).logits)
    assert type(causal_lm(adapted)) is type(causal_lm(base))


def test_adapter_names_that_no_layer_has_are_a_named_error(saved_llama):
    config = BackboneConfig(path=saved_llama, lora=LoraConfig(rank=4, target_modules=["no_such_layer"]))
    with pytest.raises(ConfigError, match="backbone.lora.target_modules.*no_such_layer.*q_proj"):
        load_backbone(config, vocab_size=0)


def test_a_backbone_that_names_its_parts_differently_is_read_too(tmp_path, make_world):
    """GPT-2 calls its decoder `transformer`."""
    world = make_world([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]], response_drop=0.0)
    gpt2 = GPT2Config(vocab_size=len(world.tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    world.config.backbone = BackboneConfig(path=str(tmp_path / "gpt2"), precision="fp32")
    model, rows = world.build_model(), world.rows
    plan = rows.plan(0)
    batch = rows.build(plan, range(len(plan.rows)), len(plan.rows))
    assert all(torch.isfinite(value) for value in model(batch, 0).values())


def test_any_text_survives_the_text_tokenizer_and_its_end_token_is_special():
    tokenizer = train_text_tokenizer(["Rose Nail Polish", "Lamp"], vocab_size=300)
    text = "Crème brûlée 香水 😀\n\t Nail"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300 and tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_the_text_tokenizer_is_a_function_of_the_texts(tmp_path):
    texts = [f"thing number {n} of {n % 7}" for n in range(50)]
    for name in "ab":
        train_text_tokenizer(texts, vocab_size=320).save_pretrained(tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    loaded = load_text_tokenizer(tmp_path / "a")
    assert loaded("thing")["input_ids"] == train_text_tokenizer(texts, vocab_size=320)("thing")["input_ids"]


def test_a_vocabulary_below_the_bytes_is_a_named_error():
    with pytest.raises(ConfigError, match="backbone.shape.vocab_size.*256"):
        train_text_tokenizer(["a"], vocab_size=256)


def test_hidden_dropout_drops_both_branches_while_training_alone():
    config = BackboneConfig(shape=ShapeConfig(hidden_size=16, num_heads=2, intermediate_size=32, hidden_dropout=0.5))
    torch.manual_seed(0)
    model = load_backbone(config, vocab_size=300)
    dropped: dict[str, float] = {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # hooks run in order: this one sees what is added to the stream
        module = model.base_model.layers[1].get_submodule(name)
        module.register_forward_hook(lambda _, __, out, name=name: dropped.update({name: float((out == 0).float().mean())}))
    tokens = torch.arange(1, 65)[None]  # 0 is padding, whose embedding is zero
    model.train()(input_ids=tokens)
    assert all(0.4 < share < 0.6 for share in dropped.values()) and len(dropped) == 2
    first, again = (model.eval()(input_ids=tokens).logits for _ in range(2))
    assert torch.equal(first, again) and set(dropped.values()) == {0.0}
