"""What a search may choose: a YAML file laid out as a config, with the list of values in the place of each value.

    item_knn:
      window: [20, 50, 100]        # configs/tuning/item_knn.yaml

A list of numbers is ordered, and neighbours are taken for alike. The config's own value always belongs to the choices: the
search starts from it.
"""

import json
from dataclasses import dataclass
from functools import reduce
from math import prod
from pathlib import Path
from typing import Mapping, Sequence

from omegaconf import OmegaConf

from contrec_dist.config import Config, flatten_keys, load_config, read_yaml
from contrec_dist.errors import ConfigError


@dataclass(frozen=True)
class SearchSpace:
    """Values by dotted key; of numbers in rising order. `start` holds the config's own."""

    choices: Mapping[str, tuple]
    start: Mapping[str, object]

    @property
    def size(self) -> int:
        """Settings that it holds."""
        return prod(map(len, self.choices.values()))

    def is_ordered(self, key: str) -> bool:
        """Whether the values of a key are numbers."""
        return all(map(_is_number, self.choices[key]))


def load_space(path: Path, files: Sequence[str], overrides: Sequence[str]) -> SearchSpace:
    """Read a space for the config of `files` and `overrides`; every value is tried on that config.

    Errors   ConfigError for a file that is none, for a key without a list, or for a value that its key does not take
    """
    config, choices, start = load_config(files, overrides), {}, {}
    for key, values in flatten_keys(_read(path)).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: {key}", values, "a list of values to choose from")
        for value in values:
            load_config(files, [*overrides, as_override(key, value)])
        start[key] = read_key(config, key)
        every = [*values, *([] if start[key] in values else [start[key]])]
        unique = [value for place, value in enumerate(every) if value not in every[:place]]
        choices[key] = tuple(sorted(unique) if all(map(_is_number, unique)) else unique)
    if not choices:
        raise ConfigError(str(path), "nothing", "keys with lists of values to choose from")
    return SearchSpace(choices, start)


def as_override(key: str, value: object) -> str:
    """The argument key=value that sets it."""
    return f"{key}={json.dumps(value)}"


def read_key(config: Config, key: str) -> object:
    """The value of a dotted key of a config."""
    return reduce(getattr, key.split("."), config)


def _read(path: Path) -> dict:
    if not Path(path).is_file():
        known = ", ".join(sorted(file.name for file in Path(path).parent.glob("*.yaml")))
        raise ConfigError("--space", str(path), f"a YAML file that exists ({known or 'its folder has none'})")
    return OmegaConf.to_container(read_yaml(Path(path)), resolve=True)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
