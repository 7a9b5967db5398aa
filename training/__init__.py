"""Training framework for flow maps and consistency models: models, objectives, samplers, data."""
