"""Working through the rows of an ablation, one after another, by the pipeline's own code.

Guarantees   stopped at any point, the same command goes on: finished stages are skipped and a training resumes. A row that fails
             is told with its error and leaves the others alone. The tables are written after every row.
"""

from pathlib import Path
from typing import Sequence

from contrec_dist.__main__ import run_pipeline
from contrec_dist.ablation.figures import collect_rows
from contrec_dist.ablation.rows import ABLATION_FOLDER, AblationRow
from contrec_dist.ablation.sharing import take_over
from contrec_dist.ablation.table import write_tables
from contrec_dist.config import Config
from contrec_dist.errors import ContRecError, StageStopped
from contrec_dist.manifest import WRITTEN_BY
from contrec_dist.progress import get_logger
from contrec_dist.training.stop import remove_stop_file

FOLDER_OF = {stage: folder for folder, stage in WRITTEN_BY.items()}


def run_rows(
    base_run: Config, rows: Sequence[AblationRow], chosen: Sequence[AblationRow], *, with_test: bool, title: str
) -> tuple[list[dict], dict[str, str]]:
    """Run the chosen rows; records of all rows, and the errors of those that failed.

    Errors   StageStopped when a row was asked to stop, or the base's run by its stop-file
    """
    errors: dict[str, str] = {}
    donors = [base_run, *(row.config for row in rows)]
    for number, row in enumerate(chosen, start=1):
        if remove_stop_file(base_run):
            code = base_run.launch.requeue_exit_code
            raise StageStopped(f"stopped before row {row.name}; run the same command again to go on", code)
        get_logger("ablate").info("row %d of %d: %s", number, len(chosen), row.name)
        error = _run_row(row, donors)
        if error:
            errors[row.name] = error
        records = collect_rows(rows, base_run, errors, with_test=with_test)
        folder = Path(base_run.run_dir) / ABLATION_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_tables(records, folder, title=title)
    return records, errors


def _run_row(row: AblationRow, donors: Sequence[Config]) -> str:
    """Run one row to its end; its error in one line, empty where there was none."""
    try:
        run_pipeline(row.config, before_stage=lambda stage: take_over(row.config, FOLDER_OF[stage], donors))
    except StageStopped:
        raise
    except ContRecError as error:
        get_logger("ablate").error("row %s: %s", row.name, error)
        return " ".join(str(error).split())
    except Exception as error:  # whatever it was, the rows that follow are worth their while; the log has the traceback
        get_logger("ablate").exception("row %s", row.name)
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""
