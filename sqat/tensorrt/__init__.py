"""From the exported file to a running sparse engine: build recipe, builder, and what the log says was chosen."""
