"""Commands around the stages: each module has add_arguments(parser) and run(config, parsed) -> exit code."""
