"""Which items stood near which in training histories: what item_knn, the transition score and sequential embeddings count."""

import numpy as np
from scipy.sparse import coo_array, csr_array

from contrec_dist.data.catalog import Histories


def count_pairs(histories: Histories, num_items: int, window: int, gap_decay: float) -> csr_array:
    """How often an item followed another at most `window` places later, each time as 1 / gap ** gap_decay.

    One sparse sum a gap; training interactions alone. Shapes   -> (N, N) float32, [earlier, later]
    """
    users, items = histories.training_edges()
    total = csr_array((num_items, num_items), dtype=np.float32)
    for gap in range(1, min(window, len(items) - 1) + 1):
        same = users[gap:] == users[:-gap]
        earlier, later = items[:-gap][same], items[gap:][same]
        weight = np.full(len(later), float(gap) ** -gap_decay, dtype=np.float32)
        total = total + coo_array((weight, (earlier, later)), shape=total.shape).tocsr()
    return total
