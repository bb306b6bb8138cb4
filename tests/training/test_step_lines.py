"""training/step_lines.py: what a resumed run keeps of its figures."""

from contrec_dist.training.step_lines import append_line, last_step, trim_lines


def test_lines_of_later_steps_and_lines_cut_short_are_dropped(tmp_path):
    path = tmp_path / "figures.jsonl"
    for step in (2, 4, 6):
        append_line(path, {"step": step, "loss": step / 2})
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    trim_lines(path, 4)
    assert path.read_text() == '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 2.0}\n'
    assert last_step(path) == 4


def test_a_file_that_is_not_there_stays_so(tmp_path):
    path = tmp_path / "figures.jsonl"
    trim_lines(path, 4)
    assert not path.exists() and last_step(path) == -1
