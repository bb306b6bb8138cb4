"""Baselines, measured in the same harness and on the same split as the model."""
