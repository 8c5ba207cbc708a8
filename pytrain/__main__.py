"""The command line: `python -m pytrain info`, `demo`, `parity` and `report`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m pytrain COMMAND

  info   what was built, what this machine has, and which backend each optimizer takes
  demo   train real models on real data, torch against pytrain, and write report.html
  parity A.py B.py   find the first step and tensor in which two trainings differ
  report RUN         plot the metrics of a run as one HTML file

COMMAND --help has the options of the last three.
"""


def main(argv: list[str]) -> int:
    """Run a command; the exit status."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "info" and not rest:
        from pytrain.info import info

        print(info())
        return 0
    if command == "demo":
        from pytrain.demo import main as demo

        return demo(rest)
    if command == "parity":
        from pytrain.parity import main as parity

        return parity(rest)
    if command == "report":
        from pytrain.report import main as report

        return report(rest)
    asked = command in ("-h", "--help")
    print(USAGE if asked or not command else f"unknown command {' '.join(argv)!r}\n\n{USAGE}", end="")
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
