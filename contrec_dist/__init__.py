"""contrec_dist: generative recommendation with continuous tokens (ContRec, arXiv 2504.12007), distributed.

The stages, in order, and the module that holds each one's `run(config) -> Manifest`:

    prepare      contrec_dist/data/prepare.py          raw logs -> catalog/
    embed        contrec_dist/embeddings/embed.py      catalog -> embeddings/
    tokenize     contrec_dist/tokenizer/tokenize.py    embeddings -> tokenizer/
    precompute   contrec_dist/data/precompute.py       tokenizer -> tokens/            (Ray)
    train        contrec_dist/training/train.py        tokens -> checkpoints/, model/  (DeepSpeed ZeRO-3)
    index        contrec_dist/retrieval/index.py       model -> index/                 (FAISS)
    score        contrec_dist/retrieval/score.py       model, index -> recommendations/ (Ray)
    evaluate     contrec_dist/report/evaluate.py       recommendations -> report/

Legend of tensor letters, used in every docstring:

    B users (rows of a batch)   H history, items   K continuous tokens an item   L prompt tokens, positions
    D width of the LLM          E width of an embedding   Z width of one latent  Q width of a query
    N items of the catalogue    T noise steps      C candidates                  R ranks (world size)
    S samples drawn
"""

__version__ = "0.1.0"
