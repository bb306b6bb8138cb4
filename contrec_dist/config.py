"""Every structured config of the project, and load_config.

One dataclass a component; each field is followed by its meaning and unit. The resolved config of a stage is part of
that stage's identity (see manifest.py): change a value and the stages that read it run again. The sections `launch`
and `ray` say only HOW a stage is executed, `shards` where its data lies, `monitor` what people watch meanwhile; none
changes what is computed, and they are left out of every identity.

Order of precedence: dataclass defaults < YAML files < key=value arguments.
"""

import copy
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, Optional, Sequence

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from contrec_dist.errors import ConfigError

TRACKER_NAMES = ("tensorboard", "wandb", "mlflow")

NO_IDENTITY = {"identity": False}
"metadata of a field that says only how its section is executed: it is left out of every identity, as `launch` and `ray` are"
IDENTITY_IF_SET = {"identity": "if set"}
"metadata of a switch that joined its section later: at its default it is left out of identities, so that finished runs stay so"


@dataclass(kw_only=True, slots=True)
class GeneratedConfig:
    """The built-in catalogue whose next item depends on the history in a way that can be learned."""

    num_items: int = 2000
    "items of the catalogue"
    num_users: int = 4000
    "users"
    num_categories: int = 20
    "categories; every item has one, and a brand inside it"
    mean_history: float = 12.0
    "mean interactions a user"
    min_history: int = 6
    "fewest interactions a user"
    popularity_exponent: float = 1.0
    "Zipf exponent of item popularity inside a category"
    category_stickiness: float = 0.6
    "probability that the next item follows a learned transition of the last item rather than a fresh draw"


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where the raw logs lie and how they are read."""

    kind: Literal["table", "movielens", "amazon", "hetrec_lastfm", "generated"] = "table"
    "format; 'table' is any CSV / Parquet / JSONL (gz too) with named columns"
    name: str = ""
    "name of the data set in reports; empty: the run's name"
    path: str = ""
    "folder that holds the files below (unused by 'generated')"
    interactions_file: str = "interactions.csv.gz"
    "file of interactions, relative to path (kind table and amazon); kind table: or a folder of Parquet files"
    items_file: str = "items.csv.gz"
    "file of items, relative to path; empty: no item file, every item is titled by its id"
    user_column: str = "user_id"
    "column of the user (kind table)"
    item_column: str = "item_id"
    "column of the item, in both files (kind table)"
    timestamp_column: str = "timestamp"
    "column of the time: unix seconds, milliseconds, or ISO text; empty: none"
    order_column: str = ""
    "column of the place in the user's own order; where named, it decides the order instead of the time"
    rating_column: str = ""
    "column of the rating; empty: none"
    title_column: str = "title"
    "column of the item's title"
    category_column: str = "category"
    "column of the item's category; empty: none"
    brand_column: str = "brand"
    "column of the item's brand; empty: none"
    text_column: str = "text"
    "column of further item text; empty: none"
    min_rating: Optional[float] = None
    "interactions rated below are left out (counted); null: keep all"
    min_user_interactions: int = 5
    "k-core: users with fewer interactions are left out, iterated with the next"
    min_item_interactions: int = 5
    "k-core: items with fewer interactions are left out"
    keep_unseen_items: bool = False
    "keep items of the item file that nobody interacted with (cold start)"
    deduplicate: Literal["none", "exact", "first"] = "exact"
    "'exact' drops repeats of (user, item, time); 'first' keeps a user's first interaction with an item"
    max_bad_ratio: float = 0.01
    "share of wrong rows above which the stage fails"
    generated: GeneratedConfig = field(default_factory=GeneratedConfig)
    "settings of kind 'generated'"


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """How histories are cut into training, validation and test."""

    kind: Literal["leave_one_out", "time"] = "leave_one_out"
    "last item = test, second last = validation; or two global cuts in time"
    validation_ratio: float = 0.1
    "kind time: share of interactions between the two cuts"
    test_ratio: float = 0.1
    "kind time: share of interactions after the second cut"
    cold_items: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "share of the items, drawn by the seed, that are held out of training altogether and remain as targets"

    def __post_init__(self):
        if not 0 <= self.cold_items < 1:
            raise ConfigError("split.cold_items", self.cold_items, "a share from 0 up to below 1")


@dataclass(kw_only=True, slots=True)
class EmbedConfig:
    """Item and user embeddings: collaborative (training edges only) joined with text."""

    collaborative: Literal["lightgcn", "sequential", "sasrec", "none"] = "lightgcn"
    "'lightgcn': who met what; 'sequential': what stands near what in a history, factorised (embeddings/sequential.py); "
    "'sasrec': the item vectors of a SASRec that is trained first, section sasrec (embeddings/distilled.py)"
    sasrec_text: bool = field(default=True, metadata=IDENTITY_IF_SET)
    "collaborative sasrec: whether that SASRec reads the items' text too, as the baseline sasrec_text; false: item ids alone, as sasrec"
    collaborative_dim: int = 64
    "width of the collaborative embedding (sasrec: sasrec.hidden_size)"
    sequential_window: int = field(default=5, metadata=IDENTITY_IF_SET)
    "places of a history that two items may be apart to count as near (collaborative: sequential)"
    num_layers: int = 2
    "LightGCN propagation layers"
    num_epochs: int = 20
    "LightGCN epochs"
    batch_edges: int = 8192
    "LightGCN edges a step, fewest"
    max_steps_per_epoch: int = 20
    "LightGCN steps an epoch, most: every step propagates the whole graph, so large graphs take larger batches"
    learning_rate: float = 5e-3
    "LightGCN Adam learning rate"
    weight_decay: float = 1e-4
    "LightGCN L2 weight on the embeddings of a batch"
    text_model: str = ""
    "sentence-transformers folder or hub name; empty: hashed character and word n-grams, then SVD"
    text_dim: int = 128
    "width of the n-gram SVD; a sentence-transformers model keeps its own. 0: no text at all, with either"
    num_hash_features: int = 65536
    "hash buckets of the n-grams"
    batch_texts: int = 256
    "texts a batch"

    def __post_init__(self):
        if self.text_dim < 0:
            raise ConfigError("embed.text_dim", self.text_dim, "at least 1, or 0 for no text")
        if self.sequential_window < 1:
            raise ConfigError("embed.sequential_window", self.sequential_window, "at least 1")


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """The sigma-VAE: embeddings to K continuous tokens."""

    kind: Literal["sigma_vae", "vq", "rq"] = field(default="sigma_vae", metadata=IDENTITY_IF_SET)
    "'sigma_vae': continuous tokens; 'vq', 'rq': each is replaced by its code, of one book or of residual levels (codebooks.py)"
    num_item_tokens: int = 2
    "K: continuous tokens an item"
    latent_dim: int = 32
    "Z: width of one token"
    hidden_dim: int = 256
    "width of the encoders' and the decoder's hidden layer"
    whiten: bool = True
    "whiten the embeddings in front of the encoders"
    whiten_floor: float = 1.0
    "variances below this share of the mean variance are not raised to 1 by the whitening"
    decode_from: Literal["mean", "concat"] = "concat"
    "what the decoder sees: the mean of the K tokens, or all of them side by side"
    mask_ratio: float = 0.1
    "share of input dimensions masked anew for every sample (0: off)"
    collaborative_drop: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "share of samples that the encoders see without their collaborative part, as they see new items (0: off)"
    sigma: float = 0.1
    "C_sigma: E|s| of the latent noise, in units of the latent (0: off)"
    kl_weight: float = 1e-2
    "weight of mean mu^2, the KL of a fixed-variance Gaussian"
    decorrelation_weight: float = 5e-3
    "weight of the Barlow-Twins term between the K encoders (0: off)"
    num_steps: int = 2000
    "optimizer steps"
    batch_rows: int = 512
    "embeddings a step"
    learning_rate: float = 1e-3
    "AdamW peak learning rate, cosine to 0"
    probe_rows: int = 2000
    "rows on which the probes are measured"
    num_codes: int = field(default=256, metadata=IDENTITY_IF_SET)
    "codes a book (kind vq, rq), at most one a training row"
    num_levels: int = field(default=3, metadata=IDENTITY_IF_SET)
    "residual levels, books a token (kind rq)"


@dataclass(kw_only=True, slots=True)
class PrecomputeConfig:
    """Layout of the token shards."""

    users_per_shard: int = 2048
    "samples a WebDataset shard: fixes which user lies in which shard"
    items_per_part: int = 65536
    "items a Ray task encodes"
    batch_rows: int = 4096
    "rows an encoder call"


@dataclass(kw_only=True, slots=True)
class PromptConfig:
    """What the LLM reads of a user."""

    max_history: int = 50
    "items of a history, newest kept"
    instruction: str = "Recommend the next item."
    "text in front of every history"
    item_layout: Literal["marked", "fused"] = field(default="marked", metadata=IDENTITY_IF_SET)
    "'marked': `<item>` and K tokens an item, which is generated at its `<item>`; 'fused': one position an item, at which the next "
    "one is generated"
    titled_items: int = 0
    "newest items of a history whose title is written out after their continuous tokens (-1: all)"
    max_title_tokens: int = 12
    "title tokens, longer titles are cut"
    max_response_tokens: int = 24
    "tokens of the reasoning text, trained and generated"
    response_drop: float = 0.5
    "probability that a training sample has no reasoning text"
    user_tokens: bool = False
    "put the user's own continuous tokens in front; they saw every training edge, so training targets leak into them"

    def __post_init__(self):
        if self.item_layout == "fused" and not self.instruction:
            raise ConfigError("prompt.instruction", "''", "a text where prompt.item_layout is fused: no history may be empty")


@dataclass(kw_only=True, slots=True)
class ShapeConfig:
    """A small backbone trained from scratch."""

    family: Literal["llama", "qwen2"] = "llama"
    "architecture"
    hidden_size: int = 128
    "D"
    num_layers: int = 2
    "transformer layers"
    num_heads: int = 4
    "attention heads"
    intermediate_size: int = 384
    "width of the MLP"
    vocab_size: int = 4096
    "entries of the byte-level BPE tokenizer trained on the titles"
    attention_dropout: float = 0.0
    "dropout on attention weights"
    hidden_dropout: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "dropout on what attention and MLP add to the residual stream"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters on the backbone."""

    rank: int = 0
    "r; 0 trains the whole backbone"
    alpha: int = 32
    "scale numerator"
    dropout: float = 0.05
    "dropout in front of the adapter"
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    )
    "names of the linear layers that are adapted"


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """The LLM."""

    path: str = ""
    "folder or hub name that transformers loads; empty: a small one from `shape`, from scratch"
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    "the small one"
    lora: LoraConfig = field(default_factory=LoraConfig)
    "adapters"
    attention: Literal["auto", "packed", "sdpa", "eager"] = "auto"
    "attention kernel: 'packed' works sample by sample (best on CPUs), 'sdpa' and 'eager' over whole rows with a mask; "
    "auto: packed on CPUs, sdpa on GPUs"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "dtype of matrix products; weights, losses and sampler stay fp32. auto: bf16 where hardware has it"
    activation_checkpointing: bool = False
    "recompute the backbone's activations in the backward pass"


