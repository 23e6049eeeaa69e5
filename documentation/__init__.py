"""How the documentation is built (`make docs`) and run (`make docs-check`)."""
