"""What is measured, one module a part: `add_arguments(parser)` and `run(parsed) -> dict` of figures. See launchers/benchmark.py."""
