"""Scripts around sqat: data sets, benchmarks, results, documents, faults."""
