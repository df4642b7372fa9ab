"""The procedural in-context task, and the small FLUX.1 Kontext pipeline that is trained on it."""
