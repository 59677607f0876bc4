"""The command line in this process."""

import sys

import pytest

from fedapt.cli import main


def in_process(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `main()` in this process: as in a process of its own, without its imports."""
    before = sys.argv
    sys.argv = ["fedapt", *map(str, arguments)]
    code = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err
