"""Upstream's import path for parallel execution. Single-process in this version; nothing lives here yet."""
