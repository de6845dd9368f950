"""What is done with runs that were trained: evaluation, predictions, weights to and from other libraries."""