@dataclass(kw_only=True, slots=True)
class HeadConfig:
    """The diffusion head and the item vectors."""

    kind: Literal["denoiser", "bayes"] = "denoiser"
    "'denoiser' learns to remove noise (the paper's head); 'bayes' computes it in closed form from the ranking and the latents"
    width: int = 128
    "width of the denoiser"
    num_blocks: int = 2
    "adaLN blocks"
    num_train_steps: int = 1000
    "T of the training schedule"
    schedule: Literal["cosine", "linear"] = "cosine"
    "noise schedule"
    prediction: Literal["x0", "v", "eps"] = "x0"
    "what the denoiser's output stands for"
    batch_mul: int = 4
    "noise draws a condition"
    max_targets: int = 256
    "conditions of a micro-batch that the diffusion loss sees, drawn at random (0: all)"
    condition_drop: float = 0.1
    "probability that a condition is replaced by the learned null one"
    ema_decay: float = 0.999
    "decay of the head's moving average a step (warmed up); 0: off"
    query_dim: int = 128
    "Q: width of the item vectors that the one-step prediction is compared with"
    latents: Literal["frozen", "trained"] = field(default="frozen", metadata=IDENTITY_IF_SET)
    "'frozen': the tokenizer's, as precomputed; 'trained': end to end, every item's are turned by the gradients of what reads them, the "
    "denoising loss left out, which would draw them together"
    item_residual: bool = True
    "a learned vector an item beside the projection of its latents; zero for items that training does not see"
    residual_drop: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "share of items that are described as new ones at a training step: without their residual, without what training turned their "
    "latents by, and by what the tokenizer makes of them without their collaborative part"
    new_item_bias: Literal["expected", "lowest"] = field(default="expected", metadata=IDENTITY_IF_SET)
    "bias of items that training does not see: what the softmax expects of an item of unknown residual and bias, or the "
    "lowest of all, which keeps them out of most lists"
    dropout: float = 0.2
    "dropout on item vectors that enter the LLM, and on the query"


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """Weights of L = lm L_lm + diffusion L_diffusion + dispersive L_dispersive + negative L_negative."""

    lm: float = 0.1
    "weight of the language-model loss on the reasoning text"
    diffusion: float = 1.0
    "weight of the denoising loss"
    dispersive: float = 0.05
    "weight of the dispersive loss"
    dispersive_tau: float = 0.5
    "temperature of the dispersive loss"
    negative: float = 1.0
    "weight of the cross-entropy of the one-step prediction against the catalogue"
    num_negatives: int = 0
    "items sampled a micro-batch for that cross-entropy (log-probability corrected); 0: the full catalogue"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training run."""

    num_epochs: int = 10
    "passes over the training samples"
    targets: Literal["all", "last"] = field(default="all", metadata=IDENTITY_IF_SET)
    "what is a target of a sample: every item after the first, or the last one alone"
    max_steps: int = 0
    "stop after so many optimizer steps; 0: num_epochs decides"
    row_tokens: int = 256
    "positions of a packed row"
    global_batch_rows: int = 32
    "packed rows an optimizer step, over all ranks"
    micro_batch_rows: int = 8
    "packed rows a forward pass; global_batch_rows / (micro_batch_rows * ranks) is the gradient accumulation"
    learning_rate: float = 1e-3
    "AdamW peak learning rate"
    weight_decay: float = 0.05
    "AdamW weight decay on matrices"
    warmup_ratio: float = 0.05
    "share of steps of linear warm-up, then cosine to 0"
    clip_norm: float = 1.0
    "gradient norm limit"
    shuffle_shards: int = 8
    "shards of a shuffle window: samples mix inside a window, windows are permuted every epoch"
    checkpoint_every_steps: int = 500
    "optimizer steps between checkpoints"
    keep_last_n: int = 2
    "checkpoints kept"
    log_every_steps: int = 20
    "optimizer steps between lines of metrics.jsonl"
    max_bad_steps: int = 10
    "steps with a non-finite loss that are skipped before the run stops"

    def __post_init__(self):
        if self.keep_last_n < 1:
            raise ConfigError("train.keep_last_n", self.keep_last_n, "at least 1")


@dataclass(kw_only=True, slots=True)
class ZeroConfig:
    """DeepSpeed partitioning."""

    stage: Literal[0, 1, 2, 3] = 3
    "ZeRO stage"
    persistence_threshold: int = 100000
    "stage 3: parameters with fewer elements stay whole on every rank"
    bucket_elements: int = 50000000
    "stage 3: elements of a reduce or prefetch bucket"
    offload_optimizer: bool = False
    "keep optimizer state in host memory (GPU runs)"


@dataclass(kw_only=True, slots=True)
class IndexConfig:
    """The sharded FAISS index."""

    spaces: list[str] = field(default_factory=lambda: ["query", "latent"])
    "what is indexed: 'query' (item vectors, inner product), 'latent' (continuous tokens, L2)"
    factory: str = "auto"
    "faiss index_factory string; auto: chosen by size"
    num_shards: int = 1
    "item ranges"
    train_rows: int = 262144
    "rows that a trained index learns its centroids from"
    min_recall: float = 0.95
    "lowest recall@10 against exact search on a sample; below, the stage fails"
    recall_queries: int = 200
    "queries of that sample"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    "auto: GPU when faiss-gpu is importable and a GPU is there"
    memory_bytes: int = field(default=0, metadata=NO_IDENTITY)
    "most bytes that a space's open index may take: 'auto' chooses a smaller factory; 0: no limit"
    memory_map: bool = field(default=False, metadata=NO_IDENTITY)
    "search the files where they lie: vectors are read when a query asks for them, and processes share them"
    search: Literal["threads", "ray"] = field(default="threads", metadata=NO_IDENTITY)
    "one process holds all shards, or Ray actors, spread over the machines, hold a range of them each"
    ray_actors: int = field(default=0, metadata=NO_IDENTITY)
    "actors of search=ray; 0: one a machine, and no more than shards"
    max_tombstone_ratio: float = field(default=0.2, metadata=NO_IDENTITY)
    "share of removed rows above which `contrec index compact` writes a segment again without them"
    kept_versions: int = field(default=4, metadata=NO_IDENTITY)
    "newest versions of the living index whose files are kept, for jobs that began with them; at least 2"


@dataclass(kw_only=True, slots=True)
class ScoreConfig:
    """Batch Top-K."""

    k: int = 50
    "items a user"
    splits: list[str] = field(default_factory=lambda: ["validation", "test"])
    "histories to score: before the 'validation' item, before the 'test' item, or 'next': everything seen so far"
    rank_by: Literal["query", "samples", "likelihood"] = "query"
    "search with the one-step prediction from pure noise; fuse the neighbours of sampled latents; or re-rank what the "
    "search found by the model's own log p(item | history)"
    likelihood_levels: int = 8
    "noise levels at which the likelihood is evaluated (rank_by likelihood)"
    likelihood_draws: int = 1
    "noise draws a level (rank_by likelihood)"
    num_samples: int = 8
    "S, samples a user (rank_by samples)"
    num_sampling_steps: int = 10
    "solver steps (rank_by samples)"
    solver: Literal["ddpm", "dpm", "ddim"] = "ddpm"
    "ancestral DDPM, whose fresh noise ranks best in few steps too; DPM-Solver++(2M); DDIM"
    guidance: float = 1.0
    "classifier-free guidance w: x0 = (1 + w) x0(h) - w x0(null)"
    guidance_min_sigma: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "noise below which samples are no longer guided, at half the cost of a step; 0: guided at every step"
    guidance_max_sigma: float = field(default=1.0, metadata=IDENTITY_IF_SET)
    "noise above which samples are not yet guided; below 1, for example 0.999, it spares the step from pure noise"
    step_spacing: float = field(default=1.0, metadata=IDENTITY_IF_SET)
    "p of the noise steps T (1 - (i / n)^p): 1 is even; above 1 there are more where the noise is high and an item is chosen"
    posterior_items: int = 512
    "most likely items over which the closed form of head.kind 'bayes' sums (rank_by samples)"
    reasoning: Literal["generate", "aside", "none"] = "generate"
    "let the LLM write its reasoning text first and rank by what it knows then, write it aside and rank without it, or skip it"
    text_weights: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 1.0, 2.0])
    "candidates for pi, the weight of the text similarity; the best on validation users is taken"
    transition_weights: list[float] = field(default_factory=lambda: [0.0], metadata=IDENTITY_IF_SET)
    "candidates for rho, the weight of what followed a user's newest items in training histories (section item_knn); the best "
    "with pi is taken"
    new_item_bonuses: list[float] = field(default_factory=lambda: [0.0], metadata=IDENTITY_IF_SET)
    "candidates for what is added to the score of items that training did not see; of those that cost no more than "
    "new_item_cost the largest is taken, by the weights chosen at the smallest"
    new_item_cost: float = field(default=0.005, metadata=IDENTITY_IF_SET)
    "share of the best NDCG@10 on validation users that the bonus may cost"
    num_candidates: int = 100
    "candidates a user that texts, transitions and the bonus re-rank"
    users_per_part: int = 4096
    "users a part file: fixes which user lies in which part"
    batch_users: int = 128
    "users a forward pass; 64 to 256 keep a small model's activations in a core's cache"
    filter_seen: bool = True
    "leave out what a user has met; of split 'next' alone, since 'validation' and 'test' are written both ways"
    users_file: str = ""
    "score these users alone: CSV, Parquet or JSONL with a column user_id, all of the catalogue"
    histories_file: str = ""
    "score these users, whom training need not know: user_id and item_ids (a list), or user_id and item_id, a row an "
    "interaction in order; always split 'next'"
    output: str = ""
    "folder for the lists; empty: recommendations/ in the run's folder, recommendations-<name> for a file of users"

    def __post_init__(self):
        for name in ("text_weights", "transition_weights", "new_item_bonuses"):
            values = getattr(self, name)
            if not values or not all(map(math.isfinite, values)):
                raise ConfigError(f"score.{name}", values, "one or more finite numbers")
        if not 0 <= self.new_item_cost < 1:
            raise ConfigError("score.new_item_cost", self.new_item_cost, "a share from 0 up to below 1")


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Metrics and report."""

    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    "cut-offs"
    num_popularity_buckets: int = 10
    "buckets of items with equal shares of training interactions"
    sampler_users: int = 500
    "validation users of the plot HR against sampler steps (0: no plot)"
    sampler_steps: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20, 50])
    "sampler steps of that plot"
    baselines: list[str] = field(default_factory=lambda: ["popularity"])
    "baselines that must be there; those that `contrec baseline` finished are taken in anyway (the generated catalogue adds "
    "'oracle')"


