"""One module per command: HELP, EXAMPLE, `add` for its arguments, `run` for what it does.

Commands import what they need when they run: --help answers at once.
"""
