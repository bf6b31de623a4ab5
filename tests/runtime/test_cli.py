"""Exit codes and messages."""

import pytest

from runtime.cli import CommandParser, run_command
from runtime.errors import RunError, UserError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("mend this"), 2, "error: mend this"),
        (RunError("it broke"), 1, "error: it broke"),
        (OSError(28, "No space left on device", "x.pt"), 1, "error: No space left on device: x.pt"),
        (MemoryError(), 1, "error: out of memory"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
    ],
)
def test_exceptions_become_codes(capsys, error, code, text):
    def main(argv):
        raise error

    assert run_command(main, []) == code
    assert capsys.readouterr().err.startswith(text)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda argv: 1 // 0, [])


def test_success_and_parser_errors(capsys):
    assert run_command(lambda argv: None, []) == 0
    parser = CommandParser(prog="tool")
    parser.add_argument("--number", type=int)
    assert run_command(lambda argv: parser.parse_args(argv) and None, ["--numbr", "3"]) == 2
    assert "did you mean --number?" in capsys.readouterr().err
    assert run_command(lambda argv: parser.parse_args(argv) and None, ["--number", "x"]) == 2
    assert "tool --help" in capsys.readouterr().err


def test_names_of_files_do_not_command_the_terminal(capsys):
    def main(argv):
        raise UserError("a\x1b[2Jb.png is damaged\nsecond line, é")

    assert run_command(main, []) == 2
    assert capsys.readouterr().err == "error: a\\x1b[2Jb.png is damaged\nsecond line, é\n"
