"""Processes, and tables sharded over them."""
