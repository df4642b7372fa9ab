"""The papers' tables and figures on the small trained model: a row a measurement, in ``benchmarks/results/studies``."""
