"""`contrec env`: what a bug report needs, and nothing that names the person or the place."""

import getpass
import os
import socket
from importlib.metadata import version
from pathlib import Path

import pytest

from contrec_dist.__main__ import main
from contrec_dist.commands.env import environment_report


@pytest.fixture(scope="module")
def report() -> str:
    return environment_report()


def test_the_report_names_the_versions_that_results_depend_on(report):
    for package in ("torch", "deepspeed", "transformers", "polars"):
        assert f"| {package} | {version(package)} |" in report


def test_every_table_of_the_report_is_markdown(report):
    for section in ("contrec_dist", "machine", "torch", "faiss", "DeepSpeed operators", "variables"):
        head, rule, first = report.split(f"### {section}\n\n")[1].splitlines()[:3]
        assert (head, rule) == ("| | |", "|---|---|") and first.count("|") == 3


def test_the_report_names_neither_user_nor_host_nor_home(report):
    assert socket.gethostname() not in report
    assert str(Path.home()) not in report and os.getcwd() not in report
    if len(getpass.getuser()) > 4:  # "root" stands inside other words
        assert getpass.getuser() not in report


def test_a_tool_that_is_not_on_the_path_is_missing_for_something(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    without = environment_report()
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    assert "- pdsh: " in without and "- ssh: " in without and "compiler" in without
    assert "- pdsh: " not in environment_report()


def test_the_command_needs_no_config_and_prints_the_report(capsys):
    assert main(["env"]) == 0
    assert "### missing" in capsys.readouterr().out
