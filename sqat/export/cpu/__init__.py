"""Target `cpu-sparse`: an encoder's parts as numbers, packed weights, and the graph of nodes of the domain `sqat`."""
