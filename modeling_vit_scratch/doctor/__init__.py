"""Finds what is wrong with a network that maps images to logits, and says it: `examine`."""

from .examination import CHECKS, examine
from .findings import Finding, report

__all__ = ["CHECKS", "Finding", "examine", "report"]
