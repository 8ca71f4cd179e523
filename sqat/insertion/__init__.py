"""Changes to a model, each with its inverse: taps at sites, fake quantizers, masks on weights."""
