"""``python -m ktray``."""

from ktray.cli import run_program

run_program()
