"""Item vectors of a SASRec that ranks (stage embed, embed.collaborative: sasrec): what a recommender learned, as what tokens describe.

The network of the baseline sasrec_text, or of sasrec where `embed.sasrec_text` is false or there is no text, is trained as
`contrec baseline` trains it, section `sasrec`; its item vectors, text included, are what its softmax compares. Latents made of them lie as items are confused in ranking,
so that a diffusion's samples near an item are good answers too. A user's vector is the mean of the training items'.

Guarantees   trained on training interactions alone; the epoch that is kept is the best on validation users (NDCG@10), as of the baseline.
             Items and users without training interactions come back as zeros.
Cost         that of the baseline.
"""

import numpy as np

from contrec_dist.baselines.sasrec.fit import fit_sasrec
from contrec_dist.config import Config
from contrec_dist.data.catalog import Histories
from contrec_dist.embeddings.collaborative import CollaborativeEmbedding, average_items


def fit_distilled(histories: Histories, num_train: np.ndarray, text: np.ndarray | None, config: Config) -> CollaborativeEmbedding:
    """Train SASRec and keep its item vectors. Shapes   num_train (N,) int64, text (N, E) float32 standardised or None"""
    model, facts = fit_sasrec(config, histories, num_train, text, "embed")
    items = np.where(num_train[:, None] > 0, model.catalogue().cpu().numpy(), 0).astype(np.float32)
    losses = [epoch["loss"] for epoch in facts["epochs"]]
    return CollaborativeEmbedding(users=average_items(histories, items), items=items, losses=losses)
