"""Tests of sparse_ref_attn."""
