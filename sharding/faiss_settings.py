"""FAISS's process-wide switches, set in one place: every module that computes with FAISS imports this one.

Were they set by only some of them, the bits of a result would depend on what else the process had imported.
"""

import faiss

# Queries from which exact search is a matrix product; the default of 128000 leaves common batches to slow loops.
faiss.cvar.distance_compute_blas_threshold = 20
# The product's blocks: 256 x 16384 scores stay in the last cache while their best are picked.
faiss.cvar.distance_compute_blas_query_bs = 256
faiss.cvar.distance_compute_blas_database_bs = 16384