@dataclass(kw_only=True, slots=True)
class TigerConfig:
    """The baseline TIGER: semantic ids by an RQ-VAE, a causal LM over them, beam search. Read by that baseline alone."""

    num_epochs: Optional[int] = None
    "passes over the training samples; null: train.num_epochs, what the model gets"
    learning_rate: float = 2e-3
    "AdamW peak learning rate of the sequence model"
    dropout: float = 0.1
    "dropout on token embeddings that enter the backbone, and on its output"
    weight_decay: float = 0.05
    "AdamW weight decay on matrices"
    warmup_ratio: float = 0.05
    "share of steps of linear warm-up, then cosine to 0"
    clip_norm: float = 1.0
    "gradient norm limit"
    batch_tokens: int = 4096
    "positions of an optimizer step"
    row_tokens: int = 256
    "positions of a packed row; longer where one history needs it"
    shape: Optional[ShapeConfig] = None
    "its backbone; null: backbone.shape, what the model has"
    user_buckets: int = 0
    "hash buckets of a user token in front of the history (2000 in the paper); 0: none"
    beam_width: int = 50
    "beams of a search; more where more items are asked for"
    batch_users: int = 128
    "users a beam search"
    embedding: Literal["text", "all"] = "text"
    "what is quantised: the text part of the item embeddings, or the collaborative part too"
    num_levels: int = 3
    "code books; one more level tells items of equal codes apart"
    num_codes: int = 256
    "codes a book, at most one an item"
    latent_dim: int = 32
    "width of the quantised latent"
    hidden_dims: list[int] = field(default_factory=lambda: [512, 256, 128])
    "hidden layers of the RQ-VAE's encoder; the decoder mirrors them"
    commitment_weight: float = 0.25
    "weight of the commitment loss"
    rqvae_steps: int = 2000
    "optimizer steps of the RQ-VAE"
    rqvae_batch_rows: int = 1024
    "embeddings a step"
    rqvae_learning_rate: float = 1e-3
    "AdamW peak learning rate of the RQ-VAE, cosine to 0"


