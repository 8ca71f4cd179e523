"""`sqat analyze`: how much pruning and int8 change a trained model, layer by layer, before anything is trained."""
