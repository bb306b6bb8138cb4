"""Quantised tokens as a yardstick for the continuous ones: residual and product quantisation by FAISS (stage tokenize).

Guarantees   the same rows and seed give the same codes on the same machine.
Cost         trained on at most MAX_TRAIN_ROWS rows. 24 bits: a second or two on 12,000 x 192. An equal budget to the
             sigma-VAE's channel (213 bits by default) takes 27 residual levels; the search beam is 1 there and levels are
             capped at MAX_LEVELS, so it stays under 30 s. The bits really used are in the result.
Source       TIGER, arXiv 2305.05065 (3 levels of 256 codes)
"""

import math
from dataclasses import dataclass

import faiss
import numpy as np

import sharding.faiss_settings  # noqa: F401

BITS_PER_CODE = 8
TIGER_LEVELS = 3
MAX_LEVELS = 32
MAX_TRAIN_ROWS = 65_536
SMALL_BEAM, LARGE_BEAM = 5, 1


@dataclass(kw_only=True)
class Quantized:
    """Rows as codes."""

    name: str
    "what it is, for tables"
    bits: int
    "bits a row"
    codes: np.ndarray
    "(n, bytes) uint8"
    reconstruction: np.ndarray
    "(n, E) float32"


def quantize_residual(rows: np.ndarray, num_levels: int, seed: int) -> Quantized:
    """Residual quantisation: every level codes what the levels before left over. Shapes   rows: (n, E)"""
    num_levels, bits = min(num_levels, MAX_LEVELS), _fit_bits(len(rows))
    quantizer = faiss.ResidualQuantizer(rows.shape[1], num_levels, bits)
    quantizer.max_beam_size = SMALL_BEAM if num_levels <= TIGER_LEVELS else LARGE_BEAM
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.verbose = False
    return _train_and_code(quantizer, rows, f"RQ {num_levels} x {bits} bits", num_levels * bits, seed)


def quantize_product(rows: np.ndarray, num_codes: int, seed: int) -> Quantized:
    """Product quantisation into about `num_codes` codes: the divisor of E that is nearest. Shapes   rows: (n, E)"""
    bits, width = _fit_bits(len(rows)), rows.shape[1]
    divisors = [parts for parts in range(1, width + 1) if width % parts == 0]
    parts = min(divisors, key=lambda parts: (abs(math.log(parts / num_codes)), parts))
    quantizer = faiss.ProductQuantizer(width, parts, bits)
    return _train_and_code(quantizer, rows, f"PQ {parts} x {bits} bits", parts * bits, seed)


def count_equal_levels(bits: float) -> int:
    """Codes of BITS_PER_CODE bits in a budget of `bits`, between 1 and MAX_LEVELS (an endless budget: MAX_LEVELS)."""
    return MAX_LEVELS if math.isinf(bits) else max(1, min(MAX_LEVELS, round(bits / BITS_PER_CODE)))


def _train_and_code(quantizer, rows: np.ndarray, name: str, bits: int, seed: int) -> Quantized:
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    quantizer.cp.seed = seed
    quantizer.cp.min_points_per_centroid = 1  # small catalogues are coded with the items they have
    quantizer.train(_sample_rows(rows, seed))
    codes = quantizer.compute_codes(rows)
    return Quantized(name=name, bits=bits, codes=codes, reconstruction=quantizer.decode(codes))


def _sample_rows(rows: np.ndarray, seed: int) -> np.ndarray:
    if len(rows) <= MAX_TRAIN_ROWS:
        return rows
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), MAX_TRAIN_ROWS, replace=False))]


def _fit_bits(num_rows: int) -> int:
    """Bits of a code: 8, fewer where there are fewer rows than codes."""
    return max(1, min(BITS_PER_CODE, int(math.log2(max(num_rows, 2)))))