@dataclass(kw_only=True, slots=True)
class ItemKnnConfig:
    """The baseline item_knn: what followed the items met last (formula: baselines/item_knn.py); score.transition_weights use it too."""

    window: int = 50
    "places between two items of a history, most, that make them a pair"
    gap_decay: float = 0.5
    "a pair g places apart counts 1 / g ** gap_decay"
    backward_weight: float = 0.25
    "weight of a pair taken against its order: 0 what came after alone, 1 before and after alike"
    num_recent: int = 10
    "newest items of a history that are looked up"
    recency_decay: float = 1.3
    "the a-th newest item counts 1 / a ** recency_decay"
    source_power: float = 0.25
    "exponent of the looked-up item's popularity in the divisor"
    target_power: float = 0.25
    "exponent of the scored item's popularity in the divisor (both 0.5: cosine)"
    shrinkage: float = 1.0
    "added to the divisor, against pairs of rare items"
    neighbours: int = 0
    "largest similarities that an item keeps; 0: all"

    def __post_init__(self):
        for name in ("window", "num_recent"):
            if getattr(self, name) < 1:
                raise ConfigError(f"item_knn.{name}", getattr(self, name), "at least 1")
        for name in ("backward_weight", "shrinkage", "neighbours"):
            if getattr(self, name) < 0:
                raise ConfigError(f"item_knn.{name}", getattr(self, name), "0 or more")


