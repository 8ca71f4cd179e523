"""Sparse linears in torch: packed 2:4 weights run by cuSPARSELt, CUTLASS or, anywhere, a reference."""
