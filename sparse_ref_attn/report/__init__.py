"""What a finished run did, in numbers: the summary and the attention diagnostics."""

from .attention import attention_table
from .numbers import FlopSummary, summary

__all__ = ["FlopSummary", "attention_table", "summary"]
