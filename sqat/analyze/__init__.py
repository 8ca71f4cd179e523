"""`sqat analyze`: what pruning and int8 would do to a trained model, layer by layer, before anything is trained."""
