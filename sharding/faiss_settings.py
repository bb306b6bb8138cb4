"""FAISS's process-wide switch, set in one place: every module that computes with FAISS imports this one.

Were it set by only some of them, the bits of a result would depend on what else the process had imported.
"""

import faiss

# Queries from which exact search is a matrix product; the default of 128000 leaves common batches to slow loops.
faiss.cvar.distance_compute_blas_threshold = 20
