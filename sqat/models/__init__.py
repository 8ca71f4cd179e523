"""Models of every kind: how they are loaded, which layers are treated, how they are saved."""
