"""Complete stage folders that one run takes over from another, so that rows of an ablation build only what they change.

A folder is taken where its manifest names the same settings and the same inputs as the run would have; the stage itself then
finds it complete, or builds it again.

Guarantees   the files are hard links (copies, where the file system has none) inside folders of their own. Stages never
             write into a complete folder, they put another in its place: whatever a run builds, no other run's files change.
Cost         no bytes, an entry a file.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Sequence

from contrec_dist.config import Config
from contrec_dist.errors import ArtifactError
from contrec_dist.manifest import MANIFEST_NAME, WRITTEN_BY, Manifest, lock_folder, stage_identity
from contrec_dist.progress import get_logger


def take_over(config: Config, folder: str, donors: Sequence[Config]) -> Path | None:
    """Give the run a donor's complete folder where it has no fitting one; the folder it was taken from, if one was.

    Errors   ArtifactError when another process writes one of the two
    """
    if fits(config, config.folder(folder)):
        return None
    for donor in donors:
        source = donor.folder(folder)
        if source.absolute() != config.folder(folder).absolute() and fits(config, source):
            with lock_folder(config, folder), lock_folder(donor, folder):
                _link_folder(source, config.folder(folder))
            get_logger(WRITTEN_BY.get(folder, folder)).info("taken over from %s", source)
            return source
    return None


def fits(config: Config, folder: Path) -> bool:
    """Whether a folder is complete and its manifest names the settings and inputs that the run has.

    What a stage counts beside its config sections is not compared: only the stage knows it.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return False
    try:
        manifest = Manifest.load(folder)
        manifest.check_files(folder)
        sections = [name for name in manifest.config if name != "seed"]
        if not all(hasattr(config, name) for name in sections):
            return False
        _, used, inputs = stage_identity(config, sections, list(manifest.inputs))
    except ArtifactError:
        return False
    return json.loads(json.dumps(used)) == manifest.config and inputs == manifest.inputs


def _link_folder(source: Path, target: Path) -> None:
    """Make `target` a folder of links to the files of `source`; it appears complete or not at all."""
    work = target.with_name(f".{target.name}.taken")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work, copy_function=_link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(work, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
