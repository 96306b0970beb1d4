"""Upstream's place of the class that reads control videos."""

from __future__ import annotations

from wan.conditioning.processor import VaceVideoProcessor

__all__ = ["VaceVideoProcessor"]
