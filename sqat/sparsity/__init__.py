"""N:M sparsity on tensors: masks, criteria, schedules and mask packing."""
