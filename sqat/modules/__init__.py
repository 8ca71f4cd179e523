"""Changes to a model, each with its inverse: masks, fake quantizers, hooks at activation sites."""
