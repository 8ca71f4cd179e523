"""The stages of a recipe in order: plan, run, gates, results."""