@dataclass(kw_only=True, slots=True)
class TextKnnConfig:
    """The baseline text_knn: nearest texts (baselines/text_knn.py has the formula). Read by it alone."""

    num_recent: int = 5
    "newest items of a history that count"
    recency_decay: float = 1.0
    "the a-th newest item counts 1 / a ** recency_decay"

    def __post_init__(self):
        if self.num_recent < 1:
            raise ConfigError("text_knn.num_recent", self.num_recent, "at least 1")


@dataclass(kw_only=True, slots=True)
class SasRecConfig:
    """The baselines sasrec and sasrec_text: a causal transformer over item vectors. Read by them alone."""

    num_epochs: int = 40
    "passes over the training targets, most: it stops when validation no longer improves"
    learning_rate: float = 2e-3
    "AdamW peak learning rate"
    dropout: float = 0.4
    "dropout on what enters the transformer, on its branches, and inside the text MLP"
    weight_decay: float = 0.01
    "AdamW weight decay on matrices, the item table among them"
    hidden_size: int = 64
    "D, width of item vectors and transformer"
    num_layers: int = 2
    "transformer layers"
    num_heads: int = 2
    "attention heads"
    intermediate_size: int = 256
    "width of the transformer's MLP"
    text_hidden_size: int = 256
    "width of the MLP that reads an item's text (sasrec_text)"
    temperature: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "sasrec: logits are cosines of query and item vector over this; 0: inner products, whose lengths are learned"
    text_temperature: float = field(default=0.0, metadata=IDENTITY_IF_SET)
    "the same of sasrec_text, which ranks better without"
    max_history: Optional[int] = None
    "items of a history, newest kept; null: prompt.max_history, what the model gets"
    batch_targets: int = 1024
    "targets of an optimizer step"
    loss: Literal["full", "sampled"] = "full"
    "softmax over the whole catalogue, or over negatives that a step's targets share (log-probability corrected)"
    num_negatives: int = 8192
    "negatives a step (loss sampled); where the catalogue has no more, each item once"
    negative_power: float = 0.5
    "negatives are drawn with p ~ (training interactions + 1) ** negative_power: 0 uniform, 1 by popularity"
    schedule: Literal["constant", "cosine"] = "constant"
    "learning rate after the warm-up: as it is, or cosine to 0 over num_epochs"
    warmup_ratio: float = 0.02
    "share of num_epochs of linear warm-up"
    clip_norm: float = 1.0
    "gradient norm limit"
    validate_every_epochs: int = 2
    "epochs between measurements of validation NDCG@10, whose best weights are kept"
    patience: int = 4
    "measurements without a better one after which it stops"
    validation_users: int = 0
    "users of such a measurement, spread evenly; 0: all"
    batch_users: int = 256
    "users a forward pass of scoring"

    def __post_init__(self):
        for name in ("num_epochs", "batch_targets", "num_negatives", "validate_every_epochs", "patience", "batch_users"):
            if getattr(self, name) < 1:
                raise ConfigError(f"sasrec.{name}", getattr(self, name), "at least 1")
        if self.max_history is not None and self.max_history < 1:
            raise ConfigError("sasrec.max_history", self.max_history, "at least 1, or null")
        for name in ("temperature", "text_temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"sasrec.{name}", getattr(self, name), "0 (inner products) or above")
        if self.hidden_size % self.num_heads:
            raise ConfigError("sasrec.hidden_size", self.hidden_size, f"a multiple of sasrec.num_heads ({self.num_heads})")


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How training is executed; no effect on what is computed."""

    num_ranks: int = 2
    "processes that `contrec train` starts on this machine"
    hostfile: str = ""
    "DeepSpeed hostfile for several machines; empty: this machine"
    threads: int = 0
    "CPU threads a process; 0: cores / processes"
    loader_workers: int = -1
    "processes a rank that build its batches ahead of its steps, 0: none; -1: 2 on GPUs, none on CPUs, where they would only "
    "take cores from the steps"
    timeout_minutes: int = 40
    "process-group timeout; more than stall_seconds, whose message says more"
    resume: str = "auto"
    "'auto': go on from the newest good checkpoint; 'never': start anew, what is there is set aside; or a step, or a path"
    requeue_exit_code: int = 0
    "exit code after a stop that was asked for (signal, stop-file), once a checkpoint is saved; for schedulers that requeue"
    stall_seconds: int = 1800
    "a run in which no rank makes anything for so long writes the stacks of all ranks to logs/ and ends; 0: never"
    deepspeed_config: str = ""
    "DeepSpeed JSON of your own; it joins what this config derives (training/deepspeed_file.py)"

    def __post_init__(self):
        if self.requeue_exit_code == 1 or not 0 <= self.requeue_exit_code <= 255:
            raise ConfigError("launch.requeue_exit_code", self.requeue_exit_code, "0 or 2 to 255 (1 is that of a failure)")
        if self.stall_seconds < 0:
            raise ConfigError("launch.stall_seconds", self.stall_seconds, "seconds, or 0 for no watchdog")


@dataclass(kw_only=True, slots=True)
class ShardsConfig:
    """Where training reads the token shards; no effect on what is computed while none of them is bad."""

    url: str = ""
    "copy of tokens/ that holds shards/000000.tar and so on: a folder, read in place, or s3://, gs://, https://, file:// or what "
    "else fsspec knows, fetched through the cache; empty: beside the index in the run's folder"
    cache_dir: str = ""
    "folder of fetched shards, shared by all processes that name it; empty: shard_cache in the run's folder"
    cache_bytes: int = 0
    "most bytes that it keeps, least recently used shards go first; room for train.shuffle_shards of them saves fetching them "
    "again; 0: no limit"
    retries: int = 5
    "further tries of a transfer that failed, with growing waits"
    timeout_seconds: float = 60.0
    "a transfer that brings nothing for so long has failed"
    storage_options: dict[str, str] = field(default_factory=dict)
    "what fsspec takes beside the URL, for example {endpoint_url: https://...}, {anon: true}; keys and passwords belong into the "
    "environment, since a run's folder holds its config"
    max_bad_shards: int = 0
    "missing, cut off or corrupt shards that training does without, counted and named; then all are looked at (and fetched) "
    "before the first step. 0: a bad shard ends the run when it is read"

    def __post_init__(self):
        for name, least in {"cache_bytes": 0, "retries": 0, "max_bad_shards": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"shards.{name}", getattr(self, name), f"at least {least}")
        if self.timeout_seconds <= 0:
            raise ConfigError("shards.timeout_seconds", self.timeout_seconds, "more than 0")


@dataclass(kw_only=True, slots=True)
class MonitorConfig:
    """What people watch while training runs. It is part of no stage's identity: the model is the same with and without it."""

    probe_every_steps: int = 500
    "optimizer steps between validation probes (HR and NDCG through the sampler and the query), and one at the end; 0: none"
    probe_users: int = 500
    "validation users of a probe, spread evenly over all"
    probe_k: int = 10
    "cut-off of the probe's HR and NDCG"
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    "where figures go beside the JSON lines: 'tensorboard' (run_dir/tensorboard), 'wandb', 'mlflow'"
    profile_start_step: int = 10
    "first optimizer step that the profiler records"
    profile_num_steps: int = 0
    "optimizer steps that it records, a trace a rank in run_dir/profile; 0: none"

    def __post_init__(self):
        unknown = [name for name in self.trackers if name not in TRACKER_NAMES]
        if unknown:
            raise ConfigError("monitor.trackers", unknown, f"some of {list(TRACKER_NAMES)}")
        if self.probe_users < 1:
            raise ConfigError("monitor.probe_users", self.probe_users, "at least 1; probe_every_steps=0 turns probes off")


@dataclass(kw_only=True, slots=True)
class RayConfig:
    """How Ray stages are executed; no effect on what is computed."""

    address: str = ""
    "cluster to join; empty: RAY_ADDRESS, else a local one is started"
    num_workers: int = 2
    "workers at work at a time, most; a cluster with less room starts with fewer"
    min_workers: int = 1
    "workers that must be up before the first part is given out"
    cpus_per_worker: float = 1.0
    "CPUs a worker holds"
    gpus_per_worker: float = 0.0
    "GPUs a worker holds, fractions allowed"
    memory_bytes_per_worker: int = 0
    "memory a worker reserves: Ray places no more workers on a node than it has room for (0: no limit)"
    object_store_bytes: int = 200000000
    "object store of a local cluster"

    def __post_init__(self):
        if not 1 <= self.min_workers <= self.num_workers:
            raise ConfigError("ray.min_workers", self.min_workers, f"1 to ray.num_workers ({self.num_workers})")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    name: str = MISSING
    "name of the run"
    run_dir: str = "runs/${name}"
    "folder of everything the run writes"
    seed: int = 0
    "seed of every random draw"
    source: SourceConfig = field(default_factory=SourceConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    precompute: PrecomputeConfig = field(default_factory=PrecomputeConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tiger: TigerConfig = field(default_factory=TigerConfig)
    item_knn: ItemKnnConfig = field(default_factory=ItemKnnConfig)
    text_knn: TextKnnConfig = field(default_factory=TextKnnConfig)
    sasrec: SasRecConfig = field(default_factory=SasRecConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    @property
    def dataset(self) -> str:
        """Name of the data set in reports."""
        return self.source.name or self.name

    def folder(self, stage_folder: str) -> Path:
        """Path of a folder of the run, for example folder("catalog")."""
        return Path(self.run_dir) / stage_folder


def load_config(files: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Resolve defaults, YAML files and key=value arguments, in this order of precedence.

    Errors   ConfigError that names the key, what it got and what was expected (unknown keys: the nearest one).
    """
    merged = copy.deepcopy(_schema())
    for source in [*map(Path, files), *overrides]:
        _merge_one(merged, source)
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _named_error(error) from None


def flatten_keys(values: dict, prefix: str = "") -> dict[str, object]:
    """Nested mappings as one with dotted keys, as key=value arguments have them."""
    flat = {}
    for key, value in values.items():
        flat |= flatten_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@cache
def _schema() -> DictConfig:
    """The defaults; making them costs more than a copy."""
    return OmegaConf.structured(Config)


def _merge_one(merged: DictConfig, source: str | Path) -> None:
    """Merge one YAML file or one key=value argument into `merged`."""
    try:
        if isinstance(source, str) and "=" in source:
            key, _, value = source.partition("=")
            merged.merge_with(OmegaConf.from_dotlist([source]))
            return
        if Path(source).is_file():
            key, value = str(source), "a value that does not fit"
            merged.merge_with(read_yaml(Path(source)))
            return
    except OmegaConfBaseException as error:
        raise _named_error(error, key, value) from None
    raise ConfigError("--config", str(source), "a YAML file that exists, or key=value")


def read_yaml(path: Path) -> DictConfig:
    """A YAML file that maps keys to values. Errors   ConfigError that names the file and what is wrong with it"""
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(str(path), " ".join(str(error).split()), "a YAML file") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(str(path), f"a {type(OmegaConf.to_container(loaded)).__name__}", "a mapping of keys to values")
    return loaded


def _named_error(error: OmegaConfBaseException, key: str = "", value: str = "a value that does not fit") -> ConfigError:
    """Turn omegaconf's error into one that names the key, what it got and what was expected.

    `key` and `value` are what was merged; they are named where omegaconf does not know better.
    """
    key = error.full_key or error.key or key
    summary = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        hint = summary.partition("Did you mean: ")[2].strip("?'")
        parent = str(key).rpartition(".")[0]
        nearest = f"{parent}.{hint}" if parent else hint
        return ConfigError(key, "an unknown key", f"a known one; did you mean '{nearest}'?" if hint else "a known one")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(key, "nothing", "a value (it has no default)")
    kind = summary.partition("could not be converted to ")[2]
    expected = f"a value of type {kind}" if kind else summary.partition("expected ")[2] or summary
    got = getattr(error, "value", None)
    return ConfigError(key, value if got is None else got, expected)
