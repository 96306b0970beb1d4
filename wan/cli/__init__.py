"""Command lines. Importing this package or `wan.cli.env` loads no torch, so that the environment can be set first."""
