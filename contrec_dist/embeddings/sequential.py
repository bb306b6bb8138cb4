"""Item vectors from what stands near what in training histories (stage embed, embed.collaborative: sequential).

    C        pairs of a training history at most `window` places apart, each as 1 / gap, both directions
    M[i, j] = max(0, log(C[i, j] / (C[i, .] p_j))),   p_j ~ C[., j] ** 0.75, summing to 1
    vectors = U sqrt(S) of the truncated SVD of M

which is what skip-gram with negative samples factorises, without its noise. A user's vector is the mean of the training items'.

Guarantees   the same histories and seed give the same bits; items and users without training interactions come back as zeros.
Cost         `window` sorts of the training interactions, the pairs that occur in memory, a few sparse products of width `dim`.
Source       Levy and Goldberg, NeurIPS 2014; Levy, Goldberg and Dagan, TACL 2015
"""

import numpy as np
from scipy.sparse import coo_array, csr_array
from sklearn.decomposition import TruncatedSVD

from contrec_dist.config import EmbedConfig
from contrec_dist.data.catalog import Histories
from contrec_dist.data.pairs import count_pairs
from contrec_dist.embeddings.collaborative import CollaborativeEmbedding, average_items
from contrec_dist.errors import DataError

SMOOTHING = 0.75
SVD_ITERATIONS = 4


def fit_sequential(histories: Histories, num_items: int, config: EmbedConfig, seed: int) -> CollaborativeEmbedding:
    """Factorise the pairs of the training histories; `losses` of the result is empty.

    Errors   DataError where no training history has two items
    """
    pairs = count_pairs(histories, num_items, config.sequential_window, 1.0)
    if not pairs.nnz:
        raise DataError("training histories", "none with two items", "at least one; or another embed.collaborative")
    items = factorise(compute_information((pairs + pairs.T).tocoo()), config.collaborative_dim, seed)
    return CollaborativeEmbedding(users=average_items(histories, items), items=items, losses=[])


def compute_information(counts: coo_array) -> csr_array:
    """M of the module, positive entries alone. Shapes   (N, N), symmetric -> same"""
    sums = np.asarray(counts.sum(axis=1), dtype=np.float64)
    share = sums**SMOOTHING / (sums**SMOOTHING).sum()
    rows, columns = counts.coords
    information = np.log(counts.data / (sums[rows] * share[columns]))
    kept = information > 0
    return csr_array((information[kept].astype(np.float32), (rows[kept], columns[kept])), shape=counts.shape)


def factorise(matrix: csr_array, dim: int, seed: int) -> np.ndarray:
    """U sqrt(S), columns past the rank zero. Shapes   (N, N) -> (N, dim) float32"""
    vectors = np.zeros((matrix.shape[0], dim), np.float32)
    rank = min(dim, matrix.shape[0])
    svd = TruncatedSVD(rank, n_iter=SVD_ITERATIONS, random_state=seed)
    scaled = svd.fit_transform(matrix)  # U S
    sizes = svd.singular_values_
    solid = sizes > sizes[0] * np.finfo(np.float32).eps * len(vectors)
    vectors[:, :rank][:, solid] = scaled[:, solid] / np.sqrt(sizes[solid])
    return vectors
