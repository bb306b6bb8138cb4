"""The law of a catalogue of any size: which items there are, and what users take next, without any table of items.

Everything is a pure function of (settings, seed, number of the item or user), drawn from counters by splitmix64, so any
range of users or items can be made alone, and the rows do not depend on the ranges in which they are made.

Items form families (category, product line, adjective): every F-th item in the order of popularity is of one family.
Popularity falls as rank^-exponent past the first F ranks, more slowly before (Zipf-Mandelbrot: no item is in every
history). A user's first item is drawn by popularity; its category is the user's home. Every next one is drawn from

    stickiness * successors(last item) + (1 - stickiness) * (0.6 popularity in the home category + 0.4 popularity)

and drawn again while the user has it. An item has 20 successors of Zipf weights: the even places are shared by its
family, the odd ones its own; two thirds lie in its product line, the others in a companion category.

Cost     About 4 microseconds an interaction on one core; memory for CHUNK_USERS histories of max_history items.
Source   splitmix64: Steele, Lea, Flood, Fast splittable pseudorandom number generators, OOPSLA 2014
"""

import math

import numpy as np
from scipy.special import ndtri

from contrec_dist.data.sources.generated_words import CATEGORIES
from contrec_dist.data.sources.streamed_settings import StreamSettings

MAX_SUCCESSORS = 20
SUCCESSOR_EXPONENT = 0.8
COMPANION_RATIO = 1 / 3
HOME_RATIO = 0.6
MIN_FAMILY_ITEMS = 64
LENGTH_SIGMA = 1.0
FIRST_TIME_SECONDS = 1_600_000_000
START_SPAN_SECONDS = 2 * 365 * 86_400
MEAN_GAP_SECONDS = 5 * 86_400
RATING_SHARES = (0.05, 0.06, 0.12, 0.27, 0.50)
CHUNK_USERS = 32_768

_FAMILIES = [
    (category, line, adjective)
    for category, (_, lines, adjectives) in enumerate(CATEGORIES)
    for line in range(len(lines.split("|")))
    for adjective in range(len(adjectives.split("|")))
]


def mix(key: np.ndarray) -> np.ndarray:
    """splitmix64's output function. Shapes   any uint64 -> the same"""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def draw_uniform(seed: int, stream: int, *counters: np.ndarray | int) -> np.ndarray:
    """Uniform float64 in [0, 1), one for every broadcast tuple of counters; `stream` tells one use from another."""
    key = np.array([(seed * 1_000_003 + stream) % 2**64], dtype=np.uint64)
    for counter in counters:
        key = mix(key * np.uint64(0x9E3779B97F4A7C15) + np.asarray(counter).astype(np.uint64) + np.uint64(1))
    return (mix(key) >> np.uint64(11)) * 2.0**-53


def integrate_power(low: np.ndarray, high: np.ndarray, exponent: float) -> np.ndarray:
    """Integral of x^-exponent."""
    if exponent == 1.0:
        return np.log(high / low)
    return (high ** (1.0 - exponent) - low ** (1.0 - exponent)) / (1.0 - exponent)


def invert_power(uniform: np.ndarray, low: np.ndarray, high: np.ndarray, exponent: float) -> np.ndarray:
    """Draws from [low, high) with density x^-exponent."""
    if exponent == 1.0:
        return low * (high / low) ** uniform
    rest = 1.0 - exponent
    return (low**rest + uniform * (high**rest - low**rest)) ** (1.0 / rest)


