"""Which folders of a run belong together, and the short versions that every recommendation carries.

Each stage's manifest holds the content hash of every folder that it was made from, and the exported model holds those of
what it was trained on. Scoring compares all that is said of a folder (catalog, embeddings, tokenizer, tokens, model, index)
with the folder itself, and, where it is not there, with each other; it refuses a run in which one of them was replaced.
"""

import json
from dataclasses import dataclass
from typing import Iterator

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import MANIFEST_NAME, Manifest
from contrec_dist.retrieval.current_index import current_version

CHAIN = ("catalog", "embeddings", "tokenizer", "tokens", "model", "index")
VERSION_LETTERS = 12  # as current_index shows an index's
SHOWN_LETTERS = 16
Claim = tuple[str, str, str]
"(who says it, of which folder, its content hash)"


@dataclass(frozen=True)
class Versions:
    """First letters of the content hashes of what recommendations were made with."""

    model: str
    index: str
    index_number: int
    "of the living index: all workers of a job open this version, whatever happens to the index meanwhile"


def check_pairing(config: Config) -> Versions:
    """Compare every folder with what the others were made from.

    Errors   ArtifactError naming both hashes: what somebody was made from, and what is there (or what somebody else was)
    """
    manifests = {
        name: Manifest.load(config.folder(name)) for name in CHAIN if (config.folder(name) / MANIFEST_NAME).is_file()
    }
    known = {name: (f"{config.folder(name)}", manifest.content_hash) for name, manifest in manifests.items()}
    for who, name, made_from in _claims(config, manifests):
        where, there = known.setdefault(name, (who, made_from))
        if made_from != there:
            got, expected = f"made from {name} {made_from[:SHOWN_LETTERS]}", f"{name} {there[:SHOWN_LETTERS]} of {where}"
            raise ArtifactError(who, got, expected)
    number, index = current_version(config)
    return Versions(Manifest.load(config.folder("model")).content_hash[:VERSION_LETTERS], index, number)


def _claims(config: Config, manifests: dict[str, Manifest]) -> Iterator[Claim]:
    for reader, manifest in manifests.items():
        for written, made_from in manifest.inputs.items():
            yield str(config.folder(reader)), written, made_from
    exported = config.folder("model") / "config.json"
    trained_on = json.loads(exported.read_text()) if exported.is_file() else {}
    for written in ("catalog", "tokens"):
        if f"{written}_hash" in trained_on:
            yield str(exported), written, trained_on[f"{written}_hash"]
