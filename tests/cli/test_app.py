"""The group of commands: its table agrees with the commands, and help imports none of their modules."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from octollm.cli.app import COMMANDS, LazyGroup, app, load_commands

OUTPUT = CliRunner()


@pytest.fixture(scope="module")
def group() -> LazyGroup:
    return load_commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_panel_and_help_are_those_of_the_command(group, name):
    _module, panel, text = COMMANDS[name]
    command = group.commands[name]
    assert command.rich_help_panel == panel
    assert (command.help or "").partition("\n\n")[0].replace("\n", " ") == text


def test_every_command_of_a_module_is_in_the_table(group):
    assert set(group.commands) == set(COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_import_no_command(arguments):
    code = (
        "import json, sys\nfrom octollm.cli.app import COMMANDS, app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
        "wanted = {f'octollm.cli.{row[0]}' for row in COMMANDS.values()} | {'octollm.client', 'octollm.cli.runtime'}\n"
        "print(json.dumps(sorted(wanted & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_an_unknown_command_is_answered_with_a_similar_one():
    result = OUTPUT.invoke(app, ["tsk"])
    assert result.exit_code == 2
    assert "Did you mean 'task'" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("alias", "name"), [("join", "enrol"), ("joins", "enrolments"), ("revoke-join", "revoke-enrolment")]
)
def test_the_earlier_names_of_enrolment_commands_are_hidden_aliases(group, alias, name):
    commands = group.commands["keys"].commands
    assert commands[alias].hidden
    assert not commands[name].hidden
    assert inspect.unwrap(commands[alias].callback) is inspect.unwrap(commands[name].callback)
    assert [parameter.opts for parameter in commands[alias].params] == [
        parameter.opts for parameter in commands[name].params
    ]