class StreamedLaw:
    """Items and histories of a catalogue, by ranges of their numbers."""

    def __init__(self, settings: StreamSettings):
        self.settings = settings
        num_items = settings.num_items
        self.num_families = max(1, min(len(_FAMILIES), num_items // MIN_FAMILY_ITEMS))
        combinations = np.arange(self.num_families) * len(_FAMILIES) // self.num_families
        self.words_of_family = np.array(_FAMILIES)[combinations]  # (F, 3): category, line, adjective; ascending
        self._set_places()
        self._set_popularity()
        self._multiplier = _coprime(int(num_items * 0.6180339887498949), num_items)
        self._inverse = pow(self._multiplier, -1, num_items) if num_items > 1 else 0
        self._offset = int(draw_uniform(settings.seed, 1, 0)[0] * num_items)
        weights = 1.0 / np.arange(1, MAX_SUCCESSORS + 1) ** SUCCESSOR_EXPONENT
        self._successor_steps = np.cumsum(weights / weights.sum())[:-1]

    def place_items(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Family and popularity rank inside it. Shapes   (n,) -> (n,), (n,) int64"""
        place = (items - self._offset) % self.settings.num_items * self._inverse % self.settings.num_items
        return self._family_at[place % self.num_families], place // self.num_families

    def draw_lengths(self, users: np.ndarray) -> np.ndarray:
        """Log-normal above min_history, so a few users have very many. Shapes   (n,) -> (n,) int64"""
        s = self.settings
        uniform = draw_uniform(s.seed, 2, users)
        normal = ndtri(np.clip(uniform, 1e-12, None))
        mean = s.mean_history - s.min_history + 0.5  # rounding down takes half an item
        further = np.exp(math.log(mean) - LENGTH_SIGMA**2 / 2 + LENGTH_SIGMA * normal).astype(np.int64)
        return np.minimum(s.min_history + further, min(s.max_history, s.num_items // 4))

    def draw_histories(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Histories of the users start..stop, user after user. Shapes   lengths (n,), items (M,) int64"""
        users = np.arange(start, stop)
        lengths = self.draw_lengths(users)
        firsts = range(0, len(users), CHUNK_USERS)
        chunks = [self._draw_chunk(users[a : a + CHUNK_USERS], lengths[a : a + CHUNK_USERS]) for a in firsts]
        return lengths, np.concatenate(chunks)

    def draw_times(self, start: int, lengths: np.ndarray, steps: np.ndarray, users: np.ndarray) -> np.ndarray:
        """Unix seconds, strictly increasing inside a user. Shapes   lengths (n,), steps, users (M,) -> (M,) int64"""
        seed = self.settings.seed
        gaps = 1 - np.log1p(-draw_uniform(seed, 3, users, steps)) * MEAN_GAP_SECONDS
        total = np.cumsum(gaps.astype(np.int64))
        first = np.cumsum(lengths) - lengths
        begin = (draw_uniform(seed, 4, np.arange(start, start + len(lengths))) * START_SPAN_SECONDS).astype(np.int64)
        return FIRST_TIME_SECONDS + total + np.repeat(begin - total[first], lengths)

    def draw_ratings(self, users: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """1 to 5, of no influence. Shapes   (M,), (M,) -> (M,) int8"""
        uniform = draw_uniform(self.settings.seed, 5, users, steps)
        return (1 + np.searchsorted(np.cumsum(RATING_SHARES)[:-1], uniform, side="right")).astype(np.int8)

    def find_successors(self, items: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The successor in a slot 0..MAX_SUCCESSORS-1. Shapes   (n,), (n,) -> (n,) int64"""
        seed, (family, _) = self.settings.seed, self.place_items(items)
        owner = np.where(slots % 2 == 0, family, self.num_families + items)
        away = draw_uniform(seed, 10, owner, slots) < COMPANION_RATIO
        low = np.where(away, self._companion_bounds[family, 0], self._line_bounds[family, 0])
        high = np.where(away, self._companion_bounds[family, 1], self._line_bounds[family, 1])
        target = low + (draw_uniform(seed, 11, owner, slots) * (high - low)).astype(np.int64)
        return self._draw_in_family(target, draw_uniform(seed, 12, owner, slots))

    def _draw_chunk(self, users: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Step by step, the users with the longest histories in front, so those at work are the first rows."""
        order = np.argsort(-lengths, kind="stable")
        drawn = np.full((len(users), lengths.max()), -1, dtype=np.int32)
        num_active = np.searchsorted(-lengths[order], -np.arange(lengths.max()), side="left")
        for step, number in enumerate(num_active):
            self._draw_step(drawn, users[order[:number]], step)
        result = np.empty_like(drawn)
        result[order] = drawn
        return result[result >= 0].astype(np.int64)

    def _draw_step(self, drawn: np.ndarray, users: np.ndarray, step: int) -> None:
        """Write column `step` of the first rows; who draws a seen item draws again, with the next counter."""
        rows, attempt = np.arange(len(users)), 0
        while len(rows):
            items = self._propose(users[rows], drawn[rows, 0], drawn[rows, step - 1], step, attempt)
            seen = (drawn[rows, :step] == items[:, None]).any(axis=1)
            drawn[rows[~seen], step] = items[~seen]
            rows, attempt = rows[seen], attempt + 1

    def _propose(self, users, first, last, step: int, attempt: int) -> np.ndarray:
        """One draw a user from the law before seen items are excluded."""
        uniforms = [draw_uniform(self.settings.seed, 20 + k, users, step, attempt) for k in range(5)]
        low, high = np.zeros(len(users)), np.ones(len(users))
        if step:
            home = self._category_of_family[self.place_items(first.astype(np.int64))[0]]
            at_home = uniforms[0] < HOME_RATIO
            low[at_home], high[at_home] = self._category_low[home[at_home]], self._category_high[home[at_home]]
        place = low + uniforms[1] * (high - low)
        family = np.minimum(np.searchsorted(self._cumulative, place, side="right"), self.num_families - 1)
        items = self._draw_in_family(family, uniforms[2])
        if step:
            follows = uniforms[3] < self.settings.category_stickiness
            slots = np.searchsorted(self._successor_steps, uniforms[4][follows], side="right")
            items[follows] = self.find_successors(last[follows].astype(np.int64), slots)
        return items

    def _draw_in_family(self, family: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """An item of the family by popularity: rank r has the integral of x^-exponent from low + r to low + r + 1."""
        low, high = self._family_low[family], self._family_high[family]
        depth = invert_power(uniform, low, high, self.settings.popularity_exponent) - low
        rank = np.clip(depth.astype(np.int64), 0, self._family_sizes[family] - 1)
        place = rank * self.num_families + self._first_place[family]
        return (place * self._multiplier + self._offset) % self.settings.num_items

    def _set_places(self) -> None:
        """Sizes of the families; the ranges of families in which an item's successors lie."""
        self._family_at = np.argsort(draw_uniform(self.settings.seed, 6, np.arange(self.num_families)), kind="stable")
        self._first_place = np.argsort(self._family_at)
        self._family_sizes = -((self._first_place - self.settings.num_items) // self.num_families)
        category, line = self.words_of_family[:, 0], self.words_of_family[:, 0] * 1000 + self.words_of_family[:, 1]
        self._category_of_family = category
        self._line_bounds = np.stack([np.searchsorted(line, line, side) for side in ("left", "right")], axis=1)
        present = np.unique(category)
        companion = np.roll(present, 1)[np.searchsorted(present, category)]
        bounds = [np.searchsorted(category, companion, side) for side in ("left", "right")]
        self._companion_bounds = np.stack(bounds, axis=1)

    def _set_popularity(self) -> None:
        """Cumulative popularity of the families, and its bounds of every category."""
        self._family_low = (self._first_place + 1) / self.num_families
        self._family_high = self._family_low + self._family_sizes
        weights = integrate_power(self._family_low, self._family_high, self.settings.popularity_exponent)
        self._cumulative = np.cumsum(weights / weights.sum())
        edges = np.concatenate([[0.0], self._cumulative])
        numbers = np.arange(len(CATEGORIES))
        self._category_low = edges[np.searchsorted(self._category_of_family, numbers, side="left")]
        self._category_high = edges[np.searchsorted(self._category_of_family, numbers, side="right")]


def _coprime(number: int, modulus: int) -> int:
    """The next number that shares no divisor with `modulus`."""
    number = max(1, number)
    while math.gcd(number, modulus) != 1:
        number += 1
    return number
